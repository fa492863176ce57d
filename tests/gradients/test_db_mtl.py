"""DB-MTL: moving averages of the gradients of log losses, rescaled to the largest norm."""

from __future__ import annotations

import pytest
import torch
from golden import linear_losses
from hypothesis import given
from hypothesis import strategies as st
from samplers import WELL_POSED, gramian, jacobian

from igb_kernels import DBMTL, Balancer, Log, Status, ops
from igb_kernels.gradients.db_mtl import DECAY, DECAY_PRODUCT, STEP


def balanced(method, steps, backend, losses="none", dtype=torch.float64, values=None):
    """The updates that a Balancer makes of these Jacobians, one a step."""
    parameters = torch.zeros(steps[0].shape[1], dtype=dtype, requires_grad=True)
    balancer = Balancer(method, losses, shared=[parameters], backend=backend)
    updates = []
    for rows in steps:
        given = torch.ones(len(rows)) if values is None else values
        balancer.backward(linear_losses(parameters, rows.to(dtype), given.to(dtype)))
        updates.append(parameters.grad)
        parameters.grad = None
    return updates


@pytest.mark.parametrize("relative_eps", [False, True])
@given(st.sampled_from(WELL_POSED), st.integers(1, 12), st.integers(0, 999))
def test_rescaled_rows_have_the_largest_norm(backend, relative_eps, family, tasks, seed):
    rows = jacobian(family, tasks, seed)
    norms = rows.norm(dim=1)
    options = {"beta": 0.0, "relative_eps": relative_eps, "eps": 0.0}
    weights, _ = ops.solve("db_mtl", norms**2, backend=backend, **options)
    rescaled = (weights * norms).tolist()
    relative_error = 2e-12 * float(norms.max() / norms.min()) if relative_eps else 1e-14
    assert rescaled == pytest.approx([float(norms.max())] * tasks, rel=relative_error)


def test_eps_is_absolute_unless_asked_otherwise(backend):
    """At norms near 1e-8 the peer's eps makes rescaled norms unequal."""
    norms = torch.tensor([1e-9, 3e-9], dtype=torch.float64)
    absolute, _ = ops.solve("db_mtl", norms**2, beta=0.0, backend=backend)
    assert (absolute * norms).tolist() == pytest.approx([2.7e-10, 6.9e-10], rel=0.02)
    relative, _ = ops.solve("db_mtl", norms**2, beta=0.0, relative_eps=1.0, backend=backend)
    assert (relative * norms).tolist() == pytest.approx([3e-9, 3e-9], rel=1e-11)


@pytest.mark.parametrize("sigma", [0.0, 0.5, 1.0])
def test_decay_fades_with_sigma(backend, sigma):
    """β_t = β / t^σ is the state's second entry before step t; the product of all so far is its third."""
    beta, product = 0.8, 1.0
    state = ops.SOLVERS["db_mtl"].new_state(2, torch.device("cpu"), beta=beta)
    for step in range(1, 6):
        assert state[STEP] == step - 1
        assert float(state[DECAY]) == pytest.approx(beta / step**sigma)
        assert float(state[DECAY_PRODUCT]) == pytest.approx(product)
        product *= beta / step**sigma
        ops.solve("db_mtl", torch.ones(2), state=state, beta=beta, sigma=sigma, backend=backend)


@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_bias_correction_gives_full_size_from_the_first_step(backend, sigma):
    rows = jacobian("spread 1e-2..1e2", 3)
    (expected,) = balanced(DBMTL(0.0, eps=0.0), [rows], backend)
    corrected = balanced(DBMTL(0.9, sigma, eps=0.0, bias_correction=True), [rows] * 6, backend)
    for update in corrected:
        torch.testing.assert_close(update, expected, rtol=1e-12, atol=0)


def test_without_it_the_first_update_is_scaled_by_one_minus_beta(backend):
    rows = jacobian("random", 3)
    (expected,) = balanced(DBMTL(0.0, eps=0.0), [rows], backend)
    updates = balanced(DBMTL(0.9, eps=0.0), [rows] * 3, backend)
    for step, update in enumerate(updates, start=1):
        torch.testing.assert_close(update, (1 - 0.9**step) * expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_log_losses_make_the_update_free_of_their_scales(backend, beta):
    rows, values = jacobian("random", 4), torch.tensor([0.3, 1.0, 2.0, 5.0], dtype=torch.float64)
    factors = torch.tensor([1e-3, 1.0, 50.0, 1e3], dtype=torch.float64)
    method = DBMTL(beta, eps=0.0)
    expected = balanced(method, [rows] * 2, backend, Log(), values=values)
    scaled = balanced(DBMTL(beta, eps=0.0), [factors[:, None] * rows] * 2, backend, Log(), values=factors * values)
    torch.testing.assert_close(scaled, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("eps", [1e-8, 0.0])
@pytest.mark.parametrize("relative_eps", [False, True])
def test_a_task_without_gradient_is_left_out(backend, beta, eps, relative_eps):
    rows = jacobian("zero row", 3)
    (update,) = balanced(DBMTL(beta, eps=eps, relative_eps=relative_eps), [rows], backend)
    others = rows[[0, 2]]
    (expected,) = balanced(DBMTL(beta, eps=eps, relative_eps=relative_eps), [others], backend)
    torch.testing.assert_close(update, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_average_decays_where_no_task_reaches_its_parameter(backend, dtype):
    """The second step reaches only the first parameter; what is left of the second one's average is β of it."""
    first, second = (torch.zeros(20, dtype=dtype, requires_grad=True) for _ in range(2))
    balancer = Balancer(DBMTL(0.5, eps=0.0), "none", shared=[first, second], backend=backend)
    balancer.backward([(2 * first + second).sum()])
    second.grad = None
    balancer.backward([first.sum()])
    torch.testing.assert_close(second.grad, torch.full((20,), 0.25, dtype=dtype))  # one task: its weight is 1


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_non_finite_step_leaves_the_averages_and_the_state(backend, beta):
    rows = jacobian("random", 2)
    parameters = torch.zeros(rows.shape[1], dtype=torch.float64, requires_grad=True)
    balancer = Balancer(DBMTL(beta, 0.5), "none", shared=[parameters], backend=backend)
    updates = []
    for losses in ([1.0, 2.0], [1.0, torch.nan], [1.0, 2.0]):
        given = linear_losses(parameters, rows, torch.tensor(losses, dtype=torch.float64))
        given[1] = given[1] * losses[1]  # NaN in the gradient, too
        result = balancer.backward(given)
        assert (Status.NON_FINITE in result.flags) == (losses[1] != 2.0)
        updates.append(parameters.grad)
        parameters.grad = None
    assert updates[1].isnan().all()
    other = Balancer(DBMTL(beta, 0.5), "none", shared=[parameters], backend=backend)
    for _ in range(2):
        given = linear_losses(parameters, rows, torch.tensor([1.0, 2.0], dtype=torch.float64))
        parameters.grad = None
        other.backward([given[0], 2 * given[1]])
    assert torch.equal(updates[2], parameters.grad)


def test_the_gramian_is_that_of_norms(backend):
    gram = gramian(jacobian("random", 5))
    full, norms = (ops.solve("db_mtl", g, backend=backend)[0] for g in (gram, gram.diagonal()))
    assert torch.equal(full, norms)
