"""IMTL-G: weights of sum 1 and equal projections on all gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samplers import NONSINGULAR, gramian, jacobian
from variants import Variant, projections

from igb_kernels import Status

PAPER, SAFE = Variant("imtl_g"), Variant("imtl_g", {"descent_safe": 1.0})


def assert_impartial(rows, weights, relative=1e-9):
    found = projections(rows, weights)
    scale = (weights.abs() * rows.norm(dim=1)).sum()
    assert found.max() - found.min() <= relative * scale


@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("family", NONSINGULAR)
def test_equal_projections_and_sum_one(backend, family, tasks):
    rows = jacobian(family, tasks)
    weights, status = PAPER.solve(gramian(rows), backend=backend)
    assert_impartial(rows, weights)
    assert float(weights.sum()) == pytest.approx(1, abs=1e-12 * float(weights.abs().sum()))
    assert status & ~Status.NEGATIVE_SUM == 0


@given(st.sampled_from(NONSINGULAR[:3]), st.integers(1, 20), st.integers(0, 999))
def test_random_problems(backend, family, tasks, seed):
    rows = jacobian(family, tasks, seed)
    weights, _ = PAPER.solve(gramian(rows), backend=backend)
    assert_impartial(rows, weights)


@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6), st.floats(-0.99, 0.99))
def test_two_tasks_in_closed_form(backend, first, second, cosine):
    """(n_2, n_1) / (n_1 + n_2), whatever the angle."""
    inner = first * second * cosine
    gram = torch.tensor([[first**2, inner], [inner, second**2]], dtype=torch.float64)
    weights, _ = PAPER.solve(gram, backend=backend)
    assert weights.tolist() == pytest.approx([second / (first + second), first / (first + second)], rel=1e-9)


def test_a_negative_sum_is_reported_and_can_be_avoided(backend):
    """The paper's update then ascends every task; descent_safe's descends each by as much."""
    candidates = (jacobian("spread 1e-2..1e2", 5, seed) for seed in range(50))
    rows = next(r for r in candidates if PAPER.solve(gramian(r))[1] & Status.NEGATIVE_SUM)
    paper, status = PAPER.solve(gramian(rows), backend=backend)
    assert status == Status.NEGATIVE_SUM
    assert (rows @ rows.T @ paper < 0).all()
    safe, status = SAFE.solve(gramian(rows), backend=backend)
    assert status == Status.NEGATIVE_SUM
    assert torch.equal(safe, -paper)


def test_descent_safe_changes_nothing_where_the_sum_is_positive(backend):
    gram = gramian(jacobian("random", 2))
    assert torch.equal(PAPER.solve(gram, backend=backend)[0], SAFE.solve(gram, backend=backend)[0])


def test_parallel_gradients_are_the_limit_of_nearly_parallel_ones(backend):
    """Weights ∝ 1 / norm: the update of (1, 1) and (2, 2) is (4/3, 4/3)."""
    rows = torch.tensor([[1.0, 1.0], [2.0, 2.0]], dtype=torch.float64)
    weights, status = PAPER.solve(gramian(rows), backend=backend)
    assert (rows.T @ weights).tolist() == pytest.approx([4 / 3, 4 / 3], rel=1e-7)
    assert status == Status.PARETO_STATIONARY


@pytest.mark.parametrize("tasks", [3, 8])
def test_duplicates_share_what_one_of_them_had(backend, tasks):
    """Singular, but equal projections exist, and the ridge finds them."""
    rows = jacobian("random", tasks)
    twice = torch.cat([rows, rows[:1]])
    weights, status = PAPER.solve(gramian(twice), backend=backend)
    assert Status.PARETO_STATIONARY in status
    assert_impartial(twice, weights, 1e-6)
    assert float(weights[0]) == pytest.approx(float(weights[-1]), rel=1e-6)


def test_opposed_gradients_cancel(backend):
    rows = torch.tensor([[3.0, 4.0], [-6.0, -8.0]], dtype=torch.float64)
    weights, status = PAPER.solve(gramian(rows), backend=backend)
    assert Status.PARETO_STATIONARY in status
    assert (rows.T @ weights).norm() <= 1e-6 * 10
