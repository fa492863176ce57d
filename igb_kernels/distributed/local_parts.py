"""A rank's parts of parameters that may be DTensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from igb_kernels.store import Grads


class LocalParts:
    """What this rank has of parameters: a leaf for each that stands for its part, or the parameter itself where it is
    plain."""

    def __init__(self, whole: Sequence[Tensor]) -> None:
        self.whole = whole
        self.params = [_stand_in(p) if isinstance(p, DTensor) else p for p in whole]

    def local(self, grads: Grads) -> Grads:
        """This rank's parts of the parameters' gradients."""
        return [None if g is None else local_part(p, g) for p, g in zip(self.whole, grads, strict=True)]

    def pass_on(self, retain_graph: bool = False) -> None:
        """Makes `.grad` of the parameters what came to the parts'."""
        for p, part in zip(self.whole, self.params, strict=True):
            if isinstance(p, DTensor):
                grad, part.grad = part.grad, None
                p.grad = None if grad is None or not p.requires_grad else like(p, grad)


def local_part(p: Tensor, whole: Tensor) -> Tensor:
    """This rank's part, as it has one of the parameter, of a tensor of the parameter's shape."""
    if not isinstance(p, DTensor):
        return whole
    if not isinstance(whole, DTensor):
        return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None).to_local()
    return whole.redistribute(p.device_mesh, p.placements).to_local()


def _stand_in(p: DTensor) -> Tensor:
    """A leaf with the shape and dtype of this rank's part, and no memory to speak of."""
    local = p.to_local()
    return torch.empty((), dtype=p.dtype, device=local.device).expand(local.shape).requires_grad_()


def like(p: DTensor, local: Tensor) -> DTensor:
    """A tensor that is sharded as the parameter, from this rank's part."""
    return DTensor.from_local(local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
