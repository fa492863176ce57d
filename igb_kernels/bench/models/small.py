"""Networks whose steps are short: what a balanced step costs beside its passes shows there most."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from igb_kernels.bench.models.base import MultiTask, linear_heads


def mlp(tasks: int, *, batch: int, widths: Sequence[int] = (64, 128, 128, 64)) -> MultiTask:
    """Fully connected layers; regression."""
    layers = [[nn.Linear(a, b), nn.ReLU()] for a, b in pairwise(widths)]
    encoder = nn.Sequential(*(module for layer in layers for module in layer))
    return MultiTask(encoder, linear_heads(widths[-1], tasks), torch.randn(batch, widths[0]))


CHANNELS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1))


def cnn(tasks: int, *, batch: int, image: int = 32, channels: Sequence[tuple[int, int]] = CHANNELS) -> MultiTask:
    """3×3 convolutions, of channels and stride, with batch norms; regression."""
    layers: list[nn.Module] = []
    inputs = 3
    for outputs, stride in channels:
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return MultiTask(encoder, linear_heads(inputs, tasks), torch.randn(batch, 3, image, image))
