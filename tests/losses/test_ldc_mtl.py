"""LDC-MTL: a learned router under a penalty on differences between weighted losses."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from training import Quadratics, Training

from igb_kernels import Status, ops
from igb_kernels.backends import resolve
from igb_kernels.losses import LDCMTL
from igb_kernels.losses.ldc_mtl import FORMS, PAIRS, ROUTERS

THETA = torch.tensor([0.4, -0.3, 1.2], dtype=torch.float64)
INITIAL = torch.tensor([3.0, 0.5, 40.0], dtype=torch.float64)
LOSSES = torch.tensor([2.0, 0.7, 9.0], dtype=torch.float64)


def objective(losses, theta, initial, form, router, pairs, lamb):
    """The definition; autograd does the rest."""
    sigma = {
        "sigmoid": lambda: theta.sigmoid(),
        "sigmoid_relu": lambda: theta.relu().sigmoid(),
        "softmax": lambda: theta.softmax(0).clamp(0.2, 0.8),
    }[router]()
    x = {"log": (losses / initial).log(), "ratio": losses / (initial / initial.min())}.get(form, losses)
    total = {"ratio": sigma.sum(), "plain": 1.0}.get(form, sigma.sum().detach())
    weighted = x if form == "plain" else sigma * x
    if pairs == "adjacent":
        penalty = weighted.diff().abs().sum()
    else:
        orders = list(itertools.permutations(range(len(losses))))
        penalty = sum(weighted[list(order)].diff().abs().sum() for order in orders) / len(orders)
    return (sigma * x).sum() / total + lamb * penalty


def gradients(*arguments):
    losses, theta = (v.clone().requires_grad_() for v in arguments[:2])
    return torch.autograd.grad(objective(losses, theta, *arguments[2:]), (losses, theta), allow_unused=True)


def make(form="log", router="sigmoid", pairs="all", lamb=0.05, theta=THETA, initial=INITIAL):
    rule = LDCMTL(len(theta), form, router=router, pairs=pairs, lamb=lamb, dtype=torch.float64)
    rule.load_state_dict({"router_logits": theta, "initial_losses": initial.clone()})
    return rule


def step(rule, losses, backend):
    """The rule's scales, and the gradient that they leave."""
    scales, status = rule.scales(losses, resolve(backend, "cpu"))
    rule.commit(losses, scales, status)
    return scales, rule.router_logits.grad


