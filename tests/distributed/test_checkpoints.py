"""Training goes on from `torch.distributed.checkpoint`, on as many processes as one likes."""

from __future__ import annotations

import pathlib
import warnings
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from balancer.models import same
from balancer.test_state import STATES, WITH_STATE
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import igb_kernels as igb
from igb_kernels.distributed.checkpoint import empty_state_dict

from .runs import difference
from .sharded import Run

SHARES = 6
"""Of each step's batch; ranks have equally many."""


def load(run: Run, path: pathlib.Path) -> None:
    model, optimizer = get_state_dict(run.net, run.optimizers)
    state = {"model": model, "optimizer": optimizer, "balancer": empty_state_dict(run.balancer, path)}
    dcp.load(state, checkpoint_id=path)
    set_state_dict(run.net, run.optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    run.balancer.load_state_dict(state["balancer"])


def save(run: Run, path: pathlib.Path) -> None:
    model, optimizer = get_state_dict(run.net, run.optimizers)
    dcp.save({"model": model, "optimizer": optimizer, "balancer": run.balancer.state_dict()}, checkpoint_id=path)


def steps(
    rank: int | None, name: str, ranks: int, shard: str, first: int, last: int, before: Any = None, after: Any = None
) -> dict[str, Any]:
    """A part of a training, from a checkpoint to the next."""
    run = Run(name, ranks, rank, shard, shares=SHARES, tensor_parallel=ranks if shard == "tensor parallel" else 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        if before is not None:
            load(run, before)
        seen = run.run(first, last)
        if after is not None:
            save(run, after)
    return seen


@pytest.mark.parametrize("shard", ["whole", "everything"])
@pytest.mark.parametrize("name", ["db_mtl sigma", "excess_mtl", "igb_v1 mid-epoch"])
def test_the_next_steps_have_the_same_bits(two, tmp_path, name, shard):
    want = two.run(steps, name, 2, shard, 0, 4)
    two.run(steps, name, 2, shard, 0, 2, None, tmp_path)
    found = two.run(steps, name, 2, shard, 2, 4, tmp_path)
    for seen, whole in zip(found, want, strict=True):
        assert same(seen["params"], whole["params"])
        assert same(seen["weights"], whole["weights"][2:])


@pytest.mark.parametrize(
    ("name", "shard"), [("db_mtl sigma", "whole"), ("db_mtl sigma", "everything"), ("moco", "everything")]
)
def test_on_other_numbers_of_processes(two, three, tmp_path, name, shard):
    at = [tmp_path / str(step) for step in range(5)]
    want = steps(None, name, 1, shard, 0, 5)
    weights = two.run(steps, name, 2, shard, 0, 2, None, at[2])[0]["weights"]
    weights += three.run(steps, name, 3, shard, 2, 3, at[2], at[3])[0]["weights"]
    weights += steps(None, name, 1, shard, 3, 4, at[3], at[4])["weights"]
    last = two.run(steps, name, 2, shard, 4, 5, at[4])[0]
    found = difference({"weights": weights + last["weights"], "params": last["params"]},
                       {"weights": want["weights"], "params": want["params"]})  # fmt: skip
    assert max(found.values()) < 1e-10, found


def test_from_tensor_parallelism_to_one_process_and_back(two, tmp_path):
    """Parameters that are replicated stand before and behind those that are sharded."""
    name, shard, first, second = "db_mtl sigma", "tensor parallel", tmp_path / "1", tmp_path / "2"
    want = steps(None, name, 1, shard, 0, 3)
    two.run(steps, name, 2, shard, 0, 1, None, first)
    steps(None, name, 1, shard, 1, 2, first, second)
    last = two.run(steps, name, 2, shard, 2, 3, second)[0]
    assert difference(last, {"params": want["params"]})["params"] < 1e-10


@pytest.mark.parametrize("name", WITH_STATE)
def test_every_state_comes_back(tmp_path, name):
    run, other = Run(name, 1), Run(name, 1)
    for step in range(6):
        run.step(step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"balancer": run.balancer.state_dict()}, checkpoint_id=tmp_path)
        state = {"balancer": empty_state_dict(other.balancer, tmp_path)}
        dcp.load(state, checkpoint_id=tmp_path)
    other.balancer.load_state_dict(state["balancer"])
    assert same(other.balancer.state_dict(), run.balancer.state_dict())


def test_a_checkpoint_that_does_not_fit(tmp_path):
    run = Run("db_mtl sigma", 1)
    run.step(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"mine": run.balancer.state_dict()}, checkpoint_id=tmp_path)
    other = igb.Balancer(**STATES["db_mtl sigma"](), shared=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="must have the state of a balancer as 'balancer'"):
        empty_state_dict(run.balancer, tmp_path)
    with pytest.raises(ValueError, match="moving averages do not fit the 2 shared parameters"):
        empty_state_dict(other, tmp_path, "mine")
