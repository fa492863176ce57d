"""Logarithmic losses."""

from __future__ import annotations

import torch
from torch import Tensor

from igb_kernels import ops
from igb_kernels.backends.reference import LossProblem
from igb_kernels.card import Card
from igb_kernels.losses.base import LossBalancer
from igb_kernels.status import Status

TINY = 1e-20
"""Losses below count as this: a finished task with a zero gradient then contributes 0, not 0 · inf."""


class Log(LossBalancer):
    """Scale-invariant loss balancing: φ_k = log(L_k + eps), s_k = 1 / (L_k + eps).

    The update does not change when a loss is multiplied by a constant. Losses must not be negative: for one that is,
    all scales are NaN and the status says NON_POSITIVE_LOSS.

    Used by DB-MTL with eps = 1e-8 (Lin et al. 2023, arXiv:2308.12029, equation 1); as "SI" in Dai et al. 2023,
    arXiv:2307.15429, with eps = 0.
    """

    name = "log"
    card = Card(
        title="Log (SI)",
        paper="Dai et al., UAI 2023, arXiv:2307.15429",
        formula="1 / (L_k + eps)",
        inputs="losses",
        memory="nothing",
        passes="1",
        invariance="update",
        degree=0.0,
        hazards="unbounded below: a task that can reach loss 0 alone takes over",
    )

    def __init__(self, eps: float = 0.0) -> None:
        super().__init__()
        if not 0 <= eps < float("inf"):
            raise ValueError(f"eps must be a finite number, at least 0; found {eps!r}")
        self.eps = float(eps)

    def options(self) -> dict[str, float]:
        return {"eps": self.eps}

    def __repr__(self) -> str:
        return f"Log(eps={self.eps})"


def unless_negative(losses: Tensor, scales: Tensor) -> tuple[Tensor, Status]:
    """The scales with their status: all NaN where a loss is negative."""
    if bool((losses < 0).any()):
        return torch.full_like(scales, torch.nan), Status.NON_POSITIVE_LOSS
    return scales, Status(0)


@ops.register_rule("log", options={"eps": 0.0})
def _reference(problem: LossProblem) -> tuple[Tensor, Status]:
    shifted = problem.losses + problem.options["eps"]
    return unless_negative(shifted, 1 / shifted.clamp_min(TINY))
