"""What a step reports about its K×K problem; the compiled solvers use the same bits."""

from __future__ import annotations

import enum

import torch
from torch import Tensor


class Status(enum.IntFlag):
    """Bits of `BalanceResult.status`. Zero: everything ordinary."""

    NON_FINITE = 1 << 0
    """A loss, norm or Gramian entry is NaN or infinite: all weights are NaN, the balancer's state is untouched."""
    ZERO_GRADIENT = 1 << 1
    """Some task's gradient vanishes (relative to the largest): it was left out of the solve."""
    PARETO_STATIONARY = 1 << 2
    """A nonnegative combination of gradients vanishes, or the Gramian is singular: solved with a small ridge."""
    ITERATION_CAP = 1 << 3
    """The solver stopped at its iteration limit; the weights are its last iterate."""
    NEGATIVE_SUM = 1 << 4
    """IMTL-G's weights sum to a negative number before normalisation: the update ascends every task."""
    NON_POSITIVE_LOSS = 1 << 5
    """A negative loss under a logarithm: all scales are NaN. Or a loss of 0 in GLS's geometric mean: all are 0."""
    ALL_INACTIVE = 1 << 6
    """Every gradient vanishes: neutral weights, zero update."""


UNUSABLE = int(Status.NON_FINITE | Status.NON_POSITIVE_LOSS)
"""The bits of a step without an update (it is NaN, or 0 by GLS's); nothing may be learned from it."""


class UsableSteps:
    """Counts the steps that could be used, on the host.

    A step's status is read when the next one begins. From a GPU it is copied to pinned memory when the step ends, and
    that copy alone is waited for: not for the forward pass that has been put on the GPU since.
    """

    def __init__(self, count: int = 0) -> None:
        self._count = count
        self._unread: Tensor | None = None
        self._pinned: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def add(self, status: Tensor) -> None:
        """A step has ended with this status, int32 []."""
        self._settle()
        if status.device.type == "cuda":
            if self._pinned is None:
                self._pinned = torch.empty((), dtype=torch.int32, pin_memory=True)
                self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            assert self._copied is not None
            with torch.cuda.device(status.device):
                status = self._pinned.copy_(status, non_blocking=True)
                self._copied.record()
        self._unread = status

    @property
    def count(self) -> int:
        """The steps so far that could be used; waits for the end of the last of them."""
        self._settle()
        return self._count

    def __reduce__(self) -> tuple[type[UsableSteps], tuple[int]]:
        """For copies and pickles: neither pinned memory nor events."""
        return UsableSteps, (self.count,)

    def _settle(self) -> None:
        if self._unread is not None:
            if self._copied is not None:
                self._copied.synchronize()
            self._count += not int(self._unread) & UNUSABLE
            self._unread = None
