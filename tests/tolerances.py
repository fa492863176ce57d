"""How much further from the float64 truth than eager PyTorch a kernel may be, per dtype of the gradients.

Errors are relative to the largest value that rounding can act on: |g_i| |g_j| for an inner product, Σ_k |w_k| |g_k| for
an element of a sum. The baseline computes in the precision that the operation promises (float32 for half precision), so
it excuses nothing that half precision arithmetic would.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tolerance:
    inner: float
    """Of an inner product or squared norm."""
    element: float
    """Of one element of a weighted sum or moving average, before it is rounded to the output's dtype."""


_FLOAT32 = Tolerance(inner=2.4e-7, element=2.4e-7)

TOLERANCES = {
    torch.float32: _FLOAT32,
    torch.float64: Tolerance(inner=4e-15, element=1e-15),
    torch.bfloat16: _FLOAT32,
    torch.float16: _FLOAT32,
}

SOLVER = 1e-10
"""Of a weighted sum of gradients, relative to Σ_k |w_k| |g_k|: two ways to the same weights, in float64."""

ILL_CONDITIONED = 1e-6
"""As `SOLVER`, for cosines with condition number 1e8 (theirs or a ridge's): half of float64's digits are lost."""

NASH_RESIDUAL = 1e-10
"""Of max_k |α_k (Gα)_k − 1|."""
