"""SDMGrad and MoDo: weights from the inner products of two batches' gradients, the update from a third or the first."""

from __future__ import annotations

import pytest
import torch

import igb_kernels as igb

from .models import TASKS, Snapshot, flat, grads_of, make_net

METHODS = {
    "sdm_grad": lambda: igb.SDMGrad(lr=0.5, iterations=3),
    "modo": lambda: igb.MoDo(gamma=0.05, rho=0.1),
}
every_method = pytest.mark.parametrize("name", METHODS)
conventions = pytest.mark.parametrize("convention", ["scaled", "weighted"])


def make_balancer(name, net, convention="scaled", losses=None, backend="auto"):
    own = {"heads": "weighted", "task_parameters": net.own} if convention == "weighted" else {}
    return igb.Balancer(METHODS[name](), losses, shared=net.shared, backend=backend, **own)


def rows_of(losses, params, scales):
    """Scaled gradients [K, D], float64."""
    return torch.stack(
        [
            flat(torch.autograd.grad(loss, params, scale, retain_graph=True, allow_unused=True), params)
            for loss, scale in zip(losses, scales, strict=True)
        ]
    )


@pytest.mark.parametrize("rule", ["none", "log"])
@pytest.mark.parametrize("batches", [1, 2, 3])
@conventions
@every_method
def test_steps(name, convention, batches, rule, backend):
    """Three steps against plain PyTorch; `.grad` that was there is added to."""
    net = make_net(dtype=torch.float64)
    balancer = make_balancer(name, net, convention, rule, backend)
    state = torch.full((TASKS,), 1 / TASKS, dtype=torch.float64)
    options = METHODS[name]().options()
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    for step in range(3):
        losses, *others = ([*net.losses(10 * step + i)] for i in range(batches))
        values = torch.stack(losses).detach()
        scales = torch.ones_like(values) if rule == "none" else 1 / values
        own, heads = (rows_of(losses, params, scales) for params in (net.shared, net.own))
        pair = [rows_of(batch, net.shared, scales) for batch in (others if batches == 3 else [losses, *others])]
        weights, _ = igb.ops.solve(name, pair[0] @ pair[-1].T, state=state, backend="reference", **options)
        before = grads_of(net.shared), grads_of(net.own)

        result = balancer.backward(losses, independent=others)
        torch.testing.assert_close(result.weights, weights)
        torch.testing.assert_close(grads_of(net.shared), before[0] + weights @ own)
        expected = heads.sum(0) if convention == "scaled" else weights @ heads
        torch.testing.assert_close(grads_of(net.own), before[1] + expected)
        assert result.flags == igb.Status(0)


@every_method
def test_weights_are_those_of_the_independent_batches(name):
    """Not of the batch itself, whose noise they would follow."""
    net = make_net(dtype=torch.float64)
    results = []
    for batch in (0, 1):
        balancer = make_balancer(name, net)
        results.append(balancer.backward(net.losses(batch), independent=[net.losses(2), net.losses(3)]).weights)
    torch.testing.assert_close(*results)
    alone = make_balancer(name, net).backward(net.losses(0)).weights
    assert not torch.allclose(alone, results[0])


def test_three_batches_take_two_passes_for_the_update():
    """2K for the weights; then one for the shared parameters and one for the heads, which take no weights."""
    net, passes = make_net(), []
    balancer = make_balancer("modo", net)
    losses = net.losses(0)
    z = [loss.grad_fn for loss in losses]
    for node in z:
        node.register_prehook(lambda grads: passes.append(1))
    balancer.backward(losses, independent=[net.losses(1), net.losses(2)])
    assert len(passes) == 2 * TASKS


@conventions
def test_graphs_are_kept_if_asked_for(convention):
    net = make_net()
    balancer = make_balancer("modo", net, convention)
    batches = [net.losses(i) for i in range(3)]
    for _ in range(2):
        balancer.backward(batches[0], independent=batches[1:], retain_graph=True)
    balancer.backward(batches[0], independent=batches[1:])
    for batch in batches:
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            batch[0].backward()


def test_a_frozen_parameter_and_one_that_no_task_reaches():
    net = make_net(dtype=torch.float64)
    idle = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    balancer = igb.Balancer(igb.MoDo(), shared=[*net.shared, idle])
    net.shared[0].requires_grad_(False)
    balancer.backward(net.losses(0), independent=[net.losses(1), net.losses(2)])
    assert net.shared[0].grad is None
    assert idle.grad is None
    assert net.shared[1].grad is not None


def test_what_is_not_finite_is_reported_and_not_learned_from():
    net = make_net(dtype=torch.float64)
    balancer = make_balancer("modo", net)
    balancer.backward(net.losses(0), independent=[net.losses(1), net.losses(2)])
    before = balancer.state_dict()["gradients"]["state"].clone()
    bad = net.losses(3)
    bad[1] = bad[1] * torch.nan
    result = balancer.backward(net.losses(4), independent=[bad, net.losses(5)])
    assert result.flags == igb.Status.NON_FINITE
    assert grads_of(net.shared).isnan().all()
    assert torch.equal(balancer.state_dict()["gradients"]["state"], before)


def test_a_gradient_that_is_not_finite_in_the_update_alone_is_reported():
    net = make_net(dtype=torch.float64)
    balancer = make_balancer("modo", net)
    losses = net.losses(0)
    losses[0] = (net.shared[0] * 0).sum().sqrt() + losses[0]  # its gradient is 0 · inf
    result = balancer.backward(losses, independent=[net.losses(1), net.losses(2)])
    assert result.losses.isfinite().all()
    assert result.flags == igb.Status.NON_FINITE


@pytest.mark.parametrize(
    ("method", "independent", "message"),
    [
        ("imtl_g", 1, "independent must stay empty: imtl_g needs none; found 1"),
        ("equal", 2, "independent must stay empty: equal needs none; found 2"),
        ("modo", 3, "independent must hold at most two batches; found 3"),
    ],
)
def test_too_many_batches(method, independent, message):
    net = make_net()
    balancer = igb.Balancer(method, shared=net.shared)
    losses, *others = (net.losses(i) for i in range(1 + independent))
    snapshot = Snapshot(net.parameters(), balancer)
    with pytest.raises(ValueError, match=message):
        balancer.backward(losses, independent=others)
    snapshot.check()


@pytest.mark.parametrize(
    ("names", "change", "message"),
    [
        (None, lambda losses: losses[:2], r"independent\[1\] must hold 3 tasks as losses does, found 2"),
        (None, lambda losses: [x.detach() for x in losses], r"independent\[1\] must hold .* requires grad"),
        (None, lambda losses: [None, *losses[1:]], r"independent\[1\] must have the tasks \[0, 1, 2\].*found \[1, 2\]"),
        ("abc", lambda losses: {f"{k}!": v for k, v in losses.items()}, r"independent\[1\] must have no other tasks"),
    ],
)
def test_a_bad_batch(names, change, message):
    net = make_net()
    balancer = make_balancer("modo", net)
    losses, first, second = (net.losses(i) for i in range(3))
    if names is not None:
        losses, first, second = (dict(zip(names, batch, strict=True)) for batch in (losses, first, second))
    snapshot = Snapshot(net.parameters(), balancer)
    with pytest.raises(ValueError, match=message):
        balancer.backward(losses, independent=[first, change(second)])
    snapshot.check()
