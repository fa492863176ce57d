"""DB-MTL's golden sequences, from the ops and from a Balancer that is given losses with these gradients."""

from __future__ import annotations

import pytest
import torch
from golden import cases, linear_losses

from igb_kernels import DBMTL, Balancer, Log, ops

SEQUENCES = cases("db_mtl__libmtl_beta0_sigma0", "db_mtl__libmtl_beta0.5_sigma0.5", "db_mtl__libmtl_beta0.9_sigma0")


def assert_update(step, found):
    """Untrusted are opposed gradients, whose update is what rounding leaves of their difference."""
    if step.trust:
        step.assert_update(found)
    else:
        assert (found - step.update).norm() <= 1e-10 * step.update.norm().clamp_min(1)


@pytest.mark.parametrize("case", SEQUENCES)
def test_sequence_from_ops(case, backend):
    options = {"beta": case.params["DB_beta"], "sigma": case.params["DB_beta_sigma"], "eps": case.params["eps_norm"]}
    tasks, size = case.steps[0].jacobian.shape
    averages = [[torch.zeros(size, dtype=torch.float64)] for _ in range(tasks)]
    state = ops.SOLVERS["db_mtl"].new_state(tasks, torch.device("cpu"), **options)
    for step in case.steps:
        scales, _ = ops.loss_scales("log", step.losses, eps=case.params["eps_log"], backend=backend)
        rows = [[row] for row in step.jacobian * scales[:, None]]
        norms = ops.ema_(averages, averages, rows, state[1], backend=backend)
        weights, _ = ops.solve("db_mtl", norms, state=state, backend=backend, **options)
        update = torch.empty(size, dtype=torch.float64)
        ops.combine_([update], averages, weights, backend=backend)
        assert_update(step, update)


@pytest.mark.parametrize("case", SEQUENCES)
def test_sequence_from_a_balancer(case, backend):
    """With beta = 0, nothing is stored and each gradient is added as it comes."""
    size = case.steps[0].jacobian.shape[1]
    parts = [torch.zeros(n, dtype=torch.float64, requires_grad=True) for n in (size // 3, size - size // 3)]
    method = DBMTL(case.params["DB_beta"], case.params["DB_beta_sigma"], eps=case.params["eps_norm"])
    balancer = Balancer(method, Log(case.params["eps_log"]), shared=parts, backend=backend)
    for step in case.steps:
        balancer.backward(linear_losses(torch.cat(parts), step.jacobian, step.losses))
        assert_update(step, torch.cat([p.grad for p in parts]))
        for p in parts:
            p.grad = None
