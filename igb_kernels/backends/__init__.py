"""Where the operations run: which backends there are, and which one a device gets."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from igb_kernels import _native
from igb_kernels._log import warn_once

NAMES = ("cpu", "cuda", "triton", "reference")

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

    def ema_(
        self, out: Any, state: Any, grads: Any, decay: Tensor, tasks: int, scales: Tensor | None = None
    ) -> Tensor: ...

    def accumulate_squares_(self, out: Any, state: Any, grads: Any, eps: float, tasks: int) -> Tensor: ...

    def combine_(self, out: Any, grads: Any, weights: Tensor, accumulate: bool) -> None: ...

    def sign_drop_(self, out: Any, grads: Any, counter: Tensor, leak: Tensor | None) -> Tensor: ...

    def rollback_(self, out: Any, kept: Any, status: Tensor) -> None: ...

    def solve(
        self,
        method: str,
        gram: Tensor,
        losses: Tensor | None,
        per_task: Tensor | None,
        options: Sequence[float],
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor]: ...

    def loss_scales(
        self, rule: str, losses: Tensor, per_task: Tensor | None, options: Sequence[float], state: Tensor | None
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


def _cpu() -> Availability:
    if _native.module is None:
        return Availability(False, str(_native.reason))
    sets, threads = _native.module.instruction_set(), torch.get_num_threads()
    return Availability(True, f"compiled kernels ({sets}) and solvers, {threads} threads")


def _cuda() -> Availability:
    if _native.module is None:
        return Availability(False, str(_native.reason))
    if not hasattr(_native.module, "cuda"):
        return Availability(
            False, "igb_kernels._C was built without CUDA: build it where nvcc is on the PATH (or CUDACXX names it)"
        )
    if torch.version.hip is not None:
        return Availability(False, "this PyTorch is built for ROCm, the kernels for CUDA")
    return _gpu("compiled kernels and solvers")


def _triton() -> Availability:
    if find_spec("triton") is None:
        return Availability(False, "triton is not installed (pip install triton)")
    if _triton_interprets():
        return Availability(True, "Triton's interpreter (TRITON_INTERPRET=1), on any device and slow")
    return _gpu("kernels compiled when first used")


def _triton_interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _gpu(offer: str) -> Availability:
    """What is on offer if there is a GPU; otherwise PyTorch's own words for what is missing."""
    if torch.cuda.is_available():
        return Availability(True, f"{offer}, {torch.cuda.get_device_name()}")
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (AssertionError, RuntimeError) as error:
        return Availability(False, f"PyTorch finds no GPU ({str(error).splitlines()[0]})")
    return Availability(False, "PyTorch finds no GPU")


def _reference() -> Availability:
    return Availability(True, "plain PyTorch in float64, on any device")


_AVAILABILITY: dict[str, Callable[[], Availability]] = {
    "cpu": _cpu,
    "cuda": _cuda,
    "triton": _triton,
    "reference": _reference,
}


def backends() -> dict[str, Availability]:
    """The backends by name, each with what it offers here or the reason why it cannot be used.

    The mapping's values are true for a backend that can be used::

        >>> for name, availability in igb_kernels.backends().items():
        ...     print(name, availability)
    """
    return {name: _AVAILABILITY[name]() for name in NAMES}


FASTEST_FIRST = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
"""What "auto" tries, by type of device, before the reference."""


@cache
def resolve(name: str, device_type: str) -> Backend:
    """The backend module for tensors on a device of this type; `name` may be "auto"."""
    if name == "auto":
        name = _fastest(device_type)
    elif name not in NAMES:
        raise ValueError(f"backend must be one of {('auto', *NAMES)}, found {name!r}")
    elif not (found := _AVAILABILITY[name]()):
        raise RuntimeError(f"backend={name!r} was asked for, but {found.detail}")
    if name == "cpu" and device_type != "cpu":
        raise ValueError(f"backend='cpu' needs tensors on the CPU, found them on {device_type}")
    if (name == "cuda" or (name == "triton" and not _triton_interprets())) and device_type != "cuda":
        raise ValueError(f"backend={name!r} needs tensors on a GPU (device 'cuda'), found them on {device_type}")
    return cast(Backend, import_module(f"igb_kernels.backends.{name}"))


def _fastest(device_type: str) -> str:
    """The fastest backend that can be used; what keeps faster ones away is logged once."""
    reasons: list[str] = []
    for name in FASTEST_FIRST.get(device_type, ()):
        if found := _AVAILABILITY[name]():
            if reasons:
                warn_once(f"using the {name} backend on {device_type}: {'; '.join(reasons)}")
            return name
        reasons.append(f"{name}: {found.detail}")
    why = "; ".join(reasons) or f"there are no kernels for {device_type} tensors"
    warn_once(f"using the slow reference backend on {device_type}: {why}")
    return "reference"


def captures_graph(device: torch.device) -> bool:
    """Whether what is now put on the device goes into a CUDA graph, instead of running."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
