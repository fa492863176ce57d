"""FAMO: softmax(ξ − log D), with ξ taught by how far the log losses fall in the optimizer's step."""

from __future__ import annotations

import copy
import logging
from itertools import pairwise

import pytest
import torch
from training import Quadratics, Training

from igb_kernels import Balancer, Status, ops
from igb_kernels._log import warn_once
from igb_kernels.losses import FAMO

LOSSES = torch.tensor([[1.0, 8.0], [0.9, 6.0], [0.8, 5.0], [0.7, 4.9]], dtype=torch.float64)
"""Of four steps, each before its optimizer's step; after it they are those of the next, about."""


def told(training, losses, after):
    result = training.step(losses)
    training.balancer.after_step(torch.as_tensor(after, dtype=torch.float64))
    return result


def test_first_weights_equalise_log_losses(backend):
    scales = Training(FAMO(), backend, None).step(LOSSES[0]).scales
    torch.testing.assert_close(scales, 1 / (LOSSES[0] + 1e-8) / (1 / (LOSSES[0] + 1e-8)).sum())


@pytest.mark.parametrize("lower", [0.0, 0.05, [0.02, 0.08]])
def test_training_is_the_algorithm_s(backend, lower):
    """Of the paper, in plain PyTorch: weights under autograd, and PyTorch's own Adam on ξ."""
    ours, plain = Quadratics(FAMO(1e-2, 0.1, lower=lower), backend), Quadratics("none")
    results = ours.train(30)

    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([logits], lr=0.1, weight_decay=1e-2)
    lower = torch.as_tensor(lower, dtype=torch.float64)
    for result in results:
        plain.optimizer.zero_grad()
        excess = torch.stack(plain.losses()) - lower + 1e-8
        weights = logits.softmax(0)
        scale = (weights / excess).sum().detach()
        (weights.detach() * excess.log() / scale).sum().backward()
        torch.testing.assert_close(result.scales, (weights / excess / scale).detach(), rtol=1e-9, atol=0)
        assert float(result.scales.sum()) == pytest.approx(1, rel=1e-12)
        plain.optimizer.step()
        with torch.no_grad():
            fall = excess.log() - (torch.stack(plain.losses()) - lower + 1e-8).log()
        adam.zero_grad()
        (logits.grad,) = torch.autograd.grad(weights, logits, fall)
        adam.step()
    torch.testing.assert_close(ours.parameters.detach(), plain.parameters.detach(), rtol=1e-9, atol=0)
    assert ours.balancer.param_groups() == []  # ξ is its own


def test_what_fell_least_gains_weight(backend):
    """By about the learning rate, as Adam's first step does; but not in the step that has been taken."""
    training = Training(FAMO(), backend, None)
    told(training, LOSSES[0], [1.0, 4.0])
    assert training.rule.logits.tolist() == [0.0, 0.0]
    training.step(LOSSES[1])
    assert training.rule.logits.tolist() == pytest.approx([0.025, -0.025], rel=1e-5)


def test_an_equal_fall_teaches_nothing(backend):
    training = Training(FAMO(gamma=0.0), backend, None)
    told(training, 1e4 * LOSSES[0], 5e3 * LOSSES[0])  # large against the 1e-8 under the logarithm
    training.step(LOSSES[1])
    assert training.rule.logits.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("after", [[torch.nan, 1.0], [torch.inf, 1.0], [-1.0, 1.0]])
def test_losses_that_cannot_be_used_teach_nothing(backend, after):
    """As if they had not been told; and also of a step that could not be used."""
    found = []
    for spoil in (False, True):
        training = Training(FAMO(), backend, None)
        told(training, LOSSES[0], LOSSES[1])
        training.step(LOSSES[1])
        if spoil:
            training.balancer.after_step(torch.tensor(after, dtype=torch.float64))
        told(training, LOSSES[2], LOSSES[3])
        if spoil:
            bad = told(training, after, [0.1, 0.1])
            assert bad.scales.isnan().all()
            assert bad.flags & (Status.NON_FINITE | Status.NON_POSITIVE_LOSS)
        training.step(LOSSES[3])
        found.append(training.rule.state)
    assert training.rule.logits.any()
    assert torch.equal(*found)


def test_a_step_with_a_gradient_that_is_not_finite_teaches_nothing(backend):
    """Its losses are finite, and so are those told after it: the optimizer's step has been skipped."""
    found = []
    for spoil in (False, True):
        training = Training(FAMO(), backend)
        told(training, LOSSES[0], LOSSES[1])
        if spoil:
            result = training.step(LOSSES[3], ((1.0, torch.nan, 2.0), (0.0, 3.0, 1.0)))
            assert Status.NON_FINITE in result.flags
            training.balancer.after_step(torch.tensor([5.0, 0.1]))
        training.step(LOSSES[1])
        found.append(training.rule.state)
    assert torch.equal(*found)


def test_losses_before_any_usable_step_teach_nothing(backend):
    training = Training(FAMO(), backend, None)
    told(training, [torch.nan, 1.0], LOSSES[1])
    training.step(LOSSES[0])
    assert not training.rule.logits.any()


def test_steps_whose_fall_is_not_told_teach_nothing(backend):
    """Nor does a fall count twice."""
    training = Training(FAMO(), backend, None)
    for losses in LOSSES[:3]:
        training.step(losses)
        assert not training.rule.logits.any()
    training.balancer.after_step(LOSSES[3])
    training.step(LOSSES[3])
    taught = training.rule.logits
    assert taught.any()
    training.step(LOSSES[2])
    assert torch.equal(training.rule.logits, taught)


