"""A training step through LibMTL's own code, with its weightings and with this package's in their place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import peers
from benchmarks.models import USERS_MODELS, built
from igb_kernels.bench.loops import libmtl_losses, libmtl_model

ROUNDS = {"mlp-33k": 100, "mlp-5.8m": 8, "cnn-4.7m": 6, "qm9-schnet": 5}

METHODS: dict[str, dict[str, object]] = {
    "IMTL": {},
    "MGDA": {"mgda_gn": "none"},
    "DB_MTL": {"DB_beta": 0.9, "DB_beta_sigma": 0},
    "Nash_MTL": {"update_weights_every": 1, "optim_niter": 20, "max_norm": 1.0},
    "UPGrad": {"UPGrad_norm_eps": 1e-4, "UPGrad_reg_eps": 1e-4},
}
"""Weightings with LibMTL's default arguments."""


@pytest.mark.parametrize("tasks", [3, 8, 11])
@pytest.mark.parametrize("model", USERS_MODELS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # cvxpy's
def test_libmtl(compare, device, method: str, model: str, tasks: int) -> None:
    weightings = vars(peers.libmtl("weighting"))
    if method not in weightings:
        pytest.skip(f"the installed LibMTL has no {method}; a checkout in IGB_PEERS has")
    from igb_kernels.integrations import libmtl

    task = built(model, tasks, device)
    ours, theirs = (libmtl_model(cls, task) for cls in (libmtl.weighting(method), weightings[method]))

    def setup() -> tuple[()]:
        ours.zero_grad(set_to_none=False)  # as LibMTL's Trainer
        return ()

    def step(model: nn.Module) -> None:
        model.backward(libmtl_losses(model, task), **METHODS[method])

    updates = []
    for contender in (ours, theirs):
        setup()
        step(contender)
        updates.append(torch.cat([p.grad.flatten() for p in task.shared]))
    agreement = torch.nn.functional.cosine_similarity(*updates, dim=0)
    if method != "Nash_MTL":  # LibMTL's solver may fail, and then keeps earlier weights
        assert float(agreement) > 1 - 1e-3, "a speed is worth nothing where the results disagree"
    compare(lambda: step(ours), {"libmtl": lambda: step(theirs)}, {}, rounds=ROUNDS[model], setup=setup)