@pytest.mark.parametrize("lamb", [0.0, 0.05, 0.8])
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("form", FORMS)
def test_scales_and_gradient_are_the_definition_s(backend, form, router, pairs, lamb):
    scales, gradient = step(make(form, router, pairs, lamb), LOSSES, backend)
    of_losses, of_theta = gradients(LOSSES, THETA, INITIAL, form, router, pairs, lamb)
    torch.testing.assert_close(scales, of_losses, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(gradient, of_theta, rtol=1e-11, atol=1e-14)


def test_a_clamped_share_learns_nothing_of_its_own(backend):
    theta = torch.tensor([3.0, 0.0, -3.0], dtype=torch.float64)  # shares 0.95, 0.05, 0.002
    scales, gradient = step(make("raw", "softmax", lamb=0.0, theta=theta), LOSSES, backend)
    torch.testing.assert_close(scales, torch.tensor([0.8, 0.2, 0.2], dtype=torch.float64) / 1.2)
    assert not gradient.any()


@pytest.mark.parametrize("form", FORMS)
def test_all_pairs_do_not_depend_on_the_tasks_order(backend, form):
    """The authors' penalty does: it knows neighbours only."""
    order = [2, 0, 1]
    moved = {}
    for pairs in PAIRS:
        plain = step(make(form, pairs=pairs), LOSSES, backend)
        permuted = step(make(form, pairs=pairs, theta=THETA[order], initial=INITIAL[order]), LOSSES[order], backend)
        moved[pairs] = max(float((b - a[order]).abs().max()) for a, b in zip(plain, permuted, strict=True))
    assert moved["all"] < 1e-14
    assert moved["adjacent"] > 1e-3


def test_two_tasks_have_one_pair(backend):
    found = [step(make(pairs=pairs, theta=THETA[:2], initial=INITIAL[:2]), LOSSES[:2], backend) for pairs in PAIRS]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("form", FORMS)
def test_one_task_has_no_penalty(backend, form):
    found = [
        step(make(form, lamb=lamb, theta=THETA[:1], initial=INITIAL[:1]), LOSSES[:1], backend) for lamb in (0.0, 5.0)
    ]
    torch.testing.assert_close(*found)
    expected = {"log": 1 / LOSSES[0], "plain": THETA[0].sigmoid()}.get(form, torch.ones(()).double())
    torch.testing.assert_close(found[0][0][0], expected)


@pytest.mark.parametrize(("lamb", "negative"), [(0.95, [False, False]), (1.05, [False, True])])
def test_scales_may_be_negative(backend, lamb, negative):
    """Of two tasks, that of the smaller weighted loss, where lamb > 1 / S."""
    assert 1 / float(THETA[:2].sigmoid().sum()) == pytest.approx(1, abs=0.05)
    scales, _ = step(make("raw", lamb=lamb, theta=THETA[:2], initial=INITIAL[:2]), LOSSES[:2], backend)
    assert (scales < 0).tolist() == negative


def test_equal_weighted_losses_are_not_pulled(backend):
    """sign(0) = 0."""
    equal, theta = torch.full((3,), 2.0, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for pairs in PAIRS:
        scales, _ = step(make("raw", pairs=pairs, lamb=10.0, theta=theta), equal, backend)
        torch.testing.assert_close(scales, torch.full((3,), 1 / 3, dtype=torch.float64))


STEPS = torch.tensor([[1.0, 8.0], [3.0, 4.0], [2.0, 6.0]], dtype=torch.float64)


@pytest.mark.parametrize("gradients", [None, "imtl_g"])
def test_first_losses_are_those_of_the_first_usable_step(backend, gradients):
    """And stay, over the ends of epochs as well; the authors take new ones at the start of each."""
    rule = LDCMTL(2, dtype=torch.float64)
    training = Training(rule, backend, gradients)
    assert training.step([torch.nan, 1.0]).scales.isnan().all()
    assert rule.initial_losses.isnan().all()
    if gradients is not None:
        assert Status.NON_FINITE in training.step([5.0, 5.0], ((1.0, torch.nan, 0.0), (0.0, 1.0, 0.0))).flags
        assert rule.initial_losses.isnan().all()
    torch.testing.assert_close(training.step(STEPS[0]).scales, 1 / (2 * STEPS[0]))  # every x is 0
    address = rule.initial_losses.data_ptr()
    for losses in STEPS[1:]:
        training.balancer.end_epoch()
        theta = rule.router_logits.detach().clone()
        expected = objective_scales(losses, theta, STEPS[0])
        torch.testing.assert_close(training.step(losses).scales, expected)
    assert torch.equal(rule.initial_losses, STEPS[0])
    assert rule.initial_losses.data_ptr() == address  # where the replays of a CUDA graph read it
    assert rule.host_decision() is None


def objective_scales(losses, theta, initial):
    return gradients(losses, theta, initial, "log", "sigmoid", "all", 0.05)[0]


def test_log_losses_are_free_of_units(backend):
    factors = torch.tensor([1e-4, 1e3, 7.0], dtype=torch.float64)
    plain, plain_gradient = step(make(), LOSSES, backend)
    scaled, gradient = step(make(initial=factors * INITIAL), factors * LOSSES, backend)
    torch.testing.assert_close(factors * scaled, plain)
    torch.testing.assert_close(gradient, plain_gradient)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_router_that_is_not_finite_is_reported(backend, value):
    per_task = torch.tensor([[0.0, value], [1.0, 1.0]])
    scales, status = ops.loss_scales("ldc_mtl", torch.ones(2), per_task, backend=backend)
    assert scales.isnan().all()
    assert status == Status.NON_FINITE


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("extreme", [-1e4, -25.0, 25.0, 1e4])
def test_extreme_routers(backend, form, router, extreme):
    """Scales and gradients are finite, and a sigmoid is led no further out."""
    theta = torch.full((2,), extreme, dtype=torch.float64)
    scales, gradient = step(make(form, router, theta=theta, initial=INITIAL[:2]), LOSSES[:2], backend)
    assert (scales.isfinite() & gradient.isfinite()).all()
    if router != "softmax":
        assert (gradient * extreme >= 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_extreme_losses(backend, form):
    losses = torch.tensor([1e150, 1e-150, 0.0], dtype=torch.float64)
    scales, gradient = step(make(form), losses, backend)
    assert (scales.isfinite() & gradient.isfinite()).all()


def test_state_dict(backend):
    rules = [LDCMTL(2, dtype=torch.float64) for _ in range(2)]
    first, second = (Training(rule, backend, None) for rule in rules)
    optimizers = [torch.optim.SGD(rule.parameters(), lr=0.5) for rule in rules]
    for losses in STEPS[:2]:
        first.step(losses)
        optimizers[0].step()
        rules[0].router_logits.grad = None
    second.balancer.load_state_dict(copy.deepcopy(first.balancer.state_dict()))
    assert torch.equal(first.step(STEPS[2]).scales, second.step(STEPS[2]).scales)
    assert torch.equal(rules[0].router_logits.grad, rules[1].router_logits.grad)
    assert not torch.equal(rules[1].router_logits, torch.ones(2))


@pytest.mark.parametrize("form", FORMS)
def test_training(form):
    """The whole objective, router included, goes down."""
    rule = LDCMTL(2, form, lamb=0.2, dtype=torch.float64)
    training = Quadratics(rule)
    assert training.balancer.param_groups() == [{"params": [rule.router_logits], "lr": 1e-3}]
    first = torch.stack(training.losses()).detach()

    def value():
        losses, theta = torch.stack(training.losses()).detach(), rule.router_logits.detach()
        return float(objective(losses, theta, first, form, "sigmoid", "all", 0.2))

    before = value()
    training.train(200)
    assert torch.equal(rule.initial_losses, first)
    assert value() < before - 0.1 * abs(before)
    assert float((rule.router_logits.detach() - 1).abs().max()) > 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tasks": 0}, "num_tasks"),
        ({"num_tasks": 2, "form": "cubic"}, "form must be one of"),
        ({"num_tasks": 2, "router": "linear"}, "router must be one of"),
        ({"num_tasks": 2, "pairs": "none"}, "pairs must be one of"),
        ({"num_tasks": 2, "lamb": -1.0}, "lamb"),
        ({"num_tasks": 2, "initial": 100.0}, "initial"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LDCMTL(**arguments)
