"""UPGrad: the sum of the projections of all gradients on the cone of the updates that ascend no task."""

from __future__ import annotations

import torch
from torch import Tensor

from igb_kernels import ops
from igb_kernels.backends.reference import Problem
from igb_kernels.card import Card
from igb_kernels.gradients._cone import ConeProjection, project, reference
from igb_kernels.status import Status


class UPGrad(ConeProjection):
    """Each u_k g_k is projected on {d : J d ≥ 0}, the updates that ascend no task, and the projections are added
    (Quinton & Rey, "Jacobian descent for multi-objective optimization", 2024).

    Exact: g_k · d ≥ 0 up to rounding, whatever the gradients' lengths. Without conflict w = u. A task without gradient
    has weight u_k. The update is linear in u.

    Args:
        preference: u [K], at least 0, not all 0; None: 1 / K each.
        reg_eps: projects with G + reg_eps · trace(G) · I in place of G. TorchJD and LibMTL do so with 1e-4, and then
            leave conflicts where gradients differ in length; 0: exact.
    """

    name = "upgrad"
    card = Card(
        title="UPGrad",
        paper="Quinton & Rey, 2024, arXiv:2406.16232",
        formula="d = Σ_k u_k · projection of g_k on {d : J d ≥ 0}",
        inputs="Gramian",
        memory="K gradients",
        passes="K",
        degree=1.0,
        hazards="K projections: the dearest of the Gramian's methods for dozens of tasks",
        parity="reg_eps=1e-4: TorchJD's and LibMTL's regularisation",
    )


def _project_each(vectors: Tensor, v: Tensor) -> Tensor:
    return torch.stack(
        [v_k * project(vectors, unit) for v_k, unit in zip(v, torch.eye(len(v)).double(), strict=True)]
    ).sum(0)


@ops.register_solver("upgrad", options={"reg_eps": 0.0}, needs_gram=True, per_task=lambda tasks: (tasks,))
def _reference(problem: Problem) -> tuple[Tensor, Status]:
    return reference(problem, _project_each)
