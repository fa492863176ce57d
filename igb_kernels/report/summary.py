"""What to read off, in sentences made from the numbers."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from igb_kernels.bench.results import Measurement, Rival
from igb_kernels.report.words import count, digits, number, several

PEERS = ("torchjd", "libmtl")
NAMES = {"torchjd": "TorchJD", "libmtl": "LibMTL", "eager": "plain PyTorch", "reference": "the reference backend",
         "passes": "the K bare passes", "copy": "a copy"}  # fmt: skip


OURS = frozenset({"with forward"})
"""Under rivals, other times of ours."""


def disagreements(measurements: Iterable[Measurement]) -> list[tuple[Measurement, str, Rival]]:
    """Rivals without a speed-up, since they come to something else than we or the truth."""
    return [
        (m, name, r) for m in measurements for name, r in m.rivals.items() if r.speed_up is None and name not in OURS
    ]


def is_step(m: Measurement) -> bool:
    """Whether it is a step of a model, of whichever suite."""
    return m.suite == "step" or m.model is not None


def sentences(measurements: Sequence[Measurement]) -> list[str]:
    """Two to four."""
    parts = (_wrong, _bandwidth, _steps, _rivals, _disagreements)
    said = [part(measurements) for part in parts]
    return [sentence for sentence in said if sentence]


def _wrong(measurements: Sequence[Measurement]) -> str:
    wrong = [m for m in measurements if m.note]
    return f"Our own results are wrong: {several([called(m) for m in wrong])}." if wrong else ""


def _bandwidth(measurements: Sequence[Measurement]) -> str:
    ops = [m for m in measurements if m.suite == "ops"] or list(measurements)
    most = {name: max(m.params for m in ops if m.name == name) for name in {m.name for m in ops}}
    known = [(m.of_copy, m) for m in ops if m.of_copy is not None and m.params == most[m.name]]
    if not known:
        return ""
    fractions = [fraction for fraction, _ in known]
    least, worst = min(known, key=lambda pair: pair[0])
    said = (
        f"Operations on gradients move {_range([100 * f for f in fractions])} % of the bytes a second that a copy does"
    )
    if len(known) > 1:
        said += f" ({called(worst)} the least, with {digits(100 * least, 2)} %)"
    return f"{said}."


def _steps(measurements: Sequence[Measurement]) -> str:
    ratios = [1 / s for m in measurements if is_step(m) and (s := _speed_up(m, "passes"))]
    if not ratios:
        return ""
    return f"A balanced step takes {_range(ratios, 3)} times as long as the K backward passes in it."


def _rivals(measurements: Sequence[Measurement]) -> str:
    said = []
    for suite, what in (
        ("step", "whole steps are"),
        ("solvers", "solvers are"),
        ("ops", "operations on gradients are"),
    ):
        of_suite = [m for m in measurements if (is_step(m) if suite == "step" else m.suite == suite)]
        rivals = [name for name in PEERS if any(name in m.rivals for m in of_suite)] or ["eager"]
        found = []
        for rival in rivals:
            ratios = [s for m in of_suite if (s := _speed_up(m, rival))]
            if ratios:
                slower = sum(s < 1 for s in ratios)
                found.append(f"{_range(ratios)} times as fast as {NAMES[rival]}"
                             + (f" (slower in {slower} of {len(ratios)} cases)" if slower else ""))  # fmt: skip
        if found:
            said.append(f"{what} {several(found)}")
    text = "; ".join(said)
    return f"{text[:1].upper()}{text[1:]}." if said else ""


def _disagreements(measurements: Sequence[Measurement]) -> str:
    found = disagreements(measurements)
    if not found:
        return ""
    names = sorted({NAMES.get(name, name) for _, name, _ in found})
    return (
        f"In {number(len(found), 'comparison')} ({several(names)}) there is no speed-up to give: see the notes there."
    )


def called(m: Measurement) -> str:
    """A measurement, briefly."""
    where = f" on {m.model}" if m.model else f", D = {count(m.params)}" if m.params else ""
    return f"{m.name}{where}, K = {m.tasks}, {m.dtype}"


def _speed_up(m: Measurement, rival: str) -> float | None:
    found = m.rivals.get(rival)
    return None if found is None else found.speed_up


def _range(values: Sequence[float], of: int = 2) -> str:
    low, median, high = (digits(of_all(values), of) for of_all in (min, statistics.median, max))
    return low if low == high else f"{low} to {high} (median {median})"
