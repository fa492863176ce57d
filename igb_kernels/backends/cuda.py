"""The compiled CUDA kernels and solvers. Arguments were checked by `ops`, or come from autograd.

Everything is put on the current stream of the tensors' device, and nothing waits for it: no value goes to the host, and
none comes from it other than in the arguments of a kernel. So a step can be captured in a CUDA graph, and what it
allocates may be let go before the kernels have run, since PyTorch gives memory out again in the order of the stream.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from igb_kernels import _native
from igb_kernels.backends import OptionalTensors, captures_graph
from igb_kernels.backends._layout import DTYPE_CODES, Rows

native: Any = getattr(_native.module, "cuda", None)
"""The compiled kernels; None in a build without nvcc."""

KEPT_TABLES = 512
"""How many pointer tables stay on the devices for the next steps: a few for each bucket of a few balancers."""

_kept: dict[object, _DeviceTable] = {}
_kept_lock = Lock()


class _DeviceTable:
    """A pointer table in device memory, which knows addresses and layouts and holds none of the tensors."""

    def __init__(self, rows: Table, addresses: array[int], dtypes: array[int], stream: int) -> None:
        words = native.word_count(rows.tasks, rows.params)
        self._words = torch.empty(words, dtype=torch.int64, device=rows.device)
        self.native = native.Table(
            addresses.buffer_info()[0], rows.numel.buffer_info()[0], dtypes.buffer_info()[0], rows.tasks, rows.params,
            self._words.data_ptr(), stream,
        )  # fmt: skip


class Table(Rows):
    """A pointer table over K rows of P tensors, which it holds.

    While gradients come at the same addresses in every step, as PyTorch's allocator hands them out, the table that an
    earlier step has put on the device serves again; the last `KEPT_TABLES` are kept, each for the stream that it was
    put there on. In a CUDA graph a table is in the graph's own memory, and each replay writes it again: the graph
    depends on no table that is kept outside, and nothing outside depends on its replays.
    """

    def __init__(self, tensors: OptionalTensors, tasks: int, like: Table | None = None) -> None:
        _check_tasks(tasks)
        super().__init__(tensors, tasks, like)
        self.device = _device(self, like)
        addresses, dtypes = self.addresses(), self.dtypes()
        with _on(self.device):
            stream = _stream(self.device)
            if captures_graph(self.device):
                self._on_device = _DeviceTable(self, addresses, dtypes, stream)
            else:
                key = (native, self.device, stream, tasks, *(a.tobytes() for a in (addresses, self.numel, dtypes)))
                with _kept_lock:
                    found = _kept.pop(key, None)
                    self._on_device = found or _DeviceTable(self, addresses, dtypes, stream)
                    _kept[key] = self._on_device  # the last of the dict is the one used last
                    if len(_kept) > KEPT_TABLES:
                        del _kept[next(iter(_kept))]
        self.native = self._on_device.native


def gram(grads: Table, tasks: int) -> Tensor:
    with _on(grads.device):
        out = _doubles(grads.device, tasks, tasks)
        scratch = _doubles(grads.device, native.gram_scratch(grads.native))
        native.gram(grads.native, out.data_ptr(), scratch.data_ptr(), _stream(grads.device))
    return out


def sq_norms(grads: Table, tasks: int) -> Tensor:
    with _on(grads.device):
        out = _doubles(grads.device, tasks)
        scratch = _doubles(grads.device, native.norm_scratch(grads.native))
        native.sq_norms(grads.native, out.data_ptr(), scratch.data_ptr(), _stream(grads.device))
    return out


def ema_(out: Table, state: Table, grads: Table, decay: Tensor, tasks: int, scales: Tensor | None = None) -> Tensor:
    with _on(out.device):
        decay, scales = _as_doubles(decay, out.device), _optional_doubles(scales, out.device)
        norms = _doubles(out.device, tasks)
        scratch = _doubles(out.device, native.norm_scratch(out.native))
        native.ema(
            out.native, _beside(out, state).native, grads.native, decay.data_ptr(), _address(scales), norms.data_ptr(),
            scratch.data_ptr(), _stream(out.device),
        )  # fmt: skip
        out.write_back()
    return norms


def accumulate_squares_(out: Table, state: Table, grads: Table, eps: float, tasks: int) -> Tensor:
    with _on(out.device):
        excess = _doubles(out.device, tasks)
        scratch = _doubles(out.device, native.norm_scratch(out.native))
        native.accumulate_squares(
            out.native, _beside(out, state).native, grads.native, eps, excess.data_ptr(), scratch.data_ptr(),
            _stream(out.device),
        )  # fmt: skip
        out.write_back()
    return excess


def combine_(out: Table, grads: Table, weights: Tensor, accumulate: bool) -> None:
    with _on(out.device):
        weights = _as_doubles(weights, out.device)
        native.combine(out.native, grads.native, weights.data_ptr(), accumulate, _stream(out.device))
        out.write_back()


def sign_drop_(out: Table, grads: Table, counter: Tensor, leak: Tensor | None) -> Tensor:
    with _on(out.device):
        counter, leak = _as_doubles(counter, out.device), _optional_doubles(leak, out.device)
        norm = _doubles(out.device, 1)
        scratch = _doubles(out.device, native.norm_scratch(grads.native))
        native.sign_drop(
            out.native, grads.native, counter.data_ptr(), _address(leak), norm.data_ptr(), scratch.data_ptr(),
            _stream(out.device),
        )  # fmt: skip
        out.write_back()
    return norm


def rollback_(out: Table, kept: Table, status: Tensor) -> None:
    with _on(out.device):
        status = status.to(out.device)
        native.rollback(out.native, _beside(out, kept).native, status.data_ptr(), _stream(out.device))
        out.write_back()


def solve(
    method: str,
    gram: Tensor,
    losses: Tensor | None,
    per_task: Tensor | None,
    options: Sequence[float],
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    tasks, device = gram.shape[0], gram.device
    _check_tasks(tasks)
    assert _native.module is not None
    number = _native.module.methods[method]
    with _on(device):
        full, gram = gram.dim() == 2, _as_doubles(gram, device)
        losses, per_task = _optional_doubles(losses, device), _optional_doubles(per_task, device)
        weights, status = _doubles(device, tasks), torch.empty((), dtype=torch.int32, device=device)
        workspace = _doubles(device, native.workspace_size(number, tasks))
        native.solve(
            number, tasks, gram.data_ptr(), full, _address(losses), _address(per_task), options, _address(state),
            weights.data_ptr(), status.data_ptr(), workspace.data_ptr(), _stream(device),
        )  # fmt: skip
    return weights, status


def loss_scales(
    rule: str, losses: Tensor, per_task: Tensor | None, options: Sequence[float], state: Tensor | None
) -> tuple[Tensor, Tensor]:
    _check_tasks(len(losses))
    assert _native.module is not None
    device = losses.device
    with _on(device):
        losses, per_task = losses.contiguous(), _optional_doubles(per_task, device)
        scales, status = torch.empty_like(losses), torch.empty((), dtype=torch.int32, device=device)
        native.loss_scales(
            _native.module.loss_rules[rule], len(losses), DTYPE_CODES[losses.dtype], losses.data_ptr(),
            _address(per_task), options, _address(state), scales.data_ptr(), status.data_ptr(), _stream(device),
        )  # fmt: skip
    return scales, status


def _check_tasks(tasks: int) -> None:
    if tasks > native.max_tasks:
        raise ValueError(
            f"backend='cuda' takes at most {native.max_tasks} tasks, found {tasks}: use backend='reference'"
        )


def _device(rows: Table, like: Table | None) -> torch.device:
    """The tensors' device; of rows without any, that of the rows that they are like, or else the current one."""
    known = next((t.device for t in rows.first if t is not None), None)
    if known is not None:
        return known
    if like is not None:
        return like.device
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _beside(out: Table, table: Table) -> Table:
    """The table on the device of `out`: without tensors, it may have been made for another."""
    return table if table.device == out.device else Table(table.tensors, table.tasks, out)


def _on(device: torch.device) -> torch.cuda.device:
    """Makes the device the current one, for launches and allocations; for the CPU it does nothing."""
    return torch.cuda.device(-1 if device.index is None else device.index)


def _stream(device: torch.device) -> int:
    """The device's current stream; 0 for the CPU, where an emulation of the kernels can run."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _doubles(device: torch.device, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device=device)


def _as_doubles(t: Tensor, device: torch.device) -> Tensor:
    return t.to(device, torch.float64).contiguous()


def _optional_doubles(t: Tensor | None, device: torch.device) -> Tensor | None:
    return None if t is None else _as_doubles(t, device)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
