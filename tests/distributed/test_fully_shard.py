"""Models sharded by `fully_shard` get what one process comes to on the batches of all ranks."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from balancer.models import Snapshot, make_net, same
from balancer.test_state import STATES
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Replicate

import igb_kernels as igb

from .runs import batches, difference, losses_of
from .sharded import SHARDED, Run, mesh_of

BY_ELEMENTS = {"grad_drop"}


def trained(rank: int | None, name: str, ranks: int, steps: int, options: dict[str, Any]) -> dict[str, Any]:
    return Run(name, ranks, rank, **options).run(0, steps)


def check(pool: Any, name: str, steps: int = 3, tolerance: float = 1e-10, **options: Any) -> None:
    found = pool.run(trained, name, pool.size, steps, options)
    for other in found[1:]:
        assert same(other, found[0])
    want = trained(None, name, pool.size, steps, options)
    assert len(found[0]["grads"]) == len(want["grads"])
    differences = difference(found[0], {key: seen for key, seen in want.items() if seen})
    assert max(differences.values()) < tolerance, differences


@pytest.mark.parametrize("name", [name for name in STATES if name not in BY_ELEMENTS])
def test_as_one_process(two, name):
    check(two, name, steps=2)


HOW = {
    "encoder only": {"shard": "encoder"},
    "heads by themselves": {"shard": "separate heads"},
    "not resharded after forward": {"shard": "not resharded"},
    "weighted heads": {"heads": "weighted", "shard": "everything"},
    "weighted heads that are whole": {"heads": "weighted", "shard": "encoder"},
    "accumulated": {"mode": "accumulated", "shard": "everything"},
    "accumulated with whole heads": {"mode": "accumulated", "shard": "encoder"},
    "accumulated with weighted heads": {"mode": "accumulated", "heads": "weighted", "shard": "everything"},
    "added": {"mode": "added", "shard": "everything"},
    "added with weighted heads": {"mode": "added", "heads": "weighted", "shard": "encoder"},
    "at a representation": {"mode": "at_representation", "shard": "encoder"},
    "at a representation with sharded heads": {"mode": "at_representation", "shard": "everything"},
    "at a representation with weighted heads": {
        "mode": "at_representation",
        "heads": "weighted",
        "shard": "everything",
    },
    "scaled": {"mode": "scaled", "shard": "everything"},
    "scaled with whole heads": {"mode": "scaled", "shard": "encoder"},
}


@pytest.mark.parametrize("how", HOW)
def test_ways_of_stepping(two, how):
    check(two, "cagrad", **HOW[how])


MESHES = {
    "replicas alone": {"shard": "replicas alone"},
    "replicas, accumulated": {"shard": "replicas alone", "mode": "accumulated"},
    "tensor parallel": {"shard": "tensor parallel", "tensor_parallel": 2},
    "tensor parallel, accumulated": {"shard": "tensor parallel", "tensor_parallel": 2, "mode": "accumulated"},
    "tensor parallel, added": {"shard": "tensor parallel", "tensor_parallel": 2, "mode": "added"},
    "tensor parallel, weighted": {"shard": "tensor parallel", "tensor_parallel": 2, "heads": "weighted"},
    "sequence parallel": {"shard": "sequence parallel", "tensor_parallel": 2},
    "sequence parallel, accumulated": {"shard": "sequence parallel", "tensor_parallel": 2, "mode": "accumulated"},
    "sequence parallel, added": {"shard": "sequence parallel", "tensor_parallel": 2, "mode": "added"},
}


@pytest.mark.parametrize("mesh", MESHES)
def test_meshes(two, mesh):
    check(two, "cagrad", **MESHES[mesh])


@pytest.mark.parametrize("name", ["db_mtl sigma", "excess_mtl", "metabalance", "nash every 7"])
def test_methods_that_keep_something_beside_replicas(two, name):
    """What is in whole on all ranks and what is sharded is measured together."""
    check(two, name, shard="tensor parallel", tensor_parallel=2)


@pytest.mark.parametrize(
    "options", [{"shard": "replicas"}, {"shard": "fully sharded and tensor parallel", "tensor_parallel": 2}], ids=str
)
def test_meshes_of_two_dimensions(four, options):
    check(four, "db_mtl sigma", **options)


@pytest.mark.parametrize("name", ["cagrad", "imtl_l+db_mtl", "metabalance"])
def test_shards_of_different_length(three, name):
    """Of five rows, the ranks have two, two, and one; of a row of weights, one rank has nothing."""
    check(three, name, shard="everything")


def mixed_precision(rank: int) -> list[Any]:
    run = Run("db_mtl sigma", 2, rank, shard="mixed precision", dtype=torch.float32)
    seen = run.run(0, 3)
    assert all(p.grad.dtype is torch.float32 for p in run.params)
    return [seen, [run.balancer.state_dict()["averages"][0][0].dtype]]


def test_mixed_precision(two):
    """Passes in bfloat16, sums over ranks and all that follows in float32."""
    (first, dtypes), (second, _) = two.run(mixed_precision)
    assert same(first, second)
    assert dtypes == [torch.float32]
    want = trained(None, "db_mtl sigma", 2, 3, {"dtype": torch.float32})
    assert difference(first, {name: want[name] for name in ("weights", "params")})["weights"] < 2e-2


def missing(losses: list[Any], rank: int) -> list[Any]:
    return [*losses[:2], None] if rank == 1 else losses


def on_mesh(losses: list[Any]) -> list[Any]:
    return [DTensor.from_local(loss, mesh_of((2,)), [Replicate()]) for loss in losses]


def without_sums(run: Run) -> None:
    run.net.set_requires_gradient_sync(False)
    try:
        run.balancer.backward(run.losses(1))
    finally:
        run.net.set_requires_gradient_sync(True)


def before_sharding(rank: int) -> None:
    net = make_net("mlp", torch.float64)
    balancer = igb.Balancer("cagrad", shared=net.encoder, process_group=dist.group.WORLD)
    SHARDED["encoder"](net)
    balancer.backward(losses_of(net, batches("mlp", 0, 2, torch.float64)[rank]))


def of_the_first_kind(rank: int) -> None:
    encoder = FullyShardedDataParallel(make_net().encoder, use_orig_params=True, device_id=torch.device("cpu"))
    igb.Balancer("cagrad", shared=encoder, process_group=dist.group.WORLD)


def on_part_of_a_group(rank: int) -> None:
    """Of two ranks, each is a group of its own here, but the parameters are on both."""
    net = make_net()
    SHARDED["encoder"](net)
    groups = [dist.new_group([member]) for member in range(2)]
    igb.Balancer("cagrad", shared=net.encoder, process_group=groups[rank])


def partial_sums(rank: int) -> None:
    p = DTensor.from_local(torch.ones(3), mesh_of((2,)), [Partial()]).requires_grad_()
    igb.Balancer("cagrad", shared=[p], process_group=dist.group.WORLD)


REFUSED: dict[str, tuple[Callable[[Run, int], Any], str]] = {
    "a task missing on one rank": (
        lambda run, rank: run.balancer.backward(missing(run.losses(1), rank)),
        "losses must have all 3 tasks on every rank",
    ),
    "a task missing on one rank in a micro-batch": (
        lambda run, rank: run.balancer.accumulate(missing(run.losses(1), rank)),
        "losses must have all 3 tasks on every rank",
    ),
    "gradients that are not summed": (lambda run, rank: without_sums(run), "must sum gradients in every backward pass"),
    "single elements": (lambda run, rank: Run("grad_drop", 2, rank), "gradients must be a method without single"),
    "independent batches": (
        lambda run, rank: Run("modo", 2, rank).balancer.backward(run.losses(1), independent=[run.losses(2)]),
        "gradients must be a method without independent",
    ),
    "no process group": (
        lambda run, rank: igb.Balancer("cagrad", shared=run.net.encoder).backward(run.losses(1)),
        "process_group must be given",
    ),
    "a representation on ranks with the same samples": (
        lambda run, rank: Run("cagrad", 2, rank, "tensor parallel", tensor_parallel=2).at_representation(0),
        "representation must be None",
    ),
    "a balancer from before": (lambda run, rank: before_sharding(rank), "make the balancer after fully_shard"),
    "FSDP1": (lambda run, rank: of_the_first_kind(rank), "must not belong to a FullyShardedDataParallel"),
    "a group of other ranks": (
        lambda run, rank: on_part_of_a_group(rank),
        "must have all ranks of the parameters' mesh",
    ),
    "partial sums": (lambda run, rank: partial_sums(rank), "must be sharded or replicated, found the placements"),
    "losses on a mesh": (
        lambda run, rank: run.balancer.backward(on_mesh(run.losses(1))),
        "losses must be plain tensors",
    ),
}


def refusals(rank: int) -> list[str]:
    run = Run("cagrad", 2, rank, shard="everything")
    run.step(0)
    found = []
    for do, _ in REFUSED.values():
        before = Snapshot(run.params, run.balancer)
        try:
            do(run, rank)
            found.append("nothing")
        except (ValueError, RuntimeError, TypeError) as error:
            found.append(str(error))
        before.check()
    run.step(1)
    return found


def test_what_is_refused_is_refused_on_all_ranks_and_changes_nothing(two):
    for messages in two.run(refusals):
        for (what, (_, expected)), message in zip(REFUSED.items(), messages, strict=True):
            assert expected in message, what
