"""MGDA: the shortest convex combination of the gradients."""

from __future__ import annotations

import pytest
import torch
from golden import linear_losses
from hypothesis import given
from hypothesis import strategies as st
from optimality import KKT, NO_CONFLICT, conflict, extended, projections
from samplers import FAMILIES, WELL_POSED, gramian, jacobian
from tolerances import SOLVER
from variants import Variant, update_distance

from igb_kernels import Balancer, Status, ops
from igb_kernels.gradients import MGDA

PLAIN, DROPPING = Variant("mgda"), Variant("mgda", {"drop_zero": 1.0})
STATIONARY = ("opposed", "rank deficient")


def assert_shortest(gram, weights, status):
    """w is on the simplex and g_k · d ≥ |d|², with equality where w_k > 0."""
    w = extended(weights)
    assert w.min() >= 0
    assert float(w.sum()) == pytest.approx(1, abs=1e-14)
    found, scale = projections(gram, weights)
    gap = (found - w @ found)[gram.diagonal().numpy() > 0]
    scale = scale[gram.diagonal().numpy() > 0]
    assert (-gap / scale).max() <= KKT
    assert w @ abs(found - w @ found) <= KKT * (w @ projections(gram, weights)[1])
    if Status.PARETO_STATIONARY in status:
        assert w @ found <= 1e-12 * (weights * gram.diagonal().sqrt()).sum() ** 2


@pytest.mark.parametrize("tasks", [1, 2, 3, 5, 8, 16, 64])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "all zero"])
def test_optimality(backend, family, tasks):
    for seed in range(4):
        gram = gramian(jacobian(family, tasks, seed))
        if not gram.any():
            continue
        weights, status = DROPPING.solve(gram, backend=backend)
        assert_shortest(gram, weights, status)
        assert conflict(gram, weights) <= NO_CONFLICT
        if family not in STATIONARY:
            assert status & ~Status.ZERO_GRADIENT == 0


@given(st.sampled_from(WELL_POSED), st.integers(1, 20), st.integers(0, 999))
def test_random_problems(backend, family, tasks, seed):
    gram = gramian(jacobian(family, tasks, seed))
    weights, status = PLAIN.solve(gram, backend=backend)
    assert_shortest(gram, weights, status)
    assert status == 0


@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6), st.floats(-0.99, 0.99))
def test_two_tasks_in_closed_form(backend, first, second, cosine):
    inner = first * second * cosine
    gram = torch.tensor([[first**2, inner], [inner, second**2]], dtype=torch.float64)
    share = min(max((second**2 - inner) / (first**2 + second**2 - 2 * inner), 0.0), 1.0)
    weights, _ = PLAIN.solve(gram, backend=backend)
    torch.testing.assert_close(weights, torch.tensor([share, 1 - share], dtype=torch.float64), rtol=0, atol=1e-12)


def test_orthogonal_gradients(backend):
    """w ∝ 1 / |g|²."""
    squares = torch.tensor([1.0, 4.0, 25.0], dtype=torch.float64)
    weights, _ = PLAIN.solve(torch.diag(squares), backend=backend)
    torch.testing.assert_close(weights, squares**-1 / (squares**-1).sum())


@pytest.mark.parametrize("lengths", [(1.0, 1.0, 1.0), (1e-6, 1.0, 1e6)])
def test_a_vanishing_combination_is_the_answer(backend, lengths):
    """Three directions of sum 0, and a fourth that is not needed."""
    rows = torch.tensor([[1.0, 0.0, 0.0], [-0.5, 0.75**0.5, 0.0], [-0.5, -(0.75**0.5), 0.0], [0.1, 0.2, 3.0]]).double()
    rows[1] = -rows[0] - rows[2]
    rows[:3] *= torch.tensor(lengths, dtype=torch.float64)[:, None]
    weights, status = PLAIN.solve(gramian(rows), backend=backend)
    assert status == Status.PARETO_STATIONARY
    expected = 1 / torch.tensor(lengths, dtype=torch.float64)
    torch.testing.assert_close(weights[:3], expected / expected.sum(), rtol=1e-9, atol=0)
    assert weights[3] <= 1e-12


