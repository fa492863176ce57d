"""What was written is read back by the formats' own readers."""

from __future__ import annotations

import csv
import json
import math
import os
import pathlib
import struct
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import igb_kernels as igb
from igb_kernels import monitor as writers
from igb_kernels.monitor import Block

from .problems import TASKS, random_gradients, steps

pandas = pytest.importorskip("pandas")


def record(to: object, count: int = 10, every: int = 4, method: str = "nash_mtl", **options) -> dict[str, Tensor]:
    """Steps, one of them not finite, one Pareto-stationary, two without a task; what the monitor knows of them."""

    def gradients(step: int) -> Tensor:
        rows = random_gradients()(step)
        return torch.stack([rows[0], -rows[0], rows[2]]) if step == 5 else rows

    with igb.Monitor(to, every=every, warn=None, **options) as monitor:
        for result in steps(
            method,
            gradients,
            count,
            missing=lambda step: [1] if step in (3, 9) else (),
            offset=lambda step: torch.tensor([1.0, 0.1, math.inf if step == 2 else 30.0]),
        ):
            monitor.record(result)
    return monitor.history()


def same(found: list[float], want: Tensor) -> bool:
    """Equal values, and NaN in the same places."""
    return len(found) == len(want) and all(
        a == b or (a != a and b != b) for a, b in zip(found, want.tolist(), strict=True)
    )


# ---- Files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["nash_mtl", "emtl", "equal"])
def test_csv(tmp_path, method):
    history = record(tmp_path / "new" / "log.csv", method=method)
    with (tmp_path / "new" / "log.csv").open(newline="") as file:
        header, *lines = csv.reader(file)
    assert header == [*history]
    columns = dict(zip(header, zip(*lines, strict=True), strict=True))
    for name, want in history.items():
        number = float if want.is_floating_point() else int
        assert same([number(text) for text in columns[name]], want), name
    frame = pandas.read_csv(tmp_path / "new" / "log.csv")
    assert [*frame.columns] == header
    assert frame["step"].tolist() == list(range(10))


def test_csv_is_on_disk_after_each_block(tmp_path):
    monitor = igb.Monitor(path := str(tmp_path / "log.csv"), every=3)
    for i, result in enumerate(steps("equal", random_gradients(), 7), 1):
        monitor.record(result)
        text = pathlib.Path(path).read_text()
        assert text.count("\n") == (i // 3 * 3 + 1 if i >= 3 else 0)


def test_csv_of_a_resumed_training(tmp_path):
    path = tmp_path / "log.csv"
    first = record(writers.CSV(path))
    again = record(writers.CSV(path, append=True))
    frame = pandas.read_csv(path)
    assert [*frame.columns] == [*first]
    assert same(frame["weight/depth"].tolist(), torch.cat([first["weight/depth"], again["weight/depth"]]))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"log.csv must have the columns \['step', .* to be appended to, has \['step'"):
        record(writers.CSV(path, append=True), method="emtl")
    assert path.read_bytes() == before
    record(writers.CSV(path))
    assert len(pandas.read_csv(path)) == 10


@pytest.mark.parametrize("method", ["nash_mtl", "emtl", "equal"])
def test_parquet(tmp_path, method):
    parquet = pytest.importorskip("pyarrow.parquet")
    history = record(tmp_path / "new" / "log.parquet", method=method)
    file = parquet.ParquetFile(tmp_path / "new" / "log.parquet")
    assert file.num_row_groups == 3
    table = file.read()
    assert table.column_names == [*history]
    for name, want in history.items():
        assert str(table[name].type) == ("double" if want.is_floating_point() else "int64")
        assert table[name].null_count == 0
        assert same(table[name].to_pylist(), want), name
    assert [*pandas.read_parquet(tmp_path / "new" / "log.parquet").columns] == [*history]


def test_parquet_without_steps_leaves_no_file(tmp_path):
    pytest.importorskip("pyarrow.parquet")
    igb.Monitor(tmp_path / "log.parquet").close()
    assert not [*tmp_path.iterdir()]


def test_history_is_a_table():
    history = record((), method="nash_mtl")
    frame = pandas.DataFrame(history)
    assert frame.shape == (10, len(history))
    assert str(frame["weight/depth"].dtype) == "float64"
    assert str(frame["status"].dtype) == "int64"
    assert same(frame["loss/normals"].tolist(), history["loss/normals"])


# ---- TensorBoard -------------------------------------------------------------------------------------------------


