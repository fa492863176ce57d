"""Times contenders in turns, on the CPU by the clock and on a GPU by events, and compares what they compute."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import ceil, isfinite
from typing import Any

import torch

from igb_kernels.bench.machine import cache_bytes
from igb_kernels.bench.results import Measurement, Rival, Timing

COPY = "copy"


@dataclass(frozen=True)
class Contender:
    """Something to time, and how far what it computes is from the truth."""

    call: Callable[..., object]
    """Gets what `setup` returns."""
    error: Callable[[], float] | None = None
    """Runs it once, before the rounds, and returns the error of the result relative to the float64 truth (NaN counts as
    wrong); None: there is nothing to compare."""
    tolerance: float = 0.0
    """The largest error with which it counts as doing the same."""
    setup: Callable[[], tuple[Any, ...]] | None = None
    """Makes the arguments of each call, outside of the time; None: as for ours, or no arguments."""
    note: str = ""
    """What else there is to say of it; goes into the result."""
    foreign: bool = False
    """Other people's code: where it raises, it is left out, with a remark."""


@dataclass
class Rounds:
    """A contender's times in seconds, by round. Slow ones are not in every round."""

    seconds: dict[int, float] = field(default_factory=dict)
    host: list[float] = field(default_factory=list)
    """On a GPU, of the host, until the call returns."""

    def timing(self) -> Timing:
        """Over the rounds."""
        return Timing.of(list(self.seconds.values()), self.host)

    def over(self, ours: Rounds) -> float:
        """The median of the rounds' ratios to ours; of a slow one, with its few rounds, the ratio of the medians."""
        if len(self.seconds) == len(ours.seconds):
            return statistics.median(s / ours.seconds[i] for i, s in self.seconds.items())
        return statistics.median(self.seconds.values()) / statistics.median(ours.seconds.values())


class Harness:
    """Measures for about `seconds` each time, and at least `least_rounds` rounds.

    In a round, each contender has a turn; the next round goes in the other direction, so that nobody always comes after
    the same. Whatever else the machine does hits all alike, and ratios are those within a round. Contenders that take
    more than SLOW times as long as ours are in a few rounds only, and ours runs once, unmeasured, after them.

    On the CPU a turn is one call by the clock; where calls are short, and need no arguments, as many as fill BATCH. On
    a GPU a turn is two calls: one to an idle GPU for the host's time, and one between two events for the device's, to a
    GPU that was first given work for as long as the host needs to put the whole call on it, so that it never waits for
    the host, except where the call waits for it.
    """

    SLOW = 4.0
    SLOW_ROUNDS = 3
    MOST_ROUNDS = 1000
    BATCH = 2e-4
    LONG = 0.1
    """Seconds of a call that is not made more often than needed: to warm it up is its first round."""
    CYCLES_PER_SECOND = 2e9
    LONGEST_LEAD = 0.03

    def __init__(
        self, device: torch.device | str = "cpu", *, seconds: float = 1.0, least_rounds: int = 5, most_rounds: int = 0
    ) -> None:
        self.device = torch.device(device)
        self.seconds, self.least_rounds = seconds, least_rounds
        self.most_rounds = most_rounds or self.MOST_ROUNDS
        self.remarks: list[str] = []
        """What the results do not say: what was left out, and why."""
        self.rounds: list[float] = []
        """Our times in seconds in the last measurement."""
        self._cache: torch.Tensor | None = None

    def remark(self, text: str) -> None:
        """Keeps it, once."""
        if text not in self.remarks:
            self.remarks.append(text)

    def measure(
        self,
        ours: Contender,
        rivals: Mapping[str, Contender],
        *,
        suite: str,
        name: str,
        tasks: int,
        params: int,
        dtype: torch.dtype,
        backend: str,
        moved_bytes: int | None = None,
        model: str | None = None,
    ) -> Measurement:
        """Compares results, then times. With `moved_bytes`, memory is what is measured: a copy that reads and writes so
        many bytes in all is among the rivals, and where they fit in the caches, those are emptied before each call."""
        contenders = {"": ours, **rivals}
        if moved_bytes is not None and COPY not in contenders:
            contenders[COPY] = Contender(Copy(moved_bytes, self.device))
        errors: dict[str, float] = {}
        for key, contender in list(contenders.items()):
            try:
                if contender.error is not None:
                    errors[key] = contender.error()
                elif contender.foreign:
                    self._turn(contender, ours, cold=False).once()
            except Exception as raised:  # whatever another library raises
                if not contender.foreign:
                    raise
                self.remark(f"{key} is left out of {name}, K = {tasks}: {type(raised).__name__}: {raised}")
                del contenders[key]
        cold = moved_bytes is not None and moved_bytes < 4 * cache_bytes(self.device)
        rounds = self.compare(contenders, cold=cold)
        self.rounds = list(rounds[""].seconds.values())
        wrong = {key: _disagreement(errors.get(key), c.tolerance) for key, c in contenders.items()}

        def rival(key: str) -> Rival:
            reason = wrong[key] or (f"ours: {wrong['']}" if wrong[""] else "")
            note = "; ".join(filter(None, (reason, contenders[key].note)))
            speed_up = None if reason else rounds[key].over(rounds[""])
            return Rival(rounds[key].timing(), speed_up, error_of(key), note)

        def error_of(key: str) -> float | None:
            return error if (error := errors.get(key)) is not None and isfinite(error) else None  # JSON has no other

        return Measurement(
            suite=suite,
            name=name,
            tasks=tasks,
            params=params,
            dtype=str(dtype).removeprefix("torch."),
            device=str(self.device),
            backend=backend,
            timing=rounds[""].timing(),
            error=error_of(""),
            moved_bytes=moved_bytes,
            model=model,
            rivals={key: rival(key) for key in contenders if key},
            note=wrong[""],
        )

    def compare(self, contenders: Mapping[str, Contender], *, cold: bool = False) -> dict[str, Rounds]:
        """Times alone, by name; the first contender is ours. With `cold`, caches are emptied before each call."""
        names = list(contenders)
        ours = contenders[names[0]]
        turns = {name: self._turn(c, ours, cold) for name, c in contenders.items()}
        usual = {name: turn.warm() for name, turn in turns.items()}
        close = [name for name in names if usual[name] <= self.SLOW * usual[names[0]]]
        slow = [name for name in names if name not in close]
        rounds = {name: Rounds() for name in names}
        for name in names:
            if usual[name] >= self.LONG:  # to warm it up was a round
                rounds[name].seconds[0] = usual[name]

        def take(name: str) -> None:
            if i not in rounds[name].seconds:
                turns[name].take(i, rounds[name])

        began, slow_time, i = time.perf_counter(), sum(usual[name] for name in slow), 0
        while i < self.least_rounds or (time.perf_counter() - began < self.seconds and i < self.most_rounds):
            for name in close if i % 2 == 0 else close[::-1]:
                take(name)
            # Slow ones have their rounds as long as they take no more than the time in all, and one in any case.
            if slow and (i == 0 or (i < self.SLOW_ROUNDS and slow_time < self.seconds)):
                before = time.perf_counter()
                for name in slow:
                    take(name)
                slow_time += time.perf_counter() - before
                turns[names[0]].once()
            i += 1
        return rounds

    def _turn(self, contender: Contender, ours: Contender, cold: bool) -> _Turn:
        kind = _DeviceTurn if self.device.type == "cuda" else _Turn
        return kind(contender.call, contender.setup or ours.setup, self.empty_caches if cold else None)

    def empty_caches(self) -> None:
        """Writes more than the last level of cache holds."""
        if self._cache is None:
            self._cache = torch.empty(2 * cache_bytes(self.device), dtype=torch.uint8, device=self.device)
        self._cache.zero_()


