"""Whole balanced steps on the GPU against the float64 reference on the same model."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from balancer.models import TASKS
from balancer.oracle import CASES, STORES

import igb_kernels as igb
from igb_kernels import ops, store
from igb_kernels.backends import cuda
from igb_kernels.status import UsableSteps

from .models import ON_THE_HOST, DeviceNet, assert_close, balancer_of, grads_of, make_net

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 2e-2}
STEPS = 4


def take(balancer: igb.Balancer, net: DeviceNet, seed: int, spoil: bool = False) -> igb.balancer.BalanceResult:
    net.zero_grad()
    losses = net.losses(seed)
    return balancer.backward([losses[0] * torch.nan, *losses[1:]] if spoil else losses)


def compare(name: str, kind: str, dtype: torch.dtype, backend: str, convention: str = "scaled", **kwargs) -> None:
    """Steps of two balancers on one model, without an optimizer in between; step 2 is not finite."""
    net = make_net(kind, dtype, **kwargs)
    found, want = (balancer_of(CASES[name], net, b, convention) for b in (backend, "reference"))
    for seed in range(STEPS):
        ours = take(found, net, seed, spoil=seed == 2)
        grads = grads_of(net.shared), grads_of(net.own)
        theirs = take(want, net, seed, spoil=seed == 2)
        assert_close(grads[0], grads_of(net.shared), TOLERANCE[dtype])
        assert_close(grads[1], grads_of(net.own), TOLERANCE[dtype])
        assert int(ours.status) == int(theirs.status)
        assert all(t.is_cuda for t in (ours.losses, ours.scales, ours.weights, ours.status))
        assert ours.measured is None or ours.measured.is_cuda


@pytest.mark.parametrize("convention", ["scaled", "weighted"])
@pytest.mark.parametrize("name", CASES)
def test_every_method(gpu_backend, rows_at_once, name, convention):
    compare(name, "mlp", torch.float32, gpu_backend, convention)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["conv", "embedding"])
@pytest.mark.parametrize("name", STORES)
def test_models_and_dtypes(gpu_backend, name, kind, dtype):
    compare(name, kind, dtype, gpu_backend)


@pytest.mark.parametrize("name", ["nash_mtl", "imtl_g", "db_mtl", "emtl"])
def test_sixty_four_tasks(gpu_backend, name):
    shared = [torch.nn.Parameter(torch.randn(200, 3, device="cuda")), torch.nn.Parameter(torch.randn(7, device="cuda"))]
    inputs = torch.randn(64, 607, device="cuda") * torch.logspace(-1, 1, 64, device="cuda")[:, None]
    grads = []
    for backend in (gpu_backend, "reference"):
        balancer = igb.Balancer(name, shared=shared, backend=backend)
        for p in shared:
            p.grad = None
        for _ in range(2):
            flat = torch.cat([p.flatten() for p in shared])
            balancer.backward([(x @ flat - 1).square() for x in inputs])
        grads.append(grads_of(shared))
    assert_close(*grads, tolerance=1e-3)


def test_mixed_precision(gpu_backend):
    net = make_net("conv")
    grads = []
    for name in (gpu_backend, "reference"):
        balancer = igb.Balancer("igb_v1+db_mtl", shared=net.shared, backend=name)
        for seed in range(3):
            net.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                losses = net.losses(seed)
            balancer.backward(losses)
        grads.append(grads_of(net.shared))
    assert_close(*grads, tolerance=1e-4)


# ---- Streams and devices -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["db_mtl", "imtl_g"])
def test_another_stream(gpu_backend, name):
    net, twin = make_net(), make_net()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    balancer, other = (balancer_of(CASES[name], n, gpu_backend) for n in (net, twin))
    for seed in range(3):
        with torch.cuda.stream(side):
            take(balancer, net, seed)
        take(other, twin, seed)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(grads_of(net.shared), grads_of(twin.shared))


def wide_net() -> DeviceNet:
    """Large enough that a bucket's work takes longer than the next layer's pass."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(a, b) for a, b in ((6, 1500), (1500, 1500), (1500, 1500), (1500, 5))]
    return DeviceNet("mlp", encoder=torch.nn.Sequential(*layers)).to("cuda")


@pytest.mark.parametrize("buckets_of", [1, 10 << 20])
@pytest.mark.parametrize("own_stream", [False, True])
@pytest.mark.parametrize("name", [*STORES, "db_mtl sigma"])
def test_hooks_give_the_bits_of_passes(gpu_backend, monkeypatch, name, own_stream, buckets_of):
    """The side stream reads what is there, and nothing is given out again before it has."""
    monkeypatch.setitem(store.BUCKET_BYTES, "cuda", buckets_of)
    found = []
    for capture in ("passes", "hooks"):
        net = wide_net()
        balancer = balancer_of(CASES[name], net, gpu_backend, capture=capture)
        stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for seed in range(8):
                take(balancer, net, seed, spoil=seed == 5)
                with torch.no_grad():
                    for p in net.parameters():
                        p -= 1e-3 * p.grad.nan_to_num(0).clamp(-1, 1)
                found.append([capture, grads_of(net.shared), *(p.detach().clone() for p in net.parameters())])
        torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    for ours, theirs in zip(found[8:], found[:8], strict=True):
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(ours[1:], theirs[1:], strict=True))


