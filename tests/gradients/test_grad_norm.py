"""GradNorm: learned weights that make the gradients' norms follow the tasks' rates of training."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from golden import cases, linear_losses
from samplers import jacobian

from igb_kernels import Balancer, Status, ops
from igb_kernels.gradients import GradNorm

GRADIENT = 3
"""Rows of the state: whether L(0) is known, steps behind the sums of losses, these sums; and the gradient."""

FORMS = {"softmax": 0.0, "direct": 1.0}
every_form = pytest.mark.parametrize("form", FORMS)


def state_of(initial):
    initial = torch.as_tensor(initial, dtype=torch.float64)
    ones = torch.ones_like(initial)
    return torch.cat([ones, ones, initial, torch.full_like(initial, torch.nan)])


def solve(norms, losses, parameter, initial, backend, **options):
    """Weights, status, and the gradient of the parameter."""
    norms, losses, parameter = (torch.as_tensor(v, dtype=torch.float64) for v in (norms, losses, parameter))
    state = state_of(initial)
    weights, status = ops.solve("grad_norm", norms**2, losses, parameter, state=state, backend=backend, **options)
    return weights, Status(int(status)), state.view(4, -1)[GRADIENT]


def objective_gradient(norms, losses, parameter, initial, form, alpha):
    """By autograd, as the paper says it."""
    p = torch.as_tensor(parameter, dtype=torch.float64).clone().requires_grad_()
    weights = p if form == "direct" else len(p) * p.softmax(0)
    weighted = weights * norms
    rates = losses / initial / (losses / initial).mean()
    (weighted - (weighted.mean() * rates**alpha).detach()).abs().sum().backward()
    return weights.detach(), p.grad


# ---- One solve ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("gradnorm__libmtl"))
def test_existing_code(case, backend):
    for step in case.steps:
        norms = step.jacobian.norm(dim=1)
        weights, status, gradient = solve(norms, step.losses, step.logits, step.initial_losses, backend)
        if not step.jacobian.isfinite().all():
            assert status == Status.NON_FINITE
            assert gradient.isnan().all()
            continue
        step.assert_update(step.jacobian.T @ weights)
        if Status.ZERO_GRADIENT in status:
            continue  # LibMTL's targets fall with every task that has no gradient
        expected, largest = torch.tensor(step.fields["dlogits"], dtype=torch.float64), norms.max()
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12 * float(largest))


@every_form
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.5])
@pytest.mark.parametrize("tasks", [2, 3, 8, 64])
@pytest.mark.parametrize("family", ["random", "rows 1e-3..1e3", "all rows x 1e-8", "all rows x 1e8"])
def test_the_gradient_is_that_of_the_objective(backend, family, tasks, alpha, form):
    norms = jacobian(family, tasks).norm(dim=1)
    generator = torch.Generator().manual_seed(tasks)
    losses, initial, parameter = torch.rand(3, tasks, dtype=torch.float64, generator=generator) + 0.1
    expected, want = objective_gradient(norms, losses, parameter, initial, form, alpha)
    weights, status, gradient = solve(
        norms, losses, parameter, initial, backend, alpha=alpha, direct=FORMS[form], wait=0.0
    )
    assert status == 0
    torch.testing.assert_close(weights, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(gradient, want, rtol=1e-10, atol=1e-13 * float(norms.max()))


@every_form
def test_one_task(backend, form):
    weights, status, gradient = solve([3.0], [0.7], [1.0], [2.0], backend, direct=FORMS[form])
    assert weights.tolist() == [1]
    assert gradient.tolist() == [0]
    assert status == 0


@every_form
def test_norms_at_their_targets_pull_nowhere(backend, form):
    """Equal to rounding is equal: seven norms of 0.1 have another sum than seven times 0.1."""
    _, _, gradient = solve([0.1] * 7, [0.3] * 7, [1.0] * 7, [0.9] * 7, backend, direct=FORMS[form])
    assert not gradient.any()


@every_form
def test_a_task_without_gradient_takes_no_part(backend, form):
    """It gets no weight, is left out of both means, and the others' pulls are as without it."""
    norms, losses, initial = [1.0, 0.0, 3.0, 0.4], [1.0, 9.0, 0.5, 0.3], [2.0, 1.0, 1.0, 1.0]
    parameter = [0.3, 0.1, 0.5, 1.2]
    keep = [0, 2, 3]
    weights, status, gradient = solve(norms, losses, parameter, initial, backend, direct=FORMS[form])
    assert status == Status.ZERO_GRADIENT
    assert weights[1] == 0
    others = [[v[i] for i in keep] for v in (norms, losses, parameter, initial)]
    expected, _, want = solve(*others, backend, direct=FORMS[form])
    torch.testing.assert_close(weights[keep] / weights[0], expected / expected[0])
    if form == "direct":
        torch.testing.assert_close(gradient[keep], want)
        assert gradient[1] == 0
    else:  # its logit is part of the normalisation
        assert gradient.sum() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("initial", [0.0, -1.0])
