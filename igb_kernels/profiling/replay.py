"""The operations of a step, run once more by the reference backend on copies of the same gradients; and the floor."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from igb_kernels.backends import reference
from igb_kernels.profiling.spans import Clock

MOST_COPIED = 256 << 20
"""Bytes; of more gradients, so many are copied, and the time is scaled up."""
COPIES = 5


class NotReplayed(Exception):
    """Says why the reference cannot run."""


class Replay:
    """Runs operations on copies of their arguments: gradients, state and counters stay as they are."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def run(self, operation: str, arguments: Sequence[Any]) -> tuple[float, list[Any]]:
        """Milliseconds, the second time, and what was returned and written."""
        try:
            for _ in range(2):  # the first time, PyTorch loads and allocates; steps before have done that for ours
                copies: dict[tuple[Any, ...], Tensor] = {}
                own = [_copy(argument, copies) for argument in arguments]
                self._wait()
                start = self._clock.now()
                returned = getattr(reference, operation)(*own)
                end = self._clock.now()
                self._wait()
        except torch.cuda.OutOfMemoryError as error:
            raise NotReplayed(f"the reference backend ran out of memory ({str(error).splitlines()[0]})") from error
        ms = start.device_ms_to(end) if self._clock.on_gpu else start.ms_to(end)
        return ms, results(operation, own, returned)

    def _wait(self) -> None:
        if self._clock.on_gpu:
            torch.cuda.synchronize(self._clock.device)


def results(operation: str, arguments: Sequence[Any], returned: Any) -> list[Tensor]:
    """What an operation has returned and written."""
    found = list(returned) if isinstance(returned, tuple) else [returned]
    if operation.endswith("_"):
        found += arguments[0].tensors
    return [t for t in found if isinstance(t, Tensor)]


def agree(operation: str, found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether the results differ by no more than rounding in their dtypes."""
    least = 1e-2 if operation == "sign_drop_" else 1e-5  # where rounding decides, it takes the other sign
    for a, b in zip(found, expected, strict=True):
        exact = b.detach().double()
        difference = (a.detach().to(exact.device).double() - exact).nan_to_num(nan=0.0)
        if not torch.equal(a.isnan().to(exact.device), exact.isnan()):
            return False
        limit = max(torch.finfo(a.dtype).eps * 16, least) if a.dtype.is_floating_point else 0.0
        if difference.norm() > limit * exact.nan_to_num(nan=0.0).norm():
            return False
    return True


def _copy(argument: Any, copies: dict[tuple[Any, ...], Tensor]) -> Any:
    """Copies of tensors that share memory share theirs."""
    if isinstance(argument, Tensor):
        key = (argument.data_ptr(), argument.dtype, argument.shape, argument.stride())
        if argument.numel() == 0 or key not in copies:
            copies[key] = argument.detach().clone()
        return copies[key]
    if hasattr(argument, "columns"):
        if not hasattr(argument, "tensors"):
            raise NotReplayed("the shared parameters are on several devices")
        tensors = [None if t is None else _copy(t, copies) for t in argument.tensors]
        return reference.Table(tensors, argument.tasks)
    return argument


def copy_ms(nbytes: int, clock: Clock) -> float:
    """The milliseconds that it takes to copy so many bytes once, a median."""
    if nbytes == 0:
        return 0.0
    size = min(nbytes, MOST_COPIED)
    source = torch.ones(size, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    times = []
    for _ in range(COPIES + 1):
        start = clock.now()
        target.copy_(source)
        end = clock.now()
        if clock.on_gpu:
            torch.cuda.synchronize(clock.device)
        times.append(start.device_ms_to(end) if clock.on_gpu else start.ms_to(end))
    return statistics.median(times[1:]) * nbytes / size
