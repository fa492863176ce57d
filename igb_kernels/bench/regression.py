"""Whether something has become slower since a baseline, by ratios that do not depend on the machine's speed.

An operation is compared with the copy of as many bytes, a step with its K bare passes, a solver with the reference
backend, each measured between its own rounds, then and now.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from igb_kernels.bench.results import Measurement, Rival
from igb_kernels.printing import Section

FLOORS = {
    "ops": ("copy",),
    "scaling": ("copy",),
    "step": ("passes",),
    "solvers": ("reference", "native call"),
}
"""What each suite's measurements are compared with: the first that both have. In other suites, that is any rival."""
TOLERANCES = {"ops": 0.25, "scaling": 0.25, "step": 0.15, "solvers": 0.5}
OTHERS = 0.25
"""By how much a ratio may grow beyond the spread."""

Key = tuple[object, ...]


@dataclass(frozen=True)
class Change:
    """Of a ratio, ours to its floor; larger is slower."""

    name: str
    floor: str
    before: float
    now: float
    allowed: float
    """The ratio from which on it counts as slower, were it measured without spread."""
    worse: bool
    note: str = ""

    @property
    def factor(self) -> float:
        """How many times as large it is."""
        return self.now / self.before


@dataclass
class Comparison:
    """Of two runs."""

    changes: list[Change] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """Those that came to the same as their floor's or the truth's before, and do no longer."""
    missing: list[str] = field(default_factory=list)
    """In the baseline, of suites that have run, and not measured now."""
    incomparable: list[str] = field(default_factory=list)
    """Those that have no ratio, and why."""

    @property
    def worse(self) -> list[Change]:
        """What has become slower, the worst first."""
        return sorted((c for c in self.changes if c.worse), key=lambda c: -c.factor)

    @property
    def right(self) -> bool:
        """Whether something was compared, and nothing of it is slower or wrong."""
        return bool(self.changes) and not self.worse and not self.wrong

    def sections(self) -> list[Section]:
        """For a terminal."""
        rows = [(c.name, c.floor, f"{c.before:.3g}", f"{c.now:.3g}", f"{c.factor:.2f}×") for c in self.worse]
        notes = [f"{name}: results disagree, and did not before." for name in self.wrong]
        notes += [f"Not compared: {said}" for said in self.incomparable]
        notes += [f"In the baseline, and not measured now: {name}." for name in self.missing]
        count = len(self.changes)
        if not self.changes:
            notes.append("Nothing could be compared with the baseline.")
        elif self.right:
            notes.append(f"None of {count} is slower than in the baseline.")
        else:
            notes.append(f"{len(self.worse)} of {count} slower than in the baseline, {len(self.wrong)} wrong.")
        columns = ("slower than before", "time over", ">then", ">now", ">change")
        return [Section("Compared with the baseline", columns if rows else (), rows, notes)]


def compare(baseline: Iterable[Measurement], now: Iterable[Measurement]) -> Comparison:
    """What of the baseline was measured again, and how it went. Something is slower where the lower quartile of its
    ratio is above the upper quartile that it had, by more than its suite's tolerance."""
    before, after = {_key(m): m for m in baseline}, {_key(m): m for m in now}
    suites = {m.suite for m in after.values()}
    found = Comparison()
    for key, old in before.items():
        new = after.get(key)
        if new is not None:
            _compare(old, new, found)
        elif old.suite in suites:
            found.missing.append(called(old))
    return found


def called(m: Measurement) -> str:
    """A measurement, for people."""
    sizes = [f"K = {m.tasks}", *([f"D = {m.params:,}"] if m.params else []), *([m.model] if m.model else [])]
    return f"{m.suite} {m.name} ({', '.join([*sizes, m.dtype, m.device, m.backend])})"


def _compare(old: Measurement, new: Measurement, found: Comparison) -> None:
    name = called(old)
    floors = FLOORS.get(old.suite, tuple(old.rivals))
    floor = next((f for f in floors if f in old.rivals and f in new.rivals), None)
    if floor is None:
        found.incomparable.append(f"{name}: it has no floor in both runs.")
        return
    before, now = _ratio(old.rivals[floor]), _ratio(new.rivals[floor])
    if before is None:
        found.incomparable.append(f"{name}: its results disagreed in the baseline.")
    elif now is None:
        found.wrong.append(name)
    else:
        spread = old.timing.high / old.timing.ms / (new.timing.low / new.timing.ms)
        allowed = before * (1 + TOLERANCES.get(old.suite, OTHERS)) * spread
        found.changes.append(Change(name, floor, before, now, allowed, now > allowed))


def _ratio(floor: Rival) -> float | None:
    return None if not floor.speed_up else 1 / floor.speed_up


def _key(m: Measurement) -> Key:
    """What makes two measurements the same."""
    return m.suite, m.name, m.tasks, m.params, m.dtype, m.device.partition(":")[0], m.backend, m.model
