"""A figure of a run: bandwidth against the copy, and speed-ups over the rivals. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from igb_kernels.bench.cases import number
from igb_kernels.bench.measure import COPY
from igb_kernels.bench.results import Measurement, Results

try:
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("a figure of results needs matplotlib: pip install matplotlib") from error

ROW = 0.34
"""Inches for a measurement."""
PANEL = 1.2
"""Inches around them."""
OURS = (COPY, "native call")
"""No rivals: a floor, and a part of our own time."""


def draw(results: Results) -> Figure:
    """For each suite a row of panels: speed-ups, and GB/s where memory is what counts."""
    suites = list(dict.fromkeys(m.suite for m in results.measurements))
    groups = [[m for m in results.measurements if m.suite == suite] for suite in suites]
    heights = [PANEL + ROW * len(group) for group in groups] or [PANEL]
    figure = Figure(figsize=(13, sum(heights) + 0.5), layout="constrained")
    machine = results.machine
    figure.suptitle(f"{machine['device']}, threads: {machine['threads']}, torch {machine['torch']}", fontsize="medium")
    if not groups:
        return figure
    rows = figure.subfigures(len(groups), 1, height_ratios=heights, squeeze=False)[:, 0]
    for suite, group, row in zip(suites, groups, rows, strict=True):
        moves = any(m.gb_per_s is not None for m in group)
        panels = row.subplots(1, 2 if moves else 1, sharey=True, squeeze=False)[0]
        _speed_ups(panels[-1], group, f"{suite}: times as fast as")
        if moves:
            _bandwidth(panels[0], group, f"{suite}: GB/s")
        panels[0].set_yticks(range(len(group)), _labels(group))
        panels[0].set_ylim(len(group) - 0.4, -0.6)  # the first is on top
    return figure


def _labels(group: Sequence[Measurement]) -> list[str]:
    """What tells them apart."""
    several = {key: len({getattr(m, key) for m in group}) > 1 for key in ("params", "dtype")}
    return [
        ", ".join(
            [m.name, *([m.model] if m.model else []), f"K = {m.tasks}"]
            + ([f"D = {number(m.params)}"] if several["params"] else [])
            + ([m.dtype] if several["dtype"] else [])
        )
        for m in group
    ]


def _speed_ups(axes: Any, group: Sequence[Measurement], title: str) -> None:
    rivals = list(dict.fromkeys(name for m in group for name in m.rivals if name not in OURS))
    height = 0.8 / max(len(rivals), 1)
    for i, rival in enumerate(rivals):
        found = [(y, r.speed_up) for y, m in enumerate(group) if (r := m.rivals.get(rival)) and r.speed_up is not None]
        ys = [y - 0.4 + (i + 0.5) * height for y, _ in found]
        # From 1, where both are as fast.
        axes.barh(ys, [s - 1 for _, s in found], height, left=1, color=f"C{i}", label=rival)
        wrong = [
            y - 0.4 + (i + 0.5) * height for y, m in enumerate(group) if rival in m.rivals and y not in dict(found)
        ]
        axes.plot([1] * len(wrong), wrong, "x", color=f"C{i}", markersize=5)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_title(f"{title} (×: results disagree)", fontsize="small")
    axes.grid(axis="x", linewidth=0.3)
    if rivals:
        axes.legend(frameon=False, fontsize="small", loc="best")


def _bandwidth(axes: Any, group: Sequence[Measurement], title: str) -> None:
    known = [(y, m) for y, m in enumerate(group) if m.moved_bytes is not None]
    axes.barh([y for y, _ in known], [m.gb_per_s for _, m in known], 0.7, color="C7", label="ours")
    copies = [
        (y, m.moved_bytes / m.rivals[COPY].timing.ms / 1e6) for y, m in known if COPY in m.rivals and m.moved_bytes
    ]
    axes.plot([rate for _, rate in copies], [y for y, _ in copies], "|", color="black", markersize=12, label="copy")
    axes.set_title(title, fontsize="small")
    axes.grid(axis="x", linewidth=0.3)
    axes.legend(frameon=False, fontsize="small", loc="best")
