"""Power laws are found where times have left the overhead behind."""

from __future__ import annotations

import math
import random

import pytest

from igb_kernels.bench.fits import fit, fits
from igb_kernels.bench.results import Measurement, Timing
from igb_kernels.bench.scaling import PARAMS, TASKS


@pytest.mark.parametrize("overhead", [0.0, 0.02, 0.5])
def test_the_law_is_found_with_its_overhead(overhead):
    law = fit((k, d, overhead + 3e-8 * k**1.5 * d**0.97) for k in TASKS for d in PARAMS)
    assert law is not None
    assert law.tasks.value == pytest.approx(1.5, abs=1e-3)
    assert law.params.value == pytest.approx(0.97, abs=1e-3)
    assert law.overhead_ms(8) == pytest.approx(overhead, abs=1e-5)
    assert law.ms(8, 10**6) == pytest.approx(overhead + 3e-8 * 8**1.5 * 10**5.82, rel=1e-2)
    ends = law.overhead_ends(8)
    assert ends == pytest.approx((overhead / (3e-8 * 8**1.5)) ** (1 / 0.97), rel=2e-2, abs=1.0)


def test_an_overhead_that_grows_with_the_tasks():
    law = fit((k, d, 0.1 * k + 1e-7 * k * d) for k in TASKS for d in PARAMS)
    assert (law.tasks.value, law.params.value) == (pytest.approx(1.0, abs=1e-3), pytest.approx(1.0, abs=1e-3))
    assert law.overheads_ms == pytest.approx({k: 0.1 * k for k in TASKS}, rel=1e-3)
    assert law.overhead_ends(2) == pytest.approx(10**6, rel=1e-2)
    assert law.overhead_ms(60) == law.overhead_ms(64)


def test_the_standard_errors_are_those_of_many_draws():
    generator, found = random.Random(0), []
    for _ in range(200):
        noisy = [(k, d, 1e-6 * k * d * math.exp(generator.gauss(0, 0.05))) for k in (2, 8, 32) for d in PARAMS[1:]]
        found.append(fit(noisy).params)
    mean = sum(e.value for e in found) / len(found)
    spread = math.sqrt(sum((e.value - mean) ** 2 for e in found) / (len(found) - 1))
    assert mean == pytest.approx(1.0, abs=0.01)
    assert sum(e.error for e in found) / len(found) == pytest.approx(spread, rel=0.25)


def test_one_size_gives_one_exponent():
    law = fit((k, 0, 0.001 * k**2.5) for k in TASKS)
    assert law.params is None
    assert law.tasks.value == pytest.approx(2.5, abs=1e-3)
    assert law.overhead_ends(2) is None
    assert str(law) == "time ∝ K^(2.50 ± 0.00)"


def test_an_exponent_needs_three_sizes():
    law = fit((k, d, 1.0 + 1e-6 * k * d**0.5 * d) for k in TASKS for d in (1, 10**5, 10**6))
    assert law.params is None
    assert law.tasks.value == pytest.approx(1.0, abs=0.01)
    assert law.points == len(TASKS)  # of the largest D
    assert law.overhead_ms(2) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize(
    "points",
    [
        [],
        [(2, 0, 1.0)],
        [(k, 0, 1.0) for k in TASKS],  # nothing but overhead
        [(2, 100, 1.0), (4, 100, 9.0), (8, 100, 20.0)],  # two have left it
        [(k, d, 0.1 * k) for k in TASKS for d in PARAMS],
        [(2, 100, 1.0), (4, 100, 9.0), (4, 100, 9.1), (4, 100, 9.2)],  # all at one size
        [(2, 10, 1.0), (4, 20, 9.0), (8, 40, 20.0), (16, 80, 60.0)],  # K and D grow together
        [(2, 10, math.nan), (4, 10, math.inf), (8, 10, 0.0)],
    ],
)
def test_no_law_where_there_is_none(points):
    assert fit(points) is None


def test_measurements_are_fitted_apart():
    def measured(name: str, dtype: str, k: int, d: int, ms: float) -> Measurement:
        return Measurement("scaling", name, k, d, dtype, "cpu", "cpu", Timing(ms, ms, ms, 3))

    both = [measured(name, "float32", k, d, c * k * d) for name, c in (("a", 1e-5), ("b", 9e-3)) for k in TASKS
            for d in PARAMS] + [measured("a", "bfloat16", 2, 10, 1.0)]  # fmt: skip
    assert set(fits(both)) == {(name, "float32", "cpu", "cpu") for name in "ab"}
