"""IMTL-L: learned log scales t, ds = exp(t) L − 1."""

from __future__ import annotations

import pytest
import torch
from golden import linear_losses

from igb_kernels import IMTLL, Balancer

ROWS = torch.eye(2, 3, dtype=torch.float64)


def step(rule, losses, backend, parameters=None):
    parameters = torch.zeros(3, dtype=torch.float64, requires_grad=True) if parameters is None else parameters
    balancer = Balancer(rule, shared=[parameters], backend=backend)
    return balancer.backward(linear_losses(parameters, ROWS, torch.tensor(losses, dtype=torch.float64)))


def test_gradient_accumulates_as_autograd_s_would(backend):
    rule = IMTLL(2, dtype=torch.float64)
    with torch.no_grad():
        rule.log_scales.copy_(torch.tensor([0.5, -1.0]))
    losses = torch.tensor([2.0, 3.0], dtype=torch.float64)
    objective = (rule.log_scales.exp() * losses - rule.log_scales).sum()
    (expected,) = torch.autograd.grad(objective, rule.log_scales)
    for times in (1, 2):
        result = step(rule, [2.0, 3.0], backend)
        torch.testing.assert_close(rule.log_scales.grad, times * expected)
    torch.testing.assert_close(result.scales, rule.log_scales.detach().exp())


def test_log_losses_are_the_fixed_point(backend):
    rule = IMTLL(2, dtype=torch.float64)
    optimizer = torch.optim.SGD(rule.parameters(), lr=0.2)
    for _ in range(200):
        optimizer.zero_grad()
        step(rule, [0.5, 4.0], backend)
        optimizer.step()
    torch.testing.assert_close(rule.log_scales.detach(), -torch.tensor([0.5, 4.0], dtype=torch.float64).log())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_has_the_parameter_s_dtype(backend, dtype):
    rule = IMTLL(2, dtype=dtype)
    step(rule, [1.0, 2.0], backend)
    assert rule.log_scales.grad.dtype is dtype


def test_scales_reach_the_shared_gradient(backend):
    parameters = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    rule = IMTLL(2, dtype=torch.float64)
    with torch.no_grad():
        rule.log_scales.copy_(torch.tensor([1.0, -1.0]))
    step(rule, [1.0, 2.0], backend, parameters)
    assert parameters.grad.tolist() == pytest.approx([torch.e, 1 / torch.e, 0.0])


def test_another_number_of_losses_is_refused(backend):
    with pytest.raises(ValueError, match="num_tasks must be the number of losses, 2; found 3"):
        step(IMTLL(3), [1.0, 2.0], backend)


@pytest.mark.parametrize("tasks", [0, -1, 1.5])
def test_bad_arguments(tasks):
    with pytest.raises(ValueError, match="num_tasks must be an integer of at least 1"):
        IMTLL(tasks)
