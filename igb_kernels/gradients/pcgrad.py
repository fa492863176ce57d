"""PCGrad: gradient surgery."""

from __future__ import annotations

import torch
from torch import Tensor

from igb_kernels import ops
from igb_kernels.backends.reference import Problem
from igb_kernels.card import Card
from igb_kernels.gradients._reference import measure
from igb_kernels.gradients._visits import STATE_COUNT, VisitingGradientBalancer, orders_of
from igb_kernels.gradients.base import check_number
from igb_kernels.status import Status

REDUCTIONS = ("sum", "mean")


class PCGrad(VisitingGradientBalancer):
    """Removes from each gradient its component along every other that it conflicts with (Yu et al., NeurIPS 2020,
    algorithm 1), one after another in random order; the update is the sum of the results.

    c_i starts as g_i; for each j ≠ i, in an order of its own, c_i ← c_i − (c_i·g_j / ‖g_j‖²) g_j where c_i·g_j < 0.
    Without conflicts all weights are 1. With two tasks the update never ascends either.

    The orders come from a generator of the solver, on the gradients' device: a function of seed and step.

    Args:
        seed: of the orders, 0 to 2**53 − 1; None: drawn from torch's global generator on the CPU when the balancer
            takes its first step. The state holds it.
        visit_self: c_i visits g_i as well, when its turn comes: after other visits they can be in conflict.
        eps: added to ‖g_j‖².
        reduction: "sum" or "mean" of the K results.

    Raises:
        ValueError: where an argument is out of range.
    """

    name = "pcgrad"
    card = Card(
        title="PCGrad",
        paper="Yu et al., NeurIPS 2020, arXiv:2001.06782",
        formula="sum of gradients, each made orthogonal to those it conflicts with",
        inputs="Gramian",
        memory="K gradients",
        passes="K",
        degree=1.0,
        hazards="random: give a seed; with three tasks or more the update can ascend some",
        parity="visit_self=True, eps=1e-8 is LibMTL's",
    )

    def __init__(
        self, seed: int | None = None, *, visit_self: bool = False, eps: float = 0.0, reduction: str = "sum"
    ) -> None:
        super().__init__(seed)
        self.visit_self = bool(visit_self)
        self.eps = check_number("eps", eps, 0)
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {REDUCTIONS}, found {reduction!r}")
        self.reduction = reduction

    def options(self) -> dict[str, float]:
        return {"visit_self": float(self.visit_self), "eps": self.eps, "mean": float(self.reduction == "mean")}


@ops.register_solver(
    "pcgrad",
    options={"visit_self": 0.0, "eps": 0.0, "mean": 0.0},
    needs_gram=True,
    per_task=lambda tasks: (tasks, tasks),
    initial_state=lambda tasks, options: [0.0, 0.0],
    state_head=STATE_COUNT,
)
def _reference(problem: Problem) -> tuple[Tensor, Status]:
    gram, options = (problem.gram + problem.gram.T) / 2, problem.options
    tasks, orders = measure(gram), orders_of(problem)
    if orders is None:
        return torch.full_like(tasks.norms, torch.nan), Status.NON_FINITE
    count = len(gram)
    scale = 1 / count if options["mean"] else 1.0
    if not tasks.any:
        return torch.full_like(tasks.norms, scale), tasks.status
    rows, altered = torch.arange(count), torch.eye(count, dtype=torch.float64)  # all gradients at once
    for visited in orders.T:
        inner = (altered * gram[visited]).sum(dim=1)
        conflicts = (inner < 0) & tasks.active[visited] & tasks.active
        if not options["visit_self"]:
            conflicts &= visited != rows
        altered[rows, visited] -= torch.where(conflicts, inner / (gram.diagonal()[visited] + options["eps"]), 0.0)
    return torch.where(tasks.active, scale * altered[tasks.active].sum(dim=0), 0.0), tasks.status
