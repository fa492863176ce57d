"""PCGrad: no gradient keeps a component along those it conflicts with."""

from __future__ import annotations

import pytest
import torch
from golden import cases
from hypothesis import given
from hypothesis import strategies as st
from samplers import FAMILIES, gramian, jacobian
from tolerances import SOLVER
from variants import Variant, update_distance

from igb_kernels import Status, ops
from igb_kernels.gradients import PCGrad

PLAIN, VISITS_ITSELF = Variant("pcgrad"), Variant("pcgrad", {"visit_self": 1.0})
EXISTING = {"torchjd": {}, "LibMTL": {"visit_self": 1.0, "eps": 1e-8}, "IGB4MTL": {"visit_self": 1.0}}
"""The options that make it what existing code does."""
RULES = {"si": "log", "igbv1": "igb_v1"}


def random_times(tasks, seed=0):
    return torch.rand(tasks, tasks, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def surgery(rows, times, visits_itself=False):
    """The update, with the gradients themselves."""
    altered = rows.clone()
    for i, order in enumerate(times.argsort(dim=1).tolist()):
        for j in order:
            inner = altered[i] @ rows[j]
            if inner < 0 and (j != i or visits_itself):
                altered[i] -= inner / rows[j].square().sum() * rows[j]
    return altered.sum(dim=0)


# ---- Golden vectors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("pcgrad__torchjd", "pcgrad__libmtl"))
def test_existing_code(case, backend):
    gram, times = gramian(case.jacobian), case.orders.argsort(dim=1).double()
    weights, status = ops.solve("pcgrad", gram, per_task=times, backend=backend, **EXISTING[case.file["peer"]])
    if case.trust:
        case.assert_update(case.jacobian.T @ weights)
    else:
        assert_sound(case.jacobian, weights, status)


@pytest.mark.parametrize("case", cases("composed_si_pcgrad__igb4mtl", "composed_igbv1_pcgrad__igb4mtl"))
def test_existing_code_behind_a_loss_transform(case, backend):
    rule = case.file["method"].partition("+")[0]
    bases = case.base_losses if rule == "igbv1" else None
    scales, _ = ops.loss_scales(RULES[rule], case.losses, bases, backend=backend)
    scaled, times = case.jacobian * scales[:, None], case.orders.argsort(dim=1).double()
    weights, status = ops.solve("pcgrad", gramian(scaled), per_task=times, backend=backend, **EXISTING["IGB4MTL"])
    if case.trust:
        case.assert_update(case.jacobian.T @ (scales * weights))
    else:
        assert_sound(scaled, weights, status)


def assert_sound(rows, weights, status):
    """Where existing code is not: with opposed gradients, of which nothing remains, and without numbers."""
    if not rows.isfinite().all():
        assert int(status) == Status.NON_FINITE
        assert weights.isnan().all()
    else:
        assert torch.linalg.matrix_rank(rows) == 1
        assert (rows.T @ weights).norm() <= 1e-7 * rows.norm()  # eps of the squared norms stays


# ---- What defines it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "rows 1e-8..1e8"])  # 1e-16 counts as zero
@pytest.mark.parametrize("variant", [PLAIN, VISITS_ITSELF], ids=str)
def test_the_gradients_themselves_give_the_same_update(backend, variant, family, tasks):
    rows, times = jacobian(family, tasks), random_times(tasks)
    norms = rows.norm(dim=1, keepdim=True)
    units = rows / norms.clamp_min(1e-300)
    rows = norms * (units - 0.7 * units.mean(dim=0))  # more conflicts
    rows[::3] *= -1
    weights, _ = variant.solve(gramian(rows), per_task=times, backend=backend)
    expected = surgery(rows, times, visits_itself="visit_self" in variant.options)
    scale = max(float((weights.abs() * rows.norm(dim=1)).sum()), float(rows.norm(dim=1).sum()))
    assert (rows.T @ weights - expected).norm() <= SOLVER * scale


def test_a_gradient_does_not_visit_itself(backend):
    """LibMTL's and IGB4MTL's do, and lose what is left of them where others have turned them around."""
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.05], [-1.0, -2.0]], dtype=torch.float64)
    times = torch.tensor([[2.0, 0.0, 1.0]] * 3)
    altered = rows[0] - rows[0] @ rows[1] / rows[1].square().sum() * rows[1]
    altered -= altered @ rows[2] / rows[2].square().sum() * rows[2]
    assert altered @ rows[0] < 0  # it is against itself by now
    gram = gramian(rows)
    (plain, _), (itself, _) = (v.solve(gram, per_task=times, backend=backend) for v in (PLAIN, VISITS_ITSELF))
    assert not torch.allclose(rows.T @ plain, rows.T @ itself, rtol=1e-3)
    torch.testing.assert_close(rows.T @ plain, surgery(rows, times))


