"""What is saved on some ranks goes on on others, or on one process."""

import contextlib
import copy
from typing import Any

import pytest
import torch
from balancer.models import same

from .runs import Training, difference

NAMES = ["db_mtl", "moco", "excess_mtl", "igb_v1+nash_mtl", "grad_drop", "igb_v2 in the foreground", "nash every 7"]


def saved(training: Training) -> dict[str, Any]:
    parts = {"net": training.net, "balancer": training.balancer, "optimizer": training.optimizer}
    return copy.deepcopy({name: part.state_dict() for name, part in parts.items()})


def load(training: Training, states: dict[str, Any]) -> None:
    training.net.load_state_dict(states["net"])
    training.balancer.load_state_dict(states["balancer"])
    training.optimizer.load_state_dict(copy.deepcopy(states["optimizer"]))


def first_half(rank: int, name: str, data: int) -> dict[str, Any]:
    training = Training(name, data, rank)
    training.run(0, 5)
    return saved(training)


def whole(rank: int, name: str) -> dict[str, Any]:
    training = Training(name, 2, rank)
    training.run(0, 5)
    return training.run(5, 9)


def second_half(rank: int, name: str, data: int, states: dict[str, Any]) -> dict[str, Any]:
    training = Training(name, data, rank)
    load(training, states)
    return training.run(5, 9)


@pytest.mark.parametrize("name", NAMES)
def test_as_many_ranks_go_on_with_the_same_bits(two, name):
    states, others = two.run(first_half, name, 2)
    assert same(states["balancer"], others["balancer"])
    assert same(two.run(second_half, name, 2, states), two.run(whole, name))


@pytest.mark.parametrize("name", NAMES)
def test_one_process_goes_on_and_back(two, name):
    states = two.run(first_half, name, 2)[0]
    one = Training(name, 2)
    load(one, states)
    alone = one.run(5, 9)
    assert max(difference(two.run(whole, name)[0], alone).values()) < 1e-12
    start = Training(name, 2)
    torch.manual_seed(7)
    start.run(0, 5)
    assert max(difference(two.run(second_half, name, 2, saved(start))[0], alone).values()) < 1e-9


@pytest.mark.parametrize("name", ["db_mtl", "excess_mtl"])
def test_other_numbers_of_ranks(two, three, name):
    """The third rank's batch is new: what it starts from is what counts."""
    states = two.run(first_half, name, 2)[0]
    first, *others = three.run(second_half, name, 3, states)
    assert all(same(first, other) for other in others)
    one = Training(name, 3)
    load(one, states)
    assert max(difference(first, one.run(5, 9)).values()) < 1e-12


def restored(rank: int, name: str) -> bool:
    """A step that raises in its passes leaves what was there."""
    training = Training(name, 2, rank)
    training.run(0, 3)
    before = saved(training)["balancer"]
    grads = [p.grad for p in training.params]
    losses = training.losses(3)
    losses[1].register_hook(_fail)
    with contextlib.suppress(ArithmeticError):
        training.balancer.backward(losses)
    same_grads = all(p.grad is g for p, g in zip(training.params, grads, strict=True))
    return same_grads and same(training.balancer.state_dict(), before)


def _fail(grad: torch.Tensor) -> None:
    raise ArithmeticError


@pytest.mark.parametrize("name", ["db_mtl", "excess_mtl", "emtl", "grad_drop"])
def test_a_step_that_raises_everywhere_changes_nothing(two, name):
    assert all(two.run(restored, name))
