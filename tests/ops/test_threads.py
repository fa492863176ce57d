"""The same bits with any number of threads, and no threads beyond PyTorch's own."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from samplers import gradients

from igb_kernels import ops
from igb_kernels.ops import accumulator_dtype

THREADS = (1, 2, 3, 7)
SIZES = {
    "one large column": [700_001],
    "large and small columns": [300_000, 17, 1, 450_003, 4097],
    "many small columns": [1009] * 700,
    "not worth a second thread": [4097, 33],
}


def results(sizes, dtype, tasks):
    """Everything that the kernels write, as bits."""
    rows = gradients(tasks, sizes, dtype, missing=lambda k, p: len(sizes) > 1 and (k + p) % 5 == 4)
    wide = accumulator_dtype(dtype)
    (out,) = gradients(1, sizes, dtype, seed=1)
    average, state = gradients(tasks, sizes, wide, seed=2), gradients(tasks, sizes, wide, seed=3)
    measured = [ops.gram(rows), ops.sq_norms(rows), ops.ema_(average, state, rows, 0.9, torch.linspace(-1, 2, tasks))]
    sums = gradients(tasks, sizes, wide, seed=4)
    measured.append(ops.accumulate_squares_(sums, state, rows, 100.0))
    ops.combine_(out, rows, torch.linspace(-1, 2, tasks), accumulate=True)
    (dropped,) = gradients(1, sizes, dtype, seed=5)
    counter = torch.tensor([1.0, 2.0], dtype=torch.float64)
    measured.append(ops.sign_drop_(dropped, rows, counter))
    written = [torch.cat([t.flatten() for t in row]) for row in [out, dropped, *average, *sums]]
    return [t.view(torch.uint8) for t in [*measured, *written]]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_bits_do_not_depend_on_the_number_of_threads(dtype, sizes):
    found = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        found.append(results(SIZES[sizes], dtype, tasks=3))
    for threads, other in zip(THREADS[1:], found[1:], strict=True):
        assert all(map(torch.equal, found[0], other)), f"{threads} threads and 1 differ"


def test_bits_do_not_change_from_call_to_call(instruction_set):
    torch.set_num_threads(7)
    first = results([700_001], torch.float32, tasks=9)
    for _ in range(5):
        assert all(map(torch.equal, first, results([700_001], torch.float32, tasks=9)))


COUNT = """
import os, torch
from igb_kernels import ops

torch.set_num_threads(2)
def threads(): return len(os.listdir("/proc/self/task"))
def pytorch(): a = torch.randn(2_000_000); a.exp_(); return a + a
def kernels():
    rows = [[torch.ones(2_000_000)], [torch.ones(2_000_000)]]
    out = [torch.empty(2_000_000)]
    ops.gram(rows), ops.sq_norms(rows), ops.combine_(out, rows, torch.ones(2))
    ops.ema_([[t.clone()] for (t,) in rows], rows, rows, 0.5)
    ops.accumulate_squares_([[t.clone()] for (t,) in rows], rows, rows, 1.0)
    ops.sign_drop_(out, rows, torch.ones(2, dtype=torch.float64))
    ops.solve("nash_mtl", torch.eye(64, dtype=torch.float64))
"""


def counted(*steps):
    """The number of OS threads after each step, in a fresh process."""
    script = COUNT + "".join(f"{step}(); print(threads())\n" for step in steps)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return [int(count) for count in done.stdout.split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_no_thread_more_than_pytorch_makes():
    (pytorch_alone, after_kernels) = counted("pytorch", "kernels")
    assert after_kernels == pytorch_alone
    (kernels_alone, after_pytorch) = counted("kernels", "pytorch")
    assert kernels_alone <= pytorch_alone
    assert after_pytorch == pytorch_alone
