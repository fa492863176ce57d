"""The report's sections, each of the measurements that it shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any
from xml.etree.ElementTree import Element

from igb_kernels.bench.fits import Fit, fit
from igb_kernels.bench.results import Measurement, Rival
from igb_kernels.report.charts import Axis, Line, Row, bar, drawable, key, log_chart, ratio_chart
from igb_kernels.report.nodes import node
from igb_kernels.report.summary import NAMES, OURS, disagreements, is_step
from igb_kernels.report.words import count, digits, power, size, time, time_at_tick

LOOKS = {"copy": "copy", "reference": "reference", "eager": "eager", "torchjd": "torchjd", "libmtl": "libmtl",
         "passes": "passes", "native": "native", "native call": "native"}  # fmt: skip
RAMP = 6
TIME = Axis("", time_at_tick)
TASKS = "tasks K"
PARAMS = "elements D"


def look_of(rival: str) -> str:
    """The class of a rival's colour and mark."""
    return LOOKS.get(rival.lower(), "other")


def ramp(i: int, of: int) -> str:
    """The class of the i-th of so many colours in order."""
    return f"k{round(i * (RAMP - 1) / max(of - 1, 1))}"


def section(title: str, said: str, *parts: Element | None) -> list[Element]:
    """A heading, a sentence, and what there is; nothing where there is nothing."""
    there = [part for part in parts if part is not None]
    return [node("h3", title), node("p", said, class_="soft"), *there] if there else []


def _charts(figures: Iterable[Element | None]) -> Element | None:
    there = [figure for figure in figures if figure is not None]
    return node("div", there, class_="charts") if there else None


def _figure(title: str, chart: Element | None, *caption: Element | str) -> Element | None:
    said = node("figcaption", list(caption)) if caption else None
    return None if chart is None else node("figure", node("h4", title), chart, said)


def legend(looks: dict[str, str]) -> Element | None:
    """Marks by name, in the order of `LOOKS`."""
    return node("ul", [node("li", key(look), name) for name, look in looks.items()], class_="legend") if looks else None


def _rivals_in(measurements: Iterable[Measurement]) -> dict[str, str]:
    found = {name for m in measurements for name in m.rivals} - OURS
    order = list(LOOKS)
    names = sorted(found, key=lambda name: (order.index(name.lower()) if name.lower() in order else 99, name))
    return {NAMES.get(name, name): look_of(name) for name in names}


def kind(m: Measurement, among: Sequence[Measurement]) -> str:
    """Name, dtype of gradients, and the device and the backend where there are several."""
    words = [m.name, *([m.dtype] if m.params else [])]
    words += [m.device] if len({other.device for other in among}) > 1 else []
    words += [m.backend] if len({other.backend for other in among}) > 1 else []
    return ", ".join(words)


def _groups(
    measurements: Sequence[Measurement], by: Callable[[Measurement], str]
) -> list[tuple[str, list[Measurement]]]:
    return [(name, list(group)) for name, group in groupby(sorted(measurements, key=by), key=by)]


def says(m: Measurement, who: str = "igb_kernels", ms: float | None = None) -> str:
    """For under the pointer."""
    at = f"K = {m.tasks}" + (f", D = {count(m.params)}" if m.params else "")
    return f"{who}: {time(m.timing.ms if ms is None else ms)} ({at})"


# ---- Bandwidth ----------------------------------------------------------------------------------------------------


def bandwidth(measurements: Sequence[Measurement]) -> list[Element]:
    """GB/s against the copy's."""
    known = [m for m in measurements if m.gb_per_s is not None and m.of_copy is not None]
    bars = [m for m in known if m.suite != "scaling"]
    curves = [m for m in known if m.suite == "scaling"]
    several = sorted({m.tasks for m in curves})
    looks = {"a copy": "copy", **{f"K = {tasks}": ramp(i, len(several)) for i, tasks in enumerate(several)}}
    return section(
        "Bandwidth: the roof is a copy",
        "Bytes that an ideal implementation reads and writes, over the time it took; the line is a copy that moves as "
        "many bytes, measured between the same rounds. More than a copy is possible: reading is cheaper than writing.",
        _bandwidth_table(bars),
        legend(looks) if curves else None,
        _charts(_bandwidth_chart(*group, several) for group in _groups(curves, lambda m: kind(m, curves))),
    )  # fmt: skip


