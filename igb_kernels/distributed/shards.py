"""Task gradients of replicas: each rank gets the sums of its shard, and in the end the whole update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from igb_kernels.capture import take_grads
from igb_kernels.distributed.flat import Flat
from igb_kernels.distributed.ranks import Ranks
from igb_kernels.hooks import Capture, Measure, Pass
from igb_kernels.ops import accumulator_dtype
from igb_kernels.store import Grads, TaskGradients

Waiting = list[Callable[[], Any]]

# What they are called from torch 2.13 on, and before.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Shards:
    """This rank's part of the shared parameters' gradients: for each flat bucket of them, one leaf that stands for the
    rank's shard. Steps are those of a model that has the leaves as its shared parameters; `pass_on` takes what comes to
    their `.grad` to the parameters of all ranks."""

    def __init__(self, ranks: Ranks, shared: Sequence[Tensor]) -> None:
        self.ranks, self.shared = ranks, shared
        self.layout = Flat(shared, ranks.size)
        self.params = [
            torch.empty(1, dtype=b.dtype, device=b.device).expand(b.size // ranks.size).requires_grad_()
            for b in self.layout.buckets
        ]
        self.capture: Capture = ShardedCapture(self)
        self.reached = [False] * len(shared)
        """Whether any pass of the step has come to the parameter, on this rank."""
        self.averaged = [False] * len(shared)
        """Whether the parameter has got a gradient in any step, and so what is kept of gradients, if anything is."""
        self.averages = False
        """Whether moving averages take the gradients' place."""
        self.copies: dict[int, int] = {}
        self._spare: list[tuple[list[Tensor], list[Tensor]]] = []
        """Buffers that nothing is on its way from or to: the packed ones, and those for the other ranks' parts."""

    def send(self, grads: Grads) -> tuple[list[Tensor], Waiting]:
        """Sends a row of gradients of this rank's; its shard of their sums, which is there when all have been waited
        for."""
        self.reached = [was or grad is not None for was, grad in zip(self.reached, grads, strict=True)]
        own: list[Tensor] = []
        waiting: Waiting = []
        spare = self._spare.pop() if self._spare else (self.layout.empty(), self._room_for_parts())
        parts = iter(spare[1])

        def scatter(buffer: Tensor) -> None:
            shard, wait = _reduce_scatter(self.ranks, buffer, next(parts, None))
            own.append(shard)
            waiting.append(wait)

        self.layout.pack(grads, scatter, spare[0])
        waiting.append(lambda: self._spare.append(spare))
        return own, waiting

    def _room_for_parts(self) -> list[Tensor]:
        return [] if self.ranks.scatters(self.shared[0].device) else self.layout.empty()

    def pass_on(self, retain_graph: bool) -> None:
        """Makes `.grad` of the shared parameters the whole update, where some rank's passes reached them."""
        reached = self.ranks.reached.begin(self.reached, self.shared[0].device)
        self.reached = [False] * len(self.shared)
        if self.shared[0].device.type != "cpu":  # whose memory, once it is the system's again, is slow to get
            self._spare.clear()
        whole = self.layout.like_params(self._whole([p.grad for p in self.params]))
        for p in self.params:
            p.grad = None
        now = reached()
        self.averaged = [was or there for was, there in zip(self.averaged, now, strict=True)]
        for p, grad, there in zip(self.shared, whole, self.averaged if self.averages else now, strict=True):
            p.grad = grad if there and p.requires_grad else None

    def _whole(self, shards: Grads) -> list[Tensor]:
        """The flat buckets of which every rank has its shard; None is one of zeros."""
        buffers, waiting = [], []
        for bucket, shard in zip(self.layout.buckets, shards, strict=True):
            buffer = torch.empty(
                bucket.size, dtype=bucket.dtype if shard is None else shard.dtype, device=bucket.device
            )
            own = buffer.new_zeros(bucket.size // self.ranks.size) if shard is None else shard
            waiting.append(self.ranks.begin(all_gather, buffer, own))
            buffers.append(buffer)
        for wait in waiting:
            wait()
        return buffers

    # ---- What is kept between steps: sharded here, in the parameters' shapes where it is saved -------------------

    def gathered(self, row: Grads) -> Grads:
        """A task's moving averages in the parameters' shapes, from every rank's shards; None if there are none yet."""
        if all(t is None for t in row):
            return [None] * len(self.shared)
        whole = self.layout.like_params(self._whole(row))
        return [t if there else None for t, there in zip(whole, self.averaged, strict=True)]

    def own(self, row: Grads) -> Grads:
        """This rank's shards of a task's moving averages in the parameters' shapes."""
        self.averaged = [a or t is not None for a, t in zip(self.averaged, row, strict=True)]
        if all(t is None for t in row):
            return [None] * len(self.params)
        buffers = self.layout.empty([accumulator_dtype(bucket.dtype) for bucket in self.layout.buckets])
        size = [len(buffer) // self.ranks.size for buffer in self.layout.pack(row, buffers=buffers)]
        return [b[self.ranks.rank * n :][:n].clone() for b, n in zip(buffers, size, strict=True)]


def _reduce_scatter(ranks: Ranks, buffer: Tensor, parts: Tensor | None) -> tuple[Tensor, Callable[[], Any]]:
    """This rank's shard of the buffers' sum over the ranks, and what waits for it."""
    size = len(buffer) // ranks.size
    shard = buffer.new_empty(size)
    if parts is None:
        return shard, ranks.begin(reduce_scatter, shard, buffer)
    # Gloo would send as much as for an all-reduce. So each rank gets all others' parts of its shard, and sums them.
    received = ranks.begin(dist.all_to_all_single, parts, buffer)

    def wait() -> None:
        received()
        torch.sum(parts.view(ranks.size, size), dim=0, out=shard)

    return shard, wait


class ShardedCapture(Capture):
    """After each pass its gradients are sent, and while the next one runs they are on their way."""

    def __init__(self, shards: Shards) -> None:
        super().__init__(shards.shared)
        self._shards = shards

    def fill(
        self, rows: TaskGradients, passes: Sequence[Pass], tasks: Sequence[int], measure: Measure | None
    ) -> Iterator[None]:
        """As in the base class, but what was sent last is in the store only when all passes have run."""
        sent: tuple[list[Tensor], Waiting] | None = None
        for run in passes:
            run()
            # First what the last pass sent: its buffers serve again, and what is measured of it queues behind nothing.
            self._store(rows, sent)
            sent = self._shards.send(take_grads(self.params))
            yield
        self._store(rows, sent)

    def add(self, rows: TaskGradients, grads: Grads) -> None:
        """As in the base class."""
        self._store(rows, self._shards.send(grads))

    def _store(self, rows: TaskGradients, sent: tuple[list[Tensor], Waiting] | None) -> None:
        if sent is not None:
            shards, waiting = sent
            for wait in waiting:
                wait()
            rows.add(list(shards))


class Replicas:
    """The whole of the task gradients' sums on every rank, for methods that choose elements or compare batches: twice
    as much to send, and every rank does the same work."""

    def __init__(self, ranks: Ranks, shared: Sequence[Tensor]) -> None:
        self.ranks, self.params = ranks, shared
        self.layout = Flat(shared, 1)
        self.capture: Capture = ReplicatedCapture(self)
        self.copies: dict[int, int] = {}
        self.reached = [False] * len(shared)

    def summed(self, grads: Grads) -> Grads:
        """A row's sums over the ranks; those that no rank has are 0."""
        self.reached = [was or grad is not None for was, grad in zip(self.reached, grads, strict=True)]
        return list(self.layout.like_params(self.ranks.sum_flat(self.layout, grads)))

    def pass_on(self, retain_graph: bool) -> None:
        """Leaves `.grad` where some rank's passes have come."""
        reached = self.ranks.reached.begin(self.reached, self.params[0].device)
        self.reached = [False] * len(self.params)
        for p, there in zip(self.params, reached(), strict=True):
            if not there:
                p.grad = None


class ReplicatedCapture(Capture):
    """After each pass, its gradients are summed over the ranks."""

    def __init__(self, replicas: Replicas) -> None:
        super().__init__(replicas.params)
        self._replicas = replicas

    def taken(self, grads: Grads) -> Grads:
        """As in the base class."""
        return self._replicas.summed(grads)
