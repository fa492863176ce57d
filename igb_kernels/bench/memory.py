"""The most memory that something holds at a time, beyond what was held before."""

from __future__ import annotations

from collections.abc import Callable

import torch

from igb_kernels.profiling.memory import PeakOfAllocations


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """While it runs. On the CPU every allocation of torch on this thread counts, on a GPU those of its caching
    allocator; what else the machine does has no part in it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    allocations = PeakOfAllocations()
    try:
        run()
    finally:
        peak = allocations.stop()
    return peak
