"""Tensors side by side in flat buffers, as collectives want them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from igb_kernels.store import Grads

BUCKET_BYTES = 25 << 20
"""The least that makes a message of its own, so that it can be on its way while the next is packed."""

PART_BYTES = 1 << 20
"""The least of a message that goes to each rank: with less, many ranks would wait for latencies alone."""

ALIGNMENT = 64
"""Elements: shards begin where vector loads like to."""


@dataclass(frozen=True)
class Bucket:
    """Neighbouring parameters of one dtype."""

    params: tuple[int, ...]
    starts: tuple[int, ...]
    """Where each begins, in elements."""
    size: int
    """In elements, with what is left empty at the end so that every shard is as long."""
    dtype: torch.dtype
    device: torch.device


class Flat:
    """The layout of parameters' gradients in flat buckets of `shards` equal parts each."""

    def __init__(self, params: Sequence[Tensor], shards: int) -> None:
        self.params, self.shards = params, shards
        self.buckets: list[Bucket] = []
        enough = max(BUCKET_BYTES, shards * PART_BYTES)
        by_dtype: dict[torch.dtype, list[int]] = {}
        for i in reversed(range(len(params))):  # about as backward passes reach them
            by_dtype.setdefault(_real(_grad_dtype(params[i])), []).append(i)
        for dtype, members in by_dtype.items():
            chosen: list[int] = []
            elements = 0
            for i in members:
                chosen.append(i)
                elements += _elements(params[i])
                if elements * dtype.itemsize >= enough or i == members[-1]:
                    self.buckets.append(self._bucket(chosen, dtype))
                    chosen, elements = [], 0

    def _bucket(self, members: list[int], dtype: torch.dtype) -> Bucket:
        starts, end = [], 0
        for i in members:
            end += end % 2 if self.params[i].is_complex() else 0
            starts.append(end)
            end += _elements(self.params[i])
        step = self.shards * (ALIGNMENT if self.shards > 1 else 1)
        return Bucket(tuple(members), tuple(starts), -(-end // step) * step, dtype, self.params[members[0]].device)

    def empty(self, dtypes: Sequence[torch.dtype] | None = None) -> list[Tensor]:
        """A buffer for each bucket, of its dtype or of these, whose padding is 0."""
        buffers = []
        for i, bucket in enumerate(self.buckets):
            dtype = bucket.dtype if dtypes is None else dtypes[i]
            buffer = torch.empty(bucket.size, dtype=dtype, device=bucket.device)
            buffer[bucket.starts[-1] + _elements(self.params[bucket.params[-1]]) :].zero_()
            buffers.append(buffer)
        return buffers

    def pack(
        self, grads: Grads, send: Callable[[Tensor], object] = lambda _: None, buffers: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """Copies the gradients to the buffers, 0 for those that are missing, and sends each as soon as it is full."""
        buffers = self.empty() if buffers is None else buffers
        for bucket, buffer in zip(self.buckets, buffers, strict=True):
            views = self._views(bucket, buffer)
            there = [
                (view, grad) for view, i in zip(views, bucket.params, strict=True) if (grad := grads[i]) is not None
            ]
            if there:
                torch._foreach_copy_([view for view, _ in there], [grad for _, grad in there])
            if len(there) < len(views):
                torch._foreach_zero_([view for view, i in zip(views, bucket.params, strict=True) if grads[i] is None])
            send(buffer)
        return list(buffers)

    def like_params(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """Views of the buffers, each with its parameter's shape and strides."""
        found: dict[int, Tensor] = {}
        for bucket, buffer in zip(self.buckets, buffers, strict=True):
            found.update(zip(bucket.params, self._views(bucket, buffer), strict=True))
        return [found[i] for i in range(len(self.params))]

    def _views(self, bucket: Bucket, buffer: Tensor) -> list[Tensor]:
        views = []
        for i, start in zip(bucket.params, bucket.starts, strict=True):
            p = self.params[i]
            part = buffer[start : start + _elements(p)]
            if p.is_complex():
                part = torch.view_as_complex(part.view(-1, 2))
            dense = torch.ops.aten.is_non_overlapping_and_dense(p)
            views.append(part.as_strided(p.shape, p.stride(), part.storage_offset()) if dense else part.view(p.shape))
        return views


def _grad_dtype(p: Tensor) -> torch.dtype:
    return getattr(p, "grad_dtype", None) or p.dtype


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


def _elements(p: Tensor) -> int:
    return p.numel() * (2 if p.is_complex() else 1)
