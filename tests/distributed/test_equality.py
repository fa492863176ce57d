"""Ranks come to what one process comes to on the batches of all, and to the same bits on each."""

import pytest
import torch
from balancer.models import same
from balancer.test_state import STATES

import igb_kernels as igb

from .runs import VARIATIONS, difference, varied

STEPS = 12


def check(pool, variation, name, tolerance, **options):
    first, *others = pool.run(varied, variation, name, STEPS, pool.size, options)
    assert all(same(first, other) for other in others)
    torch.manual_seed(7)
    alone = VARIATIONS[variation](name, pool.size, **options).run(0, STEPS)
    found = difference(first, alone)
    assert max(found.values()) < tolerance, found


@pytest.mark.parametrize("name", STATES)
def test_every_method(two, name):
    check(two, "Training", name, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["gru", "embedding"])
@pytest.mark.parametrize("name", ["db_mtl", "nash_mtl", "emtl", "grad_drop"])
def test_models_and_dtypes(three, name, kind, dtype):
    check(three, "Training", name, 2e-6 if dtype is torch.float32 else 0.2, kind=kind, dtype=dtype)


@pytest.mark.parametrize(
    "name",
    ["db_mtl", "nash_mtl", "emtl", "grad_drop", "equal", "moco", "excess_mtl", "famo", "nash every 7", "dwa",
     "igb_v1+nash_mtl", "igb_v2 in the foreground"],
)  # fmt: skip
def test_tasks_that_ranks_lack(three, name):
    check(three, "Missing", name, 1e-12)


@pytest.mark.parametrize("name", ["db_mtl", "nash_mtl", "emtl", "grad_drop", "equal", "nash every 7"])
@pytest.mark.parametrize("variation", ["MicroBatches", "Weighted"])
def test_micro_batches_and_weighted_heads(three, variation, name):
    check(three, variation, name, 1e-12)


@pytest.mark.parametrize("name", ["db_mtl", "nash_mtl", "emtl", "equal", "excess_mtl", "imtl_l"])
def test_a_grad_scaler_and_an_overflow_on_one_rank(two, name):
    check(two, "Scaled", name, 2e-6, dtype=torch.float32)


@pytest.mark.parametrize("name", ["nash_mtl", "emtl", "equal", "igb_v1", "pcgrad", "nash every 7"])
def test_at_the_representation(two, name):
    check(two, "AtRepresentation", name, 1e-12)


@pytest.mark.parametrize("name", ["modo", "sdm_grad"])
def test_independent_batches(two, name):
    check(two, "TwoBatches", name, 1e-12)


class Branches(torch.nn.Module):
    """An encoder of which ranks and steps use different parts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(4)).double()
        self.heads = torch.nn.ModuleList(torch.nn.Linear(4, 1) for _ in range(3)).double()

    def losses(self, x: torch.Tensor, part: int) -> list[torch.Tensor]:
        z = self.parts[part](self.parts[0](x).tanh())
        return [(k + 1.0) * (head(z) - k).square().mean() for k, head in enumerate(self.heads)]


USED = ((1, 1), (1, 2), (2, 1), (1, 2), (2, 2))
"""The part that each rank uses, by step; nobody uses the fourth."""


def in_branches(rank: int | None, name: str) -> list[list[torch.Tensor | None]]:
    """Gradients of each step, with those of the step before the last still there."""
    model = Branches()
    group = None if rank is None else torch.distributed.group.WORLD
    balancer = igb.Balancer(name, shared=model.parts, process_group=group)
    seen = []
    for step, used in enumerate(USED):
        torch.default_generator.manual_seed(step)
        xs = torch.randn(2, 5, 4, dtype=torch.float64)
        if step != 3:
            model.zero_grad()
        if rank is not None:
            losses = model.losses(xs[rank], used[rank])
        else:
            losses = [sum(of) / 2 for of in zip(*map(model.losses, xs, used), strict=True)]
        balancer.backward(losses)
        seen.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    return seen


@pytest.mark.parametrize("name", ["db_mtl", "nash_mtl", "emtl", "grad_drop", "equal"])
def test_parameters_that_some_ranks_or_none_use(two, name):
    first, second = two.run(in_branches, name)
    assert same(first, second)
    for step, (found, want) in enumerate(zip(first, in_branches(None, name), strict=True)):
        assert [g is None for g in found] == [g is None for g in want], step
        for g, w in zip(found, want, strict=True):
            assert g is None or torch.allclose(g, w, rtol=1e-10, atol=1e-12)
