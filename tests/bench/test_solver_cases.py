"""Solvers and rules as cases, beside other libraries where those find the same."""

from __future__ import annotations

import pytest
import torch

from igb_kernels.backends import cpu
from igb_kernels.bench import peers, solvers
from igb_kernels.bench.cases import Options
from igb_kernels.bench.measure import Harness
from igb_kernels.gradients import METHODS
from igb_kernels.losses import RULES


def measured(*names, tasks=3, libraries=()):
    harness = Harness(seconds=0, least_rounds=2)
    options = Options(tasks=(tasks,), methods=names, peers=libraries)
    return [case.run(harness) for case in solvers.cases(options)], harness


def test_every_method_and_rule_agrees_with_the_reference():
    found, harness = measured()
    assert {m.name for m in found} == {*METHODS, *RULES}
    assert not harness.remarks
    for m in found:
        assert not m.note, m
        assert set(m.rivals) == {"reference", "native call"}
        assert None not in {rival.speed_up for rival in m.rivals.values()}


@pytest.mark.parametrize("tasks", [2, 3, 6])
def test_torchjd_finds_the_same(tasks):
    """Those that draw orders of visits draw the same ones."""
    pytest.importorskip("torchjd")
    names = [name for name in peers.TORCHJD if name not in ("mgda", "nash_mtl", "cagrad")]
    found, harness = measured(*names, tasks=tasks, libraries=("torchjd",))
    assert not harness.remarks
    for m in found:
        assert m.rivals["torchjd"].error < 1e-10, m
        assert m.rivals["torchjd"].speed_up is not None


def test_torchjds_iterations_find_nearly_the_same():
    pytest.importorskip("torchjd")
    pytest.importorskip("cvxpy")
    nash, cagrad = sorted(measured("nash_mtl", "cagrad", libraries=("torchjd",))[0], key=lambda m: -len(m.name))
    assert nash.rivals["torchjd"].speed_up is not None
    assert cagrad.rivals["torchjd"].speed_up is not None


def test_torchjds_mgda_stops_too_early_to_be_compared():
    pytest.importorskip("torchjd")
    (m,), _ = measured("mgda", tasks=8, libraries=("torchjd",))
    assert not m.note
    assert m.rivals["torchjd"].speed_up is None
    assert 1e-3 < m.rivals["torchjd"].error < 1
    assert m.rivals["torchjd"].note.startswith("results disagree")


@pytest.mark.parametrize("tasks", [3, 6])
def test_libmtl_finds_the_same(tasks):
    if "libmtl" not in peers.installed():
        pytest.skip("LibMTL is not installed")
    found, harness = measured(*peers.LIBMTL, tasks=tasks, libraries=("libmtl",))
    assert not harness.remarks
    for m in found:
        if m.name == "cagrad" and tasks != 3:
            assert "libmtl" not in m.rivals
        else:
            assert m.rivals["libmtl"].error < 1e-3, m


def test_a_wrong_solver_is_not_called_faster(monkeypatch):
    right = cpu.solve

    def off(*arguments):
        weights, status = right(*arguments)
        return weights * (1 + 1e-6), status

    monkeypatch.setattr(cpu, "solve", off)
    (m,), _ = measured("imtl_g")
    assert "error 6.4e-07" in m.note
    assert all(rival.speed_up is None for rival in m.rivals.values())


def test_a_wrong_rule_is_not_called_faster(monkeypatch):
    right = cpu.loss_scales

    def off(*arguments):
        scales, status = right(*arguments)
        return scales * 1.001, status

    monkeypatch.setattr(cpu, "loss_scales", off)
    (m,), _ = measured("uw")
    assert m.note
    assert all(rival.speed_up is None for rival in m.rivals.values())


def test_the_gramian():
    gram = solvers.gramian(6)
    norms = gram.diagonal().sqrt()
    assert 2 < norms.max() / norms.min() < 8
    torch.testing.assert_close(gram, solvers.gramian(6), rtol=0, atol=0)
    rows = peers.rows_with(gram)
    torch.testing.assert_close(rows @ rows.T, gram)
