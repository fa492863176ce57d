"""GLS: the gradient of the losses' geometric mean."""

from __future__ import annotations

import pytest
import torch
from training import Training

from igb_kernels import Status, ops
from igb_kernels.losses import GLS


def test_scales_are_the_geometric_mean_s_gradient(backend):
    losses = torch.tensor([0.3, 7.0, 1.5], dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(losses.prod() ** (1 / 3), losses)
    scales, _ = ops.loss_scales("gls", losses.detach(), backend=backend)
    torch.testing.assert_close(scales, expected)
    assert float(scales @ losses.detach()) == pytest.approx(float(losses.detach().prod() ** (1 / 3)))  # degree 1


@pytest.mark.parametrize("loss", [1e-2, 1e2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_small_or_large_losses(backend, dtype, loss):
    """The product of 40 such losses is out of float32's range; the original's gradients are NaN there."""
    losses = torch.full((40,), loss, dtype=dtype)
    assert dtype is not torch.float32 or float(losses.prod()) in (0.0, float("inf"))
    scales, status = ops.loss_scales("gls", losses, backend=backend)
    torch.testing.assert_close(scales, torch.full_like(losses, 1 / 40))
    assert status == 0


@pytest.mark.parametrize("losses", [[1e308, 1e-308], [5e-324, 1.0, 1e308], [1e300] * 1000])
def test_extreme_losses(backend, losses):
    scales, status = ops.loss_scales("gls", torch.tensor(losses, dtype=torch.float64), backend=backend)
    assert (scales.isfinite() & (scales > 0)).all()
    assert status == 0


def test_a_loss_of_zero_stops_every_task(backend):
    """And the step is reported; it is not NaN, which would spoil the parameters."""
    training = Training(GLS(), backend, "imtl_g")
    result = training.step([0.0, 2.0])
    assert result.scales.tolist() == [0.0, 0.0]
    assert Status.NON_POSITIVE_LOSS in result.flags
    assert not training.parameters.grad.any()


def test_a_negative_loss_beside_a_zero(backend):
    scales, status = ops.loss_scales("gls", torch.tensor([0.0, -1.0, 2.0]), backend=backend)
    assert scales.isnan().all()
    assert status == Status.NON_POSITIVE_LOSS


def test_direction_is_free_of_the_losses_units(backend):
    losses, factors = (torch.tensor(v, dtype=torch.float64) for v in ([0.3, 7.0, 1.5], [1e-4, 1e3, 5.0]))
    before, after = (ops.loss_scales("gls", values, backend=backend)[0] for values in (losses, factors * losses))
    ratio = factors * after / before
    torch.testing.assert_close(ratio, factors.prod().pow(1 / 3).expand(3))
