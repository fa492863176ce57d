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

    overhead_ms: float
    """What a call takes however little there is to do."""
    constant_ms: float
    tasks: Exponent | None
    """a; None where all these measurements have as many tasks."""
    params: Exponent | None
    """b; None where all have as many elements, or none."""
    points: int

    def ms(self, tasks: float, params: float) -> float:
        """What the law says."""
        return self.overhead_ms + self.work(tasks, params)

    def overhead_ends(self, tasks: float) -> float | None:
        """The elements from which on the work takes longer than the overhead, so many tasks given."""
        if self.params is None or self.params.value <= 0:
            return None
        return float((self.overhead_ms / self.work(tasks, 1.0)) ** (1 / self.params.value))

    def work(self, tasks: float, params: float) -> float:
        """Of which the overhead is no part."""
        a = self.tasks.value if self.tasks else 0.0
        b = self.params.value if self.params else 0.0
        return float(self.constant_ms * tasks**a * max(params, 1.0) ** b)

    def __str__(self) -> str:
        """As a formula."""
        factors = [f"{name}^({e})" for name, e in (("K", self.tasks), ("D", self.params)) if e is not None]
        return "time ∝ " + " · ".join(factors)


def fit(points: Iterable[tuple[int, int, float]]) -> Fit | None:
    """The law through points (tasks, params, ms), by least squares of logarithms; None where fewer than three of them
    have left the overhead behind, or they differ in nothing.

    The overhead is what the shortest time has beyond the law, which is fitted to times without it: the two are found
    in turns."""
    known = [(k, d, ms) for k, d, ms in points if math.isfinite(ms) and ms > 0]
    shortest = min(known, key=lambda point: point[2], default=(1, 1, 0.0))
    clear = [point for point in known if point[2] >= CLEAR * shortest[2]]
    free = [i for i in (0, 1) if len({max(point[i], 1) for point in clear}) > 1]
    if len(clear) < FEWEST or not free:
        return None
    logs = [[1.0, *(math.log(max(point[i], 1)) for i in free)] for point in clear]
    design = torch.tensor(logs, dtype=torch.float64)
    if int(torch.linalg.matrix_rank(design)) < design.shape[1]:
        return None
    law, overhead = None, shortest[2]
    for _ in range(TURNS):
        law = _law(design, [ms - overhead for _, _, ms in clear], free, overhead)
        overhead = max(0.0, shortest[2] - law.work(*shortest[:2]))
    return law


def _law(design: torch.Tensor, work: Sequence[float], free: Sequence[int], overhead: float) -> Fit:
    target = torch.tensor(work, dtype=torch.float64).log()
    found = torch.linalg.lstsq(design, target).solution
    errors = _standard_errors(design, target - design @ found)
    exponents = {i: Exponent(float(found[1 + n]), errors[1 + n]) for n, i in enumerate(free)}
    return Fit(overhead, math.exp(float(found[0])), exponents.get(0), exponents.get(1), len(work))


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
