"""Device tables over guarded CPU memory, and what the kernels must do with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from igb_kernels.backends._layout import Rows

Row = list[Tensor | None]
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
GUARD = 16
SIZES = ((9000, 0), (1, 1), (0, 0), (37, 3), (5001, 0), (700, 1))
"""Elements, and the first one's offset: ragged, misaligned, empty; the first is longer than a chunk."""


class Guarded:
    """Tensors with NaN before and behind them: what reads beyond shows in the result, what writes there is found."""

    def __init__(self) -> None:
        self._made: list[tuple[Tensor, int, int]] = []

    def tensor(self, values: Tensor, offset: int = 0) -> Tensor:
        """A copy of the 1-D values."""
        start, end = GUARD + offset, GUARD + offset + len(values)
        memory = torch.full((end + GUARD,), torch.nan, dtype=values.dtype)
        memory[start:end] = values
        self._made.append((memory, start, end))
        return memory[start:end]

    def unused(self, dtype: torch.dtype, size: int, offset: int = 0) -> Tensor:
        return self.tensor(torch.full((size,), torch.nan, dtype=dtype), offset)

    def row(self, dtype: torch.dtype, sizes: Sequence[tuple[int, int]] = SIZES) -> Row:
        return [self.tensor(torch.randn(size).to(dtype), offset) for size, offset in sizes]

    def is_intact(self) -> bool:
        return all(bool(m[:start].isnan().all() and m[end:].isnan().all()) for m, start, end in self._made)


class Kernels:
    """The native functions on rows of CPU tensors, with guarded results."""

    def __init__(self, native: Any, guarded: Guarded) -> None:
        self.native, self.guarded = native, guarded
        self._kept: list[Any] = []

    def table(self, rows: Sequence[Row], like: Sequence[Row] | None = None) -> Any:
        layout = Rows([t for row in like or rows for t in row], len(like or rows))
        if like is not None:
            layout = Rows([t for row in rows for t in row], len(rows), layout)
        addresses, dtypes = layout.addresses(), layout.dtypes()
        words = torch.full((self.native.word_count(len(rows), layout.params),), -1)
        self._kept += [layout, words]
        pointers = (a.buffer_info()[0] for a in (addresses, layout.numel, dtypes))
        return self.native.Table(*pointers, len(rows), layout.params, words.data_ptr(), 0)

    def _doubles(self, size: int) -> Tensor:
        return self.guarded.unused(torch.float64, size)

    def gram(self, rows: Sequence[Row]) -> Tensor:
        table, out = self.table(rows), self._doubles(len(rows) ** 2)
        scratch = self._doubles(self.native.gram_scratch(table))
        self.native.gram(table, out.data_ptr(), scratch.data_ptr(), 0)
        return out.reshape(len(rows), len(rows))

    def sq_norms(self, rows: Sequence[Row]) -> Tensor:
        table, out = self.table(rows), self._doubles(len(rows))
        scratch = self._doubles(self.native.norm_scratch(table))
        self.native.sq_norms(table, out.data_ptr(), scratch.data_ptr(), 0)
        return out

    def ema(
        self,
        out: Sequence[Row],
        state: Sequence[Row],
        grads: Sequence[Row],
        decay: float,
        scales: Tensor | None = None,
    ) -> Tensor:
        tables = [self.table(rows, like=out) for rows in (out, state, grads)]
        norms, scratch = self._doubles(len(grads)), self._doubles(self.native.norm_scratch(tables[2]))
        number = torch.tensor([decay], dtype=torch.float64)
        factors = 0 if scales is None else scales.data_ptr()
        self.native.ema(*tables, number.data_ptr(), factors, norms.data_ptr(), scratch.data_ptr(), 0)
        return norms

    def accumulate_squares(self, out: Sequence[Row], state: Sequence[Row], grads: Sequence[Row], eps: float) -> Tensor:
        tables = [self.table(rows, like=out) for rows in (out, state, grads)]
        excess, scratch = self._doubles(len(grads)), self._doubles(self.native.norm_scratch(tables[2]))
        self.native.accumulate_squares(*tables, eps, excess.data_ptr(), scratch.data_ptr(), 0)
        return excess

    def combine(self, out: Row, rows: Sequence[Row], weights: Tensor, accumulate: bool) -> None:
        self.native.combine(self.table([out]), self.table(rows), weights.data_ptr(), accumulate, 0)

    def sign_drop(self, out: Row, rows: Sequence[Row], counter: Tensor, leak: Tensor | None) -> Tensor:
        tables = [self.table([out]), self.table(rows, like=[out])]
        norm, scratch = self._doubles(1), self._doubles(self.native.norm_scratch(tables[1]))
        leaks = 0 if leak is None else leak.data_ptr()
        self.native.sign_drop(*tables, counter.data_ptr(), leaks, norm.data_ptr(), scratch.data_ptr(), 0)
        return norm

    def rollback(self, out: Sequence[Row], kept: Sequence[Row], status: int) -> None:
        flag = torch.tensor(status, dtype=torch.int32)
        self.native.rollback(self.table(out), self.table(kept), flag.data_ptr(), 0)


def flat(row: Row, like: Row) -> Tensor:
    """The row in float64, zeros where it has no tensor."""
    parts = [torch.zeros(len(k)) if t is None else t for t, k in zip(row, like, strict=True) if k is not None]
    return torch.cat([part.double() for part in parts])


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def epsilon(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps
