"""The compiled CPU kernels and solvers, imported only where they are there. Arguments were checked by `ops`, or come
from autograd."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from igb_kernels import _C
from igb_kernels._log import warn_once
from igb_kernels.backends import OptionalTensors
from igb_kernels.status import Status

METHODS: dict[str, int] = _C.methods
RULES: dict[str, int] = _C.loss_rules

_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

_NON_FINITE = int(Status.NON_FINITE)


class Table:
    """A pointer table over K rows of P tensors; all tensors of a column have one dense memory layout.

    Holds the tensors that it points to. One that is laid out otherwise than its column is copied, or, in a table to
    be written to, has a stand-in until `write_back`.
    """

    def __init__(self, tensors: OptionalTensors, tasks: int, like: Table | None = None) -> None:
        """`like` is a table whose layouts this one takes; by default they are those of the first tensors there are."""
        params = len(tensors) // tasks
        self.given = tensors
        first = _columns(tensors, params)
        if like is None:
            self.columns = _dense(first)
            self.strides = [None if t is None else t.stride() for t in self.columns]
            self.numel = array("q", [0 if t is None else t.numel() for t in self.columns])
        else:
            self.columns, self.strides, self.numel = like.columns, like.strides, like.numel
        self.tensors = _laid_out(tensors, self.columns, self.strides)
        addresses = array("Q", [0 if t is None else t.data_ptr() for t in self.tensors])
        # A column without tensors still says how it is to be summed.
        dtypes = array(
            "B",
            [
                0 if (known := column if t is None else t) is None else _DTYPE_CODES[known.dtype]
                for t, column in zip(first, self.columns, strict=True)
            ],
        )
        self.native = _C.Table(
            addresses.buffer_info()[0], self.numel.buffer_info()[0], dtypes.buffer_info()[0], tasks, params
        )

    def write_back(self) -> None:
        if self.tensors is not self.given:
            for given, written in zip(self.given, self.tensors, strict=True):
                if given is not None and written is not None and given is not written:
                    given.copy_(written)


def _columns(tensors: OptionalTensors, params: int) -> list[Tensor | None]:
    first = list(tensors[:params])
    for p, t in enumerate(first):
        if t is None:
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


def _laid_out(
    tensors: OptionalTensors, columns: OptionalTensors, strides: Sequence[tuple[int, ...] | None]
) -> OptionalTensors:
    """The tensors, with a copy of each whose memory layout is not that of its column."""
    params = len(columns)
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
        result[i] = torch.empty_strided(column.shape, column.stride(), dtype=t.dtype).copy_(t)
    return tensors if result is None else result


def gram(grads: Table, tasks: int) -> Tensor:
    out = torch.empty(tasks, tasks, dtype=torch.float64)
    _C.gram(grads.native, out.data_ptr(), torch.get_num_threads())
    return out


def sq_norms(grads: Table, tasks: int) -> Tensor:
    out = torch.empty(tasks, dtype=torch.float64)
    _C.sq_norms(grads.native, out.data_ptr(), torch.get_num_threads())
    return out


def ema_(out: Table, state: Table, grads: Table, decay: Tensor, tasks: int) -> Tensor:
    norms = torch.empty(tasks, dtype=torch.float64)
    _C.ema(out.native, state.native, grads.native, decay.item(), norms.data_ptr(), torch.get_num_threads())
    out.write_back()
    return norms


def combine_(out: Table, grads: Table, weights: Tensor, accumulate: bool) -> None:
    weights = _doubles(weights)
    _C.combine(out.native, grads.native, weights.data_ptr(), accumulate, torch.get_num_threads())
    out.write_back()


def rollback_(out: Sequence[Tensor | None], kept: OptionalTensors, status: Tensor) -> None:
    if not int(status) & _NON_FINITE:
        return
    for o, k in zip(out, kept, strict=True):
        if o is not None:
            o.zero_() if k is None else o.copy_(k)


def solve(
    method: str, gram: Tensor, losses: Tensor | None, options: Sequence[float], state: Tensor | None
) -> tuple[Tensor, Tensor]:
    tasks = gram.shape[0]
    weights = torch.empty(tasks, dtype=torch.float64)
    gram, losses = _doubles(gram), None if losses is None else _doubles(losses)
    status = _C.solve(
        METHODS[method], tasks, gram.data_ptr(), gram.dim() == 2, _address(losses), options, _address(state),
        weights.data_ptr(),
    )  # fmt: skip
    return weights, torch.tensor(status, dtype=torch.int32)


def loss_scales(rule: str, losses: Tensor, per_task: Tensor | None, options: Sequence[float]) -> tuple[Tensor, Tensor]:
    doubles, per_task = _doubles(losses), None if per_task is None else _doubles(per_task)
    scales = torch.empty_like(doubles)
    status = _C.loss_scales(
        RULES[rule], len(losses), doubles.data_ptr(), _address(per_task), options, scales.data_ptr()
    )
    return scales.to(losses.dtype), torch.tensor(status, dtype=torch.int32)


def _doubles(t: Tensor) -> Tensor:
    return t.to(torch.float64).contiguous()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
