"""Every operation of the Triton backend against float64 and eager PyTorch; `test_interpreter.py` runs this."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from oracle import assert_one_sign, assert_squares, assert_sum, expected_gram
from samplers import LAYOUTS, gradients, per_task_of
from tolerances import TOLERANCES

from igb_kernels import Status, ops
from igb_kernels.backends import resolve
from igb_kernels.backends._triton_kernels import CHUNK
from igb_kernels.ops import accumulator_dtype

TASKS = (1, 2, 3, 8, 11)
SIZES = (0, 1, 17, 600, CHUNK + 33)
"""Nothing, less than a vector, ragged, and a full chunk with a rest."""
SHAPES = [(3, 5, 4, 7), (17,), (), (1, 6), (70, 33), (0, 4)]
DTYPE_PAIRS = [
    *((dtype, dtype) for dtype in ops.DTYPES),
    *((torch.float32, half) for half in (torch.bfloat16, torch.float16)),
    *((half, torch.float32) for half in (torch.bfloat16, torch.float16)),
]
"""(Gradients, out)."""


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Uninitialised memory is NaN, so that an element that nothing wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


# ---- Gramian and norms -------------------------------------------------------------------------------------------


def check_gram(rows):
    expected = expected_gram(rows)
    expected.check(ops.gram(rows, backend="triton"))
    expected.check(ops.sq_norms(rows, backend="triton"))


@pytest.mark.parametrize("layout", ["contiguous", "offset"])
@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_gram(dtype, tasks, layout):
    check_gram(gradients(tasks, SIZES, dtype, layout=layout))


@pytest.mark.parametrize(("tasks", "dtype"), [(17, torch.bfloat16), (40, torch.float32), (40, torch.float64)])
def test_gram_of_more_than_a_tile(tasks, dtype):
    check_gram(gradients(tasks, [40, 1, 200], dtype))


@pytest.mark.parametrize("tasks", [3, 11])
def test_gram_of_one_misaligned_row(tasks):
    rows = gradients(tasks, [CHUNK], torch.float32)
    rows[1] = gradients(1, [CHUNK], torch.float32, seed=1, layout="offset")[0]
    check_gram(rows)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gram_of_every_layout(layout):
    check_gram(gradients(3, SHAPES, torch.float32, layout=layout))


MISSING = {
    "some": lambda k, p: (k + 2 * p) % 3 == 0,
    "a column": lambda k, p: p == 1,
    "a task": lambda k, p: k == 1,
    "everything": lambda k, p: True,
}


@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize("tasks", [3, 9])
def test_gram_of_missing_entries(missing, tasks):
    check_gram(gradients(tasks, [17, CHUNK, 50, 5], torch.float32, missing=MISSING[missing]))


@pytest.mark.parametrize("tasks", [3, 9])
def test_gram_of_mixed_dtypes(tasks):
    dtypes = [torch.bfloat16, torch.float64, torch.float32, torch.float16, torch.float32]
    check_gram(gradients(tasks, [33, 100, CHUNK, 500, 7], dtypes, missing=lambda k, p: k == p))


@pytest.mark.parametrize("tasks", [3, 9])
@pytest.mark.parametrize("shapes", [[], [0], [0, (3, 0)]])
def test_gram_of_no_elements(shapes, tasks):
    check_gram(gradients(tasks, shapes, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tasks", [2, 9])
def test_large_half_precision_gradients_do_not_overflow(tasks, dtype):
    rows = [[torch.full((600,), 65504.0).to(dtype)] for _ in range(tasks)]
    expected = ops.gram(rows, backend="reference")
    torch.testing.assert_close(ops.gram(rows, backend="triton"), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("tasks", [4, 9])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_non_finite_gradient_shows(value, tasks):
    rows = gradients(tasks, [5, CHUNK + 9], torch.float32)
    rows[2][1][-1] = value
    for measured in (ops.gram(rows, backend="triton").diagonal(), ops.sq_norms(rows, backend="triton")):
        assert measured.isfinite().tolist() == [k != 2 for k in range(tasks)]


# ---- Weighted sum ------------------------------------------------------------------------------------------------


def weights_for(tasks):
    return torch.randn(tasks, dtype=torch.float64, generator=torch.Generator().manual_seed(tasks))


def check_combine(out, rows, accumulate=False):
    """What is expected comes from copies, because `out` may be among the rows."""
    weights = weights_for(len(rows))
    before = [o.clone() for o in out]
    copies = [[None if t is None else t.clone() for t in row] for row in rows]
    ops.combine_(out, rows, weights, accumulate=accumulate, backend="triton")
    for p, o in enumerate(out):
        column = [row[p] for row in copies]
        dtype = next((t.dtype for t in column if t is not None), o.dtype)
        terms = [*zip(weights.tolist(), column, strict=True), (1.0, before[p] if accumulate else None)]
        check_sum(o, terms, dtype, f"column {p}")


def check_sum(found, terms, dtype, context):
    if found.dtype is not torch.bfloat16:
        assert_sum(found, terms, dtype, context)
        return
    terms = [(w, t.double()) for w, t in terms if t is not None]  # the interpreter truncates, a GPU rounds
    truth = sum((w * t for w, t in terms), torch.zeros(found.shape, dtype=torch.float64))
    scale = sum((abs(w) * t.abs() for w, t in terms), torch.zeros(found.shape, dtype=torch.float64))
    excess = (found.double() - truth).abs() - 2**-7 * truth.abs() - TOLERANCES[dtype].element * scale
    assert bool((excess <= 0).all()), context


def outputs(shapes, dtypes, accumulate, layout="contiguous"):
    """Targets to write (full of NaN) or to accumulate into."""
    (out,) = gradients(1, shapes, dtypes, seed=99, layout=layout)
    return out if accumulate else [o.fill_(torch.nan) for o in out]


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "offset"])
@pytest.mark.parametrize(("dtype", "out_dtype"), DTYPE_PAIRS)
def test_combine(dtype, out_dtype, layout, accumulate):
    check_combine(outputs(SIZES, out_dtype, accumulate), gradients(3, SIZES, dtype, layout=layout), accumulate)


@pytest.mark.parametrize("tasks", TASKS)
def test_combine_any_number_of_tasks(tasks):
    check_combine(outputs(SIZES, torch.float32, False), gradients(tasks, SIZES, torch.float32))


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", ops.DTYPES)
@pytest.mark.parametrize(("tasks", "row"), [(1, 0), (3, 2), (11, 0), (11, 9)])
def test_combine_over_a_row(dtype, tasks, row, accumulate):
    rows = gradients(tasks, [17, CHUNK + 5], dtype)
    check_combine(rows[row], rows, accumulate)


@pytest.mark.parametrize("layout", [*LAYOUTS, "contiguous"])
@pytest.mark.parametrize("out_layout", ["contiguous", "offset", "gaps", "transposed", "channels last"])
def test_combine_every_layout(layout, out_layout):
    check_combine(
        outputs(SHAPES, torch.float32, True, out_layout), gradients(2, SHAPES, torch.float32, layout=layout), True
    )


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("tasks", [3, 10])
def test_combine_missing_entries(tasks, accumulate):
    """A column that no task reaches becomes zeros, or stays as it is when accumulating."""
    sizes = [17, 1000, CHUNK, 9]
    rows = gradients(tasks, sizes, torch.float32, missing=lambda k, p: p == 1 or (k + p) % 3 == 0)
    check_combine(outputs(sizes, torch.float32, accumulate), rows, accumulate)


def test_combine_mixed_dtypes():
    sizes = [33 + 50 * p for p in range(len(DTYPE_PAIRS))]
    rows = gradients(3, sizes, [dtype for dtype, _ in DTYPE_PAIRS])
    check_combine(outputs(sizes, [out for _, out in DTYPE_PAIRS], False), rows)


def test_combine_skips_missing_outputs():
    backend = resolve("triton", "cpu")
    (row,) = gradients(1, [5, 7], torch.float32)
    out = torch.full((7,), torch.nan)
    backend.combine_(backend.Table([None, out], 1), backend.Table(row, 1), torch.ones(1), False)
    assert torch.equal(out, row[1])


@pytest.mark.parametrize("weight", [torch.nan, torch.inf])
def test_non_finite_weights_reach_what_the_task_reaches(weight):
    rows = gradients(3, [1, 67, CHUNK], torch.float32, missing=lambda k, p: (k, p) == (1, 1))
    out = [torch.empty(size) for size in (1, 67, CHUNK)]
    ops.combine_(out, rows, torch.tensor([1.0, weight, 1.0]), backend="triton")
    assert [bool(o.isfinite().any()) for o in out] == [False, True, False]
    assert out[1].isfinite().all()


def test_a_non_finite_gradient_stays_where_it_is():
    (row,) = gradients(1, [CHUNK + 3], torch.float32)
    row[0][CHUNK] = torch.nan
    out = torch.empty(CHUNK + 3)
    ops.combine_([out], [row], torch.ones(1), backend="triton")
    assert out.isfinite().logical_not().nonzero().flatten().tolist() == [CHUNK]


# ---- One sign in each element ------------------------------------------------------------------------------------


def check_one_sign(out, rows, leak, dtypes):
    counter = torch.tensor([2.0**40 + 5, 2.0**33 + 3], dtype=torch.float64)
    copies = [[None if t is None else t.clone() for t in row] for row in rows]
    norm = ops.sign_drop_(out, rows, counter, leak, backend="triton")
    assert_one_sign(out, copies, counter, leak, dtypes, slack=2**-7)  # the interpreter truncates to bfloat16
    torch.testing.assert_close(norm, sum(o.double().square().sum() for o in out).reshape(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_sign_drop(dtype, tasks):
    rows = gradients(tasks, SIZES, dtype, missing=lambda k, p: p == 2 or (k, p) == (1, 4))
    for leak in (None, torch.linspace(0, 1, tasks)):
        check_one_sign(outputs(SIZES, dtype, False), rows, leak, [dtype] * len(SIZES))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sign_drop_every_layout(layout):
    rows = gradients(3, SHAPES, torch.float32, layout=layout)
    for out_layout in ("contiguous", "transposed", "gaps"):
        check_one_sign(outputs(SHAPES, torch.float32, False, out_layout), rows, None, [torch.float32] * len(SHAPES))


def test_sign_drop_over_a_row_and_of_mixed_dtypes():
    dtypes = [dtype for dtype, _ in DTYPE_PAIRS]
    sizes = [33 + 50 * p for p in range(len(DTYPE_PAIRS))]
    rows = gradients(3, sizes, dtypes)
    check_one_sign(outputs(sizes, [out for _, out in DTYPE_PAIRS], False), rows, None, dtypes)
    check_one_sign(rows[0], rows, None, dtypes)


@pytest.mark.parametrize("entry", [torch.nan, torch.inf, -torch.inf])
def test_sign_drop_of_a_non_finite_gradient(entry):
    rows = gradients(3, [5, CHUNK + 3], torch.float32)
    rows[1][1][CHUNK] = entry
    out = outputs([5, CHUNK + 3], torch.float32, True)
    norm = ops.sign_drop_(out, rows, torch.zeros(2, dtype=torch.float64), backend="triton")
    assert [o.isnan().nonzero().flatten().tolist() for o in out] == [[], [CHUNK]]
    assert not norm.isfinite()


# ---- Moving averages ---------------------------------------------------------------------------------------------


def check_ema(out, state, grads, decay, dtypes, scales=None):
    old = [[None if t is None else t.clone() for t in row] for row in state]
    norms = ops.ema_(out, state, grads, torch.tensor([decay], dtype=torch.float64), scales, backend="triton")
    factors = [1.0] * len(out) if scales is None else scales.tolist()
    for out_row, old_row, row, factor in zip(out, old, grads, factors, strict=True):
        for p, (o, s, g) in enumerate(zip(out_row, old_row, row, strict=True)):
            assert_sum(o, [(decay, s), ((1 - decay) * factor, g)], dtypes[p], f"column {p}")
    expected_gram(out).check(norms, "norms")


def averages(tasks, shapes, dtypes, layout="contiguous"):
    out = gradients(tasks, shapes, [accumulator_dtype(d) for d in dtypes], layout=layout)
    return [[t.fill_(torch.nan) for t in row] for row in out]


@pytest.mark.parametrize("layout", ["contiguous", "offset"])
@pytest.mark.parametrize("decay", [0.0, 0.9])
@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_ema(dtype, decay, layout):
    """With and without state and gradient, and where a column has neither."""
    sizes, wide = [*SIZES, 66, 9], accumulator_dtype(dtype)
    dtypes = [dtype] * len(sizes)
    grads = gradients(3, sizes, dtype, missing=lambda k, p: p in (2, 6) or (k + p) % 3 == 2, layout=layout)
    state = gradients(3, sizes, wide, seed=1, missing=lambda k, p: p in (5, 6) or (k + p) % 4 == 0)
    check_ema(averages(3, sizes, dtypes), state, grads, decay, dtypes)


def test_ema_in_place_without_state_and_in_mixed_dtypes():
    sizes, dtypes = [33, CHUNK, 5], [torch.bfloat16, torch.float64, torch.float32]
    grads = gradients(2, sizes, dtypes)
    state = gradients(2, sizes, [accumulator_dtype(d) for d in dtypes], seed=1)
    check_ema(state, state, grads, 0.25, dtypes)
    check_ema(averages(2, sizes, dtypes), [[None] * 3] * 2, grads, 0.25, dtypes)
    check_ema(averages(2, sizes, dtypes), state, grads, 0.25, dtypes, torch.tensor([-2.0, 0.3]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("out_layout", ["gaps", "transposed"])
def test_ema_every_layout(layout, out_layout):
    dtypes = [torch.float32] * len(SHAPES)
    grads = gradients(2, SHAPES, torch.float32, layout=layout)
    state = gradients(2, SHAPES, torch.float32, seed=1, layout="mixed")
    check_ema(averages(2, SHAPES, dtypes, out_layout), state, grads, 0.7, dtypes)


@pytest.mark.parametrize("layout", ["contiguous", "offset", "mixed"])
@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_accumulate_squares(dtype, layout):
    """With and without state and gradient, and where a column has neither; then in place."""
    shapes, wide = [*SIZES, 66, (2, 3, 4, 5)], accumulator_dtype(dtype)
    grads = gradients(3, shapes, dtype, missing=lambda k, p: p in (2, 6) or (k + p) % 3 == 2, layout=layout)
    state = gradients(3, shapes, wide, seed=1, missing=lambda k, p: p in (5, 6) or (k + p) % 4 == 0)
    state = [[None if t is None else t.square() for t in row] for row in state]
    out = averages(3, shapes, [dtype] * len(shapes))
    excess = ops.accumulate_squares_(out, state, grads, 1e-4, backend="triton")
    assert_squares(out, excess, state, grads, 1e-4)
    before = [[t.clone() for t in row] for row in out]
    assert_squares(out, ops.accumulate_squares_(out, out, grads, 1e-4, backend="triton"), before, grads, 1e-4)


@pytest.mark.parametrize("status", [Status.NON_FINITE, Status.NON_FINITE | Status.ZERO_GRADIENT, Status.ALL_INACTIVE])
@pytest.mark.parametrize("layout", ["contiguous", "gaps"])
def test_rollback(status, layout):
    (out,) = gradients(1, [CHUNK + 9, (3, 4), 7], [torch.float32, torch.float64, torch.float32], layout=layout)
    out[0][5] = torch.nan
    kept = [torch.arange(CHUNK + 9.0), None, torch.ones(7)]
    undone = [kept[0], torch.zeros(3, 4, dtype=torch.float64), kept[2]]
    expected = undone if status & Status.NON_FINITE else [t.clone() for t in out]
    ops.rollback_(out, kept, torch.tensor(int(status), dtype=torch.int32), backend="triton")
    for t, want in zip(out, expected, strict=True):
        torch.testing.assert_close(t, want, rtol=0, atol=0, equal_nan=True)


# ---- Solvers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", sorted(ops.SOLVERS))
def test_solve_is_the_cpus(method):
    rows, losses = torch.randn(4, 30, dtype=torch.float64), torch.rand(4)
    solver, results = ops.SOLVERS[method], []
    for backend in ("triton", "auto"):
        state = solver.new_state(4, torch.device("cpu"))
        weights, status = ops.solve(method, rows @ rows.T, losses, per_task_of(solver, 4), state=state, backend=backend)
        results.append((weights, status, torch.zeros(0) if state is None else state))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rule", sorted(ops.RULES))
def test_loss_scales_are_the_cpus(rule):
    losses, per_task = torch.tensor([1.0, 2.0]), per_task_of(ops.RULES[rule], 2)
    ours, theirs = (ops.loss_scales(rule, losses, per_task, backend=backend) for backend in ("triton", "auto"))
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
