"""Zero, missing and non-finite gradients: the same policy for every method."""

from __future__ import annotations

import pytest
import torch
from samplers import FAMILIES, gramian, jacobian
from variants import VARIANTS, Variant, losses_for, variant_of

from igb_kernels import Status, ops

every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)
NON_FINITE = [torch.nan, torch.inf, -torch.inf]

EXPECTED = {
    "random": Status(0),
    "rows 1e-3..1e3": Status(0),
    "all rows x 1e-8": Status(0),
    "all rows x 1e8": Status(0),
    "zero row": Status.ZERO_GRADIENT,
    "all zero": Status.ZERO_GRADIENT | Status.ALL_INACTIVE,
}


@every_variant
@pytest.mark.parametrize("family", EXPECTED)
def test_status(variant, backend, family):
    """IMTL-G's sum may be negative on any of these."""
    _, status = variant.solve(gramian(jacobian(family, 4)), backend=backend)
    expected = EXPECTED[family] if variant.inactive_ratio is not None else Status(0)
    assert status & ~Status.NEGATIVE_SUM == expected


@pytest.mark.parametrize("tasks", [1, 2, 5])
@every_variant
def test_without_any_gradient_weights_are_neutral(variant, backend, tasks):
    weights, _ = variant.solve(torch.zeros(tasks, tasks, dtype=torch.float64), backend=backend)
    assert any(torch.equal(weights, torch.full((tasks,), v, dtype=torch.float64)) for v in (1.0, 1 / tasks))


@every_variant
@pytest.mark.parametrize("ratio", [1e-11, 1e-13])
def test_a_gradient_vanishes_relative_to_the_largest(variant, backend, ratio):
    """Below 1e-12 of the largest norm, where the method is not sound for any."""
    norms = torch.tensor([1.0, ratio], dtype=torch.float64)
    weights, status = variant.solve(torch.diag(norms**2), backend=backend)
    vanishes = variant.inactive_ratio is not None and ratio <= variant.inactive_ratio
    assert (Status.ZERO_GRADIENT in status) == vanishes
    if variant.weightless:
        assert (weights[1] == 0) == vanishes


@every_variant
@pytest.mark.parametrize("value", NON_FINITE)
@pytest.mark.parametrize("position", [(0, 0), (1, 1), (2, 2)])
def test_a_non_finite_norm(variant, backend, position, value):
    gram = gramian(jacobian("random", 3))
    gram[position] = value
    for given in (gram, gram.diagonal()) if not variant.needs_gram else (gram,):
        assert_untouched(variant, backend, given, losses_for(3))


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.needs_gram], ids=str)
@pytest.mark.parametrize("value", NON_FINITE)
@pytest.mark.parametrize("position", [(0, 1), (2, 0)])
def test_a_non_finite_inner_product(variant, backend, position, value):
    gram = gramian(jacobian("random", 3))
    gram[position] = value
    assert_untouched(variant, backend, gram, losses_for(3))


@pytest.mark.parametrize("value", NON_FINITE)
def test_a_non_finite_loss(backend, value):
    losses = losses_for(3)
    losses[1] = value
    for variant in VARIANTS:
        if ops.SOLVERS[variant.method].needs_losses:
            assert_untouched(variant, backend, gramian(jacobian("random", 3)), losses)


def assert_untouched(variant: Variant, backend, gram, losses):
    """All weights are NaN, and the state has the bits that it had."""
    state = variant.new_state(3)
    if state is not None:
        state.copy_(torch.tensor([1 / 3, 0.7, -0.0]).repeat(len(state))[: len(state)])
    before = None if state is None else state.clone()
    weights, status = variant.solve(gram, losses, state=state, backend=backend)
    assert status == Status.NON_FINITE
    assert weights.isnan().all()
    if state is not None:
        assert torch.equal(state.view(torch.int64), before.view(torch.int64))


@pytest.mark.parametrize("harmed", ["gram", "losses"])
@pytest.mark.parametrize("method", ops.SOLVERS)
def test_backends_read_the_same_numbers(method, harmed):
    """What one of them ignores (inner products for methods of norms, losses where none are needed) both ignore."""
    gram, losses = gramian(jacobian("random", 3)), losses_for(3)
    if harmed == "gram":
        gram[0, 1] = torch.nan
    else:
        losses[1] = torch.nan
    (cpu, status), (reference, expected) = (
        variant_of(method).solve(gram, losses, backend=name) for name in ("cpu", "reference")
    )
    assert status == expected
    torch.testing.assert_close(cpu, reference, equal_nan=True)


@every_variant
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tasks", [1, 3, 128])
def test_finite_inputs_give_finite_weights(variant, family, tasks):
    weights, status = variant.solve(gramian(jacobian(family, tasks)))
    assert weights.isfinite().all()
    assert Status.NON_FINITE not in status
    assert Status.ITERATION_CAP not in status
