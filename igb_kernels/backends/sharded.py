"""Gradients of which each process has a part: what is measured of them is summed over the processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from igb_kernels.backends import Backend


class Sharded:
    """A `Backend` for this process's part of the gradients; what its operations return is of that part alone, and
    `total` makes it that of the whole."""

    def __init__(self, run: Backend, total: Callable[[Tensor], Tensor]) -> None:
        self.run, self.total = run, total

    def __getattr__(self, name: str) -> Any:
        return getattr(self.run, name)
