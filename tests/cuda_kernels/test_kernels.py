"""The unmodified CUDA kernels, run on the CPU: against float64, with guarded memory, in several thread orders."""

import pytest
import torch
from torch import Tensor

from igb_kernels import _native, ops
from igb_kernels.backends._layout import DTYPE_CODES
from igb_kernels.status import Status

from .emulated import ORDERS
from .samples import DTYPES, SIZES, Guarded, Kernels, Row, accumulator, epsilon, flat

TASKS = (1, 2, 3, 5, 8, 9, 11, 16, 17, 40)


@pytest.fixture(autouse=True)
def guarded():
    torch.manual_seed(0)
    made = Guarded()
    yield made
    assert made.is_intact()


@pytest.fixture
def kernels(emulated, guarded):
    return Kernels(emulated, guarded)


def sample(guarded: Guarded, dtype: torch.dtype, tasks: int) -> tuple[list[Row], Tensor]:
    """K rows, of which some lack a parameter, and their values [K, D] in float64."""
    rows = [guarded.row(dtype) for _ in range(tasks)]
    if tasks > 1:
        rows[1][3] = rows[0][4] = rows[-1][0] = None
    like = [t if (t := rows[0][p]) is not None else rows[1][p] for p in range(len(SIZES))]
    return rows, torch.stack([flat(row, like) for row in rows])


def in_every_order(native, function):
    """What the function returns, the same bits for all orders of threads."""
    results = []
    for order in ORDERS:
        native.set_thread_order(order)
        results.append(function())
    native.set_thread_order(0)
    assert all(torch.equal(results[0], other) for other in results[1:])
    return results[0]


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_and_norms(emulated, kernels, guarded, dtype, tasks):
    rows, values = sample(guarded, dtype, tasks)
    exact = values @ values.T
    scale = exact.diagonal().sqrt()
    tolerance = 100 * epsilon(accumulator(dtype)) * scale[:, None] * scale
    gram = in_every_order(emulated, lambda: kernels.gram(rows))
    assert ((gram - exact).abs() <= tolerance).all()
    assert torch.equal(gram, gram.T)
    norms = in_every_order(emulated, lambda: kernels.sq_norms(rows))
    assert ((norms - exact.diagonal()).abs() <= tolerance.diagonal()).all()


