"""The processes that torchrun starts, each with its part of every batch; without torchrun, this one alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1

    def part(self, molecules: Tensor) -> Tensor:
        """This rank's of a batch, or of what is evaluated."""
        return molecules[self.rank :: self.size]

    def total(self, part: Tensor) -> Tensor:
        """The sum of what the ranks have, in place of this one's."""
        if self.group is not None:
            dist.all_reduce(part, group=self.group)
        return part


ALONE = Ranks()


def own_device(device: torch.device) -> torch.device:
    """The GPU of this rank, where it is on "cuda" and several share a machine."""
    if device.type != "cuda" or device.index is not None or "LOCAL_RANK" not in os.environ:
        return device
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """The ranks that torchrun has told this process of."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
