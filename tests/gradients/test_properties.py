"""Invariances of all methods; what defines each method is in its own file."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samplers import WELL_POSED, gramian, jacobian
from tolerances import SOLVER
from variants import KNOWN_ALONE, VARIANTS, Variant, losses_for, update_distance

from igb_kernels.gradients import METHODS

every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)
scale_free = pytest.mark.parametrize("variant", [v for v in VARIANTS if v.scale_free], ids=str)

rows_of_any_family = st.builds(jacobian, st.sampled_from(WELL_POSED), st.integers(1, 12), st.integers(0, 999))
seeds = st.integers(0, 999)


def solved(variant: Variant, rows, backend, losses=None):
    weights, _ = variant.solve(gramian(rows), losses, backend=backend)
    assert weights.isfinite().all()
    return weights


@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if v.scale_degree is not None and not v.has_absolute_eps], ids=str
)
@given(rows=rows_of_any_family, exponent=st.integers(-6, 6))
def test_scale_degree(variant, backend, rows, exponent):
    factor = 10.0**exponent
    of_scaled_rows = solved(variant, factor * rows, backend) * factor
    assert (
        update_distance(rows, of_scaled_rows / factor**variant.scale_degree, solved(variant, rows, backend)) <= SOLVER
    )


@scale_free
@given(rows=rows_of_any_family, seed=seeds)
def test_a_loss_may_be_multiplied_by_a_constant(variant, backend, rows, seed):
    """The direction stays; Nash-MTL's update does, too."""
    losses = losses_for(len(rows))
    factors = 10 ** torch.empty(len(rows), dtype=torch.float64).uniform_(
        -2, 2, generator=torch.Generator().manual_seed(seed)
    )
    before = solved(variant, rows, backend, losses)
    after = factors * solved(variant, factors[:, None] * rows, backend, factors * losses)  # weights of the first rows
    if METHODS[variant.method].card.invariance == "direction" or variant.method == "db_mtl":  # without its log losses
        after = after * before.norm() / after.norm()
    assert update_distance(rows, after, before) <= SOLVER


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.symmetric], ids=str)
@given(rows=rows_of_any_family, seed=seeds)
def test_permuted_tasks_get_permuted_weights(variant, backend, rows, seed):
    losses = losses_for(len(rows))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    permuted = solved(variant, rows[order], backend, losses[order])
    assert update_distance(rows[order], permuted, solved(variant, rows, backend, losses)[order]) <= SOLVER


@every_variant
@given(rows=rows_of_any_family, seed=seeds)
def test_rotated_gradients_get_the_same_weights(variant, backend, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    size = rows.shape[1]
    rotation, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    weights = solved(variant, rows, backend)
    assert update_distance(rows, solved(variant, rows @ rotation, backend), weights) <= SOLVER


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.symmetric and v.unique], ids=str)
@given(rows=rows_of_any_family)
def test_copies_of_a_task_get_the_same_weight(variant, backend, rows):
    losses = losses_for(len(rows))
    twice, losses = torch.cat([rows, rows[:1]]), torch.cat([losses, losses[:1]])
    weights = solved(variant, twice, backend, losses)
    assert weights[0] == pytest.approx(float(weights[-1]), rel=1e-6)


@every_variant
@given(norm=st.floats(1e-3, 1e3), loss=st.floats(1e-3, 1e3))
def test_one_task(variant, backend, norm, loss):
    weights, status = variant.solve(
        torch.tensor([[norm**2]], dtype=torch.float64), torch.tensor([loss], dtype=torch.float64), backend=backend
    )
    assert status == 0
    if variant.method not in KNOWN_ALONE:
        assert weights.isfinite().all()
        assert weights > 0
        return
    one = {"nash_mtl": 1.0}.get(variant.method, 1.0 if variant.options.get("scale") == 2 else norm)
    length = 10 * one if "bias_correction" in variant.options else one  # the row is (1 - 0.9) times its corrected self
    assert float(weights) * norm == pytest.approx(length, rel=1e-4 if variant.has_absolute_eps else 1e-12)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.weightless], ids=str)
@given(rows=rows_of_any_family, position=st.integers(0, 12))
def test_a_task_without_gradient_changes_nothing_for_the_others(variant, backend, rows, position):
    position = min(position, len(rows))
    losses = losses_for(len(rows) + 1)
    with_zero = torch.cat([rows[:position], torch.zeros(1, rows.shape[1], dtype=torch.float64), rows[position:]])
    others = torch.arange(len(rows) + 1) != position
    found = solved(variant, with_zero, backend, losses)
    assert update_distance(rows, found[others], solved(variant, rows, backend, losses[others])) <= 1e-14
    assert found[position] == 0