def test_mixed_dtypes_and_nothing_at_all(kernels, guarded):
    rows = [[guarded.tensor(torch.randn(500).to(dtype)) for dtype in DTYPES] for _ in range(3)]
    values = torch.stack([flat(row, row) for row in rows])
    torch.testing.assert_close(kernels.gram(rows), values @ values.T, rtol=0, atol=1e-3)
    out = [torch.full_like(t, torch.nan) for t in rows[0]]
    weights = torch.rand(3, dtype=torch.float64)
    kernels.combine(out, rows, weights, False)
    torch.testing.assert_close(flat(out, out), weights @ values, rtol=1e-2, atol=1e-2)
    empty = [[torch.zeros(0)], [None]]
    assert torch.equal(kernels.gram(empty), torch.zeros(2, 2, dtype=torch.float64))
    assert torch.equal(kernels.sq_norms(empty), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("entry", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_elements_are_not_lost(kernels, guarded, entry):
    rows, _ = sample(guarded, torch.float32, 3)
    rows[2][4][4567] = entry
    assert kernels.sq_norms(rows).isfinite().tolist() == [True, True, False]
    assert kernels.gram(rows).isfinite().tolist() == [[True, True, False], [True, True, False], [False, False, False]]


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ema(emulated, kernels, guarded, dtype, tasks):
    rows, values = sample(guarded, dtype, tasks)
    wide, decay = accumulator(dtype), 0.75
    state = [guarded.row(wide) for _ in range(tasks)]
    if tasks > 1:
        state[0][5] = None
    out = [[guarded.unused(wide, size, offset) for size, offset in SIZES] for _ in range(tasks)]
    old = torch.stack([flat(row, out[0]) for row in state])
    norms = in_every_order(emulated, lambda: kernels.ema(out, state, rows, decay))
    new = torch.stack([flat(row, row) for row in out])
    torch.testing.assert_close(new, decay * old + (1 - decay) * values, rtol=0, atol=8 * epsilon(wide))
    torch.testing.assert_close(norms, new.square().sum(dim=1), rtol=100 * epsilon(wide), atol=0)
    in_place = kernels.ema(state[-1:], state[-1:], rows[-1:], decay)
    torch.testing.assert_close(in_place, norms[-1:], rtol=1e-6, atol=0)
    assert torch.equal(flat(state[-1], out[0]), new[-1])
    scales = torch.linspace(-1, 2, tasks, dtype=torch.float64)
    norms = kernels.ema(out, [[None] * len(SIZES)] * tasks, rows, decay, scales)
    new = torch.stack([flat(row, row) for row in out])
    torch.testing.assert_close(new, (1 - decay) * scales[:, None] * values, rtol=0, atol=8 * epsilon(wide))
    torch.testing.assert_close(norms, new.square().sum(dim=1), rtol=100 * epsilon(wide), atol=0)


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulate_squares(emulated, kernels, guarded, dtype, tasks):
    rows, values = sample(guarded, dtype, tasks)
    wide, eps = accumulator(dtype), 1e-2
    state = [[None if t is None else t.square_() for t in guarded.row(wide)] for _ in range(tasks)]
    if tasks > 1:
        state[0][5] = None
    out = [[guarded.unused(wide, size, offset) for size, offset in SIZES] for _ in range(tasks)]
    exact = torch.stack([flat(row, out[0]) for row in state]) + values.square()
    excess = in_every_order(emulated, lambda: kernels.accumulate_squares(out, state, rows, eps))
    new = torch.stack([flat(row, row) for row in out])
    torch.testing.assert_close(new, exact, rtol=4 * epsilon(wide), atol=0)
    want = (values.square() / (exact + eps).sqrt()).sum(dim=1)
    torch.testing.assert_close(excess, want, rtol=100 * epsilon(wide), atol=0)
    in_place = kernels.accumulate_squares(state[-1:], state[-1:], rows[-1:], eps)
    torch.testing.assert_close(in_place, excess[-1:], rtol=1e-6, atol=0)
    assert torch.equal(flat(state[-1], out[0]), new[-1])


def test_missing_averages_are_skipped(kernels, guarded):
    out = [guarded.row(torch.float32), [*guarded.row(torch.float32)[:5], None]]
    grads = [guarded.row(torch.float32), [*guarded.row(torch.float32)[:5], None]]
    norms = kernels.ema(out, [[None] * 6, [None] * 6], grads, 0.5)
    expected = torch.stack([0.25 * flat(row, out[0]).square().sum() for row in grads])
    torch.testing.assert_close(norms, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("tasks", [1, 3, 4, 9])
@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [*((t, t) for t in DTYPES), *((t, torch.float32) for t in DTYPES[2:]), *((torch.float32, t) for t in DTYPES[2:])],
)
def test_combine(emulated, kernels, guarded, dtype, out_dtype, tasks, accumulate):
    rows, values = sample(guarded, dtype, tasks)
    weights = torch.randn(tasks, dtype=torch.float64)
    start = guarded.row(out_dtype)
    expected = weights @ values + (flat(start, start) if accumulate else 0)

    def combined():
        out = [guarded.tensor(t, offset) for t, (_, offset) in zip(start, SIZES, strict=True)]
        kernels.combine(out, rows, weights, accumulate)
        return flat(out, out)

    tolerance = (8 * epsilon(torch.float32) if dtype is not torch.float64 else 1e-14) + epsilon(out_dtype)
    torch.testing.assert_close(in_every_order(emulated, combined), expected, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("leak", [None, torch.linspace(0, 1, 9, dtype=torch.float64)], ids=["", "leaks"])
@pytest.mark.parametrize("tasks", [1, 3, 9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sign_drop(emulated, kernels, guarded, dtype, tasks, leak):
    """In any order of threads, and over a row, with the decisions of the CPU's kernels."""
    rows, _ = sample(guarded, dtype, tasks)
    counter = torch.tensor([2.0**40 + 5, 2.0**33 + 3], dtype=torch.float64)
    leaks = None if leak is None else leak[:tasks].contiguous()
    out, want = ([guarded.unused(dtype, size, offset) for size, offset in SIZES] for _ in range(2))
    norm = in_every_order(emulated, lambda: kernels.sign_drop(out, rows, counter, leaks))
    want_norm = ops.sign_drop_(want, rows, counter, leaks, backend="cpu")
    found, expected = flat(out, out), flat(want, want)
    if leaks is None:
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=2 * epsilon(dtype), atol=20 * epsilon(accumulator(dtype)))
    torch.testing.assert_close(norm, found.square().sum().reshape(1), rtol=100 * epsilon(accumulator(dtype)), atol=0)
    torch.testing.assert_close(norm, want_norm, rtol=1e-3, atol=0)
    if all(t is not None for t in rows[0]):
        kernels.sign_drop(rows[0], rows, counter, leaks)
        assert torch.equal(flat(rows[0], rows[0]), found)


@pytest.mark.parametrize("entry", [torch.nan, torch.inf, -torch.inf])
def test_sign_drop_of_non_finite_elements(kernels, guarded, entry):
    rows, out = [guarded.row(torch.float32) for _ in range(3)], guarded.row(torch.float32)
    rows[1][0][8999], rows[2][3][7] = entry, entry
    norm = kernels.sign_drop(out, rows, torch.zeros(2, dtype=torch.float64), None)
    assert [t.isnan().nonzero().flatten().tolist() for t in out] == [[8999], [], [], [7], [], []]
    assert not norm.isfinite()


@pytest.mark.parametrize("row", [0, 2])
def test_out_may_be_a_row(kernels, guarded, row):
    rows = [guarded.row(torch.float32) for _ in range(3)]
    weights = torch.randn(3, dtype=torch.float64)
    expected = weights @ torch.stack([flat(r, r) for r in rows])
    kernels.combine(rows[row], rows, weights, False)
    torch.testing.assert_close(flat(rows[row], rows[row]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("status", [0, int(Status.ZERO_GRADIENT), int(Status.NON_FINITE | Status.ZERO_GRADIENT)])
def test_rollback(kernels, guarded, status):
    single, double = ([guarded.row(dtype) for _ in range(2)] for dtype in (torch.float32, torch.float64))
    out = [[*a[:3], *b[3:]] for a, b in zip(single, double, strict=True)]
    kept: list[Row] = [[torch.randn_like(t) for t in out[0]], [None, *(torch.randn_like(t) for t in out[1][1:])]]
    before = [flat(row, row) for row in out]
    kernels.rollback(out, kept, status)
    failed = bool(status & Status.NON_FINITE)
    expected = [flat(row, out[0]) for row in kept] if failed else before
    assert all(torch.equal(flat(row, row), e) for row, e in zip(out, expected, strict=True))


@pytest.mark.parametrize("tasks", [1, 2, 5, 33, 90])
@pytest.mark.parametrize("method", list(_native.module.methods if _native.module else []))
def test_solvers_have_the_bits_of_the_cpu(emulated, guarded, method, tasks):
    j = torch.randn(tasks, 2 * tasks, dtype=torch.float64)
    gram, losses = j @ j.T, torch.rand(tasks, dtype=torch.float64) + 0.1
    solver = ops.SOLVERS[method]
    options = list(solver.options.values())
    state = solver.new_state(tasks, torch.device("cpu"))
    states = [None if state is None else state.clone() for _ in range(2)]
    results = [guarded.unused(torch.float64, tasks) for _ in range(2)]
    numbers = torch.rand(solver.per_task(tasks) if solver.needs_per_task else 0, dtype=torch.float64)
    per_task = numbers.data_ptr() if solver.needs_per_task else 0
    workspace = guarded.unused(torch.float64, emulated.workspace_size(_native.module.methods[method], tasks))
    status = torch.full((), -1, dtype=torch.int32)
    arguments = (_native.module.methods[method], tasks, gram.data_ptr(), True, losses.data_ptr(), per_task, options)
    pointers = [0 if s is None else s.data_ptr() for s in states]
    emulated.solve(*arguments, pointers[0], results[0].data_ptr(), status.data_ptr(), workspace.data_ptr(), 0)
    assert int(status) == _native.module.solve(*arguments, pointers[1], results[1].data_ptr())
    assert torch.equal(*results)
    assert state is None or torch.equal(states[0], states[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", list(_native.module.loss_rules if _native.module else []))
def test_loss_scales_have_the_bits_of_the_cpu(emulated, guarded, rule, dtype):
    losses = guarded.tensor((torch.rand(37) + 0.1).to(dtype))
    known = ops.RULES[rule]
    per_task = torch.rand(known.per_task(37) if known.per_task else 0, dtype=torch.float64) + 0.5
    options, state = list(known.options.values()), known.new_state(37, torch.device("cpu"))
    states = [None if state is None else state.clone() for _ in range(2)]
    pointers = [0 if s is None else s.data_ptr() for s in states]
    scales, status = guarded.unused(dtype, 37), torch.full((), -1, dtype=torch.int32)
    number, wide, expected = _native.module.loss_rules[rule], losses.double(), torch.empty(37, dtype=torch.float64)
    emulated.loss_scales(
        number, 37, DTYPE_CODES[dtype], losses.data_ptr(), per_task.data_ptr(), options, pointers[0],
        scales.data_ptr(), status.data_ptr(), 0,
    )  # fmt: skip
    assert int(status) == _native.module.loss_scales(
        number, 37, wide.data_ptr(), per_task.data_ptr(), options, pointers[1], expected.data_ptr()
    )
    assert torch.equal(scales, expected.to(dtype))
    assert state is None or torch.equal(*states)