def test_buckets_are_worked_on_beside_the_pass(cuda_backend):
    """Kernels of the balancer overlap with those of the backward pass, on another stream."""
    net = wide_net()
    balancer = igb.Balancer("db_mtl", shared=net.shared, backend=cuda_backend, capture="hooks")
    for seed in range(3):
        take(balancer, net, seed)
    assert len(store.buckets_of(net.shared)) == 1
    assert balancer._passes.capture._side is None
    small = {**store.BUCKET_BYTES, "cuda": 1 << 20}
    store_bytes, store.BUCKET_BYTES = store.BUCKET_BYTES, small
    try:
        with torch.profiler.profile() as profiler:
            for seed in range(3):
                take(balancer, net, seed)
            torch.cuda.synchronize()
    finally:
        store.BUCKET_BYTES = store_bytes
    kernels = [e for e in profiler.events() if e.device_type is torch.autograd.DeviceType.CUDA]
    streams = {e.device_resource_id for e in kernels if "update_partial" in e.name}
    assert len(streams) == 2, "watched passes average on the step's stream, others on the side stream"


@pytest.mark.parametrize("name", ["db_mtl", "imtl_g"])
def test_two_balancers_on_two_streams(gpu_backend, name):
    nets = [make_net(tasks=tasks) for tasks in (2, 3)]
    streams = [torch.cuda.Stream() for _ in nets]
    balancers = [balancer_of(CASES[name], net, gpu_backend) for net in nets]
    torch.cuda.synchronize()
    for seed in range(6):
        for net, stream, balancer in zip(nets, streams, balancers, strict=True):
            with torch.cuda.stream(stream):
                take(balancer, net, seed)
    torch.cuda.synchronize()
    for net, tasks in zip(nets, (2, 3), strict=True):
        twin = make_net(tasks=tasks)
        balancer = balancer_of(CASES[name], twin, gpu_backend)
        for seed in range(6):
            take(balancer, twin, seed)
        assert torch.equal(grads_of(net.shared), grads_of(twin.shared))


@pytest.mark.parametrize("name", ["db_mtl", "nash_mtl every 3"])
def test_another_device_than_the_current_one(gpu_backend, name):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    compare(name, "mlp", torch.float32, gpu_backend, device="cuda:1")


@pytest.mark.parametrize("name", [name for name in CASES if name != "imtl_l"])
def test_a_state_from_the_cpu(gpu_backend, name):
    on_cpu, net = make_net(device="cpu"), make_net()
    source, target = balancer_of(CASES[name], on_cpu, "reference"), balancer_of(CASES[name], net, gpu_backend)
    for seed in range(2):
        take(source, on_cpu, seed)
    state = copy.deepcopy(source.state_dict())
    target.load_state_dict(state)
    for seed in range(2, 5):
        take(source, on_cpu, seed)
        take(target, net, seed)
        assert_close(grads_of(net.shared).cpu(), grads_of(on_cpu.shared), 1e-3)
    back = balancer_of(CASES[name], on_cpu, "reference")
    back.load_state_dict(target.state_dict())
    take(back, on_cpu, 5)
    take(target, net, 5)
    assert_close(grads_of(net.shared).cpu(), grads_of(on_cpu.shared), 1e-3)


# ---- What the host does ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", ["scaled", "weighted"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_waits_for_nothing(cuda_backend, rows_at_once, name, convention):
    net = make_net()
    balancer = balancer_of(CASES[name], net, cuda_backend, convention)
    for seed in range(3):
        take(balancer, net, seed)
    net.zero_grad()
    for seed in (3, 4):  # the second adds to the gradients of the first
        losses = net.losses(seed)
        torch.cuda.set_sync_debug_mode("error")
        try:
            balancer.backward(losses)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_usable_steps_wait_for_the_last_step_alone():
    steps = UsableSteps()
    for status in (0, 1, 0):
        steps.add(torch.tensor(status, dtype=torch.int32, device="cuda"))
    forward = torch.cuda.Event()
    torch.cuda._sleep(2_000_000_000)  # the forward pass of the next step: about a second
    forward.record()
    assert steps.count == 2
    assert not forward.query(), "the count waited for what was put on the GPU after the step"


@pytest.mark.parametrize("name", ["imtl_g", "db_mtl"])
def test_steady_steps_put_no_table_on_the_device(cuda_backend, monkeypatch, name):
    net = make_net()
    balancer = balancer_of(CASES[name], net, cuda_backend)
    uploads = 0
    made = cuda._DeviceTable.__init__

    def counted(self, *arguments) -> None:
        nonlocal uploads
        uploads += 1
        made(self, *arguments)

    monkeypatch.setattr(cuda._DeviceTable, "__init__", counted)
    for seed in range(12):
        uploads = 0
        take(balancer, net, seed)
    assert uploads == 0


