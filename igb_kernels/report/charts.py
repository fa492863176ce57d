"""Charts as SVG. Colours are the page's: each look is a class of its style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from igb_kernels.report.nodes import node

WIDTH = 360.0
"""Of a chart in its own units, which are pixels on a narrow phone; it grows with its column."""
LINE = 12.0
"""The height of a line of text."""
CHARACTER = 6.8
"""The width of one, at most."""

Written = Callable[[float], str]


@dataclass(frozen=True)
class Line:
    """Points from left to right."""

    points: Sequence[tuple[float, float]]
    look: str
    labels: Sequence[str] = ()
    """What each point says under the pointer."""
    end: str = ""
    """Written behind the last point."""
    hollow: Sequence[bool] = ()
    """Which marks are."""


@dataclass(frozen=True)
class Axis:
    """Logarithmic."""

    name: str
    written: Written
    ticks: Sequence[float] | None = None
    """None: powers of ten, or 1, 2 and 5 times one where they are few."""
    least: tuple[float, float] | None = None
    """What it shows at least."""


class Scale:
    """From values to places."""

    def __init__(self, values: Iterable[float], start: float, end: float, margin: float = 0.04) -> None:
        logs = [math.log10(value) for value in values]
        low, high = min(logs), max(logs)
        pad = margin * (high - low) or 0.15
        self.low, self.high = low - pad, high + pad
        self._start, self._per = start, (end - start) / (self.high - self.low)

    def __call__(self, value: float) -> float:
        return self._start + (math.log10(value) - self.low) * self._per

    def ticks(self, fewest: int = 3) -> list[float]:
        """Round numbers in the range."""
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        for steps in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)):
            found = [s * 10.0**d for d in decades for s in steps if self.low <= d + math.log10(s) <= self.high]
            if len(found) >= fewest:
                break
        return found


def drawable(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that have logarithms."""
    return [p for p in points if all(math.isfinite(value) and value > 0 for value in p)]


def log_chart(title: str, lines: Sequence[Line], x: Axis, y: Axis, height: float = 240.0) -> Element | None:
    """Lines over logarithmic axes; None where there is nothing to draw."""
    shown = [line for line in lines if drawable(line.points)]
    if not shown:
        return None
    points = [p for line in shown for p in drawable(line.points)]
    top, bottom = 8.0, 34.0
    up = Scale([*(p[1] for p in points), *(y.least or ())], height - bottom, top)
    left = 8 + CHARACTER * max(len(y.written(value)) for value in up.ticks())
    right = 12 + CHARACTER * max(len(line.end) for line in shown)
    across = Scale([*(p[0] for p in points), *(x.least or ())], left, WIDTH - right)
    frame: list[Element] = []
    for value in up.ticks():
        at = up(value)
        frame += [node("line", class_="grid", x1=left, x2=WIDTH - right, y1=at, y2=at),
                  _label(y.written(value), left - 6, at + 4, "end")]  # fmt: skip
    for value in _without_overlap(x.ticks or across.ticks(), across, x.written):
        at = across(value)
        frame += [node("line", class_="grid", x1=at, x2=at, y1=top, y2=height - bottom),
                  _label(x.written(value), at, height - bottom + 15, "middle")]  # fmt: skip
    frame.append(_label(x.name, (left + WIDTH - right) / 2, height - 4, "middle", "axis"))
    marks = [mark for line in shown for mark in _drawn(line, across, up)]
    for place in sorted({drawable(line.points)[-1][0] for line in shown if line.end}):
        here = [(up(drawable(line.points)[-1][1]) + 4, line) for line in shown
                if line.end and drawable(line.points)[-1][0] == place]  # fmt: skip
        for at, line in _apart(here, top + 4, height - bottom):
            marks.append(_label(line.end, across(place) + 6, at, "start", f"end {line.look}"))
    return _figure(title, height, [*frame, *marks])


def _drawn(line: Line, across: Scale, up: Scale) -> list[Element]:
    points = drawable(line.points)
    path = "M" + "L".join(f"{across(a):.1f} {up(b):.1f}" for a, b in points)
    drawn = [node("path", d=path, class_=f"line {line.look}")]
    for point, says, hollow in zip(line.points, line.labels, line.hollow or [False] * len(line.labels), strict=False):
        if point in points:
            drawn.append(_mark(line.look + " hollow" * hollow, across(point[0]), up(point[1]), says))
    return drawn


def _mark(look: str, x: float, y: float, says: str) -> Element:
    said = node("title", says)
    shape = look.split()[0]
    if shape == "ours":
        return node("circle", said, class_=f"mark {look}", cx=x, cy=y, r=3.6)
    if shape in ("reference", "copy"):
        return node("rect", said, class_=f"mark {look}", x=x - 3, y=y - 3, width=6, height=6)
    if shape == "passes":
        return node("rect", said, class_=f"mark {look}", x=x - 1.5, y=y - 6, width=3, height=12)
    if shape == "torchjd":
        corners = f"M{x:.1f} {y - 4:.1f}l3.9 7h-7.8z"
        return node("path", said, class_=f"mark {look}", d=corners)
    if shape == "libmtl":
        return node("path", said, class_=f"mark {look}", d=f"M{x:.1f} {y - 4.4:.1f}l4.4 4.4l-4.4 4.4l-4.4-4.4z")
    return node("circle", said, class_=f"mark {look}", cx=x, cy=y, r=3)


