"""What a balancer does otherwise where its process is one of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from igb_kernels.distributed.modules import Wrapped, wrapper_of
from igb_kernels.distributed.ranks import GlobalLosses, Ranks
from igb_kernels.distributed.sharded_parameters import ShardedParameters
from igb_kernels.distributed.shards import Replicas, Shards
from igb_kernels.gradients.base import Needs
from igb_kernels.passes import Gathering, Passes
from igb_kernels.store import Grads


class Parts(Gathering, Protocol):
    """Where each rank gets its part of the gradients."""

    def gathered(self, row: Grads) -> Grads:
        """A task's moving averages in the parameters' shapes."""

    def own(self, row: Grads) -> Grads:
        """This rank's part of those."""


class DataParallel:
    """The ranks of a process group, and where a step's gradients come together."""

    def __init__(self, group: dist.ProcessGroup, shared: Sequence[Tensor]) -> None:
        self.ranks = Ranks(group)
        self._shared = shared
        self.sharded: ShardedParameters | None = None
        """Parameters that are sharded themselves: their module sums gradients."""
        wrapper = wrapper_of(shared)
        if any(isinstance(p, DTensor) for p in shared):
            if wrapper is not None:
                raise ValueError("shared must not be DTensors in a DistributedDataParallel")
            self.sharded = ShardedParameters(self.ranks, shared)
            self.ranks.averaged_by_module = True
        self.wrapped = None if wrapper is None else Wrapped(wrapper, shared, self.ranks)
        self._shards: Shards | None = None
        self._replicas: Replicas | None = None
        self.agreed = False
        """Whether all ranks are known to balance the same."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_shards": None, "_replicas": None, "agreed": False}

    def losses(self, values: Tensor, ids: Sequence[int], tasks: int) -> GlobalLosses:
        """See `Ranks.losses`; errors where tasks are missing on some ranks and their modules could not bear it."""
        if self.wrapped is not None:
            self.wrapped.check()
        if isinstance(values, DTensor):
            raise TypeError("losses must be plain tensors, found DTensors: loss.full_tensor() is the whole one")
        if self.sharded is not None:
            self.sharded.modules.check()
        found = self.ranks.losses(values, ids, tasks)
        if self.sharded is not None and (len(ids) < tasks or found.missing_elsewhere(self.ranks.size)):
            raise ValueError(
                f"losses must have all {tasks} tasks on every rank where parameters are sharded, since backward passes "
                f"communicate; found {len(ids)} here. A task without samples has a loss of 0 times its outputs' sum"
            )
        return found

    def check_method(self, needs: Needs, crossed: bool = False) -> None:
        """ValueError for what needs whole gradients, where parameters are sharded."""
        if self.sharded is not None and (crossed or needs is Needs.ELEMENTS):
            what = "independent batches" if crossed else "single elements of gradients"
            raise ValueError(f"gradients must be a method without {what} where parameters are sharded")

    def before_passes(self, values: Tensor, ids: Sequence[int], tasks: int) -> None:
        """As `losses` raises, where passes communicate and come before `losses`."""
        if self.sharded is not None:
            self.losses(values, ids, tasks)

    def check_representation(self) -> None:
        """ValueError where it is not clear whether ranks have the same samples."""
        if self.sharded is not None and not self.sharded.modules.are_data_parallel(self._shared, self.ranks.size):
            raise ValueError(
                "representation must be None where shared are DTensors other than of fully_shard over all ranks of the "
                "process_group: some ranks have the same samples"
            )

    def averaged_over(self, device: torch.device) -> Tensor | None:
        """The number of ranks over which the parameters' module will average what comes to it; None: it will not."""
        if self.sharded is None:
            return None
        return torch.full((), self.ranks.size, dtype=torch.float64, device=device)

    @property
    def place(self) -> Parts:
        """Where gradients come together, each rank's part."""
        if self.sharded is not None:
            return self.sharded
        if self._shards is None:
            self._shards = Shards(self.ranks, self._shared)
        return self._shards

    def passes(self, passes: Passes, needs: Needs, crossed: bool) -> tuple[Passes, Gathering]:
        """Those that work where the gradients of all ranks are."""
        if not crossed and needs is not Needs.ELEMENTS:
            if isinstance(self.place, Shards):
                self.place.averages = passes.method.ema_decay() is not None
            return passes.gathering(self.place, whole=False), self.place
        self.check_method(needs, crossed)
        if self._replicas is None:
            self._replicas = Replicas(self.ranks, self._shared)
        return passes.gathering(self._replicas, whole=True), self._replicas

    def gathered(self, rows: Sequence[Grads]) -> list[Grads]:
        """Moving averages in the parameters' shapes."""
        return [self.place.gathered(row) for row in rows]

    def own(self, rows: Sequence[Grads]) -> list[Grads]:
        """This rank's part of moving averages in the parameters' shapes."""
        self._shards = None
        return [self.place.own(row) for row in rows]

    def agree(self, found: dict[str, Any]) -> bool:
        """Whether this is the first time since the balancer was made or its state was loaded; ValueError on all ranks
        where one of these differs."""
        first, self.agreed = not self.agreed, True
        if first:
            self.ranks.same_everywhere(found)
        return first

    def check_wrapper(self) -> None:
        """RuntimeError where a DistributedDataParallel sums gradients, too."""
        if self.wrapped is None and wrapper_of(self._shared) is not None:
            raise RuntimeError(
                "a Balancer with a process_group must be made after the DistributedDataParallel around its shared "
                "parameters, found one that came later"
            )

    def end_step(self, local: Sequence[Tensor]) -> None:
        """Sums what is of this rank alone in `.grad` of these parameters, and sends buffers."""
        self.ranks.sum_grads(local)
        if self.wrapped is not None:
            self.wrapped.send_buffers()
