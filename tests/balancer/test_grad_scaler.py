"""float16 and bfloat16 autocast: with a GradScaler every step is what it is without, times its factor; a step that the
scaler skips leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import igb_kernels as igb

from .models import TASKS, Net, Snapshot, grads_of, make_net, same
from .oracle import CASES, STORES, balancer_of
from .test_nonfinite import Explode, seen
from .test_state import STATES

pytestmark = pytest.mark.usefixtures("rows_at_once")


class Training:
    """Steps of a net and of what its balancer learns, with a GradScaler or without."""

    def __init__(self, name: str, scaler: torch.amp.GradScaler | None = None, heads: str = "scaled") -> None:
        self.net, self.scaler = make_net(), scaler
        own = {} if heads == "scaled" else {"heads": heads, "task_parameters": self.net.own}
        self.balancer = igb.Balancer(**STATES[name](), shared=self.net.shared, **own)
        self.params = [*self.net.parameters(), *self.balancer.parameters()]
        self.optimizer = torch.optim.SGD(self.params, lr=0.01, momentum=0.9)

    def step(self, losses: list[Tensor | None], batch: int) -> object:
        """What can be seen of it; gradients without the factor."""
        self.optimizer.zero_grad()
        result = self.balancer.backward(losses, scaler=self.scaler)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.unscale_(self.optimizer)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.balancer.after_step(self.net.losses(batch))
        grads = [None if p.grad is None else p.grad.clone() for p in self.params]
        return [result.losses, result.scales, result.weights, result.status, result.measured, grads]


@pytest.mark.parametrize("heads", ["scaled", "weighted"])
@pytest.mark.parametrize("name", STATES)
def test_every_step_has_the_bits_of_one_without_a_scaler(name, heads):
    """The factor is a power of two, and changes on the way."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    scaled, plain = Training(name, scaler, heads), Training(name, None, heads)
    for step in range(6):
        one, other = (run.step(run.net.losses(step), step) for run in (scaled, plain))
        assert same(one[:4], other[:4])
        assert same(one[5], other[5])
        if one[4] is not None and STATES[name]()["gradients"] != "grad_drop":
            assert same(one[4], other[4])
        if step == 2:
            scaled.balancer.end_epoch()
            plain.balancer.end_epoch()
    assert scaler.get_scale() == 2.0**15
    assert same(scaled.balancer.state_dict(), plain.balancer.state_dict())
    assert same([p.detach() for p in scaled.params], [p.detach() for p in plain.params])


def overflow_in_shared(net: Net, losses: list[Tensor]) -> list[Tensor]:
    return [losses[0], losses[1] + Explode.apply(net.shared[-1], torch.inf), losses[2]]


def overflow_in_a_head(net: Net, losses: list[Tensor]) -> list[Tensor]:
    return [losses[0], losses[1] + Explode.apply(net.own[2], torch.inf), losses[2]]


@pytest.mark.parametrize("overflow", [overflow_in_shared, overflow_in_a_head])
@pytest.mark.parametrize("heads", ["scaled", "weighted"])
@pytest.mark.parametrize("name", STATES)
def test_a_skipped_step_leaves_no_trace(name, heads, overflow):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    run = Training(name, scaler, heads)
    for step in range(4):
        run.step(run.net.losses(step), step)
    run.optimizer.zero_grad()
    before = Snapshot(run.params)
    state = copy.deepcopy(seen(run.balancer.state_dict()))
    run.step(overflow(run.net, run.net.losses(9)), 9)
    assert scaler.get_scale() == 2.0
    run.optimizer.zero_grad()
    before.check()
    assert same(seen(run.balancer.state_dict()), state)
    run.step(run.net.losses(10), 10)
    assert scaler.get_scale() == 2.0


