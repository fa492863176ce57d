"""Equal weights."""

from __future__ import annotations

from torch import Tensor

from igb_kernels import ops
from igb_kernels.backends.reference import Problem
from igb_kernels.card import Card
from igb_kernels.gradients._reference import measure
from igb_kernels.gradients.base import GradientBalancer, Needs
from igb_kernels.status import Status


class Equal(GradientBalancer):
    """The plain sum of the (scaled) losses: w_k = 1. One backward pass serves all tasks."""

    name = "equal"
    card = Card(
        title="Equal weights",
        paper="",
        formula="1",
        inputs="nothing",
        memory="nothing",
        passes="1",
        degree=1.0,
    )

    def needs(self) -> Needs:
        return Needs.NOTHING


@ops.register_solver("equal")
def _reference(problem: Problem) -> tuple[Tensor, Status]:
    return problem.gram.new_ones(len(problem.gram)), measure(problem.gram).status
