"""`accumulate`: one decision for several micro-batches, as for one big batch; `backward` on each is one for each."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import igb_kernels as igb

from .models import TASK_SCALES, TASKS, Net, Snapshot, grads_of, make_net, same
from .oracle import CASES, STORES, balancer_of
from .test_nonfinite import Explode, seen
from .test_state import STATES

pytestmark = pytest.mark.usefixtures("rows_at_once")

MICRO_BATCHES = 3
TRAINED = {
    **STATES,
    **{
        f"log+{method}": lambda method=method: {**STATES[method](), "losses": "log"}
        for method in ("grad_drop", "moco", "excess_mtl")
    },
}
"""Scales other than 1 in front of every way to keep gradients."""


def losses_on(net: Net, batches: list[int]) -> list[Tensor]:
    """One loss for each task, the mean over these batches together."""
    inputs, targets = zip(*(net.batch(seed) for seed in batches), strict=True)
    z, y = net.encoder(torch.cat(inputs)), torch.cat(targets, dim=1)
    return [scale * (head(z) - t).square().mean() for head, t, scale in zip(net.heads, y, TASK_SCALES, strict=False)]


def parts(losses: list[Tensor]) -> list[Tensor]:
    return [loss / MICRO_BATCHES for loss in losses]


def in_parts(balancer: igb.Balancer, net: Net, batches: list[int], scaler: object = None) -> igb.BalanceResult:
    for seed in batches[:-1]:
        balancer.accumulate(parts(losses_on(net, [seed])), scaler=scaler)
    return balancer.backward(parts(losses_on(net, batches[-1:])), scaler=scaler)


def run_of(name: str, heads: str, dtype: torch.dtype = torch.float64) -> tuple[Net, igb.Balancer]:
    net = make_net(dtype=dtype)
    own = {} if heads == "scaled" else {"heads": heads, "task_parameters": net.own}
    return net, igb.Balancer(**TRAINED[name](), shared=net.shared, **own)


def batches_of(step: int) -> list[int]:
    return [MICRO_BATCHES * step + i for i in range(MICRO_BATCHES)]


@pytest.mark.parametrize("heads", ["scaled", "weighted"])
@pytest.mark.parametrize("name", TRAINED)
def test_as_one_big_batch(name, heads):
    """In float64: losses, weights, gradients and learned parameters' gradients, over steps."""
    (net, balancer), (big_net, big) = run_of(name, heads), run_of(name, heads)
    for step in range(4):
        for model, its in ((net, balancer), (big_net, big)):
            for p in [*model.parameters(), *its.parameters()]:
                p.grad = None
        result, want = in_parts(balancer, net, batches_of(step)), big.backward(losses_on(big_net, batches_of(step)))
        for got, expected in (
            (result.losses, want.losses),
            (result.scales, want.scales),
            (result.weights, want.weights),
        ):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)
        for mine, its in ((net.parameters(), big_net.parameters()), (balancer.parameters(), big.parameters())):
            for p, q in zip(mine, its, strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-8)
        if step == 1:
            balancer.end_epoch()
            big.end_epoch()


@pytest.mark.parametrize("name", TRAINED)
def test_with_a_scaler_the_bits_are_those_without(name):
    runs = [run_of(name, "scaled", torch.float32) for _ in range(2)]
    for step in range(3):
        for (net, balancer), scaler in zip(runs, (torch.amp.GradScaler("cpu", init_scale=2.0**10), None), strict=True):
            net.zero_grad()
            in_parts(balancer, net, batches_of(step), scaler)
        (net, balancer), (other, plain) = runs
        assert same([p.grad / 2.0**10 for p in net.parameters()], [p.grad for p in other.parameters()])
        assert same(balancer.state_dict(), plain.state_dict())


@pytest.mark.parametrize("name", ["equal", *STORES])
def test_gradients_that_are_there_stay_until_backward_adds_to_them(name):
    net = make_net(dtype=torch.float64)
    balancer = balancer_of(CASES[name], net)
    fresh = balancer_of(CASES[name], net)
    in_parts(fresh, net, batches_of(0))
    want = grads_of(list(net.parameters()))
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    before = Snapshot(net.parameters())
    for seed in batches_of(0)[:-1]:
        balancer.accumulate(parts(losses_on(net, [seed])))
        before.check()
    objects = [p.grad for p in net.parameters()]
    balancer.backward(parts(losses_on(net, batches_of(0)[-1:])))
    torch.testing.assert_close(grads_of(list(net.parameters())), want + 1)
    assert all(p.grad is old for p, old in zip(net.parameters(), objects, strict=True))


