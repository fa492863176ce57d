"""`python -m igb_kernels bench`, as its users run it."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from igb_kernels import ops
from igb_kernels.__main__ import main
from igb_kernels.backends import cpu
from igb_kernels.bench import command, machine
from igb_kernels.bench.measure import Harness
from igb_kernels.bench.results import Results

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = ("--seconds", "0.01", "--tasks", "2", "--params", "2000")


@pytest.fixture(autouse=True)
def small_caches(monkeypatch):
    """Emptying them takes longer than all else."""
    monkeypatch.setattr("igb_kernels.bench.measure.cache_bytes", lambda device: 1 << 10)


def subprocess_of(*arguments):
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # no xdist in there
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=env)


def results_in(text, tmp_path):
    path = tmp_path / "printed.json"
    path.write_text(text)
    return Results.load(path)


def test_operations_and_solvers_in_a_process(tmp_path):
    saved, figure = tmp_path / "saved.json", tmp_path / "figure.svg"
    names = "gram,combine,imtl_g,upgrad,uw"
    result = subprocess_of(
        "igb_kernels", "bench", "ops", "solvers", *TINY, "--methods", names, "--compare", "torchjd",
        "--json", "--save", str(saved), "--figure", str(figure),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = results_in(result.stdout, tmp_path)
    assert found == Results.load(saved)
    assert [(m.suite, m.name, m.tasks) for m in found.measurements] == [
        ("ops", "gram", 2),
        ("ops", "combine", 2),
        ("solvers", "imtl_g", 2),
        ("solvers", "upgrad", 2),
        ("solvers", "uw", 2),
    ]
    assert found.measurements[0].params == 2000
    assert found.machine["torch"] == torch.__version__
    assert found.machine["backends"]["reference"].startswith("available")
    assert f"--methods {names}" in found.command
    assert [line.split("]")[0] for line in result.stderr.splitlines() if line.startswith("[")] == [
        f"[{i}/5" for i in range(1, 6)
    ]
    if importlib.util.find_spec("torchjd"):
        assert found.machine["peers"]["torchjd"]
        assert all(m.rivals["torchjd"].speed_up for m in found.measurements[2:4])
    if importlib.util.find_spec("matplotlib"):
        assert "<svg" in figure.read_text()
    else:
        assert "no figure" in result.stderr


def test_the_table(capsys):
    assert main(["bench", "ops", *TINY, "--methods", "gram,ema", "--dtype", "float32,bfloat16"]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert "ops (cpu on cpu)" in out
    assert ["gram", "2", "2", "k", "bfloat16"] in [line[:5] for line in lines]
    header = next(line for line in out.splitlines() if line.split()[:2] == ["name", "K"])
    for column in ("median", "quartiles", "GB/s", "of copy", "× eager", "× reference", "error"):
        assert column in header


def test_a_wrong_kernel_is_said_and_is_an_error(monkeypatch, capsys):
    right = cpu.gram
    monkeypatch.setattr(cpu, "gram", lambda grads, tasks: right(grads, tasks) * 1.001)
    assert main(["bench", "ops", *TINY, "--methods", "gram"]) == 1
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.split()[:1] == ["gram"])
    assert row.count("≠") == 2
    assert "%" not in row
    assert "gram, K = 2, float32, reference: ours: results disagree: error 1.0e-03" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed"], "suite must be one of ops, solvers"),
        (["ops", "--methods", "gram,grim"], "found 'grim'. There are ops: gram, sq_norms"),
        (["ops", "--methods", "nash_mtl"], "found 'nash_mtl'. There are ops: gram"),
        (["--dtype", "float31"], "dtype must be one of float32, float64, bfloat16, float16, found 'float31'"),
        (["--tasks", "0"], "must be a number of tasks, 1 to 1024, found '0'"),
        (["--tasks", "2.5"], "whole numbers of tasks, found '2.5'"),
        (["--params", "many"], "must be a number of elements, 1 or more, found 'many'"),
        (["--seconds", "nan"], "must be a number of seconds, more than 0, found 'nan'"),
        (["--compare", "torchjd,jax"], "a library must be one of torchjd, libmtl, all, none, found 'jax'"),
        (["--compare", "torchjd,none"], "all and none stand alone"),
        (["--backend", "fast"], "backend must be one of auto, cpu, cuda, triton, reference, found 'fast'"),
        (["--device", "tpu"], "tpu"),
        (["--device", "meta"], "must be cpu or cuda, found 'meta'"),
        (["--save", "results.txt"], "must end in .json, found 'results.txt'"),
        (["--save", "/no/such/folder/results.json"], "must be in a folder that is there"),
        (["--figure", "figure.doc"], "must end in .png or .svg or .pdf"),
    ],
)
def test_what_is_unknown_is_answered_with_what_there_is(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(["bench", *arguments])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", [["--device", "cuda"], ["--backend", "cuda"]])
def test_without_a_gpu(capsys, arguments):
    with pytest.raises(SystemExit):
        main(["bench", "ops", *arguments])
    assert "PyTorch finds no GPU" in capsys.readouterr().err or "built without CUDA" in capsys.readouterr().err


def test_what_is_not_installed_is_not_compared(monkeypatch, capsys):
    monkeypatch.setattr("igb_kernels.bench.peers.installed", list)
    assert main(["bench", "solvers", *TINY, "--methods", "imtl_g", "--compare", "torchjd"]) == 0
    out = capsys.readouterr().out
    assert "torchjd is not installed: not compared" in out
    assert "× torchjd" not in out


def test_nobody_else(capsys):
    assert main(["bench", "solvers", *TINY, "--methods", "imtl_g", "--compare", "none", "--json"]) == 0
    (m,) = json.loads(capsys.readouterr().out)["measurements"]
    assert set(m["rivals"]) == {"reference", "native call"}


def test_an_interruption_keeps_what_there_is(monkeypatch, capsys):
    measure = Harness.measure

    def interrupted(self, ours, rivals, *, name, **more):
        if name == "combine":
            raise KeyboardInterrupt
        return measure(self, ours, rivals, name=name, **more)

    monkeypatch.setattr(Harness, "measure", interrupted)
    main(["bench", "ops", *TINY, "--methods", "gram,sq_norms,combine,ema"])
    out = capsys.readouterr().out
    assert "sq_norms" in out
    assert "interrupted at combine, K = 2, D = 2 k, float32: 2 of 4 are missing" in out


def test_the_reference_backend_can_be_measured(capsys):
    assert main(["bench", "ops", *TINY, "--methods", "gram", "--backend", "reference", "--json"]) == 0
    (m,) = json.loads(capsys.readouterr().out)["measurements"]
    assert m["backend"] == "reference"
    assert set(m["rivals"]) == {"copy", "cpu", "eager"}


def test_defaults_are_quick():
    given = main_options("bench")
    suites, options, _ = command.options_of(given)
    assert suites == command.BY_DEFAULT
    assert options.quick
    assert not command.options_of(main_options("bench", "ops"))[1].quick


def main_options(*arguments):
    from igb_kernels.__main__ import parser

    return parser().parse_args(arguments)


def test_durations():
    assert [command.duration(ms) for ms in (1234.5, 12.34, 0.01234, 1e-4)] == ["1.23 s", "12.3 ms", "12.3 µs", "0.1 µs"]


def test_progress_by_rich(monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with command.progress(2) as advance:
        advance("one", 0.1)
    assert not capsys.readouterr().out


def test_the_commit_is_that_of_the_packages_checkout(monkeypatch, tmp_path):
    import igb_kernels

    package = tmp_path / "site-packages" / "igb_kernels"
    package.mkdir(parents=True)
    monkeypatch.setattr(igb_kernels, "__file__", str(package / "__init__.py"))
    assert machine.commit() == igb_kernels.__version__
    subprocess.run(["git", "init", "-q", tmp_path], check=True)  # somebody else's
    assert machine.commit() == igb_kernels.__version__
    subprocess.run(["git", "init", "-q", package.parent], check=True)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    add = ["git", "-C", package.parent, *identity, "commit", "-q", "--allow-empty", "-m", "x"]
    subprocess.run(add, check=True)
    assert len(machine.commit()) >= 7


def test_the_machine():
    found = machine.machine()
    assert found["threads"] == torch.get_num_threads()
    assert found["gpu"] is None
    assert found["device"] == found["cpu"]
    json.dumps(found)
    assert (machine.free_bytes(torch.device("cpu")) or 1) > 0


def test_the_suites_of_pytest_benchmark_have_the_same_rounds(tmp_path):
    pytest.importorskip("pytest_benchmark")
    path, theirs = tmp_path / "results.json", tmp_path / "benchmark.json"
    result = subprocess_of(
        "pytest", "benchmarks/test_solvers.py", "-k", "imtl_g and 3", "--benchmark-enable", "--seconds", "0.05",
        "-p", "no:cacheprovider", "--results", str(path), "--benchmark-json", str(theirs),
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    (m,) = Results.load(path).measurements
    (benchmark,) = json.loads(theirs.read_text())["benchmarks"]
    assert benchmark["stats"]["median"] == pytest.approx(1e-3 * m.timing.ms, rel=1e-6)
    assert benchmark["stats"]["rounds"] == m.timing.rounds
    assert m.name in ops.SOLVERS
    assert "× reference" in result.stdout
