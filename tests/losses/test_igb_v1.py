"""IGBv1: where its base losses come from."""

from __future__ import annotations

import pytest
import torch
from training import Training

from igb_kernels import IGBv1, Log, Status

LOSSES = torch.tensor([[1.0, 8.0], [3.0, 4.0], [2.0, 6.0], [0.5, 2.0]], dtype=torch.float64)
"""Of four steps."""


def assert_scales(result, losses, base):
    expected = 1 / losses if base is None else len(losses) * torch.softmax(losses / base, dim=0) / losses
    torch.testing.assert_close(result.scales, expected)


@pytest.mark.parametrize("base_epoch", [0, 1, 2])
def test_base_of_an_epoch(backend, base_epoch):
    """The mean over that epoch; until its end the rule is the logarithm."""
    training = Training(IGBv1(base_epoch), backend)
    for epoch in range(base_epoch + 1):
        for losses, result in zip(LOSSES[: 2 + epoch], training.epoch(LOSSES[: 2 + epoch]), strict=True):
            assert_scales(result, losses, None)
    base = LOSSES[: 2 + base_epoch].mean(dim=0)
    torch.testing.assert_close(training.rule.base_losses, base)
    for result in training.epoch([LOSSES[3]] * 2):  # later epochs leave it
        assert_scales(result, LOSSES[3], base)
    assert_scales(training.step(LOSSES[0]), LOSSES[0], base)


@pytest.mark.parametrize("steps", [1, 3])
def test_base_of_the_first_steps(backend, steps):
    training = Training(IGBv1(steps=steps), backend)
    for losses in LOSSES[:steps]:
        assert_scales(training.step(losses), losses, None)
    training.balancer.end_epoch()  # means nothing here
    assert_scales(training.step(LOSSES[3]), LOSSES[3], LOSSES[:steps].mean(dim=0))


def test_given_base(backend):
    training = Training(IGBv1(base_losses=[2.0, 5.0]), backend)
    for losses in LOSSES:
        assert_scales(training.step(losses), losses, torch.tensor([2.0, 5.0], dtype=torch.float64))
    training.balancer.end_epoch()
    assert training.rule.base_losses.tolist() == [2.0, 5.0]


NOT_FINITE = {
    "loss": ([torch.nan, 1.0], ((1.0, 0.0, 2.0), (0.0, 3.0, 1.0))),
    "infinite loss": ([1.0, torch.inf], ((1.0, 0.0, 2.0), (0.0, 3.0, 1.0))),
    "gradient": ([1.0, 1.0], ((1.0, torch.nan, 2.0), (0.0, 3.0, 1.0))),
    "negative loss": ([-1.0, 1.0], ((1.0, 0.0, 2.0), (0.0, 3.0, 1.0))),
}


SEEN = [*(("imtl_g", what) for what in NOT_FINITE), *((None, what) for what in NOT_FINITE if what != "gradient")]
"""Equal weights (None) do not measure gradients."""


@pytest.mark.parametrize(("gradients", "what"), SEEN)
def test_steps_that_are_not_finite_do_not_count(backend, gradients, what):
    training = Training(IGBv1(base_epoch=0), backend, gradients)
    training.step(LOSSES[0])
    result = training.step(*NOT_FINITE[what])
    assert result.flags
    assert Status.ZERO_GRADIENT not in result.flags
    training.step(LOSSES[1])
    training.balancer.end_epoch()
    torch.testing.assert_close(training.rule.base_losses, LOSSES[:2].mean(dim=0))


def test_an_epoch_without_a_finite_step_leaves_the_base_unknown(backend):
    training = Training(IGBv1(base_epoch=0), backend)
    training.epoch([torch.tensor([torch.nan, 1.0])])
    assert training.rule.base_losses.isnan().all()
    assert_scales(training.step(LOSSES[0]), LOSSES[0], None)


def test_a_recorded_base_survives_a_state_dict(backend):
    """Also in the middle of the base epoch."""
    first, second = (Training(IGBv1(base_epoch=0), backend) for _ in range(2))
    first.step(LOSSES[0])
    second.balancer.load_state_dict(first.balancer.state_dict())
    second.step(LOSSES[1])
    second.balancer.end_epoch()
    torch.testing.assert_close(second.rule.base_losses, LOSSES[:2].mean(dim=0))


def test_before_the_base_is_known_it_is_the_logarithm(backend):
    ours, log = Training(IGBv1(), backend), Training(Log(), backend)
    assert torch.equal(ours.step(LOSSES[0]).scales, log.step(LOSSES[0]).scales)
    assert torch.equal(ours.parameters.grad, log.parameters.grad)


REFUSED = [
    ({"base_losses": [1.0, 0.0]}, "base_losses .* positive"),
    ({"base_losses": [1.0, float("inf")]}, "base_losses .* finite"),
    ({"base_losses": [1.0], "steps": 3}, "steps and base_losses"),
    ({"steps": 0}, "steps .* at least 1"),
    ({"base_epoch": -1}, "base_epoch .* at least 0"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        IGBv1(**arguments)


def test_base_losses_for_another_number_of_tasks_are_refused(backend):
    with pytest.raises(ValueError, match=r"base_losses .* 2 tasks, found 3"):
        Training(IGBv1(base_losses=[1.0, 1.0, 1.0]), backend).step(LOSSES[0])


@pytest.mark.parametrize("arguments", [{}, {"base_epoch": 0}, {"steps": 3}, {"base_losses": [1.0, 1.0]}])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_base_losses_may_be_set(backend, arguments, at):
    """At any time, also before the first step; nothing is measured after that."""
    training, base = Training(IGBv1(**arguments), backend), torch.tensor([2.0, 5.0], dtype=torch.float64)
    for i, losses in enumerate(LOSSES):
        if i == at:
            training.rule.base_losses = base
        result = training.step(losses)
        if i >= at:
            assert_scales(result, losses, base)
        training.balancer.end_epoch()
    assert training.rule.base_losses.tolist() == [2.0, 5.0]
    other = Training(IGBv1(**arguments), backend)
    other.balancer.load_state_dict(training.balancer.state_dict())
    assert_scales(other.step(LOSSES[0]), LOSSES[0], base)


@pytest.mark.parametrize(("values", "message"), [([1.0], "2 tasks, found 1"), ([1.0, -1.0], "positive")])
def test_base_losses_that_may_not_be_set(backend, values, message):
    training = Training(IGBv1(base_losses=[2.0, 5.0]), backend)
    training.step(LOSSES[0])
    with pytest.raises(ValueError, match=f"base_losses must .*{message}"):
        training.rule.base_losses = values
    assert training.rule.base_losses.tolist() == [2.0, 5.0]
