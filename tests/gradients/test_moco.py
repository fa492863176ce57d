"""MoCo: projected steps on the Gramian of moving averages."""

from __future__ import annotations

import pytest
import torch
from golden import cases, linear_losses
from samplers import gramian

from igb_kernels import Balancer, MoCo, ops


def averages(steps, beta, sigma):
    """Y of each step, by the definition."""
    average = torch.zeros_like(steps[0].jacobian)
    for t, step in enumerate(steps, 1):
        norms = step.jacobian.norm(dim=1)
        units = step.jacobian / (norms + 1e-8)[:, None]  # as LibMTL guards the division
        average = average - beta / t**sigma * (average - step.losses[:, None] * units)
        yield average


@pytest.mark.parametrize("case", cases("moco__libmtl"))
def test_a_balancer_s_updates(case, backend):
    """The averages of normalised gradients, too, are those of the original."""
    size = case.steps[0].jacobian.shape[1]
    parts = [torch.zeros(n, dtype=torch.float64, requires_grad=True) for n in (size // 3, size - size // 3)]
    balancer = Balancer(MoCo(parity="libmtl"), shared=parts, backend=backend)
    for step in case.steps:
        result = balancer.backward(linear_losses(torch.cat(parts), step.jacobian, step.losses))
        step.assert_update(torch.cat([p.grad for p in parts]))
        torch.testing.assert_close(result.gram.diagonal().sqrt(), result.norms)
        for p in parts:
            p.grad = None


def test_plain_gradients_are_averaged_if_asked_for(backend):
    parameter = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    losses = torch.tensor([3.0, 0.5], dtype=torch.float64)
    balancer = Balancer(MoCo(beta=0.4, normalize=False), shared=[parameter], backend=backend)
    result = balancer.backward(linear_losses(parameter, rows, losses))
    torch.testing.assert_close(result.gram, 0.16 * rows @ rows.T)
    torch.testing.assert_close(parameter.grad, 0.4 * result.weights @ rows)


def test_a_step_that_is_not_finite_is_not_averaged(backend):
    parameter = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    harmed = rows.clone()
    harmed[1, 2] = torch.nan
    losses = torch.tensor([3.0, 0.5], dtype=torch.float64)
    results = []
    for middle in ([], [harmed]):
        balancer = Balancer(MoCo(), shared=[parameter], backend=backend)
        for given in [rows, *middle, 2 * rows]:
            parameter.grad = None
            result = balancer.backward(linear_losses(parameter, given, losses))
            assert bool(parameter.grad.isnan().any()) == (given is harmed)
        results.append((result.weights, parameter.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("case", cases("moco__libmtl"))
def test_updates_of_the_original(case, backend):
    options = MoCo(parity="libmtl").options()
    assert {name: options[name] for name in case.params} == case.params
    state = ops.SOLVERS["moco"].new_state(len(case.steps[0].losses), torch.device("cpu"))
    assert case.trust
    for step, rows in zip(case.steps, averages(case.steps, options["beta"], options["beta_sigma"]), strict=True):
        weights, _ = ops.solve("moco", gramian(rows), state=state, backend=backend, **options)
        step.assert_update(rows.T @ weights)


def test_the_decay_is_that_of_the_next_step(backend):
    method = MoCo(beta=0.8, beta_sigma=0.25)
    method.start(2, torch.device("cpu"))
    for t in (1, 2, 3):
        assert float(method.ema_decay()) == pytest.approx(1 - 0.8 / t**0.25)
        ops.solve("moco", torch.eye(2).double(), state=method.state, backend=backend, **method.options())
    greedy = MoCo(beta=3.0)
    greedy.start(2, torch.device("cpu"))
    assert float(greedy.ema_decay()) == 0.0


@pytest.mark.parametrize(("parity", "near"), [(None, 0.92), ("libmtl", 0.52)])
def test_weights_follow_the_min_norm_solution(backend, parity, near):
    """LibMTL's softmax draws them back to equal ones in every step; the projection does not."""
    gram = torch.tensor([[1.0, 0.0], [0.0, 11.5]], dtype=torch.float64)  # min-norm weights 0.92, 0.08
    options = {**MoCo(gamma=0.05, gamma_sigma=0.0, parity=parity).options()}
    state = ops.SOLVERS["moco"].new_state(2, torch.device("cpu"))
    for _ in range(300):
        weights, _ = ops.solve("moco", gram, state=state, backend=backend, **options)
    if parity is None:
        assert float(weights[0]) == pytest.approx(near, abs=1e-3)
    else:
        assert float(weights[0]) < 0.7


@pytest.mark.parametrize("tasks", [1, 2, 5, 64])
def test_weights_are_on_the_simplex(backend, tasks):
    rows = torch.randn(tasks, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(tasks))
    state = ops.SOLVERS["moco"].new_state(tasks, torch.device("cpu"))
    for _ in range(5):
        weights, _ = ops.solve("moco", gramian(rows), state=state, backend=backend, gamma=1.0)
        assert (weights >= 0).all()
        assert float(weights.sum()) == pytest.approx(1)


@pytest.mark.parametrize(
    "arguments", [{"beta": 0.0}, {"beta_sigma": -1.0}, {"gamma": -1.0}, {"rho": -1.0}, {"parity": "torchjd"}]
)
def test_bad_arguments(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name} must be"):
        MoCo(**arguments)
