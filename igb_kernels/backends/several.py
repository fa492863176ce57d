"""Tensors on several devices, as of a model whose layers are spread over them: each device's part of an operation runs
there, on the device's own backend; K×K numbers come together at home, where losses and state are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from igb_kernels._log import warn_once
from igb_kernels.backends import Backend, OptionalTensors, captures_graph, resolve
from igb_kernels.backends._layout import first_of_columns


def several_devices(name: str, home: torch.device, tensors: Iterable[Tensor]) -> SeveralDevices | None:
    """The backend for tensors of which some are not at home; None if all are. `name` is as for `resolve`."""
    devices = dict.fromkeys([home, *map(device_of, tensors)])
    if len(devices) == 1:
        return None
    if len({device.type for device in devices}) > 1:
        warn_once(f"parameters and losses are on {', '.join(map(str, devices))}: steps wait for copies to the CPU")
    return SeveralDevices(name, home, tuple(devices))


def device_of(t: Tensor) -> torch.device:
    """That of a tensor, and so of its column."""
    return t.device


class SpreadTable:
    """K rows of P tensors, those of a column on one device: a table for each, made by its backend when it is needed."""

    def __init__(self, name: str, tensors: OptionalTensors, tasks: int, like: SpreadTable | None = None) -> None:
        self.name, self.tensors, self.tasks, self.params = name, tensors, tasks, len(tensors) // tasks
        self._like = like
        self._parts: dict[tuple[torch.device, tuple[int, ...]], Any] = {}
        self.groups: dict[torch.device, tuple[int, ...]] = self._by_device() if like is None else like.groups
        """The columns on each device, in the order of the first ones."""

    def _by_device(self) -> dict[torch.device, tuple[int, ...]]:
        groups: dict[torch.device, list[int]] = {}
        for p, t in enumerate(first_of_columns(self.tensors, self.params)):
            if t is not None:
                groups.setdefault(device_of(t), []).append(p)
        return {device: tuple(columns) for device, columns in groups.items()}

    def part(self, device: torch.device, columns: tuple[int, ...]) -> Any:
        """The table of these columns, which are on this device."""
        key = device, columns
        if key not in self._parts:
            like = None if self._like is None else self._like.part(device, columns)
            rows = [self.tensors[k + p] for k in range(0, len(self.tensors), self.params) for p in columns]
            self._parts[key] = resolve(self.name, device.type).Table(rows, self.tasks, like)
        return self._parts[key]

    def in_place(self, device: torch.device, columns: tuple[int, ...], like: Any = None) -> Any:
        """A table of all P columns, of which there are only these: each has the place that it has here."""
        there = frozenset(columns)
        rows = [t if i % self.params in there else None for i, t in enumerate(self.tensors)]
        return resolve(self.name, device.type).Table(rows, self.tasks, like)

    @property
    def columns(self) -> list[Tensor | None]:
        """The first tensor of each column that is there."""
        found: list[Tensor | None] = [None] * self.params
        for device, columns in self.groups.items():
            for p, t in zip(columns, self.part(device, columns).columns, strict=True):
                found[p] = t
        return found


class SeveralDevices:
    """A `Backend` made of those of several devices. Sums are taken device by device, in the order of their first
    columns. No copy between GPUs is waited for."""

    def __init__(self, name: str, home: torch.device, devices: Sequence[torch.device]) -> None:
        self.name, self.home, self.devices = name, home, devices

    def captured(self) -> bool:
        """Whether what is now put on any of the devices goes into a CUDA graph."""
        return any(captures_graph(device) for device in self.devices)

    def Table(self, tensors: OptionalTensors, tasks: int, like: SpreadTable | None = None) -> SpreadTable:
        return SpreadTable(self.name, tensors, tasks, like)

    def gram(self, grads: SpreadTable, tasks: int) -> Tensor:
        return self._total([run.gram(own, tasks) for _, run, (own,) in self._on_each(grads)], tasks, tasks)

    def sq_norms(self, grads: SpreadTable, tasks: int) -> Tensor:
        return self._total([run.sq_norms(own, tasks) for _, run, (own,) in self._on_each(grads)], tasks)

    def ema_(
        self,
        out: SpreadTable,
        state: SpreadTable,
        grads: SpreadTable,
        decay: Tensor,
        tasks: int,
        scales: Tensor | None = None,
    ) -> Tensor:
        norms = []
        for device, run, (to, old, new) in self._on_each(out, state, grads):
            own_scales = None if scales is None else _moved(scales, device)
            norms.append(run.ema_(to, old, new, _moved(decay, device), tasks, own_scales))
        return self._total(norms, tasks)

    def accumulate_squares_(
        self, out: SpreadTable, state: SpreadTable, grads: SpreadTable, eps: float, tasks: int
    ) -> Tensor:
        tables = self._on_each(out, state, grads)
        return self._total(
            [run.accumulate_squares_(to, old, new, eps, tasks) for _, run, (to, old, new) in tables], tasks
        )

    def combine_(self, out: SpreadTable, grads: SpreadTable, weights: Tensor, accumulate: bool) -> None:
        for device, run, (to, rows) in self._on_each(out, grads):
            run.combine_(to, rows, _moved(weights, device), accumulate)

    def sign_drop_(self, out: SpreadTable, grads: SpreadTable, counter: Tensor, leak: Tensor | None) -> Tensor:
        """The random numbers are those of one device: they go by a column's place among all columns."""
        norms = []
        for device, columns in out.groups.items():
            rows = grads.in_place(device, columns)
            to = out.in_place(device, columns, rows)
            own_leak = None if leak is None else _moved(leak, device)
            norms.append(resolve(self.name, device.type).sign_drop_(to, rows, _moved(counter, device), own_leak))
        return self._total(norms, 1)

    def rollback_(self, out: SpreadTable, kept: SpreadTable, status: Tensor) -> None:
        for device, run, (to, old) in self._on_each(out, kept):
            run.rollback_(to, old, _moved(status, device))

    def solve(
        self,
        method: str,
        gram: Tensor,
        losses: Tensor | None,
        per_task: Tensor | None,
        options: Sequence[float],
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return resolve(self.name, gram.device.type).solve(method, gram, losses, per_task, options, state)

    def loss_scales(
        self, rule: str, losses: Tensor, per_task: Tensor | None, options: Sequence[float], state: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return resolve(self.name, losses.device.type).loss_scales(rule, losses, per_task, options, state)

    def _on_each(self, first: SpreadTable, *others: SpreadTable) -> Iterator[tuple[torch.device, Backend, list[Any]]]:
        """Each device that `first` has columns on, its backend, and its part of the tables."""
        for device, columns in first.groups.items():
            yield device, resolve(self.name, device.type), [t.part(device, columns) for t in (first, *others)]

    def _total(self, parts: Iterable[Tensor], *shape: int) -> Tensor:
        """Their sum at home, float64."""
        moved = [_moved(part, self.home) for part in parts]
        return reduce(torch.add, moved) if moved else torch.zeros(shape, dtype=torch.float64, device=self.home)


def _moved(t: Tensor, device: torch.device) -> Tensor:
    """On this device; only a copy to the CPU is waited for, as it has to be there when it is read."""
    if device.type == "cuda" and t.device.type == "cpu":
        t = t.pin_memory()  # the caching allocator keeps it until it has been copied
    return t.to(device, non_blocking=device.type == "cuda")
