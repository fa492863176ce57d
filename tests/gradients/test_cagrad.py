"""CAGrad: the update of a ball around the mean gradient that helps the worst task most."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optimality import KKT, extended, length, projections
from samplers import FAMILIES, WELL_POSED, gramian, jacobian
from tolerances import SOLVER
from variants import Variant, update_distance

from igb_kernels import CAGrad, Status, ops

STATIONARY = ("opposed", "rank deficient")


def cagrad(c=0.5, rescale=0):
    return Variant("cagrad", {"c": c, "rescale": rescale})


def assert_optimal(gram, weights, status, c):
    """d − g0 is a nonnegative combination of the gradients on which g_k · d is least, and as long as allowed."""
    active = gram.diagonal().numpy() > 0
    mean = extended(torch.full((len(gram),), 1 / len(gram), dtype=torch.float64))
    added = extended(weights) - mean
    radius, found = c * length(gram, mean), length(gram, added)
    rounding = 1e-14 * float(gram.diagonal().sqrt().mean())  # of 1 / K in the weights
    if Status.PARETO_STATIONARY in status:
        assert found <= radius * (1 + KKT) + rounding
    else:
        assert abs(found - radius) <= KKT * radius + rounding
    shares = added * extended(gram.diagonal().sqrt())
    assert shares.min() >= -1e-14
    used = active & (shares > 1e-9 * shares.max()) & (shares > rounding)
    if used.any():
        reached, scale = projections(gram, weights)
        level = reached[used][scale[used].argmin()]  # where rounding moves it least
        assert abs((reached - level) / scale)[used].max() <= KKT
        assert ((reached - level) / scale)[active].min() >= -KKT


@pytest.mark.parametrize("c", [0.1, 0.5, 0.95])
@pytest.mark.parametrize("tasks", [1, 2, 3, 5, 8, 16, 64])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "all zero"])
def test_optimality(backend, family, tasks, c):
    for seed in range(2):
        gram = gramian(jacobian(family, tasks, seed))
        if not gram.any():
            continue
        weights, status = cagrad(c).solve(gram, backend=backend)
        assert_optimal(gram, weights, status, c)
        if family not in STATIONARY:
            assert status & ~Status.ZERO_GRADIENT == 0


@given(st.sampled_from(WELL_POSED), st.integers(1, 20), st.integers(0, 999), st.floats(0.01, 2))
def test_random_problems(backend, family, tasks, seed, c):
    gram = gramian(jacobian(family, tasks, seed))
    weights, status = cagrad(c).solve(gram, backend=backend)
    assert status == 0
    assert_optimal(gram, weights, status, c)


@pytest.mark.parametrize("family", ["random", "rows 1e-3..1e3"])
@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_no_other_update_of_the_ball_helps_the_worst_task_more(backend, family, tasks):
    rows = jacobian(family, tasks)
    weights, _ = cagrad().solve(gramian(rows), backend=backend)
    mean = rows.mean(dim=0)
    best = float((rows @ (rows.T @ weights)).min())
    generator = torch.Generator().manual_seed(0)
    for step in (1.0, 0.1, 0.01):
        around = rows.T @ weights - mean if step < 1 else torch.zeros_like(mean)
        others = around + step * mean.norm() * torch.randn(500, len(mean), dtype=torch.float64, generator=generator)
        others *= 0.5 * mean.norm() / others.norm(dim=1, keepdim=True)
        assert (rows @ (mean + others).T).min(dim=0).values.max() <= best + 1e-12 * abs(best)


def test_two_orthogonal_gradients_in_closed_form(backend):
    """The radius goes to the shorter one until both are reached equally."""
    rows = torch.diag(torch.tensor([1.0, 1.0], dtype=torch.float64))
    weights, _ = cagrad(0.5).solve(gramian(rows), backend=backend)
    torch.testing.assert_close(weights, torch.full((2,), 0.75, dtype=torch.float64), rtol=1e-14, atol=0)
    rows[1, 1] = 1e3
    weights, _ = cagrad(0.5).solve(gramian(rows), backend=backend)
    assert float(weights[0]) == pytest.approx(0.5 + 0.25 * (1 + 1e6) ** 0.5, rel=1e-13)
    assert weights[1] == 0.5


@pytest.mark.parametrize("tasks", [1, 2, 8])
def test_a_ball_without_radius_is_the_mean(backend, tasks):
    weights, status = cagrad(0.0).solve(gramian(jacobian("random", tasks)), backend=backend)
    assert torch.equal(weights, torch.full((tasks,), 1 / tasks, dtype=torch.float64))
    assert status == 0


@pytest.mark.parametrize(("rescale", "divisor"), [(0, 1.0), (1, 1.16), (2, 1.4)])
def test_one_task_and_rescaling(backend, rescale, divisor):
    weights, _ = cagrad(0.4, rescale).solve(torch.tensor([[9.0]]).double(), backend=backend)
    assert float(weights) == pytest.approx(1.4 / divisor, rel=1e-14)
    gram = gramian(jacobian("random", 3))
    plain, _ = cagrad(0.4).solve(gram, backend=backend)
    torch.testing.assert_close(cagrad(0.4, rescale).solve(gram, backend=backend)[0], plain / divisor)


@pytest.mark.parametrize("family", ["random", "spread 1e-2..1e2", "rows 1e-3..1e3"])
@pytest.mark.parametrize("factor", [1e-3, 1e-6, 1e8])
def test_gradients_of_any_length(backend, family, factor):
    """Peers return 0 where |J| < 0.01 or lengths are unequal, or are wrong by half."""
    rows = jacobian(family, 5)
    weights, status = cagrad().solve(gramian(factor * rows), backend=backend)
    assert update_distance(rows, weights, cagrad().solve(gramian(rows), backend=backend)[0]) <= SOLVER
    assert_optimal(gramian(factor * rows), weights, status, 0.5)
    assert (rows.T @ weights).norm() >= 0.5 * rows.mean(dim=0).norm()


def test_opposed_gradients_get_the_nearest_update_that_ascends_none(backend):
    """DualProj's, where it lies inside the ball."""
    for tasks in (3, 8):
        gram = gramian(rows := jacobian("opposed", tasks))
        weights, status = cagrad(0.95).solve(gram, backend=backend)
        assert status == Status.PARETO_STATIONARY
        assert update_distance(rows, weights, Variant("dual_proj").solve(gram, backend=backend)[0]) <= 1e-9