def _bandwidth_table(measurements: Sequence[Measurement]) -> Element | None:
    if not measurements:
        return None
    whole = max([1.0, *(m.of_copy for m in measurements if m.of_copy is not None)]) * 1.02
    rows = []
    for m in sorted(measurements, key=lambda m: (m.dtype, m.device, m.name, m.params, m.tasks)):
        rate, fraction = digits(m.gb_per_s or 0.0), m.of_copy or 0.0
        part = f"{digits(100 * fraction)} %"
        drawn = bar([(fraction, "ours", f"{rate} GB/s, {part} of the copy's")], whole, mark=1.0)
        sizes = [number(str(m.tasks)), number(count(m.params)), number(size(m.moved_bytes or 0))]
        place = node("td", drawn, class_="wide")
        rows.append([node("td", kind(m, measurements)), *sizes, place, number(rate), number(part)])
    return table([("", ""), ("K", "number"), ("D", "number"), ("moves", "number"), ("", "wide"),
                  ("GB/s", "number"), ("of copy", "number")], rows, "barred")  # fmt: skip


def _bandwidth_chart(title: str, group: Sequence[Measurement], several: Sequence[int]) -> Element | None:
    lines = []
    for i, tasks in enumerate(several):
        inner = sorted((m for m in group if m.tasks == tasks), key=lambda m: m.moved_bytes or 0)
        points = [(float(m.moved_bytes or 0), m.gb_per_s or 0.0) for m in inner]
        labels = [f"K = {m.tasks}, D = {count(m.params)}: {digits(m.gb_per_s or 0)} GB/s" for m in inner]
        lines.append(Line(points, ramp(i, len(several)), labels))
    copies = sorted((float(m.moved_bytes or 0), (m.moved_bytes or 0) / m.rivals["copy"].timing.ms / 1e6) for m in group)
    lines.insert(0, Line(copies, "copy", [f"copy of {size(a)}: {digits(b)} GB/s" for a, b in copies]))
    return _figure(title, log_chart(f"{title}: GB/s over bytes moved", lines, Axis("bytes moved", size),
                                    Axis("", "{:.2g} GB/s".format)))  # fmt: skip


# ---- Scaling ------------------------------------------------------------------------------------------------------


def scaling(measurements: Sequence[Measurement]) -> list[Element]:
    """Over K and D."""
    known = [m for m in measurements if m.suite == "scaling" and m.params]
    figures = [_scaling_of(title, group) for title, group in _groups(known, lambda m: kind(m, known))]
    return section(
        "Scaling in K and D",
        "Points are medians; dotted lines are what was fitted to them: the overhead of a call and a power law. A "
        "task's gradients are 156 tensors; where all would fit in the caches, those are emptied before each call.",
        *figures,
    )


def _scaling_of(title: str, group: Sequence[Measurement]) -> Element:
    law = fit((m.tasks, m.params, m.timing.ms) for m in group)
    pair = node("div", _over(title, group, law, tasks=False), _over(title, group, law, tasks=True), class_="pair")
    return node("figure", node("h4", title), pair, node("figcaption", _law(law, group)), class_="spaced")


