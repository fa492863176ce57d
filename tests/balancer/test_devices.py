"""A model on several devices takes the steps that it takes on one.

There is one device here. So that its parameters count as lying on three others, their tensors' devices are made up from
their shapes; what is sent to one of these is copied, as it is between real ones. `tests/gpu` has the real ones.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import igb_kernels as igb
from igb_kernels.backends import several

from .models import TASKS, Net, Snapshot, flat, make_net, same
from .oracle import CASES
from .test_nonfinite import Explode
from .test_parameters import SITUATIONS, Fails
from .test_state import STATES, WITH_STATE, Run
from .truth import METHODS, play

DEVICES = 3


def made_up(t: Tensor) -> torch.device:
    return torch.device("cpu", hash(tuple(t.shape)) % DEVICES)


@pytest.fixture
def spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(several, "device_of", made_up)


def is_spread(balancer: igb.Balancer) -> bool:
    return isinstance(balancer._run, several.SeveralDevices)


class Training:
    """Steps of a net and its balancer in one of the ways there are."""

    def __init__(self, name: str, way: str = "plain", **arguments: object) -> None:
        self.net, self.way = make_net("conv" if way == "channels_last" else "mlp", torch.float64), way
        own = {"heads": "weighted", "task_parameters": self.net.own} if way == "weighted heads" else {}
        self.balancer = igb.Balancer(**STATES[name](), shared=self.net.shared, **own, **arguments)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6) if way == "scaler" else None
        self.params = [*self.net.parameters(), *self.balancer.parameters()]
        self.optimizer = torch.optim.SGD(self.params, lr=0.01, momentum=0.9)

    def step(self, step: int) -> list[object]:
        """What can be seen of it."""
        self.optimizer.zero_grad()
        losses = self.net.losses(step)
        if self.way == "missing tasks" and step:
            losses[step % TASKS] = None
        if self.way == "overflow" and step == 2:
            losses[1] = losses[1] + Explode.apply(self.net.shared[step], torch.inf)
        if self.way == "micro-batches":
            self.balancer.accumulate(self.net.losses(50 + step))
        independent = [self.net.losses(100 + step)] if self.way == "independent" else ()
        at = None
        if self.way == "representation":
            x, targets = self.net.batch(step)
            at = self.net.encoder(x)
            losses = [(head(at) - y).square().mean() for head, y in zip(self.net.heads, targets, strict=True)]
        result = self.balancer.backward(losses, scaler=self.scaler, independent=independent, representation=at)
        grads = flat([p.grad for p in self.params], self.params)
        if not bool(grads.isfinite().all()):
            self.optimizer.zero_grad()
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.balancer.after_step(self.net.losses(step))
        return [result.scales, result.weights, result.status, result.measured, grads]


def assert_close(found: list[object], want: list[object], tolerance: float = 1e-12) -> None:
    """Numbers up to a fraction of the largest."""
    for i, (a, b) in enumerate(zip(found, want, strict=True)):
        if a is None or b is None:
            assert a is b
            continue
        size = float(b.double().nan_to_num(0, 0, 0).abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * size, equal_nan=True, msg=lambda m, i=i: f"{i}: {m}")


WAYS = ["plain", "weighted heads", "scaler", "micro-batches", "missing tasks", "overflow", "channels_last"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", STATES)
def test_as_on_one_device(name, way, monkeypatch):
    one = Training(name, way)
    want = [one.step(step) for step in range(4)]
    assert not is_spread(one.balancer)
    monkeypatch.setattr(several, "device_of", made_up)
    run = Training(name, way)
    for step in range(4):
        assert_close(run.step(step), want[step])
    assert is_spread(run.balancer)


@pytest.mark.parametrize("name", ["sdm_grad", "modo"])
def test_independent_batches(name, monkeypatch):
    test_as_on_one_device(name, "independent", monkeypatch)


@pytest.mark.parametrize("name", ["equal", "imtl_g", "nash_mtl", "emtl", "grad_drop", "db_mtl beta 0"])
def test_at_a_representation(name, monkeypatch):
    test_as_on_one_device(name, "representation", monkeypatch)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_situations(spread, situation, method):
    if "layouts" in situation and method == "equal":
        pytest.skip("one joint pass sums the gradients before the function spreads them")
    assert is_spread(play(SITUATIONS[situation](), method, existing=True))


@pytest.mark.parametrize("situation", ["unused by some", "complex", "sparse embedding that some tasks reach"])
@pytest.mark.parametrize("method", METHODS)
def test_on_the_reference_backend(spread, situation, method):
    play(SITUATIONS[situation](), method, backend="reference")


@pytest.mark.parametrize("heads", ["scaled", "weighted"])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_random_numbers_are_those_of_one_device(monkeypatch, kind, heads):
    grads = []
    for spread in (False, True):
        if spread:
            monkeypatch.setattr(several, "device_of", made_up)
        net = make_net(kind)
        own = {"heads": heads, "task_parameters": net.own} if heads == "weighted" else {}
        balancer = igb.Balancer(igb.GradDrop(leak=[0.1, 0.0, 0.3], seed=2), shared=net.shared, **own)
        for step in range(2):
            balancer.backward(net.losses(step))
        grads.append([p.grad for p in net.parameters()])
    assert same(*grads)


@pytest.mark.parametrize("name", ["imtl_g", "excess_mtl", "grad_drop"])
def test_rows_of_half_the_memory(name, monkeypatch):
    found = []
    for spread in (False, True):
        if spread:
            monkeypatch.setattr(several, "device_of", made_up)
        net = make_net()
        igb.Balancer(**STATES[name](), shared=net.shared, bank_dtype=torch.bfloat16).backward(net.losses())
        found.append([p.grad for p in net.parameters()])
    assert_close(*found, tolerance=1e-6)


# ---- State --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*WITH_STATE, "db_mtl"])
def test_training_goes_on_with_the_same_bits(spread, name):
    whole, first, second = (Run(STATES[name], torch.float64, "conv") for _ in range(3))
    want = whole.steps(0, 5)
    start = first.steps(0, 3)
    second.load(first.save())
    assert same(start + second.steps(3, 5), want)
    assert is_spread(second.balancer)


@pytest.mark.parametrize("name", ["db_mtl", "excess_mtl", "grad_drop", "imtl_l+db_mtl"])
def test_a_copy_goes_on_with_the_same_bits(spread, name):
    run = Training(name)
    for step in range(2):
        run.step(step)
    other = copy.deepcopy(run)
    assert same(run.step(2), other.step(2))


@pytest.mark.parametrize("name", ["db_mtl", "excess_mtl", "imtl_g", "grad_drop"])
def test_state_goes_from_one_device_to_several_and_back(name, monkeypatch):
    want = Training(name)
    results = [want.step(step) for step in range(4)]
    states = None
    for step in range(4):
        monkeypatch.setattr(several, "device_of", made_up if step % 2 else lambda t: t.device)
        run = Training(name)
        if states is not None:
            for part, state in zip((run.net, run.optimizer, run.balancer), states, strict=True):
                part.load_state_dict(state)
        assert_close(run.step(step), results[step])
        states = copy.deepcopy([part.state_dict() for part in (run.net, run.optimizer, run.balancer)])


@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_raises_changes_nothing(spread, method):
    s = SITUATIONS["channels_last"]()
    balancer = igb.Balancer(**METHODS[method](), shared=s.shared)
    first = [Fails.apply(s.losses(0)[0]), *s.losses(0)[1:]]
    for losses in (first, None):
        before = Snapshot([*s.shared, *s.own], balancer)
        if losses is None:
            losses = s.losses(1)
            losses[1] = losses[1] + Fails.apply(s.shared[-1]).abs().sum()
        with pytest.raises(RuntimeError, match="this backward fails"):
            balancer.backward(losses)
        before.check()
        balancer.backward(s.losses(0))


# ---- What is known when -------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Tensors of these sizes count as lying on another device."""
    sizes: set[int] = set()
    monkeypatch.setattr(several, "device_of", lambda t: torch.device("cpu", 1) if t.numel() in sizes else t.device)
    return sizes


