"""sign_drop_ against GradDrop's formula in float64, and the random numbers that decide."""

from __future__ import annotations

import pytest
import torch
from golden import cases
from oracle import assert_one_sign
from samplers import LAYOUTS, gradients, sizes_for

from igb_kernels import _native, ops
from igb_kernels.backends import reference
from igb_kernels.backends._random import uniforms

COUNTER = torch.tensor([2.0**40 + 5, 2.0**33 + 3], dtype=torch.float64)
WIDENED_OR_ROUNDED = [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]
DTYPE_PAIRS = [*((dtype, dtype) for dtype in ops.DTYPES), *WIDENED_OR_ROUNDED]
"""(Gradients, out)."""


def outputs(shapes, dtypes, layout="contiguous"):
    (out,) = gradients(1, shapes, dtypes, layout=layout)
    return [o.fill_(torch.nan) for o in out]


def check(out, rows, dtypes, leak=None, counter=COUNTER, backend="cpu"):
    """What is expected comes from copies, because `out` may be among the rows."""
    copies = [[None if t is None else t.clone() for t in row] for row in rows]
    versions = [o._version for o in out]
    norm = ops.sign_drop_(out, rows, counter, leak, backend=backend)
    assert all(o._version > v for o, v in zip(out, versions, strict=True)), "autograd does not learn of the write"
    assert_one_sign(out, copies, counter, leak, dtypes)
    assert norm.dtype is torch.float64
    exact = sum((o.double().square().sum() for o in out), torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(norm, exact, rtol=1e-6, atol=0)


# ---- Random numbers ----------------------------------------------------------------------------------------------


def test_uniforms_are_uniform():
    drawn = uniforms(1, 2, torch.arange(50_000))
    assert 0 < drawn.min() < drawn.max() < 1
    counts = torch.histc(drawn, 20, 0, 1)
    assert float(((counts - 10_000) ** 2 / 10_000).sum()) < 44  # chi², 19 degrees: 0.1 %
    assert not torch.equal(drawn, uniforms(1, 3, torch.arange(50_000)))
    assert not torch.equal(drawn, uniforms(2, 2, torch.arange(50_000)))


def test_each_coordinate_draws_for_itself(instruction_set, backend):
    """Of g and -g, P is a half: what is kept shows whether U is below it. Step, seed and parameter draw anew."""
    rows = [[torch.full((n,), sign) for n in (4097, 4097, 70)] for sign in (1.0, -1.0)]

    def signs(seed, step):
        out = outputs([4097, 4097, 70], torch.float32)
        ops.sign_drop_(out, rows, torch.tensor([seed, step], dtype=torch.float64), backend=backend)
        assert all(bool((o.abs() == 1).all()) for o in out)
        return [o > 0 for o in out]

    first = signs(5, 6)
    for p, sign in enumerate(first):
        streams = (p << 40) + torch.arange(len(sign))
        assert torch.equal(sign, uniforms(5, 6, streams)[: len(sign)] < 0.5)
    assert torch.equal(first[0], signs(5, 6)[0])
    for other in (first[1], signs(5, 7)[0], signs(6, 6)[0]):
        assert 0.45 < float((first[0] == other).double().mean()) < 0.55


# ---- Values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("graddrop__torchjd"))
def test_the_reference_is_the_originals(case):
    leak = torch.full((len(case.jacobian),), case.params["leak"], dtype=torch.float64)
    found = reference.sign_drop(case.jacobian, case.uniforms, leak)
    if case.trust:
        case.assert_update(found)
    else:  # an entry is NaN
        torch.testing.assert_close(found, case.update, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize("leaks", [False, True])
@pytest.mark.parametrize("tasks", [1, 3, 8, 9, 128])
@pytest.mark.parametrize(("dtype", "out_dtype"), DTYPE_PAIRS)
def test_every_size(instruction_set, dtype, out_dtype, tasks, leaks):
    sizes = sizes_for(tasks)
    leak = torch.linspace(0, 1, tasks) if leaks else None
    check(outputs(sizes, out_dtype), gradients(tasks, sizes, dtype), [dtype] * len(sizes), leak)


@pytest.mark.parametrize("dtype", ops.DTYPES)
@pytest.mark.parametrize(("tasks", "row"), [(1, 0), (3, 0), (3, 2), (9, 0), (9, 8), (20, 10)])
def test_over_a_row(instruction_set, backend, dtype, tasks, row):
    rows = gradients(tasks, [17, 4097, 1000], dtype)
    check(rows[row], rows, [dtype] * 3, backend=backend)


@pytest.mark.parametrize("layout", [*LAYOUTS, "contiguous"])
@pytest.mark.parametrize("out_layout", ["contiguous", "offset", "gaps", "transposed", "channels last"])
def test_every_layout(instruction_set, backend, layout, out_layout):
    shapes = [(3, 5, 4, 7), (70, 33), (), (1, 6)]
    rows = gradients(4, shapes, torch.float32, layout=layout)
    check(outputs(shapes, torch.float32, out_layout), rows, [torch.float32] * 4, backend=backend)


@pytest.mark.parametrize("tasks", [3, 20])
def test_missing_entries_and_mixed_dtypes(instruction_set, backend, tasks):
    """A column that no task reaches becomes zeros; the leak of a task that reaches nothing does not matter."""
    sizes, dtypes = [17, 4097, 1000, 9], [torch.bfloat16, torch.float64, torch.float16, torch.float32]
    rows = gradients(tasks, sizes, dtypes, missing=lambda k, p: p == 2 or k == 1 or (k + p) % 3 == 0)
    out, leak = outputs(sizes, dtypes), torch.linspace(0, 1, tasks)
    leak[1] = torch.nan
    ops.sign_drop_(out, rows, COUNTER, leak, backend=backend)
    leak[1] = 0.0
    assert_one_sign(out, rows, COUNTER, leak, dtypes)
    assert torch.equal(out[2], torch.zeros(1000, dtype=torch.float16))


def test_a_leak_of_one_is_the_sum(instruction_set, backend):
    rows, out = gradients(5, [4097], torch.float64), outputs([4097], torch.float64)
    ops.sign_drop_(out, rows, COUNTER, torch.ones(5), backend=backend)
    torch.testing.assert_close(out[0], sum(row[0] for row in rows), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_agreeing_signs_are_all_kept(instruction_set, backend, dtype):
    """P is 1 or 0: no U is beyond it."""
    for sign in (1, -1):
        rows = [[sign * g.abs() for g in row] for row in gradients(3, [70001], dtype)]
        out = outputs([70001], dtype)
        ops.sign_drop_(out, rows, COUNTER, backend=backend)
        assert bool((sign * out[0] >= torch.stack([sign * row[0] for row in rows]).amax(dim=0)).all())


def test_all_zeros(instruction_set, backend):
    out, rows = outputs([70, 0], torch.float32), [[torch.zeros(70), torch.zeros(0)]] * 3
    assert ops.sign_drop_(out, rows, COUNTER, backend=backend).tolist() == [0.0]
    assert not bool(out[0].signbit().any() | out[0].any())


@pytest.mark.parametrize("entry", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("leaks", [False, True])
@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_a_non_finite_gradient_shows(instruction_set, backend, dtype, leaks, entry):
    """Whichever sign is kept, in whole vectors and behind them."""
    rows, out = gradients(10, [5, 4100], dtype), outputs([5, 4100], dtype)
    places = [*range(64), 4098]
    rows[1][1][places] = entry
    norm = ops.sign_drop_(out, rows, COUNTER, torch.zeros(10) if leaks else None, backend=backend)
    assert [o.isnan().nonzero().flatten().tolist() for o in out] == [[], places]
    assert not norm.isfinite().any()


def test_a_sum_too_large_for_half_precision_shows(instruction_set, backend):
    """The norm is that of what was written."""
    out = [torch.zeros(50, dtype=torch.float16)]
    assert not ops.sign_drop_(out, [[torch.full((50,), 4e4).half()]] * 2, COUNTER, backend=backend).isfinite().any()


def test_pieces_of_a_column_are_drawn_alike(instruction_set):
    """Chunks depend on the number of tasks, draws do not: rows of zeros change nothing."""
    rows = gradients(2, [70001], torch.float32)
    few, many = outputs([70001], torch.float32), outputs([70001], torch.float32)
    ops.sign_drop_(few, rows, COUNTER)
    ops.sign_drop_(many, [*rows, *[[torch.zeros(70001)]] * 30], COUNTER)
    assert torch.equal(few[0], many[0])


def test_every_instruction_set_has_the_same_bits(instruction_set):
    rows = gradients(11, [4099, 70], torch.float32)
    out, portable = outputs([4099, 70], torch.float32), outputs([4099, 70], torch.float32)
    ops.sign_drop_(out, rows, COUNTER)
    assert _native.module.use_instruction_set("portable")
    ops.sign_drop_(portable, rows, COUNTER)
    assert all(map(torch.equal, out, portable))
