"""Models sharded by `fully_shard` get what one process comes to on the batches of all ranks."""

from typing import Any

import pytest
from balancer.models import same
from balancer.test_state import STATES

from .runs import difference
from .sharded import Run

BY_ELEMENTS = {"grad_drop"}


def trained(rank: int | None, name: str, ranks: int, steps: int, options: dict[str, Any]) -> dict[str, Any]:
    return Run(name, ranks, rank, **options).run(0, steps)


def check(pool: Any, name: str, steps: int = 3, tolerance: float = 1e-10, **options: Any) -> None:
    found = pool.run(trained, name, pool.size, steps, options)
    for other in found[1:]:
        assert same(other, found[0])
    want = trained(None, name, pool.size, steps, options)
    assert len(found[0]["grads"]) == len(want["grads"])
    differences = difference(found[0], want)
    assert max(differences.values()) < tolerance, differences


@pytest.mark.parametrize("name", [name for name in STATES if name not in BY_ELEMENTS])
def test_as_one_process(two, name):
    check(two, name, shard="everything")


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
