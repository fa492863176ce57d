"""Improvable gap balancing, version 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from igb_kernels import ops
from igb_kernels.backends.reference import LossProblem
from igb_kernels.card import Card
from igb_kernels.losses.base import LossBalancer
from igb_kernels.losses.log import TINY, unless_negative
from igb_kernels.status import UNUSABLE, Status, UsableSteps


class IGBv1(LossBalancer):
    """Weights log losses by how far each task still is from its base loss.

    s_k = W_k / L_k with W = K · softmax(L / L_base) (Dai et al. 2023, arXiv:2307.15429, section 4.1). Until the base
    losses are known, W = 1.

    The base losses are the mean training losses of one epoch, told by `Balancer.end_epoch`; or of the first `steps`
    steps; or given. Steps that cannot be used (a negative or non-finite loss, a non-finite gradient) do not count.

    Gradient-balancing methods that ignore the length of each row (DB-MTL, IMTL-G, EMTL, Nash-MTL) keep their
    direction on the shared parameters under any loss scale; there, W acts on the task-specific parameters.

    Args:
        base_epoch: the epoch (from 0) whose mean losses are the base; the paper's and IGB4MTL's is the second.
        steps: use the mean over the first `steps` steps instead. Until then the host counts them, and waits for the
            end of each before it starts the next.
        base_losses: use these K positive numbers instead.
    """

    name = "igb_v1"
    card = Card(
        title="IGBv1",
        paper="Dai et al., UAI 2023, arXiv:2307.15429",
        formula="K softmax(L / L_base)_k / L_k",
        inputs="losses",
        memory="nothing",
        passes="1",
        invariance="update",
        degree=0.0,
        hazards="needs end_epoch(), or steps=, for its base losses; until then as Log",
    )

    def __init__(
        self, base_epoch: int = 1, *, steps: int | None = None, base_losses: Sequence[float] | Tensor | None = None
    ) -> None:
        super().__init__()
        if steps is not None and base_losses is not None:
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
        self._given = base_losses is not None
        if base_losses is not None:
            self._base = torch.as_tensor(base_losses, dtype=torch.float64).detach().clone()
            if self._base.dim() != 1 or not bool((self._base > 0).all()) or not bool(self._base.isfinite().all()):
                raise ValueError(f"base_losses must be K positive finite numbers, found {self._base.tolist()}")

    @property
    def base_losses(self) -> Tensor | None:
        """The base losses [K], float64; NaN until they are known, None before the first step."""
        return self.per_task()

    def start(self, tasks: int, device: torch.device) -> None:
        if self._given and self._base is not None:
            if len(self._base) != tasks:
                raise ValueError(
                    f"base_losses must have one number for each of the {tasks} tasks, found {len(self._base)}"
                )
            self._base = self._base.to(device)
        else:
            self._base = torch.full((tasks,), torch.nan, dtype=torch.float64, device=device)
            self._sum = torch.zeros(tasks + 1, dtype=torch.float64, device=device)

    def per_task(self) -> Tensor | None:
        if self._sum is not None and self._measured():
            # Where no step could be used this is NaN, which means unknown.
            self._base, self._sum = self._sum[:-1] / self._sum[-1], None
        return self._base

    def _measured(self) -> bool:
        return self._recorded.count == self.steps if self.steps is not None else self._epoch > self.base_epoch

    def commit(self, losses: Tensor, scales: Tensor, status: Tensor) -> None:
        if self._sum is None or (self.steps is None and self._epoch != self.base_epoch):
            return
        entry = torch.cat([losses.double(), losses.new_ones(1, dtype=torch.float64)])
        self._sum = self._sum + entry.masked_fill((status & UNUSABLE) != 0, 0.0)
        if self.steps is not None:
            self._recorded.add(status)

    def host_decision(self) -> str | None:
        self.per_task()
        return None if self._sum is None else f"{self!r} has yet to measure its base losses"

    def end_epoch(self) -> None:
        self._epoch += 1

    def state_dict(self) -> dict[str, Any]:
        """See the base class."""
        base = self.per_task()
        return {"epoch": self._epoch, "recorded": self._recorded.count, "base": base, "sum": self._sum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See the base class."""
        base = state["base"]
        if self._given and self._base is not None and (base is None or len(base) != len(self._base)):
            raise ValueError(f"base_losses has {len(self._base)} tasks, but the state's are {base}")
        self._epoch, self._recorded = state["epoch"], UsableSteps(state["recorded"])
        self._base, self._sum = state["base"], state["sum"]

    def __repr__(self) -> str:
        if self._given:
            return f"IGBv1(base_losses={[] if self._base is None else self._base.tolist()})"
        return f"IGBv1(steps={self.steps})" if self.steps is not None else f"IGBv1(base_epoch={self.base_epoch})"


@ops.register_rule("igb_v1", per_task=lambda tasks: (tasks,), needs_per_task=True)
def _reference(problem: LossProblem) -> tuple[Tensor, Status]:
    losses, per_task = problem.losses, problem.per_task
    scales = 1 / losses.clamp_min(TINY)
    assert per_task is not None  # checked by the op
    if not per_task.isnan().any():
        scales = scales * len(losses) * torch.softmax((losses / per_task.clamp_min(TINY)).clamp_max(1e300), dim=0)
    return unless_negative(losses, scales)
