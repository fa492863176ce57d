"""Improvable gap balancing, version 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from igb_kernels import ops
from igb_kernels.backends.reference import LossProblem
from igb_kernels.card import Card
from igb_kernels.losses._means import BaseLosses
from igb_kernels.losses.base import LossBalancer
from igb_kernels.losses.log import TINY, unless_negative
from igb_kernels.status import Status


class IGBv1(LossBalancer):
    """Weights log losses by how far each task still is from its base loss.

    s_k = W_k / L_k with W = K · softmax(L / L_base) (Dai et al. 2023, arXiv:2307.15429, section 4.1). Until the base
    losses are known, W = 1.

    The base losses are the mean training losses of one epoch, told by `Balancer.end_epoch`; or of the first `steps`
    steps; or given. Steps that cannot be used (a negative or non-finite loss, a non-finite gradient) do not count.
    Where tasks are missing, each has its own first steps; one that the epoch lacks takes the next that has it.

    Gradient-balancing methods that ignore the length of each row (DB-MTL, IMTL-G, EMTL, Nash-MTL) keep their
    direction on the shared parameters under any loss scale; there, W acts on the task-specific parameters.

    Args:
        base_epoch: the epoch (from 0) whose mean losses are the base; the paper's and IGB4MTL's is the second.
        steps: use the mean over the first `steps` steps instead. Until then the host counts them, and waits for the
            end of each before it ends the next.
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
        self.base = BaseLosses(base_epoch, steps, base_losses)

    @property
    def base_losses(self) -> Tensor | None:
        """The base losses [K], float64; NaN until they are known, None before the first step. May be set to K positive
        numbers."""
        return self.base.value()

    @base_losses.setter
    def base_losses(self, values: Sequence[float] | Tensor) -> None:
        self.base.give(values)

    def start(self, tasks: int, device: torch.device) -> None:
        self.base.start(tasks, device)

    def per_task(self) -> Tensor | None:
        base = self.base.value()
        return None if base is None else self.of_step(base)

    def commit(self, losses: Tensor, scales: Tensor, status: Tensor) -> None:
        self.base.add(losses, status, self.active)

    def host_decision(self) -> str | None:
        counts = self.base.steps is not None and not self.base.settled()
        return f"{self!r} has yet to measure its base losses" if counts else None

    def end_epoch(self) -> None:
        self.base.end_epoch()

    def state_dict(self) -> dict[str, Any]:
        """See the base class."""
        return self.base.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See the base class."""
        self.base.load_state_dict(state)

    def __repr__(self) -> str:
        return f"IGBv1({self.base.arguments()})"


@ops.register_rule("igb_v1", per_task=lambda tasks: (tasks,), needs_per_task=True)
def _reference(problem: LossProblem) -> tuple[Tensor, Status]:
    losses, per_task = problem.losses, problem.per_task
    scales = 1 / losses.clamp_min(TINY)
    assert per_task is not None  # checked by the op
    if not per_task.isnan().any():
        scales = scales * len(losses) * torch.softmax((losses / per_task.clamp_min(TINY)).clamp_max(1e300), dim=0)
    return unless_negative(losses, scales)
