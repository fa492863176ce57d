"""Parameters that are sharded themselves, as FSDP2 and tensor parallelism make them: DTensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from igb_kernels.distributed.flat import Flat
from igb_kernels.distributed.fully_sharded import FullyShardedModules
from igb_kernels.distributed.local_parts import LocalParts, like
from igb_kernels.distributed.ranks import Ranks
from igb_kernels.hooks import Capture
from igb_kernels.store import Grads, TaskGradients


def copies_of(p: Tensor, label: str, ranks: Ranks) -> int:
    """How many ranks of the group have the same part of the parameter; ValueError for what cannot be balanced."""
    if not isinstance(p, DTensor):
        return ranks.size
    if any(isinstance(placement, Partial) for placement in p.placements):
        raise ValueError(f"{label} must be sharded or replicated, found the placements {p.placements}")
    if p.is_complex():
        raise ValueError(f"{label} must be real where it is a DTensor, found {p.dtype}")
    mesh = p.device_mesh
    if not set(mesh.mesh.flatten().tolist()) <= set(dist.get_process_group_ranks(ranks.group)):
        raise ValueError(
            f"process_group must have all ranks of the parameters' meshes, found that {label} is on {mesh}"
        )
    parts = 1
    for dim, placement in enumerate(p.placements):
        parts *= 1 if placement.is_replicate() else mesh.size(dim)
    if ranks.size % parts:
        raise ValueError(
            f"process_group must have the same number of ranks for each part of a parameter, found {ranks.size} for "
            f"the {parts} parts of {label}"
        )
    return ranks.size // parts


class ShardedParameters(LocalParts):
    """This rank's parts of the shared parameters, whose modules sum gradients over the ranks in the passes; and plain
    ones beside them, whose gradients are averaged after each pass."""

    def __init__(self, ranks: Ranks, shared: Sequence[Tensor]) -> None:
        copies = [copies_of(p, f"shared[{i}]", ranks) for i, p in enumerate(shared)]
        self.order = sorted(range(len(shared)), key=copies.__getitem__)
        """Those that equally many ranks have are neighbours, to be measured together."""
        super().__init__([shared[i] for i in self.order])
        self.ranks = ranks
        self.copies = {id(part): copies[i] for part, i in zip(self.params, self.order, strict=True)}
        """How many ranks have each part."""
        self.modules = FullyShardedModules(shared)
        self.plain = [i for i, p in enumerate(self.whole) if not isinstance(p, DTensor)]
        self._layout = Flat([self.whole[i] for i in self.plain], 1)
        self._reached = [False] * len(self.plain)
        self.capture: Capture = LocalCapture(self)

    def in_order(self, row: Sequence[Tensor | None]) -> Grads:
        """What is in the order of the shared parameters, in that of `params`."""
        return [row[i] for i in self.order]

    def taken(self, grads: Grads) -> Grads:
        """This rank's parts of a row."""
        row = self.local(grads)
        if self.plain:
            own = [grads[i] for i in self.plain]
            self._reached = [was or grad is not None for was, grad in zip(self._reached, own, strict=True)]
            buffers = self.ranks.sum_flat(self._layout, own)
            torch._foreach_div_(buffers, self.ranks.size)
            for i, mean in zip(self.plain, self._layout.like_params(buffers), strict=True):
                row[i] = mean
        return row

    def pass_on(self, retain_graph: bool = False) -> None:
        super().pass_on()
        if not self.plain:
            return
        reached = self.ranks.reached.begin(self._reached, self.params[0].device)()
        self._reached = [False] * len(self.plain)
        for i, there in zip(self.plain, reached, strict=True):
            if not there:
                self.whole[i].grad = None

    def gathered(self, row: Grads) -> Grads:
        """A task's moving averages as DTensors, in the order of the shared parameters."""
        found: Grads = [None] * len(self.order)
        for i, p, t in zip(self.order, self.whole, row, strict=True):
            found[i] = like(p, t) if isinstance(p, DTensor) and t is not None else t
        return found

    def own(self, row: Grads) -> Grads:
        """This rank's parts of a task's moving averages, DTensors or whole tensors."""
        return self.local(self.in_order(row))


class LocalCapture(Capture):
    """After each pass: this rank's parts of the gradients."""

    def __init__(self, place: ShardedParameters) -> None:
        super().__init__(place.whole)
        self._place = place

    def add(self, rows: TaskGradients, grads: Grads) -> None:
        """As in the base class; the row is in the order of the shared parameters."""
        rows.add(self.taken(self._place.in_order(grads)))

    def taken(self, grads: Grads) -> Grads:
        """As in the base class."""
        return self._place.taken(grads)
