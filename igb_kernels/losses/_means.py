"""Mean losses of an epoch."""

from __future__ import annotations

import torch
from torch import Tensor

from igb_kernels.status import UNUSABLE


class EpochMean:
    """The mean losses since the last epoch's end: summed in place on the losses' device, so that the replays of a CUDA
    graph count as well. Steps that cannot be used do not count."""

    def __init__(self, sums: Tensor) -> None:
        self.sums = sums
        """The summed losses, and the number of steps behind them [K + 1], float64."""

    @classmethod
    def of(cls, tasks: int, device: torch.device) -> EpochMean:
        """Before the first step."""
        return cls(torch.zeros(tasks + 1, dtype=torch.float64, device=device))

    def add(self, losses: Tensor, status: Tensor) -> None:
        """A step has ended with these losses [K] and this status, int32 []."""
        entry = torch.cat([losses.double(), losses.new_ones(1, dtype=torch.float64)])
        self.sums += entry.masked_fill((status & UNUSABLE) != 0, 0.0)

    def take(self) -> Tensor:
        """The means [K], NaN if no step could be used. Starts anew."""
        means = self.sums[:-1] / self.sums[-1]
        self.sums.zero_()
        return means
