"""What monitoring costs: a step that is recorded, its share of the writing included, and a flush of a block."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import igb_kernels as igb
from igb_kernels.monitor import CSV, Parquet, TensorBoard, Writer
from igb_kernels.result import BalanceResult

BLOCK = 100
WRITERS: dict[str, Callable[[Path], list[Writer]]] = {
    "memory": lambda folder: [],
    "csv": lambda folder: [CSV(folder / "log.csv")],
    "parquet": lambda folder: [Parquet(folder / "log.parquet")],
    "tensorboard": lambda folder: [TensorBoard(folder)],
    "tensorboard-each-step": lambda folder: [TensorBoard(folder, mean_of=1)],
}


def result_of(tasks: int, device: torch.device) -> BalanceResult:
    """As of a method with a Gramian."""
    rows = torch.randn(tasks, tasks + 8, dtype=torch.float64)
    losses, weights = torch.rand(2, tasks) + 0.5
    return BalanceResult(
        names=tuple(f"task {k}" for k in range(tasks)),
        losses=losses.to(device),
        scales=torch.ones(tasks, device=device),
        weights=weights.double().to(device),
        status=torch.zeros((), dtype=torch.int32, device=device),
        measured=(rows @ rows.T).to(device),
    )


@pytest.mark.parametrize("tasks", [3, 8, 40])
def test_record(compare, device, tasks: int) -> None:
    """A step of BLOCK - 1, beside reading the same numbers, which waits on a GPU."""
    result, monitor = result_of(tasks, device), igb.Monitor(every=1 << 12, keep=0, warn=None)

    def read() -> None:
        for value in (result.losses, result.scales, result.weights, result.status, result.measured):
            value.tolist()

    def setup() -> tuple[()]:
        monitor.flush()
        monitor.record(result)
        return ()

    compare(lambda: monitor.record(result), {"reading the values": read}, {}, rounds=500, setup=setup)


@pytest.mark.parametrize("tasks", [3, 8, 40])
@pytest.mark.parametrize("writer", WRITERS)
def test_flush(compare, device, tmp_path, writer: str, tasks: int) -> None:
    """A block of BLOCK steps, beside recording them."""
    for name in {"parquet": ["pyarrow"], "tensorboard": ["tensorboard"]}.get(writer.partition("-")[0], []):
        pytest.importorskip(name)
    result = result_of(tasks, device)
    monitor = igb.Monitor(WRITERS[writer](tmp_path), every=2 * BLOCK, keep=0)
    other = igb.Monitor(every=2 * BLOCK, keep=0, warn=None)

    def setup() -> tuple[()]:
        monitor.flush()
        other.flush()
        for _ in range(BLOCK):
            monitor.record(result)
        return ()

    def record() -> None:
        for _ in range(BLOCK):
            other.record(result)

    compare(monitor.flush, {f"recording {BLOCK} steps": record}, {}, rounds=20, setup=setup)
    other.close()
    monitor.close()
