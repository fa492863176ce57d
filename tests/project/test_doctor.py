"""`python -m igb_kernels doctor` says what is there and whether it is right, whatever is missing."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import torch

import igb_kernels as igb
from igb_kernels import ops
from igb_kernels.__main__ import main
from igb_kernels.backends import cpu
from igb_kernels.doctor import selftest
from igb_kernels.printing import WIDTH, Section, plain, show

PACKAGE = pathlib.Path(igb.__file__).parent
CPU = torch.device("cpu")
WITHOUT = """
import runpy, sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *rest):
        return None if {name, name.partition(".")[0]} & HIDDEN else self.finder.find_spec(name, *rest)

HIDDEN = set(sys.argv.pop(1).split(","))
sys.meta_path[:] = map(Hiding, sys.meta_path)
runpy.run_module("igb_kernels", run_name="__main__", alter_sys=True)
"""


def doctor(*arguments: str, hidden: str = "", package: pathlib.Path = PACKAGE, **environment: str):
    """What the command prints, and its exit code; `hidden` are modules that are not there."""
    start = ["-c", WITHOUT, hidden] if hidden else ["-m", "igb_kernels"]
    variables = {name: value for name, value in os.environ.items() if name not in ("CUDACXX", "TRITON_INTERPRET")}
    return subprocess.run(
        [sys.executable, *start, "doctor", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=package.parent,
        env={**variables, "PYTHONPATH": str(package.parent), **environment},
    )


def words(text: str) -> str:
    return " ".join(text.split())


def test_all_is_right_here():
    result = doctor("--json")
    found = json.loads(result.stdout)
    assert result.returncode == 0, found["problems"]
    assert found["right"]
    assert not found["problems"]
    assert found["devices"][0]["backend"] == "cpu"
    checked = {
        (test["backend"], check["kind"], check["name"]) for test in found["self_test"] for check in test["checks"]
    }
    registered = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "igb_kernels::" in name}
    assert registered >= {"gram", "solve"}
    for backend in ("cpu", "reference"):
        for name in registered - {"solve", "loss_scales"}:
            for dtype in ("float32", "float64", "bfloat16", "float16"):
                assert (backend, "op", f"{name} {dtype}") in checked
        for kind, names in (("solver", ops.SOLVERS), ("rule", ops.RULES)):
            assert {(backend, kind, name) for name in names} <= checked


def test_without_the_compiled_module(tmp_path):
    package = tmp_path / "igb_kernels"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    result = doctor(package=package, hidden="igb_kernels._C")  # an editable install would find it in the checkout
    text = words(result.stdout)
    assert result.returncode == 1, result.stderr
    assert f"igb_kernels {igb.__version__}, in {package}" in text
    assert "compiled module none: the compiled module igb_kernels._C could not be imported" in text
    assert "cpu gets the slow reference backend: cpu: the compiled module" in text
    assert "build it with `pip install .`" in text
    assert "reference cpu" in text
    assert "Not all right: 1 problem above." in result.stdout.splitlines()[-1]


def test_without_triton_nvcc_and_the_rest(tmp_path):
    result = doctor(hidden="triton,stable_baselines3,rich", PATH=str(tmp_path))
    text = words(result.stdout)
    assert result.returncode == 0, result.stderr + result.stdout
    assert "triton not installed (needed only for GPUs" in text
    assert "triton not available: triton is not installed (pip install triton)" in text
    assert "nvcc not found (needed only to build the CUDA kernels" in text
    assert "stable-baselines3 not installed (needed only by IGBv2)" in text
    assert "rich not installed" in text
    assert result.stdout.splitlines()[-1].startswith("All right: ")


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_a_wrong_kernel_is_named_with_its_error(monkeypatch, capsys, error):
    right = cpu.gram
    monkeypatch.setattr(cpu, "gram", lambda grads, tasks: right(grads, tasks) * (1 + error))
    monkeypatch.setattr(selftest, "places", lambda: [("cpu", CPU)])
    monkeypatch.setattr("igb_kernels.doctor.diagnosis.places", selftest.places)
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    shown = "0.001" if error == 1e-3 else "inf"
    assert f"op gram float32 on cpu (cpu): error {shown}, at most 1e-06 is rounding" in found["problems"]
    assert len([problem for problem in found["problems"] if problem.startswith("op ")]) == 4


def test_what_raises_is_a_problem(monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(cpu, "combine_", broken)
    failed = [check for check in selftest.self_test("cpu", CPU) if not check.right]
    assert {check.name for check in failed if check.kind == "op"} == {
        f"combine_ {dtype}" for dtype in ("float32", "float64", "bfloat16", "float16")
    }
    assert all("RuntimeError: no such instruction" in str(check) for check in failed)


@pytest.mark.parametrize("name", ["solve", "loss_scales", "sq_norms", "ema_", "accumulate_squares_", "sign_drop_"])
def test_every_operation_is_seen_to_be_wrong(monkeypatch, name):
    """Each result is off by a millionth and a half."""
    right = getattr(cpu, name)

    def off(*arguments):
        found = right(*arguments)
        return (found[0] * (1 + 1.5e-6), found[1]) if isinstance(found, tuple) else found * (1 + 1.5e-6)

    monkeypatch.setattr(cpu, name, off)
    failed = {check.name.split()[0] for check in selftest.self_test("cpu", CPU) if not check.right}
    known = {"solve": set(ops.SOLVERS), "loss_scales": set(ops.RULES)}
    assert failed >= known.get(name, {name})


def test_plain_tables():
    text = plain([Section("title", ("name", ">number"), [("a", "1"), ("bcd", "22")], ["word " * 40])])
    assert text.splitlines()[:4] == ["title", "  name  number", "  a          1", "  bcd       22"]
    assert max(map(len, text.splitlines())) <= WIDTH


def test_tables_by_rich(monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    show([Section("title", ("name", ">number"), [("[a]", "1")], ["a note"]), Section("last")])
    lines = [re.sub(r"\x1b\[[\d;]*m", "", line).rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["title", "  name  number", "  [a]        1", "  a note", "", "last"]
