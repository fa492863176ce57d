"""`python -m tests.cuda_kernels.check_build MODULE` says whether the kernels of an emulated build are right."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from .emulated import ORDERS, load
from .samples import Guarded, Kernels, flat

WRONG = 3
"""The exit status where they are not."""


def is_right(native: Any) -> bool:
    """Whether Gramian, norms and weighted sum are right in every order of threads, and write where they may."""
    torch.manual_seed(0)
    for order in ORDERS:
        native.set_thread_order(order)
        guarded = Guarded()
        rows = [guarded.row(torch.float32) for _ in range(3)]
        values = torch.stack([flat(row, row) for row in rows])
        weights = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
        out = [guarded.tensor(torch.zeros_like(t)) for t in rows[0]]
        kernels = Kernels(native, guarded)
        try:
            gram, norms = kernels.gram(rows), kernels.sq_norms(rows)
            kernels.combine(out, rows, weights, False)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return False
        exact = values @ values.T
        right = (
            torch.allclose(gram, exact, rtol=1e-5, atol=1e-2)
            and torch.allclose(norms, exact.diagonal(), rtol=1e-5)
            and torch.allclose(flat(out, out), weights @ values, rtol=1e-5, atol=1e-5)
        )
        if not right or not guarded.is_intact():
            return False
    return True


if __name__ == "__main__":
    if not is_right(load(Path(sys.argv[1]))):
        sys.exit(WRONG)
    print("right")