def test_a_task_without_initial_loss_has_the_mean_rate(backend, initial):
    """As the paper's r = 1; the mean is over the others."""
    norms, losses = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([1.0, 7.0, 0.2])
    found = solve(norms, losses, [0.0] * 3, [0.5, initial, 0.4], backend)
    rates = torch.tensor([2.0, 1.25, 0.5])  # of a middle task that has the mean rate of the others
    expected = solve(norms, rates, [0.0] * 3, [1.0] * 3, backend)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[2], expected[2])


@pytest.mark.parametrize("losses", [[0.0, 0.0], [-1.0, -2.0]])
def test_losses_that_have_reached_0_have_equal_rates(backend, losses):
    found = solve([1.0, 2.0], losses, [0.0, 0.0], [0.5, 0.7], backend)
    expected = solve([1.0, 2.0], [1.0, 1.0], [0.0, 0.0], [1.0, 1.0], backend)
    assert torch.equal(found[2], expected[2])


def test_extreme_rates_stay_finite(backend):
    weights, _, gradient = solve([1.0, 2.0, 1.0], [1e300, 1e-300, 1.0], [0.0] * 3, [1e-300, 1e300, 1.0], backend)
    assert weights.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_parameter_that_is_not_finite(backend, value):
    weights, status, gradient = solve([1.0, 2.0], [1.0, 1.0], [0.0, value], [1.0, 1.0], backend)
    assert weights.isnan().all()
    assert gradient.isnan().all()
    assert status == Status.NON_FINITE


def test_permuted_tasks(backend):
    generator = torch.Generator().manual_seed(2)
    values = torch.rand(4, 9, dtype=torch.float64, generator=generator) + 0.1
    order = torch.randperm(9, generator=generator)
    weights, _, gradient = solve(*values, backend)
    permuted, _, permuted_gradient = solve(*values[:, order], backend)
    torch.testing.assert_close(permuted, weights[order], rtol=1e-13, atol=0)
    torch.testing.assert_close(permuted_gradient, gradient[order], rtol=1e-12, atol=1e-14)


# ---- Steps of a balancer -----------------------------------------------------------------------------------------

ROWS = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)


class Steps:
    """Steps on losses with given values and the gradients ROWS."""

    def __init__(self, backend="cpu", **arguments):
        self.method = GradNorm(3, dtype=torch.float64, **arguments)
        self.balancer = Balancer(self.method, shared=[torch.zeros(3, dtype=torch.float64, requires_grad=True)],
                                 backend=backend)  # fmt: skip

    def __call__(self, *losses):
        (parameters,) = self.balancer.shared
        parameters.grad = None
        self.method.parameter.grad = None
        values = torch.tensor(losses, dtype=torch.float64)
        return self.balancer.backward(linear_losses(parameters, ROWS, values))


