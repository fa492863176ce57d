"""Spans of time on the host and, by events that nothing waits for, on a GPU."""

from __future__ import annotations

import enum
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch


class Phase(enum.Enum):
    """What a step does, in order."""

    FORWARD = "forward"
    SCALES = "loss scales"
    PASS = "backward pass"
    CAPTURE = "taking gradients"
    MEASURE = "Gramian and norms"
    AVERAGES = "averages"
    SOLVER = "solver"
    COMBINE = "combine"
    BALANCER = "rest of the balancer"
    AFTER = "between backward and optimizer"
    OPTIMIZER = "optimizer"
    REFERENCE = "reference"
    """Not the step's own work."""


BALANCING = (
    Phase.SCALES, Phase.CAPTURE, Phase.MEASURE, Phase.AVERAGES, Phase.SOLVER, Phase.COMBINE, Phase.BALANCER,
)  # fmt: skip
"""What balancing takes beside the backward passes."""


@dataclass(slots=True)
class Moment:
    """A time on the host, in ns, and, on a GPU, where its current stream stood."""

    host: int
    event: torch.cuda.Event | None = None
    stream: int = 0

    def ms_to(self, later: Moment) -> float:
        """Of the host."""
        return (later.host - self.host) / 1e6

    def device_ms_to(self, later: Moment) -> float:
        """Of the device, which has come to both."""
        assert self.event is not None
        assert later.event is not None
        elapsed: float = self.event.elapsed_time(later.event)
        return elapsed


class Clock:
    """Says what time it is on the host and on the device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"

    def now(self) -> Moment:
        """Nothing waits."""
        if not self.on_gpu:
            return Moment(time.perf_counter_ns())
        stream = torch.cuda.current_stream(self.device)
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        return Moment(time.perf_counter_ns(), event, stream.cuda_stream)


class Span:
    """What ran from `start` to `end`. A leaf is one object: many of them would keep Python's garbage collector busy."""

    __slots__ = (
        "_host",
        "_inner",
        "_start",
        "_stop",
        "_stopped",
        "_stream",
        "name",
        "operation",
        "phase",
        "shared_from",
    )

    def __init__(self, phase: Phase, name: str, start: Moment) -> None:
        self.phase, self.name = phase, name
        self._host, self._start, self._stream = start.host, start.event, start.stream
        self._stop = 0
        self._stopped: Moment | None = None
        self._inner: list[Span] | None = None
        self.shared_from: Moment | None = None
        """Of a backward pass that was watched: when it came to what all tasks share."""
        self.operation = False
        """Whether it is one of the backend's."""

    def close(self, end: Moment) -> None:
        """It ends then."""
        self._stop, self._stopped = end.host, end if end.event is not None else None

    def add(self, span: Span) -> None:
        """One that runs inside."""
        if self._inner is None:
            self._inner = []
        self._inner.append(span)

    @property
    def start(self) -> Moment:
        return Moment(self._host, self._start, self._stream)

    @property
    def end(self) -> Moment | None:
        """None where it is open."""
        return self._stopped or (Moment(self._stop) if self._stop else None)

    @property
    def inner(self) -> Sequence[Span]:
        """Those that ran inside."""
        return self._inner or ()

    def host_ms(self) -> float:
        """Without the spans inside."""
        assert self.end is not None
        return self.start.ms_to(self.end) - sum([s.start.ms_to(s.end) for s in self.inner if s.end is not None])

    def device_ms(self) -> float:
        """Without the spans inside that were on the same stream."""
        assert self.end is not None
        same = [s for s in self.inner if s._stream == self._stream]
        return self.start.device_ms_to(self.end) - sum([s.start.device_ms_to(s.end) for s in same if s.end is not None])

    def all(self) -> Iterable[Span]:
        """This one, and those inside."""
        yield self
        for span in self.inner:
            yield from span.all()


class Spans:
    """The spans of a step, one in another."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.outer: list[Span] = []
        """Those that are in no other."""
        self.open: list[Span] = []
        """From the outermost to the innermost."""

    def begin(self, phase: Phase, name: str = "", at: Moment | None = None) -> Span:
        """Opens a span in the one that is open, if any."""
        if self.clock.on_gpu:
            torch.cuda.nvtx.range_push(f"igb_kernels: {name or phase.value}")  # type: ignore[no-untyped-call]
        span = Span(phase, name or phase.value, at or self.clock.now())
        if self.open:
            self.open[-1].add(span)
        else:
            self.outer.append(span)
        self.open.append(span)
        return span

    def end(self, span: Span, at: Moment | None = None) -> Moment:
        """Closes a span, and what an error has left open in it."""
        moment = at or self.clock.now()
        while self.open:
            last = self.open.pop()
            last.close(moment)
            if self.clock.on_gpu:
                torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]
            if last is span:
                break
        return moment
