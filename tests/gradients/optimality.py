"""Residuals of the complementarity conditions, in extended precision, relative to what rounding acts on."""

from __future__ import annotations

import numpy as np
from torch import Tensor

KKT = 1e-9
"""Of every condition on every family; measured: 1e-12."""

NO_CONFLICT = 1e-12
"""How negative g_k · d may be."""


def extended(t: Tensor) -> np.ndarray:
    return t.detach().numpy().astype(np.longdouble)


def projections(gram: Tensor, weights: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """g_k · d for the update d, and Σ_j |g_k · g_j| |w_j|, the scale of its rounding errors (1 where it is 0)."""
    g, w = extended(gram), extended(weights)
    scale = np.abs(g) @ np.abs(w)
    return g @ w, np.where(scale > 0, scale, 1)


def conflict(gram: Tensor, weights: Tensor) -> float:
    """The largest relative −g_k · d; at most 0 if the update ascends no task."""
    found, scale = projections(gram, weights)
    return float((-found / scale).max())


def length(gram: Tensor, weights: np.ndarray) -> float:
    return float(np.sqrt(max(weights @ extended(gram) @ weights, 0)))
