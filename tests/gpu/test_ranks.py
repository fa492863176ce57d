"""Ranks over NCCL, as many as there are GPUs, at most 4: against one process on all their batches, on one GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from balancer.models import same
from distributed.pool import Pool
from distributed.runs import VARIATIONS, difference, varied


@pytest.fixture(scope="module")
def ranks() -> Iterator[Pool]:
    pool = Pool(min(4, torch.cuda.device_count()), backend="nccl")
    yield pool
    pool.close()


CASES = [
    *(("Training", name) for name in ("db_mtl", "nash_mtl", "emtl", "grad_drop", "equal", "excess_mtl", "igb_v1")),
    *(("Missing", name) for name in ("db_mtl", "nash_mtl", "emtl")),
    ("MicroBatches", "nash_mtl"),
    ("AtRepresentation", "nash_mtl"),
    ("TwoBatches", "modo"),
    ("Weighted", "nash every 7"),
]


@pytest.mark.parametrize(("variation", "name"), CASES)
def test_as_one_process(ranks: Pool, variation: str, name: str) -> None:
    options = {"device": "cuda"}
    first, *others = ranks.run(varied, variation, name, 8, ranks.size, options)
    assert all(same(first, other) for other in others)
    torch.manual_seed(7)
    alone = VARIATIONS[variation](name, ranks.size, **options).run(0, 8)
    found = difference(first, alone)
    assert max(found.values()) < 1e-9, found
