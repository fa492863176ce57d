"""accumulate_squares_ against float64 and eager PyTorch."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_squares
from samplers import LAYOUTS, TASKS, gradients, sizes_for

from igb_kernels import ops
from igb_kernels.ops import accumulator_dtype

EPS = 1e-7


def squares(tasks, shapes, dtypes, seed=1, **options):
    """Rows in the dtypes' accumulators that are not negative, as sums of squares are."""
    wide = [accumulator_dtype(d) for d in dtypes]
    rows = gradients(tasks, shapes, wide, seed=seed, **options)
    return [[None if t is None else t.square_() for t in row] for row in rows]


def unwritten(tasks, shapes, dtypes, layout="contiguous"):
    return [[t.fill_(torch.nan) for t in row] for row in squares(tasks, shapes, dtypes, layout=layout)]


def check(out, state, grads, eps=EPS, backend="cpu"):
    """What is expected comes from a copy of the state, because `out` may be the state."""
    before = [[None if t is None else t.clone() for t in row] for row in state]
    versions = [t._version for row in out for t in row]
    excess = ops.accumulate_squares_(out, state, grads, eps, backend=backend)
    assert all(t._version > v for t, v in zip((t for row in out for t in row), versions, strict=True))
    assert_squares(out, excess, before, grads, eps)


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_every_size(instruction_set, dtype, tasks):
    sizes = sizes_for(tasks)
    dtypes = [dtype] * len(sizes)
    check(unwritten(tasks, sizes, dtypes), squares(tasks, sizes, dtypes), gradients(tasks, sizes, dtype))


@pytest.mark.parametrize("eps", [1e-30, 1e-7, 1.0])
@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_every_eps_with_and_without_state_and_gradient(instruction_set, backend, dtype, eps):
    """Also where no task has a gradient for a column, or a state, or either."""
    sizes, dtypes = [17, 1000, 4097, 66, 9], [dtype] * 5
    grads = gradients(3, sizes, dtype, missing=lambda k, p: p in (2, 4) or (k + p) % 3 == 0)
    state = squares(3, sizes, dtypes, missing=lambda k, p: p in (3, 4) or (k + p) % 4 == 0)
    check(unwritten(3, sizes, dtypes), state, grads, eps, backend)


def test_a_gradient_of_zero_counts_nothing(instruction_set, backend):
    out, grads = [[torch.full((70,), torch.nan)]], [[torch.zeros(70)]]
    assert ops.accumulate_squares_(out, [[None]], grads, EPS, backend=backend).tolist() == [0.0]
    assert torch.equal(out[0][0], grads[0][0])


@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_steps_in_place(instruction_set, backend, dtype):
    sizes, dtypes = [5, 4097, 1000], [dtype] * 3
    state = squares(3, sizes, dtypes)
    for seed in range(3):
        check(state, state, gradients(3, sizes, dtype, seed=seed), backend=backend)


@pytest.mark.parametrize("layout", [*LAYOUTS, "contiguous"])
@pytest.mark.parametrize("out_layout", ["contiguous", "offset", "gaps", "transposed", "channels last"])
def test_every_layout(instruction_set, layout, out_layout):
    """Out, state and gradients differ from each other in layout."""
    shapes, dtypes = [(3, 5, 4, 7), (70, 33), (), (1, 6)], [torch.float32] * 4
    grads = gradients(4, shapes, torch.float32, layout=layout)
    check(unwritten(4, shapes, dtypes, out_layout), squares(4, shapes, dtypes, layout="mixed"), grads)


def test_mixed_dtypes(instruction_set):
    sizes, dtypes = [33, 4097, 5, 1000], [torch.bfloat16, torch.float64, torch.float16, torch.float32]
    check(unwritten(2, sizes, dtypes), squares(2, sizes, dtypes), gradients(2, sizes, dtypes))


@pytest.mark.parametrize("entry", [torch.nan, torch.inf])
def test_a_non_finite_gradient_shows(instruction_set, backend, entry):
    grads = gradients(3, [5, 4100], torch.float32)
    grads[1][1][-1] = entry
    out = unwritten(3, [5, 4100], [torch.float32] * 2)
    excess = ops.accumulate_squares_(out, [[None] * 2] * 3, grads, EPS, backend=backend)
    assert excess.isfinite().tolist() == [True, False, True]
    assert out[1][1].isfinite().logical_not().nonzero().flatten().tolist() == [4099]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_results_written_past_the_caches(instruction_set, dtype):
    """A long column takes another kind of store."""
    sizes = [(2 << 20) + 4099]
    check(unwritten(1, sizes, [dtype]), squares(1, sizes, [dtype]), gradients(1, sizes, dtype))
