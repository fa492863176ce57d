"""The streaming operations on K gradients of D elements, beside a copy, plain PyTorch, the reference backend and the
other kernels that are installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from igb_kernels import ops
from igb_kernels.backends import FASTEST_FIRST, backends
from igb_kernels.bench import eager
from igb_kernels.bench.cases import Case, Options, chosen, number
from igb_kernels.bench.gradients import RESNET50, Gradients, part_of
from igb_kernels.bench.machine import free_bytes
from igb_kernels.bench.measure import Contender, Harness
from igb_kernels.bench.results import Measurement

TASKS = (3, 8)
PARAMS, QUICK_PARAMS = RESNET50, 1_000_000
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""The largest error of a kernel; in half precision that of results that are rounded to it:"""
HALF_TOLERANCE = 2e-2
EAGER_TOLERANCE = 1e-2
"""Of plain PyTorch in float32: its inner products of 23.5 million elements are off by 3e-3."""
DECAY, EPS = 0.9, 1e-7


@dataclass(frozen=True)
class Job:
    """An operation on some gradients."""

    run: Callable[[str], Any]
    """On a backend; returns what `error` takes, as `eager` does."""
    eager: Callable[[], Any]
    error: Callable[[Any], float]
    """Relative to the truth, which is formed in float64 from the same gradients."""
    moved_bytes: int
    eager_error: Callable[[Any], float] | None = None
    """Where plain PyTorch cannot have the same result."""
    eager_note: str = ""


# ---- Each operation -----------------------------------------------------------------------------------------------


def _gram(g: Gradients) -> Job:
    return Job(
        run=lambda backend: ops.gram(g.rows, backend=backend),
        eager=lambda: eager.gram(g.rows),
        error=partial(_gram_error, g, cache(lambda: _true_gram(g))),
        moved_bytes=g.bytes,
    )


def _sq_norms(g: Gradients) -> Job:
    truth = cache(lambda: torch.stack([block.square().sum(dim=1) for _, _, block in g.chunks()]).sum(dim=0))
    return Job(
        run=lambda backend: ops.sq_norms(g.rows, backend=backend),
        eager=lambda: eager.sq_norms(g.rows),
        error=lambda found: _worst(found, truth()),
        moved_bytes=g.bytes,
    )


def _combine(g: Gradients) -> Job:
    def run(backend: str) -> list[Tensor]:
        ops.combine_(g.out, g.rows, g.weights, backend=backend)
        return g.out

    return Job(
        run=run,
        eager=lambda: eager.combine(g.rows, g.weights),
        error=partial(_sum_error, g),
        moved_bytes=g.bytes + g.row_bytes,
    )


def _gram_and_combine(g: Gradients) -> Job:
    def run(backend: str) -> tuple[Tensor, list[Tensor]]:
        gram = ops.gram(g.rows, backend=backend)
        ops.combine_(g.out, g.rows, g.weights, backend=backend)
        return gram, g.out

    truth = cache(lambda: _true_gram(g))
    return Job(
        run=run,
        eager=lambda: eager.gram_and_combine(g.rows, g.weights),
        error=lambda found: max(_gram_error(g, truth, found[0]), _sum_error(g, found[1])),
        moved_bytes=2 * g.bytes + g.row_bytes,
    )


def _ema(g: Gradients) -> Job:
    """The states are apart from the results, as where a step may be undone."""
    wide = ops.accumulator_dtype(g.dtype)
    state, new = g.like(0.5, wide), g.like(0.0, wide)
    flat = torch.full((g.tasks, g.params), 0.5, dtype=g.dtype, device=g.device)
    decay = torch.tensor(DECAY, dtype=torch.float64, device=g.device)

    def run(backend: str) -> tuple[list[list[Tensor]], Tensor]:
        return new, ops.ema_(new, state, g.rows, decay, backend=backend)

    def by_eager() -> tuple[list[list[Tensor]], Tensor]:
        found, norms = eager.ema_norms(flat, g.rows, DECAY)
        return [eager.unflatten(row, g.out) for row in found], norms

    def error(found: tuple[list[list[Tensor]], Tensor]) -> float:
        (elements, squares), norms = _elements_error(g, found[0], lambda x: DECAY * 0.5 + (1 - DECAY) * x), found[1]
        return max(elements, _worst(norms, squares.sqrt()))

    return Job(
        run=run,
        eager=by_eager,
        error=lambda found: error((found[0], found[1].double().sqrt())),
        eager_error=error,
        moved_bytes=g.bytes + 2 * _bytes_of(state),
    )


