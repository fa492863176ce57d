"""Ranks come to what one process comes to on the batches of all, and to the same bits on each."""

import pytest
import torch
from balancer.models import same
from balancer.test_state import STATES

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
