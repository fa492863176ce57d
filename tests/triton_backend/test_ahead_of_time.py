"""The Triton kernels compiled for GPUs that need not be there: registers, spills and the width of loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

HERE = Path(__file__).parent
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

MOST_REGISTERS = 192
"""A multiprocessor has room for 2 programs of 128 threads then, and for 3 with up to 168, which is what most need."""


@pytest.fixture(params=[80, 90], ids="sm_{}".format)
def kernels(request):
    if not (TOOLS / "cuobjdump").exists():
        pytest.skip(f"this triton comes without cuobjdump (looked in {TOOLS})")
    return compiled(request.param)


@cache  # a fixture of the module's would be made again whenever the parameter changes
def compiled(architecture):
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "TRITON_CACHE_DIR": folder}
        env.pop("TRITON_INTERPRET", None)
        command = [sys.executable, "-m", "compile_kernels", str(architecture)]
        env["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parents[1]), env.get("PYTHONPATH", "")])
        run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_nothing_spills(kernels):
    assert not [kernel for kernel in kernels if kernel["stack"]]


def test_registers(kernels):
    assert not [kernel for kernel in kernels if kernel["registers"] > MOST_REGISTERS]


def test_full_chunks_are_loaded_16_bytes_at_a_time(kernels):
    assert not [kernel for kernel in kernels if kernel["loads"] < kernel["expected_loads"]]
