"""STCH: the smooth maximum of losses, or of their logarithms over a nadir."""

from __future__ import annotations

import copy

import pytest
import torch
from training import Training

from igb_kernels import ops
from igb_kernels.losses import STCH

LOSSES = torch.tensor([[1.0, 8.0], [3.0, 4.0], [2.0, 6.0], [0.5, 2.0]], dtype=torch.float64)
PREFERENCE = torch.tensor([0.7, 0.3], dtype=torch.float64)


def gradient(objective, losses):
    losses = losses.clone().requires_grad_()
    return torch.autograd.grad(objective(losses), losses)[0]


def step_scales(rule, losses, backend):
    return Training(rule, backend, None).step(losses).scales


@pytest.mark.parametrize("mu", [0.3, 1.0, 20.0])
def test_default_is_the_smooth_maximum_of_equal_shares(backend, mu):
    expected = gradient(lambda v: mu * torch.logsumexp(v / 2 / mu, dim=0), LOSSES[0])
    torch.testing.assert_close(step_scales(STCH(mu), LOSSES[0], backend), expected)


def test_preference_and_ideal(backend):
    ideal = torch.tensor([0.5, -2.0], dtype=torch.float64)
    rule = STCH(2.0, preference=PREFERENCE, ideal=ideal)
    expected = gradient(lambda v: 2 * torch.logsumexp(PREFERENCE * (v - ideal) / 2, dim=0), LOSSES[0])
    torch.testing.assert_close(step_scales(rule, LOSSES[0], backend), expected)


@pytest.mark.parametrize("preference", [None, PREFERENCE])
def test_given_nadir(backend, preference):
    nadir = torch.tensor([2.0, 5.0], dtype=torch.float64)
    shares = torch.ones(2) if preference is None else preference
    expected = gradient(lambda v: 2 * 0.5 * torch.logsumexp(shares * (v / nadir).log() / 0.5, dim=0), LOSSES[1])
    rule = STCH(0.5, preference=preference, nadir=nadir)
    torch.testing.assert_close(step_scales(rule, LOSSES[1], backend), expected)


@pytest.mark.parametrize("nadir_epoch", [0, 1])
def test_nadir_of_an_epoch(backend, nadir_epoch):
    """The mean over that epoch; until its end the rule is the logarithm."""
    training = Training(STCH(0.5, nadir_epoch=nadir_epoch), backend, None)
    for epoch in range(nadir_epoch + 1):
        steps = LOSSES[: 2 + epoch]
        for losses, result in zip(steps, training.epoch(steps), strict=True):
            torch.testing.assert_close(result.scales, 1 / losses)
    nadir = LOSSES[: 2 + nadir_epoch].mean(dim=0)
    torch.testing.assert_close(training.rule.nadir, nadir)
    for result in training.epoch([LOSSES[3]] * 2):  # later epochs leave it
        torch.testing.assert_close(result.scales, 2 * torch.softmax(2 * (LOSSES[3] / nadir).log(), dim=0) / LOSSES[3])
    training.balancer.end_epoch()
    torch.testing.assert_close(training.rule.nadir, nadir)


def test_steps_that_cannot_be_used_do_not_count(backend):
    training = Training(STCH(nadir_epoch=0), backend, None)
    for losses in (LOSSES[0], [torch.nan, 1.0], [-1.0, 1.0], LOSSES[1]):
        training.step(losses)
    training.balancer.end_epoch()
    torch.testing.assert_close(training.rule.nadir, LOSSES[:2].mean(dim=0))


@pytest.mark.parametrize("of_logs", [0.0, 1.0])
@pytest.mark.parametrize("mu", [1e-300, 1e-3, 1e3])
def test_extreme_losses(backend, mu, of_logs):
    losses = torch.tensor([1e300, 1e-300, 1.0], dtype=torch.float64)
    per_task = torch.tensor([[1.0, 0.5, 0.0], [1.0, 1.0, 1e-300]], dtype=torch.float64)
    scales, status = ops.loss_scales("stch", losses, per_task, mu=mu, of_logs=of_logs, backend=backend)
    assert (scales.isfinite() & (scales >= 0)).all()
    assert float(scales[2]) == 0.0  # of no preference
    assert status == 0


