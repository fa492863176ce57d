"""Which backend runs, and what happens where the compiled module is absent."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from samplers import gradients

import igb_kernels as igb
from igb_kernels import _native, ops

DECLARED = {"cpu", "reference"}


def run_python(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_backends_lists_each_with_its_detail():
    found = igb.backends()
    assert set(found) == DECLARED
    assert all(found.values()), "both can be used where the module is built"
    assert _native.module.instruction_set() in str(found["cpu"])
    assert str(found["reference"]).startswith("available: ")


def test_auto_is_the_compiled_one():
    rows = gradients(3, [5000], torch.float32)
    auto, cpu, reference = (ops.gram(rows, backend=name) for name in ("auto", "cpu", "reference"))
    assert torch.equal(auto, cpu)
    assert not torch.equal(auto, reference), "float32 sums should differ from float64 ones"


def test_instruction_sets_can_be_chosen(instruction_set):
    assert _native.module.instruction_set() == instruction_set
    assert instruction_set in str(igb.backends()["cpu"])


def test_an_unknown_instruction_set_changes_nothing():
    before = _native.module.instruction_set()
    assert not _native.module.use_instruction_set("sse9")
    assert _native.module.instruction_set() == before


WITHOUT_MODULE = """
import logging, sys
sys.modules["igb_kernels._C"] = None  # importing it raises ImportError

class Lines(logging.Handler):
    def emit(self, record): print("LOG", record.levelname, record.getMessage())

logging.getLogger("igb_kernels").addHandler(Lines())
import torch
import igb_kernels as igb
from igb_kernels import ops

print("CPU", bool(igb.backends()["cpu"]), igb.backends()["cpu"])
rows = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
for _ in range(3):
    print("GRAM", ops.gram(rows).tolist())
print("NORMS", ops.sq_norms(rows).tolist())
print("WEIGHTS", ops.solve("nash_mtl", ops.gram(rows), max_norm=0.0)[0].tolist())
p = torch.zeros(2, requires_grad=True)
igb.Balancer("imtl_g", shared=[p]).backward([p @ row for row in rows])
print("GRAD", p.grad.isfinite().all().item())
try:
    ops.gram(rows, backend="cpu")
except RuntimeError as error:
    print("ERROR", error)
"""


def test_without_the_compiled_module_the_reference_runs_and_says_so_once():
    lines = run_python(WITHOUT_MODULE)
    logged = [line for line in lines if line.startswith("LOG")]
    assert len(logged) == 1, logged
    assert "WARNING" in logged[0]
    assert "reference" in logged[0]
    assert "could not be imported" in logged[0]
    assert "GRAM [[9.0, 0.0], [0.0, 16.0]]" in lines
    assert "NORMS [9.0, 16.0]" in lines
    assert "WEIGHTS [0.3333333333333333, 0.25]" in lines
    assert "GRAD True" in lines
    (cpu,) = (line for line in lines if line.startswith("CPU"))
    assert cpu.startswith("CPU False not available: ")
    (error,) = (line for line in lines if line.startswith("ERROR"))
    assert "backend='cpu'" in error
    assert "pip install" in error


def test_mixed_layouts_are_copied_and_it_is_said_once(caplog):
    from igb_kernels._log import warn_once

    warn_once.cache_clear()
    rows = gradients(2, [(2, 3, 4, 5)], torch.float32, layout="mixed")
    for _ in range(3):
        ops.gram(rows)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "memory layout" in caplog.text


@pytest.mark.parametrize("name", ["gram", "sq_norms"])
def test_meta_tensors_need_no_backend(name):
    rows = [[torch.empty(5, device="meta")], [None]]
    assert getattr(ops, name)(rows).shape[0] == 2