def _over(title: str, group: Sequence[Measurement], law: Fit | None, *, tasks: bool) -> Element | None:
    """Over K, a line for each D, or the other way around."""

    def across(m: Measurement) -> int:
        return m.tasks if tasks else m.params

    def beside(m: Measurement) -> int:
        return m.params if tasks else m.tasks

    values = sorted({beside(m) for m in group})
    lines: list[Line] = []
    for i, value in enumerate(values):
        inner = sorted((m for m in group if beside(m) == value), key=across)
        look = ramp(i, len(values))
        points = [(float(across(m)), m.timing.ms) for m in inner]
        # Without an exponent of D, the law is that of the largest.
        known = law is not None and (law.params is not None or (tasks and value == values[-1]))
        if law is not None and known and len(drawable(points)) > 1:
            lines.append(Line([(float(across(m)), law.ms(m.tasks, m.params)) for m in inner], f"{look} law"))
        lines.append(Line(points, look, [says(m) for m in inner], _elements(value) if tasks else f"K={value}"))
    ticks = sorted({float(m.tasks) for m in group}) if tasks else None
    x = (
        Axis(f"{TASKS}, a line for each D", "{:g}".format, ticks)
        if tasks
        else Axis(f"{PARAMS}, a line for each K", _elements)
    )
    return log_chart(f"{title}: time over {'K' if tasks else 'D'}", lines, x, TIME)


def _elements(value: float) -> str:
    return power(value) if str(int(value)).rstrip("0") == "1" else count(value)


def _law(law: Fit | None, group: Sequence[Measurement]) -> list[Element | str]:
    if law is None:
        return ["Too few of these times leave the constant overhead behind to fit a law."]
    where = "" if law.params else f" at D = {count(max(m.params for m in group))}"
    said: list[Element | str] = [formula(law), f"{where}, from {law.points} points. "]
    for tasks in dict.fromkeys([min(m.tasks for m in group), max(m.tasks for m in group)]):
        overhead, end = law.overhead_ms(tasks), law.overhead_ends(tasks)
        if overhead:
            until = f", the work longer than that from D = {count(end)} on" if end is not None else ""
            said.append(f"With {tasks} tasks a call takes {time(overhead, 2)} however few the elements{until}. ")
    return said


def formula(law: Fit) -> Element:
    """Of the power law."""
    parts: list[Element | str] = ["time ∝ "]
    for i, (name, exponent) in enumerate((n, e) for n, e in (("K", law.tasks), ("D", law.params)) if e is not None):
        parts += [" · " if i else "", name, node("sup", str(exponent))]
    return node("span", parts, class_="law-text")


# ---- Solvers ------------------------------------------------------------------------------------------------------


def solvers(measurements: Sequence[Measurement]) -> list[Element]:
    """Over K, with all that find the same weights; those that nobody else has in a table."""
    known = [m for m in measurements if m.suite == "solvers"]
    peers = {m.name for m in known for name in m.rivals if look_of(name) not in ("reference", "native")}
    drawn = [m for m in known if m.name in peers or not peers]
    everything = [ms for m in drawn for ms in (m.timing.ms, *(r.timing.ms for r in m.rivals.values()))]
    finite = [ms for _, ms in drawable((1.0, ms) for ms in everything)]
    least = (min(finite), max(finite)) if finite else None
    figures = [_solver(title, group, least) for title, group in _groups(drawn, lambda m: kind(m, known))]
    return section(
        "Solvers over K",
        "One K×K solve, all on one scale. Hollow marks: it comes to other weights, and there is no speed-up.",
        legend({"igb_kernels": "ours", **_rivals_in(drawn)}) if drawn else None,
        _charts(figures),
        _solver_table([m for m in known if m not in drawn]),
    )


def _solver_table(measurements: Sequence[Measurement]) -> Element | None:
    if not measurements:
        return None
    several = sorted({m.tasks for m in measurements})
    times = {(kind(m, measurements), m.tasks): time(m.timing.ms) for m in measurements}
    rows = [
        [node("td", title), *(number(times.get((title, tasks), "–")) for tasks in several)]
        for title in sorted({title for title, _ in times})
    ]
    return table([("from Python", ""), *((f"K = {tasks}", "number") for tasks in several)], rows)