@every_form
def test_it_learns_equal_norms_where_rates_are_equal(backend, form):
    """From groups for an optimizer, which have the paper's learning rate."""
    steps = Steps(backend, form=form)
    (group,) = steps.balancer.param_groups()
    assert group["lr"] == 0.025
    assert group["params"] == [steps.method.parameter]
    optimizer = torch.optim.Adam([group])
    for _ in range(250):
        weights = steps(0.5, 2.0, 7.0).weights
        optimizer.step()
    norms = weights * ROWS.norm(dim=1)
    assert float(weights.sum()) == pytest.approx(3)
    assert norms.tolist() == pytest.approx([float(norms.mean())] * 3, rel=0.1)


def test_it_learns_larger_norms_for_slower_tasks(backend):
    steps = Steps(backend, alpha=1.0, initial_losses=[1.0, 1.0, 1.0])
    optimizer = torch.optim.Adam(steps.balancer.param_groups())
    for _ in range(250):
        weights = steps(0.5, 1.0, 1.5).weights
        optimizer.step()
    norms = weights * ROWS.norm(dim=1)
    assert (norms / norms.mean()).tolist() == pytest.approx([0.5, 1.0, 1.5], abs=0.1)


def test_a_small_model_is_trained():
    torch.manual_seed(0)
    encoder, heads = torch.nn.Linear(6, 8), torch.nn.ModuleList(torch.nn.Linear(8, 1) for _ in range(3))
    scales, x = (1.0, 30.0, 0.1), torch.randn(32, 6)
    targets = [torch.sin(x @ torch.randn(6, 1)) for _ in scales]
    balancer = Balancer(GradNorm(3), shared=encoder.parameters())
    params = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.Adam([{"params": params}, *balancer.param_groups()], lr=1e-2)

    def losses():
        z = torch.tanh(encoder(x))
        return [s * (h(z) - y).square().mean() for h, y, s in zip(heads, targets, scales, strict=True)]

    first = torch.stack(losses()).detach()
    for _ in range(200):
        optimizer.zero_grad()
        weights = balancer.backward(losses()).weights
        optimizer.step()
    last = torch.stack(losses()).detach()
    assert (last < 0.5 * first).all()
    assert weights[1] < weights[0] < weights[2]  # against the scales


