"""How times grow: power laws where they have left the constant overhead behind."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from igb_kernels.bench.results import Measurement

CLEAR = 3.0
"""Times the shortest time: from there on, a time counts for the law."""
FEWEST = 3
TURNS = 30


@dataclass(frozen=True)
class Exponent:
    """Of a power law."""

    value: float
    error: float | None
    """The standard error; None where the law goes through all its points because they are as few."""

    def __str__(self) -> str:
        return f"{self.value:.2f}" + ("" if self.error is None else f" ± {self.error:.2f}")


@dataclass(frozen=True)
class Fit:
    """ms = overhead + constant · tasks^a · params^b, from measurements that take thrice the shortest time or more."""

    overheads_ms: dict[int, float]
    """What a call takes however few the elements, by the number of tasks, since more tasks have more tensors. Where
    there are no elements to speak of, it is the same for any number of tasks."""
    constant_ms: float
    tasks: Exponent | None
    """a; None where all these measurements have as many tasks."""
    params: Exponent | None
    """b; None where all have as many elements, or none."""
    points: int

    def ms(self, tasks: int, params: float) -> float:
        """What the law says; the overhead is that of the nearest number of tasks that was measured."""
        return self.overhead_ms(tasks) + self.work(tasks, params)

    def overhead_ms(self, tasks: int) -> float:
        """Of the nearest number of tasks that was measured."""
        return self.overheads_ms[min(self.overheads_ms, key=lambda known: abs(known - tasks))]

    def overhead_ends(self, tasks: int) -> float | None:
        """The elements from which on the work takes longer than the overhead, so many tasks given; None where it does
        not grow with them."""
        if self.params is None or self.params.value <= 0:
            return None
        return float((self.overhead_ms(tasks) / self.work(tasks, 1.0)) ** (1 / self.params.value))

    def work(self, tasks: float, params: float) -> float:
        """Of which the overhead is no part."""
        a = self.tasks.value if self.tasks else 0.0
        b = self.params.value if self.params else 0.0
        return float(self.constant_ms * tasks**a * max(params, 1.0) ** b)

    def __str__(self) -> str:
        """As a formula."""
        factors = [f"{name}^({e})" for name, e in (("K", self.tasks), ("D", self.params)) if e is not None]
        return "time ∝ " + " · ".join(factors)


Point = tuple[int, int, float]


def fit(points: Iterable[Point]) -> Fit | None:
    """The law through points (tasks, params, ms), by least squares of logarithms; None where fewer than three of them
    have left the overhead behind. An exponent needs three sizes; where there are fewer, the largest alone counts.

    The overhead is what the shortest time has beyond the law, which is fitted to times without it: the two are found
    in turns."""
    known = [(max(k, 1), max(d, 1), ms) for k, d, ms in points if math.isfinite(ms) and ms > 0]
    shortest = _shortest(known)
    clear = [point for point in known if point[2] >= CLEAR * shortest[point[0]][2]]
    for i in (1, 0):
        if 0 < len({point[i] for point in clear}) < FEWEST:
            clear = [point for point in clear if point[i] == max(p[i] for p in clear)]
    free = [i for i in (0, 1) if len({point[i] for point in clear}) > 1]
    if len(clear) < FEWEST or not free:
        return None
    logs = [[1.0, *(math.log(point[i]) for i in free)] for point in clear]
    design = torch.tensor(logs, dtype=torch.float64)
    if int(torch.linalg.matrix_rank(design)) < design.shape[1]:
        return None
    law, overheads = None, {k: ms for k, (_, _, ms) in shortest.items()}
    turns = TURNS if 1 in free or len({d for _, d, _ in known}) == 1 else 1  # else, nothing says what grows with D
    for _ in range(turns):
        law = _law(design, [ms - overheads[k] for k, _, ms in clear], free, overheads)
        overheads = {k: max(0.0, least[2] - law.work(*least[:2])) for k, least in shortest.items()}
    return law


def _shortest(known: Sequence[Point]) -> dict[int, Point]:
    """By the number of tasks, of those with as many; where all have as many elements, of all."""
    alike = len({d for _, d, _ in known}) == 1
    return {k: min((p for p in known if alike or p[0] == k), key=lambda p: p[2]) for k, _, _ in known}


def _law(design: torch.Tensor, work: Sequence[float], free: Sequence[int], overheads: dict[int, float]) -> Fit:
    target = torch.tensor(work, dtype=torch.float64).log()
    found = torch.linalg.lstsq(design, target).solution
    errors = _standard_errors(design, target - design @ found)
    exponents = {i: Exponent(float(found[1 + n]), errors[1 + n]) for n, i in enumerate(free)}
    return Fit(overheads, math.exp(float(found[0])), exponents.get(0), exponents.get(1), len(work))


def _standard_errors(design: torch.Tensor, residual: torch.Tensor) -> Sequence[float | None]:
    points, unknowns = design.shape
    if points == unknowns:
        return [None] * unknowns
    variance = residual.square().sum() / (points - unknowns)
    errors: list[float] = (variance * torch.linalg.inv(design.T @ design).diagonal()).sqrt().tolist()
    return errors


def fits(
    measurements: Iterable[Measurement], ms: Callable[[Measurement], float | None] = lambda m: m.timing.ms
) -> dict[tuple[str, ...], Fit]:
    """By (name, dtype, device, backend), for measurements of one suite; `ms` takes another time of them."""
    groups: dict[tuple[str, ...], list[tuple[int, int, float]]] = {}
    for m in measurements:
        if (value := ms(m)) is not None:
            groups.setdefault((m.name, m.dtype, m.device, m.backend), []).append((m.tasks, m.params, value))
    found = {key: fit(points) for key, points in groups.items()}
    return {key: law for key, law in found.items() if law is not None}
