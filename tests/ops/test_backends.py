"""Which backend runs, and what happens where the compiled module is absent."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types

import pytest
import torch
from samplers import gradients

import igb_kernels as igb
from igb_kernels import _native, ops
from igb_kernels._log import warn_once
from igb_kernels.backends import Availability, resolve

backends = importlib.import_module("igb_kernels.backends")  # as an attribute of the package, it is the function
DECLARED = ["cpu", "cuda", "triton", "reference"]
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


def run_python(script):
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_backends_lists_each_with_its_detail():
    found = igb.backends()
    assert list(found) == DECLARED
    assert found["cpu"]
    assert found["reference"], "both can be used where the module is built"
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
    warn_once.cache_clear()
    rows = gradients(2, [(2, 3, 4, 5)], torch.float32, layout="mixed")
    for _ in range(3):
        ops.gram(rows)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "memory layout" in caplog.text


# ---- Which one a GPU gets ----------------------------------------------------------------------------------------


@pytest.fixture
def offered(monkeypatch, caplog):
    """Sets which backends can be used, as if on another machine; the process has chosen none yet."""
    resolve.cache_clear()
    warn_once.cache_clear()

    def offer(**reasons):
        for name, reason in reasons.items():
            found = Availability(reason is None, reason or "there")
            monkeypatch.setitem(backends._AVAILABILITY, name, lambda found=found: found)
        return caplog

    yield offer
    resolve.cache_clear()
    warn_once.cache_clear()


NO_NVCC, NO_TRITON = "built without CUDA", "triton is not installed"


@pytest.mark.parametrize(
    ("cuda", "triton", "chosen", "said"),
    [
        (None, None, "cuda", []),
        (None, NO_TRITON, "cuda", []),
        (NO_NVCC, None, "triton", [NO_NVCC]),
        (NO_NVCC, NO_TRITON, "reference", [NO_NVCC, NO_TRITON]),
    ],
)
def test_auto_on_a_gpu_is_the_fastest_there_is(offered, cuda, triton, chosen, said):
    log = offered(cuda=cuda, triton=triton)
    for _ in range(2):
        assert backends._fastest("cuda") == chosen
    messages = [record.getMessage() for record in log.records]
    assert len(messages) == bool(said), "each choice is logged once"
    for reason in said:
        assert reason in messages[0]
    if said:
        assert f"using the {'slow ' * (chosen == 'reference')}{chosen} backend on cuda" in messages[0]


def test_auto_on_a_device_without_kernels(offered):
    log = offered()
    assert backends._fastest("xpu") == "reference"
    assert "no kernels for xpu" in log.text


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_gpu_backend_refuses_cpu_tensors(offered, monkeypatch, name):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    offered(cuda=None, triton=None)
    with pytest.raises(ValueError, match=f"backend='{name}' needs tensors on a GPU.*found them on cpu"):
        ops.gram(torch.ones(2, 3), backend=name)


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_backend_that_is_not_there_says_why(offered, name):
    offered(cuda=NO_NVCC, triton=NO_TRITON)
    with pytest.raises(RuntimeError, match=f"backend='{name}' was asked for, but {igb.backends()[name].detail}"):
        ops.gram(torch.ones(2, 3), backend=name)


def test_a_build_without_nvcc_says_so(monkeypatch):
    monkeypatch.setattr(_native, "module", types.SimpleNamespace())
    assert str(backends._cuda()) == (
        "not available: igb_kernels._C was built without CUDA: build it where nvcc is on the PATH (or CUDACXX names it)"
    )


def test_a_rocm_pytorch_gets_triton(monkeypatch):
    monkeypatch.setattr(_native, "module", types.SimpleNamespace(cuda=object()))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "ROCm" in str(backends._cuda())


@WITHOUT_GPU
def test_without_a_gpu_pytorch_says_what_is_missing(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(_native, "module", types.SimpleNamespace(cuda=object()))
    monkeypatch.setattr(backends, "find_spec", lambda name: object())
    for found in (backends._cuda(), backends._triton()):
        assert str(found).startswith("not available: PyTorch finds no GPU ("), found


def test_without_triton(monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert str(backends._triton()) == "not available: triton is not installed (pip install triton)"


@pytest.mark.parametrize("name", ["gram", "sq_norms"])
def test_meta_tensors_need_no_backend(name):
    rows = [[torch.empty(5, device="meta")], [None]]
    assert getattr(ops, name)(rows).shape[0] == 2
