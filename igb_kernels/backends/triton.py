"""The Triton kernels, compiled when first used. Arguments were checked by `ops`, or come from autograd.

Nothing waits for the GPU but `solve` and `loss_scales`, which send their K×K problem to the CPU's solvers. Pointer
tables and lists of chunks are copied to the GPU from pinned memory, and stay there for the next steps: gradients tend
to come at the same addresses again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

from igb_kernels._log import warn_once
from igb_kernels.backends import Backend, OptionalTensors, _triton_kernels, captures_graph, resolve
from igb_kernels.backends._layout import DTYPE_CODES, Rows, bring_back, on_cpu
from igb_kernels.backends._triton_kernels import CHUNK, LANES

FEW_TASKS = 8
"""Up to here a program keeps the sums of all pairs in registers."""

ROWS_AT_ONCE = 4
"""How many rows' loads a program of `combine` has under way; with more it needs registers that others could use."""

OPTIONS = {"enable_fp_fusion": True}
"""Multiplications and additions are fused, whatever the version's default."""

_TRITON_DTYPES = {code: getattr(tl, str(dtype).removeprefix("torch.")) for dtype, code in DTYPE_CODES.items()}


class Table(Rows):
    """Addresses of K rows of P tensors, which it holds."""

    def __init__(self, tensors: OptionalTensors, tasks: int, like: Table | None = None) -> None:
        super().__init__(tensors, tasks, like)
        known = next((t.device for t in self.first if t is not None), None)
        self.device: torch.device = known or (torch.device("cpu") if like is None else like.device)
        self._addresses = self.addresses().tobytes()
        self._dtypes = self.dtypes().tobytes()

    def on(self, device: torch.device) -> Tensor:
        """The addresses as a kernel on this device reads them: a table without tensors has no device of its own."""
        return _addresses_on(self._addresses, device, _stream(device))

    def launches(self, out: Table | None = None) -> Sequence[_Launch]:
        """What it takes to visit every element; `out` is what is written, if its dtypes differ."""
        sizes, codes = self.numel.tobytes(), [self._dtypes]
        if out is not None:
            sizes, codes = out.numel.tobytes(), [self._dtypes, out._dtypes]
        device = self.device if out is None else out.device
        return _launches(sizes, tuple(codes), device, _stream(device))


@dataclass(frozen=True)
class _Launch:
    """One launch of a kernel: for the columns of the same dtypes."""

    codes: tuple[int, ...]
    """Of the rows' dtype and, if it was asked for, that of the output."""
    chunks: Tensor
    """[programs, 3]: column, first element, length."""
    before: int
    """How many programs the launches before this one have."""

    @property
    def programs(self) -> int:
        return len(self.chunks)

    @property
    def vector(self) -> int:
        """Elements in 16 bytes."""
        return 128 // int(self.dtype.primitive_bitwidth)

    @property
    def dtype(self) -> tl.dtype:
        return _TRITON_DTYPES[self.codes[0]]

    @property
    def accumulator(self) -> tl.dtype:
        return tl.float64 if self.dtype is tl.float64 else tl.float32

    def dtypes(self) -> dict[str, object]:
        return {"DTYPE": self.dtype, "ACC": self.accumulator}


