"""What has become slower is found by ratios, on whatever machine; noise is not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from igb_kernels.bench.regression import FLOORS, TOLERANCES, compare
from igb_kernels.bench.results import Measurement, Rival, Timing
from igb_kernels.printing import plain

SUITES = sorted(FLOORS)


def measured(
    suite: str, name: str, ratio: float = 1.2, spread: float = 0.03, speed: float = 1.0, **rest
) -> Measurement:
    """Ours takes `ratio` times as long as its floor, on a machine that is `speed` times as fast as another."""
    ms = 10.0 * ratio / speed
    timing = Timing(ms, ms * (1 - spread), ms * (1 + spread), 21)
    floor = Rival(Timing(10.0 / speed, 9.9 / speed, 10.1 / speed, 21), 1 / ratio)
    rest = {"tasks": 3, "params": 1000, "dtype": "float32", "device": "cpu", "backend": "cpu", **rest}
    return Measurement(suite, name, timing=timing, rivals={FLOORS[suite][0]: floor}, **rest)


def everything(**rest) -> list[Measurement]:
    return [measured(suite, name, **rest) for suite in SUITES for name in ("a", "b")]


def test_the_same_is_right():
    found = compare(everything(), everything())
    assert found.right
    assert len(found.changes) == 8
    assert plain(found.sections()).splitlines()[-1] == "  None of 8 is slower than in the baseline."


@pytest.mark.parametrize("suite", SUITES)
def test_what_takes_twice_as_long_is_found(suite):
    now = [measured(m.suite, m.name, 2.4) if (m.suite, m.name) == (suite, "b") else m for m in everything()]
    found = compare(everything(), now)
    assert not found.right
    (worse,) = found.worse
    assert worse.name == f"{suite} b (K = 3, D = 1,000, float32, cpu, cpu)"
    assert worse.factor == pytest.approx(2.0)
    text = " ".join(plain(found.sections()).split())
    assert f"{worse.name} {FLOORS[suite][0]} 1.2 2.4 2.00×" in text
    assert "1 of 8 slower than in the baseline, 0 wrong." in text


@pytest.mark.parametrize("suite", SUITES)
def test_a_little_more_than_the_tolerance_is_found_and_a_little_less_is_not(suite):
    allowed = 1 + TOLERANCES[suite]
    for ratio, right in ((0.99, True), (1.01, False)):
        found = compare([measured(suite, "a", 1.2, 0.0)], [measured(suite, "a", 1.2 * allowed * ratio, 0.0)])
        assert found.right is right


def test_noise_within_the_quartiles_is_not_found():
    ratio = 1.2 * (1 + TOLERANCES["ops"]) * 1.2
    assert not compare([measured("ops", "a", 1.2, 0.01)], [measured("ops", "a", ratio, 0.01)]).right
    assert compare([measured("ops", "a", 1.2, 0.15)], [measured("ops", "a", ratio, 0.15)]).right


@pytest.mark.parametrize("speed", [0.1, 10.0])
def test_another_machines_times_do_not_matter(speed):
    assert compare(everything(), everything(speed=speed)).right
    assert len(compare(everything(), everything(speed=speed, ratio=2.4)).worse) == 8
    assert compare(everything(), everything(device="cpu:0")).right


def test_what_is_missing_is_named():
    now = [measured("ops", "a"), measured("ops", "new")]
    found = compare(everything(), now)
    assert found.missing == ["ops b (K = 3, D = 1,000, float32, cpu, cpu)"]  # other suites did not run
    assert "In the baseline, and not measured now: ops b" in plain(found.sections())
    assert found.right


def test_nothing_in_common_is_not_right():
    found = compare(everything(), [measured("ops", "a", tasks=8)])
    assert not found.right
    assert "Nothing could be compared with the baseline." in plain(found.sections())


def test_without_a_floor_nothing_is_compared():
    bare = replace(measured("ops", "a"), rivals={})
    found = compare([bare, measured("ops", "b")], [bare, measured("ops", "b")])
    assert found.incomparable == ["ops a (K = 3, D = 1,000, float32, cpu, cpu): it has no floor in both runs."]
    assert len(found.changes) == 1


def test_the_native_call_is_the_floor_where_the_reference_was_not_run():
    def native(ratio: float) -> Measurement:
        m = measured("solvers", "nash_mtl", ratio, params=0)
        return replace(m, rivals={"native call": m.rivals["reference"]})

    (change,) = compare([native(10.0)], [native(20.0)]).worse
    assert change.floor == "native call"
    assert change.name == "solvers nash_mtl (K = 3, float32, cpu, cpu)"


def test_other_suites_are_compared_with_whatever_rival_they_have():
    def loop(ratio: float) -> Measurement:
        m = measured("step", "UPGrad", ratio, model="mlp-33k")
        return replace(m, suite="loops", rivals={"torchjd": m.rivals["passes"]})

    assert compare([loop(0.5)], [loop(0.51)]).right
    (change,) = compare([loop(0.5)], [loop(1.0)]).worse
    assert change.floor == "torchjd"


def test_results_that_disagree_now_are_wrong_however_fast():
    def wrong(m: Measurement) -> Measurement:
        return replace(m, rivals={name: replace(r, speed_up=None) for name, r in m.rivals.items()})

    right, off = measured("ops", "a"), wrong(measured("ops", "a", 0.5))
    found = compare([right, measured("ops", "b")], [off, measured("ops", "b")])
    assert not found.right
    assert "ops a (K = 3, D = 1,000, float32, cpu, cpu): results disagree, and did not before." in plain(
        found.sections()
    )
    assert compare([off, measured("ops", "b")], [right, measured("ops", "b")]).right