def test_a_task_without_gradient_takes_all_the_weight_unless_dropped(backend):
    rows = jacobian("zero row", 5)
    weights, status = PLAIN.solve(gramian(rows), backend=backend)
    assert weights.tolist() == [0, 0, 1, 0, 0]
    assert status == Status.ZERO_GRADIENT
    rows[4] = 0
    assert PLAIN.solve(gramian(rows), backend=backend)[0].tolist() == [0, 0, 0.5, 0, 0.5]
    dropped, _ = DROPPING.solve(gramian(rows), backend=backend)
    alone, _ = PLAIN.solve(gramian(rows[[0, 1, 3]]), backend=backend)
    torch.testing.assert_close(dropped[[0, 1, 3]], alone, rtol=1e-13, atol=0)


@pytest.mark.parametrize("factor", [1e-3, 1e8, 1e12])
@pytest.mark.parametrize("tasks", [1, 5])
def test_gradients_of_any_length(backend, tasks, factor):
    """Peers raise for a single task and where squared distances reach 1e8."""
    rows = jacobian("random", tasks)
    weights, status = PLAIN.solve(gramian(factor * rows), backend=backend)
    assert status == 0
    assert update_distance(rows, weights, PLAIN.solve(gramian(rows), backend=backend)[0]) <= SOLVER


def test_a_short_gradient_in_single_precision_is_not_lost(backend):
    """Norms 1e6 : 1, in conflict: the shorter one decides, and the longer one is not ascended."""
    rows = jacobian("random", 3).float()
    rows[1] = -rows[0] + 0.3 * rows[1]
    rows[0] *= 1e6
    gram = ops.gram(rows, backend=backend)
    weights, status = PLAIN.solve(gram, backend=backend)
    assert status == 0
    assert conflict(gramian(rows.double()), weights) <= 1e-6
    assert_shortest(gram, weights, status)
    assert 0 < weights[0] * rows[0].norm() < 2 * rows[1].norm()


def balanced(method, rows, losses, backend):
    parameters = torch.zeros(rows.shape[1], dtype=torch.float64, requires_grad=True)
    result = Balancer(method, "none", shared=[parameters], backend=backend).backward(
        linear_losses(parameters, rows, losses)
    )
    return parameters.grad, result


@pytest.mark.parametrize("normalization", ["none", "l2", "loss", "loss+"])
def test_normalization(backend, normalization):
    """The update is the shortest vector of the normalised gradients' hull; the weights are on the given gradients."""
    rows, losses = jacobian("spread 1e-2..1e2", 4), torch.tensor([0.1, 3.0, 20.0, 1.0], dtype=torch.float64)
    norms = rows.norm(dim=1)
    divisor = {"none": torch.ones(4).double(), "l2": norms, "loss": losses, "loss+": norms * losses}[normalization]
    normalized = rows / divisor[:, None]
    expected = normalized.T @ PLAIN.solve(gramian(normalized), backend=backend)[0]
    update, result = balanced(MGDA(normalization), rows, losses, backend)
    torch.testing.assert_close(update, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(rows.T @ result.weights, update, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("normalization", ["none", "l2", "loss", "loss+"])
def test_weights_on_raw_gradients(backend, normalization):
    """They are the shares of the normalised gradients in the hull's shortest vector."""
    rows, losses = jacobian("spread 1e-2..1e2", 4), torch.tensor([0.1, 3.0, 20.0, 1.0], dtype=torch.float64)
    divisor = {"none": torch.ones(4).double(), "loss": losses}.get(normalization, rows.norm(dim=1))
    divisor = divisor * losses if normalization == "loss+" else divisor
    shares = PLAIN.solve(gramian(rows / divisor[:, None]), backend=backend)[0]
    update, result = balanced(MGDA(normalization, apply_to="raw"), rows, losses, backend)
    torch.testing.assert_close(result.weights, shares, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(update, rows.T @ shares, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("normalization", ["l2", "loss", "loss+"])
def test_normalized_tasks_without_gradient_or_loss(backend, normalization):
    rows, losses = jacobian("zero row", 3), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    _, result = balanced(MGDA(normalization), rows, losses, backend)
    assert result.flags == Status.ZERO_GRADIENT
    losses[0] = 0.0
    update, result = balanced(MGDA(normalization), rows, losses, backend)
    assert (Status.NON_POSITIVE_LOSS in result.flags) == (normalization != "l2")
    assert bool(update.isnan().all()) == (normalization != "l2")


def test_arguments():
    with pytest.raises(ValueError, match="normalization must be one of"):
        MGDA("L2")
    with pytest.raises(ValueError, match="apply_to must be one of"):
        MGDA(apply_to="both")
