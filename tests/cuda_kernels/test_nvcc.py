"""What nvcc makes of the kernels: no spills, and registers for the blocks that are meant to run together."""

import re
import shutil
import subprocess

import pytest

from .emulated import CUDA

FUNCTION = re.compile(
    r"Function properties for (\S+)\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
    r"ptxas info\s+: Used (\d+) registers"
)
REGISTERS = 65536  # of a multiprocessor
THREADS = 256


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize(("source", "flags"), [("multi_tensor.cu", []), ("problem.cu", ["--fmad=false"])])
def test_nothing_spills(tmp_path, source, flags, architecture):
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        pytest.skip("no nvcc found")
    command = [nvcc, "-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas", "-v", "-Werror", "all-warnings", *flags]
    result = subprocess.run(
        [*command, "-c", CUDA / source, "-o", tmp_path / "kernels.o"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    found = FUNCTION.findall(result.stderr)
    assert len(found) > 5
    for name, stack, stores, loads, registers in found:
        assert (int(stack), int(stores), int(loads)) == (0, 0, 0), name
        # Two blocks of the kernels for up to four rows, and of those without rows, fit four times.
        small = re.search(r"gram_partialI\w+Li[1234]ELb1E", name) or (
            "gram_partial" not in name and "problem" not in source
        )
        assert int(registers) <= (REGISTERS // THREADS // 4 if small else 255), name
