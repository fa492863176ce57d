"""What `fully_shard` (FSDP2) does with parameters and gradients: where its own leaves in a graph belong to, and what it
must not be told to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.fsdp import FSDPModule

AFTER = "make the balancer after fully_shard"


class FullyShardedModules:
    """The `fully_shard` modules that some parameters belong to. PyTorch has no public way from the whole parameters,
    which graphs have as leaves, to the sharded ones; this file alone goes its private one."""

    def __init__(self, shared: Sequence[Tensor]) -> None:
        wanted = {id(p) for p in shared}
        self._modules = [
            module
            for module in _modules()
            if any(id(p.sharded_param) in wanted for group in _groups(module) for p in group.fsdp_params)
        ]

    def __reduce__(self) -> Any:
        raise TypeError("a balancer of sharded parameters cannot be copied: save its state_dict()")

    def check(self) -> None:
        """RuntimeError where passes would not leave averages over the ranks in `.grad`."""
        for module in self._modules:
            if not module._get_fsdp_state()._state_ctx.is_last_backward:
                raise RuntimeError("modules of fully_shard must not be in set_is_last_backward(False)")
            for group in _groups(module):
                if not (group.reduce_grads and group.all_reduce_grads):
                    raise RuntimeError(
                        "modules of fully_shard must sum gradients in every backward pass, found "
                        "set_requires_gradient_sync(False) or set_requires_all_reduce(False); micro-batches go to "
                        "balancer.accumulate()"
                    )
                if group.gradient_divide_factor is not None:
                    raise RuntimeError(
                        "modules of fully_shard must average gradients over the ranks, found "
                        f"set_gradient_divide_factor({group.gradient_divide_factor})"
                    )

    def are_data_parallel(self, shared: Sequence[Tensor], ranks: int) -> bool:
        """Whether each rank has a batch of its own: all these parameters' gradients are averaged over as many."""
        sizes = {
            id(p.sharded_param): group.mesh_info.mesh.size()
            for module in self._modules
            for group in _groups(module)
            for p in group.fsdp_params
        }
        return all(sizes.get(id(p)) == ranks for p in shared)


def owners(leaves: Iterable[Tensor]) -> list[Tensor]:
    """The leaves of a graph, with the sharded parameter in the place of each whole one that `fully_shard` made."""
    sharded = {
        id(p._unsharded_param): p.sharded_param
        for module in _modules()
        for group in _groups(module)
        for p in group.fsdp_params
        if hasattr(p, "_unsharded_param")
    }
    return [sharded.get(id(leaf), leaf) for leaf in leaves]


def _modules() -> list[Any]:
    return [module for module in list(_module_state_mapping) if isinstance(module, FSDPModule)]


def _groups(module: Any) -> Sequence[Any]:
    state = module._get_fsdp_state()
    if (groups := getattr(state, "_fsdp_param_groups", None)) is not None:
        return list(groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]  # before PyTorch 2.12
