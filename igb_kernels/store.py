"""Where the task gradients of a step live until they are combined: buffers and their lifetime, never methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from igb_kernels.backends import Backend, OptionalTensors, Table, captures_graph
from igb_kernels.ops import accumulator_dtype
from igb_kernels.status import Status

Grads = list[Tensor | None]


@dataclass(frozen=True)
class Units:
    """What rows and `.grad` are measured in, where that is not the gradient of a scaled loss: with a GradScaler all of
    them hold its factor, and rows that were accumulated over batches came before the loss scales."""

    rows: Tensor | None = None
    """Row k times this is the gradient of task k's scaled loss; float64 [K]."""
    grad: Tensor | None = None
    """`.grad` is this multiple of the update; float64 []."""

    def sq_norms(self, of_rows: Tensor) -> Tensor:
        """Squared norms of the gradients [K] from those of the rows."""
        return of_rows if self.rows is None else of_rows * self.rows.square()

    def gram(self, of_rows: Tensor) -> Tensor:
        """Their Gramian [K, K]."""
        return of_rows if self.rows is None else of_rows * self.rows * self.rows[:, None]

    def in_grad(self, weights: Tensor) -> Tensor:
        """Weights on what is measured as the update is, for the sum that goes to `.grad`."""
        return weights if self.grad is None else weights * self.grad

    def of_sum(self) -> Units:
        """For one row in place of all of them, which share their unit."""
        return self if self.rows is None else Units(self.rows[:1], self.grad)

    def on_rows(self, weights: Tensor) -> Tensor:
        """Weights on rows, for the sum that goes to `.grad`, from those on gradients [K]."""
        return self.in_grad(weights if self.rows is None else weights * self.rows)


class TaskGradients:
    """K rows of gradients, one added after each backward pass; then measured, then combined into `.grad`."""

    def __init__(self, params: Sequence[Tensor], backend: Backend, units: Units) -> None:
        self.params, self.backend, self.units = params, backend, units

    def add(self, grads: Grads) -> None:
        """Takes the next task's gradients; their buffers belong to the store from here on."""
        raise NotImplementedError

    def sq_norms(self) -> Tensor:
        """Squared norms of the gradients, [K] float64."""
        raise NotImplementedError

    def gram(self) -> Tensor:
        """Gramian of the gradients, [K, K] float64."""
        raise NotImplementedError

    def excess(self) -> Tensor:
        """Σ g_k² / √(accumulated squares of gradient k), [K] float64."""
        raise NotImplementedError

    def write(self, weights: Tensor, previous: Grads) -> None:
        """Sets p.grad = previous + Σ_k weights_k g_k, for the parameters that some task reaches."""
        raise NotImplementedError

    def commit(self, status: Tensor) -> None:
        """Keeps for the next step what outlives this one, unless the status says NON_FINITE."""

    def _write(
        self, rows: Grads, tasks: int, table: Table, weights: Tensor, previous: Grads, buffers: OptionalTensors
    ) -> None:
        """Adds the weighted sum of `rows` to `previous`, or writes it, where possible over `buffers`."""
        # A parameter that was frozen on the way keeps its moving average, but gets no gradient.
        reached = [c if p.requires_grad else None for p, c in zip(self.params, table.columns, strict=True)]
        out: Grads = []
        for p, old, column, buffer in zip(self.params, previous, reached, apart(buffers), strict=True):
            if old is not None or column is None:
                out.append(old)
            else:
                out.append(_room_for_grad(p, buffer))
        if all(old is None for old in previous) and all(column is not None for column in reached):
            self.backend.combine_(self.backend.Table(out, 1, table), table, weights, False)
        else:
            self._write_columns(rows, tasks, weights, previous, reached, out)
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
                target = [buffer for p in columns if (buffer := out[p]) is not None]
                chosen = [rows[k * params + p] for k in range(tasks) for p in columns]
                out_table = self.backend.Table(target, 1)
                table = self.backend.Table(chosen, tasks, out_table)
                self.backend.combine_(out_table, table, weights, accumulate)
                torch.autograd.graph.increment_version(target)


