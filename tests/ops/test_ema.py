"""ema_ against float64 and eager PyTorch, and rollback_, which undoes it."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_sum, expected_gram
from samplers import LAYOUTS, gradients, sizes_for

from igb_kernels import Status, ops
from igb_kernels.ops import accumulator_dtype

DECAYS = (0.0, 0.3, 0.9, 1.0)


def empty_like(rows, dtypes, layout="contiguous"):
    """Rows of the same shapes without None, in the accumulators' dtypes, full of NaN."""
    shapes = [next(t.shape for t in column if t is not None) for column in zip(*rows, strict=True)]
    out = gradients(len(rows), shapes, [accumulator_dtype(d) for d in dtypes], layout=layout)
    for row in out:
        for t in row:
            t.fill_(torch.nan)
    return out


def check(out, state, grads, decay, dtypes, backend="cpu", scales=None):
    """Runs ema_ on copies of the expected values' sources, because `out` may be `state`."""
    old = [[None if t is None else t.clone() for t in row] for row in state]
    norms = ops.ema_(out, state, grads, decay, scales, backend=backend)
    factors = [1.0] * len(out) if scales is None else scales.tolist()
    for out_row, old_row, row, factor in zip(out, old, grads, factors, strict=True):
        for p, (o, s, g) in enumerate(zip(out_row, old_row, row, strict=True)):
            assert_sum(o, [(decay, s), ((1 - decay) * factor, g)], dtypes[p], f"column {p}")
    expected_gram(out).check(norms, "norms")


@pytest.mark.parametrize("tasks", [1, 3, 8, 64])
@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_every_size(instruction_set, dtype, tasks):
    sizes = sizes_for(tasks)
    dtypes = [dtype] * len(sizes)
    grads = gradients(tasks, sizes, dtype)
    state = gradients(tasks, sizes, accumulator_dtype(dtype), seed=1)
    check(empty_like(grads, dtypes), state, grads, 0.9, dtypes)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_every_decay_with_and_without_state_and_gradient(instruction_set, backend, dtype, decay):
    """Also where no task has a gradient for a column, or a state, or either."""
    sizes, dtypes = [17, 1000, 4097, 66, 9], [dtype] * 5
    full = gradients(3, sizes, dtype)
    grads = gradients(3, sizes, dtype, missing=lambda k, p: p in (2, 4) or (k + p) % 3 == 0)
    state = gradients(3, sizes, accumulator_dtype(dtype), seed=1, missing=lambda k, p: p in (3, 4) or (k + p) % 4 == 0)
    check(empty_like(full, dtypes), state, grads, decay, dtypes, backend)


@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_scales(instruction_set, backend, dtype):
    """Of either sign, zero, and NaN for a task that reaches nothing."""
    sizes, dtypes, scales = [17, 4097, 66], [dtype] * 3, torch.tensor([0.3, -7.0, 0.0, torch.nan])
    full = gradients(4, sizes, dtype)
    grads = gradients(4, sizes, dtype, missing=lambda k, p: k == 3 or (k, p) == (1, 2))
    state = gradients(4, sizes, accumulator_dtype(dtype), seed=1, missing=lambda k, p: p == 1)
    check(empty_like(full, dtypes), state, grads, 0.9, dtypes, backend, scales)


def test_scales_of_one_change_no_bit(instruction_set, backend):
    grads, state = (gradients(3, [4097, 5], torch.float32, seed=seed) for seed in range(2))
    outs = [empty_like(grads, [torch.float32] * 2) for _ in range(2)]
    norms = [
        ops.ema_(o, state, grads, 0.3, s, backend=backend) for o, s in zip(outs, (None, torch.ones(3)), strict=True)
    ]
    assert torch.equal(*norms)
    assert all(torch.equal(a, b) for rows in zip(*outs, strict=True) for a, b in zip(*rows, strict=True))


@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_in_place(instruction_set, dtype):
    sizes = [5, 4097, 1000]
    state = gradients(3, sizes, accumulator_dtype(dtype), seed=1)
    check(state, state, gradients(3, sizes, dtype), 0.9, [dtype] * 3)


@pytest.mark.parametrize("layout", [*LAYOUTS, "contiguous"])
@pytest.mark.parametrize("out_layout", ["contiguous", "offset", "gaps", "transposed", "channels last"])
def test_every_layout(instruction_set, layout, out_layout):
    """Out, state and gradients differ from each other in layout."""
    shapes, dtypes = [(3, 5, 4, 7), (70, 33), (), (1, 6)], [torch.float32] * 4
    grads = gradients(4, shapes, torch.float32, layout=layout)
    state = gradients(4, shapes, torch.float32, seed=1, layout="mixed")
    check(empty_like(grads, dtypes, out_layout), state, grads, 0.7, dtypes)


def test_mixed_dtypes(instruction_set):
    dtypes = [torch.bfloat16, torch.float64, torch.float16, torch.float32]
    grads = gradients(2, [33, 4097, 5, 1000], dtypes)
    state = gradients(2, [33, 4097, 5, 1000], [accumulator_dtype(d) for d in dtypes], seed=1)
    check(empty_like(grads, dtypes), state, grads, 0.25, dtypes)


def test_decay_as_a_tensor(backend):
    grads = gradients(1, [100], torch.float32)
    number, tensor = ([[torch.empty(100)]] for _ in range(2))
    ops.ema_(number, [[None]], grads, 0.5, backend=backend)
    ops.ema_(tensor, [[None]], grads, torch.tensor([0.5]), backend=backend)
    assert torch.equal(number[0][0], tensor[0][0])


@pytest.mark.parametrize("state", [None, 0.5])
@pytest.mark.parametrize("status", [Status.NON_FINITE, Status.NON_FINITE | Status.ZERO_GRADIENT, Status.ALL_INACTIVE])
def test_rollback(backend, state, status):
    """Only NON_FINITE brings back what was kept, whatever other bits are set."""
    out = [torch.ones(3), torch.full((2, 2), 7.0)]
    kept = [None if state is None else torch.full_like(t, state) for t in out]
    ops.rollback_(out, kept, torch.tensor(int(status), dtype=torch.int32), backend=backend)
    for t, before in zip(out, (1.0, 7.0), strict=True):
        assert torch.equal(t, torch.full_like(t, (state or 0.0) if status & Status.NON_FINITE else before))


def test_rollback_removes_nan(backend):
    out = [torch.full((5,), torch.nan)]
    ops.rollback_(out, [torch.arange(5.0)], torch.tensor(1, dtype=torch.int32), backend=backend)
    assert torch.equal(out[0], torch.arange(5.0))


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_results_written_past_the_caches(instruction_set, dtype, offset):
    """A long column takes another kind of store, and must have the bits of its pieces."""
    size, piece, wide = (2 << 20) + 4099, 1 << 20, accumulator_dtype(dtype)
    grad = torch.randn(size + offset).to(dtype)[offset:]
    state = torch.randn(size + offset, dtype=wide)[offset:]
    out = torch.full((size + offset,), torch.nan, dtype=wide)[offset:]
    expected = torch.full((size,), torch.nan, dtype=wide)
    norm = ops.ema_([[out]], [[state]], [[grad]], 0.9)
    parts = [t.split(piece) for t in (expected, state, grad)]
    pieces = sum(ops.ema_([[e]], [[s]], [[g]], 0.9) for e, s, g in zip(*parts, strict=True))
    assert torch.equal(out, expected)
    torch.testing.assert_close(norm, pieces, rtol=1e-6, atol=0)
