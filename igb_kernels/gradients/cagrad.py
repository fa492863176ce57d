"""CAGrad: the update near the mean gradient that helps the worst task most."""

from __future__ import annotations

import torch
from torch import Tensor

from igb_kernels import ops
from igb_kernels.backends.reference import Problem
from igb_kernels.card import Card
from igb_kernels.gradients._nonnegative import factor, nonnegative, vanishes
from igb_kernels.gradients._reference import measure, unit_diagonal
from igb_kernels.gradients.base import GradientBalancer, check_number
from igb_kernels.status import Status

RESCALES = (0, 1, 2)


class CAGrad(GradientBalancer):
    """max_d min_k g_k · d subject to |d − g0| ≤ c |g0|, with the mean gradient g0 (Liu et al., NeurIPS 2021).

    It is found exactly, whatever the gradients' lengths. c = 0 gives g0; a single task (1 + c) times its gradient. If
    the gradients are Pareto stationary, the ball may hold several solutions: it is the one nearest to g0, and the
    status says PARETO_STATIONARY. A task without gradient counts in the mean, not in the minimum.

    Args:
        c: the ball's radius relative to |g0|, at least 0.
        rescale: what the update is divided by. 0: 1, as in the paper and TorchJD; 1: 1 + c², the default of LibMTL
            (and, times K, of IGB4MTL and Nash-MTL's code); 2: 1 + c.
    """

    name = "cagrad"
    card = Card(
        title="CAGrad",
        paper="Liu et al., NeurIPS 2021, arXiv:2110.14048",
        formula="max_d min_k g_k · d, |d − g0| ≤ c |g0|",
        inputs="Gramian",
        memory="K gradients",
        passes="K",
        degree=1.0,
        hazards="a short gradient weighs most in the minimum: scale the losses",
        parity="rescale=1: LibMTL's default; IGB4MTL multiplies that by K",
    )

    def __init__(self, c: float = 0.5, *, rescale: int = 0) -> None:
        super().__init__()
        if rescale not in RESCALES:
            raise ValueError(f"rescale must be one of {RESCALES}, found {rescale!r}")
        self.c = check_number("c", c, 0)
        self.rescale = int(rescale)

    def options(self) -> dict[str, float]:
        return {"c": self.c, "rescale": float(self.rescale)}


def _least(vectors: Tensor, bound: Tensor) -> Tensor | None:
    """The z ≥ 0 of the shortest x = Aᵀz with A x ≥ bound; None if there is none. Least distance programming."""
    last = torch.zeros(vectors.shape[1] + 1, dtype=torch.float64)
    last[-1] = 1
    u = nonnegative(torch.cat([vectors, bound[:, None]], dim=1), last)
    residual = 1 - float(bound @ u)
    if residual <= 1e-13 or (u.any() and vanishes(vectors, u)):
        return None
    return u / residual


@ops.register_solver("cagrad", options={"c": 0.5, "rescale": 0.0}, needs_gram=True)
def _reference(problem: Problem) -> tuple[Tensor, Status]:
    """Bisection for the level, with a least distance problem for each."""
    tasks, c = measure(problem.gram, inactive=0.0), problem.options["c"]
    status, count = tasks.status, len(tasks.norms)
    weights = torch.full((count,), 1 / count, dtype=torch.float64)
    divisor = {0: 1.0, 1: 1 + c**2, 2: 1 + c}[int(problem.options["rescale"])]
    if not tasks.any:
        return weights, status
    norms = tasks.norms[tasks.active] / tasks.norms.max()
    vectors, inverse = factor(unit_diagonal(problem.gram, tasks)), norms.min() / norms
    mean = vectors.T @ norms / count
    radius, reached = c * float(mean.norm()), vectors @ mean
    if vanishes(vectors, norms):
        return weights / divisor, status | Status.PARETO_STATIONARY
    low, high = float((reached / inverse).min()), float(((reached + radius) / inverse).min())
    z, length = torch.zeros_like(norms), 0.0
    while radius > 0 and low < (middle := (low + high) / 2) < high:
        found = _least(vectors, middle * inverse - reached)
        if found is not None and float((vectors.T @ found).norm()) <= radius:
            low, z = middle, found
            length = float((vectors.T @ found).norm())
        else:
            high = middle
    if length < radius * (1 - 1e-6):
        status |= Status.PARETO_STATIONARY
    return (weights + tasks.spread(z / norms)) / divisor, status
