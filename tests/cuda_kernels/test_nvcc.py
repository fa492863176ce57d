"""What nvcc made of the kernels: no spills, and registers for the blocks that are meant to run together."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from igb_kernels import _native

FUNCTION = re.compile(r"Function (\S+):\n\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
REGISTERS = 65536  # of a multiprocessor
THREADS = 256


def cuobjdump() -> str:
    if found := shutil.which("cuobjdump"):
        return found
    triton = pytest.importorskip("triton", reason="no cuobjdump on the PATH, and no Triton, which has one")
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def test_nothing_spills():
    """In any architecture that the module is built for."""
    if _native.module is None or not hasattr(_native.module, "cuda"):
        pytest.skip("igb_kernels._C was built without nvcc")
    command = [cuobjdump(), "--dump-resource-usage", _native.module.__file__]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = FUNCTION.findall(report)
    assert len(found) > 20
    for name, registers, stack, local in found:
        # Four random words, which are chosen by an index, have no place in registers.
        room = 64 if re.search("Pcgrad|Gradvac|scale_losses", name) else 0
        assert int(stack) <= room, name
        assert int(local) == 0, name
        # Two blocks of the kernels for up to four rows, and of those without rows, fit four times.
        small = re.search(r"gram_partialI\w+Li[1234]ELb1E", name) or not re.search(
            "gram_partial|_problem|scale_losses", name
        )
        assert int(registers) <= (REGISTERS // THREADS // 4 if small else 255), name
