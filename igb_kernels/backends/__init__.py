"""Where the operations run: which backends there are, and which one a device gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from igb_kernels import _native
from igb_kernels._log import warn_once

NAMES = ("cpu", "reference")

OptionalTensors = Sequence[Tensor | None]


class Table(Protocol):
    """K rows of P tensors as a backend wants them; made once, used by several operations."""

    columns: OptionalTensors
    """The first tensor of each column that is there."""


class Backend(Protocol):
    """The operations without argument checks: `ops` documents and checks them, the balancer calls them directly."""

    def Table(self, tensors: OptionalTensors, tasks: int, like: Any = None) -> Any:
        """A `Table`; `like` is another whose columns' memory layouts it takes."""

    def gram(self, grads: Any, tasks: int) -> Tensor: ...

    def sq_norms(self, grads: Any, tasks: int) -> Tensor: ...

    def ema_(self, out: Any, state: Any, grads: Any, decay: Tensor, tasks: int) -> Tensor: ...

    def combine_(self, out: Any, grads: Any, weights: Tensor, accumulate: bool) -> None: ...

    def rollback_(self, out: OptionalTensors, kept: OptionalTensors, status: Tensor) -> None: ...

    def solve(
        self, method: str, gram: Tensor, losses: Tensor | None, options: Sequence[float], state: Tensor | None
    ) -> tuple[Tensor, Tensor]: ...

    def loss_scales(
        self, rule: str, losses: Tensor, per_task: Tensor | None, options: Sequence[float]
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Availability:
    """Whether a backend can be used here, and the detail or the reason."""

    available: bool
    detail: str

    def __bool__(self) -> bool:
        return self.available

    def __str__(self) -> str:
        return f"{'available' if self.available else 'not available'}: {self.detail}"


def backends() -> dict[str, Availability]:
    """The backends by name, each with what it offers here or the reason why it cannot be used.

    The mapping's values are true for a backend that can be used::

        >>> for name, availability in igb_kernels.backends().items():
        ...     print(name, availability)
    """
    if _native.module is not None:
        sets = _native.module.instruction_set()
        cpu = Availability(True, f"compiled kernels ({sets}) and solvers, {torch.get_num_threads()} threads")
    else:
        cpu = Availability(False, str(_native.reason))
    return {"cpu": cpu, "reference": Availability(True, "plain PyTorch in float64, on any device")}


@cache
def resolve(name: str, device_type: str) -> Backend:
    """The backend module for tensors on a device of this type; `name` may be "auto"."""
    if name == "auto":
        if device_type == "cpu" and _native.module is not None:
            name = "cpu"
        else:
            why = _native.reason if device_type == "cpu" else f"there are no kernels for {device_type} tensors yet"
            warn_once(f"using the slow reference backend on {device_type}: {why}")
            name = "reference"
    if name not in NAMES:
        raise ValueError(f"backend must be one of {('auto', *NAMES)}, found {name!r}")
    if name == "cpu":
        if _native.module is None:
            raise RuntimeError(f"backend='cpu' was asked for, but {_native.reason}")
        if device_type != "cpu":
            raise ValueError(f"backend='cpu' needs tensors on the CPU, found them on {device_type}")
    return cast(Backend, import_module(f"igb_kernels.backends.{name}"))
