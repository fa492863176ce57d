"""The original loss-balancing rules' effective weights, from golden vectors.

Our policy differs where a loss is not finite (every scale is NaN, NON_FINITE) or is negative under a logarithm (every
scale is NaN, NON_POSITIVE_LOSS; the originals silently ascend that task): there the policy is tested, also where the
case is trusted.
"""

from __future__ import annotations

import pytest
import torch
from golden import cases

from igb_kernels import IMTLL, Status, ops
from igb_kernels.backends import resolve

RULES = {"ew": "none", "si": "log", "igbv1": "igb_v1", "imtl_l": "imtl_l"}
PER_TASK = {"igbv1": "base_losses", "imtl_l": "log_scale"}
UNDER_A_LOGARITHM = ("si", "igbv1")

CASES = cases("ew__libmtl", "si__igb4mtl", "igbv1__igb4mtl", "imtl_l__torchjd")


@pytest.mark.parametrize("case", CASES)
def test_scales(case, backend):
    name, losses = case.file["method"], case.losses
    per_task = getattr(case, PER_TASK[name]) if name in PER_TASK else None
    scales, status = ops.loss_scales(RULES[name], losses, per_task, backend=backend)
    if not losses.isfinite().all():
        assert (Status(int(status)), scales.isnan().all()) == (Status.NON_FINITE, True)
    elif name in UNDER_A_LOGARITHM and (losses < 0).any():
        assert (Status(int(status)), scales.isnan().all()) == (Status.NON_POSITIVE_LOSS, True)
    elif case.trust:
        assert status == 0
        case.assert_weights(scales)
    else:
        assert case.tags == {"zero-loss"}
        assert status == 0
        assert (scales.isfinite() & (scales > 0)).all()
        others = losses > 0
        torch.testing.assert_close(scales[others], case.weights[others], rtol=1e-10, atol=0)


@pytest.mark.parametrize("case", [case for case in CASES if case.values[0].file["method"] == "imtl_l"])
def test_gradient_of_log_scales(case, backend):
    rule = IMTLL(len(case.losses), dtype=torch.float64)
    rule.load_state_dict({"log_scales": case.log_scale})
    scales, status = rule.scales(case.losses, resolve(backend, "cpu"))
    rule.commit(case.losses, scales, status)
    if case.losses.isfinite().all():
        torch.testing.assert_close(rule.log_scales.grad, case.dlog_scale, rtol=1e-10, atol=1e-14)
    else:
        assert rule.log_scales.grad.isnan().all()
