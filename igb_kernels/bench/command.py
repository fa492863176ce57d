"""`python -m igb_kernels bench`: what to measure, progress while it is measured, and a table at the end."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import cast

import torch

from igb_kernels.backends import NAMES as BACKENDS
from igb_kernels.backends import backends, resolve
from igb_kernels.bench import peers
from igb_kernels.bench.cases import Case, Options, Suite, number
from igb_kernels.bench.machine import results
from igb_kernels.bench.measure import COPY, Harness
from igb_kernels.bench.models import ALL, LONGEST, MODELS
from igb_kernels.bench.regression import compare
from igb_kernels.bench.results import Measurement, Results, Rival
from igb_kernels.bench.scaling import sections as laws
from igb_kernels.ops import DTYPES, MAX_TASKS
from igb_kernels.printing import Section, plain, show

SUITES = ("ops", "solvers", "step", "scaling")
BY_DEFAULT = tuple(name for name in SUITES if name != "scaling")
SECONDS = 60.0
LEAST_SECONDS = 0.02
"""Of a case."""
FIGURES = (".png", ".svg", ".pdf")
BUSY = 0.75
"""Of the cores: with a larger load, times are not to be trusted."""


def suite(name: str) -> Suite:
    """Its module."""
    return cast(Suite, import_module(f"igb_kernels.bench.{name}"))


# ---- Options ------------------------------------------------------------------------------------------------------


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Those of the command."""
    names = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
    add = command.add_argument
    command.usage = "%(prog)s [suite ...] [options]"
    add("suites", nargs="*", type=_one_of("suite", SUITES), metavar="suite",
        help=f"of {', '.join(SUITES)} (default: {', '.join(BY_DEFAULT)}, as with --quick)")  # fmt: skip
    add("--tasks", type=_many(_tasks), default=(), metavar="K,...", help="numbers of tasks")
    add(
        "--params",
        type=_many(_params),
        default=(),
        metavar="D,...",
        help="elements of the shared parameters: 1e6,23.5e6",
    )
    add("--dtype", type=_many(_one_of("dtype", names)), default=("float32",), metavar="NAME,...",
        help=f"of {', '.join(names)} (default: float32)")  # fmt: skip
    add("--device", type=_device, default=None, help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--backend", type=_one_of("backend", ("auto", *BACKENDS)), default="auto", help="ours (default: auto)")
    add("--methods", type=_many(str), default=(), metavar="NAME,...", help="operations, methods, rules (default: all)")
    add("--models", type=_many(_one_of("model", (*MODELS, ALL))), default=(), metavar="NAME,...",
        help=f"of steps: {', '.join(MODELS)}; or all of at most {LONGEST:g} s (default: the first 3)")  # fmt: skip
    add("--compare", type=_compare, default=("all",), metavar="NAME,...",
        help=f"other libraries: {', '.join(peers.MODULES)}; all that are installed (default), or none")  # fmt: skip
    add("--seconds", type=_seconds, default=SECONDS,
        help="how long all may take, about: there is a least number of rounds (default: %(default)g)")  # fmt: skip
    add("--memory", action="store_true", help="also the peak memory of steps, beyond that of the K backward passes")
    add("--quick", action="store_true", help="small sizes, and the best-known methods")
    add("--save", type=_in_folder(".json"), metavar="PATH.json", help="where to keep the results")
    add("--baseline", type=Path, action="append", default=[], metavar="PATH.json",
        help="runs to compare with, by ratios to copy, passes and reference; exit code 1 where slower")  # fmt: skip
    add("--figure", type=_in_folder(*FIGURES), metavar="PATH.png", help="where to draw them; also .svg and .pdf")


def options_of(given: argparse.Namespace) -> tuple[tuple[str, ...], Options, list[str]]:
    """The suites, their options, and remarks on what is left out; ValueError where something does not fit."""
    suites = tuple(dict.fromkeys(given.suites)) or BY_DEFAULT
    device = given.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device: PyTorch finds no GPU; cuda: {backends()['cuda'].detail}")
    try:
        resolve(given.backend, device.type)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"--backend: {error}") from error
    for method in given.methods:
        if not any(suite(name).accepts(method) for name in suites):
            known = "; ".join(f"{name}: {', '.join(suite(name).names())}" for name in suites)
            raise ValueError(f"--methods must be of what the suites have, found {method!r}. There are {known}")
    there = peers.installed()
    asked = there if given.compare == ("all",) else [] if given.compare == ("none",) else given.compare
    remarks = [f"{name} is not installed: not compared" for name in asked if name not in there]
    options = Options(
        tasks=given.tasks,
        params=given.params,
        dtypes=tuple(getattr(torch, name) for name in given.dtype),
        device=device,
        backend=given.backend,
        methods=given.methods,
        models=given.models,
        memory=given.memory,
        peers=tuple(name for name in asked if name in there),
        quick=given.quick or not given.suites,
    )
    return suites, options, remarks