@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6), st.floats(-1, 1))
def test_two_tasks_are_not_ascended(backend, first, second, cosine):
    inner = first * second * cosine
    gram = torch.tensor([[first**2, inner], [inner, second**2]], dtype=torch.float64)
    weights, status = PLAIN.solve(gram, backend=backend)
    norms = gram.diagonal().sqrt()
    assert (gram @ weights >= -1e-14 * norms * norms.sum()).all()
    expected = [1.0, 1.0] if cosine >= 0 else [1 - cosine * second / first, 1 - cosine * first / second]
    assert weights.tolist() == pytest.approx(expected, rel=1e-12)
    assert status == 0


@given(st.integers(1, 12), st.integers(0, 99))
def test_without_conflicts_weights_are_ones(backend, tasks, seed):
    rows = jacobian("rows 1e-3..1e3", tasks, seed).abs()
    weights, status = PLAIN.solve(gramian(rows), backend=backend)
    assert torch.equal(weights, torch.ones(tasks, dtype=torch.float64))
    assert status == 0


@given(st.integers(2, 10), st.integers(0, 99))
def test_permuted_tasks_with_permuted_times(backend, tasks, seed):
    rows, times = jacobian("rows 1e-3..1e3", tasks, seed), random_times(tasks, seed)
    order = torch.randperm(tasks, generator=torch.Generator().manual_seed(seed))
    weights, _ = PLAIN.solve(gramian(rows), per_task=times, backend=backend)
    permuted, _ = PLAIN.solve(gramian(rows[order]), per_task=times[order][:, order], backend=backend)
    assert update_distance(rows[order], permuted, weights[order]) <= SOLVER


def test_equal_times_are_visited_by_number(backend):
    gram = gramian(jacobian("rank deficient", 6))
    equal, _ = PLAIN.solve(gram, per_task=torch.zeros(6, 6), backend=backend)
    by_number, _ = PLAIN.solve(gram, per_task=torch.arange(6.0).repeat(6, 1), backend=backend)
    assert torch.equal(equal, by_number)


def test_orders_matter(backend):
    gram = gramian(jacobian("rank deficient", 6))
    first, second = (PLAIN.solve(gram, per_task=random_times(6, seed), backend=backend)[0] for seed in (0, 1))
    assert not torch.allclose(first, second, rtol=1e-3)


def test_mean_is_the_sum_over_the_tasks(backend):
    gram = gramian(jacobian("rank deficient", 5))
    total, _ = PLAIN.solve(gram, backend=backend)
    mean, _ = Variant("pcgrad", {"mean": 1.0}).solve(gram, backend=backend)
    torch.testing.assert_close(mean, total / 5, rtol=1e-15, atol=0)


@pytest.mark.parametrize("options", [{}, {"eps": 1e-8}, {"visit_self": 1.0, "eps": 1e-8}])
def test_eps_is_added_to_the_squared_norm(backend, options):
    gram = torch.tensor([[1.0, -3e-5], [-3e-5, 1e-8]], dtype=torch.float64)
    weights, _ = Variant("pcgrad", options).solve(gram, backend=backend)
    eps = options.get("eps", 0.0)
    assert weights.tolist() == pytest.approx([1 + 3e-5 / (1 + eps), 1 + 3e-5 / (1e-8 + eps)], rel=1e-12)


def test_options_of_the_class():
    assert PCGrad(visit_self=True, eps=1e-8, reduction="mean").options() == {"visit_self": 1, "eps": 1e-8, "mean": 1}
    with pytest.raises(ValueError, match=r"reduction must be one of \('sum', 'mean'\), found 'max'"):
        PCGrad(reduction="max")
    with pytest.raises(ValueError, match="eps must be a finite number, at least 0; found -1"):
        PCGrad(eps=-1)
