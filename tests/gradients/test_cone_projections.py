"""UPGrad and DualProj: projections on the cone of the updates that ascend no task."""

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
from igb_kernels.gradients import DualProj, UPGrad

DUAL, UP = Variant("dual_proj"), Variant("upgrad")
both = pytest.mark.parametrize("variant", [DUAL, UP], ids=str)
SINGULAR = ("opposed", "rank deficient")


def assert_projected(gram, weights, preference):
    """Of Σ u_k g_k: w ≥ u, Gw ≥ 0, and one of them holds with equality."""
    found, scale = projections(gram, weights)
    added = extended(weights - preference)
    assert added.min() >= -1e-15 * float(preference.max())
    assert (found / scale).min() >= -NO_CONFLICT
    assert abs(added * found / scale).max() <= KKT * abs(extended(weights)).max()


@pytest.mark.parametrize("tasks", [1, 2, 3, 5, 8, 16, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_dual_proj_is_the_projection(backend, family, tasks):
    for seed in range(4):
        gram = gramian(jacobian(family, tasks, seed))
        preference = 10 ** torch.linspace(-seed, seed, tasks, dtype=torch.float64)
        weights, status = DUAL.solve(gram, per_task=preference, backend=backend)
        assert_projected(gram, weights, preference)
        if family not in SINGULAR:
            assert Status.PARETO_STATIONARY not in status


@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_upgrad_is_the_sum_of_projections(backend, family, tasks):
    rows = jacobian(family, tasks)
    gram, preference = gramian(rows), torch.linspace(0, 2, tasks, dtype=torch.float64)
    weights, _ = UP.solve(gram, per_task=preference + 0.1, backend=backend)
    alone = [DUAL.solve(gram, per_task=unit, backend=backend)[0] for unit in torch.eye(tasks).double()]
    assert update_distance(rows, weights, (preference + 0.1) @ torch.stack(alone)) <= SOLVER


@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_upgrad_ascends_no_task(backend, family, tasks):
    gram = gramian(jacobian(family, tasks))
    weights, _ = UP.solve(gram, backend=backend)
    assert (weights >= 1 / tasks).all()
    assert conflict(gram, weights) <= NO_CONFLICT


@both
@given(family=st.sampled_from(WELL_POSED), tasks=st.integers(1, 12), seed=st.integers(0, 999))
def test_random_problems(variant, backend, family, tasks, seed):
    gram = gramian(jacobian(family, tasks, seed))
    weights, status = variant.solve(gram, backend=backend)
    assert status == 0
    assert conflict(gram, weights) <= NO_CONFLICT
    assert (weights >= 1 / tasks).all()


@both
def test_without_conflict_the_weights_are_the_preference(variant, backend):
    rows = jacobian("random", 4).abs()
    preference = torch.tensor([0.0, 1.0, 2.0, 0.5], dtype=torch.float64)
    weights, status = variant.solve(gramian(rows), per_task=preference, backend=backend)
    assert torch.equal(weights, preference)
    assert status == 0
    assert torch.equal(variant.solve(gramian(rows), backend=backend)[0], torch.full((4,), 0.25, dtype=torch.float64))


@both
def test_two_opposed_gradients_leave_what_is_orthogonal_to_them(variant, backend):
    rows = torch.tensor([[1.0, 0.0], [-3.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
    weights, status = variant.solve(gramian(rows), backend=backend)
    torch.testing.assert_close(rows.T @ weights, torch.tensor([0, 2 / 3], dtype=torch.float64), rtol=0, atol=1e-15)
    assert status == 0
    weights, status = variant.solve(gramian(rows[:2]), backend=backend)
    assert (rows[:2].T @ weights).norm() <= 1e-15
    assert status == Status.PARETO_STATIONARY


@both
@pytest.mark.parametrize("factor", [1.0, 1e-3, 1e-6])
def test_small_gradients_are_projected_too(variant, backend, factor):
    """Peers do not project where |J| < 0.01."""
    rows = torch.tensor([[2.0, 0.2], [-1.0, 0.1]], dtype=torch.float64)
    weights, _ = variant.solve(gramian(factor * rows), backend=backend)
    assert conflict(gramian(rows), weights) <= NO_CONFLICT
    assert weights.max() > 0.51


@both
@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e6])
def test_gradients_of_unequal_length(variant, backend, ratio):
    """The default regularisation of peers leaves a cosine of −0.8 with the short gradient; reg_eps does as they do."""
    rows = torch.tensor([[ratio, 0.0], [-1.0, 0.2]], dtype=torch.float64)
    gram = gramian(rows)
    weights, _ = variant.solve(gram, backend=backend)
    assert conflict(gram, weights) <= NO_CONFLICT
    regular, _ = Variant(variant.method, {"reg_eps": 1e-4}).solve(gram, backend=backend)
    assert conflict(gram, regular) > 1e-2


@both
def test_a_short_gradient_in_single_precision_is_not_lost(variant, backend):
    """Norms 1e6 : 1, in conflict."""
    rows = jacobian("random", 3).float()
    rows[1] = -rows[0] + 0.3 * rows[1]
    rows[0] *= 1e6
    weights, _ = variant.solve(ops.gram(rows, backend=backend), backend=backend)
    assert conflict(gramian(rows.double()), weights) <= 1e-6
    assert weights[1] > 1e4


@both
def test_a_task_without_gradient_keeps_its_preference(variant, backend):
    rows = jacobian("zero row", 4)
    preference = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    weights, status = variant.solve(gramian(rows), per_task=preference, backend=backend)
    assert weights[2] == 3
    assert status == Status.ZERO_GRADIENT
    others = [0, 1, 3]
    alone, _ = variant.solve(gramian(rows[others]), per_task=preference[others], backend=backend)
    torch.testing.assert_close(weights[others], alone, rtol=1e-13, atol=0)
    nothing, _ = variant.solve(torch.zeros(4, 4).double(), per_task=preference, backend=backend)
    assert torch.equal(nothing, preference)


@pytest.mark.parametrize("family", ["duplicates", "opposed", "rank deficient"])
@pytest.mark.parametrize("tasks", [2, 3, 8, 16])
@both
def test_singular_gramians_have_one_update(variant, family, tasks):
    """Not one set of weights."""
    rows = jacobian(family, tasks)
    (cpu, _), (reference, _) = (variant.solve(gramian(rows), backend=name) for name in ("cpu", "reference"))
    assert update_distance(rows, cpu, reference) <= SOLVER


@pytest.mark.parametrize("method", [DualProj, UPGrad])
def test_preference_of_a_balancer(method, backend):
    rows, preference = jacobian("random", 3), [0.2, 0.0, 3.0]
    parameters = torch.zeros(rows.shape[1], dtype=torch.float64, requires_grad=True)
    losses = linear_losses(parameters, rows, torch.ones(3).double())
    result = Balancer(method(preference), "none", shared=[parameters], backend=backend).backward(losses)
    given = torch.tensor(preference, dtype=torch.float64)
    expected, _ = Variant(method.name).solve(gramian(rows), per_task=given, backend=backend)
    torch.testing.assert_close(result.weights, expected, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="preference must be 2 numbers, one for each task; found 3"):
        Balancer(method(preference), "none", shared=[parameters], backend=backend).backward(
            linear_losses(parameters, rows[:2], torch.ones(2).double())
        )


@pytest.mark.parametrize("method", [DualProj, UPGrad])
def test_arguments(method):
    for preference in ([-1.0, 1.0], [0.0, 0.0], [float("nan"), 1.0], [[1.0]]):
        with pytest.raises(ValueError, match="preference must be"):
            method(preference)
    with pytest.raises(ValueError, match="reg_eps must be"):
        method(reg_eps=-1e-4)