def _many(one: Callable[[str], object]) -> Callable[[str], tuple[object, ...]]:
    def parse(text: str) -> tuple[object, ...]:
        return tuple(one(part.strip()) for part in text.split(",") if part.strip())

    return parse


def _one_of(kind: str, names: Sequence[str] | dict[str, torch.dtype]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{kind} must be one of {', '.join(names)}, found {text!r}")
        return text

    return parse


def _number(text: str, rule: str, least: float, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not (least <= value <= most and isfinite(value)):
        raise argparse.ArgumentTypeError(f"must be {rule}, found {text!r}")
    return value


def _tasks(text: str) -> int:
    value = _number(text, f"a number of tasks, 1 to {MAX_TASKS}", 1, MAX_TASKS)
    if value != int(value):
        raise argparse.ArgumentTypeError(f"must be whole numbers of tasks, found {text!r}")
    return int(value)


def _params(text: str) -> int:
    return int(_number(text, "a number of elements, 1 or more", 1, 1e12))


def _seconds(text: str) -> float:
    return _number(text, "a number of seconds, more than 0", 1e-9, 1e9)


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from error
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, found {text!r}")
    return device


def _compare(text: str) -> tuple[str, ...]:
    if text in ("all", "none"):
        return (text,)
    found = _many(_one_of("a library", (*peers.MODULES, "all", "none")))(text)
    if "all" in found or "none" in found:
        raise argparse.ArgumentTypeError(f"all and none stand alone, found {text!r}")
    return cast("tuple[str, ...]", found)


def _in_folder(*suffixes: str) -> Callable[[str], Path]:
    """A file that can be written at the end; better to know before."""

    def parse(text: str) -> Path:
        path = Path(text)
        if path.suffix not in suffixes:
            raise argparse.ArgumentTypeError(f"must end in {' or '.join(suffixes)}, found {text!r}")
        if not path.absolute().parent.is_dir():
            raise argparse.ArgumentTypeError(f"must be in a folder that is there, found {text!r}")
        return path

    return parse


# ---- The command --------------------------------------------------------------------------------------------------


def run(given: argparse.Namespace) -> int:
    """Measures, prints and saves; 1 where our results are wrong, or something is slower than in the baseline."""
    try:
        suites, options, remarks = options_of(given)
        baseline = [m for path in given.baseline for m in Results.load(path).measurements]
    except (OSError, ValueError) as error:
        given.error(str(error))
    if given.figure is not None and find_spec("matplotlib") is None:
        remarks.append("matplotlib is not installed: no figure")
    if options.device.type == "cuda" and options.device.index is not None:
        torch.cuda.set_device(options.device)
    harness = Harness(options.device)
    harness.remarks += remarks
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > BUSY * cores:
        harness.remark(f"the machine is busy (load {load:.1f}, {cores} cores), from which long calls suffer most")
    cases = [case for name in suites for case in suite(name).cases(options)]
    found = results(list(measured(cases, harness, given.seconds)), given.line, options.device)
    if given.save is not None:
        found.save(given.save)
    if given.figure is not None and find_spec("matplotlib") is not None:
        from igb_kernels.bench.figure import draw

        draw(found).savefig(given.figure)
    compared = compare(baseline, found.measurements) if given.baseline else None
    wrong = [f"{m.name}, K = {m.tasks}, {m.dtype}: {m.note}" for m in found.measurements if m.note]
    if given.json:
        print(found.to_json())
        for remark in [*harness.remarks, *wrong]:
            print(remark, file=sys.stderr)
    else:
        show(sections(found, harness.remarks) + laws(found.measurements) + (compared.sections() if compared else []))
    if compared is not None and given.json:
        print(plain(compared.sections()), file=sys.stderr)
    return 1 if wrong or (compared is not None and not compared.right) else 0


def measured(cases: Sequence[Case], harness: Harness, seconds: float) -> Iterator[Measurement]:
    """Runs the cases, each with its part of what is left of the time; what comes before an interruption is kept."""
    end, beside = time.monotonic() + seconds, 0.0
    with progress(len(cases)) as advance:
        for i, case in enumerate(cases):
            began = time.monotonic()
            part = (end - began) / (len(cases) - i)
            harness.seconds = max(part - beside, LEAST_SECONDS)
            try:
                measurement = case.run(harness)
            except torch.OutOfMemoryError:
                harness.remark(f"{case.label}: out of memory")
                measurement = None
            except KeyboardInterrupt:
                harness.remark(f"interrupted at {case.label}: {len(cases) - i} of {len(cases)} are missing")
                return
            took = time.monotonic() - began
            # What a case takes beside its rounds, the mean so far: preparing, comparing results, the least rounds.
            beside += (max(took - harness.seconds, 0.0) - beside) / (i + 1)
            advance(case.label, took)
            if measurement is not None:
                yield measurement


@contextmanager
def progress(count: int) -> Iterator[Callable[[str, float], None]]:
    """What tells of each case that is done: a bar in a terminal where rich is installed, else a line; on stderr."""
    if find_spec("rich") is None or not sys.stderr.isatty():
        done = 0

        def line(label: str, seconds: float) -> None:
            nonlocal done
            done += 1
            print(f"[{done}/{count}] {label}: {seconds:.1f} s", file=sys.stderr, flush=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=count)
        yield lambda label, seconds: bar.update(task, advance=1, description=label)


# ---- The table ----------------------------------------------------------------------------------------------------


def sections(found: Results, remarks: Sequence[str] = ()) -> list[Section]:
    """A table of each suite."""
    machine = found.machine
    where = f"{machine['device']}, threads: {machine['threads']}, torch {machine['torch']}, commit {found.commit}"
    parts = [
        Section(where, notes=["Median and quartiles of a call; × is their time over ours: above 1, ours is faster."])
    ]
    for name in dict.fromkeys(m.suite for m in found.measurements):
        parts.append(_table(name, [m for m in found.measurements if m.suite == name]))
    return [*parts, Section("Remarks", notes=remarks)] if remarks else parts


def _table(name: str, measurements: Sequence[Measurement]) -> Section:
    rivals = list(dict.fromkeys(rival for m in measurements for rival in m.rivals if rival != COPY))
    columns: dict[str, Callable[[Measurement], str]] = {
        "name": lambda m: m.name,
        "model": lambda m: m.model or "",
        ">K": lambda m: str(m.tasks),
        ">D": lambda m: number(m.params) if m.params else "",
        "dtype": lambda m: m.dtype,
        ">median": lambda m: duration(m.timing.ms),
        ">quartiles": lambda m: f"{duration(m.timing.low)} – {duration(m.timing.high)}",
        ">host": lambda m: "" if m.timing.host_ms is None else duration(m.timing.host_ms),
        ">GB/s": lambda m: "" if m.gb_per_s is None else f"{m.gb_per_s:.3g}",
        ">of copy": lambda m: "" if m.of_copy is None else f"{100 * m.of_copy:.0f} %",
        **{f">× {rival}": lambda m, rival=rival: _speed_up(m.rivals.get(rival)) for rival in rivals},  # type: ignore[misc]
        ">error": lambda m: "" if m.error is None else f"{m.error:.0e}",
    }
    cells = {column: [of(m) for m in measurements] for column, of in columns.items()}
    kept = [column for column, values in cells.items() if any(values)]
    rows = list(zip(*(cells[column] for column in kept), strict=True))
    notes = [
        f"{m.name}, K = {m.tasks}, {m.dtype}, {name}: {rival.note}"
        for m in measurements
        for name, rival in m.rivals.items()
        if rival.speed_up is None
    ]
    notes += dict.fromkeys(
        f"{name}: {rival.note}"
        for m in measurements
        for name, rival in m.rivals.items()
        if rival.speed_up and rival.note
    )
    notes += [
        f"{m.name}, K = {m.tasks}, {m.model}: peak memory beyond the bare passes, in gradients: "
        + ", ".join(f"{who} {extra / (4 * m.params):.1f}" for who, extra in held.items())
        for m in measurements
        if (held := _held(m))
    ]
    backend = ", ".join(dict.fromkeys(f"{m.backend} on {m.device}" for m in measurements))
    return Section(f"{name} ({backend})", kept, rows, notes)


def _held(m: Measurement) -> dict[str, int]:
    """Bytes beyond the bare passes, of ours and the rivals."""
    held = {"ours": m.extra_bytes, **{name: rival.extra_bytes for name, rival in m.rivals.items()}}
    return {name: extra for name, extra in held.items() if extra is not None}


def _speed_up(rival: Rival | None) -> str:
    if rival is None:
        return ""
    return "≠" if rival.speed_up is None else f"{rival.speed_up:.3g}"


def duration(ms: float) -> str:
    """In the unit that fits."""
    for unit, size in (("s", 1e3), ("ms", 1.0)):
        if ms >= size:
            return f"{ms / size:.3g} {unit}"
    return f"{1e3 * ms:.3g} µs"