def test_a_mean_of_zero_allows_no_update(backend):
    rows = torch.tensor([[3.0, 4.0], [-3.0, -4.0]], dtype=torch.float64)
    weights, status = cagrad().solve(gramian(rows), backend=backend)
    assert torch.equal(weights, torch.full((2,), 0.5, dtype=torch.float64))
    assert status == Status.PARETO_STATIONARY


def test_a_task_without_gradient_counts_in_the_mean_alone(backend):
    rows = jacobian("zero row", 3)
    weights, status = cagrad().solve(gramian(rows), backend=backend)
    assert status == Status.ZERO_GRADIENT
    assert weights[1] == 1 / 3
    alone, _ = cagrad().solve(gramian(rows[[0, 2]]), backend=backend)
    torch.testing.assert_close(weights[[0, 2]], alone * 2 / 3, rtol=1e-13, atol=0)


def test_a_short_gradient_in_single_precision_is_not_lost(backend):
    """Norms 1e6 : 1, in conflict: the update descends the short one as much as the ball allows."""
    rows = jacobian("random", 2).float()
    rows[1] = -rows[0] + 0.3 * rows[1]
    rows[0] *= 1e6
    weights, status = cagrad().solve(ops.gram(rows, backend=backend), backend=backend)
    exact, _ = cagrad().solve(gramian(rows.double()), backend=backend)
    assert status == 0
    assert weights[1] > 1e4
    assert update_distance(rows.double(), weights, exact) <= 1e-6


@pytest.mark.parametrize("tasks", [2, 3, 8, 16])
@pytest.mark.parametrize("family", ["duplicates", "opposed", "rank deficient"])
def test_singular_gramians_have_one_update(family, tasks):
    rows = jacobian(family, tasks)
    (cpu, cpu_status), (reference, status) = (cagrad().solve(gramian(rows), backend=b) for b in ("cpu", "reference"))
    assert update_distance(rows, cpu, reference) <= SOLVER
    assert cpu_status == status


def test_arguments():
    with pytest.raises(ValueError, match="c must be"):
        CAGrad(-0.1)
    with pytest.raises(ValueError, match="rescale must be one of"):
        CAGrad(rescale=3)
