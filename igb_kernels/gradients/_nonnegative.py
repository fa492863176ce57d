"""Nonnegative least squares, to which the references of MGDA, UPGrad, DualProj and CAGrad reduce their problems."""

from __future__ import annotations

import torch
from torch import Tensor


def factor(cosines: Tensor) -> Tensor:
    """A [K, R] with A Aᵀ = the cosines [K, K], R their numerical rank: K vectors that have these cosines."""
    values, vectors = torch.linalg.eigh(cosines)
    kept = values > 16 * len(values) * torch.finfo(torch.float64).eps
    result: Tensor = vectors[:, kept] * values[kept].sqrt()
    return result


def vanishes(vectors: Tensor, x: Tensor) -> bool:
    """The nonnegative combination Aᵀx is 0 to rounding."""
    return bool((vectors.T @ x).norm() ** 2 <= 16 * len(x) * torch.finfo(torch.float64).eps * x.sum() ** 2)


def nonnegative(rows: Tensor, target: Tensor) -> Tensor:
    """The u ≥ 0 [K] that minimises |rowsᵀu − target|, for rows [K, R] and a target [R]."""
    solution = _block_pivoting(rows @ rows.T, -rows @ target)
    return _lawson_hanson(rows, target) if solution is None else solution


def _block_pivoting(matrix: Tensor, q: Tensor) -> Tensor | None:
    """min ½ uᵀMu + qᵀu, u ≥ 0 by exchanging all violated indices at once; None where that fails or M_FF is singular."""
    rounding = 16 * len(q) * torch.finfo(torch.float64).eps
    free = torch.zeros(len(q), dtype=torch.bool)
    for _ in range(20):
        u, chosen = torch.zeros_like(q), free.nonzero()[:, 0]
        if len(chosen):
            root, failed = torch.linalg.cholesky_ex(matrix[chosen][:, chosen])
            if failed or root.diagonal().min() ** 2 <= rounding * root.diagonal().max() ** 2:
                return None
            u[chosen] = -torch.cholesky_solve(q[chosen, None], root)[:, 0]
        gradient, scale = matrix @ u + q, matrix.abs() @ u.abs() + q.abs()
        violated = torch.where(free, u < 0, gradient < -rounding * scale)
        if not violated.any():
            return u
        free = free ^ violated
    return None


def _lawson_hanson(rows: Tensor, target: Tensor) -> Tensor:
    """The active-set method of Lawson & Hanson (1974, chapter 23), one index at a time, on the rows themselves."""
    u, free = torch.zeros(len(rows), dtype=torch.float64), torch.zeros(len(rows), dtype=torch.bool)
    dependent = free.clone()
    for _ in range(10 * len(rows) + 10):
        pull = torch.where(free | dependent, -torch.inf, rows @ (target - rows.T @ u))
        entering = int(pull.argmax())
        if pull[entering] <= 1e-13 * (target.norm() + (u * rows.norm(dim=1)).sum()) * rows[entering].norm():
            break
        free[entering] = True
        first = True
        while free.any():
            best = torch.zeros_like(u)
            best[free] = torch.linalg.lstsq(rows[free].T, target[:, None], driver="gelsd").solution[:, 0]
            if first and best[entering] <= 0:  # rounding alone made it look useful
                free[entering], dependent[entering] = False, True
                break
            first = False
            blocking = free & (best <= 0)
            if not blocking.any():
                u = best
                dependent[:] = False
                break
            ratio = torch.where(blocking, u / (u - best), torch.inf)
            u = u + ratio.min() * (best - u)
            free = free & (ratio > ratio.min())
            u = torch.where(free, u, 0.0)
    return u
