"""SDMGrad and MoDo: projected steps on cross-Gramians, which are not symmetric."""

from __future__ import annotations

import pytest
import torch
from golden import cases

from igb_kernels import MoDo, SDMGrad, Status, ops

CROSS = torch.tensor([[2.0, -1.0, 0.5], [0.3, 1.0, -0.2], [-0.6, 0.4, 3.0]], dtype=torch.float64)


def on_simplex(values):
    """The nearest point of the simplex, by bisection on the shift."""
    low, high = values.min() - 1, values.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (values - middle).clamp_min(0).sum() > 1 else (low, middle)
    return (values - low).clamp_min(0)


@pytest.mark.parametrize("case", cases("sdmgrad__torchjd"))
def test_weights_of_the_original(case, backend):
    params = case.params
    assert case.trust
    method = SDMGrad(params["lambda_"], params["lr"], params["momentum"], int(params["n_iter"]), eps=1e-8)
    state = ops.SOLVERS["sdm_grad"].new_state(len(case.steps[0].cross_gram), torch.device("cpu"))
    for step in case.steps:
        weights, status = ops.solve("sdm_grad", step.cross_gram, state=state, backend=backend, **method.options())
        torch.testing.assert_close(weights, step.weights, rtol=1e-6, atol=1e-6)
        assert status == 0


def test_one_step_of_sdm_grad(backend):
    state = ops.SOLVERS["sdm_grad"].new_state(3, torch.device("cpu"))
    options = SDMGrad(lam=0.3, lr=0.7, iterations=1).options()
    weights, _ = ops.solve("sdm_grad", CROSS, state=state, backend=backend, **options)
    equal = torch.full((3,), 1 / 3, dtype=torch.float64)
    square = CROSS.diagonal().sqrt().mean() ** 2
    w = on_simplex(equal - 0.7 * CROSS @ (1.3 * equal) / square)
    torch.testing.assert_close(state, w)
    torch.testing.assert_close(weights, (w + 0.3 * equal) / 1.3)


def test_one_step_of_modo(backend):
    state = ops.SOLVERS["modo"].new_state(3, torch.device("cpu"))
    weights, status = ops.solve("modo", CROSS, state=state, backend=backend, **MoDo(gamma=0.4, rho=0.2).options())
    equal = torch.full((3,), 1 / 3, dtype=torch.float64)
    torch.testing.assert_close(weights, on_simplex(equal - 0.4 * (CROSS @ equal + 0.2 * equal)))
    assert torch.equal(weights, state)
    assert status == 0


@pytest.mark.parametrize("method", ["modo", "sdm_grad"])
def test_a_negative_diagonal_is_noise_and_no_missing_gradient(backend, method):
    cross = CROSS.clone()
    cross[1, 1] = -0.1
    weights, status = ops.solve(method, cross, backend=backend)
    assert Status(int(status)) == Status(0)
    assert weights.isfinite().all()


@pytest.mark.parametrize("factor", [1e-8, 1e8])
def test_sdm_grad_does_not_depend_on_the_gradients_scale(backend, factor):
    """The originals add 1e-8 to the squared norm, so small gradients leave the weights where they are."""
    weights, _ = ops.solve("sdm_grad", CROSS, backend=backend)
    scaled, _ = ops.solve("sdm_grad", factor * CROSS, backend=backend)
    torch.testing.assert_close(scaled, weights, rtol=1e-6, atol=1e-6)


def test_modo_finds_the_min_norm_weights(backend):
    rows = torch.tensor([[1.0, 0.2, 0.0], [-0.5, 1.0, 0.3]], dtype=torch.float64)
    state = ops.SOLVERS["modo"].new_state(2, torch.device("cpu"))
    for _ in range(500):
        weights, _ = ops.solve("modo", rows @ rows.T, state=state, backend=backend)
    share = (rows[1] @ (rows[1] - rows[0])) / (rows[1] - rows[0]).square().sum()
    torch.testing.assert_close(weights, torch.stack([share, 1 - share]))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: SDMGrad(lam=-1.0), "lam"),
        (lambda: SDMGrad(lr=-1.0), "lr"),
        (lambda: SDMGrad(momentum=2.0), "momentum"),
        (lambda: SDMGrad(iterations=0), "iterations"),
        (lambda: SDMGrad(eps=-1.0), "eps"),
        (lambda: MoDo(gamma=float("inf")), "gamma"),
        (lambda: MoDo(rho=-0.1), "rho"),
    ],
)
def test_bad_arguments(make, name):
    with pytest.raises(ValueError, match=f"{name} must be"):
        make()
