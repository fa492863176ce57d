"""Where the task gradients of a step live until they are combined: buffers and their lifetime, never methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from igb_kernels.backends import Backend, OptionalTensors, Table
from igb_kernels.ops import accumulator_dtype

Grads = list[Tensor | None]


class TaskGradients:
    """K rows of gradients, one added after each backward pass; then measured, then combined into `.grad`."""

    def __init__(self, params: Sequence[Tensor], backend: Backend) -> None:
        self.params, self.backend = params, backend

    def add(self, grads: Grads) -> None:
        """Takes the next task's gradients; their buffers belong to the store from here on."""
        raise NotImplementedError

    def sq_norms(self) -> Tensor:
        """Squared norms of the rows, [K] float64."""
        raise NotImplementedError

    def gram(self) -> Tensor:
        """Gramian of the rows, [K, K] float64."""
        raise NotImplementedError

    def write(self, weights: Tensor, previous: Grads) -> None:
        """Sets p.grad = previous + Σ_k weights_k row_k, for the parameters that some task reaches."""
        raise NotImplementedError

    def commit(self, status: Tensor) -> None:
        """Keeps for the next step what outlives this one, unless the status says NON_FINITE."""

    def _write(self, rows: Grads, tasks: int, table: Table, weights: Tensor, previous: Grads, reuse: bool) -> None:
        """Adds the weighted sum of `rows` to `previous`, or writes it: over a column's first row with `reuse`."""
        out = []
        for p, old, column in zip(self.params, previous, table.columns, strict=True):
            if old is not None or column is None:
                out.append(old)
            else:
                out.append(column if reuse and column.dtype is p.dtype else torch.empty_like(p))
        if all(old is None for old in previous) and all(column is not None for column in table.columns):
            self.backend.combine_(self.backend.Table(out, 1, table.columns), table, weights, False)
        else:
            self._write_columns(rows, tasks, weights, previous, table.columns, out)
        for p, grad in zip(self.params, out, strict=True):
            p.grad = grad

    def _write_columns(
        self, rows: Grads, tasks: int, weights: Tensor, previous: Grads, reached: OptionalTensors, out: Grads
    ) -> None:
        """As `_write`, where some parameters have a gradient already or are not reached by any task."""
        params = len(self.params)
        for accumulate in (False, True):
            columns = [p for p in range(params) if reached[p] is not None and (previous[p] is not None) == accumulate]
            if columns:
                target = self.backend.Table([out[p] for p in columns], 1)
                chosen = [rows[k * params + p] for k in range(tasks) for p in columns]
                table = self.backend.Table(chosen, tasks, target.columns)
                self.backend.combine_(target, table, weights, accumulate)


class KeptGradients(TaskGradients):
    """All K rows, in the buffers that autograd made. The sum is written over the first of them: no further memory."""

    def __init__(self, params: Sequence[Tensor], backend: Backend) -> None:
        super().__init__(params, backend)
        self._rows: Grads = []
        self._tasks = 0
        self._table: Table | None = None

    def add(self, grads: Grads) -> None:
        self._rows += grads
        self._tasks += 1

    def _as_table(self) -> Table:
        if self._table is None:
            self._table = self.backend.Table(self._rows, self._tasks)
        return self._table

    def sq_norms(self) -> Tensor:
        return self.backend.sq_norms(self._as_table(), self._tasks)

    def gram(self) -> Tensor:
        return self.backend.gram(self._as_table(), self._tasks)

    def write(self, weights: Tensor, previous: Grads) -> None:
        self._write(self._rows, self._tasks, self._as_table(), weights, previous, reuse=True)


@dataclass
class AverageBanks:
    """K rows of moving averages that outlive the step, and a second set of buffers for the next ones.

    A step reads `current` and writes `spare`; the two change places when it is done. So a step that raises leaves the
    averages as they were, and one that turns out non-finite can put them back without a host sync. An average is None
    until a gradient reaches its parameter.
    """

    current: list[Grads] = field(default_factory=list)
    spare: list[Grads] = field(default_factory=list)
    tables: dict[int, Table] = field(default_factory=dict)
    """The rows' tables by the rows' identity: the buffers stay where they are."""

    def rows(self, task: int, params: int) -> tuple[Grads, Grads]:
        """Task's row of `current` and of `spare`."""
        for bank in (self.current, self.spare):
            if len(bank) == task:
                bank.append([None] * params)
        return self.current[task], self.spare[task]

    def table(self, row: Grads, backend: Backend) -> Table:
        if id(row) not in self.tables:
            self.tables[id(row)] = backend.Table(row, 1)
        return self.tables[id(row)]

    def forget_table(self, row: Grads) -> None:
        self.tables.pop(id(row), None)


class AveragedGradients(TaskGradients):
    """Moving averages in the rows' place, updated and measured in one pass right after each backward pass, while the
    gradient is in the cache and before the next one needs memory."""

    def __init__(self, params: Sequence[Tensor], backend: Backend, banks: AverageBanks, decay: Tensor) -> None:
        super().__init__(params, backend)
        self._banks, self._decay = banks, decay
        self._norms: list[Tensor] = []

    def add(self, grads: Grads) -> None:
        banks, backend = self._banks, self.backend
        old, new = banks.rows(len(self._norms), len(self.params))
        for p, (grad, average) in enumerate(zip(grads, old, strict=True)):
            if new[p] is None and (grad is not None or average is not None):
                new[p] = torch.empty_like(self.params[p], dtype=accumulator_dtype(self.params[p].dtype))
                banks.forget_table(new)
        out = banks.table(new, backend)
        row = backend.Table(grads, 1, out.columns)
        self._norms.append(backend.ema_(out, banks.table(old, backend), row, self._decay, 1))

    def sq_norms(self) -> Tensor:
        return torch.cat(self._norms)

    def write(self, weights: Tensor, previous: Grads) -> None:
        tasks = len(self._norms)
        rows = [average for row in self._banks.spare for average in row]
        self._write(rows, tasks, self.backend.Table(rows, tasks), weights, previous, reuse=False)

    def commit(self, status: Tensor) -> None:
        banks = self._banks
        for old, new in zip(banks.current, banks.spare, strict=True):
            self.backend.rollback_(new, old, status)
        banks.current, banks.spare = banks.spare, banks.current


class RunningSum(TaskGradients):
    """Σ_k f(‖g_k‖) g_k, formed as the gradients come: one sum and one gradient at a time, whatever K is."""

    def __init__(
        self,
        params: Sequence[Tensor],
        backend: Backend,
        weight: Callable[[Tensor], Tensor],
        factor: Callable[[Tensor], Tensor],
    ) -> None:
        """`weight` is f, from a squared norm [1]; `factor` the common factor [1], from all of them [K]."""
        super().__init__(params, backend)
        self._weight, self._factor = weight, factor
        self._sum: Grads = [None] * len(params)
        self._norms: list[Tensor] = []

    def add(self, grads: Grads) -> None:
        norm = self.backend.sq_norms(self.backend.Table(grads, 1), 1)
        self._norms.append(norm)
        weight = self._weight(norm)
        started = [p for p, g in enumerate(grads) if g is not None and self._sum[p] is not None]
        starting = [p for p, g in enumerate(grads) if g is not None and self._sum[p] is None]
        for p in starting:
            g = grads[p]
            assert g is not None
            wide = accumulator_dtype(g.dtype)
            self._sum[p] = g if g.dtype is wide else torch.empty_like(g, dtype=wide)
        for columns, accumulate in ((started, True), (starting, False)):
            if columns:
                out = self.backend.Table([self._sum[p] for p in columns], 1)
                row = self.backend.Table([grads[p] for p in columns], 1, out.columns)
                self.backend.combine_(out, row, weight, accumulate)

    def sq_norms(self) -> Tensor:
        return torch.cat(self._norms)

    def write(self, weights: Tensor, previous: Grads) -> None:
        table = self.backend.Table(self._sum, 1)
        self._write(self._sum, 1, table, self._factor(self.sq_norms()), previous, reuse=True)
