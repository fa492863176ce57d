"""Loss-balancing rules over many steps: IGBv1's base losses and IMTL-L's learned scales."""

from collections.abc import Callable

import pytest
import torch

import igb_kernels as igb

from .models import TASK_SCALES, TASKS, Net, make_net, same
from .oracle import BASES

NAN_STEP = 2


def losses_of_steps(net: Net, steps: int) -> torch.Tensor:
    """Raw losses [steps, K] of the untrained net."""
    return torch.stack([torch.stack(net.losses(step)) for step in range(steps)]).detach().double()


def igb_scales(losses: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
    weights = 1.0 if base is None else len(losses) * (losses / base).softmax(0)
    return weights / losses


def poisoned(net: Net, step: int) -> list[torch.Tensor]:
    losses = net.losses(step)
    return [losses[0], losses[1] * torch.nan, losses[2]]


@pytest.mark.parametrize("gradients", ["equal", "db_mtl", "imtl_g"])
@pytest.mark.parametrize(
    ("rule", "epochs", "base_from"),
    [
        ({}, (3, 2, 2), range(3, 5)),  # the second epoch's
        ({"base_epoch": 0}, (3, 2, 2), range(3)),
        ({"base_epoch": 2}, (1, 2, 3), range(3, 6)),
        ({"steps": 4}, (3, 2, 2), range(4)),
        ({"steps": 1}, (3, 2, 2), range(1)),
        ({"base_losses": BASES[:TASKS]}, (2, 2, 2), None),
    ],
)
def test_igb_base_losses(rule, epochs, base_from, gradients):
    net = make_net()
    losses = losses_of_steps(net, sum(epochs))
    balancer = igb.Balancer(gradients, igb.IGBv1(**rule), shared=net.shared)
    known_at, base = (0, torch.tensor(BASES[:TASKS], dtype=torch.float64)) if base_from is None else (None, None)
    if base_from is not None:
        known_at, base = base_from[-1] + 1, losses[list(base_from)].mean(0)
    step = 0
    for length in epochs:
        for _ in range(length):
            result = balancer.backward(net.losses(step))
            want = igb_scales(losses[step], base if step >= known_at else None)
            torch.testing.assert_close(result.scales.double(), want, rtol=1e-5, atol=0)
            step += 1
        balancer.end_epoch()
    torch.testing.assert_close(balancer.losses.base_losses, base)


def test_igb_without_any_step_in_the_base_epoch_stays_without_bases():
    net = make_net()
    balancer = igb.Balancer("igb_v1", shared=net.shared)
    assert balancer.losses.base_losses is None
    balancer.end_epoch()
    balancer.end_epoch()
    result = balancer.backward(net.losses())
    torch.testing.assert_close(result.scales, 1 / result.losses)


@pytest.mark.parametrize("gradients", ["equal", "imtl_g", "db_mtl"])
@pytest.mark.parametrize("rule", [{"base_epoch": 0}, {"steps": 4}])
def test_igb_does_not_record_a_nan_loss(rule, gradients):
    """The base losses are as if the bad step had not been: of as many finite steps, and known as late."""
    runs = []
    for bad in (False, True):
        net = make_net()
        balancer = igb.Balancer(gradients, igb.IGBv1(**rule), shared=net.shared)
        scales = []
        for step in range(6):
            if bad and step == NAN_STEP:
                balancer.backward(poisoned(net, 99))
                net.zero_grad()
            scales.append(balancer.backward(net.losses(step)).scales)
        balancer.end_epoch()
        runs.append((scales, balancer.losses.base_losses))
    assert same(*runs)


def test_igb_survives_a_nan_in_its_only_base_step():
    net = make_net()
    balancer = igb.Balancer("equal", igb.IGBv1(steps=1), shared=net.shared)
    balancer.backward(poisoned(net, 0))
    losses = balancer.backward(net.losses(1)).losses
    torch.testing.assert_close(balancer.losses.base_losses, losses.double())


def check_not_recorded(
    gradients: str, spoil: Callable[[Net, torch.Tensor], torch.Tensor]
) -> igb.balancer.BalanceResult:
    """Of a good step and one with a spoilt loss, the good one alone makes the base. Returns the other's result."""
    net = make_net()
    balancer = igb.Balancer(gradients, igb.IGBv1(0), shared=net.shared)
    good = balancer.backward(net.losses(0)).losses.double()
    losses = net.losses(1)
    losses[1] = spoil(net, losses[1])
    result = balancer.backward(losses)
    balancer.end_epoch()
    torch.testing.assert_close(balancer.losses.base_losses, good)
    return result


@pytest.mark.parametrize("gradients", ["equal", "imtl_g"])
def test_igb_does_not_record_an_infinite_gradient(gradients):
    """The class says: steps with a non-finite loss or gradient do not count."""
    result = check_not_recorded(gradients, lambda net, loss: loss + infinite_gradient(net))
    assert bool(result.losses.isfinite().all())


@pytest.mark.parametrize("gradients", ["equal", "imtl_g"])
def test_igb_does_not_record_a_negative_loss(gradients):
    """The step has NaN scales and no usable update."""
    result = check_not_recorded(gradients, lambda net, loss: loss - 100.0)
    assert igb.Status.NON_POSITIVE_LOSS in result.flags
    assert bool(result.scales.isnan().all())


def infinite_gradient(net: Net) -> torch.Tensor:
    """A finite number whose gradient with respect to the encoder is infinite or NaN: √ at zero."""
    first = net.shared[0]
    return (first - first.detach()).abs().sqrt().sum()


@pytest.mark.parametrize("gradients", ["equal", "imtl_g", "db_mtl beta 0"])
def test_imtl_l_learns_the_inverse_losses(gradients):
    net, rule = make_net(), igb.IMTLL(TASKS)
    if gradients.startswith("db_mtl"):
        gradients = igb.DBMTL(0.0)
    balancer = igb.Balancer(gradients, rule, shared=net.shared)
    assert [p is rule.log_scales for p in balancer.parameters()] == [True]
    optimizer = torch.optim.SGD(balancer.parameters(), lr=0.2)
    for _ in range(200):
        net.zero_grad()
        optimizer.zero_grad()
        result = balancer.backward(net.losses())
        optimizer.step()
    torch.testing.assert_close(rule.log_scales.detach(), -result.losses.log(), rtol=1e-2, atol=1e-2)


def test_imtl_l_adds_to_its_gradient():
    net, rule = make_net(), igb.IMTLL(TASKS)
    balancer = igb.Balancer("imtl_g", rule, shared=net.shared)
    first = balancer.backward(net.losses(0))
    kept = rule.log_scales.grad
    second = balancer.backward(net.losses(1))
    assert rule.log_scales.grad is kept
    torch.testing.assert_close(kept, first.losses + second.losses - 2)


def test_task_scales_make_the_rules_matter():
    """Guards the tests above: the tasks' losses are far from one another."""
    losses = losses_of_steps(make_net(), 1)[0]
    assert losses.max() / losses.min() > 10
    assert len(set(TASK_SCALES)) == len(TASK_SCALES)
