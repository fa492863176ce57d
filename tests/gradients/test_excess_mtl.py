"""ExcessMTL: excess risks relative to the first step's move the weights."""

from __future__ import annotations

import pytest
import torch
from golden import cases, linear_losses

from igb_kernels import Balancer, ExcessMTL, Status, ops

VARIANTS = {"excess_mtl__libmtl": ExcessMTL(), "excess_mtl__torchjd": ExcessMTL(0.01, parity="torchjd")}


def excesses(jacobians):
    """Of each step, by the definition."""
    accumulated = torch.zeros_like(jacobians[0])
    for rows in jacobians:
        accumulated = accumulated + rows**2
        yield (rows**2 / (accumulated + 1e-7).sqrt()).sum(dim=1)


@pytest.mark.parametrize(("file", "case"), [(f, c.values[0]) for f in VARIANTS for c in cases(f)])
def test_weights_of_the_originals(file, case, backend):
    options = VARIANTS[file].options()
    state = ops.SOLVERS["excess_mtl"].new_state(len(case.steps[0].losses), torch.device("cpu"))
    for step, excess in zip(case.steps, excesses([s.jacobian for s in case.steps]), strict=True):
        weights, status = ops.solve("excess_mtl", excess, state=state, backend=backend, **options)
        if case.trust:
            step.assert_update(step.jacobian.T @ weights)
        else:
            # The original's weights become NaN, for good, where a task starts without gradient; and underflow.
            assert case.tags & {"zero-row", "all-zero", "huge"}
            assert weights.isfinite().all()
            assert Status(int(status)) & ~(Status.ZERO_GRADIENT | Status.ALL_INACTIVE) == Status(0)


@pytest.mark.parametrize(("file", "case"), [(f, c.values[0]) for f in VARIANTS for c in cases(f) if c.values[0].trust])
def test_a_balancer_s_updates(file, case, backend):
    """Its accumulated squares, too, are those of the originals."""
    size = case.steps[0].jacobian.shape[1]
    parts = [torch.zeros(n, dtype=torch.float64, requires_grad=True) for n in (size // 3, size - size // 3)]
    method = ExcessMTL(0.01, parity=VARIANTS[file].parity)
    balancer = Balancer(method, shared=parts, backend=backend)
    for i, step in enumerate(case.steps):
        if i == 2:  # moved to another balancer on the way
            saved, method = balancer.state_dict(), ExcessMTL(0.01, parity=method.parity)
            balancer = Balancer(method, shared=parts, backend=backend)
            balancer.load_state_dict(saved)
        result = balancer.backward(linear_losses(torch.cat(parts), step.jacobian, step.losses))
        step.assert_update(torch.cat([p.grad for p in parts]))
        assert result.measured is None
        for p in parts:
            p.grad = None


def test_a_step_that_is_not_finite_does_not_count(backend):
    parameter = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    harmed = rows.clone()
    harmed[1, 2] = torch.inf
    results = []
    for middle in ([], [harmed]):
        balancer = Balancer(ExcessMTL(1.0), shared=[parameter], backend=backend)
        for given in [rows, *middle, 2 * rows]:
            parameter.grad = None
            result = balancer.backward(linear_losses(parameter, given, torch.ones(2, dtype=torch.float64)))
            assert (Status.NON_FINITE in result.flags) == (given is harmed)
        results.append(result.weights)
    assert torch.equal(*results)


def test_weights_far_apart_stay_finite(backend):
    """They are kept as logarithms: exp(1000) would overflow."""
    state = ops.SOLVERS["excess_mtl"].new_state(2, torch.device("cpu"))
    for excess in ([1.0, 1.0], [1000.0, 1.0], [1000.0, 1.0]):
        weights, _ = ops.solve(
            "excess_mtl", torch.tensor(excess, dtype=torch.float64), state=state, eta=1.0, backend=backend
        )
    assert weights.tolist() == [2.0, 0.0]


def test_a_task_that_starts_finished_waits_for_its_first_gradient(backend):
    """The original divides by its first excess risk, 0, and has NaN weights from then on."""
    state = ops.SOLVERS["excess_mtl"].new_state(2, torch.device("cpu"))
    for excess, relative in (([0.0, 1.0], [0.0, 0.0]), ([5.0, 2.0], [0.0, 2.0]), ([10.0, 1.0], [2.0, 3.0])):
        weights, _ = ops.solve(
            "excess_mtl", torch.tensor(excess, dtype=torch.float64), state=state, eta=1.0, backend=backend
        )
        torch.testing.assert_close(weights, 2 * torch.tensor(relative, dtype=torch.float64).softmax(0))


@pytest.mark.parametrize("arguments", [{"eta": -1.0}, {"eta": float("nan")}, {"parity": "libmtl"}])
def test_bad_arguments(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{name} must be"):
        ExcessMTL(**arguments)
