"""ConFIG: a direction with the same angle to all task gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from igb_kernels import ops
from igb_kernels.backends.reference import Problem
from igb_kernels.card import Card
from igb_kernels.gradients._reference import measure, unit_diagonal
from igb_kernels.gradients.base import WithPreference
from igb_kernels.status import Status


class ConFIG(WithPreference):
    """The direction pinv(U) p of equal angles to all unit gradients U, as long as the gradients' projections on it
    together (Liu et al., 2024, equations 2 to 4).

    With cosines C it is v = C⁺ p, w_k = (nᵀCv / vᵀCv) v_k / n_k for norms n. Unlike IMTL-G's, whose line it shares, it
    descends every task while C is not singular. Where C is (status PARETO_STATIONARY) the pseudo-inverse comes as close
    to p as the gradients allow; exactly opposed gradients give 0.

    Args:
        preference: p [K], at least 0: the cosines' ratios; None: ones.
    """

    name = "config"
    card = Card(
        title="ConFIG",
        paper="Liu et al., 2024, arXiv:2408.11104",
        formula="cosines of the update with the gradients equal (or as preference); length: the sum of projections",
        inputs="Gramian",
        memory="K gradients",
        passes="K",
        invariance="direction",
        degree=1.0,
        hazards="where gradients depend on each other (more tasks than parameters, say) cosines may differ in sign",
    )

    def __repr__(self) -> str:
        return "ConFIG()" if self.preference is None else f"ConFIG(preference={self.preference.tolist()})"


@ops.register_solver("config", needs_gram=True, per_task=lambda tasks: (tasks,))
def _reference(problem: Problem) -> tuple[Tensor, Status]:
    tasks = measure(problem.gram)
    status = tasks.status
    if not tasks.any:
        return torch.ones_like(tasks.norms), status
    norms = tasks.norms[tasks.active] / tasks.norms.max()
    wanted = torch.ones_like(norms) if problem.per_task is None else problem.per_task[tasks.active]
    values, vectors = torch.linalg.eigh(unit_diagonal(problem.gram, tasks))
    rounding = 16 * len(norms) * torch.finfo(torch.float64).eps
    kept = values > rounding
    if not kept.all():
        status |= Status.PARETO_STATIONARY
    values, vectors = values[kept], vectors[:, kept]
    parts = vectors.T @ wanted
    if Status.PARETO_STATIONARY in status:  # rounding is not a direction
        parts = torch.where(parts.abs() > rounding * (vectors.abs().T @ wanted), parts, 0.0)
    v, reached = vectors @ (parts / values), vectors @ parts
    square = v @ reached
    if square <= 0:
        return torch.zeros_like(tasks.norms), status
    return tasks.spread((norms @ reached) / square * v / norms), status