def key(look: str) -> Element:
    """The mark of a look, for a legend."""
    line = node("path", d="M1 7H27", class_=f"line {look}")
    return node("svg", line, _mark(look, 14, 7, look), class_="key", viewBox="0 0 28 14", aria_hidden="true")


@dataclass(frozen=True)
class Row:
    """Of a chart of ratios."""

    name: str
    values: Sequence[tuple[str, float, str]]
    """Look, ratio, and what it says under the pointer."""
    without: Sequence[tuple[str, str]] = ()
    """Looks of what has no ratio, and why."""


def ratio_chart(title: str, rows: Sequence[Row], name: str, least: tuple[float, float]) -> Element | None:
    """Ratios on a logarithmic axis with a line at 1, a row for each thing; None where there is nothing to draw."""
    values = [value for row in rows for _, value, _ in row.values if math.isfinite(value) and value > 0]
    if not values and not any(row.without for row in rows):
        return None
    longest = 22
    left = 12 + CHARACTER * min(longest, max(len(row.name) for row in rows))
    right = 34.0 if any(row.without for row in rows) else 12.0
    top, each = 20.0, 20.0
    bottom = top + each * len(rows)
    across = Scale([*values, 1.0, *least], left, WIDTH - right)
    drawn: list[Element] = []
    clear = CHARACTER * 5
    ticks = [value for value in across.ticks() if value == 1 or abs(across(value) - across(1)) > clear]
    for value in _without_overlap(sorted({1.0, *ticks}), across, _times):
        at = across(value)
        drawn += [node("line", class_="one" if value == 1 else "grid", x1=at, x2=at, y1=top, y2=bottom),
                  _label(_times(value), at, top - 6, "middle")]  # fmt: skip
    for i, row in enumerate(rows):
        y = top + each * (i + 0.5)
        short = row.name if len(row.name) <= longest else row.name[: longest - 1] + "…"
        drawn.append(node("text", node("title", row.name), short, class_="row", x=left - 8, y=y + 4,
                          text_anchor="end"))  # fmt: skip
        drawn.append(node("line", class_="rule", x1=left, x2=WIDTH - right, y1=y, y2=y))
        drawn += [_mark(look, across(value), y, says) for look, value, says in row.values
                  if math.isfinite(value) and value > 0]  # fmt: skip
        for n, (look, why) in enumerate(row.without):
            drawn.append(node("text", node("title", why), "≠", class_=f"end {look}", x=WIDTH - right + 8 + 11 * n,
                              y=y + 4))  # fmt: skip
    drawn.append(_label(name, (left + WIDTH - right) / 2, bottom + 14, "middle", "axis"))
    return _figure(title, bottom + 20, drawn)


def bar(parts: Sequence[tuple[float, str, str]], whole: float, mark: float | None = None) -> Element:
    """A bar as wide as its place: parts of `whole`, each with its look and what it says, and a line at `mark`."""
    drawn, at = [], 0.0
    for part, look, says in parts:
        width = 100 * part / whole if whole > 0 and math.isfinite(part) else 0.0
        drawn.append(node("rect", node("title", says), class_=f"bar {look}" + " part" * (len(parts) > 1),
                          x=f"{at:.3f}%", y=1, width=f"{width:.3f}%", height=14))  # fmt: skip
        at += width
    if mark is not None and whole > 0:
        place = f"{100 * mark / whole:.3f}%"
        drawn.append(node("line", class_="one", x1=place, x2=place, y1=0, y2=16))
    return node("svg", drawn, class_="bars", width="100%", height=16, role="img",
                aria_label="; ".join(says for _, _, says in parts))  # fmt: skip


def _times(value: float) -> str:
    return f"{value:g}×"


def _label(text: str, x: float, y: float, anchor: str, look: str = "tick") -> Element:
    return node("text", text, class_=look, x=x, y=y, text_anchor=anchor)


def _without_overlap(ticks: Sequence[float], scale: Scale, written: Written) -> list[float]:
    kept: list[float] = []
    free = -math.inf
    for value in (value for value in ticks if value > 0):
        half = CHARACTER * len(written(value)) / 2 + 3
        if scale(value) - half >= free:
            kept.append(value)
            free = scale(value) + half
    return kept


def _apart(wanted: Sequence[tuple[float, Line]], top: float, bottom: float) -> list[tuple[float, Line]]:
    """Heights of labels, moved until no two overlap."""
    places: list[tuple[float, Line]] = []
    for at, line in sorted(wanted, key=lambda pair: pair[0]):
        lowest = places[-1][0] + LINE - 1 if places else top
        places.append((max(at, lowest), line))
    limit = bottom
    for i in reversed(range(len(places))):
        at, line = places[i]
        places[i] = (min(at, limit), line)
        limit = places[i][0] - LINE + 1
    return places


def _figure(title: str, height: float, drawn: Sequence[Element]) -> Element:
    return node("svg", drawn, class_="chart", viewBox=f"0 0 {WIDTH:g} {height:g}", role="img", aria_label=title)
