"""Writes README's tables from the files in `benchmarks/results/`.

    python -m benchmarks.readme [--check]

A table is between `<!-- table: NAME -->` and `<!-- end -->`. With `--check` nothing is written: it says which tables
are stale, and exits with 1 where any is.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from statistics import mean, stdev

from igb_kernels.bench.results import Measurement, Results

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
FOLDER = ROOT / "benchmarks" / "results"
MACHINE = "cpu-2-cores"
MARKED = re.compile(r"(?<=<!-- table: )(?P<name>[\w-]+)(?P<open> -->\n).*?(?=<!-- end -->)", re.DOTALL)
NOTHING, OTHERWISE = "–", "≠"


def rewritten(text: str) -> str:
    """The text with all of its tables as the files have them."""
    if unknown := {m["name"] for m in MARKED.finditer(text)} - TABLES.keys():
        raise ValueError(f"tables must be among {', '.join(TABLES)}; found {', '.join(unknown)}")
    return MARKED.sub(lambda m: f"{m['name']}{m['open']}\n{TABLES[m['name']]()}\n\n", text)


def stale(text: str) -> list[str]:
    """The names of tables that are not as the files have them, or are not there."""
    found = {m["name"]: m.group() for m in MARKED.finditer(text)}
    fresh = {m["name"]: m.group() for m in MARKED.finditer(rewritten(text))}
    return [name for name in TABLES if name not in found or found[name] != fresh[name]]


def main(arguments: Sequence[str] | None = None) -> int:
    """1 where a table is stale, with `--check`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; say what is stale")
    options = parser.parse_args(arguments)
    text = README.read_text(encoding="utf-8")
    names = stale(text)
    if options.check:
        for name in names:
            print(f"{README.name}: table {name} is stale: python -m benchmarks.readme", file=sys.stderr)
        return 1 if names else 0
    README.write_text(rewritten(text), encoding="utf-8")
    print(f"{README.name}: " + (", ".join(names) or "nothing has changed"))
    return 0


# ---- Files --------------------------------------------------------------------------------------------------------


@cache
def results(name: str) -> Results:
    """A file of `bench`."""
    return Results.load(_path(name))


@cache
def other(name: str) -> dict:
    """A file of another kind."""
    return json.loads(_path(name).read_text())


def _path(name: str) -> Path:
    return FOLDER / f"{MACHINE}-{name}.json"


def found(file: str, /, **wanted: object) -> Measurement | None:
    """The measurement of which all of this is true."""
    these = [m for m in results(file).measurements if all(getattr(m, key) == value for key, value in wanted.items())]
    if len(these) > 1:
        raise ValueError(f"{_path(file)} has {len(these)} measurements with {wanted}")
    return these[0] if these else None


def ms_of(m: Measurement | None, who: str) -> float | None:
    """Of ours ("") or a rival."""
    if m is None or (who and who not in m.rivals):
        return None
    return m.timing.ms if not who else m.rivals[who].timing.ms


def disagrees(m: Measurement | None, who: str) -> bool:
    """Whether a rival has no speed-up, because it comes to something else."""
    return m is not None and who in m.rivals and m.rivals[who].speed_up is None


# ---- Markdown -----------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[str]], below: str) -> str:
    """With a line below it."""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    lines.insert(1, "|---" * len(header) + "|")
    return "\n".join([*lines, "", below]).replace("|  |", "| |")


def joined(values: Iterable[float | None], written: Callable[[float], str]) -> str:
    """One for each K."""
    return " / ".join(NOTHING if value is None else written(value) for value in values)


def source(name: str) -> str:
    """Where a table is from, and how to make it again."""
    if name == "qm9":
        file = other(name)
        threads, commit = file["threads"], None
    elif name == "memory":
        file = other(name)
        threads, commit = file["machine"]["threads"], file["commit"]
    else:
        file = {"command": results(name).command}
        threads, commit = results(name).machine["threads"], results(name).commit
    how = f"{threads} thread{'' if threads == 1 else 's'}" + (f", commit {commit}" if commit else "")
    return f"`{MACHINE}-{name}.json` ({how}): `{file['command']}`"


# ---- Tables -------------------------------------------------------------------------------------------------------