@pytest.mark.parametrize("name", STATES)
def test_missing_tasks(name):
    """The bits of a training without a scaler, and no trace of a skipped step, where tasks are missing."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
    scaled, plain = Training(name, scaler), Training(name)
    for step in range(6):
        for run in (scaled, plain):
            losses = run.net.losses(step)
            some = losses if step % 3 == 0 else [None if k == step % TASKS else loss for k, loss in enumerate(losses)]
            run.step(some, step)
    assert same([p.detach() for p in scaled.params], [p.detach() for p in plain.params])
    assert same(scaled.balancer.state_dict(), plain.balancer.state_dict())
    for overflow in (overflow_in_shared, overflow_in_a_head):
        state = copy.deepcopy(seen(scaled.balancer.state_dict()))
        scaled.optimizer.zero_grad()
        before = Snapshot(scaled.params)
        scaled.step([*overflow(scaled.net, scaled.net.losses(9))[:2], None], 9)
        scaled.optimizer.zero_grad()
        before.check()
        after = seen(scaled.balancer.state_dict())
        assert same({**after, "last": None}, {**state, "last": None})


@pytest.mark.parametrize("name", ["equal", "db_mtl", "imtl_g"])
def test_an_overflow_in_a_sparse_head(name):
    """Embeddings of heads keep their sparse gradients, which count as others do; so do those that are added to."""
    torch.manual_seed(0)
    encoder, head = nn.Linear(5, 5), nn.Embedding(7, 5, sparse=True)
    balancer = balancer_of(CASES[name], Net(encoder=encoder))

    def losses() -> list[Tensor]:
        z = encoder(torch.ones(3, 5))
        return [(z * (k + 1) + (head(torch.arange(3)) if k == 1 else 0)).square().mean() for k in range(TASKS)]

    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    balancer.backward(losses(), scaler=scaler)
    state = copy.deepcopy(balancer.state_dict())
    for accumulated in (False, True):
        head.weight.grad = torch.sparse_coo_tensor([[2]], [[torch.inf] * 5], (7, 5))
        if accumulated:
            balancer.accumulate(losses(), scaler=scaler)
        result = balancer.backward(losses(), scaler=scaler)
        assert igb.Status.NON_FINITE in result.flags
        assert same(balancer.state_dict(), state)
        assert bool(head.weight.grad.to_dense().isinf().any())


def test_a_scaler_that_is_off_is_none():
    net, other = make_net(), make_net()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for step in range(2):
        balancer_of(CASES["db_mtl"], net).backward(net.losses(step), scaler=scaler)
        balancer_of(CASES["db_mtl"], other).backward(other.losses(step))
    assert same([p.grad for p in net.parameters()], [p.grad for p in other.parameters()])


@pytest.mark.parametrize("name", ["equal", *STORES])
def test_what_was_there_is_added_to_in_scaled_units(name):
    totals = []
    for scaler in (torch.amp.GradScaler("cpu", init_scale=8.0), None):
        net = make_net(dtype=torch.float64)
        balancer = balancer_of(CASES[name], net)
        for step in range(2):  # no zero_grad in between
            balancer.backward(net.losses(step), scaler=scaler)
        totals.append(grads_of(list(net.parameters())))
    torch.testing.assert_close(totals[0], 8 * totals[1], rtol=1e-12, atol=0)


# ---- Autocast -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["igb_v1 with bases", *STORES])
def test_within_autocast_as_outside(name, dtype):
    """The context is for the forward pass; `backward` within it does the same."""
    nets = make_net(), make_net()
    for net, inside in zip(nets, (True, False), strict=True):
        balancer = balancer_of(CASES[name], net)
        for step in range(2):
            with torch.autocast("cpu", dtype):
                losses = [loss.float() for loss in net.losses(step)]
                if inside:
                    balancer.backward(losses)
            if not inside:
                balancer.backward(losses)
    assert same([p.grad for p in nets[0].parameters()], [p.grad for p in nets[1].parameters()])


class Faint(Net):
    """Gradients of the encoder that float16 rounds to 0, unless they are scaled up."""

    def losses(self, seed: int = 0) -> list[Tensor]:
        return [1e-7 * loss.float() for loss in super().losses(seed)]


@pytest.mark.parametrize("name", ["imtl_g", "nash_mtl", "emtl", "equal"])
def test_float16_gradients_that_only_a_scaler_saves(name):
    torch.manual_seed(0)
    exact, half = Faint(), Faint()
    half.load_state_dict(exact.state_dict())
    balancer_of(CASES[name], exact).backward(exact.losses())
    want = grads_of(exact.shared)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    errors = []
    for unit in (scaler, None):
        half.zero_grad()
        with torch.autocast("cpu", torch.float16):
            losses = half.losses()
        balancer_of(CASES[name], half).backward(losses, scaler=unit)
        got = grads_of(half.shared) / (2.0**16 if unit is not None else 1)
        errors.append(float((got - want).norm() / want.norm()))
    assert errors[0] < 0.02
    assert errors[1] > 5 * errors[0]


@pytest.mark.parametrize("name", ["imtl_g", "nash_mtl", "db_mtl", "db_mtl beta 0", "excess_mtl", "moco"])
def test_squares_of_float16_gradients_do_not_overflow(name):
    """Elements of some 3,000 have squares far beyond float16's largest number, 65,504."""
    encoder = nn.Linear(4, 5, dtype=torch.float16)
    balancer = igb.Balancer(**{**STATES[name](), "losses": "none"}, shared=encoder)
    for step in range(2):
        encoder.zero_grad()
        torch.manual_seed(step)
        z = encoder(torch.randn(3, 4, dtype=torch.float16))
        result = balancer.backward([(z.float() * torch.randn(3, 5)).sum() * 700 for _ in range(TASKS)])
        assert igb.Status.NON_FINITE not in result.flags
        assert bool(result.weights.isfinite().all())
        assert all(bool(p.grad.isfinite().all()) for p in encoder.parameters()) or name == "db_mtl beta 0"
        assert result.norms is None or float(result.norms.max()) > 256
