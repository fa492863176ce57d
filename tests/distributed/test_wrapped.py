"""DistributedDataParallel: the balancer takes over its communication; without a process group it says what is wrong."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from balancer.models import make_net, same
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import igb_kernels as igb

from .runs import batches


class Model(nn.Module):
    """Returns losses, as a model in a wrapper should; the second head sees only some batches."""

    def __init__(self, kind: str = "mlp") -> None:
        super().__init__()
        self.net = make_net(kind, torch.float64)

    def forward(self, batch: Any, tasks: tuple[int, ...] = (0, 1, 2)) -> list[Any]:
        z = self.net.encoder(batch[0])
        return [(self.net.heads[k](z) - batch[1][k]).square().mean() if k in tasks else None for k in range(3)]


def train(model, wrapped, balancer, own, steps=6, tasks=lambda step: (0, 1, 2)):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        balancer.backward(wrapped(own(step), tasks(step)))
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def wrapped_run(rank: int, name: str, options: dict[str, Any], lacks: bool = False) -> list[Any]:
    model = Model()
    ddp = DistributedDataParallel(model, **options)
    balancer = igb.Balancer(name, shared=model.net.encoder, process_group=dist.group.WORLD)
    lacking = (lambda step: (0, 2) if (rank + step) % 2 else (0, 1, 2)) if lacks else lambda step: (0, 1, 2)
    return train(model, ddp, balancer, lambda step: batches("mlp", step, 2, torch.float64)[rank], tasks=lacking)


def alone(name: str) -> list[Any]:
    model = Model()

    def whole(step: int) -> Any:
        found = batches("mlp", step, 2, torch.float64)
        return torch.cat([x for x, _ in found]), torch.cat([y for _, y in found], dim=1)

    return train(model, model, igb.Balancer(name, shared=model.net.encoder), whole)


@pytest.mark.parametrize("name", ["db_mtl", "nash_mtl", "equal"])
@pytest.mark.parametrize(
    "options",
    [{}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}],
    ids=str,
)
def test_as_one_process(two, name, options):
    first, second = two.run(wrapped_run, name, options)
    assert same(first, second)
    for p, q in zip(first, alone(name), strict=True):
        assert torch.allclose(p, q, rtol=1e-10, atol=1e-12)


def test_heads_that_ranks_lack_from_the_first_step_on(two):
    first, second = two.run(wrapped_run, "nash_mtl", {}, True)
    assert same(first, second)


def with_batch_norm(rank: int) -> Any:
    model = Model("conv")
    ddp = DistributedDataParallel(model)
    balancer = igb.Balancer("nash_mtl", shared=model.net.encoder, process_group=dist.group.WORLD)
    train(model, ddp, balancer, lambda step: batches("conv", step, 2, torch.float64)[rank], 3)
    return [b.clone() for b in model.buffers()], [p.detach().clone() for p in model.parameters()]


def test_buffers_are_those_of_the_first_rank(two):
    (buffers, params), (others, other_params) = two.run(with_batch_norm)
    assert len(buffers) == 3
    assert buffers[2] == 3  # batches that were tracked
    assert same(buffers, others)
    assert same(params, other_params)


def mistakes(rank: int) -> list[str]:
    model, said = Model(), []
    batch = batches("mlp", 0, 2, torch.float64)[rank]
    group = dist.group.WORLD

    def attempt(action: Any) -> None:
        try:
            action()
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
        else:
            said.append("nothing")

    early = igb.Balancer("nash_mtl", shared=model.net.encoder, process_group=group)
    ddp = DistributedDataParallel(model)
    attempt(lambda: igb.Balancer("nash_mtl", shared=model.net.encoder).backward(ddp(batch)))
    with ddp.no_sync():
        attempt(lambda: early.backward(ddp(batch)))
    late = igb.Balancer("nash_mtl", shared=model.net.encoder, process_group=group)
    ddp.require_backward_grad_sync = True
    attempt(lambda: late.backward(model(batch)))
    static = Model()
    wrapper = DistributedDataParallel(static, static_graph=True)
    attempt(lambda: igb.Balancer("nash_mtl", shared=wrapper.module.net.encoder, process_group=group))
    attempt(lambda: igb.Balancer("nash_mtl", shared=model.net.encoder, process_group="gloo"))
    attempt(lambda: igb.Balancer("nash_mtl", shared=model.net.encoder, process_group=group, capture="hooks"))
    other = Model()
    unequal = igb.Balancer(igb.DBMTL(beta=0.5 + 0.1 * rank), shared=other.net.encoder, process_group=group)
    attempt(lambda: unequal.backward(other(batch)))
    fewer = igb.Balancer("nash_mtl", shared=other.net.encoder, process_group=group)
    attempt(lambda: fewer.backward(other(batch)[: 2 + rank]))
    assert all(p.grad is None for p in [*model.parameters(), *other.parameters()])
    return said


def test_mistakes_are_errors_on_all_ranks_and_change_nothing(two):
    for said in two.run(mistakes):
        no_group, too_early, set_again, static, no_group_object, hooks, options, tasks = said
        assert no_group.startswith(
            "ValueError: process_group must be given where the shared parameters belong to a Dist"
        )
        assert too_early.startswith(
            "RuntimeError: a Balancer with a process_group must be made after the DistributedData"
        )
        assert set_again.startswith("RuntimeError: the DistributedDataParallel must leave gradients to the balancer")
        assert static.startswith("ValueError: the DistributedDataParallel must be made with static_graph=False")
        assert no_group_object == "TypeError: process_group must be a torch.distributed.ProcessGroup, found str"
        assert hooks == "ValueError: capture must be \"passes\" with a process_group, found 'hooks'"
        assert options.startswith(
            "ValueError: the balancer must be the same on all ranks, found ['Log(eps=1e-08)', 'DBMTL(beta=0.5,"
        )
        assert tasks == "ValueError: the number of tasks must be the same on all ranks, found 2 on 0 and 3 on 1"


def alone_among_others(rank: int) -> bool:
    net = make_net("mlp", torch.float64)
    igb.Balancer("nash_mtl", shared=net.shared).backward(net.losses(rank))
    return all(p.grad is not None for p in net.parameters())


def test_a_balancer_of_its_own_batch_says_so(two):
    assert all(two.run(alone_among_others))
