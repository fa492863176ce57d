"""Where the task gradients of a step live until they are combined: buffers and their lifetime, never methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from igb_kernels.ops import accumulator_dtype, registered

Grads = list[Tensor | None]


class TaskGradients:
    """K rows of gradients, one added after each backward pass; then measured, then combined into `.grad`."""

    def __init__(self, params: Sequence[Tensor], backend: str) -> None:
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

    def _write(self, rows: list[Grads], weights: Tensor, previous: Grads, *, reuse_rows: bool) -> None:
        """The sum is added to `previous`, else written over the first row where that may be reused."""
        groups: dict[bool, list[int]] = {True: [], False: []}
        for p, old in enumerate(previous):
            if any(row[p] is not None for row in rows):
                groups[old is not None].append(p)
            else:
                self.params[p].grad = old
        for accumulate, columns in groups.items():
            if not columns:
                continue
            out: list[Tensor] = []
            for p in columns:
                buffer = previous[p] if accumulate else self._reusable(rows, p) if reuse_rows else None
                out.append(torch.empty_like(self.params[p]) if buffer is None else buffer)
            flat = [row[p] for row in rows for p in columns]
            registered.combine_(out, flat, weights, accumulate, self.backend)
            for p, grad in zip(columns, out, strict=True):
                self.params[p].grad = grad

    def _reusable(self, rows: list[Grads], p: int) -> Tensor | None:
        dtype = self.params[p].dtype
        return next((g for row in rows if (g := row[p]) is not None and g.dtype is dtype), None)


class KeptGradients(TaskGradients):
    """All K rows, in the buffers that autograd made. The sum is written over the first of them: no further memory."""

    def __init__(self, params: Sequence[Tensor], backend: str) -> None:
        super().__init__(params, backend)
        self._rows: list[Grads] = []

    def add(self, grads: Grads) -> None:
        self._rows.append(grads)

    def _flat(self) -> Grads:
        return [g for row in self._rows for g in row]

    def sq_norms(self) -> Tensor:
        norms: Tensor = registered.sq_norms(self._flat(), len(self._rows), self.backend)
        return norms

    def gram(self) -> Tensor:
        gram: Tensor = registered.gram(self._flat(), len(self._rows), self.backend)
        return gram

    def write(self, weights: Tensor, previous: Grads) -> None:
        self._write(self._rows, weights, previous, reuse_rows=True)


@dataclass
class AverageBanks:
    """K rows of moving averages that outlive the step, and a second set of buffers for the next ones.

    A step reads `current` and writes `spare`; the two change places when it is done. So a step that raises leaves the
    averages as they were, and one that turns out non-finite can put them back without a host sync.
    """

    current: list[Grads] = field(default_factory=list)
    spare: list[Grads] = field(default_factory=list)

    def start(self, tasks: int, params: int) -> None:
        for rows in (self.current, self.spare):
            while len(rows) < tasks:
                rows.append([None] * params)


class AveragedGradients(TaskGradients):
    """Moving averages in the rows' place, updated and measured in one pass right after each backward pass, while the
    gradient is in the cache and before the next one needs memory."""

    def __init__(self, params: Sequence[Tensor], backend: str, banks: AverageBanks, decay: Tensor) -> None:
        super().__init__(params, backend)
        self._banks, self._decay = banks, decay
        self._norms: list[Tensor] = []

    def add(self, grads: Grads) -> None:
        task = len(self._norms)
        self._banks.start(task + 1, len(self.params))
        old, new = self._banks.current[task], self._banks.spare[task]
        columns = [p for p, g in enumerate(grads) if g is not None or old[p] is not None]
        for p in columns:
            if new[p] is None:
                new[p] = torch.empty_like(self.params[p], dtype=accumulator_dtype(self.params[p].dtype))
        self._norms.append(
            registered.ema_(
                [new[p] for p in columns], [old[p] for p in columns], [grads[p] for p in columns],
                self._decay, 1, self.backend,
            )
        )  # fmt: skip

    def sq_norms(self) -> Tensor:
        return torch.cat(self._norms)

    def write(self, weights: Tensor, previous: Grads) -> None:
        self._write(self._banks.spare[: len(self._norms)], weights, previous, reuse_rows=False)

    def commit(self, status: Tensor) -> None:
        banks = self._banks
        for old, new in zip(banks.current, banks.spare, strict=True):
            columns = [p for p, average in enumerate(new) if average is not None]
            registered.rollback_([new[p] for p in columns], [old[p] for p in columns], status, self.backend)
        banks.current, banks.spare = banks.spare, banks.current


class RunningSum(TaskGradients):
    """Σ_k f(‖g_k‖) g_k, formed as the gradients come: one sum and one gradient at a time, whatever K is."""

    def __init__(
        self,
        params: Sequence[Tensor],
        backend: str,
        weight: Callable[[Tensor], Tensor],
        factor: Callable[[Tensor], Tensor],
    ) -> None:
        """`weight` is f, from a squared norm [1]; `factor` the common factor [1], from all of them [K]."""
        super().__init__(params, backend)
        self._weight, self._factor = weight, factor
        self._sum: Grads = [None] * len(params)
        self._norms: list[Tensor] = []

    def add(self, grads: Grads) -> None:
        norm = registered.sq_norms(grads, 1, self.backend)
        self._norms.append(norm)
        weight = self._weight(norm)
        started = [p for p, g in enumerate(grads) if g is not None and self._sum[p] is not None]
        starting = [p for p, g in enumerate(grads) if g is not None and self._sum[p] is None]
        for p in starting:
            g = grads[p]
            wide = accumulator_dtype(g.dtype)
            self._sum[p] = g if g.dtype is wide else torch.empty_like(g, dtype=wide)
        for columns, accumulate in ((started, True), (starting, False)):
            if columns:
                registered.combine_(
                    [self._sum[p] for p in columns], [grads[p] for p in columns], weight, accumulate, self.backend
                )

    def sq_norms(self) -> Tensor:
        return torch.cat(self._norms)

    def write(self, weights: Tensor, previous: Grads) -> None:
        self._write([self._sum], self._factor(self.sq_norms()), previous, reuse_rows=True)
