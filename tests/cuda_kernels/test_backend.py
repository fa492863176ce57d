"""backends/cuda.py on CPU tensors, over the emulated kernels: all operations and methods against the reference."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from balancer.models import TASKS, grads_of, make_net, same
from balancer.oracle import CASES
from balancer.test_step import play
from oracle import assert_one_sign
from samplers import LAYOUTS, gradients, per_task_of

import igb_kernels as igb
from igb_kernels import Status, _native, balancer, ops, passes, store
from igb_kernels.backends import cuda, resolve

pytestmark = pytest.mark.skipif(_native.module is None, reason=str(_native.reason))

SHAPES = [(3, 5, 4, 7), (17,), (), (70, 33), (0, 4), (5000,)]
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6}
ROUNDED = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


class Recorder:
    """A native module that notes which tables it was asked to put on the device."""

    def __init__(self, native) -> None:
        self._native = native
        self.uploads = 0

    def __getattr__(self, name):
        return getattr(self._native, name)

    def Table(self, *arguments):
        self.uploads += 1
        return self._native.Table(*arguments)


@pytest.fixture(autouse=True)
def native(emulated, monkeypatch):
    """The emulated kernels in the place of the compiled ones; "cuda" means them for CPU tensors, too."""
    recorder = Recorder(emulated)

    def emulating(name, device_type):
        return cuda if name == "cuda" else resolve(name, device_type)

    monkeypatch.setattr(cuda, "native", recorder)
    monkeypatch.setattr(cuda, "_kept", {})
    for module in (balancer, passes, ops):
        monkeypatch.setattr(module, "resolve", emulating)
    return recorder


def flat(row):
    return torch.cat([t.double().flatten() for t in row])


def some_missing(k, p):
    return (k + 2 * p) % 5 == 1


@pytest.mark.parametrize("tasks", [1, 3, 9, 64])
@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_gram_and_norms(dtype, tasks):
    rows = gradients(tasks, SHAPES, dtype, missing=some_missing)
    want = ops.gram(rows, backend="reference")
    scale = want.diagonal().sqrt()
    found = ops.gram(rows, backend="cuda")
    assert bool(((found - want).abs() <= TOLERANCE[dtype] * scale[:, None] * scale).all())
    torch.testing.assert_close(ops.sq_norms(rows, backend="cuda"), want.diagonal(), rtol=TOLERANCE[dtype], atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    rows = gradients(3, SHAPES, torch.float32, layout=layout)
    torch.testing.assert_close(
        ops.gram(rows, backend="cuda"), ops.gram(rows, backend="reference"), rtol=1e-6, atol=1e-6
    )
    found, want = ([torch.ones_like(t) for t in rows[0]] for _ in range(2))
    for out, backend in ((found, "cuda"), (want, "reference")):
        ops.combine_(out, rows, torch.tensor([0.3, -2.0, 1.0]), accumulate=True, backend=backend)
    torch.testing.assert_close(flat(found), flat(want), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tasks", [1, 5])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_combine(dtype, accumulate, tasks):
    rows = gradients(tasks, SHAPES, dtype, missing=some_missing)
    weights = torch.tensor([0.5, -1.0, 0.0, 2.0, 3e-3][:tasks])
    found, want = (gradients(1, SHAPES, dtype, seed=1)[0] for _ in range(2))
    for out, backend in ((found, "cuda"), (want, "reference")):
        ops.combine_(out, rows, weights, accumulate=accumulate, backend=backend)
    torch.testing.assert_close(flat(found), flat(want), rtol=2 * ROUNDED[dtype], atol=20 * ROUNDED[dtype])


@pytest.mark.parametrize("decay", [0.0, 0.9, torch.tensor([0.9], dtype=torch.float64)])
@pytest.mark.parametrize("scales", [None, torch.tensor([-1.0, 0.5, 2.0])])
@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_ema(dtype, scales, decay):
    wide = ops.accumulator_dtype(dtype)
    rows = gradients(3, SHAPES, dtype, missing=some_missing)
    state = gradients(3, SHAPES, wide, seed=1, missing=lambda k, p: k == p)
    found, want = (gradients(3, SHAPES, wide, seed=2) for _ in range(2))
    norms = [ops.ema_(o, state, rows, decay, scales, backend=b) for o, b in ((found, "cuda"), (want, "reference"))]
    torch.testing.assert_close(norms[0], norms[1], rtol=TOLERANCE[dtype], atol=0)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(flat(a), flat(b), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("layout", ["contiguous", "mixed"])
@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_accumulate_squares(dtype, layout):
    wide = ops.accumulator_dtype(dtype)
    rows = gradients(3, SHAPES, dtype, missing=some_missing, layout=layout)
    state = [[t.abs() for t in row] for row in gradients(3, SHAPES, wide, seed=1)]
    found, want = (gradients(3, SHAPES, wide, seed=2) for _ in range(2))
    excess = [
        ops.accumulate_squares_(out, state, rows, 1e-3, backend=b) for out, b in ((found, "cuda"), (want, "reference"))
    ]
    torch.testing.assert_close(excess[0], excess[1], rtol=TOLERANCE[dtype], atol=0)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(flat(a), flat(b), rtol=TOLERANCE[dtype], atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "offset", "transposed", "mixed", "gaps"])
@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_sign_drop(dtype, layout):
    rows = gradients(5, SHAPES, dtype, missing=some_missing, layout=layout)
    counter, leak = torch.tensor([11.0, 2.0], dtype=torch.float64), torch.tensor([0.0, 1.0, 0.5, 0.0, 0.25])
    for leaks in (None, leak):
        out = [t.fill_(torch.nan) for t in gradients(1, SHAPES, dtype, layout=layout)[0]]
        norm = ops.sign_drop_(out, rows, counter, leaks, backend="cuda")
        assert_one_sign(out, rows, counter, leaks, [dtype] * len(SHAPES))
        torch.testing.assert_close(norm, flat(out).square().sum().reshape(1), rtol=TOLERANCE[dtype], atol=0)


def test_ema_into_other_layouts():
    grads = gradients(2, SHAPES, torch.float32, layout="transposed")
    out, want = (gradients(2, SHAPES, torch.float32, seed=1, layout=layout) for layout in ("gaps", "mixed"))
    norms = [ops.ema_(o, o, grads, 0.5, backend=b) for o, b in ((out, "cuda"), (want, "reference"))]
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-6, atol=0)
    for a, b in zip(out, want, strict=True):
        torch.testing.assert_close(flat(a), flat(b), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("status", [Status(0), Status.ZERO_GRADIENT, Status.NON_FINITE, Status.NON_FINITE | 2])
def test_rollback(status):
    out, kept = (gradients(1, SHAPES, torch.float32, seed=seed)[0] for seed in (0, 1))
    kept[1] = None
    want = [t.clone() for t in out]
    for row, backend in ((out, "cuda"), (want, "reference")):
        ops.rollback_(row, kept, torch.tensor(int(status), dtype=torch.int32), backend=backend)
    assert torch.equal(flat(out), flat(want))


def test_rollback_of_nothing():
    table = cuda.Table([None], 1)
    cuda.rollback_(table, table, torch.tensor(1, dtype=torch.int32))


@pytest.mark.parametrize("tasks", [1, 2, 8, 40])
@pytest.mark.parametrize("method", ops.SOLVERS)
def test_solve_has_the_bits_of_the_cpu(method, tasks):
    rows = torch.randn(tasks, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(tasks))
    gram, losses = rows @ rows.T, torch.linspace(0.1, 2, tasks)
    states = [ops.SOLVERS[method].new_state(tasks, gram.device) for _ in range(2)]
    found, want = (
        ops.solve(method, gram, losses, per_task_of(ops.SOLVERS[method], tasks), state=state, backend=b)
        for state, b in zip(states, ("cuda", "cpu"), strict=True)
    )
    assert torch.equal(found[0], want[0])
    assert int(found[1]) == int(want[1])
    assert found[1].dtype is torch.int32
    assert states[0] is None or torch.equal(*states)


@pytest.mark.parametrize("dtype", ops.DTYPES)
@pytest.mark.parametrize("rule", ops.RULES)
def test_loss_scales_have_the_bits_of_the_cpu(rule, dtype):
    losses, per_task = torch.linspace(0.1, 2, 7).to(dtype), per_task_of(ops.RULES[rule], 7)
    for values in (losses, -losses, losses * torch.nan, torch.stack([losses, losses], 1)[:, 0]):
        found, want = (ops.loss_scales(rule, values, per_task, backend=b) for b in ("cuda", "cpu"))
        assert torch.equal(found[0].nan_to_num(7.0), want[0].nan_to_num(7.0))
        assert found[0].dtype is dtype
        assert int(found[1]) == int(want[1])


# ---- Whole steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", ["scaled", "weighted"])
@pytest.mark.parametrize("name", CASES)
def test_every_method(name, convention):
    play(CASES[name], make_net(), torch.float32, convention, "cuda")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["db_mtl", "db_mtl beta 0", "emtl", "imtl_g"])
def test_dtypes_and_layouts(name, dtype):
    play(CASES[name], make_net("conv", dtype), dtype, "scaled", "cuda")


@pytest.mark.parametrize("name", ["db_mtl", "nash_mtl", "igb_v1"])
def test_a_non_finite_step_leaves_the_state(name):
    net = make_net()
    grads = {}
    for backend in ("cuda", "reference"):
        balanced = igb.Balancer(name, shared=net.shared, backend=backend)
        for step in range(3):
            losses = net.losses(step)
            net.zero_grad()
            balanced.backward([losses[0] * torch.nan, *losses[1:]] if step == 1 else losses)
        grads[backend] = grads_of(net.shared)
    torch.testing.assert_close(grads["cuda"], grads["reference"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["db_mtl", "db_mtl beta 0", "emtl", "imtl_g", "nash_mtl every 3"])
def test_hooks_give_the_bits_of_passes(name, monkeypatch):
    monkeypatch.setitem(store.BUCKET_BYTES, "cpu", 100)
    monkeypatch.setattr(passes, "rows_in_cache", lambda params: 1)
    found = []
    for capture in ("passes", "hooks"):
        net = make_net("conv")
        balanced = igb.Balancer(**CASES[name].make(), shared=net.shared, backend="cuda", capture=capture)
        for step in range(3):
            net.zero_grad()
            balanced.backward(net.losses(step))
        found.append([[p.grad for p in net.parameters()], balanced.state_dict()])
    assert same(*found)


# ---- Tables ------------------------------------------------------------------------------------------------------


def test_a_table_is_put_on_the_device_once(native):
    rows = gradients(3, SHAPES, torch.float32)
    first = ops.gram(rows, backend="cuda")
    assert native.uploads == 1
    rows[0][0].mul_(2)  # other values, the same table
    assert not torch.equal(ops.gram(rows, backend="cuda"), first)
    ops.sq_norms(rows, backend="cuda")
    assert native.uploads == 1
    ops.gram(rows[:2], backend="cuda")
    assert native.uploads == 2
    flat_rows = [t for row in rows for t in row]
    ops.registered.gram([*flat_rows[1:], flat_rows[0]], 1, "cuda")
    assert native.uploads == 3, "other columns at some of the same addresses"


def test_another_dtype_or_shape_at_an_address_is_another_table():
    memory = torch.ones(1000, dtype=torch.float64)
    for view in (memory, memory[:500], memory.view(torch.float32), memory.view(torch.bfloat16)):
        found, want = (ops.sq_norms([[view]], backend=b) for b in ("cuda", "reference"))
        torch.testing.assert_close(found, want, rtol=1e-6, atol=0)


def test_a_step_at_the_addresses_of_the_last_one_puts_nothing_on_the_device(native):
    """Gradients that stay where they are, as with a caching allocator."""
    net = make_net()
    rows = [[torch.randn_like(p) for p in net.shared] for _ in range(TASKS)]
    out = [torch.empty_like(p) for p in net.shared]
    for step in range(3):
        weights, _ = ops.solve("imtl_g", ops.gram(rows, backend="cuda"), backend="cuda")
        ops.combine_(out, rows, weights, backend="cuda")
        assert native.uploads == 2, step


def test_few_tables_are_kept(monkeypatch, native):
    monkeypatch.setattr(cuda, "KEPT_TABLES", 2)
    a, b, c = (gradients(2, [10], torch.float32, seed=seed) for seed in range(3))
    for rows in (a, b, a, c, a):
        ops.gram(rows, backend="cuda")
    assert native.uploads == 3, "the one used last stays"
    ops.gram(b, backend="cuda")
    assert native.uploads == 4
    assert len(cuda._kept) == 2


def test_a_graph_has_tables_of_its_own(monkeypatch, native):
    rows = gradients(2, [10], torch.float32)
    ops.gram(rows, backend="cuda")
    kept = list(cuda._kept.values())
    monkeypatch.setattr(cuda, "captures_graph", lambda device: True)
    for uploads in (2, 3):
        ops.gram(rows, backend="cuda")
        assert native.uploads == uploads
    assert list(cuda._kept.values()) == kept


def test_kept_tables_hold_no_tensors():
    rows = gradients(2, [10], torch.float32)
    alive = weakref.ref(rows[0][0])
    ops.gram(rows, backend="cuda")
    del rows
    gc.collect()
    assert alive() is None


def test_more_tasks_than_the_kernels_take():
    tasks = cuda.native.max_tasks + 1
    message = f"backend='cuda' takes at most {tasks - 1} tasks, found {tasks}"
    with pytest.raises(ValueError, match=message):
        ops.gram(torch.ones(tasks, 2), backend="cuda")
    with pytest.raises(ValueError, match=message):
        ops.solve("imtl_g", torch.eye(tasks), backend="cuda")
    with pytest.raises(ValueError, match=message):
        ops.loss_scales("log", torch.ones(tasks), backend="cuda")