def test_the_gradient_adds_up_as_autograd_s_would(backend):
    steps = Steps(backend)
    steps(1.0, 1.0, 1.0)
    once = steps.method.parameter.grad.clone()
    (parameters,) = steps.balancer.shared
    steps.balancer.backward(linear_losses(parameters, ROWS, torch.ones(3, dtype=torch.float64)))
    assert once.any()
    torch.testing.assert_close(steps.method.parameter.grad, 2 * once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_has_the_parameter_s_dtype(dtype):
    parameters = torch.zeros(3, requires_grad=True)
    method = GradNorm(3, dtype=dtype)
    Balancer(method, shared=[parameters]).backward(linear_losses(parameters, ROWS.float(), torch.ones(3)))
    assert method.parameter.grad.dtype is method.parameter.dtype is dtype


def test_initial_losses_are_those_of_the_first_step(backend):
    """The first that can be used."""
    steps = Steps(backend)
    assert steps.method.initial_losses is None
    steps(0.5, torch.nan, 7.0)
    assert steps.method.initial_losses.isnan().all()
    assert steps.method.parameter.grad.isnan().all()
    for losses in ((0.5, 2.0, 7.0), (1.0, 1.0, 1.0)):
        steps(*losses)
        assert steps.method.initial_losses.tolist() == [0.5, 2.0, 7.0]
    steps.balancer.end_epoch()
    assert steps.method.initial_losses.tolist() == [0.5, 2.0, 7.0]


def test_initial_losses_are_the_mean_of_an_epoch(backend):
    """LibMTL's; until it has ended, weights are 1 and nothing is learned."""
    steps = Steps(backend, initial_losses="epoch")
    with torch.no_grad():
        steps.method.parameter.copy_(torch.tensor([0.3, -0.2, 0.1]))
    steps(torch.nan, 1.0, 1.0)
    steps.balancer.end_epoch()  # an epoch without a step that could be used
    for losses in ((0.5, 2.0, 7.0), (0.5, torch.inf, 1.0), (1.5, 1.0, 1.0)):
        result = steps(*losses)
        if result.status == 0:
            assert result.weights.tolist() == [1, 1, 1]
            assert steps.method.parameter.grad.tolist() == [0, 0, 0]
        assert steps.method.initial_losses.isnan().all()
    steps.balancer.end_epoch()
    assert steps.method.initial_losses.tolist() == [1.0, 1.5, 4.0]
    result = steps(2.0, 2.0, 2.0)
    steps.balancer.end_epoch()
    assert steps.method.initial_losses.tolist() == [1.0, 1.5, 4.0]
    parameter = steps.method.parameter.detach()
    expected = solve(ROWS.norm(dim=1), [2.0, 2.0, 2.0], parameter, [1.0, 1.5, 4.0], backend)
    torch.testing.assert_close(result.weights, expected[0])
    torch.testing.assert_close(steps.method.parameter.grad, expected[2])


@pytest.mark.parametrize("initial", [[1.0, 1.5, 4.0], torch.tensor([1.0, 1.5, 4.0])], ids=["list", "tensor"])
def test_initial_losses_may_be_given(backend, initial):
    steps = Steps(backend, initial_losses=initial)
    steps(2.0, 2.0, 2.0)
    assert steps.method.initial_losses.tolist() == [1.0, 1.5, 4.0]
    expected = solve(ROWS.norm(dim=1), [2.0, 2.0, 2.0], [0.0] * 3, [1.0, 1.5, 4.0], backend)
    torch.testing.assert_close(steps.method.parameter.grad, expected[2])


def test_rates_are_of_the_raw_losses(backend):
    """Norms are of the scaled gradients; a log's values may be negative."""
    method = GradNorm(3, initial_losses=[1.0, 1.5, 4.0], dtype=torch.float64)
    parameters = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    losses = torch.tensor([0.5, 2.0, 0.1], dtype=torch.float64)
    Balancer(method, "log", shared=[parameters], backend=backend).backward(linear_losses(parameters, ROWS, losses))
    expected = solve(ROWS.norm(dim=1) / losses, losses, [0.0] * 3, [1.0, 1.5, 4.0], backend)
    torch.testing.assert_close(method.parameter.grad, expected[2])


def test_weights_themselves_are_cut_and_brought_back_to_their_sum(backend):
    """The gradient is that of the weights in use, and so the parameter becomes them."""
    steps = Steps(backend, form="direct")
    with torch.no_grad():
        steps.method.parameter.copy_(torch.tensor([1.0, -0.5, 3.0]))
    result = steps(1.0, 1.0, 1.0)
    assert result.weights.tolist() == steps.method.parameter.tolist() == [0.75, 0, 2.25]
    assert steps.method.parameter.grad.tolist() == [3.0, -0.5, 1.0]
    with torch.no_grad():
        steps.method.parameter.copy_(torch.tensor([-1.0, -0.5, 0.0]))
    assert steps(1.0, 1.0, 1.0).weights.tolist() == [1, 1, 1]


@every_form
@pytest.mark.parametrize("losses", [(torch.nan, 1.0, 1.0), (1.0, torch.inf, 1.0)])
def test_a_step_without_weights_teaches_nothing(backend, form, losses):
    steps = Steps(backend, form=form)
    steps(1.0, 2.0, 3.0)
    before = copy.deepcopy(steps.balancer.state_dict())
    result = steps(*losses)
    assert result.weights.isnan().all()
    assert steps.method.parameter.grad.isnan().all()
    after = steps.balancer.state_dict()["gradients"]
    for key, value in before["gradients"].items():
        assert torch.equal(after[key].nan_to_num(9.0), value.nan_to_num(9.0))


@every_form
@pytest.mark.parametrize("initial", ["first", "epoch", [0.5, 1.0, 2.0]], ids=str)
@pytest.mark.parametrize("saved_at", [0, 2, 5])
def test_a_loaded_run_goes_on_with_the_same_bits(form, initial, saved_at):
    def run(steps, optimizer, first, last):
        trace = []
        for t in range(first, last):
            result = steps(1.0 + t, 2.0, 3.0 / (1 + t))
            trace += [result.weights, steps.method.parameter.grad.clone()]
            optimizer.step()
            if t % 3 == 2:
                steps.balancer.end_epoch()
        return trace

    runs = [Steps(initial_losses=initial, form=form) for _ in range(2)]
    optimizers = [torch.optim.SGD(r.balancer.param_groups()) for r in runs]
    run(runs[0], optimizers[0], 0, saved_at)
    file = io.BytesIO()
    torch.save(runs[0].balancer.state_dict(), file)
    file.seek(0)
    runs[1].balancer.load_state_dict(torch.load(file, weights_only=True))
    traces = [run(*pair, saved_at, saved_at + 4) for pair in zip(runs, optimizers, strict=True)]
    assert all(map(torch.equal, *traces))


def test_the_state_stays_in_place():
    """Where the replays of a CUDA graph find it, also when an epoch ends."""
    steps = Steps(initial_losses="epoch")
    steps(1.0, 2.0, 3.0)
    assert steps.method.host_decision() is None
    state, parameter = steps.method.state, steps.method.parameter
    addresses = state.data_ptr(), parameter.data_ptr()
    for _ in range(2):
        steps(1.0, 2.0, 3.0)
        steps.balancer.end_epoch()
        assert (steps.method.state.data_ptr(), steps.method.parameter.data_ptr()) == addresses


BAD = {
    "alpha must be a finite number, at least 0; found -1": {"alpha": -1},
    "form must be one of .*, found 'log'": {"form": "log"},
    "initial_losses must be numbers or one of .*, found 'last'": {"initial_losses": "last"},
    "initial_losses must be 3 finite numbers, found .1.0, 2.0": {"initial_losses": [1, 2]},
    "initial_losses must be 3 finite numbers, found .1.0, nan": {"initial_losses": [1, torch.nan, 2]},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    with pytest.raises(ValueError, match=message):
        GradNorm(3, **BAD[message])


def test_bad_numbers_of_tasks():
    with pytest.raises(ValueError, match="num_tasks must be an integer of at least 1, found 0"):
        GradNorm(0)
    parameters = torch.zeros(3, requires_grad=True)
    with pytest.raises(ValueError, match="num_tasks must be the number of losses, 3; found 2"):
        Balancer(GradNorm(2), shared=[parameters]).backward(linear_losses(parameters, ROWS.float(), torch.ones(3)))
    with pytest.raises(ValueError, match=r"grad_norm has a parameter for each task: pass GradNorm\(num_tasks="):
        Balancer("grad_norm", shared=[parameters])
    balancer = Balancer(GradNorm(3), shared=[parameters])
    balancer.backward(linear_losses(parameters, ROWS.float(), torch.ones(3)))
    with pytest.raises(ValueError, match="num_tasks is 2, but the state has 3 tasks"):
        Balancer(GradNorm(2), shared=[parameters]).load_state_dict(balancer.state_dict())


def test_repr():
    assert repr(GradNorm(2)) == "GradNorm(num_tasks=2, alpha=1.5, form='softmax', initial_losses='first')"
    assert "initial_losses=[1.0, 2.0]" in repr(GradNorm(2, initial_losses=[1, 2]))
