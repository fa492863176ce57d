"""Models spread over devices: GPU and CPU, and two GPUs where there are, against the same model on the CPU."""

from __future__ import annotations

import io
from contextlib import ExitStack

import pytest
import torch
from balancer.models import TASK_SCALES, TASKS, Net, flat
from balancer.models import make_net as net_of_the_host
from balancer.oracle import CASES, STORES, Case
from torch import Tensor, nn

import igb_kernels as igb

TOLERANCE = 1e-8
STEPS = 4

LAYOUTS = {
    "cpu, gpu": ("cpu", "cuda:0", "cuda:0", "cuda:0"),
    "gpu, cpu": ("cuda:0", "cpu", "cpu", "cpu"),
    "gpu, heads and losses on the cpu": ("cuda:0", "cuda:0", "cpu", "cpu"),
    "gpu, heads on the cpu": ("cuda:0", "cuda:0", "cpu", "cuda:0"),
    "two gpus": ("cuda:0", "cuda:1", "cuda:1", "cuda:1"),
    "two gpus, losses on the first": ("cuda:0", "cuda:1", "cuda:1", "cuda:0"),
    "two gpus, heads on the second": ("cuda:0", "cuda:0", "cuda:1", "cuda:1"),
    "the second gpu, while the first is current": ("cuda:1", "cuda:1", "cuda:1", "cuda:1"),
}
"""Devices of the encoder's first layer, its second, the heads, and the losses."""


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> str:
    return there(request.param)


def there(layout: str) -> str:
    """The layout, or a skip where it needs more GPUs."""
    if "cuda:1" in LAYOUTS[layout] and torch.cuda.device_count() < 2:
        pytest.skip("PyTorch finds one GPU")
    return layout


class SpreadNet(nn.Module):
    """The small model of the whole-step tests, in float64."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.net: Net = net_of_the_host(dtype=torch.float64)
        first, second, self.of_heads, self.home = LAYOUTS[layout]
        self.layers = nn.ModuleList([self.net.encoder[0].to(first), self.net.encoder[2].to(second)])
        self.net.heads.to(self.of_heads)
        self.shared, self.own = self.net.shared, self.net.own

    def losses(self, seed: int) -> list[Tensor]:
        z, targets = self.net.batch(seed)
        for layer in self.layers:
            z = torch.tanh(layer(z.to(layer.weight.device)))
        z, targets = z.to(self.of_heads), targets.to(self.of_heads)
        pairs = zip(self.net.heads, targets, TASK_SCALES, strict=False)
        return [(scale * (head(z) - y).square().mean()).to(self.home) for head, y, scale in pairs]


class OnTheHost(SpreadNet):
    """The same on the CPU."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.net = net_of_the_host(dtype=torch.float64)
        self.shared, self.own, self.home = self.net.shared, self.net.own, "cpu"

    def losses(self, seed: int) -> list[Tensor]:
        return self.net.losses(seed)


def balancer_of(case: Case, net: SpreadNet, convention: str = "scaled") -> igb.Balancer:
    own = {"heads": "weighted", "task_parameters": net.own} if convention == "weighted" else {}
    arguments = case.make()
    if isinstance(rule := arguments.get("losses"), igb.IMTLL):
        arguments["losses"] = igb.IMTLL(len(rule.log_scales), device=net.home)
    return igb.Balancer(**arguments, shared=net.shared, **own)


def step(
    net: SpreadNet, balancer: igb.Balancer, seed: int, scaler: torch.amp.GradScaler | None = None
) -> list[Tensor | None]:
    """What is seen of it, on the host; of the last but one batch, a loss is not finite."""
    net.zero_grad()
    losses = net.losses(seed)
    if seed == STEPS - 2:
        losses[1] = losses[1] * torch.nan
    if seed == 1:
        balancer.accumulate(net.losses(50), scaler=scaler)
    result = balancer.backward(losses, scaler=scaler)
    params = list(net.parameters())
    assert all(p.grad is None or p.grad.device == p.device for p in params)
    numbers = (result.scales, result.weights, result.measured, result.status)
    assert all(t is None or t.device == torch.device(net.home) for t in numbers)
    grads = flat([None if p.grad is None else p.grad.cpu() for p in params], [p.cpu() for p in params])
    return [None if t is None else t.cpu().double() for t in numbers] + [grads]


def assert_close(found: list[Tensor | None], want: list[Tensor | None]) -> None:
    for a, b in zip(found, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            size = float(b.nan_to_num(0, 0, 0).abs().max())
            torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE * size + 1e-30, equal_nan=True)


@pytest.mark.parametrize("convention", ["scaled", "weighted"])
@pytest.mark.parametrize("name", CASES)
def test_every_method(name, layout, convention):
    net, host = SpreadNet(layout), OnTheHost()
    found, want = (balancer_of(CASES[name], n, convention) for n in (net, host))
    for seed in range(STEPS):
        assert_close(step(net, found, seed), step(host, want, seed))
    for row in found.state_dict()["averages"]:
        assert all(a is None or a.device == p.device for a, p in zip(row, net.shared, strict=True))