def _solver(title: str, group: Sequence[Measurement], least: tuple[float, float] | None) -> Element | None:
    inner = sorted(group, key=lambda m: m.tasks)
    lines = [_rival_line(name, inner) for name in {name: None for m in inner for name in m.rivals}]
    lines.append(Line([(float(m.tasks), m.timing.ms) for m in inner], "ours", [says(m) for m in inner]))
    native = next((name for m in inner for name in m.rivals if look_of(name) == "native"), None)
    timed = [(m, m.timing.ms if native is None else m.rivals[native].timing.ms) for m in inner
             if native is None or native in m.rivals]  # fmt: skip
    law = fit((m.tasks, 0, ms) for m, ms in timed)
    caption: list[Element | str] = []
    if law is not None:
        caption = [formula(law), ", native call" if native else "", f", from {law.points} points."]
    x = Axis(TASKS, "{:g}".format, sorted({float(m.tasks) for m in inner}))
    chart = log_chart(f"{title}: time over K", lines, x, Axis("", time_at_tick, None, least), 200)
    return _figure(title, chart, *caption, *_wrong(inner))


def _rival_line(name: str, measurements: Sequence[Measurement]) -> Line:
    there = [(m, m.rivals[name]) for m in measurements if name in m.rivals]
    return Line([(float(m.tasks), r.timing.ms) for m, r in there], look_of(name),
                [says(m, NAMES.get(name, name), r.timing.ms) + _ratio_words(r) for m, r in there],
                hollow=[r.speed_up is None for _, r in there])  # fmt: skip


def _ratio_words(rival: Rival) -> str:
    return ", no speed-up: " + (rival.note or "?") if rival.speed_up is None else f", {digits(rival.speed_up)}×"


def _wrong(measurements: Sequence[Measurement]) -> list[Element | str]:
    """What there is no speed-up over, and why, by name and rival."""
    groups: dict[tuple[str, str], list[tuple[Measurement, Rival]]] = {}
    for m, name, r in disagreements(measurements):
        groups.setdefault((m.name, name), []).append((m, r))
    several = len({m.name for m in measurements}) > 1
    said: list[Element | str] = []
    for (method, name), found in groups.items():
        where = f"{f'{method}, ' if several else ''}K = {', '.join(str(m.tasks) for m, _ in found)}"
        why = found[0][1].note or "results disagree"
        more = f" (at K = {found[0][0].tasks})" if len(found) > 1 else ""
        strong = node("span", "No speed-up", class_="wrong")
        said.append(node("div", strong, f" over {NAMES.get(name, name)} at {where}: {why}{more}"))
    return said


# ---- Steps --------------------------------------------------------------------------------------------------------


def steps(measurements: Sequence[Measurement]) -> list[Element]:
    """Speed-ups of whole steps, by model."""
    known = [m for m in measurements if is_step(m)]
    first, others = ([m for m in known if (m.suite == "step") is own] for own in (True, False))
    figures = [_steps_of(title, group) for title, group in [*_groups(first, _model), *_groups(others, _model)]]
    return section(
        "Whole steps and peers",
        "How many times as long the same step takes elsewhere. The K bare backward passes are the floor: at 1× "
        "balancing would be free. ≠: results disagree, and there is no speed-up.",
        legend(_rivals_in(known)) if known else None,
        _charts(figures),
    )  # fmt: skip


def _model(m: Measurement) -> str:
    suite = "" if m.suite == "step" else f"{m.suite}: "
    return suite + ", ".join([*([m.model] if m.model else []), *([f"{count(m.params)} shared"] if m.params else [])])


def _steps_of(title: str, group: Sequence[Measurement]) -> Element | None:
    inner = sorted(group, key=lambda m: (m.name, m.dtype, m.device, m.backend, m.tasks))
    several = len({(m.dtype, m.device, m.backend) for m in inner}) > 1
    rows = []
    for m in inner:
        known = [(look_of(n), r.speed_up, f"{NAMES.get(n, n)}: {digits(r.speed_up)}× ({time(r.timing.ms)}; ours "
                  f"{time(m.timing.ms)})") for n, r in m.rivals.items() if r.speed_up is not None]  # fmt: skip
        without = [(look_of(n), f"{NAMES.get(n, n)}: {r.note}") for _, n, r in disagreements([m])]
        name = f"{m.name}, K={m.tasks}" + (f", {m.dtype}, {m.device}, {m.backend}" if several else "")
        rows.append(Row(name, known, without))
    chart = ratio_chart(f"{title}: speed-ups", rows, "times as fast", (0.8, 2.0))
    return _figure(title, chart, *_wrong(inner))


