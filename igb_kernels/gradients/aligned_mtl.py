"""Aligned-MTL: gradients made orthogonal and of equal length, before they are summed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from igb_kernels import ops
from igb_kernels.backends.reference import Problem
from igb_kernels.card import Card
from igb_kernels.gradients._reference import measure, unit_diagonal
from igb_kernels.gradients.base import WithPreference
from igb_kernels.status import Status

SCALES = ("min", "median", "rmse")


class AlignedMTL(WithPreference):
    """w = B p with B = s G^(−1/2) on the range of G (Senushkin et al., CVPR 2023, equations 9 to 12).

    The gradients' matrix gets the same singular vectors and equal singular values s, so the gradients do not conflict
    and none dominates; the update is their sum with preferences p. Gradients that depend on others leave s to the rest
    (status PARETO_STATIONARY). Whether one depends on others is decided on the cosines, at 16 K float64 epsilon; nearly
    dependent ones make s, and so with scale="min" the update, small.

    Args:
        preference: p [K], at least 0; None: 1/K.
        scale: s²: the "min", lower "median" or mean ("rmse") of the Gramian's nonzero eigenvalues.
    """

    name = "aligned_mtl"
    card = Card(
        title="Aligned-MTL",
        paper="Senushkin et al., CVPR 2023, arXiv:2305.19000",
        formula="s G^(-1/2) p",
        inputs="Gramian",
        memory="K gradients",
        passes="K",
        degree=1.0,
        hazards="nearly dependent gradients shrink the update; a weight may be negative",
        parity="TorchJD's preference is 1/K, as here; LibMTL's is 1 for each task: preference=[1] * K",
    )

    def __init__(self, preference: Sequence[float] | Tensor | None = None, *, scale: str = "min") -> None:
        super().__init__(preference)
        if scale not in SCALES:
            raise ValueError(f"scale must be one of {SCALES}, found {scale!r}")
        self.scale = scale

    def options(self) -> dict[str, float]:
        return {"scale": float(SCALES.index(self.scale))}

    def __repr__(self) -> str:
        preference = "" if self.preference is None else f"preference={self.preference.tolist()}, "
        return f"AlignedMTL({preference}scale={self.scale!r})"


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors by two-sided Jacobi rotations, disjoint pairs of rows at a time.

    Unlike `torch.linalg.eigh` it finds small eigenvalues that come from small scales to full relative precision.
    """
    k = len(matrix)
    matrix, vectors = matrix.clone(), torch.eye(k, dtype=torch.float64)
    players = torch.arange(k + k % 2)
    for _ in range(30):
        largest = 0.0
        for _ in range(len(players) - 1):
            a, b = players[: len(players) // 2], players[len(players) // 2 :].flip(0)
            a, b = a[(there := (a < k) & (b < k))], b[there]
            roots = matrix.diagonal().abs().sqrt()
            off = matrix[a, b]
            scale = roots[a] * roots[b]
            needed = off.abs() > 1e-17 * scale
            largest = max([largest, *(off[needed].abs() / scale[needed]).tolist()])
            cotangent = (matrix[b, b] - matrix[a, a]) / torch.where(needed, 2 * off, 1.0)
            sign = torch.where(cotangent < 0, -1.0, 1.0)
            tangent = torch.where(needed, sign / (cotangent.abs() + torch.hypot(cotangent, torch.ones(()))), 0.0)
            c = 1 / (1 + tangent**2).sqrt()
            s = c * tangent
            new_diagonal = matrix[a, a] - tangent * off, matrix[b, b] + tangent * off
            for rotated in (matrix, matrix.T, vectors.T):
                first, second = rotated[a], rotated[b]
                rotated[a], rotated[b] = (
                    c[:, None] * first - s[:, None] * second,
                    s[:, None] * first + c[:, None] * second,
                )
            matrix[a, b] = matrix[b, a] = 0.0
            matrix[a, a], matrix[b, b] = new_diagonal
            players = torch.cat([players[:1], players[1:].roll(1)])
        if largest < 1e-15:
            break
    return matrix.diagonal().clone(), vectors


@ops.register_solver("aligned_mtl", options={"scale": 0.0}, needs_gram=True, per_task=lambda tasks: (tasks,))
def _reference(problem: Problem) -> tuple[Tensor, Status]:
    tasks = measure(problem.gram)
    status = tasks.status
    preference = torch.full_like(tasks.norms, 1 / len(tasks.norms)) if problem.per_task is None else problem.per_task
    if not tasks.any:
        return preference.clone(), status
    norms = tasks.norms[tasks.active] / tasks.norms.max()
    cosines = unit_diagonal(problem.gram, tasks)
    kept = int((torch.linalg.eigvalsh(cosines) > 16 * len(norms) * torch.finfo(torch.float64).eps).sum())
    if kept < len(norms):
        status |= Status.PARETO_STATIONARY
    values, vectors = _eigen(norms[:, None] * cosines * norms[None, :])
    order = values.argsort()[-kept:]
    values, vectors = values[order], vectors[:, order]
    square = (values[0], values[(kept - 1) // 2], values.mean())[int(problem.options["scale"])]
    weights = vectors @ ((vectors.T @ preference[tasks.active]) * (square / values).sqrt())
    return tasks.spread(weights), status
