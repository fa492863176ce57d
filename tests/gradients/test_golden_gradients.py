"""The original implementations' updates, from golden vectors; what they leave open, from the methods' properties."""

from __future__ import annotations

import pytest
import torch
from golden import cases
from samplers import gramian
from tolerances import NASH_RESIDUAL
from variants import projections

from igb_kernels import Status, ops

METHODS = {"imtl_g": ("imtl_g", {}), "imtl": ("imtl_g", {}), "ls": ("equal", {})}
RULES = {"si": "log", "igbv1": "igb_v1"}

PLAIN = cases("imtl_g__torchjd", "imtl_g__igb4mtl", "nash__official_nomaxnorm", "nash__torchjd_nomaxnorm",
              "nash__torchjd_maxnorm1")  # fmt: skip
COMPOSED = cases(*(f"composed_{rule}_{method}__igb4mtl" for rule in RULES for method in ("ls", "imtl", "nashmtl")))


def method_of(case, name):
    if name in METHODS:
        return METHODS[name]
    return "nash_mtl", {"max_norm": case.params.get("max_norm", case.params.get("nash_max_norm"))}


def solve(method, options, gram, losses, backend):
    weights, status = ops.solve(method, gram, losses, backend=backend, **options)
    return weights, Status(int(status))


@pytest.mark.parametrize("case", PLAIN)
def test_update(case, backend):
    method, options = method_of(case, case.file["method"])
    gram = gramian(case.jacobian)
    weights, status = solve(method, options, gram, case.losses, backend)
    if case.trust:
        case.assert_update(case.jacobian.T @ weights)
    else:
        assert_properties(method, options, case.jacobian, weights, status)


@pytest.mark.parametrize("case", COMPOSED)
def test_composition_with_a_loss_transform(case, backend):
    """The weights of the scaled gradients, times the scales, on the raw gradients."""
    rule, _, name = case.file["method"].partition("+")
    method, options = method_of(case, name)
    bases = case.base_losses if rule == "igbv1" else None
    scales, status = ops.loss_scales(RULES[rule], case.losses, bases, backend=backend)
    assert status == 0
    torch.testing.assert_close(scales, case.transform_scale, rtol=1e-12, atol=0)
    scaled = case.jacobian * scales[:, None]
    weights, status = solve(method, options, gramian(scaled), case.losses, backend)
    if case.trust:
        case.assert_update(case.jacobian.T @ (scales * weights))
    else:
        assert_properties(method, options, scaled, weights, status)


def assert_properties(method, options, rows, weights, status):
    """What defines the method, where the original gave no usable answer."""
    gram, norms = gramian(rows), rows.norm(dim=1)
    if not gram.isfinite().all():
        assert status == Status.NON_FINITE
        assert weights.isnan().all()
        return
    active = norms > 1e-12 * norms.max()
    assert (Status.ZERO_GRADIENT in status) == (not active.all())
    assert (Status.ALL_INACTIVE in status) == (not active.any())
    assert weights.isfinite().all()
    if not active.any():
        return
    assert not weights[~active].any()
    if method == "imtl_g":
        assert_impartial(rows[active], weights[active], status)
    elif method == "nash_mtl":
        assert_bargained(rows[active], weights[active], status, options["max_norm"])
    else:
        assert torch.equal(weights, torch.ones_like(weights))


def assert_impartial(rows, weights, status):
    """Weights of sum 1 and equal projections, unless a ridge decided: singular Gramians have no such update."""
    if weights.any():
        assert weights.sum() == pytest.approx(1)
    found = projections(rows, weights)
    if Status.PARETO_STATIONARY not in status:
        scale = (weights.abs() * rows.norm(dim=1)).sum()
        assert found.max() - found.min() <= 1e-9 * scale
    else:
        assert torch.linalg.matrix_rank(rows) < len(rows)


def assert_bargained(rows, weights, status, max_norm):
    """w (Gw) is the same for all tasks, 1 before clipping."""
    update = rows.T @ weights
    if max_norm:
        assert update.norm() <= max_norm * (1 + 1e-12)
    if Status.PARETO_STATIONARY in status:
        assert torch.linalg.matrix_rank(rows) < len(rows)
        return
    assert (weights > 0).all()
    shares = weights * (gramian(rows) @ weights)
    clipped = min(1.0, max_norm**2 / len(rows)) if max_norm else 1.0
    assert (shares / clipped - 1).abs().max() <= NASH_RESIDUAL
