"""What a folder has: results of benchmarks, profiles, and files that are neither."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from igb_kernels.bench.results import Measurement, Results

OF_A_PROFILE = {"balancer", "device", "torch", "tasks", "steps", "step_ms", "parts", "compared", "advice", "notes"}


@dataclass(frozen=True)
class Run:
    """A file of results."""

    name: str
    """The file, seen from the folder."""
    results: Results


@dataclass(frozen=True)
class Profile:
    """A profile, as `python -m igb_kernels profile --json` prints it."""

    name: str
    figures: dict[str, Any]


@dataclass
class Found:
    """All that is in a folder."""

    runs: list[Run] = field(default_factory=list)
    profiles: list[Profile] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """Why, by file."""


def find(folder: Path) -> Found:
    """Reads all `*.json` files in the folder and those below it.

    Raises:
        NotADirectoryError: for something that is no folder.
    """
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} must be a folder with results of `python -m igb_kernels bench`")
    found = Found()
    for path in sorted(folder.rglob("*.json")):
        name = path.relative_to(folder).as_posix()
        try:
            content = json.loads(path.read_text())
            if _is_profile(content):
                found.profiles += [Profile(name, _checked_profile(figures)) for figures in _each(content)]
            elif isinstance(content, dict) and "schema" in content:
                found.runs.append(Run(name, _checked(Results.load(path))))
            else:
                found.skipped[name] = "is neither a result of `bench` nor of `profile --json`"
        except (OSError, UnicodeDecodeError) as error:
            found.skipped[name] = f"cannot be read: {error}"
        except json.JSONDecodeError as error:
            found.skipped[name] = f"is not JSON: {error}"
        except ValueError as error:
            found.skipped[name] = str(error).removeprefix(f"{path} ")
    return found


def _each(content: Any) -> list[Any]:
    return content if isinstance(content, list) else [content]


def _is_profile(content: Any) -> bool:
    return bool(_each(content)) and all(isinstance(p, dict) and p.keys() >= OF_A_PROFILE for p in _each(content))


def _checked(results: Results) -> Results:
    for measurement in results.measurements:
        _must_be_numbers(_numbers(measurement), measurement.name)
    return results


def _checked_profile(figures: dict[str, Any]) -> dict[str, Any]:
    try:
        parts, compared = figures["parts"], figures["compared"]
        times = [part["host_ms"] if part["device_ms"] is None else part["device_ms"] for part in parts]
        times += [value for c in compared for value in (c["reference_ms"], c["ratio"] or 0.0)]
        [*figures["advice"], *figures["notes"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"is not a whole profile: {type(error).__name__}: {error}") from error
    _must_be_numbers(times, str(figures["balancer"]))
    return figures


def _must_be_numbers(values: Iterable[object], where: str) -> None:
    for value in values:
        if not isinstance(value, (int, float)):
            raise ValueError(f"has {value!r} where a number must be, in {where}")


def _numbers(measurement: Measurement) -> Iterator[object]:
    timings = [measurement.timing, *(rival.timing for rival in measurement.rivals.values())]
    yield from (value for timing in timings for value in (timing.ms, timing.low, timing.high, timing.rounds))
    yield from (measurement.tasks, measurement.params)
    some = [measurement.error, measurement.moved_bytes, measurement.extra_bytes]
    some += [
        value for rival in measurement.rivals.values() for value in (rival.speed_up, rival.error, rival.extra_bytes)
    ]
    yield from (value for value in some if value is not None)
