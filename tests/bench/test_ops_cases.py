"""Operations as cases: they agree with float64, and where a kernel is wrong nothing is called faster."""

from __future__ import annotations

from math import prod

import pytest
import torch

from igb_kernels.backends import cpu
from igb_kernels.bench import ops
from igb_kernels.bench.cases import Options, number
from igb_kernels.bench.gradients import RESNET50, resnet50_shapes, shapes
from igb_kernels.bench.measure import Harness

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def small_caches(monkeypatch):
    """Emptying them takes longer than all else."""
    monkeypatch.setattr("igb_kernels.bench.measure.cache_bytes", lambda device: 1 << 10)


def measured(**options):
    harness = Harness(seconds=0, least_rounds=2)
    cases = list(ops.cases(Options(**{"tasks": (3,), "params": (5000,), **options})))
    return [case.run(harness) for case in cases], cases, harness


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_operation_agrees_with_float64(dtype):
    found, cases, harness = measured(dtypes=(dtype,))
    assert [m.name for m in found] == ops.names()
    assert not harness.remarks
    assert cases[0].label == f"gram, K = 3, D = 5 k, {str(dtype).removeprefix('torch.')}"
    for m in found:
        assert not m.note, m
        assert (m.tasks, m.params, m.backend, m.suite) == (3, 5000, "cpu", "ops")
        assert set(m.rivals) == {"copy", "eager", "reference"}
        assert m.rivals["reference"].speed_up is not None
        assert m.rivals["eager"].speed_up is not None, m
        size = torch.empty((), dtype=dtype).element_size()
        wide = 2 * 3 * (8 if dtype is torch.float64 else 4)
        elements = {"gram+combine": 7, "combine": 4, "sign_drop": 4}.get(m.name, 3)
        state = wide if m.name in ("ema", "accumulate_squares") else 0
        assert m.moved_bytes == 5000 * (elements * size + state)


def test_a_wrong_kernel_is_not_called_faster(monkeypatch):
    right = cpu.gram
    monkeypatch.setattr(cpu, "gram", lambda grads, tasks: right(grads, tasks) * 1.001)
    (gram, norms), _, _ = measured(methods=("gram", "sq_norms"))
    assert "error 1.0e-03" in gram.note
    assert all(rival.speed_up is None for rival in gram.rivals.values())
    assert not norms.note


@pytest.mark.parametrize(("name", "kernel"), [("combine", "combine_"), ("ema", "ema_"), ("sign_drop", "sign_drop_")])
def test_a_wrong_element_is_seen(monkeypatch, name, kernel):
    right = getattr(cpu, kernel)

    def off(out, *arguments):
        found = right(out, *arguments)
        out.tensors[0].flatten()[0] += 1
        return found

    monkeypatch.setattr(cpu, kernel, off)
    (m,), _, _ = measured(methods=(name,))
    assert m.note


def test_eager_loses_its_speed_up_where_it_overflows():
    """70,000 ones in float16."""
    (m,), _, _ = measured(methods=("gram",), dtypes=(torch.float16,), params=(70_000,))
    assert not m.note
    assert m.rivals["eager"].speed_up is None
    assert "error inf" in m.rivals["eager"].note


def test_what_does_not_fit_is_left_out(monkeypatch):
    monkeypatch.setattr(ops, "free_bytes", lambda device: 150_000)
    (m,), _, harness = measured(methods=("gram",))
    assert set(m.rivals) == {"copy"}
    assert "no room to run eager PyTorch and the reference" in harness.remarks[0]
    monkeypatch.setattr(ops, "free_bytes", lambda device: 10_000)
    (m,), _, harness = measured(methods=("gram",))
    assert m is None
    assert "left out" in harness.remarks[0]


@pytest.mark.parametrize("params", [1, 155, 156, 200, 10**4, 10**6 + 1, 10**8])
def test_shapes_have_as_many_elements(params):
    assert sum(map(prod, shapes(params))) == params
    assert len(shapes(params)) == (156 if params >= 156 else 1)
    assert min(map(prod, shapes(params))) >= 1


def test_resnet50():
    assert shapes(23_500_000) == resnet50_shapes()
    assert sum(map(prod, resnet50_shapes())) == RESNET50


def test_numbers_in_labels():
    assert [number(n) for n in (7, 1000, 23_498_496, 10**9)] == ["7", "1 k", "23.5 M", "1 G"]
