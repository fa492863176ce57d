"""What the emulation is worth: it must notice mistakes that CUDA kernels are prone to."""

import subprocess
import sys
from pathlib import Path

import pytest

from .check_build import WRONG
from .emulated import ROOT, build

BUGS = {
    "no barrier before the block's sums are read": (
        "device.cuh",
        "  __syncthreads();\n  for (int i = threadIdx.x; i < N",
        "  for (int i = threadIdx.x; i < N",
    ),
    "half of a warp is left out": ("device.cuh", "int distance = 16;", "int distance = 8;"),
    "the last chunk is taken for a full one": ("device.cuh", "left < size ? left : size", "left < size ? size : size"),
    "the last elements are forgotten": (
        "multi_tensor.cu",
        "i < chunk.size; i += kThreads) sum[0] += w",
        "i < 0;) sum[0] += w",
    ),
    "16-byte accesses at any address": ("device.cuh", "reinterpret_cast<std::uintptr_t>(p) % 16 == 0", "p != p + 1"),
    "rows are replaced while others read them": (
        "multi_tensor.cu",
        "    __syncthreads();  // every thread has left the last chunk's rows\n",
        "",
    ),
    "a barrier that some threads do not reach": (
        "multi_tensor.cu",
        "    bool aligned = is_aligned(to);\n",
        "    bool aligned = is_aligned(to);\n    if (threadIdx.x % 2) __syncthreads();\n",
    ),
    "one pair takes another's place": (
        "multi_tensor.cu",
        "i * (i + 1) / 2 + j] += x[i] * x[j]",
        "i * (i + 1) / 2 + j] += x[i] * x[0]",
    ),
}


def is_right(module: Path) -> bool:
    """Whether a build's kernels pass, in a process of its own: what reads beyond its memory may crash."""
    command = [sys.executable, "-m", "tests.cuda_kernels.check_build", module]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode != 0 or result.stdout == "right\n"
    assert result.returncode in (0, WRONG) or result.returncode < 0, result.stderr
    return result.returncode == 0


def test_the_sources_as_they_are(emulated):
    assert is_right(Path(emulated.__file__))


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_noticed(emulated, tmp_path, bug):
    file, right, wrong = BUGS[bug]
    assert not is_right(build(tmp_path / "build", {file: {right: wrong}}, reuse=Path(emulated.__file__).parent))