def machine() -> str:
    """What all files have in common."""
    machines = [results(name).machine for name in ("ops", "step", "solvers", "integrations")]
    versions = [m["torch"] for m in machines] + [other("memory")["machine"]["torch"], other("qm9")["torch"]]
    cpus, cores = ([m[key] for m in machines] for key in ("cpu", "cores"))
    kernels = [found[1] for m in machines if (found := re.search(r"\((.*?)\)", m["backends"]["cpu"]))]
    torch = [version.partition("+")[0] for version in versions]
    cpu, core, kernel, version = (" and ".join(sorted(set(map(str, v)))) for v in (cpus, cores, kernels, torch))
    return (
        f"Medians on {core} cores of an {cpu} ({kernel} kernels), torch {version}, float32; files are in "
        f"`{FOLDER.relative_to(ROOT)}/`."
    )


def ops() -> str:
    """The streaming operations."""
    rows = [
        ("Gramian and weighted sum", "gram+combine", ""),
        ("PyTorch (cat, stack, mm, mv, split)", "gram+combine", "eager"),
        ("copying about as many bytes", "gram+combine", "copy"),
        ("DB-MTL's moving averages and norms", "ema", ""),
        ("the same in PyTorch", "ema", "eager"),
    ]

    def cell(name: str, who: str, tasks: int) -> str:
        return joined([ms_of(found("ops", name=name, tasks=tasks, dtype="float32"), who)], lambda ms: f"{ms:.0f} ms")

    params = {m.params for m in results("ops").measurements}
    header = f"gradients of ResNet-50: {max(params) / 1e6:.1f} million elements in 156 tensors"
    return table(
        [header, "K = 3", "K = 8"],
        [[label, *(cell(name, who, tasks) for tasks in (3, 8))] for label, name, who in rows],
        source("ops"),
    )


MODELS = {"mlp-33k": "MLP, 33 thousand", "mlp-5.8m": "MLP, 5.8 million", "cnn-4.7m": "CNN, 4.7 million"}


def step() -> str:
    """Over the bare passes."""
    rows = {"IGBv1 + Nash-MTL": "igb_v1+nash_mtl", "IGBv1 + IMTL-G": "igb_v1+imtl_g", "IGBv1 + EMTL": "igb_v1+emtl",
            "DB-MTL (beta 0.9)": "db_mtl", "DB-MTL (beta 0)": "db_mtl-beta0"}  # fmt: skip

    def over_passes(name: str, model: str, tasks: int) -> float | None:
        m = found("step", name=name, model=model, tasks=tasks)
        passes = None if m is None else m.rivals["passes"].speed_up
        return None if passes is None else 1 / passes

    def with_copy(model: str, tasks: int) -> float | None:
        m = found("step", name="igb_v1+nash_mtl", model=model, tasks=tasks)
        both, passes = ms_of(m, "passes + copy"), ms_of(m, "passes")
        return None if both is None or passes is None else both / passes

    def line(label: str, value: Callable[[str, int], float | None]) -> list[str]:
        cells = [joined([value(model, tasks) for tasks in (3, 8)], lambda v: f"{v:.2f}") for model in MODELS]
        return [label, *cells]

    lines = [line(f"{label}, K = 3 / 8", lambda model, k, name=name: over_passes(name, model, k))
             for label, name in rows.items()]  # fmt: skip
    lines.append(line("the passes and one copy of K gradients", with_copy))
    return table(["whole step / its K bare backward passes", *MODELS.values()], lines, source("step"))


def memory() -> str:
    """Peaks in gradients of the shared parameters; of the steps in a row, the largest."""
    rows = {
        "Gramian methods (Nash-MTL, IMTL-G, UPGrad), EMTL, GradDrop": (
            "nash_mtl", "imtl_g", "upgrad", "emtl", "grad_drop"),
        "the same with `bank_dtype=torch.bfloat16`": ("nash_mtl, bfloat16 bank", "grad_drop, bfloat16 bank"),
        "DB-MTL (beta 0)": ("db_mtl, beta=0",),
        "DB-MTL (beta 0.9), MoCo": ("db_mtl, beta=0.9", "moco"),
        "ExcessMTL": ("excess_mtl",),
        "TorchJD's NashMTL, UPGrad, IMTLG: defaults": ("TorchJD NashMTL", "TorchJD UPGrad", "TorchJD IMTLG"),
        "the same with its memory options": tuple(f"TorchJD {n}, thrifty" for n in ("NashMTL", "UPGrad", "IMTLG")),
        "LibMTL's IMTL": ("LibMTL IMTL",),
    }  # fmt: skip
    peaks = {(row["model"], row["tasks"], row["step"]): row["over_passes"] for row in other("memory")["steps"]}
    models = ["mlp-5.8m", "cnn-4.7m"]

    def cell(steps: Sequence[str], model: str) -> str:
        return joined([max(peaks[model, k, step] for step in steps) for k in (3, 8)], lambda v: f"{v:.1f}")

    header = "peak memory beyond K bare passes, in gradients of the shared parameters, K = 3 / 8"
    return table(
        [header, *(MODELS[model] for model in models)],
        [[label, *(cell(steps, model) for model in models)] for label, steps in rows.items()],
        source("memory"),
    )


