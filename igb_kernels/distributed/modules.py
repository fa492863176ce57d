"""What torch's own wrappers do with gradients, and how it is taken over."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from igb_kernels._log import warn_once
from igb_kernels.distributed.fully_sharded import AFTER
from igb_kernels.distributed.instances import instances_of
from igb_kernels.distributed.ranks import Ranks


def wrapper_of(params: Sequence[Tensor]) -> DistributedDataParallel | None:
    """The DistributedDataParallel that these are parameters of. It is looked for among all objects: what it does to
    gradients shows nowhere before it has happened. ValueError where they belong to FSDP1's wrapper."""
    wanted = {id(p) for p in params}
    for wrapper in instances_of(DistributedDataParallel, FullyShardedDataParallel):
        if any(id(p) in wanted for p in wrapper.parameters()):
            if isinstance(wrapper, DistributedDataParallel):
                return wrapper
            raise ValueError(
                "shared must not belong to a FullyShardedDataParallel: shard the module by "
                f"torch.distributed.fsdp.fully_shard, and {AFTER}"
            )
    return None


def check_alone(params: Sequence[Tensor]) -> None:
    """ValueError where a balancer that has no process group would see the gradients of one process alone; called where
    torch.distributed is initialized."""
    if any(isinstance(p, DTensor) for p in params):
        raise ValueError(
            "process_group must be given where the shared parameters are DTensors: "
            "Balancer(..., process_group=torch.distributed.group.WORLD)"
        )
    if dist.get_world_size() == 1:
        return
    if wrapper_of(params) is not None:
        raise ValueError(
            "process_group must be given where the shared parameters belong to a DistributedDataParallel: "
            "Balancer(..., process_group=torch.distributed.group.WORLD), made after the wrapper"
        )
    warn_once(
        f"this process is one of {dist.get_world_size()}, and a Balancer without process_group balances its own batch "
        "alone"
    )


class Wrapped:
    """A DistributedDataParallel whose communication the balancer does from now on."""

    def __init__(self, ddp: DistributedDataParallel, shared: Sequence[Tensor], ranks: Ranks) -> None:
        if ddp.process_group is not ranks.group and dist.get_process_group_ranks(ddp.process_group) != (
            dist.get_process_group_ranks(ranks.group)
        ):
            raise ValueError("process_group must be that of the DistributedDataParallel, found one of other ranks")
        if ddp.static_graph:
            raise ValueError(
                "the DistributedDataParallel must be made with static_graph=False: with it, there is no no_sync()"
            )
        self._ddp, self._ranks = ddp, ranks
        known = {id(p) for p in shared}
        self.heads = [p for p in ddp.parameters() if p.requires_grad and id(p) not in known]
        """The parameters that are not shared."""
        ddp.require_backward_grad_sync = False  # as in no_sync(), but for good

    def check(self) -> None:
        """RuntimeError where the wrapper sums gradients again."""
        if self._ddp.require_backward_grad_sync:
            raise RuntimeError(
                "the DistributedDataParallel must leave gradients to the balancer, found that its "
                "require_backward_grad_sync has been set: make a new Balancer"
            )

    def send_buffers(self) -> None:
        """Those of rank 0 to all, as the wrapper does before each pass: running statistics of batch norm."""
        if not self._ddp.broadcast_buffers:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for buffer in _buffers(self._ddp):
            by_dtype.setdefault(buffer.dtype, []).append(buffer)
        first = dist.get_global_rank(self._ranks.group, 0)
        for buffers in by_dtype.values():
            flat = torch.cat([b.detach().reshape(-1) for b in buffers])
            self._ranks.begin(partial(dist.broadcast, src=first), flat)()
            parts = torch.split(flat, [b.numel() for b in buffers])
            with torch.no_grad():
                torch._foreach_copy_(buffers, [part.view(b.shape) for part, b in zip(parts, buffers, strict=True)])


def _buffers(ddp: DistributedDataParallel) -> list[Tensor]:
    ignored: set[str] = set(getattr(ddp.module, "_ddp_params_and_buffers_to_ignore", ()))
    module: nn.Module = ddp.module
    return [buffer for name, buffer in module.named_buffers() if name not in ignored]
