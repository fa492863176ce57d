"""Builds and runs the C++ tests of csrc/core, and compiles the same headers with nvcc."""

import pathlib
import shutil
import subprocess

import pytest

HERE = pathlib.Path(__file__).resolve().parent
CORE = HERE.parents[1] / "csrc" / "core"

# One warp that calls both entry points, and the serial team on the host from the same translation unit.
KERNEL = """
#include "losses.h"
#include "solve.h"

__global__ void balance(igb::Method method, igb::Problem problem, igb::LossRule rule, const double* per_task,
                        double* scales, double* weights, double* workspace, int* status) {
  const igb::WarpTeam team(static_cast<int>(threadIdx.x));
  const igb::LossProblem losses_only{problem.tasks, problem.losses, per_task, problem.options, problem.state};
  const int losses = igb::loss_scales(rule, losses_only, scales, team);
  const int solve = igb::solve(method, problem, weights, workspace, team);
  if (team.lane() == 0) *status = losses | solve;
}

void launch(igb::Method method, igb::Problem problem, igb::LossRule rule, const double* per_task, double* scales,
            double* weights, double* workspace, int* status, cudaStream_t stream) {
  balance<<<1, 32, 0, stream>>>(method, problem, rule, per_task, scales, weights, workspace, status);
}

int on_host(igb::Method method, const igb::Problem& problem, double* weights, double* workspace) {
  static_assert(igb::workspace_size(igb::Method::equal, 4) >= 0, "sizes are constants");
  return igb::solve(method, problem, weights, workspace, igb::SerialTeam{});
}
"""


def find_tool(*candidates):
    return next(filter(None, map(shutil.which, candidates)), None)


def check_run(command):
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{command[0]} exited with {done.returncode}:\n{done.stdout}"
    return done.stdout


def test_core_under_sanitizers(tmp_path):
    compiler = find_tool("g++", "clang++", "c++")
    if compiler is None:
        pytest.skip("no C++ compiler found")
    program = tmp_path / "test_core"
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    warnings = ["-Wall", "-Wextra", "-Werror"]
    sources = sorted(HERE.glob("test_*.cpp"))
    flags = ["-std=c++17", "-O1", "-g", "-ffp-contract=off", *sanitizers, *warnings, f"-I{CORE}"]
    check_run([compiler, *flags, *sources, "-o", program])
    print(check_run([program]))


def test_core_compiles_with_nvcc(tmp_path):
    nvcc = find_tool("nvcc", "/usr/local/cuda/bin/nvcc", "/usr/local/bin/nvcc")
    if nvcc is None:
        pytest.skip("no nvcc found")
    source = tmp_path / "kernel.cu"
    source.write_text(KERNEL)
    warnings = ["-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra"]
    flags = ["-x", "cu", "-arch=sm_90", "-std=c++17", "--fmad=false", *warnings, f"-I{CORE}"]
    check_run([nvcc, *flags, "-c", source, "-o", tmp_path / "kernel.o"])
