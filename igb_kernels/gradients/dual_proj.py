"""DualProj: the projection of the mean gradient on the cone of the updates that ascend no task."""

from __future__ import annotations

from torch import Tensor

from igb_kernels import ops
from igb_kernels.backends.reference import Problem
from igb_kernels.card import Card
from igb_kernels.gradients._cone import ConeProjection, project, reference
from igb_kernels.status import Status


class DualProj(ConeProjection):
    """The update nearest to Σ_k u_k g_k that ascends no task: min wᵀGw, w ≥ u (the dual of gradient episodic memory,
    Lopez-Paz & Ranzato, NeurIPS 2017, with the preference of Quinton & Rey, 2024).

    Exact: g_k · d ≥ 0 up to rounding, whatever the gradients' lengths. Without conflict w = u. A task without gradient
    has weight u_k.

    Args:
        preference: u [K], at least 0, not all 0; None: 1 / K each.
        reg_eps: projects with G + reg_eps · trace(G) · I in place of G. TorchJD and LibMTL do so with 1e-4, and then
            leave conflicts where gradients differ in length; 0: exact.
    """

    name = "dual_proj"
    card = Card(
        title="DualProj",
        paper="Lopez-Paz & Ranzato, NeurIPS 2017, arXiv:1706.08840",
        formula="min wᵀGw, w ≥ u",
        inputs="Gramian",
        memory="K gradients",
        passes="K",
        degree=1.0,
        hazards="a long gradient dominates the mean",
        parity="reg_eps=1e-4: TorchJD's and LibMTL's regularisation",
    )


@ops.register_solver("dual_proj", options={"reg_eps": 0.0}, needs_gram=True, per_task=lambda tasks: (tasks,))
def _reference(problem: Problem) -> tuple[Tensor, Status]:
    return reference(problem, project)
