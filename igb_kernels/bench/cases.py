"""What a suite of benchmarks is: cases that a harness runs, made from the options of the command.

A suite is a module of this package with

- `names()`: what `--methods` may choose from, as messages show it,
- `accepts(name)`: whether a name given to `--methods` is one of its own,
- `cases(options)`: the cases, in the order in which they run. It does no work itself: a case allocates what it needs
  when it runs, and frees it when it is done.

`command.SUITES` names the modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from igb_kernels.backends import resolve
from igb_kernels.bench.measure import Harness
from igb_kernels.bench.results import Measurement


@dataclass(frozen=True)
class Options:
    """What to measure. Where `tasks`, `params` or `methods` are empty, a suite takes its own defaults."""

    tasks: tuple[int, ...] = ()
    params: tuple[int, ...] = ()
    """Numbers of elements of the shared parameters."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    device: torch.device = torch.device("cpu")  # noqa: RUF009  # it cannot be changed
    backend: str = "auto"
    methods: tuple[str, ...] = ()
    """May hold names of other suites that run with this one: take those that `accepts` knows."""
    models: tuple[str, ...] = ()
    """Of `bench.models`, those whose steps are measured."""
    peers: tuple[str, ...] = ()
    """Of "torchjd" and "libmtl", those to compare with; all are installed."""
    memory: bool = False
    """Whether the peak memory of steps is measured, too."""
    quick: bool = False
    """Small sizes and few cases."""

    def backend_name(self) -> str:
        """The backend that runs, where `backend` may be "auto"."""
        module = resolve(self.backend, self.device.type)
        return module.__name__.rpartition(".")[2]  # type: ignore[attr-defined,no-any-return]  # it is a module


@dataclass(frozen=True)
class Case:
    """One measurement that is still to be made."""

    label: str
    """For the progress bar: "gram, K = 8, 23.5 M, float32"."""
    run: Callable[[Harness], Measurement | None]
    """None where it cannot be made here, with a remark to the harness."""


class Suite(Protocol):
    """A module with cases."""

    def names(self) -> Sequence[str]: ...

    def accepts(self, name: str) -> bool: ...

    def cases(self, options: Options) -> Iterable[Case]: ...


def chosen(names: Sequence[str], options: Options) -> list[str]:
    """Those of the suite's names that `--methods` asks for; all where it asks for nothing."""
    return [name for name in names if not options.methods or name in options.methods]


def number(count: int) -> str:
    """Briefly: 1000 is "1 k", 23454912 is "23.5 M"."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
