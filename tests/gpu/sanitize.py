"""Runs every CUDA kernel once on small ragged inputs, for compute-sanitizer; `benchmarks/gpu_check.sh` starts it."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

from igb_kernels import ops

SIZES = (0, 1, 17, 5001)
BACKEND = "cuda"


def row(dtype: torch.dtype, offset: int) -> list[Tensor]:
    """Tensors that begin `offset` elements behind an aligned address, and end where their memory ends."""
    return [torch.randn(size + offset, device="cuda").to(dtype)[offset:] for size in SIZES]


def stream(dtype: torch.dtype, tasks: int, offset: int) -> None:
    wide = ops.accumulator_dtype(dtype)
    grads = [row(dtype, offset) for _ in range(tasks)]
    state, out = ([row(wide, offset) for _ in range(tasks)] for _ in range(2))
    if tasks > 1:
        grads[1][3] = state[0][2] = None
    weights = torch.randn(tasks, device="cuda")
    ops.gram(grads, backend=BACKEND)
    ops.sq_norms(grads, backend=BACKEND)
    for scales in (None, weights):
        ops.ema_(out, state, grads, 0.9, scales, backend=BACKEND)
    ops.accumulate_squares_(out, state, grads, 1e-7, backend=BACKEND)
    counter = torch.ones(2, dtype=torch.float64, device="cuda")
    for leak in (None, weights):
        ops.sign_drop_(row(dtype, offset), grads, counter, leak, backend=BACKEND)
    for accumulate in (False, True):
        ops.combine_(row(dtype, offset), grads, weights, accumulate=accumulate, backend=BACKEND)
    for status in (0, 1):
        flag = torch.full((), status, dtype=torch.int32, device="cuda")
        ops.rollback_([*chain(*out)], [*chain(*state)], flag, backend=BACKEND)


def many_chunks() -> None:
    """More chunks than blocks, of which each then takes several."""
    rows = [[*torch.randn(7 * 1200, device="cuda").split(7)] for _ in range(3)]
    ops.gram(rows, backend=BACKEND)
    ops.combine_(rows[0], rows, torch.randn(3, device="cuda"), backend=BACKEND)


def small(tasks: int) -> None:
    rows = torch.randn(tasks, 2 * tasks, dtype=torch.float64)
    gram, losses = (rows @ rows.T).cuda(), torch.rand(tasks, device="cuda") + 0.1  # no cuBLAS under the tools
    for method, solver in ops.SOLVERS.items():
        ops.solve(method, gram, losses, numbers(solver, tasks), backend=BACKEND)
    for name, rule in ops.RULES.items():
        ops.loss_scales(name, losses, numbers(rule, tasks), backend=BACKEND)


def numbers(known: ops.Solver | ops.Rule, tasks: int) -> Tensor | None:
    return None if known.per_task is None else torch.ones(known.per_task(tasks), device="cuda")


if __name__ == "__main__":
    torch.manual_seed(0)
    for tasks in (1, 3, 9, 20):
        for dtype in ops.DTYPES:
            for offset in (0, 1):
                stream(dtype, tasks, offset)
        small(tasks)
    many_chunks()
    torch.cuda.synchronize()
    print("every kernel has run")
