"""GradDrop through a balancer; the operation itself is tested in tests/ops/test_sign_drop.py."""

from __future__ import annotations

import pytest
import torch
from golden import linear_losses

from igb_kernels import Balancer, GradDrop, Status, ops

ROWS = torch.randn(3, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LOSSES = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)


def balance(method, backend, rows=ROWS, steps=1, **arguments):
    """The last update and result, of two parameters of different size."""
    parts = [torch.zeros(n, dtype=torch.float64, requires_grad=True) for n in (150, 250)]
    balancer = Balancer(method, shared=parts, backend=backend, **arguments)
    for _ in range(steps):
        for p in parts:
            p.grad = None
        result = balancer.backward(linear_losses(torch.cat(parts), rows, LOSSES))
    return torch.cat([p.grad for p in parts]), result


def assert_one_sign(update, rows):
    """Every element is the sum of its positive gradients, or of its negative ones."""
    positive, negative = rows.clamp_min(0).sum(0), rows.clamp_max(0).sum(0)
    near = torch.stack([(update - positive).abs(), (update - negative).abs()]).min(dim=0).values
    assert near.max() < 1e-12


def test_each_element_keeps_one_sign(backend):
    update, result = balance(GradDrop(seed=1), backend)
    assert_one_sign(update, ROWS)
    assert result.flags == Status(0)
    assert result.weights.tolist() == [1, 1, 1]
    assert result.measured is None


def test_a_seed_decides(backend):
    first, again = (balance(GradDrop(seed=1), backend)[0] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, balance(GradDrop(seed=2), backend)[0])
    assert not torch.equal(first, balance(GradDrop(seed=1), backend, steps=2)[0])
    updates = []
    for _ in range(2):
        torch.manual_seed(5)
        updates.append(balance(GradDrop(), backend)[0])
    assert torch.equal(*updates)


def test_the_keeping_probability(backend):
    """P(positive kept) = (1 + Σ g / Σ |g|) / 2, here 0.7."""
    rows = torch.tensor([[1.4], [-0.6]], dtype=torch.float64).repeat(1, 20_000)
    parameter = torch.zeros(20_000, dtype=torch.float64, requires_grad=True)
    Balancer(GradDrop(seed=3), shared=[parameter], backend=backend).backward(linear_losses(parameter, rows, LOSSES[:2]))
    assert float((parameter.grad > 0).double().mean()) == pytest.approx(0.7, abs=0.015)


def test_what_leaks_always_passes(backend):
    plain, _ = balance(GradDrop(seed=1), backend)
    leaky, _ = balance(GradDrop([1.0, 0.0, 0.5], seed=1), backend)
    assert_one_sign(plain, ROWS)
    positive = torch.isclose(plain, ROWS.clamp_min(0).sum(0))
    kept = torch.where(positive, ROWS > 0, ROWS < 0)
    leak = torch.tensor([[1.0], [0.0], [0.5]], dtype=torch.float64)
    torch.testing.assert_close(leaky, ((leak + (1 - leak) * kept) * ROWS).sum(0))


def test_gradients_that_were_there_are_added_to(backend):
    parameter = torch.zeros(400, dtype=torch.float64, requires_grad=True)
    updates = []
    for before in (None, torch.ones(400, dtype=torch.float64)):
        parameter.grad = before
        Balancer(GradDrop(seed=1), shared=[parameter], backend=backend).backward(linear_losses(parameter, ROWS, LOSSES))
        updates.append(parameter.grad)
        assert before is None or parameter.grad is before
    torch.testing.assert_close(updates[1], updates[0] + 1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_and_does_not_count(backend, value):
    harmed = ROWS.clone()
    harmed[1, 7] = value
    method = GradDrop(seed=1)
    update, result = balance(method, backend, harmed)
    assert result.flags == Status.NON_FINITE
    assert not update[7].isfinite()
    assert method.state.tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    parameter = torch.zeros(400, dtype=dtype, requires_grad=True)
    losses = [(parameter * row.to(dtype)).sum() for row in ROWS]
    Balancer(GradDrop(seed=1), shared=[parameter]).backward(losses)
    assert parameter.grad.dtype is dtype
    rows = ROWS.to(dtype).double()
    expected = torch.zeros(400, dtype=torch.float64)
    ops.sign_drop_([expected], rows, torch.tensor([1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(
        parameter.grad.double(), expected, rtol=2e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"leak": [0.5, 2.0]}, "leak must be K numbers from 0 to 1"),
        ({"leak": 0.5}, "leak must be K numbers from 0 to 1"),
        ({"seed": -1}, "seed must be None or an integer"),
        ({"seed": 2**53}, "seed must be None or an integer"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        GradDrop(**arguments)


def test_a_leak_for_another_number_of_tasks(backend):
    with pytest.raises(ValueError, match="leak must have one number for each of the 3 tasks, found 2"):
        balance(GradDrop([0.5, 0.5]), backend)
