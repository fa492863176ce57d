"""ConFIG: equal cosines, and the length of all gradients' projections together."""

from __future__ import annotations

import pytest
import torch
from golden import cases
from hypothesis import given
from hypothesis import strategies as st
from samplers import NONSINGULAR, WELL_POSED, gramian, jacobian
from variants import Variant, projections, update_distance

import igb_kernels as igb
from igb_kernels import Status, ops
from igb_kernels.gradients import ConFIG

CONFIG = Variant("config")


def assert_equal_angles(rows, weights, preference=None, relative=1e-9):
    """u_k · d ∝ p_k > 0, and |d| = Σ g_k · d / |d|."""
    found = projections(rows, weights)
    ratio = found if preference is None else found / preference
    scale = (weights.abs() * rows.norm(dim=1)).sum()
    assert ratio.max() - ratio.min() <= relative * scale
    update = rows.T @ weights
    assert float(update @ update) == pytest.approx(float((rows @ update).sum()), rel=relative)


@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("family", NONSINGULAR)
def test_equal_cosines(backend, family, tasks):
    rows = jacobian(family, tasks)
    weights, status = CONFIG.solve(gramian(rows), backend=backend)
    assert status == 0
    assert_equal_angles(rows, weights, relative=1e-6 if family in ("near parallel", "condition 1e8") else 1e-9)
    assert (rows @ (rows.T @ weights) > 0).all()


@given(st.sampled_from(WELL_POSED), st.integers(1, 20), st.integers(0, 999))
def test_random_problems(backend, family, tasks, seed):
    rows = jacobian(family, tasks, seed)
    weights, _ = CONFIG.solve(gramian(rows), backend=backend)
    assert_equal_angles(rows, weights)


@given(st.integers(1, 8), st.integers(0, 99))
def test_preference(backend, tasks, seed):
    rows, p = jacobian("spread 1e-2..1e2", tasks, seed), torch.linspace(0.5, 2, tasks, dtype=torch.float64)
    weights, _ = CONFIG.solve(gramian(rows), per_task=p, backend=backend)
    assert_equal_angles(rows, weights, p)
    again, _ = CONFIG.solve(gramian(rows), per_task=3 * p, backend=backend)
    assert update_distance(rows, again, weights) <= 1e-12
    ones, _ = CONFIG.solve(gramian(rows), per_task=torch.ones(tasks), backend=backend)
    assert torch.equal(ones, CONFIG.solve(gramian(rows), backend=backend)[0])


@pytest.mark.parametrize("family", WELL_POSED)
@pytest.mark.parametrize("tasks", [2, 5])
def test_the_line_of_imtl_g(backend, family, tasks):
    """Its direction up to sign; the length is Σ n / sqrt(1'C⁻¹1)."""
    rows = jacobian(family, tasks)
    ours, imtl = (rows.T @ Variant(m).solve(gramian(rows), backend=backend)[0] for m in ("config", "imtl_g"))
    assert abs(float(ours @ imtl / ours.norm() / imtl.norm())) == pytest.approx(1, rel=1e-9)
    norms = rows.norm(dim=1)
    unit = rows / norms[:, None]
    inverse = torch.linalg.solve(unit @ unit.T, torch.ones(tasks, dtype=torch.float64)).sum()
    assert float(ours.norm()) == pytest.approx(float(norms.sum() / inverse.sqrt()), rel=1e-9)


@pytest.mark.parametrize("family", ["duplicates", "rank deficient", "opposed", "parallel", "zero row"])
@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_singular_cosines_give_the_pseudo_inverse(backend, family, tasks):
    rows = jacobian(family, tasks)
    weights, status = CONFIG.solve(gramian(rows), backend=backend)
    norms = rows.norm(dim=1)
    unit = torch.where(norms[:, None] > 0, rows / norms[:, None], 0.0)
    direction = torch.linalg.pinv(unit, rtol=1e-10) @ torch.ones(tasks, dtype=torch.float64)
    if direction.norm() > 1e-8:
        direction = direction / direction.norm()
        expected = (rows @ direction).sum() * direction
        torch.testing.assert_close(rows.T @ weights, expected, rtol=0, atol=1e-9 * float(norms.max()))
    else:
        assert not weights.any()
    assert status == (Status.ZERO_GRADIENT if family == "zero row" else Status.PARETO_STATIONARY)


@pytest.mark.parametrize("norms", [(1.0, 1.0), (3.0, 0.2), (1.0, 1e6)])
def test_opposed_gradients_give_no_update(backend, norms):
    """Whatever rounding leaves of p in the gradients' line, it is not a direction."""
    row = torch.tensor([0.1, 0.7, -0.3], dtype=torch.float64)
    rows = torch.stack([norms[0] * row, -norms[1] * row])
    weights, status = CONFIG.solve(gramian(rows), backend=backend)
    assert not weights.any()
    assert status == Status.PARETO_STATIONARY


@pytest.mark.parametrize("ratio", [1e3, 1e6])
def test_a_small_task_is_not_lost_in_float32(backend, ratio):
    rows = jacobian("random", 3)
    rows[0] /= ratio
    exact, _ = CONFIG.solve(gramian(rows), backend=backend)
    weights, status = CONFIG.solve(ops.gram(rows.float()), backend=backend)
    assert status == 0
    torch.testing.assert_close(weights, exact, rtol=1e-5, atol=0)
    assert_equal_angles(rows, weights, relative=1e-5)


@pytest.mark.parametrize("case", cases("config__torchjd"))
def test_golden(case, backend):
    rows = case.jacobian
    gram = gramian(rows)
    weights, status = CONFIG.solve(gram, backend=backend)
    if case.trust:
        case.assert_update(rows.T @ weights)
    elif not gram.isfinite().all():
        assert status == Status.NON_FINITE
    else:
        assert "opposed" in case.tags
        assert not weights.any()


def test_preference_of_a_step(backend):
    p, rows = torch.nn.Parameter(torch.zeros(12, dtype=torch.float64)), jacobian("random", 2)
    igb.Balancer(ConFIG([1.0, 2.0]), shared=[p], backend=backend).backward([p @ r + 1 for r in rows])
    cosines = rows @ p.grad / rows.norm(dim=1)
    assert float(cosines[1]) == pytest.approx(2 * float(cosines[0]), rel=1e-9)


def test_arguments():
    with pytest.raises(ValueError, match="preference"):
        ConFIG([0.0, 0.0])
    with pytest.raises(ValueError, match="3 numbers"):
        ConFIG([1.0, 1.0]).start(3, torch.device("cpu"))
    assert repr(ConFIG()) == "ConFIG()"