def _accumulate_squares(g: Gradients) -> Job:
    wide = ops.accumulator_dtype(g.dtype)
    state, new = g.like(1.0, wide), g.like(0.0, wide)
    flat = torch.ones(g.tasks, g.params, dtype=g.dtype, device=g.device)

    def run(backend: str) -> tuple[list[list[Tensor]], Tensor]:
        return new, ops.accumulate_squares_(new, state, g.rows, EPS, backend=backend)

    def by_eager() -> tuple[list[list[Tensor]], Tensor]:
        found, excess = eager.accumulate_squares(flat, g.rows, EPS)
        return [eager.unflatten(row, g.out) for row in found], excess

    @cache
    def excess() -> Tensor:
        parts = [(b.square() / (1 + b.square() + EPS).sqrt()).sum(dim=1) for _, _, b in g.chunks()]
        return torch.stack(parts).sum(dim=0)

    def error(found: tuple[list[list[Tensor]], Tensor]) -> float:
        return max(_elements_error(g, found[0], lambda x: 1 + x.square())[0], _worst(found[1], excess()))

    return Job(run=run, eager=by_eager, error=error, moved_bytes=g.bytes + 2 * _bytes_of(state))


def _sign_drop(g: Gradients) -> Job:
    """The truth has the same random numbers; PyTorch draws its own, so its sums agree in their norm alone."""
    counter = torch.tensor([1.0, 2.0], dtype=torch.float64, device=g.device)

    def run(backend: str) -> tuple[list[Tensor], Tensor]:
        return g.out, ops.sign_drop_(g.out, g.rows, counter, backend=backend)

    @cache
    def truth() -> list[Tensor]:
        out = [torch.empty_like(t, dtype=ops.accumulator_dtype(g.dtype)) for t in g.out]
        ops.sign_drop_(out, g.rows, counter, backend="reference")
        return out

    def error(found: tuple[list[Tensor], Tensor]) -> float:
        norm = _norm(truth())
        return max(float(_distance(found[0], truth()) / norm), _worst(found[1].sqrt(), norm.reshape(1)))

    return Job(
        run=run,
        eager=lambda: eager.sign_drop(g.rows),
        error=error,
        eager_error=lambda found: _worst(_norm(found), _norm(truth())),
        eager_note="draws other random numbers: compared by the norm of the sum",
        moved_bytes=g.bytes + g.row_bytes,
    )


OPS: dict[str, Callable[[Gradients], Job]] = {
    "gram": _gram,
    "sq_norms": _sq_norms,
    "combine": _combine,
    "gram+combine": _gram_and_combine,
    "ema": _ema,
    "accumulate_squares": _accumulate_squares,
    "sign_drop": _sign_drop,
}

# ---- Errors -------------------------------------------------------------------------------------------------------


def _true_gram(g: Gradients) -> Tensor:
    total = torch.zeros(g.tasks, g.tasks, dtype=torch.float64, device=g.device)
    for _, _, block in g.chunks():
        total += block @ block.T
    return total


def _gram_error(g: Gradients, truth: Callable[[], Tensor], found: Tensor) -> float:
    norms = truth().diagonal().sqrt()
    return float(((found.double() - truth()).abs() / (norms[:, None] * norms)).max())


def _worst(found: Tensor, truth: Tensor) -> float:
    return float(((found.double() - truth).abs() / truth).max())


def _sum_error(g: Gradients, found: Sequence[Tensor]) -> float:
    off = size = torch.zeros((), dtype=torch.float64, device=g.device)
    for p, part, block in g.chunks():
        true = g.weights @ block
        off, size = off + (part_of(found, p, part) - true).square().sum(), size + true.square().sum()
    return float((off / size).sqrt())


def _elements_error(
    g: Gradients, found: Sequence[Sequence[Tensor]], true: Callable[[Tensor], Tensor]
) -> tuple[float, Tensor]:
    """Of K rows that should be a function of the gradients', and the true squared norms of the rows."""
    off = size = torch.zeros(g.tasks, dtype=torch.float64, device=g.device)
    for p, part, block in g.chunks():
        expected = true(block)
        rows = torch.stack([part_of(row, p, part) for row in found])
        off, size = off + (rows - expected).square().sum(dim=1), size + expected.square().sum(dim=1)
    return float((off / size).sqrt().max()), size


