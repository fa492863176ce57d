"""The page: what to read off, and then by machine all that was measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element

from igb_kernels.bench.results import Measurement
from igb_kernels.report import sections
from igb_kernels.report.files import Found, Run
from igb_kernels.report.nodes import html, node
from igb_kernels.report.style import STYLE
from igb_kernels.report.summary import sentences
from igb_kernels.report.words import number


def page(found: Found) -> str:
    """HTML that needs no other file."""
    chapters = _by_machine(found.runs)
    summary = [(machine, said) for machine, runs in chapters if (said := sentences(_newest(runs)))]
    head = node(
        "head", node("meta", charset="utf-8"),
        node("meta", name="viewport", content="width=device-width, initial-scale=1"),
        node("meta", name="color-scheme", content="light dark"),
        node("title", "igb_kernels: report of benchmarks"), node("style", STYLE),
    )  # fmt: skip
    body = node(
        "body", node("h1", "igb_kernels: what was measured"), _opening(found),
        _summary(summary, len(chapters) > 1),
        [element for machine, runs in chapters for element in _chapter(machine, runs)],
        _profiles(found), _tables(chapters), _skipped(found),
    )  # fmt: skip
    return html(node("html", head, body, lang="en"))


def _opening(found: Found) -> Element:
    files = len({run.name for run in found.runs} | {profile.name for profile in found.profiles})
    measured = sum(len(run.results.measurements) for run in found.runs)
    counts = (
        f"{number(measured, 'measurement')} and {number(len(found.profiles), 'profile')} from {number(files, 'file')}"
    )
    return node("p", f"{counts}. Times are medians; ratios are medians of the "
                "rounds' ratios. Point at a mark to read its numbers.", class_="soft")  # fmt: skip


def _summary(summary: Sequence[tuple[str, list[str]]], named: bool) -> Element | None:
    if not summary:
        return None
    said = [node("p", node("strong", f"{machine}: ") if named else None, " ".join(text)) for machine, text in summary]
    return node("section", said, class_="summary", aria_label="What to read off")


# ---- Machines -----------------------------------------------------------------------------------------------------


SAME = ("device", "cpu", "gpu", "cores", "threads", "driver", "torch", "igb_kernels")
"""What runs of a chapter have in common."""


def _by_machine(runs: Iterable[Run]) -> list[tuple[str, list[Run]]]:
    """Runs of one machine and its versions are a chapter."""
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.results.date):
        machine = {key: run.results.machine.get(key) for key in SAME}
        groups.setdefault(json.dumps(machine, default=str), []).append(run)
    return [(_called(group[-1].results.machine), group) for group in groups.values()]


def _called(machine: Mapping[str, Any]) -> str:
    device = machine.get("gpu") or machine.get("device") or machine.get("cpu") or "a machine"
    counts = [] if machine.get("gpu") else [(key, machine.get(key)) for key in ("cores", "threads")]
    said = [number(n, key[:-1]) if isinstance(n, int) else f"{n} {key}" for key, n in counts if n]
    return ", ".join([str(device), *said])


def _newest(runs: Sequence[Run]) -> list[Measurement]:
    """Of what was measured several times on a machine, the last; runs are in the order of their dates."""
    kept: dict[tuple[object, ...], Measurement] = {}
    for run in runs:
        for m in run.results.measurements:
            kept[m.suite, m.name, m.tasks, m.params, m.dtype, m.device, m.backend, m.model] = m
    return list(kept.values())


def _chapter(machine: str, runs: Sequence[Run]) -> list[Element]:
    measurements = _newest(runs)
    facts = [pair for name, value in runs[-1].results.machine.items() if value not in (None, {}, [], "")
             for pair in (node("dt", name), node("dd", _fact(value)))]  # fmt: skip
    return [
        node("h2", machine),
        node("dl", facts),
        *sections.bandwidth(measurements),
        *sections.scaling(measurements),
        *sections.solvers(measurements),
        *sections.steps(measurements),
    ]


def _fact(value: object) -> str | list[Element]:
    if isinstance(value, Mapping):
        return [node("div", f"{name}: {_plain(inner)}") for name, inner in value.items()]
    return _plain(value)


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


# ---- What follows -------------------------------------------------------------------------------------------------


def _profiles(found: Found) -> list[Element]:
    shown = [sections.profile(profile.name, profile.figures) for profile in found.profiles]
    return [node("h2", "Profiles"), *shown] if shown else []


def _tables(chapters: Sequence[tuple[str, Sequence[Run]]]) -> list[Element]:
    elements: list[Element] = []
    nth = 0
    for machine, runs in chapters:
        elements += [node("h3", machine)] if len(chapters) > 1 else []
        rows, listed = [], []
        for run in runs:
            nth += 1
            r = run.results
            rows += [(nth, m) for m in r.measurements]
            listed.append(node("li", f"Run {nth}: {run.name}, {r.date}, commit {r.commit}: ", node("code", r.command)))
        elements += [node("ul", listed), *sections.tables(rows)]
    return [node("h2", "All measurements"), *elements] if elements else []


def _skipped(found: Found) -> list[Element]:
    if not found.skipped:
        return []
    listed = [node("li", f"{name} {why}") for name, why in found.skipped.items()]
    return [node("h2", "Files that are not shown"), node("ul", listed)]
