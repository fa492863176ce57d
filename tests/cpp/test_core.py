"""Builds and runs the C++ tests of csrc/core."""

import pathlib
import shutil
import subprocess

import pytest

HERE = pathlib.Path(__file__).resolve().parent
CORE = HERE.parents[1] / "csrc" / "core"


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
