"""MGDA: the shortest convex combination of the gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from igb_kernels import ops
from igb_kernels.backends import Backend
from igb_kernels.backends.reference import Problem
from igb_kernels.card import Card
from igb_kernels.gradients._nonnegative import factor, nonnegative, vanishes
from igb_kernels.gradients._reference import measure, unit_diagonal
from igb_kernels.gradients.base import GradientBalancer
from igb_kernels.status import Status

NORMALIZATIONS = ("none", "l2", "loss", "loss+")
APPLIED_TO = ("normalized", "raw")


class MGDA(GradientBalancer):
    """min wᵀGw, w ≥ 0, Σ w = 1: the shortest vector of the gradients' convex hull, a common descent direction or 0
    (Désidéri, 2012; Sener & Koltun, NeurIPS 2018).

    It is found exactly, by an active-set method; g_k · d ≥ |d|² for every task. If a convex combination of gradients
    vanishes, it is the answer, and the status says PARETO_STATIONARY.

    Args:
        normalization: what a gradient is divided by before the hull is made: "none"; "l2", its norm; "loss", its loss;
            "loss+", both. The losses are those given to the balancer; one that is not positive makes the step unusable
            (NON_POSITIVE_LOSS).
        apply_to: what the weights are put on. "normalized": the normalised gradients, so that the update is their
            shortest vector, as in LibMTL; "raw": the gradients as they were, as Sener & Koltun do.
        drop_zero: leaves tasks without gradient out. By default such a task takes all the weight, and one finished
            task stops all others: that is what the shortest vector is.
    """

    name = "mgda"
    card = Card(
        title="MGDA",
        paper="Désidéri, 2012; Sener & Koltun, NeurIPS 2018, arXiv:1810.04650",
        formula="min wᵀGw, w ≥ 0, Σ w = 1",
        inputs="Gramian",
        memory="K gradients",
        passes="K",
        degree=1.0,
        hazards="the shortest gradient dominates; one task without gradient stops all others unless drop_zero",
        parity="normalization: LibMTL's mgda_gn",
    )

    def __init__(self, normalization: str = "none", *, drop_zero: bool = False, apply_to: str = "normalized") -> None:
        super().__init__()
        if normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization must be one of {NORMALIZATIONS}, found {normalization!r}")
        if apply_to not in APPLIED_TO:
            raise ValueError(f"apply_to must be one of {APPLIED_TO}, found {apply_to!r}")
        self.normalization, self.apply_to = normalization, apply_to
        self.drop_zero = bool(drop_zero)

    def options(self) -> dict[str, float]:
        return {"drop_zero": float(self.drop_zero)}

    def solve(self, measured: Tensor, losses: Tensor, scales: Tensor, backend: Backend) -> tuple[Tensor, Tensor]:
        """See the base class."""
        if self.normalization == "none":
            return super().solve(measured, losses, scales, backend)
        divisor = torch.ones_like(measured.diagonal())
        if self.normalization in ("l2", "loss+"):
            norms = measured.diagonal().sqrt()
            divisor = torch.where(norms > 0, norms, 1.0)
        usable = torch.ones_like(divisor, dtype=torch.bool)
        if self.normalization in ("loss", "loss+"):
            usable = losses > 0
            divisor = divisor * torch.where(usable, losses.double(), torch.nan)
        weights, status = self._solve(measured / divisor[:, None] / divisor[None, :], None, backend)
        not_positive = (losses <= 0).any() & ~usable.all()
        if self.apply_to == "normalized":
            weights = weights / divisor
        return weights, status | not_positive.int() * int(Status.NON_POSITIVE_LOSS)

    def __repr__(self) -> str:
        raw = ", apply_to='raw'" if self.apply_to == "raw" else ""
        return f"MGDA(normalization={self.normalization!r}, drop_zero={self.drop_zero}{raw})"


@ops.register_solver("mgda", options={"drop_zero": 0.0}, needs_gram=True)
def _reference(problem: Problem) -> tuple[Tensor, Status]:
    """As least distance programming (Lawson & Hanson, 1974, chapter 23): the residual of a least squares problem."""
    tasks = measure(problem.gram, inactive=0.0)
    status = tasks.status
    if not tasks.any or (not tasks.active.all() and not problem.options["drop_zero"]):
        return (~tasks.active).double() / (~tasks.active).sum(), status
    norms, vectors = tasks.norms[tasks.active], factor(unit_diagonal(problem.gram, tasks))
    inverse = norms.min() / norms
    last = torch.zeros(vectors.shape[1] + 1, dtype=torch.float64)
    last[-1] = 1
    u = nonnegative(torch.cat([vectors, inverse[:, None]], dim=1), last)
    if vanishes(vectors, u):
        status |= Status.PARETO_STATIONARY
    weights = u * inverse
    return tasks.spread(weights / weights.sum()), status
