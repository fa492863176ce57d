"""Nash-MTL: α (Gα) = 1."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samplers import gramian, jacobian
from tolerances import NASH_RESIDUAL
from variants import Variant

import igb_kernels as igb
from igb_kernels import Status

UNCLIPPED = Variant("nash_mtl", {"max_norm": 0.0})
EXACT = (
    "random", "spread 1e-2..1e2", "rows 1e-3..1e3", "all rows x 1e-8", "all rows x 1e8", "duplicates", "near parallel",
    "parallel",
)  # fmt: skip
TASKS = (1, 2, 3, 4, 5, 8, 13, 16, 32, 33, 64)


def residual(gram, alpha):
    """max |α_k (Gα)_k − 1|, evaluated in extended precision."""
    g, a = (t.numpy().astype(np.longdouble) for t in (gram, alpha))
    return float(np.abs(a * (g @ a) - 1).max())


def residual_of_rounding(gram, alpha):
    """How far rounding the exact α to float64 (each by up to 2^-53 of itself) can move the residual."""
    return float((alpha * (gram.abs() @ alpha)).max()) * 2**-53


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("family", EXACT)
def test_residual(backend, family, tasks):
    gram = gramian(jacobian(family, tasks))
    alpha, status = UNCLIPPED.solve(gram, backend=backend)
    assert residual(gram, alpha) <= NASH_RESIDUAL
    assert (alpha > 0).all()
    assert status == 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tasks", TASKS)
def test_residual_at_condition_1e8(backend, tasks, seed):
    """As small as float64 weights allow."""
    gram = gramian(jacobian("condition 1e8", tasks, seed))
    alpha, _ = UNCLIPPED.solve(gram, backend=backend)
    assert residual(gram, alpha) <= max(NASH_RESIDUAL, 2 * residual_of_rounding(gram, alpha))


@given(st.sampled_from(EXACT[:3]), st.integers(1, 40), st.integers(0, 999))
def test_residual_of_random_problems(backend, family, tasks, seed):
    gram = gramian(jacobian(family, tasks, seed))
    assert residual(gram, UNCLIPPED.solve(gram, backend=backend)[0]) <= NASH_RESIDUAL


@pytest.mark.parametrize("tasks", [1, 2, 8, 64])
@pytest.mark.parametrize("max_norm", [0.0, 0.3, 1.0, 100.0])
def test_the_update_has_norm_sqrt_k_or_max_norm(backend, tasks, max_norm):
    rows = jacobian("spread 1e-2..1e2", tasks)
    weights, _ = Variant("nash_mtl", {"max_norm": max_norm}).solve(gramian(rows), backend=backend)
    unclipped = tasks**0.5
    assert (rows.T @ weights).norm() == pytest.approx(min(unclipped, max_norm) if max_norm else unclipped, rel=1e-9)


def test_orthogonal_gradients(backend):
    """α = 1 / |g|."""
    norms = torch.tensor([1e-6, 2.0, 3e5], dtype=torch.float64)
    alpha, _ = UNCLIPPED.solve(torch.diag(norms**2), backend=backend)
    torch.testing.assert_close(alpha, 1 / norms, rtol=1e-12, atol=0)


def test_two_tasks_in_closed_form(backend):
    """Unit gradients of cosine c: α² (1 + c) = 1."""
    for cosine in (-0.99, -0.5, 0.0, 0.5, 0.999):
        gram = torch.tensor([[1.0, cosine], [cosine, 1.0]], dtype=torch.float64)
        alpha, _ = UNCLIPPED.solve(gram, backend=backend)
        assert alpha.tolist() == pytest.approx([(1 + cosine) ** -0.5] * 2, rel=1e-12)


@pytest.mark.parametrize("tasks", [2, 3, 5, 8, 64])
def test_opposed_gradients_are_reported(backend, tasks):
    """There is no finite solution: a ridge keeps the weights finite, and other tasks keep their part."""
    rows = jacobian("opposed", tasks)
    weights, status = Variant("nash_mtl").solve(gramian(rows), backend=backend)
    assert Status.PARETO_STATIONARY in status
    assert (weights > 0).all()
    # |d|² is what cancellation leaves of terms of 1e9 and more.
    assert (rows.T @ weights).norm() <= 1 + 1e-5


@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_held_weights(backend, max_norm):
    """The state is α before clipping; holding uses it on another Gramian and leaves it as it is."""
    state, (first, second) = torch.ones(3, dtype=torch.float64), (jacobian("random", 3, seed) for seed in (0, 1))
    UNCLIPPED.solve(gramian(first), state=state, backend=backend)
    alpha, _ = UNCLIPPED.solve(gramian(first), backend=backend)
    assert torch.equal(state, alpha)
    held = Variant("nash_mtl", {"max_norm": max_norm, "hold": 1.0})
    weights, _ = held.solve(gramian(second), state=state, backend=backend)
    assert torch.equal(state, alpha)
    norm = float((second.T @ alpha).norm())
    torch.testing.assert_close(weights, alpha * (min(1.0, max_norm / norm) if max_norm else 1.0), rtol=1e-12, atol=0)


def test_held_weights_are_for_the_tasks_that_they_were_solved_for():
    """Others solve anew, and again after a step that could not be used."""
    p = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([[1.0, 0, 2, 0], [0, 3, 1, 0], [0.5, 0, 0, 1]], dtype=torch.float64)
    method = igb.NashMTL(0.0, update_every=100)
    balancer = igb.Balancer(method, shared=[p])

    def solves(*ids, factor=1.0):
        result = balancer.backward([(factor * row) @ p + 1 if k in ids else None for k, row in enumerate(rows)])
        products = (result.gram @ result.weights * result.weights)[list(ids)]
        return bool(((products - 1).abs() < 1e-9).all())

    assert solves(0, 1, 2)
    assert not solves(0, 1, 2, factor=2.0)
    assert solves(0, 2, factor=3.0)
    assert not solves(0, 2)
    assert solves(0, 1, 2)
    assert not solves(0, 1, factor=torch.nan)
    assert solves(0, 1, factor=4.0)
    assert not solves(0, 1)