def _distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x.double() - y.double()).square().sum() for x, y in zip(a, b, strict=True)]).sum().sqrt()


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt()


def _bytes_of(rows: Sequence[Sequence[Tensor]]) -> int:
    return sum(t.numel() * t.element_size() for row in rows for t in row)


# ---- Cases --------------------------------------------------------------------------------------------------------


def names() -> Sequence[str]:
    """The operations."""
    return list(OPS)


def accepts(name: str) -> bool:
    """Whether it is one of them."""
    return name in OPS


def cases(options: Options) -> Iterator[Case]:
    """Every operation at every size and dtype."""
    default = QUICK_PARAMS if options.quick else PARAMS
    latest = _Latest()
    for dtype in options.dtypes:
        for params in options.params or (default,):
            for tasks in options.tasks or TASKS:
                make = partial(latest.of, tasks, params, dtype, options.device)
                for name in chosen(names(), options):
                    label = f"{name}, K = {tasks}, D = {number(params)}, {str(dtype).removeprefix('torch.')}"
                    yield Case(label, partial(measure, name, make, tasks, params, dtype, options))


def measure(
    name: str,
    gradients: Callable[[], Gradients],
    tasks: int,
    params: int,
    dtype: torch.dtype,
    options: Options,
    harness: Harness,
) -> Measurement | None:
    """One operation, if there is memory for it."""
    # Gradients, states and results; others flatten them, and the reference is in float64.
    state = 2 * ops.accumulator_dtype(dtype).itemsize if name in ("ema", "accumulate_squares") else 0
    lean = tasks * params * (dtype.itemsize + state) + 2 * params * dtype.itemsize
    lavish = lean + tasks * params * max(4 * dtype.itemsize, 3 * 8)
    free = free_bytes(options.device)
    if free is not None and lean > 0.8 * free:
        harness.remark(f"{name}, K = {tasks}, D = {number(params)} needs {lean / 1e9:.1f} GB: left out")
        return None
    g = gradients()
    job, own = OPS[name](g), options.backend_name()
    tolerance = TOLERANCE.get(dtype, HALF_TOLERANCE)
    rivals = other_kernels(job, dtype, options)
    if free is not None and lavish > 0.8 * free:
        harness.remark(f"no room to run eager PyTorch and the reference at K = {tasks}, D = {number(params)}")
    else:
        wide = max(tolerance, EAGER_TOLERANCE) if dtype is torch.float32 else tolerance
        if job.eager_note:  # with other random numbers, norms differ by about 1/√D
            wide = max(wide, 10 * g.params**-0.5)
        off = job.eager_error or job.error
        rivals["eager"] = Contender(job.eager, lambda: off(job.eager()), wide, note=job.eager_note)
        if own != "reference":
            # Where it is what the truth is from, that need not be seen again.
            rivals["reference"] = (
                Contender(partial(job.run, "reference")) if name == "sign_drop" else on(job, "reference", dtype)
            )
    return harness.measure(
        on(job, own, dtype),
        rivals,
        suite="ops",
        name=name,
        tasks=tasks,
        params=g.params,
        dtype=dtype,
        backend=own,
        moved_bytes=job.moved_bytes,
    )


def on(job: Job, backend: str, dtype: torch.dtype) -> Contender:
    """The operation on a backend."""
    tolerance = TOLERANCE.get(dtype, HALF_TOLERANCE)
    return Contender(partial(job.run, backend), lambda: job.error(job.run(backend)), tolerance)


def other_kernels(job: Job, dtype: torch.dtype, options: Options) -> dict[str, Contender]:
    """The operation on the backends with kernels for the device, beside the one that is measured."""
    others = [name for name in FASTEST_FIRST[options.device.type] if name != options.backend_name()]
    return {name: on(job, name, dtype) for name in others if backends()[name]}


class _Latest:
    """Gradients are made once for several operations, and freed before others are made."""

    def __init__(self) -> None:
        self._key: object = None
        self._made: Gradients | None = None

    def of(self, tasks: int, params: int, dtype: torch.dtype, device: torch.device) -> Gradients:
        if self._made is None or self._key != (tasks, params, dtype, device):
            self._made = None
            self._made, self._key = Gradients(tasks, params, dtype, device), (tasks, params, dtype, device)
        return self._made
