"""Where the task gradients of a step live until they are combined: buffers and their lifetime, never methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from igb_kernels.backends import Backend, OptionalTensors, Table, captures_graph
from igb_kernels.backends.several import SeveralDevices
from igb_kernels.backends.sharded import Sharded
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

    def part(self, rows: slice) -> Units:
        """Of some of the rows."""
        return self if self.rows is None else Units(self.rows[rows], self.grad)

    def to_rows(self, factors: Tensor) -> Tensor:
        """Factors on rows from those on gradients [K]."""
        return factors if self.rows is None else factors * self.rows

    def on_rows(self, weights: Tensor) -> Tensor:
        """Weights on rows, for the sum that goes to `.grad`, from those on gradients [K]."""
        return self.in_grad(self.to_rows(weights))


BUCKET_BYTES = {"cpu": 2 << 20, "cuda": 25 << 20}
"""The least that is worth a call while a backward pass runs: on a GPU beside launches, elsewhere in a core's cache."""

MOST_BUCKETS = 32

HERE = nullcontext()
"""The current stream, or no stream at all."""


def buckets_of(params: Sequence[Tensor]) -> list[slice]:
    """Neighbouring parameters, from the last to the first, as a backward pass tends to reach them. What is summed over
    all of them is summed over each bucket and then, in this order, over the buckets, whenever those were complete."""
    sizes = [p.nbytes for p in params]
    total = sum(sizes)
    enough = max(BUCKET_BYTES["cuda" if params and params[0].is_cuda else "cpu"], total // MOST_BUCKETS)
    if 0 < total < enough:
        return [slice(0, len(sizes))]
    buckets: list[slice] = []
    stop, size = len(sizes), 0
    for p in reversed(range(len(sizes))):
        size += sizes[p]
        if size >= enough or p == 0:
            buckets.append(slice(p, stop))
            stop, size = p, 0
    return buckets


class TaskGradients:
    """K rows of gradients, one from each backward pass; then measured, then combined into `.grad`.

    Each row comes in buckets of parameters, in any order, so that it can be worked on while its pass still runs; on a
    GPU also on another stream than the one on which the store was made. A measure of the rows is the sum of its parts:
    it can be asked for each bucket as soon as all rows have it.
    """

    def __init__(self, params: Sequence[Tensor], backend: Backend, units: Units) -> None:
        self.params, self.backend, self.units = params, backend, units
        self.buckets = buckets_of(params)
        self._tasks = 0
        self._parts: dict[int, Tensor] = {}
        """What was measured of each bucket, by its first parameter."""
        self._total = backend.total if isinstance(backend, Sharded) else _itself
        # Of several devices, each has its own stream, and all work goes to those on which backward passes end.
        on_gpu = len(params) > 0 and params[0].is_cuda and not isinstance(backend, SeveralDevices)
        self._home = torch.cuda.current_stream(params[0].device) if on_gpu else None

    def add(self, grads: Grads) -> None:
        """Takes a whole row."""
        self.begin()
        for bucket in self.buckets:
            self.take(bucket, grads[bucket])
        self.end()

    def begin(self) -> None:
        """Comes before the row's backward pass."""
        self._tasks += 1

    def take(self, bucket: slice, grads: Grads) -> bool:
        """Takes the row's gradients of a bucket, or takes them again; their buffers belong to the store from here on.
        Returns whether they are what measures see: if not, that waits for the end of the row."""
        raise NotImplementedError

    def end(self) -> None:
        """Comes after the backward pass, when every bucket has been taken."""

    def sq_norms(self, bucket: slice | None = None) -> Tensor:
        """Squared norms of the gradients, or of those of one bucket, [K] float64."""
        raise NotImplementedError

    def gram(self, bucket: slice | None = None) -> Tensor:
        """Gramian of the gradients, or of those of one bucket, [K, K] float64."""
        raise NotImplementedError

    def excess(self, bucket: slice | None = None) -> Tensor:
        """Σ g_k² / √(accumulated squares of gradient k), over all or of one bucket, [K] float64."""
        raise NotImplementedError

    def write(self, weights: Tensor, previous: Grads) -> None:
        """Sets p.grad = previous + Σ_k weights_k g_k, for the parameters that some task reaches."""
        raise NotImplementedError

    def commit(self, status: Tensor) -> None:
        """Keeps for the next step what outlives this one, unless the status says NON_FINITE."""

    def _measured(self, bucket: slice | None, measure: Callable[[slice], Tensor]) -> Tensor:
        """The measure of a bucket, taken once; of None, their sum."""
        if bucket is None:
            return self._total(_sum([self._measured(bucket, measure) for bucket in self.buckets]))
        if bucket.start not in self._parts:
            self._parts[bucket.start] = self._to_home(measure(bucket))
        return self._parts[bucket.start]

    @property
    def _away(self) -> bool:
        """Whether work now goes to another stream than where the store was made."""
        return self._home is not None and torch.cuda.current_stream(self._home.device) != self._home

    def _at_home(self) -> AbstractContextManager[object]:
        """For memory that is to outlive this step."""
        return torch.cuda.stream(self._home) if self._away else HERE

    def _to_home(self, result: Tensor) -> Tensor:
        """A result, whose memory the allocator must not give out before the store's stream is done with it."""
        if self._home is not None and result.device != self._home.device:  # of rows without tensors
            return result.to(self._home.device)
        if self._away:
            result.record_stream(self._home)  # type: ignore[arg-type]  # the stub knows no Stream of torch.cuda
        return result

    def _apart(self, of_bucket: Callable[[slice], OptionalTensors]) -> OptionalTensors:
        """The buffers of all buckets by parameter, without those that share memory."""
        buffers: Grads = [None] * len(self.params)
        for bucket in self.buckets:
            buffers[bucket] = of_bucket(bucket)
        return apart(buffers)

    def _write(
        self,
        bucket: slice,
        rows: Grads,
        tasks: int,
        table: Table,
        weights: Tensor,
        previous: Grads,
        buffers: OptionalTensors,
    ) -> None:
        """Adds the weighted sum of a bucket's `rows` to `previous`, or writes it, where possible over `buffers`, which
        share no memory."""
        params = self.params[bucket]
        # A parameter that was frozen on the way keeps its moving average, but gets no gradient.
        reached = [c is not None and p.requires_grad for p, c in zip(params, table.columns, strict=True)]
        out = [
            _room_for_grad(p, buffer) if there and old is None else old
            for p, old, there, buffer in zip(params, previous, reached, buffers, strict=True)
        ]
        if all(reached) and all([old is None for old in previous]):
            self.backend.combine_(self.backend.Table(out, 1, table), table, weights, False)
        else:
            self._write_columns(rows, tasks, weights, previous, reached, out)
        for p, grad in zip(params, out, strict=True):
            p.grad = grad

    def _write_columns(
        self, rows: Grads, tasks: int, weights: Tensor, previous: Grads, reached: Sequence[bool], out: Grads
    ) -> None:
        """As `_write`, where some parameters have a gradient already or are not reached by any task."""
        params = len(out)
        for accumulate in (False, True):
            columns = [p for p in range(params) if reached[p] and (previous[p] is not None) == accumulate]
            if columns:
                target = [buffer for p in columns if (buffer := out[p]) is not None]
                chosen = [rows[k * params + p] for k in range(tasks) for p in columns]
                out_table = self.backend.Table(target, 1)
                table = self.backend.Table(chosen, tasks, out_table)
                self.backend.combine_(out_table, table, weights, accumulate)
                torch.autograd.graph.increment_version(target)


def _itself(measured: Tensor) -> Tensor:
    return measured


def _sum(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(list(parts)).sum(dim=0)


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
        if not batch.ids or not self.ids:  # as where only other processes have losses
            return batch if batch.ids else self
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
    return max(1, CACHE_BYTES // max(1, sum([p.nbytes for p in params])))


def apart(buffers: OptionalTensors) -> OptionalTensors:
    """The buffers, without those that share memory: autograd hands views of one gradient to the parameters of
    `a.flatten() + b.flatten()`, and neither may be written over while the other is to be read, or kept."""
    spans = sorted([(b.data_ptr(), b.nbytes, i) for i, b in enumerate(buffers) if b is not None])
    shared, end, last = set(), 0, -1
    for start, size, i in spans:
        if start < end and size:
            shared |= {last, i}
        if start + size > end:
            end, last = start + size, i
    return [None if i in shared else b for i, b in enumerate(buffers)] if shared else buffers


def _room_for_grad(p: Tensor, buffer: Tensor | None) -> Tensor:
    """A tensor for the parameter's gradient: the buffer, if there is one of its dtype."""
    dtype = (getattr(p, "grad_dtype", None) if p.is_leaf else None) or p.dtype  # it may be wider than the parameter's
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
        self._tables: dict[int, Table] = {}
        self._outgoing = outgoing

    def begin(self) -> None:
        super().begin()
        self.rows += [None] * len(self.params)

    def take(self, bucket: slice, grads: Grads) -> bool:
        row = (self._tasks - 1) * len(self.params)
        if self._dtype is not None:
            grads = [None if grad is None else self._to_home(grad) for grad in _rounded(grads, self._dtype)]
        self.rows[row + bucket.start : row + bucket.stop] = grads
        for known in (self._parts, self._tables):
            known.pop(bucket.start, None)
        return True

    def end(self) -> None:
        if self._outgoing:
            self._outgoing.pop()

    def _rows_of(self, bucket: slice) -> Grads:
        params = len(self.params)
        starts = range(0, self._tasks * params, params)
        return [grad for start in starts for grad in self.rows[start + bucket.start : start + bucket.stop]]

    def _table(self, bucket: slice) -> Table:
        if self._away:
            own: Table = self.backend.Table(self._rows_of(bucket), self._tasks)
            return own
        if bucket.start not in self._tables:
            self._tables[bucket.start] = self.backend.Table(self._rows_of(bucket), self._tasks)
        return self._tables[bucket.start]

    def sq_norms(self, bucket: slice | None = None) -> Tensor:
        return self._measured(bucket, self._sq_norms_of)

    def gram(self, bucket: slice | None = None) -> Tensor:
        return self._measured(bucket, self._gram_of)

    def _sq_norms_of(self, bucket: slice) -> Tensor:
        return self.units.sq_norms(self.backend.sq_norms(self._table(bucket), self._tasks))

    def _gram_of(self, bucket: slice) -> Tensor:
        return self.units.gram(self.backend.gram(self._table(bucket), self._tasks))

    def _multiply_rows(self, factors: Tensor) -> None:
        """Row k by factors_k, in place: where not sums of rows are asked for, but what their elements say."""
        params, devices = len(self.params), {p.device for p in self.params}
        for k, factor in enumerate(factors.unbind()):
            present = [row for row in self.rows[k * params : (k + 1) * params] if row is not None]
            for device in devices:
                if own := [row for row in present if len(devices) == 1 or row.device == device]:
                    torch._foreach_mul_(own, factor.to(device))

    def write(self, weights: Tensor, previous: Grads) -> None:
        weights, buffers = self.units.on_rows(weights), self._apart(lambda bucket: self._table(bucket).columns)
        for bucket in self.buckets:
            rows, table = self._rows_of(bucket), self._table(bucket)
            self._write(bucket, rows, self._tasks, table, weights, previous[bucket], buffers[bucket])

    def write_of_one_sign(self, counter: Tensor, leak: Tensor | None, previous: Grads) -> Tensor:
        """As `write`, but of each element only the rows of one drawn sign (`ops.sign_drop_`); returns its squared
        norm, [1] float64."""
        if self.units.rows is not None:
            self._multiply_rows(self.units.on_rows(torch.ones_like(self.units.rows)))
        table = self.backend.Table(self.rows, self._tasks)
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


MOST_TABLES = 4096
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
        self._tables: dict[tuple[tuple[Row, ...], int, int], Table] = {}
        self._captured = False

    def __reduce__(self) -> tuple[type[MovingAverages], tuple[list[Grads]]]:
        """For copies and pickles: tables hold addresses, and are made anew."""
        return MovingAverages, (self.rows(),)

    def rows(self) -> list[Grads]:
        """The current averages."""
        return [list(row.averages) for row in self._current]

    def admit(self, task: int, columns: slice, grads: Grads, params: Sequence[Tensor], captured: bool) -> None:
        """Makes room in `spare` for a task's gradients; raises where they do not fit what is there."""
        while task >= len(self._current):
            self._current.append(Row([None] * len(params)))
            self._spare.append(Row([None] * len(params)))
        current, spare = self._current[task].averages, self._spare[task].averages
        for p, (average, grad) in enumerate(zip(spare[columns], grads, strict=True), columns.start):
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

    def spare_of(self, tasks: Sequence[int], columns: slice) -> Grads:
        """What the step writes for the tasks, one row after the other."""
        return [average for k in tasks for average in self._spare[k].averages[columns]]

    def tables(self, backend: Backend, tasks: Sequence[int], columns: slice, own: bool) -> tuple[Table, Table]:
        """Those of `spare` and `current`, of the tasks."""
        current = self._table(backend, tuple([self._current[k] for k in tasks]), columns, own)
        return self.spare_table(backend, tasks, columns, own), current

    def spare_table(self, backend: Backend, tasks: Sequence[int], columns: slice, own: bool) -> Table:
        """That of `spare`, of the tasks."""
        return self._table(backend, tuple([self._spare[k] for k in tasks]), columns, own)

    def _table(self, backend: Backend, rows: tuple[Row, ...], columns: slice, own: bool) -> Table:
        """In a captured step, or for another stream than the balancer's, its `own`, which no other uses or drops."""
        key = (rows, columns.start, columns.stop)
        table = None if own else self._tables.get(key)
        if table is None:
            table = backend.Table([average for row in rows for average in row.averages[columns]], len(rows))
            assert table is not None
            if not own:
                if len(self._tables) == MOST_TABLES:
                    self._tables.clear()
                self._tables[key] = table
        return table

    def commit(self, tasks: Sequence[int], status: Tensor, backend: Backend, captured: bool) -> None:
        self._captured = self._captured or captured
        if self._captured:
            self._start_where_spare(tasks)
        everything = slice(0, max(len(self._spare[k].averages) for k in tasks))
        spare, current = self.tables(backend, tasks, everything, captured)
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
        self._norms: dict[int, list[Tensor]] = {bucket.start: [] for bucket in self.buckets}
        """By bucket, those of the rows that have been averaged, in as many pieces as `_batches`."""
        self._averaged = self._batches = 0
        self._at_once = rows_in_cache(params) if len(self.buckets) == 1 else 1
        self._waiting: dict[int, Grads] = {}
        """By bucket, the rows that have come since the last were averaged."""
        self._norms_before: dict[int, Tensor] = {}
        """Of what is waiting, for `row_scales`."""
        self._spent: dict[int, Grads] = {}
        """What is in an average already: the sum may be written over it."""
        self._captured = captures_graph(params[0].device)

    def begin(self) -> None:
        super().begin()
        self._spent = {}

    def take(self, bucket: slice, grads: Grads) -> bool:
        with self._at_home():
            self._averages.admit(self._ids[self._tasks - 1], bucket, grads, self.params, self._captured)
        waiting = self._waiting.setdefault(bucket.start, [])
        waiting[(self._tasks - 1 - self._averaged) * len(grads) :] = grads
        self._parts.pop(bucket.start, None)
        if self._tasks - self._averaged < self._at_once:
            return False
        if self._row_scales is not None:
            self._norms_before[bucket.start] = self._norms_of_waiting(bucket)
            return False
        self._average(bucket)
        return True

    def end(self) -> None:
        if self._tasks - self._averaged >= self._at_once:
            self._average_the_rest()

    def _norms_of_waiting(self, bucket: slice) -> Tensor:
        count = self._tasks - self._averaged
        return self._to_home(self.backend.sq_norms(self.backend.Table(self._waiting[bucket.start], count), count))

    def _average(self, bucket: slice, scales: Tensor | None = None) -> None:
        first, last = self._averaged, self._tasks
        if scales is None and self.units.rows is not None:
            scales = self.units.rows[first:last]
        own = self._captured or self._away
        out, old = self._averages.tables(self.backend, self._ids[first:last], bucket, own)
        rows = self.backend.Table(self._waiting[bucket.start], last - first, out)
        norms = self.backend.ema_(out, old, rows, self._decay, last - first, scales)
        self._norms[bucket.start][self._batches :] = [self._to_home(norms)]

    def _average_the_rest(self) -> None:
        if self._averaged == self._tasks:
            return
        scales = None
        if self._row_scales is not None:
            for bucket in self.buckets:
                if bucket.start not in self._norms_before:
                    self._norms_before[bucket.start] = self._norms_of_waiting(bucket)
            rows = slice(self._averaged, self._tasks)
            units = self.units.part(rows)
            before = self._total(_sum([self._norms_before[bucket.start] for bucket in self.buckets]))
            before = units.sq_norms(before)
            scales = units.to_rows(self._row_scales(before, self._losses[rows]))
        for bucket in self.buckets:
            if len(self._norms[bucket.start]) == self._batches:
                self._average(bucket, scales)
        self._spent = {b.start: self._waiting[b.start][b.start - b.stop :] for b in self.buckets}
        self._waiting, self._norms_before = {}, {}
        self._averaged, self._batches = self._tasks, self._batches + 1

    def _table(self, bucket: slice) -> Table:
        return self._averages.spare_table(self.backend, self._ids, bucket, self._captured or self._away)

    def sq_norms(self, bucket: slice | None = None) -> Tensor:
        if bucket is None:
            self._average_the_rest()
        return self._measured(bucket, self._norms_of)

    def _norms_of(self, bucket: slice) -> Tensor:
        pieces = self._norms[bucket.start]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def gram(self, bucket: slice | None = None) -> Tensor:
        if bucket is None:
            self._average_the_rest()
        return self._measured(bucket, lambda bucket: self.backend.gram(self._table(bucket), self._tasks))

    def write(self, weights: Tensor, previous: Grads) -> None:
        weights, buffers = self.units.in_grad(weights), self._apart(lambda bucket: self._spent[bucket.start])
        for bucket in self.buckets:
            rows, table = self._averages.spare_of(self._ids, bucket), self._table(bucket)
            self._write(bucket, rows, self._tasks, table, weights, previous[bucket], buffers[bucket])

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

    def take(self, bucket: slice, grads: Grads) -> bool:
        with self._at_home():
            self._squares.admit(self._ids[self._tasks - 1], bucket, grads, self.params, self._captured)
        super().take(bucket, grads)
        return self.units.rows is None  # else all rows must be multiplied first

    def excess(self, bucket: slice | None = None) -> Tensor:
        if self.units.rows is not None:
            self._multiply_rows(self.units.rows)
            self.units = Units(grad=self.units.grad)
        return self._measured(bucket, self._excess_of)

    def _excess_of(self, bucket: slice) -> Tensor:
        out, old = self._squares.tables(self.backend, self._ids, bucket, self._captured or self._away)
        rows = self.backend.Table(self._rows_of(bucket), self._tasks, out)
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
        self._row: dict[int, Grads] = {}
        self._norms: list[Tensor] = []

    def take(self, bucket: slice, grads: Grads) -> bool:
        self._row[bucket.start] = grads
        self._parts[bucket.start] = self._to_home(self.backend.sq_norms(self.backend.Table(grads, 1), 1))
        return False

    def end(self) -> None:
        k = len(self._norms)
        units = self.units.part(slice(k, k + 1))
        norm = units.sq_norms(self._total(_sum([self._parts[bucket.start] for bucket in self.buckets])))
        self._norms.append(norm)
        weight = units.to_rows(self._weight(norm))
        row: Grads = [None] * len(self.params)
        for bucket in self.buckets:
            row[bucket] = self._row.pop(bucket.start)
        own = apart(row)
        for bucket in self.buckets:
            self._add(bucket, row[bucket], own[bucket], weight)

    def _add(self, bucket: slice, grads: Grads, own: OptionalTensors, weight: Tensor) -> None:
        """Adds a bucket of the row; the sum may start in gradients that are `own`, and share no memory."""
        start = bucket.start
        started = [p for p, g in enumerate(grads, start) if g is not None and self._sum[p] is not None]
        starting = [p for p, g in enumerate(grads, start) if g is not None and self._sum[p] is None]
        for p in starting:
            g = grads[p - start]
            assert g is not None
            self._sum[p] = g if g is own[p - start] and g.dtype is _wide(g) else torch.empty_like(g, dtype=_wide(g))
        for columns, accumulate in ((started, True), (starting, False)):
            if columns:
                out = self.backend.Table([self._sum[p] for p in columns], 1)
                row = self.backend.Table([grads[p - start] for p in columns], 1, out)
                self.backend.combine_(out, row, weight, accumulate)

    def sq_norms(self, bucket: slice | None = None) -> Tensor:
        return torch.cat(self._norms)

    def write(self, weights: Tensor, previous: Grads) -> None:
        factor = self.units.in_grad(self._factor(self.sq_norms()))
        for bucket in self.buckets:
            rows = self._sum[bucket]
            self._write(bucket, rows, 1, self.backend.Table(rows, 1), factor, previous[bucket], buffers=rows)