# ---- CUDA graphs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capture", ["passes", "hooks"])
@pytest.mark.parametrize("convention", ["scaled", "weighted"])
@pytest.mark.parametrize("name", [name for name in CASES if name not in (*ON_THE_HOST, "igb_v1", "igb_v1+db_mtl")])
def test_a_captured_step(cuda_backend, rows_at_once, monkeypatch, name, convention, capture):
    """Forward pass, backward passes and balancing in one graph; replays, a non-finite one and steps outside of it
    follow each other as steps do."""
    if capture == "hooks":
        monkeypatch.setitem(store.BUCKET_BYTES, "cuda", 100)
    net, twin = make_net(), make_net()
    balancer, other = (balancer_of(CASES[name], n, cuda_backend, convention, capture) for n in (net, twin))
    x, y = net.batch(0)

    def step(balancer_: igb.Balancer, net_: DeviceNet) -> igb.balancer.BalanceResult:
        net_.zero_grad()
        for p in balancer_.parameters():
            p.grad = None
        return balancer_.backward(net_.losses_of(x, y))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(balancer, net)
    torch.cuda.current_stream().wait_stream(side)
    for _ in range(3):
        step(other, twin)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step(balancer, net)
    captured = [p.grad for p in net.parameters()]

    for seed, replayed in ((1, True), (2, True), (-1, True), (3, True), (4, False), (5, True), (-1, False), (6, True)):
        for static, fresh in zip((x, y), net.batch(abs(seed)), strict=True):
            static.copy_(fresh)
        if seed < 0:
            y.fill_(torch.nan)
        if replayed:
            graph.replay()
            ours = result
        else:
            ours = step(balancer, net)
        for p, grad in zip(net.parameters(), captured, strict=True):
            p.grad = grad if replayed else p.grad
        theirs = step(other, twin)
        assert_close(grads_of(net.shared), grads_of(twin.shared), 1e-5)
        assert_close(grads_of(net.own), grads_of(twin.own), 1e-5)
        assert int(ours.status) == int(theirs.status)


def test_a_captured_operation(cuda_backend):
    rows = [[torch.randn(5000, device="cuda") for _ in range(3)] for _ in range(4)]
    out = [torch.empty_like(t) for t in rows[0]]

    def balance() -> torch.Tensor:
        gram = ops.gram(rows, backend=cuda_backend)
        weights, _ = ops.solve("imtl_g", gram, backend=cuda_backend)
        ops.combine_(out, rows, weights, backend=cuda_backend)
        return gram

    balance()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gram = balance()
    for row in rows:
        for t in row:
            t.normal_()
    graph.replay()
    replayed, found = [t.clone() for t in out], gram.clone()
    assert torch.equal(balance(), found)
    assert all(torch.equal(a, b) for a, b in zip(out, replayed, strict=True))
    for _ in range(2 * cuda.KEPT_TABLES):  # whatever tables come and go
        ops.gram([[torch.randn(10, device="cuda")]], backend=cuda_backend)
        graph.replay()
    assert torch.equal(gram, found)


def test_importing_leaves_the_gpu_alone():
    script = "import igb_kernels, torch; assert not torch.cuda.is_initialized()"
    subprocess.run([sys.executable, "-c", script], check=True)


# ---- Errors ------------------------------------------------------------------------------------------------------


def test_cpu_tensors(gpu_backend):
    with pytest.raises(ValueError, match=f"backend='{gpu_backend}' needs tensors on a GPU .*, found them on cpu"):
        ops.gram(torch.ones(2, 3), backend=gpu_backend)
    with pytest.raises(ValueError, match="found them on cpu"):
        igb.Balancer("imtl_g", shared=make_net(device="cpu").shared, backend=gpu_backend)


def test_losses_on_another_device_than_the_shared_parameters():
    net = make_net()
    losses = [loss.cpu() for loss in net.losses()]
    with pytest.raises(ValueError, match="losses must be on cuda:0 like the shared parameters, found cpu"):
        igb.Balancer("imtl_g", shared=net.shared).backward(losses)


def test_task_parameters_on_another_device_than_the_shared_ones():
    net, other = make_net(), make_net(device="cpu")
    with pytest.raises(ValueError, match="task_parameters must be on cuda:0 like shared, found them on cpu"):
        igb.Balancer("imtl_g", shared=net.shared, heads="weighted", task_parameters=other.own)


def test_a_solver_state_on_another_device(gpu_backend):
    gram = torch.eye(TASKS, dtype=torch.float64, device="cuda")
    with pytest.raises(ValueError, match="state must be on cuda:0 like gram, found it on cpu"):
        ops.solve("nash_mtl", gram, state=torch.ones(TASKS, dtype=torch.float64), backend=gpu_backend)


def test_what_cannot_be_captured(cuda_backend):
    net = make_net()
    first = igb.Balancer("imtl_g", shared=net.shared)
    counting = igb.Balancer(igb.NashMTL(update_every=2), shared=net.shared)
    take(counting, net, 0)
    x, y = net.batch(0)
    for balancer, reason in ((first, "first step"), (counting, "on the host")):
        with pytest.raises(RuntimeError, match=reason), torch.cuda.graph(torch.cuda.CUDAGraph()):
            balancer.backward(net.losses_of(x, y))
