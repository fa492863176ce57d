"""What UPGrad and DualProj share: a preference, and the cone {d : J d ≥ 0} that they project on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from igb_kernels.backends.reference import Problem
from igb_kernels.gradients._nonnegative import factor, nonnegative, vanishes
from igb_kernels.gradients._reference import Tasks, measure, unit_diagonal
from igb_kernels.gradients.base import WithPreference, check_number
from igb_kernels.status import Status


class ConeProjection(WithPreference):
    """A method that projects on the cone of the updates that ascend no task."""

    def __init__(self, preference: Sequence[float] | Tensor | None = None, *, reg_eps: float = 0.0) -> None:
        super().__init__(preference)
        self.reg_eps = check_number("reg_eps", reg_eps, 0)

    def options(self) -> dict[str, float]:
        return {"reg_eps": self.reg_eps}

    def __repr__(self) -> str:
        preference = None if self.preference is None else self.preference.tolist()
        return f"{type(self).__name__}(preference={preference}, reg_eps={self.reg_eps:g})"


def reference(problem: Problem, project: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Status]:
    """Weights and status; `project(vectors, u)` finds those of the sum of projections in addition to the preference.

    `vectors` [A, R] have the active tasks' inner products, regularised; `u` [A] is their preference.
    """
    tasks: Tasks = measure(problem.gram, inactive=0.0)
    count = len(tasks.norms)
    u = torch.full((count,), 1 / count, dtype=torch.float64) if problem.per_task is None else problem.per_task
    if not tasks.any:
        return u.clone(), tasks.status
    gram = (problem.gram + problem.gram.T) / 2 + problem.options["reg_eps"] * problem.gram.trace() * torch.diag(
        tasks.active.double()
    )
    lengths = gram.diagonal().sqrt()
    regular = Tasks(lengths, tasks.active, tasks.status)
    vectors, scaled = factor(unit_diagonal(gram, regular)), lengths[tasks.active] / tasks.norms.max()
    added = project(vectors, scaled * u[tasks.active])
    stationary = vanishes(vectors, scaled * u[tasks.active] + added)
    return u + tasks.spread(added / scaled), tasks.status | (Status.PARETO_STATIONARY if stationary else Status(0))


def project(vectors: Tensor, v: Tensor) -> Tensor:
    """The z ≥ 0 for which Aᵀ(v + z) is the projection of Aᵀv on {x : A x ≥ 0}."""
    return nonnegative(vectors, -vectors.T @ v)
