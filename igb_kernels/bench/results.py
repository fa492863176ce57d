"""What was measured, where, and the file it is kept in."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1


@dataclass(frozen=True)
class Timing:
    """Of one call, over rounds."""

    ms: float
    """The median."""
    low: float
    """The lower quartile, ms."""
    high: float
    """The upper quartile, ms."""
    rounds: int
    host_ms: float | None = None
    """Where the others are a GPU's time: the median of the host's, until the call returns."""

    @staticmethod
    def of(seconds: Sequence[float], host: Sequence[float] = ()) -> Timing:
        """From the rounds' times in seconds, and the host's where they are a GPU's."""
        ms = [1e3 * s for s in seconds]
        low, _, high = statistics.quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else (*ms, *ms, *ms)
        host_ms = 1e3 * statistics.median(host) if host else None
        return Timing(statistics.median(ms), low, high, len(ms), host_ms)


@dataclass(frozen=True)
class Rival:
    """Something that does the same, measured between our rounds."""

    timing: Timing
    speed_up: float | None
    """Their time over ours, the median of the rounds' ratios (of one that is slower by far and so has few rounds, the
    ratio of the medians); None where the results disagree."""
    error: float | None = None
    """How far its result is from the float64 truth, relative; None: there is nothing to compare (a copy)."""
    note: str = ""
    """Why there is no speed-up, or what else there is to say."""
    extra_bytes: int | None = None
    """As for a measurement."""


@dataclass(frozen=True)
class Measurement:
    """One thing at one size."""

    suite: str
    """"ops", "solvers", "step" or "scaling"."""
    name: str
    """The operation, the solver's name, or the balancer ("igb_v1+nash_mtl")."""
    tasks: int
    params: int
    """Elements of the shared parameters (0 for a solver)."""
    dtype: str
    device: str
    backend: str
    timing: Timing
    error: float | None = None
    """How far our result is from the float64 truth, relative."""
    moved_bytes: int | None = None
    """What an ideal implementation reads and writes; None where memory is not what counts."""
    model: str | None = None
    rivals: dict[str, Rival] = field(default_factory=dict)
    """By name: "copy" (of `moved_bytes`), "reference", "eager", "torchjd", "libmtl"; of a step also "passes" (the K
    bare ones), "passes + copy" (of K gradients), and "with forward" (ours, as other libraries' steps are timed)."""
    note: str = ""
    """Why our own result counts as wrong; there are no speed-ups then."""
    extra_bytes: int | None = None
    """Of a step: its peak memory beyond that of the K bare passes; None where it was not measured."""

    @property
    def gb_per_s(self) -> float | None:
        """10⁹ bytes a second."""
        return None if self.moved_bytes is None else self.moved_bytes / self.timing.ms / 1e6

    @property
    def of_copy(self) -> float | None:
        """The fraction of the bandwidth that a copy of as many bytes has in the same rounds."""
        copy = self.rivals.get("copy")
        return None if copy is None else copy.speed_up


@dataclass(frozen=True)
class Results:
    """A run: what was measured, and where and with what."""

    machine: dict[str, Any]
    """Device, CPU, cores, threads, driver, versions, backends, peers."""
    commit: str
    command: str
    date: str
    """ISO 8601, UTC."""
    measurements: list[Measurement]

    def to_json(self) -> str:
        """What `load` reads."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1)

    def save(self, path: Path) -> None:
        """As JSON."""
        path.write_text(self.to_json() + "\n")

    @staticmethod
    def load(path: Path) -> Results:
        """What `save` wrote; ValueError where the file is something else."""
        found = json.loads(path.read_text())
        if not isinstance(found, dict) or found.pop("schema", None) != SCHEMA:
            raise ValueError(f"{path} must be a result of `python -m igb_kernels bench` (schema {SCHEMA})")
        try:
            return Results(**{**found, "measurements": [_measurement(m) for m in found["measurements"]]})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a whole result of `bench`: {type(error).__name__}: {error}") from error


def _measurement(found: dict[str, Any]) -> Measurement:
    rivals = {name: Rival(**{**r, "timing": Timing(**r["timing"])}) for name, r in found["rivals"].items()}
    return Measurement(**{**found, "timing": Timing(**found["timing"]), "rivals": rivals})
