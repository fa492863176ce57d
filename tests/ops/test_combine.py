"""combine_ against float64 and eager PyTorch."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_sum
from samplers import LAYOUTS, TASKS, gradients, laid_out, sizes_for

from igb_kernels import ops

WIDENED_OR_ROUNDED = [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]
DTYPE_PAIRS = [*((dtype, dtype) for dtype in ops.DTYPES), *WIDENED_OR_ROUNDED]
"""(Gradients, out)."""


def weights_for(tasks):
    return torch.randn(tasks, dtype=torch.float64, generator=torch.Generator().manual_seed(tasks))


def check(out, rows, weights, accumulate=False, backend="cpu"):
    """Runs combine_; what is expected comes from copies, because `out` may be among the rows."""
    before = [o.clone() for o in out]
    copies = [[None if t is None else t.clone() for t in row] for row in rows]
    versions = [o._version for o in out]
    ops.combine_(out, rows, weights, accumulate=accumulate, backend=backend)
    for p, o in enumerate(out):
        assert o._version > versions[p], "autograd does not learn of the write"
        column = [row[p] for row in copies]
        dtype = next((t.dtype for t in column if t is not None), o.dtype)
        terms = [*zip(weights.tolist(), column, strict=True), (1.0, before[p] if accumulate else None)]
        assert_sum(o, terms, dtype, f"column {p} of {tuple(o.shape)}")


def outputs(shapes, dtype, accumulate, layout="contiguous"):
    """Targets to write (full of NaN) or to accumulate into."""
    (out,) = gradients(1, shapes, dtype, seed=99, layout=layout)
    return out if accumulate else [o.fill_(torch.nan) for o in out]


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize(("dtype", "out_dtype"), DTYPE_PAIRS)
def test_every_size(instruction_set, dtype, out_dtype, tasks, accumulate):
    sizes = sizes_for(tasks)
    rows = gradients(tasks, sizes, dtype)
    check(outputs(sizes, out_dtype, accumulate), rows, weights_for(tasks), accumulate)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", ops.DTYPES)
@pytest.mark.parametrize(("tasks", "row"), [(1, 0), (3, 0), (3, 2), (8, 7), (9, 0), (9, 8), (13, 5), (20, 10)])
def test_out_is_a_row(instruction_set, dtype, tasks, row, accumulate):
    """Rows are read in groups: one of a later group must not be overwritten before."""
    rows = gradients(tasks, [17, 4097, 1000], dtype)
    check(rows[row], rows, weights_for(tasks), accumulate)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("layout", [*LAYOUTS, "contiguous"])
@pytest.mark.parametrize("out_layout", ["contiguous", "offset", "gaps", "transposed", "channels last"])
def test_every_layout(instruction_set, layout, out_layout, accumulate):
    shapes = [(3, 5, 4, 7), (17,), (), (1, 1, 1, 1), (6, 1, 3, 3), (70, 33), (0, 4)]
    rows = gradients(5, shapes, torch.float32, layout=layout)
    check(outputs(shapes, torch.float32, accumulate, out_layout), rows, weights_for(5), accumulate)


def test_out_is_a_row_of_another_layout(instruction_set):
    rows = gradients(4, [(3, 5, 4, 7), (70, 33)], torch.float32, layout="mixed")
    for row in (0, 1):
        check(rows[row], rows, weights_for(4))


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("dtype", "out_dtype"), DTYPE_PAIRS)
@pytest.mark.parametrize("tasks", [3, 10])
def test_missing_entries(instruction_set, backend, dtype, out_dtype, tasks, accumulate):
    """A column that no task reaches becomes zeros, or stays as it is when accumulating."""
    sizes = [17, 1000, 4097, 9]
    rows = gradients(tasks, sizes, dtype, missing=lambda k, p: p == 1 or (k + p) % 3 == 0)
    check(outputs(sizes, out_dtype, accumulate), rows, weights_for(tasks), accumulate, backend)


def test_mixed_dtypes(instruction_set):
    """Each column has its own pair of dtypes."""
    sizes = [33 + 500 * p for p in range(len(DTYPE_PAIRS))]
    rows = gradients(3, sizes, [dtype for dtype, _ in DTYPE_PAIRS])
    (out,) = gradients(1, sizes, [dtype for _, dtype in DTYPE_PAIRS])
    check(out, rows, weights_for(3))


@pytest.mark.parametrize("weight", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_non_finite_weights_reach_every_element(instruction_set, backend, dtype, weight):
    """NaN where a loss was not finite must arrive in every gradient that the task reaches, and nowhere else."""
    sizes = [1, 67, 4097]
    rows = gradients(3, sizes, dtype, missing=lambda k, p: (k, p) == (1, 1))
    (out,) = gradients(1, sizes, dtype)
    ops.combine_(out, rows, torch.tensor([1.0, weight, 1.0]), backend=backend)
    assert not out[0].isfinite().any()
    assert out[1].isfinite().all()
    assert not out[2].isfinite().any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("position", [0, 63, 4096, 4098])
def test_a_non_finite_gradient_stays_where_it_is(instruction_set, value, position):
    (row,) = gradients(1, [4099], torch.float32)
    row[0][position] = value
    out = torch.empty(4099)
    ops.combine_([out], [row], torch.ones(1))
    assert out.isfinite().logical_not().nonzero().flatten().tolist() == [position]


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_of_any_floating_dtype_and_layout(backend, weights_dtype):
    rows = gradients(3, [100], torch.float32)
    weights = laid_out(weights_for(3).to(weights_dtype), "gaps")
    check([torch.empty(100)], rows, weights, backend=backend)


def test_nothing_to_combine(backend):
    ops.combine_([], [[], []], torch.ones(2), backend=backend)
    out = torch.empty(0, 3)
    ops.combine_([out], [[torch.empty(0, 3)]], torch.ones(1), backend=backend)
    assert out.shape == (0, 3)
