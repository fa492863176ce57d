"""Where nash-mtl's weights differ from ours, ours solve the method's own problem, and nash-mtl's do not."""

from __future__ import annotations

import pytest
import torch

from benchmarks.differences import RATIOS, RESIDUALS, is_here, jacobian, nash_mtl, worst
from igb_kernels.integrations import nash_mtl as integration

OURS = 3e-5
"""On float32 rows, with weights that are rounded to it."""
NAMES = {"MGDA": "mgda", "CAGrad": "cagrad", "IMTLG": "imtl", "NashMTL": "nashmtl"}
THEIRS = {"MGDA": 1.0, "CAGrad": 0.5, "IMTLG": 1e-2, "NashMTL": 10.0}
"""At least, for rows of which one is 10,000 times as long as another."""


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")
def test_residuals(name):
    if not is_here("nash-mtl"):
        pytest.skip("IGB_PEERS names no folder with a checkout of nash-mtl, or cvxpy with ECOS is not installed")
    ours, theirs = nash_mtl()[name]
    assert max(worst(RESIDUALS[name], ours, ratio) for ratio in RATIOS) < (1e-3 if name == "MGDA" else OURS)
    assert worst(RESIDUALS[name], theirs, RATIOS[-1]) > THEIRS[name]


@pytest.mark.parametrize("name", ["IMTLG", "NashMTL"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_ours(name, ratio):
    """Also where the original is not there."""

    def weights(rows: torch.Tensor) -> torch.Tensor:
        x = torch.zeros(rows.shape[1], requires_grad=True)
        method = integration.WeightMethods(NAMES[name], n_tasks=len(rows), device="cpu")
        return method.backward(losses=rows @ x, shared_parameters=[x])[1]["weights"]

    assert jacobian(ratio, 0).shape[0] > 2
    assert worst(RESIDUALS[name], weights, ratio) < OURS
