"""Parameters that are sharded themselves, as FSDP2 and tensor parallelism make them: DTensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

from igb_kernels.distributed.ranks import Ranks
from igb_kernels.hooks import Capture
from igb_kernels.store import Grads


def check_placements(params: Sequence[DTensor], ranks: Ranks) -> int:
    """How many ranks have the same part of each parameter; ValueError for what cannot be balanced."""
    first = params[0]
    replicated = _replicated(first)
    for i, p in enumerate(params):
        if not isinstance(p, DTensor):
            raise ValueError(f"shared must all be DTensors or none, found {type(p).__name__} as shared[{i}]")
        if any(isinstance(placement, Partial) for placement in p.placements):
            raise ValueError(f"shared[{i}] must be sharded or replicated, found the placements {p.placements}")
        if p.device_mesh != first.device_mesh or _replicated(p) != replicated:
            raise ValueError(
                "shared must be sharded along the same dimensions of one mesh, found "
                f"{first.placements} on {first.device_mesh} and {p.placements} on {p.device_mesh}"
            )
    if first.device_mesh.size() != ranks.size:
        raise ValueError(
            f"process_group must have the ranks of the parameters' mesh, found {ranks.size} and {first.device_mesh}"
        )
    copies = 1
    for dim in replicated:
        copies *= first.device_mesh.size(dim)
    return copies


def _replicated(p: DTensor) -> list[int]:
    return [dim for dim, placement in enumerate(p.placements) if isinstance(placement, Replicate)]


class ShardedParameters:
    """This rank's parts of the shared parameters; their module sums gradients over the ranks in the passes."""

    def __init__(self, ranks: Ranks, shared: Sequence[DTensor]) -> None:
        self.shared = shared
        self.copies = check_placements(shared, ranks)
        """How many ranks have each part."""
        self.params = [_stand_in(p) for p in shared]
        self.capture: Capture = LocalCapture(shared)

    def pass_on(self, retain_graph: bool) -> None:
        """Makes `.grad` of the parameters DTensors of what came to the parts'."""
        for p, part in zip(self.shared, self.params, strict=True):
            grad, part.grad = part.grad, None
            p.grad = None if grad is None or not p.requires_grad else _like(p, grad)

    def gathered(self, row: Grads) -> Grads:
        """A task's moving averages as DTensors."""
        return [None if t is None else _like(p, t) for p, t in zip(self.shared, row, strict=True)]

    def own(self, row: Grads) -> Grads:
        """This rank's parts of a task's moving averages, DTensors or whole tensors."""
        return [None if t is None else _local(p, t) for p, t in zip(self.shared, row, strict=True)]


class LocalCapture(Capture):
    """After each pass: this rank's parts of the gradients."""

    def __init__(self, shared: Sequence[Tensor]) -> None:
        super().__init__(shared)

    def taken(self, grads: Grads) -> Grads:
        """As in the base class."""
        return [g.to_local() if isinstance(g, DTensor) else g for g in grads]


def _stand_in(p: DTensor) -> Tensor:
    """A leaf with the shape and dtype of this rank's part, and no memory to speak of."""
    local = p.to_local()
    return torch.empty(1, dtype=p.dtype, device=local.device).expand(local.shape).requires_grad_()


def _like(p: DTensor, local: Tensor) -> DTensor:
    return DTensor.from_local(local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def _local(p: DTensor, whole: Tensor) -> Tensor:
    if isinstance(whole, DTensor):
        return whole.redistribute(p.device_mesh, p.placements).to_local()
    return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None).to_local()
