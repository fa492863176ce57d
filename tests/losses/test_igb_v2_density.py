"""The density of IGBv2's actions: it is one, and that of what is drawn."""

from __future__ import annotations

import math

import pytest
import torch
from golden import cases
from hypothesis import given
from hypothesis import strategies as st

from igb_kernels.agents.simplex import Actor, log_density, official_log_density, weights_of

POLICIES = {
    2: [((0.0, 0.0), (1.0, 1.0)), ((0.5, -0.3), (0.4, 1.5)), ((2.0, 1.0), (0.2, 0.3))],
    3: [((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), ((0.5, -0.3, 0.1), (0.5, 0.9, 0.7))],
}
every_policy = pytest.mark.parametrize(("mean", "std"), [policy for K in POLICIES for policy in POLICIES[K]])


def grid(K, points):
    """Weights [points^(K − 1), K] of sum K that lie in the middles of equal cells, and a cell's volume."""
    side = (torch.arange(points, dtype=torch.float64) + 0.5) * K / points
    free = torch.cartesian_prod(*[side] * (K - 1)).reshape(-1, K - 1)
    weights = torch.cat([free, K - free.sum(dim=1, keepdim=True)], dim=1)
    return weights, (K / points) ** (K - 1)


def density(weights, mean, std):
    """0 outside of the simplex."""
    inside = weights[:, -1] > 0
    u = weights.clamp_min(1e-300).log()
    return torch.where(inside, log_density(u, mean.expand_as(u), std.log().expand_as(u)).exp(), 0.0)


@every_policy
def test_it_integrates_to_one(mean, std):
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (mean, std))
    weights, volume = grid(len(mean), {2: 20000, 3: 1200}[len(mean)])
    assert float(density(weights, mean, std).sum() * volume) == pytest.approx(1, abs=2e-3)


@every_policy
def test_it_matches_a_histogram(mean, std):
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (mean, std))
    K, cells, fine, samples = len(mean), 12, {2: 1200, 3: 50}[len(mean)], 400_000
    noise = torch.randn(samples, K, dtype=torch.float64, generator=torch.Generator().manual_seed(K))
    drawn = weights_of(mean + std * noise)[:, : K - 1]
    found, _ = torch.histogramdd(drawn, [cells] * (K - 1), range=[0.0, float(K)] * (K - 1))
    weights, volume = grid(K, cells * fine)
    expected = (density(weights, mean, std) * volume).reshape((cells, fine) * (K - 1))
    expected = expected.sum(dim=tuple(range(1, 2 * (K - 1), 2)))
    standard_error = (expected * (1 - expected) / samples).sqrt()
    assert ((found / samples - expected).abs() <= 5 * standard_error + 5e-4).all()


@every_policy
def test_it_is_the_normal_density_with_the_shift_integrated_out(mean, std):
    """Independently: over all u that give the same weights, ∫ N(u + c) dc, over the softmax's volume."""
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (mean, std))
    K, u = len(mean), torch.linspace(-1, 0.7, len(mean), dtype=torch.float64)
    shifts = torch.linspace(-40, 40, 400_001, dtype=torch.float64)[:, None]
    normal = torch.distributions.Normal(mean, std).log_prob(u + shifts).sum(dim=1).exp()
    integral = float(torch.trapezoid(normal, shifts[:, 0]))
    expected = math.log(integral) - float(torch.log_softmax(u, 0).sum()) - (K - 1) * math.log(K)
    assert float(log_density(u, mean, std.log())) == pytest.approx(expected, rel=1e-9)


numbers = st.lists(st.floats(-5, 5), min_size=3, max_size=3).map(lambda v: torch.tensor(v, dtype=torch.float64))


@given(numbers, numbers, numbers, st.floats(-10, 10))
def test_a_common_shift_and_the_tasks_order_do_not_matter(u, mean, log_std, shift):
    order = torch.tensor([2, 0, 1])
    expected = log_density(u, mean, log_std)
    torch.testing.assert_close(log_density(u + shift, mean, log_std), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_density(u[order], mean[order], log_std[order]), expected)


@pytest.mark.parametrize("tasks", [2, 100])
@pytest.mark.parametrize("log_std", [-20.0, 2.0])
def test_it_is_finite_and_differentiable_at_the_bounds(tasks, log_std):
    generator = torch.Generator().manual_seed(0)
    mean, noise = (torch.randn(tasks, generator=generator) for _ in range(2))
    mean.requires_grad_()
    spread = torch.full((tasks,), log_std, requires_grad=True)
    density = log_density(mean + spread.exp() * noise, mean, spread)
    density.backward()
    assert all(bool(v.isfinite().all()) for v in (density, mean.grad, spread.grad))


@pytest.mark.parametrize("case", cases("igbv2_policy__igb4mtl"))
def test_golden(case):
    torch.testing.assert_close(weights_of(case.u), case.action, rtol=1e-5, atol=0.0)
    found = official_log_density(case.u, case.mu, case.std.log())
    torch.testing.assert_close(found, case.logp_official, rtol=1e-4, atol=1e-4)


def test_an_actor_draws_from_its_networks():
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (4,), (5, 4), (5,), (3, 5), (3,), (3, 5), (3,)]
    layers = [torch.randn(shape, generator=generator) for shape in shapes]
    state, noise = torch.tensor([0.5, 2.0, -1.0]), torch.tensor([0.3, -1.0, 1.0])
    h = state
    for weight, bias in zip(layers[:4:2], layers[1:4:2], strict=True):
        h = (weight @ h + bias).clamp_min(0)
    mean, log_std = layers[4] @ h + layers[5], (layers[6] @ h + layers[7]).clamp(-20, 2)
    expected = 3 * torch.softmax(mean + log_std.exp() * noise, 0)
    torch.testing.assert_close(Actor(layers)(state, noise), expected)
