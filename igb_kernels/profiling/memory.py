"""The most memory that a step holds at a time, beyond what there was when it began."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


class PeakOfAllocations:
    """On the CPU: from every allocation of torch on this thread. Its profiler counts them, which slows a step down."""

    def __init__(self) -> None:
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as torch_profile

        self._profiler = torch_profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profiler.__enter__()  # type: ignore[no-untyped-call]

    @staticmethod
    def possible() -> bool:
        """Only one such profiler can run."""
        return not torch._C._autograd._profiler_enabled()

    def stop(self) -> int:
        """The peak in bytes."""
        self._profiler.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        results: Any = self._profiler.profiler
        held = peak = 0
        for _, size in sorted(_allocations(results.kineto_results.experimental_event_tree())):
            held += size
            peak = max(peak, held)
        return peak


def _allocations(events: list[Any]) -> Iterator[tuple[int, int]]:
    """When, and how many bytes; negative where they were freed."""
    for event in events:
        if event.tag.name == "Allocation":
            yield event.start_time_ns, event.extra_fields.alloc_size
        yield from _allocations(event.children)
