"""How times grow with K and D: operations for K = 2 to 64 and D = 10⁴ to 10⁸ as far as memory allows, solvers over K,
and the power laws in them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from functools import partial

import torch

from igb_kernels.bench import solvers
from igb_kernels.bench.cases import Case, Options, chosen, number
from igb_kernels.bench.fits import Fit, fits
from igb_kernels.bench.gradients import Gradients
from igb_kernels.bench.machine import free_bytes
from igb_kernels.bench.measure import Harness
from igb_kernels.bench.ops import OPS, on, other_kernels
from igb_kernels.bench.results import Measurement
from igb_kernels.gradients import METHODS
from igb_kernels.printing import Section

STUDIED = ("gram", "combine", "sq_norms")
TASKS, QUICK_TASKS = (2, 4, 8, 16, 32, 64), (2, 8, 32)
PARAMS, QUICK_PARAMS = (10**4, 10**5, 10**6, 3 * 10**6, 10**7, 3 * 10**7, 10**8), (10**4, 10**5, 10**6)
QUICK_METHODS = ("imtl_g", "nash_mtl", "upgrad")
OF_MEMORY = 0.6
"""The most that gradients may take of what is free: they are written once, and others want memory, too."""


def names() -> Sequence[str]:
    """The operations and methods."""
    return [*STUDIED, *sorted(METHODS)]


def accepts(name: str) -> bool:
    """Whether it is one of them."""
    return name in names()


def cases(options: Options) -> Iterator[Case]:
    """Every operation at every D and K, and every method at every K."""
    several = options.tasks or (QUICK_TASKS if options.quick else TASKS)
    known = [*STUDIED, *QUICK_METHODS] if options.quick else names()
    asked = chosen(names() if options.methods else known, options)
    rows = _Rows(several, options.device)
    for dtype in options.dtypes:
        for params in options.params or (QUICK_PARAMS if options.quick else PARAMS):
            for tasks in several:
                for name in (name for name in asked if name in STUDIED):
                    label = f"{name}, K = {tasks}, D = {number(params)}, {str(dtype).removeprefix('torch.')}"
                    yield Case(label, partial(measure, name, tasks, params, dtype, rows, options))
    for name in (name for name in asked if name in METHODS):
        for tasks in several:
            yield Case(f"{name}, K = {tasks}", partial(solvers.measure_solver, name, tasks, options))


def measure(
    name: str, tasks: int, params: int, dtype: torch.dtype, rows: _Rows, options: Options, harness: Harness
) -> Measurement | None:
    """One operation, beside a copy and other kernels; None where there is no memory for the gradients."""
    if (g := rows.first(tasks, params, dtype)) is None:
        size = tasks * params * dtype.itemsize / 1e9
        harness.remark(f"K = {tasks}, D = {number(params)} is left out: {size:.3g} GB of gradients, too much for here")
        return None
    job, own = OPS[name](g), options.backend_name()
    return harness.measure(
        on(job, own, dtype),
        other_kernels(job, dtype, options),
        suite="scaling",
        name=name,
        tasks=tasks,
        params=g.params,
        dtype=dtype,
        backend=own,
        moved_bytes=job.moved_bytes,
    )


class _Rows:
    """Gradients of the most of these tasks that there is memory for, of which fewer tasks take the first: made once for
    each D and dtype, and freed before others are made."""

    def __init__(self, several: Sequence[int], device: torch.device) -> None:
        self._several, self._device = several, device
        self._key: tuple[int, torch.dtype] | None = None
        self._made: Gradients | None = None

    def first(self, tasks: int, params: int, dtype: torch.dtype) -> Gradients | None:
        """None where there is no memory for so many."""
        if self._key != (params, dtype):
            self._key, self._made = (params, dtype), None
            if self._device.type == "cuda":
                torch.cuda.empty_cache()  # what it keeps would not count as free
            free = free_bytes(self._device)
            room = math.inf if free is None else OF_MEMORY * free / (params * dtype.itemsize) - 2
            if fitting := [k for k in self._several if k <= room]:
                self._made = Gradients(max(fitting), params, dtype, self._device)
        if self._made is None or tasks > self._made.tasks:
            return None
        g = copy(self._made)
        g.rows, g.weights, g.tasks = g.rows[:tasks], g.weights[:tasks], tasks
        g.bytes = tasks * g.row_bytes
        return g


# ---- Laws ---------------------------------------------------------------------------------------------------------


def native_ms(m: Measurement) -> float:
    """Of the native call where it was measured: around it, Python takes the same for any K."""
    return (m.rivals.get("native call") or m).timing.ms


def sections(measurements: Iterable[Measurement]) -> list[Section]:
    """The laws in what was measured, for a terminal; nothing where there are none."""
    known = list(measurements)
    laws = fits(m for m in known if m.suite == "scaling")
    laws |= fits((m for m in known if m.suite == "solvers"), native_ms)
    if not laws:
        return []
    rows = [_row(key, law, [m for m in known if m.name == key[0]]) for key, law in laws.items()]
    columns = ("overhead + c · K^a · D^b", "dtype", "on", ">a", ">b", ">points", ">overhead, ms", ">ends at D")
    notes = [
        "± are standard errors, of fits to the times of thrice the shortest (with as many tasks) or more. The overhead "
        "is what a call takes however few the elements, for the fewest and the most tasks; it ends where the work "
        "takes as long. Gradients are 156 tensors a task. Solvers: native calls."
    ]
    return [Section("Power laws", columns, rows, notes)]


def _row(key: Sequence[str], law: Fit, measured: Sequence[Measurement]) -> tuple[str, ...]:
    name, dtype, device, backend = key
    most = (min(m.tasks for m in measured), max(m.tasks for m in measured))
    ends = [number(round(end)) for k in most if (end := law.overhead_ends(k)) is not None]
    overheads = [f"{law.overhead_ms(k):.2g}" for k in most]
    a, b = ("" if e is None else str(e) for e in (law.tasks, law.params))
    where = f"{device}, {backend}"
    return name, dtype, where, a, b, str(law.points), _both(overheads), _both(ends)


def _both(values: Sequence[str]) -> str:
    return " / ".join(dict.fromkeys(values))
