"""The streaming operations on ResNet-50's gradients: 23.5 million elements in 156 tensors, K tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

import igb_kernels as igb
from igb_kernels.bench import eager
from igb_kernels.bench.gradients import resnet50_shapes

TASKS = (3, 8)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROUNDS = 21


class Gradients:
    """K rows of gradients, buffers for results, and two flat buffers whose copy is the floor."""

    def __init__(self, tasks: int, dtype: torch.dtype, device: torch.device) -> None:
        shapes = resnet50_shapes()
        self.rows = [[torch.randn(shape, device=device).to(dtype) for shape in shapes] for _ in range(tasks)]
        self.out = [torch.empty_like(g) for g in self.rows[0]]
        self.weights = torch.rand(tasks, dtype=torch.float64, device=device) + 0.5
        self.bytes = sum(g.numel() * g.element_size() for row in self.rows for g in row)
        self._source = torch.ones(self.bytes // 4, device=device)
        self._target = torch.empty_like(self._source)

    def copy(self) -> None:
        """Reads and writes as many bytes as the K gradients have."""
        self._target.copy_(self._source)

    def rivals(self, ours: Callable[[str], object], backends: Sequence[str]) -> dict[str, Callable[[], object]]:
        """The other backends, and the copy."""
        return {**{name: partial(ours, name) for name in backends[1:]}, "copy": self.copy}


def assert_close(ours: Tensor, truth: Tensor, rtol: float) -> None:
    """A speed is worth nothing where the results disagree."""
    assert float((ours.double() - truth.double()).norm() / truth.double().norm()) < rtol


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tasks", TASKS)
def test_gram_and_combine(compare, device, backends, tasks: int, dtype: str) -> None:
    g = Gradients(tasks, DTYPES[dtype], device)

    def ours(backend: str = backends[0]) -> Tensor:
        gram = igb.ops.gram(g.rows, backend=backend)
        igb.ops.combine_(g.out, g.rows, g.weights, backend=backend)
        return gram

    truth, total = ours("reference"), g.weights @ eager.flatten(g.rows).double()
    for backend in backends:
        assert_close(ours(backend), truth, 1e-5)
        assert_close(torch.cat([t.flatten() for t in g.out]), total, 1e-2)
    del total
    slow = {"eager": lambda: eager.gram_and_combine(g.rows, g.weights), "reference": lambda: ours("reference")}
    moved = 2 * g.bytes + g.bytes // tasks
    compare(ours, g.rivals(ours, backends), slow, rounds=ROUNDS, moved_bytes=moved)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tasks", TASKS)
def test_gram(compare, device, backends, tasks: int, dtype: str) -> None:
    g = Gradients(tasks, DTYPES[dtype], device)

    def ours(backend: str = backends[0]) -> Tensor:
        return igb.ops.gram(g.rows, backend=backend)

    slow = {"eager": lambda: eager.gram(g.rows), "reference": lambda: ours("reference")}
    compare(ours, g.rivals(ours, backends), slow, rounds=ROUNDS, moved_bytes=g.bytes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tasks", TASKS)
def test_combine(compare, device, backends, tasks: int, dtype: str) -> None:
    g = Gradients(tasks, DTYPES[dtype], device)

    def ours(backend: str = backends[0]) -> None:
        igb.ops.combine_(g.out, g.rows, g.weights, backend=backend)

    slow = {"eager": lambda: eager.combine(g.rows, g.weights), "reference": lambda: ours("reference")}
    moved = g.bytes + g.bytes // tasks
    compare(ours, g.rivals(ours, backends), slow, rounds=ROUNDS, moved_bytes=moved)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tasks", TASKS)
def test_ema(compare, device, backends, tasks: int, dtype: str) -> None:
    g = Gradients(tasks, DTYPES[dtype], device)
    state, new = ([[torch.zeros(t.shape, device=device) for t in row] for row in g.rows] for _ in range(2))
    size = g.bytes // tasks // g.rows[0][0].element_size()
    flat_state = torch.zeros(tasks, size, dtype=DTYPES[dtype], device=device)
    decay = torch.tensor(0.9, dtype=torch.float64, device=device)

    def ours(backend: str = backends[0]) -> Tensor:
        return igb.ops.ema_(new, state, g.rows, decay, backend=backend)

    for backend in backends:
        assert_close(ours(backend).sqrt(), eager.ema_norms(flat_state, g.rows, 0.9)[1], 1e-2)
    slow = {"eager": lambda: eager.ema_norms(flat_state, g.rows, 0.9), "reference": lambda: ours("reference")}
    wide = sum(t.numel() * t.element_size() for row in state for t in row)
    compare(ours, g.rivals(ours, backends), slow, rounds=ROUNDS, moved_bytes=g.bytes + 2 * wide)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tasks", TASKS)
def test_accumulate_squares(compare, device, backends, tasks: int, dtype: str) -> None:
    g = Gradients(tasks, DTYPES[dtype], device)
    state, new = ([[torch.ones(t.shape, device=device) for t in row] for row in g.rows] for _ in range(2))
    size = g.bytes // tasks // g.rows[0][0].element_size()
    flat_state = torch.ones(tasks, size, dtype=DTYPES[dtype], device=device)

    def ours(backend: str = backends[0]) -> Tensor:
        return igb.ops.accumulate_squares_(new, state, g.rows, 1e-7, backend=backend)

    for backend in backends:
        assert_close(ours(backend), eager.accumulate_squares(flat_state, g.rows, 1e-7)[1], 1e-2)
    slow = {
        "eager": lambda: eager.accumulate_squares(flat_state, g.rows, 1e-7),
        "reference": lambda: ours("reference"),
    }
    wide = sum(t.numel() * t.element_size() for row in state for t in row)
    compare(ours, g.rivals(ours, backends), slow, rounds=ROUNDS, moved_bytes=g.bytes + 2 * wide)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tasks", TASKS)
def test_sign_drop(compare, device, backends, tasks: int, dtype: str) -> None:
    g = Gradients(tasks, DTYPES[dtype], device)
    counter = torch.tensor([1.0, 2.0], dtype=torch.float64, device=device)

    def ours(backend: str = backends[0]) -> Tensor:
        return igb.ops.sign_drop_(g.out, g.rows, counter, backend=backend)

    truth, norm = ours("reference"), torch.cat([t.flatten() for t in eager.sign_drop(g.rows)]).double().square().sum()
    assert_close(norm.reshape(1), truth, 1e-2)  # other random numbers, the same sum on average
    for backend in backends:
        assert_close(ours(backend), truth, 1e-5)
    slow = {"eager": lambda: eager.sign_drop(g.rows), "reference": lambda: ours("reference")}
    moved = g.bytes + g.bytes // tasks
    compare(ours, g.rivals(ours, backends), slow, rounds=ROUNDS, moved_bytes=moved)
