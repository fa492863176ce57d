"""Mean losses: of an epoch, of the first steps, and as what tasks are compared with ever after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from igb_kernels.active import ActiveTasks
from igb_kernels.backends import captures_graph
from igb_kernels.losses._readback import Readback
from igb_kernels.status import UNUSABLE


class MeanLosses:
    """The mean losses since the last `take`: summed in place on the losses' device, so that the replays of a CUDA graph
    count as well. Steps that cannot be used do not count, nor those in which a task is missing, for that task."""

    def __init__(self, sums: Tensor) -> None:
        self.sums = sums
        """Each task's summed losses, and the number of steps behind them [2, K], float64."""

    @classmethod
    def of(cls, tasks: int, device: torch.device) -> MeanLosses:
        """Before the first step."""
        return cls(torch.zeros(2, tasks, dtype=torch.float64, device=device))

    def add(self, losses: Tensor, status: Tensor, active: ActiveTasks | None, most: int | None = None) -> None:
        """A step has ended with these losses of its tasks [A] and this status, int32 []; `most` steps count."""
        values = losses.double()
        entry = torch.stack([values, torch.ones_like(values)]).masked_fill((status & UNUSABLE) != 0, 0.0)
        if most is not None:
            so_far = self.sums[1] if active is None else active.part(self.sums[1])
            entry = entry.masked_fill(so_far >= most, 0.0)
        if active is None:
            self.sums += entry
        else:
            self.sums.index_add_(1, active.index, entry)

    def means(self) -> Tensor:
        """[K], NaN for a task without usable steps."""
        return self.sums[0] / self.sums[1]

    def take(self) -> Tensor:
        """The means [K]. Starts anew."""
        means = self.means()
        self.sums.zero_()
        return means


class BaseLosses:
    """The mean losses of one epoch, or of each task's first steps; or given.

    A task that has no usable step in that epoch has the mean of the next epoch with one.

    Args:
        base_epoch: the epoch (from 0), as `end_epoch` tells them.
        steps: take the first `steps` steps instead.
        given: take these K positive numbers instead.
    """

    def __init__(
        self, base_epoch: int = 1, steps: int | None = None, given: Sequence[float] | Tensor | None = None
    ) -> None:
        if steps is not None and given is not None:
            raise ValueError("steps and base_losses exclude each other: the base is measured or given")
        if not isinstance(base_epoch, int) or base_epoch < 0:
            raise ValueError(f"base_epoch must be an integer of at least 0, found {base_epoch!r}")
        if steps is not None and (not isinstance(steps, int) or steps < 1):
            raise ValueError(f"steps must be an integer of at least 1, found {steps!r}")
        self.base_epoch, self.steps = base_epoch, steps
        self._epoch = 0
        # In place and where the losses are, for the replays of a CUDA graph.
        self._base: Tensor | None = None
        self._means: MeanLosses | None = None
        self._settled = self._given = False
        self._fewest = Readback()  # of the tasks' numbers of steps
        if given is not None:
            self.give(given)

    def give(self, values: Sequence[float] | Tensor) -> None:
        """From now on the base losses are these K positive numbers, and nothing is measured."""
        base = torch.as_tensor(values, dtype=torch.float64).detach().clone()
        if base.dim() != 1 or not bool((base > 0).all()) or not bool(base.isfinite().all()):
            raise ValueError(f"base_losses must be K positive finite numbers, found {base.tolist()}")
        if self._base is None:
            self._base = base
        else:
            _check_tasks(base, len(self._base))
            self._base.copy_(base)
        self._settled = self._given = True

    def start(self, tasks: int, device: torch.device) -> None:
        """Before the first step; on `device` everything is kept."""
        if self._given and self._base is not None:
            _check_tasks(self._base, tasks)
            self._base = self._base.to(device)
        else:
            self._base = torch.full((tasks,), torch.nan, dtype=torch.float64, device=device)
            self._means = MeanLosses.of(tasks, device)

    def value(self) -> Tensor | None:
        """The base losses [K], float64; NaN until they are known, None before the first step."""
        return self._base

    def add(self, losses: Tensor, status: Tensor, active: ActiveTasks | None) -> None:
        """A step has ended with these losses of its tasks [A] and this status, int32 []."""
        if self.settled() or self._means is None or self._base is None:
            return
        if self.steps is None and self._epoch < self.base_epoch and not captures_graph(losses.device):
            return  # a captured step is replayed in later epochs, too
        self._means.add(losses, status, active, self.steps)
        if self.steps is not None:
            counts = self._means.sums[1]
            self._base.copy_(torch.where(counts >= self.steps, self._means.means(), torch.nan))
            self._fewest.put(counts.min())

    def end_epoch(self) -> None:
        """An epoch has ended."""
        if self.steps is None and not self._settled and self._means is not None and self._base is not None:
            means = self._means.take()
            if self._epoch >= self.base_epoch:
                self._base.copy_(torch.where(self._base.isnan(), means, self._base))
                self._settled = not bool(self._base.isnan().any())
        self._epoch += 1

    def settled(self) -> bool:
        """Whether nothing is left to be measured; with `steps`, waits for the end of the last step."""
        if self.steps is not None and not self._settled and (fewest := self._fewest.take()) is not None:
            self._settled = float(fewest) >= self.steps
        return self._settled

    def state_dict(self) -> dict[str, Any]:
        """What influences the next step."""
        sums = None if self._means is None else self._means.sums
        return {"epoch": self._epoch, "base": self._base, "sums": sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; ValueError where it does not fit, with nothing changed."""
        base, sums = state["base"], state["sums"]
        if self._given and self._base is not None and (base is None or len(base) != len(self._base)):
            raise ValueError(f"base_losses has {len(self._base)} tasks, but the state's are {base}")
        self._epoch, self._base = state["epoch"], base
        self._means = None if sums is None else MeanLosses(sums)
        self._settled = base is not None and not bool(base.isnan().any())
        self._fewest.take()  # of a step before the state

    def arguments(self) -> str:
        """As in a call, for the repr."""
        if self._given:
            return f"base_losses={[] if self._base is None else self._base.tolist()}"
        return f"steps={self.steps}" if self.steps is not None else f"base_epoch={self.base_epoch}"


def _check_tasks(base: Tensor, tasks: int) -> None:
    if len(base) != tasks:
        raise ValueError(f"base_losses must have one number for each of the {tasks} tasks, found {len(base)}")
