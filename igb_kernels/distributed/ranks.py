"""The processes that train together, and what they tell each other in a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from igb_kernels.distributed.flat import Flat
from igb_kernels.distributed.fully_sharded import AFTER, owners
from igb_kernels.distributed.local_parts import LocalParts
from igb_kernels.store import Grads


@dataclass(frozen=True)
class GlobalLosses:
    """The losses of the batch that all ranks have together."""

    ids: Sequence[int]
    """The tasks that some rank has, ascending."""
    values: Tensor
    """Means over the ranks that have the task, [A]."""
    counts: Tensor
    """How many ranks have the task, float64 [A]."""
    share: Tensor
    """What one rank's gradient counts in the mean: 1 over the number of ranks that have the task, float64 [A]."""

    def missing_elsewhere(self, ranks: int) -> bool:
        """Whether some rank lacks a task, where that can be seen without waiting for a device."""
        return self.share.device.type == "cpu" and bool((self.counts != ranks).any())


class Ranks:
    """A process group. Whatever is a collective here is called by all ranks, in the same order."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"process_group must be a torch.distributed.ProcessGroup, found {type(group).__name__}")
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("process_group must have this process as a member, found that it has not")
        self.reached = Reached(self)
        self._loss_dtype = torch.get_default_dtype()
        self.averaged_by_module = False
        """Whether the parameters are DTensors, whose modules average gradients over the ranks in the passes."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return Ranks(self.group)

    def __reduce__(self) -> Any:
        raise TypeError("a balancer with a process_group cannot be pickled: save its state_dict()")

    def parts(self, params: Sequence[Tensor]) -> LocalParts | None:
        """What this rank has of parameters of which some are DTensors; None: all of them."""
        return LocalParts(params) if any(isinstance(p, DTensor) for p in params) else None

    def owners(self, leaves: list[Tensor]) -> list[Tensor]:
        """The parameters that the leaves of a graph stand for; ValueError where those are sharded, but not the shared
        ones."""
        found = owners(leaves)
        if not self.averaged_by_module and any(isinstance(p, DTensor) for p in found):
            raise ValueError(f"shared must be DTensors where other parameters are, found none: {AFTER}")
        return found

    def scatters(self, device: torch.device) -> bool:
        """Whether a reduce-scatter of what is there sends less than an all-reduce. A group may have several backends,
        as `init_process_group()` makes it."""
        backends = dict(one.split(":") for one in dist.get_backend_config(self.group).split(","))
        return backends.get(device.type) != "gloo"

    def begin(self, collective: Callable[..., Any], *tensors: Tensor) -> Callable[[], None]:
        """Starts it; what waits for it."""
        with self._answered():
            work = collective(*tensors, group=self.group, async_op=True)

        def wait() -> None:
            if work is not None:
                with self._answered():
                    work.wait()

        return wait

    @contextmanager
    def _answered(self) -> Iterator[None]:
        """Says what it means where a collective fails."""
        try:
            yield
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise RuntimeError(
                f"rank {self.rank} of {self.size} waits in vain for another one, which has ended, hangs, or has left "
                f"the step with an error of its own ({reason})"
            ) from error

    def total(self, part: Tensor) -> Tensor:
        """The sum over the ranks, the same bits on all."""
        whole = part.clone()
        self.begin(dist.all_reduce, whole)()
        return whole

    def losses(self, values: Tensor, ids: Sequence[int], tasks: int) -> GlobalLosses:
        """From this rank's losses [A] of the tasks `ids`. Waits for the device only where tasks are missing here."""
        if len(ids):
            self._loss_dtype = values.dtype
        both = torch.zeros(2, tasks, dtype=torch.float64, device=values.device)
        if len(ids) == tasks:
            both[0].copy_(values)
            both[1].fill_(1)
        elif ids:
            at = torch.tensor(ids, device=values.device)
            both[0, at] = values.double()
            both[1, at] = 1
        self.begin(dist.all_reduce, both)()
        sums, counts = both
        if len(ids) < tasks:
            ids = [k for k, count in enumerate(counts.tolist()) if count]
            if not ids:
                raise ValueError(f"losses must hold at least one loss on some rank, found {tasks} tasks without")
        if len(ids) < tasks:
            at = torch.tensor(ids, device=values.device)
            sums, counts = sums[at], counts[at]
        share = (self.size if self.averaged_by_module else 1) / counts
        return GlobalLosses(ids, (sums / counts).to(self._loss_dtype), counts, share)

    def same_everywhere(self, found: dict[str, Any]) -> None:
        """ValueError on all ranks where one of these differs between them."""
        everywhere: list[Any] = [None] * self.size
        with self._answered():
            dist.all_gather_object(everywhere, found, group=self.group)
        for name, first in everywhere[0].items():
            for rank, other in enumerate(everywhere):
                if other[name] != first:
                    raise ValueError(
                        f"{name} must be the same on all ranks, found {first} on 0 and {other[name]} on {rank}"
                    )

    def from_first(self, state: Any) -> Any:
        """Rank 0's, of anything that can be pickled."""
        box = [state]
        with self._answered():
            dist.broadcast_object_list(box, src=dist.get_global_rank(self.group, 0), group=self.group)
        return box[0]

    def sum_grads(self, params: Sequence[Tensor]) -> None:
        """Makes `.grad` of each parameter the sum over the ranks, where some rank has one; those of DTensors are."""
        own = [p for p in params if p.requires_grad and not isinstance(p, DTensor)]
        if not own:
            return
        reached = self.reached.begin([p.grad is not None for p in own], own[0].device)
        flat = Flat(own, 1)
        sums = flat.like_params(self.sum_flat(flat, [p.grad for p in own]))
        for p, grad, there in zip(own, sums, reached(), strict=True):
            p.grad = grad if there else None
        if self.averaged_by_module:
            torch._foreach_div_([p.grad for p in own if p.grad is not None], self.size)

    def sum_flat(self, layout: Flat, grads: Grads) -> list[Tensor]:
        """The gradients' sums over the ranks in flat buckets."""
        sent: list[Callable[[], None]] = []
        buffers = layout.pack(grads, lambda buffer: sent.append(self.begin(dist.all_reduce, buffer)))
        for wait in sent:
            wait()
        return buffers


class Reached:
    """Which parameters get a gradient on any rank. Ranks where all do know it; others wait for the device."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._last: tuple[list[bool], Tensor] | None = None

    def begin(self, here: list[bool], device: torch.device) -> Callable[[], list[bool]]:
        """From whether there is one here, by parameter; what is called after the gradients have been sent."""
        if self._last is None or self._last[0] != here or self._last[1].device != device:
            self._last = here, torch.tensor(here, dtype=torch.int32).to(device)
        counts = self._last[1].clone()
        wait = self._ranks.begin(dist.all_reduce, counts)

        def anywhere() -> list[bool]:
            wait()
            return here if all(here) else [count > 0 for count in counts.tolist()]

        return anywhere
