"""Bad input: a message with argument, rule and what was found; nothing changed; the balancer still works."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import igb_kernels as igb

from .models import Net, Snapshot, make_net, same
from .oracle import CASES, STORES, balancer_of


class Fails(torch.autograd.Function):
    """Identity whose backward raises."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        raise RuntimeError("this backward fails")


def failing_in(task: int) -> Callable[[Net], list[Tensor]]:
    """The pass of one task raises at the encoder's end, after its head has accumulated."""

    def losses(net: Net) -> list[Tensor]:
        x, targets = net.batch(5)
        z = net.encoder(x)
        return [
            (head(Fails.apply(z) if k == task else z) - y).square().mean()
            for k, (head, y) in enumerate(zip(net.heads, targets, strict=True))
        ]

    return losses


def used_up(net: Net) -> list[Tensor]:
    losses = net.losses()
    torch.autograd.grad(losses[1], net.shared)
    return losses


@dataclass(frozen=True)
class Bad:
    losses: Callable[[Net], Any]
    error: type[Exception]
    message: str


BAD_LOSSES = {
    "none": Bad(lambda net: [], ValueError, "losses must hold at least one loss, found none"),
    "empty dict": Bad(lambda net: {}, ValueError, "losses must hold at least one loss, found none"),
    "empty vector": Bad(lambda net: torch.zeros(0), ValueError, r"found shape \(0,\)"),
    "a scalar tensor": Bad(lambda net: sum(net.losses()), ValueError, r"losses must be a 1-D tensor.*found shape \(\)"),
    "a matrix": Bad(
        lambda net: torch.stack(net.losses()).reshape(1, 3), ValueError, r"losses must be a 1-D.*shape \(1, 3\)"
    ),
    "not a scalar": Bad(
        lambda net: [*net.losses()[:2], net.losses()[2] * torch.ones(2)],
        ValueError,
        r"losses\[2\] must be a scalar, found shape \(2,\)",
    ),
    "not a scalar, by name": Bad(
        lambda net: {"a": net.losses()[0] * torch.ones(2)}, ValueError, r"losses\['a'\] must be a scalar"
    ),
    "a number": Bad(
        lambda net: [net.losses()[0], 1.0], TypeError, r"losses\[1\] must be a tensor or None, found float"
    ),
    "integer": Bad(
        lambda net: [net.losses()[0], torch.tensor(3)],
        TypeError,
        r"losses\[1\] must have a floating dtype, found torch.int64",
    ),
    "complex": Bad(
        lambda net: [net.losses()[0], net.losses()[1] * (1 + 1j)],
        TypeError,
        r"losses\[1\] must have a floating dtype, found torch.complex64",
    ),
    "complex vector": Bad(
        lambda net: torch.stack(net.losses()) * (1 + 1j), TypeError, "losses must have a floating dtype, found.*complex"
    ),
    "all detached": Bad(
        lambda net: [loss.detach() for loss in net.losses()],
        ValueError,
        "losses must hold at least one loss that requires grad, found 3 tasks without",
    ),
    "all missing": Bad(lambda net: [None] * 3, ValueError, "at least one loss that requires grad, found 3"),
    "detached vector": Bad(lambda net: torch.stack(net.losses()).detach(), ValueError, "losses must require grad"),
}
BAD_PASSES = {
    "backward raises in the first task": Bad(failing_in(0), RuntimeError, "this backward fails"),
    "backward raises in the second task": Bad(failing_in(1), RuntimeError, "this backward fails"),
    "backward raises in the last task": Bad(failing_in(2), RuntimeError, "this backward fails"),
    "stacked, backward raises": Bad(lambda net: torch.stack(failing_in(1)(net)), RuntimeError, "this backward fails"),
    "graph used up": Bad(used_up, RuntimeError, "second time"),
}
LATER = {
    "fewer": Bad(lambda net: net.losses()[:2], ValueError, "losses must hold 3 tasks as in earlier steps, found 2"),
    "more": Bad(lambda net: net.losses() * 2, ValueError, "losses must hold 3 tasks as in earlier steps, found 6"),
    "fewer, stacked": Bad(lambda net: torch.stack(net.losses()[:2]), ValueError, "must hold 3 tasks.*found 2"),
    "another name": Bad(
        lambda net: dict(zip("abd", net.losses(), strict=True)),
        ValueError,
        r"losses must have no other tasks than \['a', 'b', 'c'\], found \['d'\]: name .* Balancer\(tasks=",
    ),
    "no name": Bad(lambda net: {}, ValueError, "at least one loss that requires grad, found 3 tasks without"),
    "one name more": Bad(lambda net: dict(zip("abcd", net.losses() * 2, strict=False)), ValueError, "'d'"),
}


