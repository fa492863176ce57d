"""MetaBalance: auxiliary gradients at the target's length, by averages of norms."""

from __future__ import annotations

import pytest
import torch
from golden import linear_losses

from igb_kernels import Balancer, MetaBalance, Status, ops

NORMS = torch.tensor([2.0, 8.0, 0.5], dtype=torch.float64)


@pytest.mark.parametrize("target", [0, 2])
@pytest.mark.parametrize("r", [0.0, 0.7, 1.0])
def test_the_first_step(backend, r, target):
    weights, status = ops.solve("metabalance", NORMS**2, r=r, target=target, backend=backend)
    torch.testing.assert_close(weights, r * NORMS[target] / NORMS + 1 - r)
    assert weights[target] == pytest.approx(1)
    assert status == 0


def test_norms_are_averaged(backend):
    state = ops.SOLVERS["metabalance"].new_state(3, torch.device("cpu"))
    steps = [NORMS, NORMS.flip(0), 3 * NORMS]
    average = steps[0]
    for norms in steps:
        average = 0.9 * average + 0.1 * norms
        weights, _ = ops.solve("metabalance", norms**2, state=state, r=1.0, backend=backend)
        torch.testing.assert_close(state, average)
        torch.testing.assert_close(weights, average[0] / average)


def test_a_task_joins_with_its_first_gradient(backend):
    state = ops.SOLVERS["metabalance"].new_state(2, torch.device("cpu"))
    for norms, expected in (([2.0, 0.0], [1.0, 1.0]), ([2.0, 4.0], [1.0, 0.5])):
        squares = torch.tensor(norms, dtype=torch.float64) ** 2
        weights, _ = ops.solve("metabalance", squares, state=state, r=1.0, backend=backend)
        torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64))


def test_a_balancer_s_update(backend):
    parameter = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = Balancer(MetaBalance(r=1.0, target=1), shared=[parameter], backend=backend).backward(
        linear_losses(parameter, rows, NORMS)
    )
    lengths = rows.norm(dim=1)
    torch.testing.assert_close(parameter.grad, ((lengths[1] / lengths)[:, None] * rows).sum(0))
    assert result.flags == Status(0)


@pytest.mark.parametrize("arguments", [{"r": 1.5}, {"beta": 1.0}, {"beta": -0.1}, {"target": -1}, {"target": 0.5}])
def test_bad_arguments(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name} must be"):
        MetaBalance(**arguments)


def test_a_target_that_is_not_there():
    parameter = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    balancer = Balancer(MetaBalance(target=3), shared=[parameter])
    with pytest.raises(ValueError, match="target must be the index of one of the 3 tasks, found 3"):
        balancer.backward([parameter.sum()] * 3)
