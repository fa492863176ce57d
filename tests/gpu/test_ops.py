"""Every operation on the GPU against float64, by the same oracle as on the CPU."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_no_worse, assert_one_sign, assert_squares, assert_sum, expected_gram
from samplers import WELL_POSED, gradients, gramian, jacobian, per_task_of
from tolerances import SOLVER, TOLERANCES
from torch import Tensor

from igb_kernels import Status, _native, ops

SIZES = (0, 1, 3, 17, 1000, 4097, 70001)
TASKS = (1, 2, 3, 4, 5, 8, 9, 13, 17, 64, 128)
COMBINED = [
    *((dtype, dtype) for dtype in ops.DTYPES),
    *((half, torch.float32) for half in (torch.bfloat16, torch.float16)),
    *((torch.float32, half) for half in (torch.bfloat16, torch.float16)),
]


def on_gpu(rows, layout="contiguous"):
    return [[None if t is None else laid_out(t.cuda(), layout) for t in row] for row in rows]


def laid_out(t: Tensor, layout: str) -> Tensor:
    """`samplers.laid_out` makes CPU tensors; `misaligned` is by one element."""
    if layout == "misaligned":
        return torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:].view(t.shape).copy_(t)
    if layout == "transposed":
        return t.mT.contiguous().mT if t.dim() > 1 else t
    if layout == "gaps" and t.dim():
        wide = torch.empty(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype, device=t.device)
        return wide[..., ::2].copy_(t)
    return t


def poisoned(like):
    return [torch.full_like(t, torch.nan) for t in like]


def some_missing(k, p):
    return (k + 2 * p) % 5 == 1


def sizes_for(tasks):
    return SIZES if tasks <= 9 else SIZES[:-1]


def check_measured(rows, backend, layout="contiguous"):
    expected, placed = expected_gram(rows), on_gpu(rows, layout)
    for measured in (ops.gram(placed, backend=backend), ops.sq_norms(placed, backend=backend)):
        assert measured.is_cuda
        expected.check(measured.cpu())


@pytest.mark.parametrize("tasks", [2, 5, 9, 13, 17, 64])
def test_more_chunks_than_blocks(gpu_backend, tasks):
    rows = gradients(tasks, [7] * 1500, torch.float32)
    check_measured(rows, gpu_backend)
    placed, weights = on_gpu(rows), torch.randn(tasks, dtype=torch.float64)
    ops.combine_(placed[-1], placed, weights.cuda(), backend=gpu_backend)
    exact = weights @ torch.stack([torch.cat(row).double() for row in rows])
    torch.testing.assert_close(torch.cat(placed[-1]).cpu().double(), exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_gram_and_norms(gpu_backend, dtype, tasks):
    check_measured(gradients(tasks, sizes_for(tasks), dtype), gpu_backend)
    check_measured(gradients(tasks, sizes_for(tasks), dtype, missing=some_missing), gpu_backend)


@pytest.mark.parametrize("layout", ["misaligned", "transposed", "gaps"])
@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_layouts(gpu_backend, dtype, layout):
    shapes = [(3, 5, 4, 7), (17,), (), (70, 33), (0, 4), (9000,)]
    rows = gradients(5, shapes, dtype)
    check_measured(rows, gpu_backend, layout)
    placed, out = on_gpu(rows, layout), on_gpu(gradients(1, shapes, dtype, seed=1), layout)[0]
    before, weights = [t.cpu() for t in out], [0.5, -1.0, 2.0, 0.0, 3e-3]
    ops.combine_(out, placed, torch.tensor(weights, device="cuda"), accumulate=True, backend=gpu_backend)
    exact = torch.tensor(weights).double().tolist()
    for p, found in enumerate(out):
        terms = [(1.0, before[p]), *((w, row[p]) for w, row in zip(exact, rows, strict=True))]
        assert_sum(found.cpu(), terms, dtype, p)


def test_mixed_layouts_and_dtypes(gpu_backend):
    dtypes = [torch.bfloat16, torch.float64, torch.float32, torch.float16]
    rows = gradients(3, [(2, 3, 4, 5)] * 4, dtypes, missing=lambda k, p: k == p)
    placed = on_gpu(rows)
    for row in placed[1:]:
        row[:] = [None if t is None else t.contiguous(memory_format=torch.channels_last) for t in row]
    expected_gram(rows).check(ops.gram(placed, backend=gpu_backend).cpu())


@pytest.mark.parametrize("shapes", [[0], [0, (3, 0)], [0, 5, 0]])
def test_no_elements(gpu_backend, shapes):
    check_measured(gradients(3, shapes, torch.float32), gpu_backend)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("position", [0, 31, 4099, -1])
def test_a_non_finite_gradient_shows(gpu_backend, value, position):
    rows = on_gpu(gradients(4, [5, 4111], torch.float32))
    rows[2][1][position] = value
    for measured in (ops.gram(rows, backend=gpu_backend).diagonal(), ops.sq_norms(rows, backend=gpu_backend)):
        assert measured.isfinite().tolist() == [True, True, False, True]


@pytest.mark.parametrize("tasks", [1, 3, 9, 64])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("dtype", "out_dtype"), COMBINED)
def test_combine(gpu_backend, dtype, out_dtype, accumulate, tasks):
    rows = gradients(tasks, sizes_for(tasks), dtype, missing=some_missing)
    before = gradients(1, sizes_for(tasks), out_dtype, seed=1)[0]
    out = [t.cuda() for t in before] if accumulate else poisoned([t.cuda() for t in before])
    weights = torch.randn(tasks, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ops.combine_(out, on_gpu(rows), weights.cuda(), accumulate=accumulate, backend=gpu_backend)
    for p, found in enumerate(out):
        terms = [(w, row[p]) for w, row in zip(weights.tolist(), rows, strict=True)]
        assert_sum(found.cpu(), [*terms, (float(accumulate), before[p])], dtype, p)


@pytest.mark.parametrize("row", [0, 2])
def test_the_sum_may_be_written_over_a_row(gpu_backend, row):
    rows = gradients(3, SIZES, torch.float32)
    placed = on_gpu(rows)
    ops.combine_(placed[row], placed, torch.tensor([0.5, 2.0, -1.0], device="cuda"), backend=gpu_backend)
    for p, found in enumerate(placed[row]):
        assert_sum(found.cpu(), [(w, r[p]) for w, r in zip((0.5, 2.0, -1.0), rows, strict=True)], torch.float32, p)


@pytest.mark.parametrize("leaks", [False, True])
@pytest.mark.parametrize("tasks", [1, 3, 9, 64])
@pytest.mark.parametrize(("dtype", "out_dtype"), COMBINED)
def test_sign_drop(gpu_backend, dtype, out_dtype, tasks, leaks):
    sizes = sizes_for(tasks)
    rows = gradients(tasks, sizes, dtype, missing=some_missing)
    out = poisoned([t.cuda() for t in gradients(1, sizes, out_dtype)[0]])
    counter = torch.tensor([2.0**40 + 5, 2.0**33 + 3], dtype=torch.float64)
    leak = torch.linspace(0, 1, tasks) if leaks else None
    on_device = None if leak is None else leak.cuda()
    norm = ops.sign_drop_(out, on_gpu(rows), counter.cuda(), on_device, backend=gpu_backend)
    found = [t.cpu() for t in out]
    assert_one_sign(found, rows, counter, leak, [dtype] * len(sizes))
    want = sum(t.double().square().sum() for t in found).reshape(1)
    torch.testing.assert_close(norm.cpu(), want, rtol=1e-5, atol=0)


@pytest.mark.skipif(_native.module is None, reason="compares with the compiled CPU kernels")
@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_sign_drop_has_the_bits_of_the_cpu(gpu_backend, dtype):
    rows, counter = gradients(5, SIZES, dtype), torch.tensor([3.0, 4.0], dtype=torch.float64)
    found, want = poisoned([t.cuda() for t in rows[0]]), poisoned(rows[0])
    ops.sign_drop_(found, on_gpu(rows), counter.cuda(), backend=gpu_backend)
    ops.sign_drop_(want, rows, counter, backend="cpu")
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize("tasks", [1, 3, 9])
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_ema(gpu_backend, dtype, on_device, tasks):
    wide, decay = ops.accumulator_dtype(dtype), 0.75
    rows = gradients(tasks, SIZES, dtype, missing=some_missing)
    state = gradients(tasks, SIZES, wide, seed=1, missing=lambda k, p: k == p)
    out = [poisoned([t.cuda() for t in row]) for row in gradients(tasks, SIZES, wide)]
    given = torch.tensor([decay], dtype=torch.float64, device="cuda") if on_device else decay
    norms = ops.ema_(out, on_gpu(state), on_gpu(rows), given, backend=gpu_backend)
    for k in range(tasks):
        for p, found in enumerate(out[k]):
            assert_sum(found.cpu(), [(decay, state[k][p]), (1 - decay, rows[k][p])], wide, (k, p))
    expected_gram([[t.cpu() for t in row] for row in out]).check(norms.cpu())


def test_ema_with_scales(gpu_backend):
    rows, scales = gradients(3, SIZES, torch.float32), [0.5, -1.0, 3.0]
    out = [poisoned([t.cuda() for t in row]) for row in rows]
    given = torch.tensor(scales, dtype=torch.float64, device="cuda")
    norms = ops.ema_(out, [[None] * len(SIZES)] * 3, on_gpu(rows), 0.75, given, backend=gpu_backend)
    for k in range(3):
        for p, found in enumerate(out[k]):
            assert_sum(found.cpu(), [(0.25 * scales[k], rows[k][p])], torch.float32, (k, p))
    expected_gram([[t.cpu() for t in row] for row in out]).check(norms.cpu())


@pytest.mark.parametrize("tasks", [1, 3, 9])
@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_accumulate_squares(gpu_backend, dtype, tasks):
    wide = ops.accumulator_dtype(dtype)
    rows = gradients(tasks, SIZES, dtype, missing=some_missing)
    state = gradients(tasks, SIZES, wide, seed=1, missing=lambda k, p: k == p)
    state = [[None if t is None else t.square() for t in row] for row in state]
    out = [poisoned([t.cuda() for t in row]) for row in gradients(tasks, SIZES, wide)]
    excess = ops.accumulate_squares_(out, on_gpu(state), on_gpu(rows), 1e-7, backend=gpu_backend)
    assert_squares([[t.cpu() for t in row] for row in out], excess.cpu(), state, rows, 1e-7)


@pytest.mark.parametrize("status", [0, int(Status.ZERO_GRADIENT), int(Status.NON_FINITE | Status.ZERO_GRADIENT)])
def test_rollback(gpu_backend, status):
    out, kept = (on_gpu(gradients(1, SIZES, torch.float32, seed=seed))[0] for seed in (0, 1))
    kept[4] = None
    failed = bool(status & Status.NON_FINITE)
    want = [(torch.zeros_like(o) if k is None else k) if failed else o.clone() for o, k in zip(out, kept, strict=True)]
    ops.rollback_(out, kept, torch.tensor(status, dtype=torch.int32, device="cuda"), backend=gpu_backend)
    assert all(torch.equal(o, w) for o, w in zip(out, want, strict=True))


@pytest.mark.parametrize("tasks", [1, 2, 8, 33, 64])
@pytest.mark.parametrize("family", [*WELL_POSED, "zero row", "all zero"])
@pytest.mark.parametrize("method", ops.SOLVERS)
def test_solve(gpu_backend, method, family, tasks):
    rows = jacobian(family, tasks)
    gram, losses = gramian(rows), torch.linspace(0.1, 3, tasks, dtype=torch.float64)
    states = [ops.SOLVERS[method].new_state(tasks, torch.device(d)) for d in ("cuda", "cpu")]
    own = per_task_of(ops.SOLVERS[method], tasks)
    on_gpu = None if own is None else own.cuda()
    found, status = ops.solve(method, gram.cuda(), losses.cuda(), on_gpu, state=states[0], backend=gpu_backend)
    want, want_status = ops.solve(method, gram, losses, own, state=states[1], backend="reference")
    assert found.is_cuda
    assert status.is_cuda
    assert int(status) == int(want_status)
    scale = float((want.abs() * rows.norm(dim=1)).sum())
    assert float((rows.T @ (found.cpu() - want)).norm()) <= 10 * SOLVER * scale
    if states[0] is not None:
        torch.testing.assert_close(states[0].cpu(), states[1], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("method", ops.SOLVERS)
def test_a_non_finite_gramian(gpu_backend, method):
    gram = torch.eye(3, dtype=torch.float64, device="cuda")
    gram[1, 1] = torch.nan
    state = ops.SOLVERS[method].new_state(3, gram.device)
    before = None if state is None else state.clone()
    own = per_task_of(ops.SOLVERS[method], 3)
    on_gpu = None if own is None else own.cuda()
    weights, status = ops.solve(method, gram, torch.ones(3, device="cuda"), on_gpu, state=state, backend=gpu_backend)
    assert bool(weights.isnan().all())
    assert int(status) == Status.NON_FINITE
    assert before is None or torch.equal(state, before)


@pytest.mark.skipif(_native.module is None, reason="compares with the compiled CPU solvers")
@pytest.mark.parametrize("dtype", ops.DTYPES)
@pytest.mark.parametrize("rule", ops.RULES)
def test_loss_scales(gpu_backend, rule, dtype):
    losses, per_task = torch.linspace(0.1, 2, 64).to(dtype), per_task_of(ops.RULES[rule], 64)
    on_gpu = None if per_task is None else per_task.cuda()
    for values in (losses, -losses, losses * torch.nan):
        found, status = ops.loss_scales(rule, values.cuda(), on_gpu, backend=gpu_backend)
        want, want_status = ops.loss_scales(rule, values, per_task, backend="cpu")
        torch.testing.assert_close(found.cpu(), want, equal_nan=True)
        assert int(status) == int(want_status)


def test_the_same_bits_every_time(gpu_backend):
    rows = on_gpu(gradients(9, SIZES, torch.float32))
    first = ops.gram(rows, backend=gpu_backend)
    for _ in range(5):
        assert torch.equal(ops.gram(rows, backend=gpu_backend), first)
    with torch.cuda.stream(torch.cuda.Stream()):
        again = ops.gram(rows, backend=gpu_backend)
    torch.cuda.synchronize()
    assert torch.equal(again, first)


# ---- Sizes that only a GPU's memory holds ------------------------------------------------------------------------


@pytest.fixture
def _much_memory():
    """20 GB of the GPU's memory, given back afterwards."""
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GB of free GPU memory")
    yield
    torch.cuda.empty_cache()


