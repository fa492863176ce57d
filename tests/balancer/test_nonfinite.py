"""NaN and inf reach `.grad`, where a GradScaler sees them, and nothing that outlives the step."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import igb_kernels as igb

from .models import TASKS, Net, Snapshot, make_net, same
from .oracle import CASES, balancer_of

pytestmark = pytest.mark.usefixtures("rows_at_once")


class Explode(torch.autograd.Function):
    """Adds nothing to a loss, and an infinite or NaN element to the gradient of a tensor."""

    @staticmethod
    def forward(ctx, x: Tensor, value: float) -> Tensor:
        ctx.shape, ctx.value = x.shape, value
        return x.new_zeros(())

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        result = torch.zeros(ctx.shape, dtype=grad.dtype)
        result.view(-1)[-1] = ctx.value
        return result * grad.sign(), None


def with_loss(value: float) -> Callable[[Net, int], list[Tensor]]:
    def losses(net: Net, step: int) -> list[Tensor]:
        first, second, third = net.losses(step)
        return [first, second + value, third]

    return losses


def with_gradient(value: float) -> Callable[[Net, int], list[Tensor]]:
    def losses(net: Net, step: int) -> list[Tensor]:
        first, second, third = net.losses(step)
        return [first, second + Explode.apply(net.shared[-1], value), third]

    return losses


BAD = {
    "NaN loss": with_loss(torch.nan),
    "inf loss": with_loss(torch.inf),
    "-inf loss": with_loss(-torch.inf),
    "NaN gradient": with_gradient(torch.nan),
    "inf gradient": with_gradient(torch.inf),
    "-inf gradient": with_gradient(-torch.inf),
}
STATEFUL = [name for name, case in CASES.items() if case.method != "equal" and "imtl_l" not in name]


def seen(state: dict[str, object]) -> dict[str, object]:
    """The state, with averages that are zero written as absent: they count the same."""
    averages = [[None if a is None or not a.any() else a for a in row] for row in state["averages"]]
    return {**copy.deepcopy(state), "averages": [] if not any(map(any_tensor, averages)) else averages}


def any_tensor(row: list[Tensor | None]) -> bool:
    return any(a is not None for a in row)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", CASES)
def test_gradients_show_it(name, bad):
    net = make_net()
    balancer = balancer_of(CASES[name], net)
    balancer.backward(net.losses())
    net.zero_grad()
    result = balancer.backward(BAD[bad](net, 1))
    assert not all(bool(p.grad.isfinite().all()) for p in net.shared)
    if CASES[name].method != "equal":
        assert all(bool(p.grad.isnan().all()) for p in net.shared)
        assert bool(result.weights.isnan().all())
    if CASES[name].method != "equal" or "loss" in bad:
        assert igb.Status.NON_FINITE in result.flags
        assert "NON_FINITE" in str(result)


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("bad", ["NaN loss", "inf gradient"])
@pytest.mark.parametrize("name", STATEFUL)
def test_state_is_as_if_the_step_had_not_been(name, bad, at):
    runs = []
    for insert in (False, True):
        net = make_net()
        balancer = balancer_of(CASES[name], net)
        trace = []
        for step in range(4):
            if insert and step == at:
                before = seen(balancer.state_dict())
                balancer.backward(BAD[bad](net, 77))
                after = seen(balancer.state_dict())
                if at > 0:
                    assert same(after, before)
            net.zero_grad()
            result = balancer.backward(net.losses(step))
            trace += [[p.grad.clone() for p in net.parameters()], result.weights, result.scales, result.status]
        runs.append((trace, seen(balancer.state_dict())))
    assert same(*runs)


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("convention", ["scaled", "weighted"])
def test_nash_solves_again_where_a_bad_step_should_have(convention, at):
    """The weights that are held must be solved ones: not those from before the bad step, nor the initial ones."""
    net = make_net()
    balancer = balancer_of(CASES["nash_mtl every 3"], net, convention)
    for step in range(3 * at):
        balancer.backward(net.losses(step))
    balancer.backward(with_loss(torch.nan)(net, 50))
    net.zero_grad()
    losses = net.losses(4)
    fresh = make_net()
    want = balancer_of(CASES["nash_mtl every 3"], fresh).backward(fresh.losses(4)).weights
    assert same(balancer.backward(losses).weights, want)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["db_mtl", "db_mtl bias correction"])
def test_averages_are_put_back_on_every_backend(name, backend):
    net = make_net()
    balancer = balancer_of(CASES[name], net, backend=backend)
    for step in range(2):
        balancer.backward(net.losses(step))
    before = copy.deepcopy(balancer.state_dict())
    for _ in range(2):
        balancer.backward(BAD["inf gradient"](net, 3))
        assert same(balancer.state_dict(), before)


@pytest.mark.parametrize("convention", ["scaled", "weighted"])
def test_what_heads_get(convention):
    """Scaled heads of sound tasks keep sound gradients; weighted ones share the weights' NaN."""
    net = make_net()
    balancer = balancer_of(CASES["imtl_g"], net, convention)
    balancer.backward(with_gradient(torch.inf)(net, 0))
    finite = [bool(p.grad.isfinite().all()) for p in net.own]
    assert finite == [convention == "scaled"] * 2 * TASKS