# ---- Profiles -----------------------------------------------------------------------------------------------------

PARTS = {
    "forward": "k0",
    "loss scales": "other",
    "taking gradients": "eager",
    "rest of the balancer": "torchjd",
    "Gramian and norms": "ours",
    "averages": "k3",
    "solver": "native",
    "combine": "libmtl",
    "between backward and optimizer": "reference",
    "optimizer": "reference",
}
"""Looks of a step's parts; backward passes have names of tasks in theirs."""


def profile(name: str, figures: dict[str, Any]) -> Element:
    """A step's parts, ours and with the reference backend."""
    ours = [(label, ms) for label, ms in _merged(figures["parts"]) if ms > 0]
    by_name = {c["name"]: c for c in figures["compared"]}
    theirs = [(label, float(by_name[label]["reference_ms"]) if label in by_name else ms) for label, ms in ours]
    whole, slower = (sum(ms for _, ms in parts) for parts in (ours, theirs))
    widest = max(whole, slower)
    rows = [[node("td", node("strong", "a step")), _place(ours, widest), number(time(whole)), number("100 %"),
             number(time(slower) if by_name else ""), number("")]]  # fmt: skip
    if by_name:
        label = node("td", "the same with the reference backend")
        rows.append([label, _place(theirs, widest), *[number("")] * 2, number(time(slower)), number("")])
    for part, ms in ours:
        cells = [_place([(part, ms)], widest), number(time(ms)), number(f"{100 * ms / whole:.1f} %")]
        rows.append([node("td", part), *cells, *_reference(by_name.get(part))])
    header = [("", ""), ("", "wide"), ("time", "number"), ("share", "number"), ("reference", "number"),
              ("ratio", "number")]  # fmt: skip
    facts = (
        f"{figures['device']}, torch {figures['torch']}, {figures['tasks']} tasks, medians of {figures['steps']} steps"
    )
    said = [*figures["notes"], *figures["advice"]]
    listed = node("ul", [node("li", str(sentence)) for sentence in said]) if said else None
    source = node("p", f"{name}: {facts}.", class_="soft")
    return node(
        "figure", node("h4", str(figures["balancer"])), source, table(header, rows, "barred"), listed, class_="spaced"
    )


def _place(parts: Sequence[tuple[str, float]], whole: float) -> Element:
    """A cell with a bar of these parts."""
    drawn = [(ms, PARTS.get(label, "passes"), f"{label}: {time(ms)}") for label, ms in parts]
    return node("td", bar(drawn, whole), class_="wide")


def _reference(compared: dict[str, Any] | None) -> list[Element]:
    """Cells: its time, and the ratio if both came to the same."""
    if compared is None:
        return [number(""), number("")]
    agrees = compared["agree"]
    ratio = f"{digits(float(compared['ratio'] or 0.0))}×" if agrees else "results differ"
    look = "number" if agrees else "number wrong"
    return [number(time(float(compared["reference_ms"]))), node("td", ratio, class_=look)]


def _merged(parts: Sequence[dict[str, Any]]) -> list[tuple[str, float]]:
    """Backward passes are one part."""
    merged: dict[str, float] = {}
    passes = sum(1 for part in parts if str(part["name"]).startswith("backward pass"))
    for part in parts:
        name = str(part["name"])
        if name.startswith("backward pass") and passes > 1:
            name = f"{passes} backward passes"
        ms = part["host_ms"] if part["device_ms"] is None else part["device_ms"]
        merged[name] = merged.get(name, 0.0) + float(ms)
    return list(merged.items())


