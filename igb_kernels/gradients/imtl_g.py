"""IMTL-G: impartial gradient balancing."""

from __future__ import annotations

import torch
from torch import Tensor

from igb_kernels import ops
from igb_kernels.backends.reference import Problem
from igb_kernels.card import Card
from igb_kernels.gradients._reference import measure, unit_diagonal
from igb_kernels.gradients.base import GradientBalancer
from igb_kernels.status import Status


class IMTLG(GradientBalancer):
    """Weights with sum 1 that give the update equal projections on all task gradients (Liu et al., ICLR 2021,
    equation 6): v = D⁻¹ C⁻¹ 1 with norms D and cosines C, w = v / Σv.

    With three tasks or more Σv can be negative; the update then ascends every task, and the status says NEGATIVE_SUM.

    Args:
        descent_safe: divide by |Σv| instead, so that the update always descends every task.
    """

    name = "imtl_g"
    card = Card(
        title="IMTL-G",
        paper="Liu et al., ICLR 2021",
        formula="equal projections of the update on all unit gradients; sum 1",
        inputs="Gramian",
        memory="K gradients",
        passes="K",
        invariance="direction",
        degree=1.0,
        hazards="can ascend every task (status NEGATIVE_SUM) unless descent_safe",
    )

    def __init__(self, *, descent_safe: bool = False) -> None:
        super().__init__()
        self.descent_safe = bool(descent_safe)

    def options(self) -> dict[str, float]:
        return {"descent_safe": float(self.descent_safe)}


@ops.register_solver("imtl_g", options={"descent_safe": 0.0}, needs_gram=True)
def _reference(problem: Problem) -> tuple[Tensor, Status]:
    gram = problem.gram
    tasks = measure(gram)
    status = tasks.status
    if not tasks.any:
        return torch.full_like(tasks.norms, 1 / len(tasks.norms)), status
    cosines = unit_diagonal(gram, tasks)
    one = torch.ones(len(cosines), dtype=torch.float64)
    smallest, rounding = float(torch.linalg.eigvalsh(cosines)[0]), 16 * len(one) * torch.finfo(torch.float64).eps
    ridge = 0.0
    while smallest + ridge <= rounding:
        ridge = max(1e-8, rounding) if ridge == 0 else 1e3 * ridge
        status |= Status.PARETO_STATIONARY
    v = torch.zeros_like(one)
    for _ in range(3):  # the solve, and two refinements that remove the ridge's bias
        v = v + torch.linalg.solve(cosines + ridge * torch.eye(len(one), dtype=torch.float64), one - cosines @ v)
    v = v / tasks.norms[tasks.active]
    total = v.sum()
    if total.abs() < 1e-12 * v.abs().sum():
        return torch.zeros_like(tasks.norms), status | Status.PARETO_STATIONARY
    if total < 0:
        status |= Status.NEGATIVE_SUM
    return tasks.spread(v / (total.abs() if problem.options["descent_safe"] else total)), status