@pytest.mark.parametrize("name", ["log", "igb_v1", "db_mtl", "log+imtl_g"])
def test_a_negative_loss_under_a_logarithm(name):
    net = make_net()
    balancer = balancer_of(CASES[name], net)
    balancer.backward(net.losses())
    before = copy.deepcopy(balancer.state_dict())
    result = balancer.backward([loss - 100.0 * (k == 1) for k, loss in enumerate(net.losses(1))])
    assert igb.Status.NON_POSITIVE_LOSS in result.flags
    assert bool(result.scales.isnan().all())
    assert not all(bool(p.grad.isfinite().all()) for p in net.shared)
    assert same(balancer.state_dict(), before)


def test_imtl_l_passes_it_on_to_its_parameter():
    net, rule = make_net(), igb.IMTLL(TASKS)
    igb.Balancer("imtl_g", rule, shared=net.shared).backward(with_loss(torch.nan)(net, 0))
    assert bool(rule.log_scales.grad.isnan().any())
    assert bool(rule.log_scales.isfinite().all())


@pytest.mark.parametrize("name", ["equal", "imtl_g", "db_mtl", "db_mtl beta 0", "emtl", "nash_mtl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_grad_scaler_skips_the_step(name, dtype):
    net = make_net(dtype=torch.float32)
    balancer = balancer_of(CASES[name], net)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1000)

    def step(losses: list[Tensor]) -> float:
        optimizer.zero_grad()
        balancer.backward([scaler.scale(loss) for loss in losses])
        scaler.step(optimizer)
        scaler.update()
        return scaler.get_scale()

    def losses(seed: int) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16 if dtype is torch.float32 else dtype):
            return [loss.float() for loss in net.losses(seed)]

    assert step(losses(0)) == 4.0
    net.zero_grad()
    before = Snapshot(net.parameters())
    bad = losses(1)
    assert step([bad[0], bad[1] * torch.inf, bad[2]]) == 2.0
    net.zero_grad()
    before.check()
    assert step(losses(2)) == 2.0
    assert not all(same(p.detach(), q) for p, q in zip(net.parameters(), before._values, strict=True))


@pytest.mark.parametrize("name", ["equal", "imtl_g", "emtl"])
def test_a_loss_scale_comes_out_again(name):
    """Methods of degree 1 in a common scale: unscaled gradients are those without a GradScaler."""
    net = make_net(dtype=torch.float64)
    balancer_of(CASES[name], net).backward(net.losses())
    want = [p.grad for p in net.parameters()]
    net.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    balancer_of(CASES[name], net).backward([scaler.scale(loss) for loss in net.losses()])
    scaler.unscale_(torch.optim.SGD(net.parameters()))
    for p, w in zip(net.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, w, rtol=1e-9, atol=1e-12)
