"""The figure shows what was recorded."""

from __future__ import annotations

import sys

import pytest
import torch

import igb_kernels as igb

from .problems import TASKS, random_gradients, steps

matplotlib = pytest.importorskip("matplotlib")


def monitor_of(method: str, count: int, tasks: int = 3, **options) -> igb.Monitor:
    monitor = igb.Monitor(warn=None)
    names = TASKS if tasks == 3 else [f"task {k}" for k in range(tasks)]
    for result in steps(method, random_gradients(tasks, 2 * tasks), count, names=names, **options):
        monitor.record(result)
    return monitor


def panels(figure) -> dict[str, object]:
    return {axes.get_title(): axes for axes in figure.axes if axes.get_title()}


def test_all_panels(tmp_path):
    monitor = monitor_of("igb_v1+nash_mtl", 30)
    history, figure = monitor.history(), monitor.figure()
    shown = panels(figure)
    assert [*shown] == ["Weights", "Loss scales", "Mean cosine of gradients", "Steps in conflict (cosine < 0)"]
    for title, kind in (("Weights", "weight"), ("Loss scales", "scale")):
        lines = shown[title].get_lines()
        assert [line.get_label() for line in lines] == [*TASKS]
        for line, task in zip(lines, TASKS, strict=True):
            assert [*line.get_xdata()] == list(range(30))
            assert [*line.get_ydata()] == history[f"{kind}/{task}"].tolist()
        assert shown[title].get_xlabel() == "step"
    assert [text.get_text() for text in shown["Loss scales"].get_legend().get_texts()] == [*TASKS]
    cosines = torch.tensor(shown["Mean cosine of gradients"].get_images()[0].get_array().filled(7.0))
    conflicts = torch.tensor(shown["Steps in conflict (cosine < 0)"].get_images()[0].get_array().filled(7.0))
    for i, a in enumerate(TASKS):
        assert cosines[i, i] == 7.0, "of a task with itself there is nothing to show"
        for j, b in enumerate(TASKS[i + 1 :], i + 1):
            values = history[f"cosine/{a}/{b}"]
            assert float(cosines[i, j]) == float(cosines[j, i]) == pytest.approx(float(values.mean()), rel=1e-12)
            assert (
                float(conflicts[i, j]) == float(conflicts[j, i]) == pytest.approx(float((values < 0).double().mean()))
            )
    texts = {text.get_text() for text in shown["Mean cosine of gradients"].texts}
    assert texts == {f"{float(history[f'cosine/{a}/{b}'].mean()):.2f}" for a, b in (TASKS[:2], TASKS[1:], TASKS[::2])}
    labels = [label.get_text() for label in shown["Mean cosine of gradients"].get_xticklabels()]
    assert labels == [*TASKS]
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert "matplotlib.pyplot" not in sys.modules or matplotlib.pyplot.get_fignums() == []


def test_long_runs_are_means():
    monitor = monitor_of("emtl", 1001)
    line = panels(monitor.figure())["Weights"].get_lines()[1]
    weights = monitor.history()["weight/normals"]
    assert [*line.get_xdata()] == [*range(1, 1001, 2), 1000]
    want = [float(weights[i : i + 2].mean()) for i in range(0, 1001, 2)]
    assert [*line.get_ydata()] == pytest.approx(want, rel=1e-12)
    assert panels(monitor.figure())["Weights"].get_xlabel() == "step (means of 2)"


def test_without_gramians():
    assert [*panels(monitor_of("db_mtl", 5).figure())] == ["Weights", "Loss scales"]


def test_gaps_and_scales():
    """Missing tasks leave gaps; scales over orders of magnitude get a logarithmic axis."""
    monitor = monitor_of(
        "igb_v1+imtl_g",
        8,
        missing=lambda step: [1] if step in (3, 4) else (),
        offset=lambda step: torch.tensor([1.0, 2.0, 3.0]),
    )
    line = panels(monitor.figure())["Weights"].get_lines()[1]
    assert [y != y for y in line.get_ydata()] == [step in (3, 4) for step in range(8)]
    wide = monitor_of("db_mtl", 4, offset=lambda step: torch.tensor([1.0, 1e3, 1e-3]))
    assert panels(wide.figure())["Loss scales"].get_yscale() == "log"


def test_many_tasks(tmp_path):
    figure = monitor_of("imtl_g", 3, tasks=14).figure()
    shown = panels(figure)
    assert shown["Loss scales"].get_legend() is None
    assert not shown["Mean cosine of gradients"].texts
    assert len(shown["Weights"].get_lines()) == 14
    figure.savefig(tmp_path / "figure.png")


def test_one_task():
    assert [*panels(monitor_of("equal", 4, tasks=1).figure())] == ["Weights", "Loss scales"]


def test_nothing_to_draw():
    with pytest.raises(RuntimeError, match="there is nothing to draw: no step was recorded, or none is kept"):
        igb.Monitor().figure()