def test_a_common_shift_changes_nothing(backend):
    """Nor does any that the exponentials of a plain sum could not take."""
    scales = [step_scales(STCH(0.1), LOSSES[0] + shift, backend) for shift in (0.0, 1024.0, -4096.0)]
    torch.testing.assert_close(scales[1], scales[0], rtol=1e-9, atol=0)
    torch.testing.assert_close(scales[2], scales[0], rtol=1e-9, atol=0)


def test_with_a_nadir_the_update_is_free_of_the_losses_units(backend):
    factors = torch.tensor([1e-4, 1e3], dtype=torch.float64)
    nadir = torch.tensor([2.0, 5.0], dtype=torch.float64)
    before = step_scales(STCH(nadir=nadir), LOSSES[0], backend)
    after = step_scales(STCH(nadir=factors * nadir), factors * LOSSES[0], backend)
    torch.testing.assert_close(factors * after, before)


def rules():
    return [STCH(2.0, preference=PREFERENCE, ideal=[0.1, 0.2]), STCH(nadir_epoch=1), STCH(nadir=[1.0, 2.0])]


@pytest.mark.parametrize("which", range(3))
def test_state_dict(backend, which):
    first = Training(rules()[which], backend, None)
    for losses in LOSSES:
        second = Training(rules()[which], backend, None)
        second.balancer.load_state_dict(copy.deepcopy(first.balancer.state_dict()))
        found = []
        for training in (first, second):
            result = training.step(losses)
            training.balancer.end_epoch()
            found += [result.scales, training.step(LOSSES[0]).scales]
        assert torch.equal(torch.stack(found[:2]), torch.stack(found[2:]))


@pytest.mark.parametrize("which", range(3))
def test_everything_stays_in_place(backend, which):
    """Where the replays of a CUDA graph read it; and the host decides nothing."""
    training = Training(rules()[which], backend, None)
    training.epoch(LOSSES[:1])

    def addresses():
        measured = training.rule.state_dict()["measured"] or {}
        return [t.data_ptr() for t in (training.rule.per_task(), *measured.values()) if isinstance(t, torch.Tensor)]

    before = addresses()
    training.epoch(LOSSES[1:2])
    training.epoch(LOSSES[2:3])
    assert addresses() == before
    assert training.rule.host_decision() is None


def test_a_state_that_does_not_fit_is_refused(backend):
    training = Training(STCH(), backend, None)
    training.step(LOSSES[0])
    state = training.rule.state_dict()
    with pytest.raises(ValueError, match="nadir_epoch is 1"):
        STCH(nadir_epoch=1).load_state_dict(state)
    with pytest.raises(ValueError, match="preference must have one number for each of the 2 tasks, found 3"):
        STCH(preference=[1.0, 1.0, 1.0]).load_state_dict(state)


@pytest.mark.parametrize("name", ["preference", "ideal", "nadir"])
def test_numbers_for_another_number_of_tasks_are_refused(backend, name):
    with pytest.raises(ValueError, match=f"{name} must have one number for each of the 2 tasks, found 3"):
        step_scales(STCH(**{name: [1.0, 1.0, 1.0]}), LOSSES[0], backend)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mu": 0.0}, "mu"),
        ({"preference": [0.0, 0.0]}, "preference"),
        ({"preference": [1.0, -1.0]}, "preference"),
        ({"ideal": [1.0, float("nan")]}, "ideal"),
        ({"nadir": [1.0, 0.0]}, "nadir must be positive"),
        ({"nadir_epoch": -1}, "nadir_epoch"),
        ({"nadir_epoch": 1, "nadir": [1.0, 1.0]}, "exclude"),
        ({"ideal": [1.0, 1.0], "nadir": [1.0, 1.0]}, "exclude"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        STCH(**arguments)
