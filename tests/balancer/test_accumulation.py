"""Gradients that were there before are added to, as autograd does; parameters that tasks do not reach keep theirs."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import igb_kernels as igb

from .models import Net, Snapshot, grads_of, make_net, same
from .oracle import CASES, STORES, Oracle, balancer_of, check_step

pytestmark = pytest.mark.usefixtures("rows_at_once")

STORED = ["equal", *STORES]


def fill_grads(params: Sequence[Tensor], every: int = 1) -> None:
    """Some gradient for every n-th parameter, in a memory layout of its own where it has dimensions."""
    torch.manual_seed(7)
    for i, p in enumerate(params):
        if i % every == 0:
            p.grad = torch.randn_like(p)
            if p.dim() == 2 and i % 4 == 0:
                p.grad = p.grad.t().contiguous().t()


@pytest.mark.parametrize("convention", ["scaled", "weighted"])
@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STORED)
def test_adds_to_existing_gradients(name, dtype, every, convention):
    net, case = make_net("gru" if dtype is torch.float64 else "mlp", dtype), CASES[name]
    balancer, oracle = balancer_of(case, net, convention), Oracle(case)
    for step in range(2):
        net.zero_grad()
        fill_grads(list(net.parameters()), every)
        objects = [p.grad for p in net.parameters()]
        before, heads_before = grads_of(net.shared), grads_of(net.own)
        losses = net.losses(step)
        expected = oracle.step(losses, net.shared, net.own)
        balancer.backward(losses)
        joint = case.method == "equal" or (convention == "weighted" and step > 0 and case.update_every > 1)
        check_step(
            expected, grads_of(net.shared), grads_of(net.own), dtype, convention, before, heads_before, joint=joint
        )
        for p, old in zip(net.parameters(), objects, strict=True):
            assert old is None or p.grad is old


@pytest.mark.parametrize("convention", ["scaled", "weighted"])
@pytest.mark.parametrize("name", STORED)
def test_micro_batches(name, convention):
    """Two steps without zero_grad between them add up."""
    net, case = make_net("conv"), CASES[name]
    balancer, oracle = balancer_of(case, net, convention), Oracle(case)
    total = heads_total = torch.zeros((), dtype=torch.float64)
    for step in range(3):
        losses = net.losses(step)
        expected = oracle.step(losses, net.shared, net.own)
        total, heads_total = total + expected.shared, heads_total + expected.heads(convention)
        balancer.backward(losses)
    for got, want in ((grads_of(net.shared), total), (grads_of(net.own), heads_total)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("convention", ["scaled", "weighted"])
@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("name", STORED)
def test_a_parameter_that_no_task_reaches(name, with_gradient, convention):
    net, case = make_net(), CASES[name]
    unused, unused_head = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(4))
    shared = [net.shared[0], unused, *net.shared[1:]]
    if with_gradient:
        unused.grad, unused_head.grad = torch.ones(3, 2), torch.ones(4)
    before = Snapshot([unused, unused_head])
    own = {"heads": "weighted", "task_parameters": [unused_head, *net.own]} if convention == "weighted" else {}
    balancer, oracle = igb.Balancer(**case.make(), shared=shared, **own), Oracle(case)
    for step in range(2):
        net.zero_grad()
        losses = net.losses(step)
        expected = oracle.step(losses, net.shared, net.own)
        balancer.backward(losses)
        joint = case.method == "equal" or step > 0
        check_step(expected, grads_of(net.shared), grads_of(net.own), torch.float32, convention, joint=joint)
    before.check()


class Branching(nn.Module):
    """Each task goes through the trunk and one or two of three branches, in an order that changes with the step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.trunk = nn.Linear(4, 5)
        self.branches = nn.ModuleList(nn.Linear(5, 5) for _ in range(3))

    def losses(self, step: int) -> list[Tensor]:
        torch.manual_seed(step)
        z = torch.tanh(self.trunk(torch.randn(6, 4)))
        ways = [(step % 3,), ((step + 1) % 3,), (step % 3, (step + 1) % 3)]
        return [sum(self.branches[b](z).square().mean() for b in way) * (k + 1) for k, way in enumerate(ways)]


