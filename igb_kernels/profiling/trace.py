"""Profiles as chrome://tracing and ui.perfetto.dev read them."""

from __future__ import annotations

from typing import Any

import torch

from igb_kernels.profiling.recorder import Recorder, Step
from igb_kernels.profiling.spans import Moment

HOST, DEVICE = 0, 1


def chrome_trace(recorder: Recorder) -> dict[str, Any]:
    """All steps, with their phases inside; on a GPU also as the device ran them, one row for each stream."""
    on_gpu = recorder.clock.on_gpu
    if on_gpu:
        torch.cuda.synchronize(recorder.clock.device)
    events: list[dict[str, Any]] = [_named(HOST, "host")]
    if on_gpu:
        events.append(_named(DEVICE, str(recorder.clock.device)))
    if recorder.steps:
        zero = recorder.steps[0].start
        for number, step in enumerate(recorder.steps):
            events += _of_step(number, step, zero, on_gpu)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _of_step(number: int, step: Step, zero: Moment, on_gpu: bool) -> list[dict[str, Any]]:
    assert step.end is not None
    spans = [(f"step {number} ({step.kind})", step.start, step.end)]
    spans += [(s.name, s.start, s.end) for outer in step.spans.outer for s in outer.all() if s.end is not None]
    events = [_event(name, HOST, 0, zero.ms_to(start), start.ms_to(end)) for name, start, end in spans]
    if on_gpu:
        for name, start, end in spans:
            if start.stream == end.stream:
                events.append(_event(name, DEVICE, start.stream, zero.device_ms_to(start), start.device_ms_to(end)))
    return events


def _event(name: str, process: int, thread: int, start_ms: float, ms: float) -> dict[str, Any]:
    return {"name": name, "ph": "X", "pid": process, "tid": thread, "ts": 1e3 * start_ms, "dur": 1e3 * ms}


def _named(process: int, name: str) -> dict[str, Any]:
    return {"name": "process_name", "ph": "M", "pid": process, "args": {"name": name}}