def solvers() -> str:
    """Those that other libraries have, too."""
    sizes = (3, 8, 16, 64)
    solves = [m for m in results("solvers").measurements if m.dtype == "float64"]
    compared = sorted({m.name for m in solves if m.rivals.keys() & {"torchjd", "libmtl"}})

    def one(name: str, tasks: int, who: str) -> str:
        m = found("solvers", name=name, tasks=tasks, dtype="float64")
        ms = ms_of(m, who)
        return NOTHING if ms is None else _microseconds(ms) + OTHERWISE * disagrees(m, who)

    def cell(name: str, who: str) -> str:
        return " / ".join(one(name, tasks, who) for tasks in sizes)

    rows = [[f"`{name}`", *(cell(name, who) for who in ("native call", "", "torchjd", "libmtl"))] for name in compared]
    rest = [m.timing.ms for m in solves if m.name not in compared and m.tasks == 8]
    said = f"The methods without a row take at most {_microseconds(max(rest))} µs from Python at K = 8." if rest else ""
    header = [f"µs a solve, K = {' / '.join(map(str, sizes))}", "native call", "from Python", "TorchJD", "LibMTL"]
    return table(header, rows, _explained(rows, f"{source('solvers')}. {said}"))


def _explained(rows: Sequence[Sequence[str]], below: str) -> str:
    return below + f" {OTHERWISE}: comes to other weights." * any(OTHERWISE in cell for row in rows for cell in row)


def _microseconds(ms: float) -> str:
    us = 1e3 * ms
    return f"{ms:.0f} ms" if us >= 1e4 else f"{us:.0f}" if us >= 10 else f"{us:.2g}"


def loops() -> str:
    """Steps in other libraries' training loops."""
    models = {**MODELS, "qm9-schnet": "QM9's SchNet, 59 thousand"}
    sizes = (3, 8, 11)
    suites = {"torchjd": "torchjd_step", "libmtl": "libmtl"}

    def one(rival: str, name: str, model: str, tasks: int) -> str:
        m = found("integrations", suite=suites[rival], name=name, model=model, tasks=tasks)
        if m is None or rival not in m.rivals:
            return NOTHING
        ratio = m.rivals[rival].speed_up
        return OTHERWISE if ratio is None else f"{ratio:.1f}"

    rows = []
    for rival, library in (("torchjd", "TorchJD"), ("libmtl", "LibMTL")):
        for name in sorted({m.name for m in results("integrations").measurements if rival in m.rivals}):
            cells = [" / ".join(one(rival, name, model, tasks) for tasks in sizes) for model in models]
            rows.append([f"{library}: `{name}`", *cells])
    header = [f"K = {' / '.join(map(str, sizes))}", *models.values()]
    return table(header, rows, _explained(rows, source("integrations") + "."))


def qm9() -> str:
    """What methods reach, and how long steps take."""
    methods = other("qm9")["methods"]
    columns = {"alone": "{}", "with DB-MTL": "{}+db_mtl", "with Nash-MTL": "{}+nash_mtl"}

    def name(rule: str, column: str) -> str:
        return columns[column].format(rule).removeprefix("equal+")

    def quality(rule: str, column: str) -> str:
        values = methods[name(rule, column)]["delta_m_against_single_task"]
        return f"{mean(values):+.1f} ± {stdev(values):.1f}"

    def time(rule: str, column: str) -> str:
        ms = methods[name(rule, column)]["step_ms"]
        return f"{ms['mean']:.1f} ({ms['median']:.1f})"

    labels = {
        quality: ("Δm against 11 single-task networks: equal weights (in front of DB-MTL: log)", "IGBv1", "IGBv2"),
        time: ("ms a step, mean (median): equal weights", "IGBv1", "IGBv2, its agent learning on a thread"),
    }
    rows = [[label, *(value(rule, column) for column in columns)] for value, names in labels.items()
            for label, rule in zip(names, ("equal", "igb_v1", "igb_v2"), strict=True)]  # fmt: skip
    return table(["", *columns], rows, source("qm9"))


TABLES: dict[str, Callable[[], str]] = {
    "machine": machine,
    "ops": ops,
    "step": step,
    "memory": memory,
    "solvers": solvers,
    "loops": loops,
    "qm9": qm9,
}

if __name__ == "__main__":
    sys.exit(main())
