"""`python -m igb_kernels profile script.py`: every balancer of a script."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

import igb_kernels as igb
from igb_kernels.__main__ import main

from .nets import Training
from .test_profile import left_in

TESTS = pathlib.Path(__file__).resolve().parents[1]
SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import helper
from profiling.nets import Training
print("arguments", sys.argv[1:], __name__, helper.VALUE)
trainings = [Training(method) for method in ("igb_v1+nash_mtl", "db_mtl", "emtl")]
for i in range(int(sys.argv[1])):
    for training in trainings[:2]:  # the third takes no steps
        training.step()
print("the end")
"""


@pytest.fixture
def script(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "helper.py").write_text("VALUE = 'from beside the script'")
    path = tmp_path / "train.py"
    path.write_text(SCRIPT.format(tests=str(TESTS)))
    return path


def test_the_command(script):
    trace = script.with_name("trace.json")
    package = pathlib.Path(igb.__file__).parents[1]
    command = ["-m", "igb_kernels", "profile", "--json", "--steps", "3", "--warmup", "1", "--trace", str(trace)]
    result = subprocess.run(
        [sys.executable, *command, str(script), "1000", "--json"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(package)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert "arguments ['1000', '--json'] __main__ from beside the script" in result.stderr
    assert "the end" not in result.stderr
    assert [profile["steps"] for profile in found] == [3, 3]
    assert ["Nash" in found[0]["balancer"], "DBMTL" in found[1]["balancer"]] == [True, True]
    assert json.loads(trace.read_text())["traceEvents"]
    assert trace.with_stem("trace-1").exists()


def run(*arguments: str) -> int:
    """In this process, of which nothing is changed."""
    before = sys.argv[:], sys.path[:], left_in(Training())[-2:]
    code = main(["profile", *arguments])
    assert (sys.argv, sys.path, left_in(Training())[-2:]) == before
    return code


def test_to_the_end_of_the_script(script, capsys):
    assert run("--to-end", "--steps", "1", "--warmup", "0", "--without-reference", str(script), "5") == 0
    printed = capsys.readouterr().out
    assert "the end" in printed
    assert printed.count("What to change") == 2
    assert "reference" not in printed


def test_a_script_that_fails(script, capsys):
    script.write_text(SCRIPT.format(tests=str(TESTS)).replace('print("the end")', "raise ValueError('broken')"))
    assert run("--warmup", "0", str(script), "5") == 1
    printed = capsys.readouterr()
    assert "ValueError: broken" in printed.err
    assert printed.out.count("What to change") == 2


def test_a_script_without_steps(script, capsys):
    assert run(str(script), "0") == 1
    assert "took no step with an igb_kernels.Balancer" in capsys.readouterr().err


def test_a_script_that_exits(script, capsys):
    script.write_text("import sys; sys.exit('no data')")
    assert run(str(script)) == 1
    assert "ended with 'no data'" in capsys.readouterr().err
