"""The streaming operations on ResNet-50's gradients: 23.5 million elements in 156 tensors, K tasks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import igb_kernels as igb
from benchmarks import eager
from benchmarks.models import resnet50_shapes

TASKS = (3, 8)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROUNDS = 21


class Gradients:
    """K rows of gradients, buffers for results, and two flat buffers whose copy is the floor."""

    def __init__(self, tasks: int, dtype: torch.dtype) -> None:
        shapes = resnet50_shapes()
        self.rows = [[torch.randn(shape).to(dtype) for shape in shapes] for _ in range(tasks)]
        self.out = [torch.empty_like(g) for g in self.rows[0]]
        self.weights = torch.rand(tasks, dtype=torch.float64) + 0.5
        self.bytes = sum(g.numel() * g.element_size() for row in self.rows for g in row)
        self._source = torch.ones(self.bytes // 4)
        self._target = torch.empty_like(self._source)

    def copy(self) -> None:
        """Reads and writes as many bytes as the K gradients have."""
        self._target.copy_(self._source)


def assert_close(ours: Tensor, truth: Tensor, rtol: float) -> None:
    """A speed is worth nothing where the results disagree."""
    assert float((ours.double() - truth.double()).norm() / truth.double().norm()) < rtol


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tasks", TASKS)
def test_gram_and_combine(compare, tasks: int, dtype: str) -> None:
    g = Gradients(tasks, DTYPES[dtype])

    def ours(backend: str = "auto") -> Tensor:
        gram = igb.ops.gram(g.rows, backend=backend)
        igb.ops.combine_(g.out, g.rows, g.weights, backend=backend)
        return gram

    assert_close(ours(), ours("reference"), 1e-5)
    ours()
    assert_close(torch.cat([t.flatten() for t in g.out]), g.weights @ eager.flatten(g.rows).double(), 1e-2)
    slow = {"eager": lambda: eager.gram_and_combine(g.rows, g.weights), "reference": lambda: ours("reference")}
    compare(ours, {"copy": g.copy}, slow, rounds=ROUNDS, moved_bytes=2 * g.bytes + g.bytes // tasks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tasks", TASKS)
def test_gram(compare, tasks: int, dtype: str) -> None:
    g = Gradients(tasks, DTYPES[dtype])
    slow = {"eager": lambda: eager.gram(g.rows), "reference": lambda: igb.ops.gram(g.rows, backend="reference")}
    compare(lambda: igb.ops.gram(g.rows), {"copy": g.copy}, slow, rounds=ROUNDS, moved_bytes=g.bytes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tasks", TASKS)
def test_combine(compare, tasks: int, dtype: str) -> None:
    g = Gradients(tasks, DTYPES[dtype])
    slow = {
        "eager": lambda: eager.combine(g.rows, g.weights),
        "reference": lambda: igb.ops.combine_(g.out, g.rows, g.weights, backend="reference"),
    }
    moved = g.bytes + g.bytes // tasks
    compare(
        lambda: igb.ops.combine_(g.out, g.rows, g.weights), {"copy": g.copy}, slow, rounds=ROUNDS, moved_bytes=moved
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tasks", TASKS)
def test_ema(compare, tasks: int, dtype: str) -> None:
    g = Gradients(tasks, DTYPES[dtype])
    state = [[torch.zeros(t.shape) for t in row] for row in g.rows]
    new = [[torch.zeros(t.shape) for t in row] for row in g.rows]
    flat_state = torch.zeros(tasks, g.bytes // tasks // g.rows[0][0].element_size(), dtype=DTYPES[dtype])
    norms = igb.ops.ema_(new, state, g.rows, 0.9)
    assert_close(norms.sqrt(), eager.ema_norms(flat_state, g.rows, 0.9)[1], 1e-2)
    slow = {
        "eager": lambda: eager.ema_norms(flat_state, g.rows, 0.9),
        "reference": lambda: igb.ops.ema_(new, state, g.rows, 0.9, backend="reference"),
    }
    wide = sum(t.numel() * t.element_size() for row in state for t in row)
    compare(
        lambda: igb.ops.ema_(new, state, g.rows, 0.9),
        {"copy": g.copy},
        slow,
        rounds=ROUNDS,
        moved_bytes=g.bytes + 2 * wide,
    )
