"""The Triton backend in Triton's interpreter, which needs no GPU.

The interpreter has to be chosen before triton is imported, so `interpreted_*.py` run in processes of their own. It runs
the programs one after another and rounds no store to bfloat16: races and rounding are for tests on a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.mark.parametrize("name", sorted(path.name for path in HERE.glob("interpreted_*.py")))
def test_interpreted(name):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-o", "pythonpath=tests/ops", "-p", "no:cacheprovider", HERE / name],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
