"""A run is kept in a file, and comes back whole."""

import json

import pytest

from igb_kernels.bench.results import Measurement, Results, Rival, Timing


def test_a_timing_is_the_median_and_the_quartiles():
    assert Timing.of([0.004, 0.001, 0.002, 0.003, 0.010]) == Timing(3.0, 2.0, 4.0, 5)
    assert Timing.of([0.001]) == Timing(1.0, 1.0, 1.0, 1)


def test_results_come_back_from_their_file(tmp_path):
    copy = Rival(Timing(1.0, 0.9, 1.2, 7), speed_up=0.5)
    wrong = Rival(Timing(9.0, 8.0, 9.9, 3), speed_up=None, error=0.3, note="other results")
    measured = Measurement(
        "ops", "gram", 3, 1000, "float32", "cpu", "cpu", Timing(2.0, 1.9, 2.2, 7), 1e-9, 4_000_000, None,
        {"copy": copy, "eager": wrong},
    )  # fmt: skip
    results = Results({"cpu": "a CPU", "cores": 2}, "abc", "bench ops", "2026-01-01T00:00:00+00:00", [measured])
    results.save(tmp_path / "r.json")
    assert Results.load(tmp_path / "r.json") == results
    assert measured.gb_per_s == pytest.approx(2.0)
    assert measured.of_copy == 0.5


@pytest.mark.parametrize("broken", ['{"schema": 1}', '{"schema": 1, "measurements": [{"suite": "ops"}]}'])
def test_a_broken_file_is_refused(tmp_path, broken):
    (tmp_path / "r.json").write_text(broken)
    with pytest.raises(ValueError, match=r"r.json is not a whole result of `bench`: KeyError: '(measurements|rivals)'"):
        Results.load(tmp_path / "r.json")


def test_another_file_is_refused(tmp_path):
    (tmp_path / "other.json").write_text(json.dumps({"benchmarks": []}))
    with pytest.raises(ValueError, match=r"other.json must be a result of `python -m igb_kernels bench`"):
        Results.load(tmp_path / "other.json")