@pytest.mark.parametrize("every", [0, 2])
@pytest.mark.parametrize("name", STORED)
def test_parameters_that_some_tasks_reach(name, every):
    net, case = Branching(), CASES[name]
    shared = list(net.parameters())
    balancer, oracle = igb.Balancer(**case.make(), shared=shared), Oracle(case)
    reached_once: set[int] = set()
    for step in range(3):
        net.zero_grad()
        if every:
            fill_grads(shared, every)
        before = grads_of(shared)
        had = {i for i, p in enumerate(shared) if p.grad is not None}
        losses = net.losses(step)
        expected = oracle.step(losses, shared)
        balancer.backward(losses)
        check_step(expected, grads_of(shared), None, torch.float32, before=before, joint=case.method == "equal")
        reached = {0, 1} | {2 + 2 * b + i for b in (step % 3, (step + 1) % 3) for i in (0, 1)}
        reached_once |= reached
        has = {i for i, p in enumerate(shared) if p.grad is not None}
        assert has == had | (reached_once if "beta" in case.options and case.options["beta"] > 0 else reached)


@pytest.mark.parametrize("name", STORED)
def test_tied_weights(name):
    torch.manual_seed(0)
    net = Net()
    net.encoder = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    net.encoder[4].weight = net.encoder[2].weight
    assert len(net.shared) == 5
    case, losses = CASES[name], net.losses()
    expected = Oracle(case).step(losses, net.shared, net.own)
    igb.Balancer(**case.make(), shared=net.encoder).backward(losses)
    check_step(expected, grads_of(net.shared), grads_of(net.own), torch.float32, joint=case.method == "equal")


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("name", STORED)
def test_frozen_and_thawed_on_the_way(name, every):
    """An optimizer moves whatever has a gradient: a parameter that does not require one must not be given any."""
    net, case = make_net(), CASES[name]
    balancer, oracle = balancer_of(case, net), Oracle(case)
    frozen, others = net.shared[0], net.shared[1:]
    for step in range(3):
        net.zero_grad()
        if every:
            fill_grads(list(net.parameters()))
        frozen.requires_grad_(step != 1)
        snapshot, before, heads_before = Snapshot([frozen]), grads_of(others), grads_of(net.own)
        losses = net.losses(step)
        expected = oracle.step(losses, net.shared, net.own)
        balancer.backward(losses)
        expected.rows = expected.rows[:, frozen.numel() :]
        joint = case.method == "equal"
        check_step(expected, grads_of(others), grads_of(net.own), torch.float32, "scaled", before, heads_before, joint)
        if step == 1:
            snapshot.check()


class Transposed(torch.autograd.Function):
    """Identity whose gradient comes in another layout for every second call, or spread out with stride 0."""

    calls = 0

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        Transposed.calls += 1
        if Transposed.calls % 3 == 0:
            return grad.t().contiguous().t()
        if Transposed.calls % 3 == 1:
            return torch.ones(1, 1).expand(grad.shape)
        return grad


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("name", STORED)
def test_gradients_in_other_layouts(name, every):
    torch.manual_seed(0)
    weight, other = nn.Parameter(torch.randn(5, 7)), nn.Parameter(torch.randn(4, 5).t())
    shared = [weight, other]
    case = CASES[name]
    balancer, oracle = igb.Balancer(**case.make(), shared=shared), Oracle(case)
    for step in range(3):
        weight.grad = other.grad = None
        if every:
            fill_grads(shared)
        before = grads_of(shared)
        x = torch.randn(3, 5)
        losses = [
            ((x + k + step) @ Transposed.apply(weight)).square().mean() + (x @ Transposed.apply(other)).square().mean()
            for k in range(3)
        ]
        Transposed.calls = 0
        expected = oracle.step(losses, shared)
        Transposed.calls = 0
        balancer.backward(losses)
        if case.method != "equal":  # one joint pass calls the function in another order
            check_step(expected, grads_of(shared), None, torch.float32, before=before)


@pytest.mark.parametrize("name", STORED)
def test_two_balancers_on_one_model(name):
    net, case = make_net(), CASES[name]
    first = igb.Balancer(**case.make(), shared=net.shared[:2])
    second = igb.Balancer(**case.make(), shared=net.shared[2:])
    whole = igb.Balancer("imtl_g", shared=net.shared)
    for step in range(2):
        net.zero_grad()
        alone, other = make_net(), make_net()
        losses, again = net.losses(step), net.losses(step + 10)
        first.backward(losses, retain_graph=True)
        mine = [p.grad.clone() for p in net.shared[:2]]
        second.backward(again)
        whole.backward(losses)
        assert bool(grads_of(net.shared).isfinite().all())
    igb.Balancer(**case.make(), shared=alone.shared[:2]).backward(alone.losses(0))
    fresh = igb.Balancer(**case.make(), shared=other.shared[:2])
    igb.Balancer("db_mtl", shared=other.shared[2:]).backward(other.losses(9))
    other.zero_grad()
    fresh.backward(other.losses(0))
    assert same([p.grad for p in alone.shared[:2]], [p.grad for p in other.shared[:2]])
    assert all(bool(g.isfinite().all()) for g in mine)
