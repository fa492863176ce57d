"""Gradients as they come: K rows of many tensors of very different sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

RESNET50 = 23_498_496
"""Elements of `resnet50_shapes`."""
CHUNK = 1 << 20


def resnet50_shapes() -> list[tuple[int, ...]]:
    """The convolutions and batch norms of ResNet-50's four stages: 156 tensors, 23.5 million elements."""
    shapes: list[tuple[int, ...]] = []

    def conv(inputs: int, outputs: int, size: int) -> None:
        shapes.extend([(outputs, inputs, size, size), (outputs,), (outputs,)])

    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            conv(inputs, width, 1)
            conv(width, width, 3)
            conv(width, 4 * width, 1)
            if block == 0:
                conv(inputs, 4 * width, 1)
            inputs = 4 * width
    return shapes


def shapes(params: int) -> list[tuple[int, ...]]:
    """`params` elements in as many tensors as ResNet-50 has, each with its share of them and at least one; its own
    shapes where they are its own number but for 1 %. Fewer than 156 elements are one tensor."""
    own = resnet50_shapes()
    if abs(params - RESNET50) <= 0.01 * RESNET50:
        return own
    if params < len(own):
        return [(params,)]
    sizes = [max(1, prod(shape) * params // RESNET50) for shape in own]
    while left := params - sum(sizes):  # rounding's, and what goes beyond a share
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        sizes[largest] += max(left, 1 - sizes[largest])
    return [(size,) for size in sizes]


class Gradients:
    """K rows of random gradients, and buffers for a result."""

    def __init__(self, tasks: int, params: int, dtype: torch.dtype, device: torch.device) -> None:
        sizes = shapes(params)
        random = torch.Generator(device).manual_seed(0)

        def draw(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, device=device, generator=random).to(dtype)

        self.rows = [[draw(shape) for shape in sizes] for _ in range(tasks)]
        self.out = [torch.zeros_like(g) for g in self.rows[0]]
        self.weights = (torch.arange(tasks, device=device) + 1).double() / tasks
        self.tasks, self.params, self.dtype, self.device = tasks, sum(map(prod, sizes)), dtype, device
        self.row_bytes = self.params * self.out[0].element_size()
        self.bytes = tasks * self.row_bytes

    def like(self, value: float, dtype: torch.dtype) -> list[list[Tensor]]:
        """As many tensors, filled."""
        return [[torch.full_like(g, value, dtype=dtype) for g in row] for row in self.rows]

    def chunks(self) -> Iterator[tuple[int, slice, Tensor]]:
        """Every column in turn: the tensor's place, a part of its elements, and those of all rows [K, n] in float64."""
        for p, first in enumerate(self.rows[0]):
            for start in range(0, first.numel(), CHUNK):
                part = slice(start, start + CHUNK)
                yield p, part, torch.stack([row[p].flatten()[part] for row in self.rows]).double()


def part_of(tensors: Sequence[Tensor], p: int, part: slice) -> Tensor:
    """Some elements of the p-th tensor, in float64."""
    return tensors[p].flatten()[part].double()