def check_refused(balancer: igb.Balancer, net: Net, bad: Bad) -> None:
    losses = bad.losses(net)
    before = Snapshot([*net.parameters(), *balancer.parameters()], balancer)
    with pytest.raises(bad.error, match=bad.message):
        balancer.backward(losses)
    before.check()


def play(name: str, convention: str, with_gradients: bool, bad: Bad | None) -> object:
    """Three steps, before each of which `bad` losses are refused."""
    net = make_net()
    balancer = balancer_of(CASES[name], net, convention)
    for step in range(3):
        if with_gradients:
            for p in net.parameters():
                p.grad = torch.full_like(p, 0.5)
        if bad is not None:
            check_refused(balancer, net, bad)
        if not with_gradients:
            net.zero_grad()
        balancer.backward(net.losses(step))
    return [p.grad for p in net.parameters()], balancer.state_dict()


@pytest.mark.parametrize("bad", BAD_LOSSES)
@pytest.mark.parametrize("name", ["equal", "db_mtl", "nash_mtl every 3"])
def test_bad_losses(name, bad):
    """The steps around are those of a balancer that saw no error."""
    assert same(play(name, "scaled", True, BAD_LOSSES[bad]), play(name, "scaled", True, None))


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("convention", ["scaled", "weighted"])
@pytest.mark.parametrize("bad", BAD_PASSES)
@pytest.mark.parametrize("name", ["equal", "imtl_l", *STORES])
def test_passes_that_raise(name, bad, convention, with_gradients):
    want = play(name, convention, with_gradients, None)
    assert same(play(name, convention, with_gradients, BAD_PASSES[bad]), want)


@pytest.mark.parametrize("bad", LATER)
@pytest.mark.parametrize("name", ["equal", "db_mtl", "nash_mtl", "imtl_l"])
def test_other_tasks_than_before(name, bad):
    net = make_net()
    balancer = balancer_of(CASES[name], net)
    balancer.backward(dict(zip("abc", net.losses(), strict=True)))
    check_refused(balancer, net, LATER[bad])
    balancer.backward(dict(zip("abc", net.losses(1), strict=True)))


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("igb_v1 with bases", r"base_losses must have one number for each of the 2 tasks, found 3"),
        ("imtl_l", r"num_tasks must be the number of losses, 2; found 3"),
        ("emtl max, lower", r"lower must be one number or 2, one for each task; found 3"),
    ],
)
def test_values_for_another_number_of_tasks(name, error):
    net = make_net()
    balancer = balancer_of(CASES[name], net)
    check_refused(balancer, net, Bad(lambda net: net.losses()[:2], ValueError, error))
    balancer.backward(net.losses())


@pytest.mark.parametrize("names", ["ab", "xyz", None])
@pytest.mark.parametrize("name", ["igb_v1", "db_mtl", "nash_mtl", "emtl"])
def test_after_a_failed_first_step_the_number_of_tasks_is_free(name, names):
    net = make_net()
    balancer = igb.Balancer(name, shared=net.shared)
    with pytest.raises(RuntimeError, match="fails"):
        balancer.backward(dict(zip("abc", failing_in(1)(net), strict=True)))
    losses = net.losses()[: len(names or "ab")]
    result = balancer.backward(losses if names is None else dict(zip(names, losses, strict=True)))
    assert len(result.weights) == len(losses)
    other = igb.Balancer(name, shared=net.shared)
    net.zero_grad()
    assert same(other.backward(net.losses()[: len(losses)]).weights, result.weights)


@pytest.mark.parametrize("name", ["equal", "db_mtl", "nash_mtl"])
def test_a_failed_step_of_a_loaded_balancer(name):
    """Heads are put back, too, where the first step was in another process."""
    net = make_net()
    first = balancer_of(CASES[name], net)
    first.backward(net.losses())
    balancer = balancer_of(CASES[name], net)
    balancer.load_state_dict(first.state_dict())
    check_refused(balancer, net, BAD_PASSES["backward raises in the last task"])


@pytest.mark.parametrize("convention", ["scaled", "weighted"])
@pytest.mark.parametrize("part", ["shared", "own"])
@pytest.mark.parametrize("name", ["equal", *STORES])
def test_an_existing_sparse_gradient(name, part, convention):
    """Added to."""
    net = make_net()
    balancer = balancer_of(CASES[name], net, convention)
    balancer.backward(net.losses())
    for p in net.parameters():
        p.grad = torch.full_like(p, 0.5)
    last = getattr(net, part)[-2]
    last.grad = last.grad.to_sparse()
    balancer.backward(net.losses(1))
    assert not same(last.grad.to_dense(), torch.full_like(last, 0.5))
