"""The harness: whose turn it is, how often, what is timed, and when there is no speed-up."""

from __future__ import annotations

import time

import pytest
import torch

from igb_kernels.bench.measure import Contender, Copy, Harness

CPU = torch.device("cpu")


def measure(harness, ours, rivals, **more):
    given = {"suite": "ops", "name": "x", "tasks": 2, "params": 3, "dtype": torch.float32, "backend": "cpu", **more}
    return harness.measure(ours, rivals, **given)


def sleeping(ms):
    return Contender(lambda: time.sleep(1e-3 * ms))


def test_speed_ups_and_rounds_of_close_and_slow_rivals():
    m = measure(Harness(seconds=0.2), sleeping(2), {"close": sleeping(4), "slow": sleeping(30)})
    close, slow = m.rivals["close"], m.rivals["slow"]
    assert close.speed_up == pytest.approx(2, rel=0.4)
    assert slow.speed_up == pytest.approx(15, rel=0.5)
    assert close.timing.rounds == m.timing.rounds > Harness.SLOW_ROUNDS
    assert slow.timing.rounds == Harness.SLOW_ROUNDS
    assert m.timing.low <= m.timing.ms <= m.timing.high
    assert (m.error, close.error, close.note, m.note) == (None, None, "", "")


def test_the_least_and_the_most_rounds():
    assert measure(Harness(seconds=0, least_rounds=4), sleeping(1), {}).timing.rounds == 4
    harness = Harness(seconds=10, most_rounds=7)
    assert measure(harness, sleeping(0.1), {}).timing.rounds == 7
    assert len(harness.rounds) == 7


def test_the_time_is_kept():
    began = time.perf_counter()
    measure(Harness(seconds=0.1), sleeping(1), {"close": sleeping(1)})
    assert 0.1 < time.perf_counter() - began < 0.6


def test_a_very_slow_rival_runs_as_seldom_as_can_be():
    calls = []

    def slow():
        calls.append(1)
        time.sleep(1.1 * Harness.LONG)

    m = measure(Harness(seconds=0), sleeping(1), {"slow": Contender(slow)})
    assert m.rivals["slow"].timing.rounds == len(calls) == 1


def test_turns_go_to_and_fro():
    order = []

    def of(name):
        def call(argument):
            order.append(name)
            time.sleep(1e-3)

        return Contender(call, setup=lambda: (1,))

    measure(Harness(seconds=0, least_rounds=3), of("ours"), {"a": of("a"), "b": of("b")})
    turns = ["ours", "a", "b", "b", "a", "ours", "ours", "a", "b"]
    assert order[-len(turns) :] == turns


def test_setup_is_outside_of_the_time_and_may_be_a_contenders_own():
    got = []

    def setup():
        time.sleep(5e-3)
        return ("ours",)

    theirs = Contender(got.append, setup=lambda: ("theirs",))
    m = measure(
        Harness(seconds=0), Contender(got.append, setup=setup), {"same": Contender(got.append), "other": theirs}
    )
    assert m.timing.ms < 1
    assert set(got) == {"ours", "theirs"}


def test_short_calls_are_timed_in_batches():
    calls = []
    m = measure(Harness(seconds=0, least_rounds=5), Contender(lambda: calls.append(1)), {})
    assert len(calls) > 100 * m.timing.rounds
    assert m.timing.ms < 1e-2


def test_no_speed_up_where_results_disagree():
    rivals = {
        "right": Contender(lambda: None, lambda: 0.9e-3, 1e-3, note="a remark"),
        "wrong": Contender(lambda: None, lambda: 2e-3, 1e-3, note="a remark"),
        "nan": Contender(lambda: None, lambda: float("nan"), 1e-3),
    }
    m = measure(Harness(seconds=0), Contender(lambda: None, lambda: 1e-6, 1e-5), rivals)
    assert m.error == 1e-6
    assert m.rivals["right"].speed_up is not None
    assert (m.rivals["right"].error, m.rivals["right"].note) == (0.9e-3, "a remark")
    assert m.rivals["wrong"].speed_up is None
    assert m.rivals["wrong"].note == "results disagree: error 2.0e-03, at most 1.0e-03 counts as the same; a remark"
    assert m.rivals["nan"].speed_up is None
    assert m.rivals["nan"].error is None  # JSON has no NaN
    assert "error nan" in m.rivals["nan"].note


def test_no_speed_up_where_ours_is_wrong():
    wrong = Contender(lambda: None, lambda: 1.0, 1e-5)
    m = measure(Harness(seconds=0), wrong, {"right": Contender(lambda: None, lambda: 0.0)}, moved_bytes=1000)
    assert "error 1.0e+00" in m.note
    assert [rival.speed_up for rival in m.rivals.values()] == [None, None]
    assert m.rivals["right"].note == f"ours: {m.note}"
    assert m.of_copy is None


@pytest.mark.parametrize("with_error", [False, True])
def test_what_others_raise_is_a_remark_and_what_ours_raises_is_raised(with_error):
    def fails(*_):
        raise ArithmeticError("no convergence")

    broken = Contender(fails, fails if with_error else None, foreign=True)
    harness = Harness(seconds=0)
    m = measure(harness, sleeping(0.1), {"theirs": broken, "other": sleeping(0.1)})
    assert list(m.rivals) == ["other"]
    assert harness.remarks == ["theirs is left out of x, K = 2: ArithmeticError: no convergence"]
    with pytest.raises(ArithmeticError):
        measure(harness, sleeping(0.1), {"ours too": Contender(fails, fails if with_error else None)})


def test_memory_is_measured_beside_a_copy_with_cold_caches(monkeypatch):
    emptied = []
    monkeypatch.setattr(Harness, "empty_caches", lambda self: emptied.append(1))
    monkeypatch.setattr("igb_kernels.bench.measure.cache_bytes", lambda device: 1 << 16)
    m = measure(Harness(seconds=0), sleeping(1), {}, moved_bytes=1000)
    assert len(emptied) >= 2 * m.timing.rounds
    assert m.of_copy == m.rivals["copy"].speed_up
    assert m.gb_per_s == pytest.approx(1000 / m.timing.ms / 1e6)
    emptied.clear()
    measure(Harness(seconds=0), sleeping(1), {}, moved_bytes=4 << 16)  # it evicts itself
    measure(Harness(seconds=0), sleeping(1), {})
    assert not emptied


@pytest.mark.parametrize("moved", [2, 1000, 999_999, 3_000_000])
def test_the_copy_moves_so_many_bytes(monkeypatch, moved):
    monkeypatch.setattr(Copy, "LARGEST", 400_000)
    monkeypatch.setattr("igb_kernels.bench.measure.cache_bytes", lambda device: 1)
    written = []
    copy_ = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda t, other: written.append(t.numel()) or copy_(t, other))
    Copy(moved, CPU)()
    assert sum(written) == moved // 2


def test_caches_are_emptied_by_more_than_they_hold():
    harness = Harness()
    harness.empty_caches()
    assert harness._cache is not None
    assert harness._cache.numel() >= 64 << 20


def test_warming_up_long_calls_is_their_first_round(monkeypatch):
    monkeypatch.setattr(Harness, "LONG", 5e-3)
    calls = []

    def long(name):
        return Contender(lambda: calls.append(name) or time.sleep(6e-3))

    m = measure(Harness(seconds=0, least_rounds=3), long("ours"), {"theirs": long("theirs")})
    assert m.timing.rounds == m.rivals["theirs"].timing.rounds == 3
    assert calls.count("ours") == calls.count("theirs") == 3
