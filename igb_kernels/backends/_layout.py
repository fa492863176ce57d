"""Rows of tensors as pointer tables want them: one dense memory layout in each column."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from igb_kernels._log import warn_once
from igb_kernels.backends import OptionalTensors

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
"""As in csrc/cpu/tensor_table.h."""


def as_reals(tensors: OptionalTensors, params: int) -> OptionalTensors:
    """The tensors, with a view of each complex one as real parts and imaginary parts: Re <g, h> is its inner product.

    Complex ones are asked for in columns, as one column has one dtype.
    """
    found = [p for p, t in enumerate(first_of_columns(tensors, params)) if t is not None and t.is_complex()]
    if not found:
        return tensors
    reals = list(tensors)
    for p in found:
        for i in range(p, len(reals), params):
            if (t := reals[i]) is not None:
                reals[i] = torch.view_as_real(t.resolve_conj())
    return reals


class Rows:
    """K rows of P tensors, those of a column in one dense memory layout; complex ones as twice as many real numbers.

    Holds the tensors. One that is laid out otherwise than its column is copied, or, in rows to be written to, has a
    stand-in until `write_back`.
    """

    def __init__(self, tensors: OptionalTensors, tasks: int, like: Rows | None = None) -> None:
        """`like` are rows whose layouts these take; by default they are those of the first tensors there are."""
        self.tasks, self.params = tasks, len(tensors) // tasks
        self.given, self.first = tensors, first_of_columns(tensors, self.params)
        if any([t is not None and t.is_complex() for t in self.first]):
            self.given = tensors = as_reals(tensors, self.params)
            self.first = first_of_columns(tensors, self.params)
        contiguous = all([t is None or t.is_contiguous() for t in tensors])
        if like is None:
            self.columns = self.first if contiguous else _dense(self.first)
            self.contiguous = contiguous or all([t is None or t.is_contiguous() for t in self.columns])
            self.numel = array("q", [0 if t is None else t.numel() for t in self.columns])
        else:
            self.columns, self.contiguous, self.numel = like.columns, like.contiguous, like.numel
        self.tensors = tensors if contiguous and self.contiguous else _laid_out(tensors, self.columns)

    def addresses(self) -> array[int]:
        """Of every tensor, row by row; 0 for one that is missing."""
        return array("Q", [0 if t is None else t.data_ptr() for t in self.tensors])

    def dtypes(self) -> array[int]:
        """The columns' dtype codes. A column without tensors still says how it is to be summed."""
        known = [column if t is None else t for t, column in zip(self.first, self.columns, strict=True)]
        return array("B", [0 if t is None else DTYPE_CODES[t.dtype] for t in known])

    def write_back(self) -> None:
        """Copies what was written to stand-ins to the tensors that they stand for."""
        if self.tensors is not self.given:
            for given, written in zip(self.given, self.tensors, strict=True):
                if given is not None and written is not None and given is not written:
                    given.copy_(written)


def first_of_columns(tensors: OptionalTensors, params: int) -> list[Tensor | None]:
    """The first tensor of each column that is there."""
    first = list(tensors[:params])
    for p in [p for p, t in enumerate(first) if t is None]:
        first[p] = next((other for other in tensors[p::params] if other is not None), None)
    return first


def _dense(tensors: OptionalTensors) -> list[Tensor | None]:
    """The tensors, with an uninitialised contiguous stand-in for each whose memory has gaps or overlaps."""
    return [t if t is None or t.is_contiguous() or _is_dense(t) else t.new_empty(t.shape) for t in tensors]


def _is_dense(t: Tensor) -> bool:
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def in_memory_order(values: Tensor, like: Tensor) -> Tensor:
    """Values [n] in the shape of `like`, in the order in which rows like it are stored."""
    if like.is_contiguous() or not _is_dense(like):
        return values.reshape(like.shape)
    return values.as_strided(like.shape, like.stride())


def _laid_out(tensors: OptionalTensors, columns: OptionalTensors) -> OptionalTensors:
    """The tensors, with a copy of each whose memory layout is not that of its column."""
    params, strides = len(columns), [None if c is None else c.stride() for c in columns]
    result: list[Tensor | None] | None = None
    for i, t in enumerate(tensors):
        p = i % params
        if t is None or t is columns[p] or t.stride() == strides[p]:
            continue
        column = columns[p]
        if column is None or (t.is_contiguous() and column.is_contiguous()):
            continue  # the strides of dimensions of one element mean nothing
        if result is None:
            warn_once("gradients of one parameter differ in memory layout: some are copied every step")
            result = list(tensors)
        result[i] = torch.empty_strided(column.shape, column.stride(), dtype=t.dtype, device=t.device).copy_(t)
    return tensors if result is None else result


def on_cpu(t: Tensor | None) -> Tensor | None:
    """A copy on the CPU, or the same tensor where it already is there."""
    return None if t is None else t.cpu()


def bring_back(state: Tensor | None, kept: Tensor | None) -> None:
    """Writes what became of `on_cpu(state)` to the state."""
    if state is not None and kept is not None and kept is not state:
        state.copy_(kept)