@dataclass(frozen=True)
class Accumulated:
    """What micro-batches leave for the step that balances their sums."""

    ids: Sequence[int]
    """The tasks that there were, ascending."""
    rows: Sequence[Grads]
    """Their gradients of unscaled losses."""
    losses: Tensor
    """[K]."""

    def rows_of(self, ids: Sequence[int], params: int) -> list[Grads]:
        """The tasks' gradients so far, also of parameters that came to be known since."""
        known: dict[int, Grads] = dict(zip(self.ids, self.rows, strict=True))
        return [[*(row := known.get(k, [])), *[None] * (params - len(row))] for k in ids]

    def followed_by(self, batch: Accumulated) -> Accumulated:
        """With the losses of a batch whose gradients were added to those of its tasks here."""
        if batch.ids == self.ids:
            return Accumulated(self.ids, batch.rows, self.losses + batch.losses)
        ids = sorted({*self.ids, *batch.ids})
        rows = dict(zip(ids, self.rows_of(ids, len(batch.rows[0])), strict=True))
        losses = dict(zip(self.ids, self.losses.unbind(), strict=True))
        for k, row, loss in zip(batch.ids, batch.rows, batch.losses.unbind(), strict=True):
            rows[k], losses[k] = row, losses[k] + loss if k in losses else loss
        return Accumulated(tuple(ids), list(rows.values()), torch.stack([losses[k] for k in ids]))


EXCESS_EPS = 1e-7
"""Added to accumulated squares under the root."""

CACHE_BYTES = 2 << 20