def scalars(folder: pathlib.Path) -> dict[str, list[tuple[int, float, float]]]:
    """Step, time and value of every scalar, by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0})
    events.Reload()
    return {tag: [(e.step, e.wall_time, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def float32(values: Tensor) -> Tensor:
    """What TensorBoard keeps."""
    return values.float().double()


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    history = record(writers.TensorBoard(tmp_path / "run", mean_of=1))
    found = scalars(tmp_path / "run")
    assert {*found} == {name for name in history if name not in ("step", "time") and not name.startswith("active/")}
    for name, points in found.items():
        there = torch.ones(10, dtype=torch.bool)
        for task in name.split("/")[1:]:
            there &= history[f"active/{task}"].bool()
        assert [step for step, _, _ in points] == history["step"][there].tolist(), name
        assert [time for _, time, _ in points] == history["time"][there].tolist(), name
        assert same([value for _, _, value in points], float32(history[name][there])), name
    assert math.isinf(found["loss/edges"][2][2])
    assert math.isnan(found["weight/depth"][2][2])


def test_tensorboard_in_a_writer_that_is_there(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    with tensorboard.SummaryWriter(tmp_path) as own:
        own.add_scalar("mine", 1.0, 0)
        record(writers.TensorBoard(own, prefix="balancing/", mean_of=1))
        own.add_scalar("mine", 2.0, 1)
    found = scalars(tmp_path)
    assert [value for _, _, value in found["mine"]] == [1.0, 2.0]
    assert len(found["balancing/loss/depth"]) == 10
    assert {tag.split("/")[0] for tag in found} == {"mine", "balancing"}


def test_tensorboard_by_default(tmp_path):
    """Ten steps are a point."""
    pytest.importorskip("tensorboard")
    record(tmp_path / "run", count=45, every=20)
    assert [step for step, _, _ in scalars(tmp_path / "run")["loss/depth"]] == [9, 19, 29, 39, 44]


@pytest.mark.parametrize("mean_of", [1, 3, 4, 100, None])
def test_means(tmp_path, mean_of):
    """Points of several steps, within blocks of 8."""
    pytest.importorskip("tensorboard")
    history = record(writers.TensorBoard(tmp_path, mean_of=mean_of), count=12, every=8)
    size = min(mean_of or 8, 8)
    parts = [range(i, min(i + size, end)) for start, end in ((0, 8), (8, 12)) for i in range(start, end, size)]
    found = scalars(tmp_path)
    assert [step for step, _, _ in found["status"]] == [part[-1] for part in parts]
    bits = history["status"].tolist()
    assert bits[:6] == [0, 0, igb.Status.NON_FINITE, 0, 0, igb.Status.PARETO_STATIONARY]
    assert [int(value) for _, _, value in found["status"]] == [
        int(sum({bit for s in part for bit in (1, 2, 4, 8, 16, 32, 64) if bits[s] & bit})) for part in parts
    ]
    for name in ("loss/normals", "loss/edges", "cosine/depth/normals"):
        values, wanted = history[name], {}
        for part in parts:
            there = [s for s in part if all(history[f"active/{task}"][s] for task in name.split("/")[1:])]
            finite = [float(values[s]) for s in there if math.isfinite(values[s])]
            if there:
                wanted[part[-1]] = sum(finite) / len(finite) if finite else float(values[there[0]])
        got = {step: value for step, _, value in found[name]}
        assert got.keys() == wanted.keys()
        for step, value in wanted.items():
            assert got[step] == pytest.approx(value, rel=1e-6, nan_ok=True)


# ---- Weights & Biases --------------------------------------------------------------------------------------------


def wandb_records(folder: pathlib.Path) -> list[object]:
    """What an offline run has stored: a log of 32 KiB blocks whose records may be in pieces, of protobuf messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, records, whole, at = file.read_bytes(), [], b"", 7
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece
            records.append(Record.FromString(whole))
            whole = b""
    return records


def wandb_rows(folder: pathlib.Path) -> list[dict[str, float]]:
    """The rows of the run's history."""
    rows = [record.history for record in wandb_records(folder) if record.WhichOneof("record_type") == "history"]
    return [{item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row.item} for row in rows]


