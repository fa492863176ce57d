"""Where a monitor's steps go. A writer imports its library when it is made."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from igb_kernels.monitor.block import Block


class Writer(Protocol):
    """Gets whole blocks of steps. Anything with these two methods can be given to a `Monitor`."""

    def write(self, block: Block) -> None:
        """Writes a block; all blocks of a monitor have the same columns."""

    def close(self) -> None:
        """Completes what was written; nothing follows."""


class TensorBoard:
    """Scalars for TensorBoard, by the names of `Block.columns`.

    Args:
        to: the folder of a run, or a `torch.utils.tensorboard.SummaryWriter` that is there already (and stays open).
        prefix: put before the names.
        mean_of: so many steps of a block make one point, of their mean (see `Block.points`); None: all. With 1, each
            step is in the file as it was; TensorBoard's Python writes about a megabyte a second.
    """

    def __init__(self, to: Any, *, prefix: str = "", mean_of: int | None = 10) -> None:
        tensorboard = _library("torch.utils.tensorboard", "TensorBoard", "tensorboard")
        self._summary = _library("tensorboard.compat.proto.summary_pb2", "TensorBoard", "tensorboard").Summary
        self._prefix, self._mean_of = prefix, _checked_mean_of(mean_of)
        self._owns = isinstance(to, str | os.PathLike)
        if not self._owns and not isinstance(to, tensorboard.SummaryWriter):
            raise TypeError(f"to must be a folder or a SummaryWriter, found {type(to).__name__}")
        self._file = tensorboard.FileWriter(os.fspath(to)) if self._owns else to._get_file_writer()

    def write(self, block: Block) -> None:
        """One event for each point."""
        value = self._summary.Value
        for step, time, point in block.points(self._mean_of):
            values = [value(tag=self._prefix + name, simple_value=number) for name, number in point.items()]
            self._file.add_summary(self._summary(value=values), step, time)
        self._file.flush()

    def close(self) -> None:
        """Closes the file, unless a SummaryWriter was given."""
        if self._owns:
            self._file.close()


class WandB:
    """A run of Weights & Biases; off line as its own settings say (WANDB_MODE=offline).

    Each point is a row of the run, by the names of `Block.columns` after `prefix`, over `prefix` + "step" as their x
    axis: blocks come after their steps, when the run's own step has gone on. A row advances that, too; so with the
    default, one row for a block, it advances once every block.

    Args:
        run: the run; None: the current one, or else a new one, which ends with the monitor.
        prefix: put before the names; with none, "step" would become the x axis of all that the run logs.
        mean_of: so many steps of a block make one point, of their mean (see `Block.points`); None: all.
        init: arguments of `wandb.init`, where a run is made.
    """

    def __init__(self, run: Any = None, *, prefix: str = "balancing/", mean_of: int | None = None, **init: Any) -> None:
        wandb = _library("wandb", "WandB", "wandb")
        self._prefix, self._mean_of = prefix, _checked_mean_of(mean_of)
        if not prefix:
            raise ValueError('prefix must not be empty: "step" would be the x axis of all that the run logs')
        run = wandb.run if run is None else run
        self._owns = run is None
        if run is not None and init:
            raise ValueError(f"{', '.join(init)}: arguments of wandb.init, but there is a run already")
        self._run = wandb.init(**init) if run is None else run
        self._run.define_metric(f"{prefix}step", hidden=True)
        self._run.define_metric(f"{prefix}*", step_metric=f"{prefix}step")

    def write(self, block: Block) -> None:
        """One row for each point."""
        for step, _, point in block.points(self._mean_of):
            self._run.log({f"{self._prefix}{name}": value for name, value in {"step": step, **point}.items()})

    def close(self) -> None:
        """Ends the run, if it was made here."""
        if self._owns:
            self._run.finish()


class CSV:
    """One line for each step, under a header with the names of `Block.columns`; numbers read back to the bit.

    Every block is on disk when it has been written: a job that is killed loses the block it was in, no more.

    Args:
        path: the file; folders are made. What it held is overwritten.
        append: go on with a file that holds the same columns, for training that is resumed.

    Raises:
        ValueError: from `write`, where the file that is appended to has other columns.
    """

    def __init__(self, path: str | os.PathLike[str], *, append: bool = False) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._header: list[str] | None = None
        if append and self.path.exists():
            with self.path.open(newline="", encoding="utf-8") as file:
                self._header = next(csv.reader(file), None)
        self._file = self.path.open("a" if append else "w", newline="", encoding="utf-8")

    def write(self, block: Block) -> None:
        """One line for each step."""
        columns, lines = block.columns(), csv.writer(self._file)
        if self._header is None:
            self._header = list(columns)
            lines.writerow(self._header)
        elif self._header != list(columns):
            raise ValueError(f"{self.path} must have the columns {list(columns)} to be appended to, has {self._header}")
        lines.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class Parquet:
    """A Parquet file with the columns of `Block.columns`; each block is a row group.

    The file can be read once it is closed; `CSV` is for jobs that may be killed.

    Args:
        path: the file; folders are made. What it held is overwritten.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._arrow = _library("pyarrow", "Parquet", "pyarrow")
        self._parquet = _library("pyarrow.parquet", "Parquet", "pyarrow")
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("wb")
        self._writer: Any = None

    def write(self, block: Block) -> None:
        """One row group."""
        columns = {name: self._arrow.array(column.tolist()) for name, column in block.columns().items()}
        table = self._arrow.table(columns)
        if self._writer is None:
            self._writer = self._parquet.ParquetWriter(self._file, table.schema)
        self._writer.write_table(table)

    def close(self) -> None:
        """Writes the footer and closes the file; a file without blocks is removed."""
        if self._writer is not None:
            self._writer.close()
        self._file.close()
        if self._writer is None:
            self.path.unlink()


Destination = str | os.PathLike[str] | Writer


def writers_of(to: Destination | Iterable[Destination]) -> list[Writer]:
    """The writers that a monitor is given, as objects, or paths and names by their kind."""
    if isinstance(to, str | os.PathLike) or not isinstance(to, Iterable):
        return [_writer(to)]
    return [_writer(each) for each in to]


def _writer(to: Destination) -> Writer:
    if not isinstance(to, str | os.PathLike):
        if missing := [name for name in ("write", "close") if not callable(getattr(to, name, None))]:
            raise TypeError(
                f"to must hold paths, or writers with write and close; {type(to).__name__} has no {missing}"
            )
        return to
    if to == "wandb":
        return WandB()
    kinds: dict[str, Callable[[Any], Writer]] = {".csv": CSV, ".parquet": Parquet, "": TensorBoard}
    suffix = Path(to).suffix.lower()
    if suffix not in kinds:
        raise ValueError(
            f'to must be "wandb", a .csv or .parquet file, or a folder for TensorBoard, found {os.fspath(to)!r}; a '
            "folder with a dot in its name goes to igb_kernels.monitor.TensorBoard(...)"
        )
    return kinds[suffix](to)


def _library(module: str, writer: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"igb_kernels.monitor.{writer} needs {package}: pip install {package}") from error


def _checked_mean_of(mean_of: int | None) -> int | None:
    if mean_of is not None and (not isinstance(mean_of, int) or mean_of < 1):
        raise ValueError(f"mean_of must be a number of steps, at least 1, or None for a whole block; found {mean_of!r}")
    return mean_of
