"""Consecutive steps on the host: what writers get, and the layout of their columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, reduce
from itertools import combinations
from operator import or_
from typing import Any

import torch
from torch import Tensor

from igb_kernels.result import cosines_of, norms_of


@dataclass(frozen=True)
class Mark:
    """What the host knows of a recorded step."""

    step: int
    time: float
    """Seconds since the epoch."""
    active: tuple[int, ...] | None
    """The tasks that took part; None: all."""
    measured: bool
    """Whether gradients were measured."""


@dataclass(frozen=True, eq=False)
class Block:
    """N steps of K tasks; float64 on the CPU unless said otherwise.

    A missing task's numbers are NaN. Those of a step that was not finite are what the step gave.
    """

    tasks: tuple[str, ...]
    """The tasks' names."""
    steps: Tensor
    """Step numbers [N], int64."""
    times: Tensor
    """When they were recorded [N], in seconds since the epoch."""
    active: Tensor
    """Which tasks took part [N, K], bool."""
    seen: Tensor
    """The steps that measured gradients [N], bool."""
    status: Tensor
    """Bits of `igb_kernels.Status` [N], int64."""
    losses: Tensor
    """Raw losses [N, K]."""
    scales: Tensor
    """Loss scales [N, K]."""
    weights: Tensor
    """Gradient-balancing weights [N, K], on the gradients of the scaled losses."""
    measured: Tensor | None
    """Gramians of the scaled gradients [N, K, K], or squared norms [N, K], or None where the method measures neither;
    NaN in steps that measured nothing."""

    @classmethod
    def of(cls, tasks: tuple[str, ...], marks: Sequence[Mark], values: Tensor, measured_dims: int) -> Block:
        """From rows of `values` [N, ...]: losses, scales, weights [K], the status, and first in what follows Gramians
        [K, K] or squared norms [K], as `measured_dims` says, or nothing."""
        K, N = len(tasks), len(marks)
        losses, scales, weights, status, measured = values.split_with_sizes(
            [K, K, K, 1, values.shape[1] - 3 * K - 1], dim=1
        )
        active = torch.ones(N, K, dtype=torch.bool, device="cpu")
        for row, mark in zip(active, marks, strict=True):
            if mark.active is not None:
                row.fill_(False)[list(mark.active)] = True
        seen = torch.tensor([mark.measured for mark in marks], device="cpu")
        known = seen[:, None] & active
        measured = measured[:, : K**measured_dims]
        if measured_dims == 2:
            measured, known = measured.reshape(N, K, K), known[:, :, None] & known[:, None, :]
        return cls(
            tasks=tasks,
            steps=torch.tensor([mark.step for mark in marks], device="cpu"),
            times=torch.tensor([mark.time for mark in marks], dtype=torch.float64, device="cpu"),
            active=active,
            seen=seen,
            status=status[:, 0].long(),
            losses=losses.where(active, torch.nan),
            scales=scales.where(active, torch.nan),
            weights=weights.where(active, torch.nan),
            measured=measured.where(known, torch.nan) if measured_dims else None,
        )

    @classmethod
    def cat(cls, blocks: Sequence[Block]) -> Block:
        """Blocks of one monitor as one."""
        first = blocks[0]
        if len(blocks) == 1:
            return first
        parts: dict[str, Any] = {
            field.name: None
            if first.measured is None and field.name == "measured"
            else torch.cat([getattr(block, field.name) for block in blocks])
            for field in fields(cls)
            if field.name != "tasks"
        }
        return cls(tasks=first.tasks, **parts)

    def __len__(self) -> int:
        return len(self.steps)

    @cached_property
    def norms(self) -> Tensor | None:
        """Norms of the scaled gradients [N, K], or None."""
        if self.measured is None:
            return None
        return norms_of(self.measured.diagonal(dim1=1, dim2=2) if self.measured.dim() == 3 else self.measured)

    @cached_property
    def cosines(self) -> Tensor | None:
        """Cosines between the tasks' gradients [N, K, K]; None where there are no Gramians."""
        return cosines_of(self.measured) if self.measured is not None and self.measured.dim() == 3 else None

    @cached_property
    def shares(self) -> Tensor:
        """Each task's share of the update [N, K]: |w_k| ‖g_k‖ over the sum of all tasks', or |w_k| over their sum with
        methods that measure no norms; NaN where that is unknown."""
        parts = self.weights.abs() if self.norms is None else self.weights.abs() * self.norms
        return parts / parts.where(self.active, 0).sum(dim=1, keepdim=True)

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """i < j, row by row."""
        return [*combinations(range(len(self.tasks)), 2)]

    @cached_property
    def series(self) -> tuple[list[str], Tensor, Tensor]:
        """Names of C columns, their values [N, C], and whether there are any, bool [N, C]: there are none of missing
        tasks, and of gradients that were not measured."""
        seen = self.active & self.seen[:, None]
        parts = [("loss", self.losses, self.active), ("scale", self.scales, self.active)]
        parts += [("weight", self.weights, self.active)]
        if self.norms is None:
            parts += [("share", self.shares, self.active)]
        else:
            parts += [("norm", self.norms, seen), ("share", self.shares, seen)]
        names = [f"{kind}/{task}" for kind, _, _ in parts for task in self.tasks]
        if self.cosines is not None and self.pairs:
            i, j = (torch.tensor(side, device="cpu") for side in zip(*self.pairs, strict=True))
            names += [f"cosine/{self.tasks[a]}/{self.tasks[b]}" for a, b in self.pairs]
            parts += [("cosine", self.cosines[:, i, j], seen[:, i] & seen[:, j])]
        return names, torch.cat([values for _, values, _ in parts], dim=1), torch.cat([t for _, _, t in parts], dim=1)

    def columns(self) -> dict[str, Tensor]:
        """The steps as named columns [N]: "step", "time", "status" and "active/a" (int64, but "time"), then float64
        "loss/a", "scale/a", "weight/a", "norm/a", "share/a" of every task, and "cosine/a/b" of every pair, in the order
        of the tasks. Norms and cosines are there where the method measures them."""
        names, values, _ = self.series
        columns = {"step": self.steps, "time": self.times, "status": self.status}
        columns |= {f"active/{task}": self.active[:, k].long() for k, task in enumerate(self.tasks)}
        return columns | dict(zip(names, values.unbind(1), strict=True))

    def points(self, mean_of: int | None) -> Iterator[tuple[int, float, dict[str, float]]]:
        """Step, time and values by column (all but "step", "time" and "active/…") of each `mean_of` steps, for plots;
        None: of all.

        Values are means over the steps in which they are finite (NaN or infinite if none is), and left out where there
        are none; "status" has the bits of all steps. Step and time are the last one's.
        """
        names, values, there = self.series
        size = len(self) if mean_of is None else min(mean_of, len(self))
        means, any_there = means_of(values, there, size)
        status = self.status.tolist()
        for i, (row, found) in enumerate(zip(means.tolist(), any_there.tolist(), strict=True)):
            point: dict[str, float] = {name: mean for name, mean, known in zip(names, row, found, strict=True) if known}
            point["status"] = reduce(or_, status[i * size : (i + 1) * size])
            last = min((i + 1) * size, len(self)) - 1
            yield int(self.steps[last]), float(self.times[last]), point


def means_of(values: Tensor, there: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Means [N / size, ...] of every `size` steps of values [N, ...] that are there, bool [N, ...], and finite, or not
    finite where none is; and whether any are there, bool [N / size, ...]. The last mean may be of fewer steps."""
    rest = values.new_zeros(-len(values) % size, *values.shape[1:])
    values, there = (torch.cat([t, rest.to(t.dtype)]).view(-1, size, *values.shape[1:]) for t in (values, there))
    usable = values.isfinite() & there
    usable |= there & ~usable.any(dim=1, keepdim=True)
    return values.where(usable, 0).sum(dim=1) / usable.sum(dim=1), there.any(dim=1)


def mean_of_finite(values: Tensor) -> Tensor:
    """Over the steps in which they are finite, [N, ...] -> [...]; NaN where none is."""
    finite = values.isfinite()
    return values.where(finite, 0).sum(0) / finite.sum(0)