# ---- Tables -------------------------------------------------------------------------------------------------------


def number(text: str) -> Element:
    """A cell of a table."""
    return node("td", text, class_="number")


def table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[Element]], look: str = "full") -> Element:
    """Of cells; columns have names and classes. With the look "barred", where it is narrow, a bar has a line of its own
    and cells have the names of their columns."""
    head = node("tr", [node("th", name, class_=kind or None, scope="col") for name, kind in columns])
    lines = [list(row) for row in rows]
    for cell, (name, _) in ((c, column) for line in lines for c, column in zip(line, columns, strict=True)):
        if look == "barred" and name:
            cell.set("data-name", name)
    inner = node("table", node("thead", head), node("tbody", [node("tr", line) for line in lines]), class_=look)
    return node("div", inner, class_="scroll", tabindex="0")


def tables(measurements: Sequence[tuple[int, Measurement]]) -> list[Element]:
    """All of it, by suite; the numbers are those of the runs."""
    elements: list[Element] = []
    for suite in sorted({m.suite for _, m in measurements}):
        rows = [(run, m) for run, m in measurements if m.suite == suite]
        cells = {name: [cell(m) for _, m in rows] for name, (_, cell) in COLUMNS.items()}
        kept = [name for name, of_column in cells.items() if any(of_column)]
        columns = [*((name, COLUMNS[name][0]) for name in kept), ("run", "number")]
        body = [
            [*(node("td", cells[name][i] or "–", class_=look or None) for name, look in columns[:-1]), number(str(run))]
            for i, (run, _) in enumerate(rows)
        ]
        elements += [node("h4", suite), table(columns, body)]
    return elements


Cell = Callable[[Measurement], str | list[Element]]
COLUMNS: dict[str, tuple[str, Cell]] = {
    "name": ("", lambda m: m.name),
    "model": ("", lambda m: m.model or ""),
    "K": ("number", lambda m: str(m.tasks)),
    "D": ("number", lambda m: count(m.params) if m.params else ""),
    "dtype": ("", lambda m: m.dtype),
    "median": ("number", lambda m: time(m.timing.ms)),
    "quartiles": ("", lambda m: _quartiles(m.timing.low, m.timing.high)),
    "rounds": ("number", lambda m: str(m.timing.rounds)),
    "host": ("number", lambda m: "" if m.timing.host_ms is None else time(m.timing.host_ms)),
    "error": ("number", lambda m: "" if m.error is None else f"{m.error:.1e}"),
    "moves": ("number", lambda m: "" if m.moved_bytes is None else size(m.moved_bytes)),
    "GB/s": ("number", lambda m: "" if m.gb_per_s is None else digits(m.gb_per_s)),
    "peak over passes": ("number", lambda m: "" if m.extra_bytes is None else size(m.extra_bytes)),
    "rivals": ("", lambda m: [*_own_note(m), *(_rival(name, rival) for name, rival in m.rivals.items())]),
    "on": ("", lambda m: f"{m.device}, {m.backend}"),
}
"""Classes of their cells, and what is in them; columns of nothing are left out."""


def _own_note(m: Measurement) -> list[Element]:
    return [node("div", node("span", "wrong", class_="wrong"), f": {m.note}")] if m.note else []


def _quartiles(low: float, high: float) -> str:
    return f"{time(low)} – {time(high)}"


def _rival(name: str, r: Rival) -> Element:
    said = f"{NAMES.get(name, name)} {time(r.timing.ms)} ({_quartiles(r.timing.low, r.timing.high)}): "
    ratio = f"{digits(r.speed_up)}×" if r.speed_up is not None else node("span", "no speed-up", class_="wrong")
    if name in OURS:
        ratio = "ours"
    rest = [f"error {r.error:.1e}"] if r.error is not None else []
    rest += [f"peak {size(r.extra_bytes)} over the passes"] if r.extra_bytes is not None else []
    rest += [r.note] if r.note else []
    return node("div", said, ratio, "".join(f", {part}" for part in rest))
