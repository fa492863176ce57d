"""The compiled CPU kernels: builds the pointer tables and calls them. Arguments were checked by `ops`."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from igb_kernels import _native
from igb_kernels._log import warn_once
from igb_kernels.status import Status

_C = _native.module
assert _C is not None, "backends.resolve() imports this module only where the compiled one is there"

METHODS: dict[str, int] = _C.methods
RULES: dict[str, int] = _C.loss_rules

_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

OptionalTensors = Sequence[Tensor | None]


class _Table:
    """A pointer table over rows of tensors that share a layout per column. It must outlive the native call: it owns
    the addresses and holds the tensors they point to."""

    __slots__ = ("_memory", "native")

    def __init__(self, tensors: OptionalTensors, columns: OptionalTensors, tasks: int) -> None:
        addresses = array("Q", [0 if t is None else t.data_ptr() for t in tensors])
        numel = array("q", [0 if t is None else t.numel() for t in columns])
        dtypes = array("B", [0 if t is None else _DTYPE_CODES[t.dtype] for t in columns])
        self._memory = (tensors, addresses, numel, dtypes)
        self.native = _C.Table(
            addresses.buffer_info()[0], numel.buffer_info()[0], dtypes.buffer_info()[0], tasks, len(columns)
        )


def _columns(tensors: OptionalTensors, params: int) -> list[Tensor | None]:
    """The first tensor of each column that is there."""
    first = list(tensors[:params])
    for i in range(params, len(tensors)):
        if first[i % params] is None:
            first[i % params] = tensors[i]
    return first


def _is_dense(t: Tensor) -> bool:
    """Whether the elements fill one block of memory without gaps or overlaps, in any order of dimensions."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _dense(tensors: OptionalTensors) -> list[Tensor | None]:
    """The tensors, with an uninitialised contiguous stand-in for each that is not dense."""
    return [t if t is None or _is_dense(t) else t.new_empty(t.shape) for t in tensors]


def _laid_out(tensors: OptionalTensors, like: OptionalTensors) -> OptionalTensors:
    """The tensors, with a copy of each whose memory layout is not that of its column in `like`."""
    params = len(like)
    result: list[Tensor | None] | None = None
    for i, t in enumerate(tensors):
        column = like[i % params]
        if t is None or column is None or t is column or t.stride() == column.stride():
            continue
        if t.is_contiguous() and column.is_contiguous():  # strides of dimensions of one element mean nothing
            continue
        if result is None:
            warn_once("gradients of one parameter differ in memory layout between tasks: some are copied every step")
            result = list(tensors)
        result[i] = torch.empty_strided(column.shape, column.stride(), dtype=t.dtype).copy_(t)
    return tensors if result is None else result


def _write_back(tensors: OptionalTensors, dense: OptionalTensors) -> None:
    for t, d in zip(tensors, dense, strict=True):
        if t is not None and d is not None and t is not d:
            t.copy_(d)


def _row_table(grads: OptionalTensors, tasks: int) -> _Table:
    columns = _dense(_columns(grads, len(grads) // tasks))
    return _Table(_laid_out(grads, columns), columns, tasks)


def gram(grads: OptionalTensors, tasks: int) -> Tensor:
    out = torch.empty(tasks, tasks, dtype=torch.float64)
    table = _row_table(grads, tasks)
    _C.gram(table.native, out.data_ptr(), torch.get_num_threads())
    return out


def sq_norms(grads: OptionalTensors, tasks: int) -> Tensor:
    out = torch.empty(tasks, dtype=torch.float64)
    table = _row_table(grads, tasks)
    _C.sq_norms(table.native, out.data_ptr(), torch.get_num_threads())
    return out


def ema_(out: Sequence[Tensor], state: OptionalTensors, grads: OptionalTensors, decay: Tensor, tasks: int) -> Tensor:
    norms = torch.empty(tasks, dtype=torch.float64)
    params = len(out) // tasks
    layout = _dense(out[:params])
    targets = _laid_out(out, layout)
    out_table = _Table(targets, layout, tasks)
    state_table = _Table(_laid_out(state, layout), layout, tasks)
    grad_table = _Table(_laid_out(grads, layout), _columns([*grads, *layout], params), tasks)
    _C.ema(
        out_table.native, state_table.native, grad_table.native,
        float(decay), norms.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    _write_back(out, targets)
    return norms


def combine_(out: Sequence[Tensor], grads: OptionalTensors, weights: Tensor, accumulate: bool) -> None:
    tasks = weights.numel()
    weights = weights.to(torch.float64).contiguous()
    targets = _dense(out)
    if accumulate:
        _write_back(targets, out)
    table = _Table(_laid_out(grads, targets), _columns(grads, len(out)), tasks)
    out_table = _Table(targets, targets, 1)
    _C.combine(out_table.native, table.native, weights.data_ptr(), accumulate, torch.get_num_threads())
    _write_back(out, targets)


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
    return weights, _status(status)


def loss_scales(
    rule: str, losses: Tensor, per_task: Tensor | None, options: Sequence[float]
) -> tuple[Tensor, Tensor]:
    scales = torch.empty(losses.shape, dtype=torch.float64)
    doubles, per_task = _doubles(losses), None if per_task is None else _doubles(per_task)
    status = _C.loss_scales(
        RULES[rule], losses.numel(), doubles.data_ptr(), _address(per_task), options, scales.data_ptr()
    )
    return scales.to(losses.dtype), _status(status)


def rollback_(out: Sequence[Tensor], kept: OptionalTensors, status: Tensor) -> None:
    if not int(status) & Status.NON_FINITE:
        return
    for o, k in zip(out, kept, strict=True):
        if k is None:
            o.zero_()
        else:
            o.copy_(k)


def _doubles(t: Tensor) -> Tensor:
    return t.to(torch.float64).contiguous()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _status(bits: int) -> Tensor:
    return torch.tensor(bits, dtype=torch.int32)