def test_only_the_first_losses_of_a_step_are_taken(backend):
    """What is told again is not of that step's batch."""
    found = []
    for again in (False, True):
        training = Training(FAMO(), backend, None)
        told(training, LOSSES[0], LOSSES[1])
        if again:
            training.balancer.after_step(LOSSES[3])
        training.step(LOSSES[1])
        found.append(training.rule.state)
    assert torch.equal(*found)


@pytest.mark.parametrize(("excess", "usable"), [(0.0, True), (-0.5e-8, True), (-1e-3, False)])
def test_a_loss_at_its_lower_bound(backend, excess, usable):
    """Takes all weight, but is finite; below, less 1e-8, there is no logarithm."""
    result = Training(FAMO(lower=[0.5, 0.0]), backend, None).step([0.5 + excess, 2.0])
    if usable:
        assert float(result.scales[0]) == pytest.approx(1.0, rel=1e-7)
        assert result.flags == 0
    else:
        assert result.scales.isnan().all()
        assert Status.NON_POSITIVE_LOSS in result.flags


def test_direction_is_free_of_the_losses_units(backend):
    """ξ learns from log losses, which a unit only shifts."""
    factors = torch.tensor([1e-3, 1e4], dtype=torch.float64)
    found = []
    for units in (torch.ones(2, dtype=torch.float64), factors):
        training = Training(FAMO(), backend, None)
        for before, after in pairwise(LOSSES):
            scales = told(training, units * before, units * after).scales
        found.append(units * scales)
    ratio = found[1] / found[0]
    torch.testing.assert_close(ratio[0], ratio[1], rtol=1e-4, atol=0)  # but for the 1e-8 under the logarithm


def test_one_task(backend):
    rule = FAMO()
    balancer = Balancer(rule, shared=[torch.zeros(1, requires_grad=True)], backend=backend)
    for _ in range(3):
        loss = (balancer.shared[0] - 2).square().sum()
        assert balancer.backward([loss]).scales.tolist() == [1.0]
        balancer.after_step([loss])


def test_state_dict(backend):
    """Before and after the losses after the optimizer's step."""
    first = Training(FAMO(), backend, None)

    def copied():
        second = Training(FAMO(), backend, None)
        second.balancer.load_state_dict(copy.deepcopy(first.balancer.state_dict()))
        return second

    for before, after in pairwise(LOSSES):
        waiting = copied()
        assert torch.equal(told(first, before, after).scales, told(waiting, before, after).scales)
        assert torch.equal(waiting.rule.state, first.rule.state)
        assert torch.equal(copied().step(LOSSES[0]).scales, copied().step(LOSSES[0]).scales)
    first.step(LOSSES[0])
    second = copied()
    for training in (first, second):
        training.balancer.after_step(LOSSES[1])
        training.step(LOSSES[1])
    assert torch.equal(second.rule.state, first.rule.state)


def test_the_state_stays_in_place(backend):
    """Where the replays of a CUDA graph read it; and the host decides nothing."""
    training = Training(FAMO(), backend, None)
    told(training, LOSSES[0], LOSSES[1])
    address = training.rule.state.data_ptr()
    told(training, LOSSES[1], LOSSES[2])
    assert training.rule.state.data_ptr() == address
    assert training.rule.host_decision() is None


@pytest.fixture
def _fresh_warnings():
    warn_once.cache_clear()
    yield
    warn_once.cache_clear()


@pytest.mark.usefixtures("_fresh_warnings")
def test_a_step_without_after_step_is_said_once(backend, caplog):
    training = Training(FAMO(), backend, None)
    with caplog.at_level(logging.WARNING):
        for before, after in pairwise(LOSSES):
            told(training, before, after)
        assert not caplog.records
        for losses in LOSSES:
            training.step(losses)
    assert ["after_step" in record.message for record in caplog.records] == [True]
    assert training.rule.logits.isfinite().all()


def test_kernel_and_reference_have_one_state():
    """Over many steps, in which Adam's corrections matter."""
    states = [ops.RULES["famo"].new_state(5, torch.device("cpu")) for _ in range(2)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        losses, after = torch.rand(2, 5, dtype=torch.float64, generator=generator) + 0.1
        found = [
            ops.loss_scales("famo", losses, state=state, backend=backend, gamma=0.1)[0]
            for state, backend in zip(states, ("cpu", "reference"), strict=True)
        ]
        torch.testing.assert_close(*found, rtol=1e-11, atol=0)
        for state in states:
            state[0], state[-5:] = 2.0, after.log()
    torch.testing.assert_close(*states, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": -1.0}, "gamma"),
        ({"lr": float("inf")}, "lr"),
        ({"lower": [[1.0]]}, "lower"),
        ({"lower": float("nan")}, "lower"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        FAMO(**arguments)


def test_lower_bounds_for_another_number_of_tasks_are_refused(backend):
    with pytest.raises(ValueError, match="lower must be one number or 2"):
        Training(FAMO(lower=[0.0, 0.0, 0.0]), backend, None).step(LOSSES[0])


def test_lower_may_be_set(backend):
    """The next step's scales are with it, and so is the fall after it."""
    rules = FAMO(), FAMO(lower=[0.5, 2.0])
    changed, expected = (Training(rule, backend, None) for rule in rules)
    rules[0].lower = torch.tensor([0.5, 2.0])
    for i in range(3):
        found = [told(training, LOSSES[i], LOSSES[i + 1]) for training in (changed, expected)]
        assert torch.equal(found[0].scales, found[1].scales)
    rules[0].lower = 0.0
    assert not torch.equal(changed.step(LOSSES[3]).scales, expected.step(LOSSES[3]).scales)
    for wrong in ([0.0, 0.0, 0.0], [torch.nan, 0.0]):
        with pytest.raises(ValueError, match="lower must be"):
            rules[0].lower = wrong
    assert float(rules[0].lower) == 0
