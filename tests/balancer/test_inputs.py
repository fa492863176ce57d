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


def assigned(losses: list[Tensor], order: Sequence[int] = (0, 1, 2)) -> Tensor:
    """As trainers do that know the number of tasks beforehand."""
    vector = torch.zeros(3)
    for k in order:
        vector[k] = losses[k]
    return vector


def assigned_twice(losses: list[Tensor]) -> Tensor:
    vector = assigned([losses[1], losses[0], losses[2]])
    vector[0], vector[1] = losses[0], losses[1]
    return vector


def assigned_in_parts(losses: list[Tensor]) -> Tensor:
    vector = torch.zeros(3)
    vector[torch.tensor(2)] = losses[2].reshape(1)
    vector[:-1] = torch.stack(losses[:2])
    return vector


def assigned_into_a_stack(losses: list[Tensor]) -> Tensor:
    vector = torch.stack([losses[0], losses[2].exp(), losses[2]])
    vector[1] = losses[1]
    return vector


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
    "joined from two": lambda losses: torch.cat([torch.stack(losses[:2]), losses[2][None]]),
    "stacked in two dimensions": lambda losses: torch.stack([torch.stack(losses)]).squeeze(0),
    "a row of a stack": lambda losses: torch.stack([torch.zeros(3), torch.stack(losses), assigned(losses)])[1],
    "a row of a squeezed stack": lambda losses: torch.stack([torch.zeros(3), assigned(losses)]).squeeze(0)[1],
    "assigned": assigned,
    "assigned in another order": lambda losses: assigned(losses, (1, 2, 0)),
    "assigned twice": assigned_twice,
    "assigned in parts": assigned_in_parts,
    "assigned into a stack": assigned_into_a_stack,
    "assigned, then stacked": lambda losses: torch.stack([assigned(losses)]).squeeze(0),
    "joined, no view of a stack": lambda losses: torch.stack(losses) * 1.0,
}
OTHER_ROUNDING = {"shape (1,)", "shape (1, 1)", "shapes mixed", "joined, no view of a stack"}


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
    if form not in OTHER_ROUNDING:
        assert same(got, want)
    else:
        for g, w, p in zip(got, want, net.parameters(), strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6, msg=lambda m, p=p: f"{tuple(p.shape)}: {m}")


def scaled_in_place(losses: list[Tensor]) -> Tensor:
    vector = assigned(losses)
    vector[0].mul_(2)
    return vector


def added_in_place(losses: list[Tensor]) -> Tensor:
    vector = assigned(losses)
    vector[0] += losses[1]
    return vector


def of_a_buffer(losses: list[Tensor]) -> Tensor:
    vector = torch.zeros(6)[::2]
    for k, loss in enumerate(losses):
        vector[k] = loss
    return vector


def filled(losses: list[Tensor]) -> Tensor:
    vector = torch.stack(losses)
    vector[1:].copy_(losses[2])
    return vector


def hooked(losses: list[Tensor]) -> Tensor:
    vector = torch.stack(losses)
    vector.register_hook(lambda gradient: 3 * gradient)
    return vector


COMPUTED: dict[str, tuple[Callable[[list[Tensor]], Tensor], Callable[[list[Tensor]], list[Tensor]]]] = {
    "scaled in place": (scaled_in_place, lambda losses: [2 * losses[0], *losses[1:]]),
    "added to in place": (added_in_place, lambda losses: [losses[0] + losses[1], *losses[1:]]),
    "a part of a buffer": (of_a_buffer, list),
    "one loss for two elements": (filled, lambda losses: [losses[0], losses[2] + 0 * losses[1], losses[2]]),
    "scaled": (lambda losses: torch.stack(losses) * 2, lambda losses: [2 * loss for loss in losses]),
    "with a hook": (hooked, lambda losses: [3 * loss - 2 * loss.detach() for loss in losses]),
}
"""Vectors whose elements are not just put together, and lists with the same values and gradients."""


@pytest.mark.parametrize("form", COMPUTED)
def test_a_vector_that_computes_is_one_node(form, warnings_said):
    vector, scalars = COMPUTED[form]
    got, net = gradients("imtl_g", vector)
    assert len(warnings_said) == 1
    assert "every backward pass runs all tasks' heads" in warnings_said[0]
    want, _ = gradients("imtl_g", scalars)
    for g, w, p in zip(got, want, net.parameters(), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-6, msg=lambda m, p=p: f"{tuple(p.shape)}: {m}")


def test_other_vectors_are_said_once(warnings_said):
    net = make_net()
    balancer = igb.Balancer("db_mtl", shared=net.shared)
    for step in range(3):
        balancer.backward(torch.stack(net.losses(step)))
        balancer.backward(assigned(net.losses(step)))
    assert warnings_said == []
    for step in range(3):
        balancer.backward(torch.stack(net.losses(step)) * 1.0)
    assert len(warnings_said) == 1
    assert "torch.stack" in warnings_said[0]
    assert "A list of scalar losses avoids that" in warnings_said[0]


@pytest.mark.parametrize(
    "form", ["stacked", "joined", "assigned", "assigned, then stacked", "a row of a squeezed stack"]
)
def test_each_pass_runs_its_own_head_alone(form):
    net, passes = make_net(), [0] * 3
    losses = net.losses()
    for k, loss in enumerate(losses):
        loss.grad_fn.register_prehook(lambda gradients, k=k: passes.__setitem__(k, passes[k] + 1))
    igb.Balancer("imtl_g", shared=net.shared).backward(FORMS[form](losses))
    assert passes == [1, 1, 1]


def test_a_missing_task_in_a_vector():
    """An element that was overwritten by a number, or never written, has no loss."""
    for k, value in ((0, 0.0), (2, torch.tensor(1.0))):
        net, other = make_net(), make_net()
        vector = assigned(net.losses())
        vector[k] = value
        result = igb.Balancer("imtl_g", shared=net.shared).backward(vector)
        assert result.active == tuple({0, 1, 2} - {k})
        losses = other.losses()
        losses[k] = None
        igb.Balancer("imtl_g", shared=other.shared).backward(losses)
        assert same([p.grad for p in net.parameters()], [p.grad for p in other.parameters()])


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
