"""MGDA, DualProj, UPGrad and CAGrad against their original implementations; where those are wrong, by optimality."""

from __future__ import annotations

import pytest
from golden import cases
from optimality import NO_CONFLICT, conflict
from samplers import gramian
from test_cagrad import assert_optimal
from test_cone_projections import assert_projected
from test_mgda import assert_shortest

from igb_kernels import Status, ops

PLAIN = cases(
    "mgda__torchjd_default",
    "mgda__torchjd_tight",
    "mgda__libmtl",
    "dualproj__torchjd_default",
    "dualproj__torchjd_tight",
    "upgrad__torchjd_default",
    "upgrad__torchjd_tight",
    "upgrad__libmtl",
    "cagrad__torchjd_c0.4",
    "cagrad__libmtl_c0.5_rescale1",
)
COMPOSED = cases(*(f"composed_{rule}_{method}__igb4mtl" for rule in ("si", "igbv1") for method in ("mgda", "cagrad")))
NAMES = {"dualproj": "dual_proj"}


def options_of(method, params):
    if method == "cagrad":
        return {"c": params.get("c", params.get("calpha", params.get("cagrad_c"))), "rescale": params.get("rescale", 0)}
    return {"reg_eps": params["reg_eps"]} if "reg_eps" in params else {}


def assert_properties(method, gram, weights, status, options):
    if not gram.isfinite().all():
        assert status == Status.NON_FINITE
        assert weights.isnan().all()
    elif not gram.any():
        assert weights.tolist() == [1 / len(gram)] * len(gram)
    elif method == "mgda":
        assert_shortest(gram, weights, status)
    elif method == "cagrad":
        assert_optimal(gram, weights * (1 + options["c"] ** 2 if options["rescale"] else 1), status, options["c"])
    else:
        preference = weights.new_full((len(gram),), 1 / len(gram))
        assert (weights >= preference).all()
        assert conflict(gram, weights) <= NO_CONFLICT
        if method == "dual_proj":
            assert_projected(gram, weights, preference)


@pytest.mark.parametrize("case", PLAIN)
def test_update(case, backend):
    method = NAMES.get(case.file["method"], case.file["method"])
    options = options_of(method, case.params)
    gram = gramian(case.jacobian)
    weights, status = ops.solve(method, gram, backend=backend, **options)
    # The original takes G for 0 below this.
    projects = "norm_eps" not in case.params or method == "cagrad" or not gram.trace() < case.params["norm_eps"]
    if case.trust and projects:
        case.assert_update(case.jacobian.T @ weights)
        return
    if "reg_eps" in options:
        options["reg_eps"] = 0.0
        weights, status = ops.solve(method, gram, backend=backend, **options)
    assert_properties(method, gram, weights, Status(int(status)), options)


@pytest.mark.parametrize("case", COMPOSED)
def test_composition_with_a_loss_transform(case, backend):
    """IGB4MTL sums where the methods average: times K, and CAGrad divided by 1 + c²."""
    rule, _, method = case.file["method"].partition("+")
    bases = case.base_losses if rule == "igbv1" else None
    scales, _ = ops.loss_scales({"si": "log", "igbv1": "igb_v1"}[rule], case.losses, bases, backend=backend)
    gram = gramian(case.jacobian * scales[:, None])
    options = options_of(method, case.params)
    weights, status = ops.solve(method, gram, backend=backend, **options)
    factor = len(gram) / (1 + options["c"] ** 2 if method == "cagrad" else 1)
    if case.trust:
        case.assert_update(case.jacobian.T @ (scales * weights * factor))
    else:
        assert_properties(method, gram, weights, Status(int(status)), options)