@pytest.mark.usefixtures("_much_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hundred_million_elements(gpu_backend, dtype):
    sizes = (60_000_000, 40_000_003)
    rows = [[torch.randn(size, device="cuda").to(dtype) for size in sizes] for _ in range(3)]
    exact = torch.zeros(3, 3, dtype=torch.float64, device="cuda")
    for p in range(2):
        for parts in zip(*(row[p].split(1 << 20) for row in rows), strict=True):
            block = torch.stack([part.double() for part in parts])
            exact += block @ block.T
    gram, scale = ops.gram(rows, backend=gpu_backend), exact.diagonal().sqrt()
    assert_no_worse(gram, exact, exact, scale[:, None] * scale, 4 * TOLERANCES[dtype].inner)
    weights, out = torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64, device="cuda"), poisoned(rows[0])
    ops.combine_(out, rows, weights, backend=gpu_backend)
    for p in range(2):
        want = sum(float(w) * row[p].float() for w, row in zip(weights, rows, strict=True))
        assert float((out[p].float() - want).abs().max()) <= 2**-7 * 10


@pytest.mark.usefixtures("_much_memory")
def test_more_elements_than_32_bits_count(gpu_backend):
    part = torch.randn(1_048_577, device="cuda").to(torch.bfloat16)
    rows = [[part.repeat(2049)]]
    assert rows[0][0].numel() > 2**31
    exact = 2049 * part.double().square().sum()
    torch.testing.assert_close(ops.sq_norms(rows, backend=gpu_backend), exact.reshape(1), rtol=1e-6, atol=0)
    out = poisoned(rows[0])
    ops.combine_(out, rows, torch.tensor([-2.0], device="cuda"), backend=gpu_backend)
    assert torch.equal(out[0].view(2049, -1)[2048], -2 * part)
    assert not bool(out[0].isnan().any())
