"""The scaling study measures what there is memory for, and says what it left out; a baseline decides the exit code."""

from __future__ import annotations

import json

import pytest
import torch

from igb_kernels.__main__ import main
from igb_kernels.bench import scaling
from igb_kernels.bench.cases import Options
from igb_kernels.bench.measure import Harness
from igb_kernels.bench.results import Measurement, Results, Rival, Timing
from igb_kernels.printing import plain


@pytest.fixture
def run(tmp_path, capsys):
    """The command, its exit code and what it says on both streams; results are in r.json."""

    def of(*arguments: str) -> tuple[int, str]:
        save = ["--seconds", "0.1", "--compare", "none", "--device", "cpu", "--save", str(tmp_path / "r.json")]
        code = main(["bench", *arguments, *save])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return of


def test_the_study(run, tmp_path):
    code, said = run("scaling", "--tasks", "2,3", "--params", "500,2000", "--methods", "gram,nash_mtl")
    assert code == 0, said
    found = Results.load(tmp_path / "r.json").measurements
    grams = {(m.tasks, m.params): m for m in found if m.suite == "scaling"}
    assert set(grams) == {(k, d) for k in (2, 3) for d in (500, 2000)}
    for (k, d), m in grams.items():
        assert m.error is not None
        assert m.error < 1e-6
        assert m.moved_bytes == 4 * k * d
        assert set(m.rivals) == {"copy"}
    assert {(m.suite, m.name, m.tasks) for m in found} >= {("solvers", "nash_mtl", k) for k in (2, 3)}


def test_everything_of_the_study_is_a_case():
    labels = [case.label for case in scaling.cases(Options())]
    for name in scaling.STUDIED:
        for tasks in (2, 4, 8, 16, 32, 64):
            for params in ("10 k", "100 k", "1 M", "3 M", "10 M", "30 M", "100 M"):
                assert f"{name}, K = {tasks}, D = {params}, float32" in labels
    assert "upgrad, K = 64" in labels
    assert len(list(scaling.cases(Options(quick=True)))) == 3 * 3 * 3 + 3 * 3


def test_what_there_is_no_memory_for_is_left_out_in_words(monkeypatch):
    monkeypatch.setattr(
        scaling, "free_bytes", lambda device: 6 * 4 * 1000 / scaling.OF_MEMORY
    )  # 4 rows and two buffers
    rows, harness = scaling._Rows((2, 4, 5), torch.device("cpu")), Harness(seconds=0.01)
    options = Options()
    made = scaling.measure("sq_norms", 4, 1000, torch.float32, rows, options, harness)
    assert (made.tasks, made.params) == (4, 1000)
    assert scaling.measure("sq_norms", 5, 1000, torch.float32, rows, options, harness) is None
    assert scaling.measure("sq_norms", 2, 10**9, torch.float32, rows, options, harness) is None
    assert harness.remarks == [
        "K = 5, D = 1 k is left out: 2e-05 GB of gradients, too much for here",
        "K = 2, D = 1 G is left out: 8 GB of gradients, too much for here",
    ]


def test_fewer_tasks_take_the_first_gradients():
    rows = scaling._Rows((2, 5), torch.device("cpu"))
    most, few = rows.first(5, 300, torch.float32), rows.first(2, 300, torch.float32)
    assert [t.data_ptr() for t in few.rows[1]] == [t.data_ptr() for t in most.rows[1]]
    assert (few.tasks, len(few.rows), len(few.weights), few.bytes) == (2, 2, 2, 2 * 300 * 4)
    assert (most.tasks, len(most.rows), most.bytes) == (5, 5, 5 * 300 * 4)
    assert rows.first(5, 300, torch.bfloat16).rows[0][0].dtype is torch.bfloat16


def measured(name: str, k: int, d: int, ms: float, suite: str, **rivals: Rival) -> Measurement:
    return Measurement(suite, name, k, d, "float32", "cpu", "cpu", Timing(ms, ms, ms, 5), rivals=rivals)


def test_the_laws_are_printed():
    tasks, params = (2, 4, 8, 16, 32, 64), (10**4, 10**5, 10**6, 10**7, 10**8)
    grams = [measured("gram", k, d, 0.01 + 1e-8 * k**1.5 * d, "scaling") for k in tasks for d in params]
    native = [Rival(Timing(1e-5 * k**2, 0, 0, 5), 0.1) for k in tasks]
    solves = [
        measured("upgrad", k, 0, 1.0, "solvers", **{"native call": r}) for k, r in zip(tasks, native, strict=True)
    ]
    text = plain(scaling.sections([*grams, *solves]))
    assert "1.50 ± 0.00  1.00 ± 0.00" in text
    line = next(line for line in text.splitlines() if "gram" in line)
    assert " ".join(line.split()).endswith("1.50 ± 0.00 1.00 ± 0.00 21 0.01 354 k / 1.95 k")
    assert "2.00 ± 0.00" in next(line for line in text.splitlines() if "upgrad" in line)
    assert scaling.sections(grams[:2]) == []


# ---- Baselines ----------------------------------------------------------------------------------------------------

SOLVE = ("solvers", "--tasks", "3", "--methods", "nash_mtl")


def test_a_run_beside_a_baseline(run, tmp_path):
    code, said = run(*SOLVE)
    assert code == 0, said
    path = tmp_path / "baseline.json"
    saved = json.loads((tmp_path / "r.json").read_text())

    def baseline(factor: float) -> tuple[int, str]:
        for rival in saved["measurements"][0]["rivals"].values():
            rival["speed_up"] *= factor
        path.write_text(json.dumps(saved))
        return run(*SOLVE, "--baseline", str(path))

    code, said = baseline(0.1)
    assert code == 0
    assert "None of 1 is slower than in the baseline." in said
    code, said = baseline(1000.0)
    assert code == 1
    assert "1 of 1 slower than in the baseline, 0 wrong." in said
    code, said = run(*SOLVE, "--baseline", str(path), "--json")
    assert code == 1
    assert "1 of 1 slower than in the baseline, 0 wrong." in said


@pytest.mark.parametrize("content", [None, "{}"])
def test_a_baseline_that_cannot_be_read_is_known_before_anything_is_measured(tmp_path, capsys, content):
    path = tmp_path / "b.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as error:
        main(["bench", *SOLVE, "--baseline", str(path)])
    assert error.value.code == 2
    assert "b.json" in capsys.readouterr().err