@pytest.fixture
def offline(monkeypatch, tmp_path) -> pathlib.Path:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_wandb(offline):
    import wandb

    history = record(writers.WandB(project="test", dir=str(offline), mean_of=1))
    assert wandb.run is None
    wandb.teardown()  # waits for the process that writes the file
    rows = wandb_rows(offline)
    assert [row["balancing/step"] for row in rows] == history["step"].tolist()
    for i, row in enumerate(rows):
        names = {name.removeprefix("balancing/") for name in row if name.startswith("balancing/")} - {"step"}
        gone = {"normals"} if i in (3, 9) else set()
        expected = {name for name in history if name not in ("step", "time") and not name.startswith("active/")}
        assert names == {name for name in expected if not gone & {*name.split("/")}}
        assert all(same([row[f"balancing/{name}"]], history[name][i : i + 1]) for name in names)
    metrics = [r.metric for r in wandb_records(offline) if r.WhichOneof("record_type") == "metric"]
    assert [(metric.glob_name, metric.step_metric) for metric in metrics if metric.glob_name] == [
        ("balancing/*", "balancing/step")
    ]


def test_wandb_in_a_run_that_is_there(offline):
    """By default a block is a row: the run's own step goes on by one for each, and its other rows are whole."""
    import wandb

    run = wandb.init(project="test", dir=str(offline))
    try:
        with pytest.raises(ValueError, match=r"project: arguments of wandb\.init, but there is a run already"):
            writers.WandB(project="other")
        with igb.Monitor("wandb", every=5, warn=None) as monitor:
            for i, result in enumerate(steps("emtl", random_gradients(), 10)):
                monitor.record(result)
                run.log({"mine": i})
        assert wandb.run is run
    finally:
        run.finish()
    wandb.teardown()
    rows = wandb_rows(offline)
    assert [row["mine"] for row in rows if "mine" in row] == list(range(10))
    assert [row["balancing/step"] for row in rows if "mine" not in row] == [4, 9]
    norms = monitor.history()["norm/depth"]
    means = [row["balancing/norm/depth"] for row in rows if "mine" not in row]
    assert means == pytest.approx([float(norms[:5].mean()), float(norms[5:].mean())], rel=1e-12)


# ---- What is wrong -----------------------------------------------------------------------------------------------


def test_by_kind(tmp_path):
    """The kind of a destination is in its name."""
    found = writers.writers.writers_of(
        [str(tmp_path / "a.csv"), tmp_path / "b.Parquet", tmp_path / "runs", print_like()]
    )
    assert [type(writer).__name__ for writer in found] == ["CSV", "Parquet", "TensorBoard", "Printer"]
    for writer in found:
        writer.close()
    assert [type(writer) for writer in writers.writers.writers_of(writers.CSV(tmp_path / "c.csv"))] == [writers.CSV]


def print_like() -> object:
    class Printer:
        def write(self, block: Block) -> None: ...

        def close(self) -> None: ...

    return Printer()


@pytest.mark.parametrize("make", [lambda: writers.TensorBoard("x", mean_of=0), lambda: writers.WandB(mean_of=0)])
def test_mean_of(make, offline):
    with pytest.raises(ValueError, match=r"mean_of must be a number of steps, at least 1, or None .* found 0"):
        make()
    assert not [*offline.iterdir()]


def test_wandb_without_a_prefix(offline):
    with pytest.raises(ValueError, match="prefix must not be empty"):
        writers.WandB(prefix="")


def test_tensorboard_elsewhere():
    with pytest.raises(TypeError, match="to must be a folder or a SummaryWriter, found int"):
        writers.TensorBoard(3)


WITHOUT = """
import sys
import igb_kernels as igb
assert not {"tensorboard", "wandb", "pyarrow", "matplotlib", "numpy.f2py"} & set(sys.modules)
for name in ("tensorboard", "wandb", "pyarrow", "matplotlib"):
    sys.modules[name] = None  # as if it were not installed
for make, name, package in (
    (lambda: igb.Monitor("run"), "TensorBoard", "tensorboard"),
    (lambda: igb.Monitor("wandb"), "WandB", "wandb"),
    (lambda: igb.Monitor("log.parquet"), "Parquet", "pyarrow"),
    (lambda: igb.Monitor().figure(), "figure", "matplotlib"),
):
    try:
        make()
    except ImportError as error:
        assert f"{name} needs {package}: pip install {package}" in str(error), error
    else:
        raise AssertionError(name)
igb.Monitor("log.csv").close()
"""


def test_without_the_libraries(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(igb.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", WITHOUT], cwd=tmp_path, env=environment, check=True, timeout=120)
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


def test_tasks_are_named_as_in_the_losses():
    assert {f"weight/{task}" for task in TASKS} <= record(()).keys()