def rows_in_cache(params: Sequence[Tensor]) -> int:
    """How many rows of gradients stay in a core's cache; of more parameters than that, one."""
    return max(1, CACHE_BYTES // max(1, sum(p.numel() * p.element_size() for p in params)))


def apart(buffers: OptionalTensors) -> OptionalTensors:
    """The buffers, without those that share memory: autograd hands views of one gradient to the parameters of
    `a.flatten() + b.flatten()`, and neither may be written over while the other is to be read, or kept."""
    spans = sorted((b.data_ptr(), b.numel() * b.element_size(), i) for i, b in enumerate(buffers) if b is not None)
    shared, end, last = set(), 0, -1
    for start, size, i in spans:
        if start < end and size:
            shared |= {last, i}
        if start + size > end:
            end, last = start + size, i
    return [None if i in shared else b for i, b in enumerate(buffers)] if shared else buffers


def _room_for_grad(p: Tensor, buffer: Tensor | None) -> Tensor:
    """A tensor for the parameter's gradient: the buffer, if there is one of its dtype."""
    dtype = getattr(p, "grad_dtype", None) or p.dtype  # it may be wider than the parameter's
    if p.is_complex() and buffer is not None and not buffer.is_complex():
        buffer = torch.view_as_complex(buffer)  # tables have complex columns as real ones
    return buffer if buffer is not None and buffer.dtype is dtype else torch.empty_like(p, dtype=dtype)


def _wide(grad: Tensor) -> torch.dtype:
    return accumulator_dtype(grad.dtype)


def _rounded(grads: Grads, dtype: torch.dtype) -> Grads:
    """The float32 ones in this dtype, the others as they are."""
    wide = [g for g in grads if g is not None and g.dtype is torch.float32]
    narrow = [torch.empty_like(g, dtype=dtype) for g in wide]
    if wide:
        torch._foreach_copy_(narrow, wide)
    rounded = iter(narrow)
    return [next(rounded) if g is not None and g.dtype is torch.float32 else g for g in grads]


class KeptGradients(TaskGradients):
    """All K rows, in the buffers that autograd made. The sum is written over the first of them: no further memory.

    With a `dtype`, those in float32 are rounded to it as they come, and the sum is written to new memory.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        backend: Backend,
        units: Units,
        outgoing: list[Grads] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`outgoing` are rows of the last step, let go one by one as the passes need their memory; after the step,
        this step's. Freed all at once, the C library returns it to the system, and every page faults again."""
        super().__init__(params, backend, units)
        self._dtype = dtype
        self.rows: Grads = []
        """All of them, one after the other."""
        self._tasks = 0
        self._table: Table | None = None
        self._outgoing = outgoing

    def add(self, grads: Grads) -> None:
        self.rows += grads if self._dtype is None else _rounded(grads, self._dtype)
        self._tasks += 1
        if self._outgoing:
            self._outgoing.pop()

    def _as_table(self) -> Table:
        if self._table is None:
            self._table = self.backend.Table(self.rows, self._tasks)
        return self._table

    def sq_norms(self) -> Tensor:
        return self.units.sq_norms(self.backend.sq_norms(self._as_table(), self._tasks))

    def gram(self) -> Tensor:
        return self.units.gram(self.backend.gram(self._as_table(), self._tasks))

    def _multiply_rows(self, factors: Tensor) -> None:
        """Row k by factors_k, in place: where not sums of rows are asked for, but what their elements say."""
        params = len(self.params)
        for k, factor in enumerate(factors.unbind()):
            present = [row for row in self.rows[k * params : (k + 1) * params] if row is not None]
            if present:
                torch._foreach_mul_(present, factor)

    def write(self, weights: Tensor, previous: Grads) -> None:
        table = self._as_table()
        self._write(self.rows, self._tasks, table, self.units.on_rows(weights), previous, buffers=table.columns)

    def write_of_one_sign(self, counter: Tensor, leak: Tensor | None, previous: Grads) -> Tensor:
        """As `write`, but of each element only the rows of one drawn sign (`ops.sign_drop_`); returns its squared
        norm, [1] float64."""
        if self.units.rows is not None:
            self._multiply_rows(self.units.on_rows(torch.ones_like(self.units.rows)))
        table = self._as_table()
        columns = zip(self.params, table.columns, apart(table.columns), strict=True)
        out = [None if column is None else _room_for_grad(p, buffer) for p, column, buffer in columns]
        sq_norm = self.backend.sign_drop_(self.backend.Table(out, 1, table), table, counter, leak)
        for p, old, grad in zip(self.params, previous, out, strict=True):
            if grad is None or not p.requires_grad:
                p.grad = old
            else:
                p.grad = grad if old is None else old.add_(grad)
        return sq_norm

    def commit(self, status: Tensor) -> None:
        if self._outgoing is not None:
            params = len(self.params)
            # Without the first: it is in `.grad` now.
            self._outgoing[:] = [self.rows[k * params : (k + 1) * params] for k in range(1, self._tasks)]


class Row:
    """The moving averages of one task, None where no gradient has come yet; a key of tables, the buffers stay."""

    def __init__(self, averages: Grads) -> None:
        self.averages = averages


MOST_TABLES = 64
"""Kept from step to step; of more, as where ever other tasks are missing, none."""


class MovingAverages:
    """What outlives the step: each task's current averages, and a second set of buffers for the next ones.

    A step reads `current` and writes `spare`; of the step's tasks, the two change places when it is done. So a step
    that raises leaves the averages as they were, and one that turns out non-finite can put them back without a host
    sync. The replays of a CUDA graph cannot change places: from the first capture on, what is in `spare` is copied
    instead.
    """

    def __init__(self, rows: Sequence[Grads] = ()) -> None:
        self._current = [Row(list(row)) for row in rows]
        self._spare = [Row([None] * len(row)) for row in rows]
        self._tables: dict[tuple[Row, ...], Table] = {}
        self._captured = False

    def __reduce__(self) -> tuple[type[MovingAverages], tuple[list[Grads]]]:
        """For copies and pickles: tables hold addresses, and are made anew."""
        return MovingAverages, (self.rows(),)

    def rows(self) -> list[Grads]:
        """The current averages."""
        return [list(row.averages) for row in self._current]

    def admit(self, task: int, grads: Grads, params: Sequence[Tensor], captured: bool) -> None:
        """Makes room in `spare` for a task's gradients; raises where they do not fit what is there."""
        while task >= len(self._current):
            self._current.append(Row([None] * len(params)))
            self._spare.append(Row([None] * len(params)))
        current, spare = self._current[task].averages, self._spare[task].averages
        for p, (average, grad) in enumerate(zip(spare, grads, strict=True)):
            if average is not None:
                if grad is not None and average.dtype is not grad.dtype and average.dtype is not _wide(grad):
                    raise ValueError(
                        f"shared[{p}] has gradients in {grad.dtype}, its moving averages are in {average.dtype}: "
                        "the parameter's dtype must not change while it is balanced"
                    )
            elif grad is not None or current[p] is not None:
                if current[p] is None and captured:
                    raise RuntimeError(
                        f"shared[{p}] gets its first gradient of task {task} in a captured step: take steps before "
                        "the capture that reach every parameter"
                    )
                spare[p] = torch.empty_like(params[p], dtype=accumulator_dtype(params[p].dtype))
                self._tables.clear()

    def spare_of(self, tasks: Sequence[int]) -> Grads:
        """What the step writes for the tasks, one row after the other."""
        return [average for k in tasks for average in self._spare[k].averages]

    def tables(self, backend: Backend, tasks: Sequence[int], captured: bool) -> tuple[Table, Table]:
        """Those of `spare` and `current`, of the tasks."""
        current = self._table(backend, tuple([self._current[k] for k in tasks]), captured)
        return self.spare_table(backend, tasks, captured), current

    def spare_table(self, backend: Backend, tasks: Sequence[int], captured: bool) -> Table:
        """That of `spare`, of the tasks."""
        return self._table(backend, tuple([self._spare[k] for k in tasks]), captured)

    def _table(self, backend: Backend, rows: tuple[Row, ...], captured: bool) -> Table:
        """In a captured step one of its own, which no other uses or drops."""
        table = None if captured else self._tables.get(rows)
        if table is None:
            table = backend.Table([average for row in rows for average in row.averages], len(rows))
            if not captured:
                if len(self._tables) == MOST_TABLES:
                    self._tables.clear()
                self._tables[rows] = table
        return table

    def commit(self, tasks: Sequence[int], status: Tensor, backend: Backend, captured: bool) -> None:
        self._captured = self._captured or captured
        if self._captured:
            self._start_where_spare(tasks)
        spare, current = self.tables(backend, tasks, captured)
        if not self._captured:
            backend.rollback_(spare, current, status)
            for k in tasks:
                self._current[k], self._spare[k] = self._spare[k], self._current[k]
            return
        usable = (status & int(Status.NON_FINITE)) ^ int(Status.NON_FINITE)
        backend.rollback_(current, spare, usable)  # of a usable step, what it wrote

    def _start_where_spare(self, tasks: Sequence[int]) -> None:
        """Starts with zeros the averages that only `spare` has."""
        for k in tasks:
            current, spare = self._current[k].averages, self._spare[k].averages
            for p, average in enumerate(spare):
                if average is not None and current[p] is None:
                    current[p] = torch.zeros_like(average)
                    self._tables.clear()


RowScales = Callable[[Tensor, Tensor], Tensor]
"""Factors on gradients, float64 [K], from their squared norms [K] and their losses [K]."""


class AveragedGradients(TaskGradients):
    """Moving averages in the rows' place, updated and measured in one pass as soon as there are gradients enough to be
    worth a call: while they are in the cache, and before the next ones need memory."""

    def __init__(
        self,
        params: Sequence[Tensor],
        backend: Backend,
        averages: MovingAverages,
        ids: Sequence[int],
        decay: Tensor,
        row_scales: RowScales | None,
        losses: Tensor,
        units: Units,
    ) -> None:
        """`ids` are the tasks whose gradients come; `row_scales` gives the factors on those that enter the averages."""
        super().__init__(params, backend, units)
        self._averages, self._ids, self._decay = averages, ids, decay
        self._row_scales, self._losses = row_scales, losses
        self._norms: list[Tensor] = []
        self._tasks = self._averaged = 0
        self._waiting: Grads = []
        self._spent: Grads = [None] * len(params)  # what is in an average already: the sum may be written over it
        self._most_waiting = rows_in_cache(params)
        self._captured = captures_graph(params[0].device)

    def add(self, grads: Grads) -> None:
        self._averages.admit(self._ids[self._tasks], grads, self.params, self._captured)
        self._tasks += 1
        self._waiting += grads
        if self._tasks - self._averaged >= self._most_waiting:
            self._average()

    def _average(self) -> None:
        first, last = self._averaged, self._tasks
        out, old = self._averages.tables(self.backend, self._ids[first:last], self._captured)
        rows = self.backend.Table(self._waiting, last - first, out)
        scales = factors = None if self.units.rows is None else self.units.rows[first:last]
        if self._row_scales is not None:
            sq_norms = self.backend.sq_norms(rows, last - first)
            if factors is not None:
                sq_norms = sq_norms * factors.square()
            scales = self._row_scales(sq_norms, self._losses[first:last])
            scales = scales if factors is None else scales * factors
        self._norms.append(self.backend.ema_(out, old, rows, self._decay, last - first, scales))
        self._averaged, self._waiting = last, []

    def _average_the_rest(self) -> None:
        if self._averaged < self._tasks:
            self._spent = self._waiting[-len(self.params) :]
            self._average()

    def _as_table(self) -> Table:
        return self._averages.spare_table(self.backend, self._ids, self._captured)

    def sq_norms(self) -> Tensor:
        self._average_the_rest()
        return self._norms[0] if len(self._norms) == 1 else torch.cat(self._norms)

    def gram(self) -> Tensor:
        self._average_the_rest()
        return self.backend.gram(self._as_table(), self._tasks)

    def write(self, weights: Tensor, previous: Grads) -> None:
        rows, table = self._averages.spare_of(self._ids), self._as_table()
        self._write(rows, self._tasks, table, self.units.in_grad(weights), previous, buffers=self._spent)

    def commit(self, status: Tensor) -> None:
        self._averages.commit(self._ids, status, self.backend, self._captured)


class SquaredGradients(KeptGradients):
    """All K rows, and beside them the sums of their squared elements over the steps."""

    def __init__(
        self,
        params: Sequence[Tensor],
        backend: Backend,
        squares: MovingAverages,
        ids: Sequence[int],
        units: Units,
        outgoing: list[Grads] | None,
        dtype: torch.dtype | None,
    ) -> None:
        """`ids` are the tasks whose gradients come."""
        super().__init__(params, backend, units, outgoing, dtype)
        self._squares, self._ids, self._captured = squares, ids, captures_graph(params[0].device)

    def add(self, grads: Grads) -> None:
        self._squares.admit(self._ids[self._tasks], grads, self.params, self._captured)
        super().add(grads)

    def excess(self) -> Tensor:
        if self.units.rows is not None:
            self._multiply_rows(self.units.rows)
            self.units = Units(grad=self.units.grad)
        out, old = self._squares.tables(self.backend, self._ids, self._captured)
        rows = self.backend.Table(self.rows, self._tasks, out)
        return self.backend.accumulate_squares_(out, old, rows, EXCESS_EPS, self._tasks)

    def commit(self, status: Tensor) -> None:
        super().commit(status)
        self._squares.commit(self._ids, status, self.backend, self._captured)


class RunningSum(TaskGradients):
    """Σ_k f(‖g_k‖) g_k, formed as the gradients come: one sum and one gradient at a time, whatever K is."""

    def __init__(
        self,
        params: Sequence[Tensor],
        backend: Backend,
        weight: Callable[[Tensor], Tensor],
        factor: Callable[[Tensor], Tensor],
        units: Units,
    ) -> None:
        """`weight` is f, from a squared norm [1]; `factor` the common factor [1], from all of them [K]."""
        super().__init__(params, backend, units)
        self._weight, self._factor = weight, factor
        self._sum: Grads = [None] * len(params)
        self._norms: list[Tensor] = []

    def add(self, grads: Grads) -> None:
        norm, k = self.backend.sq_norms(self.backend.Table(grads, 1), 1), len(self._norms)
        factor = None if self.units.rows is None else self.units.rows[k : k + 1]
        if factor is not None:
            norm = norm * factor.square()
        self._norms.append(norm)
        weight = self._weight(norm) if factor is None else self._weight(norm) * factor
        started = [p for p, g in enumerate(grads) if g is not None and self._sum[p] is not None]
        starting = [p for p, g in enumerate(grads) if g is not None and self._sum[p] is None]
        own = apart(grads) if starting else grads
        for p in starting:
            g = grads[p]
            assert g is not None
            self._sum[p] = g if g is own[p] and g.dtype is _wide(g) else torch.empty_like(g, dtype=_wide(g))
        for columns, accumulate in ((started, True), (starting, False)):
            if columns:
                out = self.backend.Table([self._sum[p] for p in columns], 1)
                row = self.backend.Table([grads[p] for p in columns], 1, out)
                self.backend.combine_(out, row, weight, accumulate)

    def sq_norms(self) -> Tensor:
        return torch.cat(self._norms)

    def write(self, weights: Tensor, previous: Grads) -> None:
        table, factor = self.backend.Table(self._sum, 1), self.units.in_grad(self._factor(self.sq_norms()))
        self._write(self._sum, 1, table, factor, previous, buffers=self._sum)
