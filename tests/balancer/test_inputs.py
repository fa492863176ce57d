"""The forms in which losses may come: all give the list's gradients."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import igb_kernels as igb

from .models import Net, Snapshot, grads_of, make_net, same
from .oracle import CASES, STORES, Oracle, balancer_of, check_step

NAMES = ("mass", "charge", "spin")


def named(losses: Sequence[Tensor]) -> dict[str, Tensor]:
    return dict(zip(NAMES, losses, strict=True))


FORMS: dict[str, Callable[[list[Tensor]], object]] = {
    "tuple": tuple,
    "generator": iter,
    "dict": named,
    "stacked": torch.stack,
    "stacked of a tuple": lambda losses: torch.stack(tuple(losses), dim=0),
    "shape (1,)": lambda losses: [loss.reshape(1) for loss in losses],
    "shape (1, 1)": lambda losses: [loss.reshape(1, 1) for loss in losses],
    "shapes mixed": lambda losses: [losses[0], losses[1].reshape(1), losses[2].reshape(1, 1)],
    "joined": lambda losses: torch.cat([loss.reshape(1) for loss in losses]),
    "joined, no view of a stack": lambda losses: torch.stack(losses) * 1.0,
}
EXACT = {"tuple", "generator", "dict", "stacked", "stacked of a tuple"}


def gradients(name: str, form: Callable[[list[Tensor]], object], steps: int = 2) -> tuple[list[Tensor | None], Net]:
    net = make_net()
    balancer = balancer_of(CASES[name], net)
    for step in range(steps):
        net.zero_grad()
        balancer.backward(form(net.losses(step)))
    return [p.grad for p in net.parameters()], net


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["equal", *STORES])
def test_same_gradients_as_a_list(name, form):
    got, net = gradients(name, FORMS[form])
    want, _ = gradients(name, list)
    if form in EXACT:
        assert same(got, want)
    else:
        for g, w, p in zip(got, want, net.parameters(), strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6, msg=lambda m, p=p: f"{tuple(p.shape)}: {m}")


def test_other_vectors_are_said_once(warnings_said):
    net = make_net()
    balancer = igb.Balancer("db_mtl", shared=net.shared)
    for step in range(3):
        balancer.backward(torch.stack(net.losses(step)))
    assert warnings_said == []
    for step in range(3):
        balancer.backward(torch.stack(net.losses(step)) * 1.0)
    assert len(warnings_said) == 1
    assert "torch.stack" in warnings_said[0]
    assert "A list of scalar losses avoids that" in warnings_said[0]


@pytest.mark.parametrize("name", ["equal", "db_mtl", "nash_mtl"])
def test_a_dict_keeps_its_first_order(name):
    def shuffled(losses: list[Tensor]) -> dict[str, Tensor]:
        tasks = named(losses)
        order = NAMES if len(calls) == 0 else NAMES[::-1]
        calls.append(order)
        return {task: tasks[task] for task in order}

    calls: list[tuple[str, ...]] = []
    got, _ = gradients(name, shuffled, steps=3)
    want, _ = gradients(name, list, steps=3)
    assert same(got, want)

    net = make_net()
    balancer = igb.Balancer(name, shared=net.shared)
    balancer.backward(named(net.losses()))
    losses = named(net.losses(1))
    result = balancer.backward({task: losses[task] for task in NAMES[::-1]})
    assert result.names == NAMES
    assert same(result.losses, torch.stack([losses[task] for task in NAMES]).detach())


def test_names_are_those_of_the_form():
    net = make_net()
    balancer = igb.Balancer("imtl_g", shared=net.shared)
    assert balancer.backward(net.losses()).names is None
    assert balancer.backward(named(net.losses())).names == NAMES
    balancer = igb.Balancer("imtl_g", shared=net.shared)
    assert balancer.backward(named(net.losses())).names == NAMES
    assert balancer.backward(net.losses()).names is None


@pytest.mark.parametrize("name", ["equal", *STORES])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_mixed_loss_dtypes(name, shape):
    net = make_net()
    losses = [
        loss.to(dtype).reshape(shape)
        for loss, dtype in zip(net.losses(), (torch.float32, torch.float64, torch.bfloat16), strict=True)
    ]
    case = CASES[name]
    expected = Oracle(case).step(losses, net.shared, net.own)
    result = balancer_of(case, net).backward(losses)
    check_step(expected, grads_of(net.shared), grads_of(net.own), torch.float32, joint=name in ("equal", STORES[0]))
    assert result.scales.dtype is result.losses.dtype is torch.float64


@pytest.mark.parametrize("name", ["equal", "imtl_g"])
def test_stacked_losses_of_mixed_dtypes(name):
    def mixed(losses: list[Tensor]) -> list[Tensor]:
        return [losses[0], losses[1].double(), losses[2]]

    got, _ = gradients(name, lambda losses: torch.stack(mixed(losses)), steps=1)
    want, _ = gradients(name, mixed, steps=1)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


@pytest.mark.parametrize("name", ["equal", "imtl_g", "db_mtl beta 0"])
def test_one_loss_twice(name):
    net = make_net()
    first, second, _ = net.losses()
    losses = [first, second, first]
    expected = Oracle(CASES[name]).step(losses, net.shared, net.own)
    balancer_of(CASES[name], net).backward(losses)
    check_step(expected, grads_of(net.shared), grads_of(net.own), torch.float32, joint=name == "equal")


@pytest.mark.parametrize("form", [list, torch.stack])
def test_a_parameter_as_a_loss(form):
    """A regulariser may be a bare scalar parameter: its gradient is its own scale."""
    net = make_net()
    bias = torch.nn.Parameter(torch.tensor(0.5))
    losses = [*net.losses()[:2], bias]
    igb.Balancer("log+equal", shared=net.shared).backward(form(losses))
    torch.testing.assert_close(bias.grad, torch.tensor(2.0))


def test_losses_and_graph_can_be_used_again():
    net = make_net()
    losses = net.losses()
    before = Snapshot(net.parameters())
    balancer = igb.Balancer("imtl_g", shared=net.shared)
    balancer.backward(losses, retain_graph=True)
    first = grads_of(net.shared)
    sum(losses).backward(retain_graph=True)
    net.zero_grad()
    before.check()
    balancer.backward(losses)
    torch.testing.assert_close(grads_of(net.shared), first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        balancer.backward(losses)


@pytest.mark.parametrize("name", ["equal", "imtl_g"])
def test_works_without_grad_mode(name):
    net = make_net()
    losses = net.losses()
    expected = Oracle(CASES[name]).step(losses, net.shared, net.own)
    with torch.no_grad():
        balancer_of(CASES[name], net).backward(losses)
    check_step(expected, grads_of(net.shared), grads_of(net.own), torch.float32, joint=name == "equal")
    assert not any(p.grad.requires_grad for p in net.parameters())
