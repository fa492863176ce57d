"""A balancer's state in checkpoints of `torch.distributed.checkpoint`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.tensor import DTensor


class _OfShared(Protocol):
    shared: Sequence[Tensor]


def empty_state_dict(
    balancer: _OfShared, checkpoint: str | os.PathLike[str] | StorageReader, key: str = "balancer"
) -> dict[str, Any]:
    """What `torch.distributed.checkpoint.load` fills with the state that a checkpoint has of a balancer::

        dcp.save({"model": model_state, "balancer": balancer.state_dict()}, checkpoint_id=path)
        ...
        state = {"model": model_state, "balancer": empty_state_dict(balancer, path)}
        dcp.load(state, checkpoint_id=path)
        balancer.load_state_dict(state["balancer"])

    Needed since `load` reads what the given state has room for, and a balancer that has not taken a step has no state
    to speak of. Moving averages are sharded as the shared parameters are; all else is whole, on the CPU.

    Args:
        balancer: the one that will load the state; it stays as it is.
        checkpoint: the checkpoint's folder, or what reads it from elsewhere.
        key: under which the state was saved.

    Raises:
        ValueError: where the checkpoint has no such state, or one of other shared parameters.
    """
    reader = checkpoint if isinstance(checkpoint, StorageReader) else FileSystemReader(checkpoint)
    metadata = reader.read_metadata()
    paths: dict[str, tuple[str | int, ...]] = metadata.planner_data or {}
    state: dict[str, Any] = {}
    for name, stored in metadata.state_dict_metadata.items():
        first, *path = paths.get(name, (name,))
        if first != key or not path:
            continue
        room: Tensor | None = None
        if not isinstance(stored, BytesStorageMetadata):
            like = _parameter(balancer.shared, path, stored.size)
            room = torch.empty(stored.size, dtype=stored.properties.dtype) if like is None else _empty(like, stored)
        _put(state, path, room)
    if not state:
        raise ValueError(f"the checkpoint must have the state of a balancer as {key!r}, found none")
    return state


def _parameter(shared: Sequence[Tensor], path: Sequence[str | int], shape: torch.Size) -> Tensor | None:
    """The shared parameter whose moving average is at the path of the state, if one is."""
    if path[0] != "averages":
        return None
    i = path[-1]
    if not isinstance(i, int) or i >= len(shared) or shared[i].shape != shape:
        raise ValueError(
            f"the state's moving averages do not fit the {len(shared)} shared parameters: found shape {tuple(shape)} "
            f"for shared[{i}]"
        )
    return shared[i]


def _empty(p: Tensor, stored: Any) -> Tensor:
    whole = p.detach()
    if isinstance(whole, DTensor):
        return torch.empty_like(whole, dtype=stored.properties.dtype)
    return torch.empty(stored.size, dtype=stored.properties.dtype, device=p.device)


def _put(state: Any, path: Sequence[str | int], value: Any) -> None:
    """Sets the value at a path through nested dicts and lists, which are made on the way."""
    for here, after in zip(path, [*path[1:], None], strict=True):
        if isinstance(here, int):
            state.extend([None] * (here + 1 - len(state)))
        if after is None:
            state[here] = value
            return
        found = state[here] if isinstance(here, int) else state.get(here)
        if found is None:
            found = state[here] = [] if isinstance(after, int) else {}
        state = found