def test_loading_a_state_drops_what_was_accumulated():
    (net, balancer), (other, fresh) = run_of("nash every 7", "scaled"), run_of("nash every 7", "scaled")
    state = copy.deepcopy(balancer.state_dict())
    balancer.accumulate(parts(losses_on(net, [5])))
    balancer.load_state_dict(state)
    in_parts(balancer, net, batches_of(0))
    in_parts(fresh, other, batches_of(0))
    assert same(grads_of(list(net.parameters())), grads_of(list(other.parameters())))


def test_a_decision_for_each_micro_batch_is_another_thing():
    net, other = make_net(dtype=torch.float64), make_net(dtype=torch.float64)
    in_parts(igb.Balancer("imtl_g", shared=net.shared), net, batches_of(0))
    each = igb.Balancer("imtl_g", shared=other.shared)
    for seed in batches_of(0):
        each.backward(parts(losses_on(other, [seed])))
    relative = (grads_of(net.shared) - grads_of(other.shared)).norm() / grads_of(net.shared).norm()
    assert 1e-3 < float(relative) < 1


class Ragged(nn.Module):
    """Parameters that only some micro-batches reach, and one that serves two tasks' heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.trunk, self.branch = nn.Linear(4, 5).double(), nn.Linear(5, 5).double()
        self.head = nn.Linear(5, 2).double()

    def losses(self, seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        z = self.trunk(torch.randn(6, 4, dtype=torch.float64))
        if seed % 2:
            z = torch.tanh(self.branch(z))
        return [self.head(z)[:, k].square().mean() * (3 * k + 1) for k in range(2)]


@pytest.mark.parametrize("name", ["equal", "log", *STORES])
def test_parameters_that_some_micro_batches_reach(name):
    if name == "igb_v1 with bases":
        pytest.skip("has bases for three tasks")
    net, other = Ragged(), Ragged()
    shared = [[*model.trunk.parameters(), *model.branch.parameters()] for model in (net, other)]
    one, big = (igb.Balancer(**CASES[name].make(), shared=params) for params in shared)
    for step in range(2):
        net.zero_grad()
        other.zero_grad()
        one.accumulate(net.losses(2 * step))
        one.backward(net.losses(2 * step + 1))
        sums = [a + b for a, b in zip(other.losses(2 * step), other.losses(2 * step + 1), strict=True)]
        big.backward(sums)
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["equal", *STORES])
def test_an_error_drops_what_was_accumulated_and_nothing_else(name):
    net, other = make_net(), make_net()
    balancer, plain = balancer_of(CASES[name], net), balancer_of(CASES[name], other)
    for model, its in ((net, balancer), (other, plain)):
        its.backward(model.losses(0))
        model.zero_grad()
    balancer.accumulate(net.losses(1))
    before = Snapshot(net.parameters(), balancer)
    used = net.losses(2)
    used[1].backward(retain_graph=False)
    net.zero_grad()
    with pytest.raises(RuntimeError, match="second time"):
        balancer.accumulate(used)
    before.check()
    balancer.backward(net.losses(3))
    plain.backward(other.losses(3))
    assert same([p.grad for p in net.parameters()], [p.grad for p in other.parameters()])


@pytest.mark.parametrize("name", [name for name in STATES if CASES.get(name, CASES["emtl"]).method != "equal"])
def test_a_micro_batch_that_overflows_spoils_the_step_but_no_state(name):
    net, balancer = run_of(name, "scaled", torch.float32)
    for step in range(3):
        balancer.backward(net.losses(step))
    state = copy.deepcopy(seen(balancer.state_dict()))
    net.zero_grad()
    first, second, third = net.losses(5)
    balancer.accumulate([first, second + Explode.apply(net.shared[-1], torch.inf), third])
    result = balancer.backward(net.losses(6))
    assert not all(bool(p.grad.isfinite().all()) for p in net.shared)
    assert same(seen(balancer.state_dict()), state)
    if STATES[name]()["gradients"] not in ("equal",):
        assert igb.Status.NON_FINITE in result.flags


def test_what_cannot_be():
    net = make_net()
    balancer = igb.Balancer(igb.MoDo(), shared=net.shared)
    balancer.accumulate(net.losses())
    before = Snapshot(net.parameters(), balancer)
    with pytest.raises(ValueError, match=r"independent must stay empty after accumulate\(\); found 2"):
        balancer.backward(net.losses(1), independent=[net.losses(2), net.losses(3)])
    with pytest.raises(ValueError, match=f"losses must hold {TASKS} tasks as in earlier steps, found 2"):
        balancer.accumulate(net.losses(1)[:2])
    before.check()
    assert len(balancer.backward(net.losses(1)).losses) == TASKS


def test_the_first_step_may_be_accumulated():
    """Its error leaves no state behind."""
    net = make_net()
    balancer = igb.Balancer("db_mtl", shared=net.shared)
    losses = net.losses()
    losses[2].backward()
    with pytest.raises(RuntimeError, match="second time"):
        balancer.accumulate(losses)
    balancer.backward(net.losses(1)[:2])
