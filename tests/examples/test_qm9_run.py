"""The QM9 example run: a short training on the molecules kept in the repository, and the command line."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.table import Table

import igb_kernels as igb

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "qm9"))

import data
import figure
import loop
import train


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    """The runs set PyTorch's threads for the process; other tests get theirs back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_delta_m_is_the_mean_relative_change() -> None:
    assert loop.delta_m(np.array([1.0, 3.0]), np.array([2.0, 2.0])) == pytest.approx(0)
    assert loop.delta_m(np.array([1.0, 1.0]), np.array([2.0, 4.0])) == pytest.approx(-62.5)


def test_labels_are_spread() -> None:
    places = figure.spread(np.array([0.5, 0.5, 0.98, 1.0]), gap=0.1)
    assert (np.diff(places) >= 0.1 - 1e-12).all()
    assert places.max() <= 1


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("qm9")
    arguments = ["--data", "tiny", "--epochs", "4", "--batch-size", "25", "--timing-steps", "2", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        printed: list[str] = []
        patch.setattr("rich.console.Console.print", lambda self, *things, **_: printed.extend(map(_text, things)))
        assert train.main(arguments) == 0
    return out, "\n".join(printed)


def _text(thing: object) -> str:
    if isinstance(thing, Table):
        rows = zip(*(column.cells for column in thing.columns), strict=True)
        return "\n".join(" | ".join(map(str, row)) for row in rows)
    return str(thing)


def test_run_leaves_its_files(short_run: tuple[Path, str]) -> None:
    out, printed = short_run
    assert {file.name for file in out.iterdir()} == {"metrics.json", "history.npz", "report.png"}
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert str(out / "report.png") in printed


def test_run_prints_its_tables(short_run: tuple[Path, str]) -> None:
    rows = [line.split(" | ") for line in short_run[1].splitlines()]
    firsts = [row[0] for row in rows]
    for name in data.TARGET_NAMES:
        assert len(rows[firsts.index(name)]) == 5  # target, unit, the mean, two methods
    assert rows[firsts.index("Δm against equal")][-1].endswith("%")
    for part in ("forward", "backward passes", "balancing", "optimizer", "step", "step, reference backend"):
        assert len(rows[firsts.index(part)]) == 3


def test_run_learns(short_run: tuple[Path, str]) -> None:
    out, _ = short_run
    metrics = json.loads((out / "metrics.json").read_text())
    history = np.load(out / "history.npz")
    assert list(metrics["methods"]) == ["equal", "igb_v1+db_mtl"]
    for method, entry in metrics["methods"].items():
        losses, weights = history[f"{method}/losses"], history[f"{method}/weights"]
        assert losses.shape == weights.shape == (48, 11)
        assert np.isfinite(losses).all()
        assert np.isfinite(weights).all()
        assert losses[-6:].mean() < 0.8 * losses[:6].mean()
        assert entry["complete"]
        assert entry["status"] == "ordinary"
        assert set(entry["test_mae"]) == set(data.TARGET_NAMES)
        assert np.isfinite(list(entry["test_mae"].values())).all()
        assert entry["step_time_ms"]["forward"] > 0
    assert (history["equal/weights"] == 1).all()
    assert metrics["methods"]["equal"]["delta_m_percent"] == 0
    # same start, same first batch
    assert (history["equal/losses"][0] == history["igb_v1+db_mtl/losses"][0]).all()


def test_interrupt_reports_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backward = igb.Balancer.backward
    calls = 0

    def interrupted(self: igb.Balancer, losses: dict[str, torch.Tensor]) -> object:
        nonlocal calls
        calls += 1
        if calls > 5:
            raise KeyboardInterrupt
        return backward(self, losses)

    monkeypatch.setattr(igb.Balancer, "backward", interrupted)
    code = train.main(["--data", "tiny", "--steps", "10", "--methods", "equal", "db_mtl", "--out", str(tmp_path)])
    assert code == 130
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["methods"]["equal"]["steps"] == 5
    assert not metrics["methods"]["equal"]["complete"]
    assert "db_mtl" not in metrics["methods"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs must be at least 1; found 0"),
        (["--lr", "-1"], "--lr must be positive and finite; found -1.0"),
        (["--data", "tiny", "--full"], "--full takes all of --data qm9pack; found --data tiny"),
        (["--methods", "equal", "equal"], "--methods must not repeat a name; found equal equal"),
        (["--device", "nonsense"], "--device must be a device of this machine; found nonsense"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(arguments)
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "nonsense"], "--methods must name methods of igb_kernels.Balancer; found 'nonsense'"),
        (["--batch-size", "301"], "--batch-size must be at most the 300 training molecules; found 301"),
        (["--molecules", "401"], "--molecules must be between 10 and the 400 available; found 401"),
    ],
)
def test_bad_runs_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--data", "tiny", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().out.split())


def test_igb_v2_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", "tiny", "--steps", "3", "--methods", "equal", "igb_v2+db_mtl", "--timing-steps", "0"]
    assert train.main([*arguments, "--out", str(tmp_path)]) == 0
    assert "agent acts after 5 epochs" in capsys.readouterr().out
    assert json.loads((tmp_path / "metrics.json").read_text())["methods"]["igb_v2+db_mtl"]["complete"]


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "igb_kernels.agents.sac", None)
    assert train.main(["--data", "tiny", "--methods", "igb_v2"]) == 2
    assert 'pip install "igb-kernels[igbv2]"' in " ".join(capsys.readouterr().out.split())
