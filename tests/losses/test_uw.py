"""UW: learned log-variances t, dt = 1/2 − exp(−t) L / 2."""

from __future__ import annotations

import pytest
import torch
from training import Quadratics, Training

from igb_kernels import IMTLL
from igb_kernels.losses import UW


def with_log_variances(*values):
    rule = UW(len(values), dtype=torch.float64)
    with torch.no_grad():
        rule.log_variances.copy_(torch.tensor(values))
    return rule


def test_gradient_is_autograd_s(backend):
    rule, losses = with_log_variances(0.5, -1.0), torch.tensor([2.0, 3.0], dtype=torch.float64)
    objective = ((-rule.log_variances).exp() * losses / 2 + rule.log_variances / 2).sum()
    (expected,) = torch.autograd.grad(objective, rule.log_variances)
    for times in (1, 2):
        result = Training(rule, backend, None).step(losses)
        torch.testing.assert_close(rule.log_variances.grad, times * expected)
    torch.testing.assert_close(result.scales, (-rule.log_variances.detach()).exp() / 2)


def test_log_losses_are_the_fixed_point(backend):
    rule = UW(2, dtype=torch.float64)
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.5)
    training = Training(rule, backend, None)
    for _ in range(200):
        optimizer.zero_grad()
        result = training.step([0.5, 4.0])
        optimizer.step()
    torch.testing.assert_close(rule.log_variances.detach(), result.losses.log())
    torch.testing.assert_close(result.scales, 1 / (2 * result.losses))


@pytest.mark.parametrize("loss", [0.0, -1.0])
def test_a_loss_that_is_not_positive_drives_it_no_further_than_the_clamp(backend, loss):
    """And back it comes when the loss does, at once."""
    rule = with_log_variances(-20.5, 0.0)
    training = Training(rule, backend, None)
    result = training.step([loss, 1.0])
    assert rule.log_variances.grad.tolist() == [0.0, 0.0]
    assert float(result.scales[0]) == pytest.approx(0.5 * float(torch.tensor(20.0).double().exp()))
    training.step([1.0, 1.0])
    assert float(rule.log_variances.grad[0]) < -1


@pytest.mark.parametrize(("rule", "sign"), [(UW, 1.0), (IMTLL, -1.0)])
def test_the_clamp_of_learned_scales_is_symmetric(backend, rule, sign):
    """20 is held where the gradient leads up, and left where it leads down."""
    learned = rule(2, dtype=torch.float64)
    with torch.no_grad():
        learned.parameter.copy_(torch.tensor([sign * 21.0, sign * 21.0]))
    Training(learned, backend, None).step([1e12, 1.0])
    assert float(learned.parameter.grad[0]) == 0.0
    assert sign * float(learned.parameter.grad[1]) > 0


def test_it_is_imtl_l_mirrored(backend):
    """2 φ(−t) of UW is φ(t) of IMTL-L."""
    ours, theirs = with_log_variances(0.3, -2.0), IMTLL(2, dtype=torch.float64)
    theirs.load_state_dict({"log_scales": -ours.log_variances.detach()})
    results = [Training(rule, backend, None).step([2.0, 0.1]) for rule in (ours, theirs)]
    torch.testing.assert_close(2 * results[0].scales, results[1].scales)
    torch.testing.assert_close(2 * ours.log_variances.grad, -theirs.log_scales.grad)


def test_training(backend):
    """Weights settle at 1 / (2 L), in whatever units."""
    rule = UW(2, -0.5, dtype=torch.float64)
    training = Quadratics(rule, backend)
    assert training.balancer.param_groups() == [{"params": [rule.log_variances], "lr": 0.025}]
    assert rule.log_variances.tolist() == [-0.5, -0.5]
    result = training.train(1500)[-1]
    torch.testing.assert_close(result.scales, 1 / (2 * result.losses), rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0,), "num_tasks"), ((2, 30.0), "initial .* 30"), ((2, float("nan")), "initial .* nan")],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        UW(*arguments)
