"""The compiled CPU kernels and solvers, imported only where they are there. Arguments were checked by `ops`, or come
from autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from igb_kernels import _C
from igb_kernels.backends import OptionalTensors
from igb_kernels.backends._layout import Rows
from igb_kernels.status import Status

METHODS: dict[str, int] = _C.methods
RULES: dict[str, int] = _C.loss_rules

_NON_FINITE = int(Status.NON_FINITE)


class Table(Rows):
    """A pointer table over K rows of P tensors, which it holds."""

    def __init__(self, tensors: OptionalTensors, tasks: int, like: Table | None = None) -> None:
        super().__init__(tensors, tasks, like)
        addresses, dtypes = self.addresses(), self.dtypes()
        self.native = _C.Table(
            addresses.buffer_info()[0], self.numel.buffer_info()[0], dtypes.buffer_info()[0], tasks, self.params
        )


def gram(grads: Table, tasks: int) -> Tensor:
    out = torch.empty(tasks, tasks, dtype=torch.float64)
    _C.gram(grads.native, out.data_ptr(), torch.get_num_threads())
    return out


def sq_norms(grads: Table, tasks: int) -> Tensor:
    out = torch.empty(tasks, dtype=torch.float64)
    _C.sq_norms(grads.native, out.data_ptr(), torch.get_num_threads())
    return out


def ema_(out: Table, state: Table, grads: Table, decay: Tensor, tasks: int, scales: Tensor | None = None) -> Tensor:
    norms, scales = torch.empty(tasks, dtype=torch.float64), _optional_doubles(scales)
    _C.ema(
        out.native, state.native, grads.native, decay.item(), _address(scales), norms.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    out.write_back()
    return norms


def accumulate_squares_(out: Table, state: Table, grads: Table, eps: float, tasks: int) -> Tensor:
    excess = torch.empty(tasks, dtype=torch.float64)
    _C.accumulate_squares(out.native, state.native, grads.native, eps, excess.data_ptr(), torch.get_num_threads())
    out.write_back()
    return excess


def combine_(out: Table, grads: Table, weights: Tensor, accumulate: bool) -> None:
    weights = _doubles(weights)
    _C.combine(out.native, grads.native, weights.data_ptr(), accumulate, torch.get_num_threads())
    out.write_back()


def sign_drop_(out: Table, grads: Table, counter: Tensor, leak: Tensor | None) -> Tensor:
    norm, leak = torch.empty(1, dtype=torch.float64), _optional_doubles(leak)
    seed, step = map(int, counter.tolist())
    _C.sign_drop(out.native, grads.native, seed, step, _address(leak), norm.data_ptr(), torch.get_num_threads())
    out.write_back()
    return norm


def rollback_(out: Table, kept: Table, status: Tensor) -> None:
    if not int(status) & _NON_FINITE:
        return
    for o, k in zip(out.tensors, kept.tensors, strict=True):
        if o is not None:
            o.zero_() if k is None else o.copy_(k)
    out.write_back()


def solve(
    method: str,
    gram: Tensor,
    losses: Tensor | None,
    per_task: Tensor | None,
    options: Sequence[float],
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    tasks = gram.shape[0]
    weights = torch.empty(tasks, dtype=torch.float64)
    gram, losses, per_task = _doubles(gram), _optional_doubles(losses), _optional_doubles(per_task)
    status = _C.solve(
        METHODS[method], tasks, gram.data_ptr(), gram.dim() == 2, _address(losses), _address(per_task), options,
        _address(state), weights.data_ptr(),
    )  # fmt: skip
    return weights, _status(status)


def loss_scales(
    rule: str, losses: Tensor, per_task: Tensor | None, options: Sequence[float], state: Tensor | None
) -> tuple[Tensor, Tensor]:
    doubles, per_task = _doubles(losses), _optional_doubles(per_task)
    scales = torch.empty_like(doubles)
    status = _C.loss_scales(
        RULES[rule], len(losses), doubles.data_ptr(), _address(per_task), options, _address(state), scales.data_ptr()
    )
    return scales.to(losses.dtype), _status(status)


_NO_BITS = torch.zeros((), dtype=torch.int32)


def _status(bits: int) -> Tensor:
    return torch.tensor(bits, dtype=torch.int32) if bits else _NO_BITS.clone()  # the usual one, in a third of the time


def _doubles(t: Tensor) -> Tensor:
    return t if t.dtype is torch.float64 and t.is_contiguous() else t.to(torch.float64).contiguous()


def _optional_doubles(t: Tensor | None) -> Tensor | None:
    return None if t is None else _doubles(t)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
