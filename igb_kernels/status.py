"""What a step reports about its K×K problem; the compiled solvers use the same bits."""

from __future__ import annotations

import enum

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
    """A negative loss under a logarithm: all scales are NaN."""
    ALL_INACTIVE = 1 << 6
    """Every gradient vanishes: neutral weights, zero update."""


UNUSABLE = int(Status.NON_FINITE | Status.NON_POSITIVE_LOSS)
"""The bits of a step whose update is NaN; nothing may be learned from it."""


class UsableSteps:
    """Counts the steps that could be used. A step's status is read when the next one begins: no wait for its kernels
    while they run."""

    def __init__(self, count: int = 0) -> None:
        self._count = count
        self._unread: Tensor | None = None

    def add(self, status: Tensor) -> None:
        """A step has ended with this status, int32 []."""
        self._settle()
        self._unread = status

    @property
    def count(self) -> int:
        self._settle()
        return self._count

    def _settle(self) -> None:
        if self._unread is not None:
            self._count += not int(self._unread) & UNUSABLE
            self._unread = None