OTHERS = {
    "grad_drop": lambda: {"gradients": igb.GradDrop(leak=[0.1, 0.0, 0.3], seed=2)},
    "excess_mtl": lambda: {"gradients": igb.ExcessMTL(0.5)},
    "upgrad": lambda: {"gradients": igb.UPGrad(preference=[1.0, 2.0, 3.0])},
    "emtl": lambda: {"gradients": igb.EMTL(lower=[0.01, 0.5, 0.0])},
}


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaler"])
@pytest.mark.parametrize("name", [*STORES, *OTHERS])
def test_scalers_and_what_is_kept_for_tasks(name, layout, scaled):
    case = Case(name, OTHERS[name]) if name in OTHERS else CASES[name]
    net, host = SpreadNet(layout), OnTheHost()
    found, want = (balancer_of(case, n) for n in (net, host))
    kinds = ("cuda", "cpu") if scaled else (None, None)
    scalers = [None if kind is None else torch.amp.GradScaler(kind, init_scale=64.0) for kind in kinds]
    for seed in range(STEPS):
        assert_close(step(net, found, seed, scalers[0]), step(host, want, seed, scalers[1]))


@pytest.mark.parametrize("name", [*STORES, *OTHERS])
def test_training_goes_on_from_a_state(name, layout):
    """Where the losses are is not known when it is loaded."""
    case = Case(name, OTHERS[name]) if name in OTHERS else CASES[name]
    net = SpreadNet(layout)
    first, second = balancer_of(case, net), balancer_of(case, net)
    for seed in range(2):
        step(net, first, seed)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
    for seed in (5, 6):
        want, got = step(net, first, seed), step(net, second, seed)
        assert all(a is b or torch.equal(a, b) for a, b in zip(got, want, strict=True))
    losses = net.losses(7)
    one, other = (b.backward([losses[0], None, losses[2]], retain_graph=True) for b in (first, second))
    assert torch.equal(one.weights, other.weights)


@pytest.mark.parametrize("name", STORES)
def test_on_a_stream_of_ones_own(name, layout):
    host, net = OnTheHost(), SpreadNet(layout)
    want, found = balancer_of(CASES[name], host), balancer_of(CASES[name], net)
    with ExitStack() as streams:
        for device in reversed(range(torch.cuda.device_count())):  # the first stays current
            torch.cuda.synchronize(device)
            streams.enter_context(torch.cuda.stream(torch.cuda.Stream(device)))
        for seed in range(STEPS):
            assert_close(step(net, found, seed), step(host, want, seed))


@pytest.mark.parametrize("name", ["imtl_g", "db_mtl"])
def test_hooks_fall_back_to_passes(name):
    grads = []
    for capture in ("passes", "hooks"):
        net = SpreadNet("cpu, gpu")
        balancer = igb.Balancer(**CASES[name].make(), shared=net.shared, capture=capture)
        grads.append([step(net, balancer, seed)[-1] for seed in range(STEPS)])
    assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(*grads, strict=True))


def test_a_representation_on_another_device():
    net, host = SpreadNet("gpu, heads and losses on the cpu"), OnTheHost()
    weights = []
    for n in (net, host):
        x, targets = n.net.batch(0)
        z = n.net.encoder(x.to(n.shared[0].device)).to(n.own[0].device)
        losses = [(head(z) - y).square().mean() for head, y in zip(n.net.heads, targets, strict=True)]
        weights.append(igb.Balancer("imtl_g", shared=n.shared).backward(losses, representation=z).weights)
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("name", ["equal", *STORES])
@pytest.mark.parametrize("layout", ["two gpus", "two gpus, losses on the first", "two gpus, heads on the second"])
def test_between_gpus_nothing_is_waited_for(name, layout):
    if not (found := igb.backends()["cuda"]):
        pytest.skip(f"backend 'cuda': {found.detail}")
    if CASES[name].update_every > 1:
        pytest.skip("the host counts steps")
    net = SpreadNet(there(layout))
    balancer = balancer_of(CASES[name], net)
    for seed in range(3):
        balancer.backward(net.losses(seed))
    for seed in (3, 4):
        losses = net.losses(seed)
        torch.cuda.set_sync_debug_mode("error")
        try:
            balancer.backward(losses)
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ---- What cannot be -----------------------------------------------------------------------------------------------


def test_losses_stay_on_their_device():
    net = SpreadNet("gpu, heads on the cpu")
    balancer = igb.Balancer("imtl_g", shared=net.shared)
    balancer.backward(net.losses(0))
    with pytest.raises(ValueError, match="losses must be on cuda:0 as in earlier steps, found cpu"):
        balancer.backward([loss.cpu() for loss in net.losses(1)])
    with pytest.raises(ValueError, match=r"losses\[1\] must be on cuda:0 like the first, found cpu"):
        balancer.backward([loss.cpu() if k else loss for k, loss in enumerate(net.losses(1))])


@pytest.mark.parametrize("name", ["cpu", "cuda", "triton"])
def test_a_backend_that_cannot_serve_all(name):
    if not igb.backends()[name]:
        pytest.skip(f"backend {name!r}: {igb.backends()[name].detail}")
    net = SpreadNet("cpu, gpu")
    with pytest.raises(ValueError, match=f"backend='{name}' needs tensors on .* found them on c"):
        igb.Balancer("imtl_g", shared=net.shared, backend=name)


def test_no_cuda_graph():
    net = SpreadNet("gpu, heads on the cpu")
    balancer = igb.Balancer("imtl_g", shared=net.shared)
    balancer.backward(net.losses(0))
    losses = net.losses(1)
    with (
        pytest.raises(
            RuntimeError, match="a step on several devices cannot be captured in a CUDA graph: it is on cuda"
        ),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        balancer.backward(losses)
    assert len(balancer.backward(losses).weights) == TASKS
