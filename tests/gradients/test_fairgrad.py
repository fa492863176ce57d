"""FairGrad: G w = w^(−1/α)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden import cases
from hypothesis import given
from hypothesis import strategies as st
from samplers import gramian, jacobian
from variants import Variant, update_distance

from igb_kernels import Status, ops
from igb_kernels.gradients import FairGrad

ALPHAS = (0.5, 1.0, 2.0, 5.0)
EXACT = (
    "random", "spread 1e-2..1e2", "rows 1e-3..1e3", "all rows x 1e-8", "all rows x 1e8", "duplicates", "near parallel",
    "parallel", "condition 1e8",
)  # fmt: skip
RESIDUAL = 1e-9
GOLDEN = cases(*(f"fairgrad__torchjd_alpha{alpha:g}" for alpha in ALPHAS[:3]))


def fair(alpha: float, max_norm: float = 0.0) -> Variant:
    return Variant("fairgrad", {"alpha": alpha, "max_norm": max_norm})


def residual(gram, weights, alpha):
    """max |w^(1/α) (Gw) − 1|, in extended precision, and how far rounding w to float64 can move it."""
    g, w = (t.numpy().astype(np.longdouble) for t in (gram, weights))
    factor = w ** (1 / np.longdouble(alpha))
    return float(np.abs(factor * (g @ w) - 1).max()), float((factor * (np.abs(g) @ w)).max()) * 2**-53


def assert_fair(gram, weights, alpha):
    assert (weights > 0).all()
    found, rounding = residual(gram, weights, alpha)
    assert found <= max(RESIDUAL, 2 * len(gram) ** 0.5 * rounding)


@pytest.mark.parametrize("tasks", [1, 2, 3, 5, 8, 16, 33, 64])
@pytest.mark.parametrize("family", EXACT)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_residual(backend, alpha, family, tasks):
    gram = gramian(jacobian(family, tasks))
    weights, status = fair(alpha).solve(gram, backend=backend)
    assert status == 0
    assert_fair(gram, weights, alpha)


@given(st.sampled_from(ALPHAS), st.sampled_from(EXACT[:3]), st.integers(1, 40), st.integers(0, 999))
def test_residual_of_random_problems(alpha, family, tasks, seed):
    """TorchJD's and LibMTL's least squares leave residuals above 1e-3 on most problems of rows 1e-3..1e3."""
    gram = gramian(jacobian(family, tasks, seed))
    weights, status = fair(alpha).solve(gram)
    assert status == 0
    assert residual(gram, weights, alpha)[0] <= RESIDUAL


@pytest.mark.parametrize("alpha", [0.05, 0.2, 10.0, 20.0])
@pytest.mark.parametrize("family", ["random", "spread 1e-2..1e2", "near parallel"])
@pytest.mark.parametrize("tasks", [2, 5, 16])
def test_extreme_alpha(alpha, family, tasks):
    gram = gramian(jacobian(family, tasks))
    weights, status = fair(alpha).solve(gram)
    assert status == 0
    assert_fair(gram, weights, alpha)


@pytest.mark.parametrize("alpha", [100.0, 1e4])
@pytest.mark.parametrize("family", ["random", "rows 1e-3..1e3", "opposed"])
def test_without_end_in_alpha_weights_stay_finite(alpha, family):
    weights, _ = fair(alpha).solve(gramian(jacobian(family, 8)))
    assert weights.isfinite().all()


@given(st.sampled_from(EXACT[:5]), st.integers(1, 12), st.integers(0, 99))
def test_alpha_1_is_nash_mtl(backend, family, tasks, seed):
    rows = jacobian(family, tasks, seed)
    nash, _ = Variant("nash_mtl", {"max_norm": 0.0}).solve(gramian(rows), backend=backend)
    weights, _ = fair(1.0).solve(gramian(rows), backend=backend)
    assert update_distance(rows, weights, nash) <= 1e-12
    torch.testing.assert_close(weights, nash, rtol=1e-11, atol=0)


def test_alpha_0_weighs_all_alike(backend):
    gram = gramian(jacobian("zero row", 3))
    weights, status = fair(0.0).solve(gram, backend=backend)
    assert weights.tolist() == [1.0, 0.0, 1.0]
    assert status == Status.ZERO_GRADIENT
    nearly, _ = fair(1e-3).solve(gram, backend=backend)
    torch.testing.assert_close(nearly, weights, rtol=0.01, atol=0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_closed_forms(backend, alpha):
    """Orthogonal gradients: w = |g|^(−2α/(1+α)); equal norms n, K = 2: n² (1 + c) w = w^(−1/α)."""
    squares = torch.tensor([1e-12, 4.0, 9e10], dtype=torch.float64)
    weights, _ = fair(alpha).solve(torch.diag(squares), backend=backend)
    torch.testing.assert_close(weights, squares ** (-alpha / (1 + alpha)), rtol=1e-12, atol=0)
    for cosine in (-0.99, 0.5, 0.999):
        gram = 9 * torch.tensor([[1.0, cosine], [cosine, 1.0]], dtype=torch.float64)
        weights, _ = fair(alpha).solve(gram, backend=backend)
        expected = (9 * (1 + cosine)) ** (-alpha / (1 + alpha))
        assert weights.tolist() == pytest.approx([expected] * 2, rel=1e-12)


@pytest.mark.parametrize("tasks", [2, 3, 8, 64])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_opposed_gradients_are_reported(backend, alpha, tasks):
    """There is no finite solution; a ridge keeps the weights finite."""
    weights, status = fair(alpha).solve(gramian(jacobian("opposed", tasks)), backend=backend)
    assert status == Status.PARETO_STATIONARY
    assert weights.isfinite().all()
    assert (weights > 0).all()


@pytest.mark.parametrize("alpha", [0.0, *ALPHAS])
def test_clipping(backend, alpha):
    rows = jacobian("spread 1e-2..1e2", 5)
    free, _ = fair(alpha).solve(gramian(rows), backend=backend)
    norm = float((rows.T @ free).norm())
    for max_norm in (0.25 * norm, 4 * norm):
        clipped, _ = fair(alpha, max_norm).solve(gramian(rows), backend=backend)
        torch.testing.assert_close(clipped, free * min(1.0, max_norm / norm), rtol=1e-12, atol=0)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_small_task_is_not_lost_in_float32(backend, alpha):
    rows = jacobian("random", 3)
    rows[0] *= 1e-6
    exact, _ = fair(alpha).solve(gramian(rows), backend=backend)
    weights, _ = fair(alpha).solve(ops.gram(rows.float()), backend=backend)
    torch.testing.assert_close(weights, exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", GOLDEN)
def test_golden(case, backend):
    alpha = case.params["alpha"]
    gram, active = gramian(case.jacobian), case.jacobian.norm(dim=1) > 0
    weights, status = fair(alpha).solve(gram, backend=backend)
    if case.trust:
        case.assert_update(case.jacobian.T @ weights)
    elif not gram.isfinite().all():
        assert status == Status.NON_FINITE
    elif Status.PARETO_STATIONARY in status:
        assert "opposed" in case.tags
        assert (weights[active] > 0).all()
    else:
        assert_fair(gram, weights, alpha)


@pytest.mark.parametrize("arguments", [{"alpha": -1.0}, {"alpha": float("nan")}, {"max_norm": -1.0}])
def test_arguments(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        FairGrad(**arguments)
