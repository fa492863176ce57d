"""GLS: the geometric mean of the losses."""

from __future__ import annotations

import torch
from torch import Tensor

from igb_kernels import ops
from igb_kernels.backends.reference import LossProblem
from igb_kernels.card import Card
from igb_kernels.losses.base import LossBalancer
from igb_kernels.losses.log import TINY, unless_negative
from igb_kernels.status import Status


class GLS(LossBalancer):
    """Minimises the geometric mean of the losses M = (Π_k L_k)^(1/K) (Chennupati et al., CVPR workshops 2019,
    arXiv:1904.08492, section 3.3).

    s_k = M / (K L_k), computed from logarithms: the product of many losses under- or overflows, the mean does not. The
    direction of the update does not change when a loss is multiplied by a constant.

    Where a loss is 0, M is 0 and no other task can move it: all scales are 0, and the status says NON_POSITIVE_LOSS.
    For a negative loss it says so, too, and all scales are NaN.
    """

    name = "gls"
    card = Card(
        title="GLS",
        paper="Chennupati et al., CVPR workshops 2019, arXiv:1904.08492",
        formula="M / (K L_k), M = prod(L)^(1/K)",
        inputs="losses",
        memory="nothing",
        passes="1",
        invariance="direction",
        degree=1.0,
        hazards="a loss of 0 stops all tasks; a task that can reach 0 alone takes over",
    )


@ops.register_rule("gls")
def _reference(problem: LossProblem) -> tuple[Tensor, Status]:
    losses, tasks = problem.losses, len(problem.losses)
    if (losses.amin() == 0) and not (losses < 0).any():
        return torch.zeros_like(losses), Status.NON_POSITIVE_LOSS
    clamped = losses.clamp_min(TINY)
    return unless_negative(losses, (clamped ** (1 / tasks)).prod() / clamped / tasks)