class _Turn:
    """A contender's calls, by the clock."""

    def __init__(
        self,
        call: Callable[..., object],
        setup: Callable[[], tuple[Any, ...]] | None,
        empty_caches: Callable[[], None] | None,
    ) -> None:
        self._call, self._setup, self._empty_caches = call, setup, empty_caches
        self._batch = 1

    def _prepare(self) -> tuple[Any, ...]:
        """The arguments of a call."""
        arguments = () if self._setup is None else self._setup()
        if self._empty_caches is not None:
            self._empty_caches()
        return arguments

    def once(self) -> float:
        """Seconds of a batch of calls."""
        arguments, calls = self._prepare(), range(self._batch)
        start = time.perf_counter()
        for _ in calls:
            self._call(*arguments)
        return time.perf_counter() - start

    def warm(self) -> float:
        """Runs until it takes what it usually does; returns the seconds of a turn."""
        usual = self.once()
        if usual < Harness.LONG:
            usual = min(usual, self.once())
        if self._setup is None and self._empty_caches is None and usual < Harness.BATCH:
            usual = min([usual, *(self.once() for _ in range(5))])
            self._batch = ceil(Harness.BATCH / max(usual, 1e-7))
        return usual * self._batch

    def take(self, i: int, rounds: Rounds) -> None:
        rounds.seconds[i] = self.once() / self._batch


class _DeviceTurn(_Turn):
    """A contender's calls, by events and by the clock."""

    _lead = 0.0

    def _run(self, lead: float) -> tuple[float, float]:
        """Seconds of the host and of the device."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        arguments = self._prepare()
        torch.cuda.synchronize()
        torch.cuda._sleep(int(Harness.CYCLES_PER_SECOND * lead))  # type: ignore[no-untyped-call]
        start.record()
        began = time.perf_counter()
        self._call(*arguments)
        took = time.perf_counter() - began
        end.record()
        torch.cuda.synchronize()
        return took, 1e-3 * start.elapsed_time(end)

    def once(self) -> float:
        return self._run(0.0)[1]

    def warm(self) -> float:
        host, _ = self._run(0.0)
        if host < Harness.LONG:
            host, _ = self._run(0.0)
        self._lead = min(1.5 * host + 1e-4, Harness.LONGEST_LEAD)
        return self._run(self._lead)[1]

    def take(self, i: int, rounds: Rounds) -> None:
        rounds.host.append(self._run(0.0)[0])
        rounds.seconds[i] = self._run(self._lead)[1]


class Copy:
    """Reads and writes so many bytes in all, half and half, from a buffer of at most LARGEST."""

    LARGEST = 1 << 28

    def __init__(self, moved_bytes: int, device: torch.device) -> None:
        half = max(moved_bytes // 2, 1)
        size = min(half, max(self.LARGEST, 4 * cache_bytes(device)))
        self._source = torch.ones(size, dtype=torch.uint8, device=device)
        self._target = torch.zeros_like(self._source)
        self._whole, self._rest = divmod(half, size)

    def __call__(self) -> None:
        for _ in range(self._whole):
            self._target.copy_(self._source)
        if self._rest:
            self._target[: self._rest].copy_(self._source[: self._rest])


def _disagreement(error: float | None, tolerance: float) -> str:
    """Why an error is too large, or nothing; NaN is too large."""
    if error is None or error <= tolerance:
        return ""
    return f"results disagree: error {error:.1e}, at most {tolerance:.1e} counts as the same"
