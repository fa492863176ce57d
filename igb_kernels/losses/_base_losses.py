"""Base losses: what a task's loss was early in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from igb_kernels.status import UNUSABLE, UsableSteps


class BaseLosses:
    """The mean losses of one epoch, or of the first steps; or given. Steps that cannot be used do not count.

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
        self._recorded = UsableSteps()
        self._base: Tensor | None = None
        self._sum: Tensor | None = (
            None  # while the base is measured: summed losses, and the number of steps behind them
        )
        self._given = given is not None
        if given is not None:
            self._base = torch.as_tensor(given, dtype=torch.float64).detach().clone()
            if self._base.dim() != 1 or not bool((self._base > 0).all()) or not bool(self._base.isfinite().all()):
                raise ValueError(f"base_losses must be K positive finite numbers, found {self._base.tolist()}")

    def start(self, tasks: int, device: torch.device) -> None:
        """Before the first step; on `device` everything is kept."""
        if self._given and self._base is not None:
            if len(self._base) != tasks:
                raise ValueError(
                    f"base_losses must have one number for each of the {tasks} tasks, found {len(self._base)}"
                )
            self._base = self._base.to(device)
        else:
            self._base = torch.full((tasks,), torch.nan, dtype=torch.float64, device=device)
            self._sum = torch.zeros(tasks + 1, dtype=torch.float64, device=device)

    def value(self) -> Tensor | None:
        """The base losses [K], float64; NaN until they are known, None before the first step."""
        if self._sum is not None and self._measured():
            # Where no step could be used this is NaN, which means unknown.
            self._base, self._sum = self._sum[:-1] / self._sum[-1], None
        return self._base

    def _measured(self) -> bool:
        return self._recorded.count == self.steps if self.steps is not None else self._epoch > self.base_epoch

    def add(self, losses: Tensor, status: Tensor) -> None:
        """A step has ended with these losses [K] and this status, int32 []."""
        if self._sum is None or (self.steps is None and self._epoch != self.base_epoch):
            return
        entry = torch.cat([losses.double(), losses.new_ones(1, dtype=torch.float64)])
        self._sum = self._sum + entry.masked_fill((status & UNUSABLE) != 0, 0.0)
        if self.steps is not None:
            self._recorded.add(status)

    def end_epoch(self) -> None:
        """An epoch has ended."""
        self._epoch += 1

    def settled(self) -> bool:
        """Whether nothing is left to be measured."""
        self.value()
        return self._sum is None

    def state_dict(self) -> dict[str, Any]:
        """What influences the next step."""
        base = self.value()
        return {"epoch": self._epoch, "recorded": self._recorded.count, "base": base, "sum": self._sum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; ValueError where it does not fit, with nothing changed."""
        base = state["base"]
        if self._given and self._base is not None and (base is None or len(base) != len(self._base)):
            raise ValueError(f"base_losses has {len(self._base)} tasks, but the state's are {base}")
        self._epoch, self._recorded = state["epoch"], UsableSteps(state["recorded"])
        self._base, self._sum = state["base"], state["sum"]

    def arguments(self) -> str:
        """As in a call, for the repr."""
        if self._given:
            return f"base_losses={[] if self._base is None else self._base.tolist()}"
        return f"steps={self.steps}" if self.steps is not None else f"base_epoch={self.base_epoch}"