def gram(grads: Table, tasks: int) -> Tensor:
    launches, device = grads.launches(), grads.device
    partials = _partials(launches, tasks * (tasks + 1) // 2, device)
    with _on(device):
        for launch in launches:
            arguments = (grads.on(device), launch.chunks, partials, grads.params, launch.before, partials.shape[1])
            if tasks <= FEW_TASKS:
                _triton_kernels.gram_of_few[launch.programs,](
                    *arguments, TASKS=tasks, LANES=LANES, VECTOR=launch.vector, CHUNK=CHUNK, **launch.dtypes(),
                    **OPTIONS,
                )  # fmt: skip
            else:
                tile, block = tile_for(tasks, launch.dtype)
                tiles = -(-tasks // tile)
                _triton_kernels.gram_of_many[launch.programs, tiles, tiles](
                    *arguments, tasks, TILE=tile, BLOCK=block, ONE_TILE=tiles == 1, CHUNK=CHUNK, **launch.dtypes(),
                    **OPTIONS,
                )  # fmt: skip
        return _sums(partials, torch.empty(tasks, tasks, dtype=torch.float64, device=device))


def tile_for(tasks: int, dtype: tl.dtype) -> tuple[int, int]:
    """Rows and elements of a tile. One of 64 rows would no longer fit into the registers."""
    return (16 if tasks <= 16 else 32), (32 if dtype is tl.float64 else 64)


def sq_norms(grads: Table, tasks: int) -> Tensor:
    launches, device = grads.launches(), grads.device
    partials = _partials(launches, tasks, device)
    with _on(device):
        for launch in launches:
            _triton_kernels.sq_norms[launch.programs, tasks](
                grads.on(device), launch.chunks, partials, grads.params, launch.before, partials.shape[1],
                BLOCK=LANES * launch.vector, CHUNK=CHUNK, **launch.dtypes(), **OPTIONS,
            )  # fmt: skip
        return _sums(partials, torch.empty(tasks, dtype=torch.float64, device=device))


def ema_(out: Table, state: Table, grads: Table, decay: Tensor, tasks: int, scales: Tensor | None = None) -> Tensor:
    launches, device = grads.launches(out), out.device
    partials = _partials(launches, tasks, device)
    decay = decay.to(device, torch.float64)
    scales = None if scales is None else scales.to(device, torch.float64).contiguous()
    with _on(device):
        for launch in launches:
            _triton_kernels.ema[launch.programs, tasks](
                out.on(device), state.on(device), grads.on(device), launch.chunks, partials, decay, scales,
                out.params, launch.before, partials.shape[1],
                BLOCK=LANES * launch.vector, CHUNK=CHUNK, **launch.dtypes(), **OPTIONS,
            )  # fmt: skip
        out.write_back()
        return _sums(partials, torch.empty(tasks, dtype=torch.float64, device=device))


def accumulate_squares_(out: Table, state: Table, grads: Table, eps: float, tasks: int) -> Tensor:
    launches, device = grads.launches(out), out.device
    partials = _partials(launches, tasks, device)
    as_double = torch.full((1,), eps, dtype=torch.float64, device=device)  # a Python float would become a float32
    with _on(device):
        for launch in launches:
            _triton_kernels.accumulate_squares[launch.programs, tasks](
                out.on(device), state.on(device), grads.on(device), launch.chunks, partials, as_double, out.params,
                launch.before, partials.shape[1],
                BLOCK=LANES * launch.vector, CHUNK=CHUNK, **launch.dtypes(), **OPTIONS,
            )  # fmt: skip
        out.write_back()
        return _sums(partials, torch.empty(tasks, dtype=torch.float64, device=device))


def combine_(out: Table, grads: Table, weights: Tensor, accumulate: bool) -> None:
    device, tasks = out.device, grads.tasks
    weights = weights.to(device, torch.float64).contiguous()
    with _on(device):
        for launch in grads.launches(out):
            _triton_kernels.combine[launch.programs,](
                out.on(device), grads.on(device), launch.chunks, weights, out.params, tasks,
                OUT=_TRITON_DTYPES[launch.codes[1]], ACCUMULATE=accumulate, GROUP=min(tasks, ROWS_AT_ONCE),
                BLOCK=LANES * launch.vector, CHUNK=CHUNK, **launch.dtypes(), **OPTIONS,
            )  # fmt: skip
        out.write_back()


def sign_drop_(out: Table, grads: Table, counter: Tensor, leak: Tensor | None) -> Tensor:
    launches, device = grads.launches(out), out.device
    partials = _partials(launches, 1, device)
    counter = counter.contiguous()
    leak = None if leak is None else leak.to(device, torch.float64).contiguous()
    with _on(device):
        for launch in launches:
            _triton_kernels.sign_drop[launch.programs,](
                out.on(device), grads.on(device), launch.chunks, partials, counter, leak, out.params, grads.tasks,
                launch.before,
                OUT=_TRITON_DTYPES[launch.codes[1]], GROUP=min(grads.tasks, ROWS_AT_ONCE), STREAMS=LANES, CHUNK=CHUNK,
                **launch.dtypes(), **OPTIONS,
            )  # fmt: skip
        out.write_back()
        return _sums(partials, torch.empty(1, dtype=torch.float64, device=device))


def rollback_(out: Table, kept: Table, status: Tensor) -> None:
    device, params = out.device, out.params
    status = status.to(device)
    with _on(device):
        for launch in out.launches():
            for k in range(out.tasks):
                to, source = (table.on(device)[k * params :] for table in (out, kept))
                _triton_kernels.rollback[launch.programs,](
                    to, source, launch.chunks, status,
                    DTYPE=launch.dtype, BLOCK=LANES * launch.vector, **OPTIONS,
                )  # fmt: skip
        out.write_back()


def solve(
    method: str,
    gram: Tensor,
    losses: Tensor | None,
    per_task: Tensor | None,
    options: Sequence[float],
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    kept = on_cpu(state)
    weights, status = _solvers().solve(method, gram.cpu(), on_cpu(losses), on_cpu(per_task), options, kept)
    bring_back(state, kept)
    return weights.to(gram.device), status.to(gram.device)


def loss_scales(
    rule: str, losses: Tensor, per_task: Tensor | None, options: Sequence[float], state: Tensor | None
) -> tuple[Tensor, Tensor]:
    kept = on_cpu(state)
    scales, status = _solvers().loss_scales(rule, losses.cpu(), on_cpu(per_task), options, kept)
    bring_back(state, kept)
    return scales.to(losses.device), status.to(losses.device)


def _solvers() -> Backend:
    warn_once("the triton backend has no solvers of its own: every step waits for the GPU and solves on the CPU")
    return resolve("auto", "cpu")


def _partials(launches: Sequence[_Launch], sums: int, device: torch.device) -> Tensor:
    """Room for what each program contributes to each sum."""
    return torch.empty(sums, sum(launch.programs for launch in launches), dtype=torch.float64, device=device)


def _sums(partials: Tensor, out: Tensor) -> Tensor:
    """Fills `out` with the sums over all programs: [K], or a [K, K] that is symmetric to the bit."""
    if partials.shape[1] == 0:  # of rows without tensors, which are on no GPU
        return out.zero_()
    square = out.dim() == 2
    grid = (len(out), len(out) if square else 1)
    _triton_kernels.sum_partials[grid](partials, out, partials.shape[1], SQUARE=square, BLOCK=1024, **OPTIONS)
    return out


def _on(device: torch.device) -> torch.cuda.device:
    """Makes the device the current one, for launches; for the CPU it does nothing."""
    return torch.cuda.device(-1 if device.index is None else device.index)


def _stream(device: torch.device) -> int:
    """The current stream: what has been copied on one need not be there yet for the kernels of another."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@lru_cache(maxsize=64)
def _addresses_on(addresses: bytes, device: torch.device, stream: int) -> Tensor:
    return _upload(_int64s(addresses), device)


@lru_cache(maxsize=64)
def _launches(sizes: bytes, codes: Sequence[bytes], device: torch.device, stream: int) -> Sequence[_Launch]:
    """The columns of these sizes and dtypes, cut into chunks; one launch for each combination of dtypes."""
    all_sizes, keys = _int64s(sizes), list(zip(*codes, strict=True))
    launches: list[_Launch] = []
    before = 0
    for key in sorted(set(keys)):
        columns = torch.tensor([p for p, other in enumerate(keys) if other == key])
        counts = (all_sizes[columns] + CHUNK - 1) // CHUNK
        column = columns.repeat_interleave(counts)
        first = CHUNK * (torch.arange(len(column)) - (counts.cumsum(0) - counts).repeat_interleave(counts))
        if len(column):
            length = (all_sizes[column] - first).clamp(max=CHUNK)
            launches.append(_Launch(key, _upload(torch.stack([column, first, length], dim=1), device), before))
            before += len(column)
    return launches


def _int64s(values: bytes) -> Tensor:
    return torch.frombuffer(bytearray(values), dtype=torch.int64) if values else torch.empty(0, dtype=torch.int64)


def _upload(values: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that the host does not wait for."""
    if captures_graph(device):
        raise RuntimeError("backend='triton' cannot be captured in a CUDA graph: its tables would be the graph's")
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values