def test_a_model_may_be_spread_after_the_balancer_was_made(elsewhere):
    net, other = make_net(), make_net()
    balancer, plain = (igb.Balancer("imtl_g", shared=n.shared) for n in (net, other))
    want = plain.backward(other.losses())
    elsewhere.add(40)
    assert_close([balancer.backward(net.losses()).weights], [want.weights], 1e-6)
    assert is_spread(balancer)
    assert not is_spread(plain)


def test_a_head_that_comes_later_may_be_elsewhere(elsewhere):
    net = Net(tasks=2).double()
    net.heads[1] = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2)).double()
    elsewhere.add(35)
    balancer = igb.Balancer("imtl_g", shared=net.shared, tasks=2)
    scaler = torch.amp.GradScaler("cpu")
    balancer.backward([net.losses()[0], None], scaler=scaler)
    assert not is_spread(balancer)
    result = balancer.backward(net.losses(), scaler=scaler)
    assert is_spread(balancer)
    assert result.flags == 0
    losses = net.losses()
    losses[1] = losses[1] + Explode.apply(net.heads[1][0].weight, torch.inf)
    assert igb.Status.NON_FINITE in balancer.backward(losses, scaler=scaler).flags


@pytest.mark.parametrize("name", ["imtl_g", "db_mtl"])
def test_hooks_fall_back_to_passes(spread, name, monkeypatch, warnings_said):
    monkeypatch.setattr(igb.store, "BUCKET_BYTES", {"cpu": 1, "cuda": 1})
    grads = []
    for capture in ("passes", "hooks"):
        net = make_net()
        balancer = igb.Balancer(**CASES[name].make(), shared=net.shared, capture=capture)
        for step in range(3):
            balancer.backward(net.losses(step))
        grads.append([p.grad for p in net.parameters()])
    assert same(*grads)
    (message,) = warnings_said
    assert 'capture="hooks" falls back to "passes": parameters and losses are on' in message
