"""The gradients and models that are measured. Sizes only: random weights, random input."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn


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


@dataclass
class Task:
    """A shared encoder with K linear heads and a batch."""

    encoder: nn.Module
    heads: nn.ModuleList
    batch: Tensor

    def __post_init__(self) -> None:
        self.shared = list(self.encoder.parameters())
        self.parameters = [*self.shared, *self.heads.parameters()]

    def to(self, device: torch.device) -> Task:
        """The same on a device."""
        return Task(self.encoder.to(device), self.heads.to(device), self.batch.to(device))

    def losses(self) -> list[Tensor]:
        representation = self.encoder(self.batch)
        return [(head(representation) - 1).square().mean() for head in self.heads]

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None


def _mlp(widths: list[int]) -> nn.Module:
    layers = [[nn.Linear(a, b), nn.ReLU()] for a, b in pairwise(widths)]
    return nn.Sequential(*(module for layer in layers for module in layer))


def _cnn(channels: list[tuple[int, int]]) -> nn.Module:
    layers: list[nn.Module] = []
    inputs = 3
    for outputs, stride in channels:
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def mlp_33k(tasks: int) -> Task:
    return Task(_mlp([64, 128, 128, 64]), _heads(64, tasks), torch.randn(128, 64))


def mlp_5_8m(tasks: int) -> Task:
    return Task(_mlp([784, 2048, 2048]), _heads(2048, tasks), torch.randn(64, 784))


def cnn_4_7m(tasks: int) -> Task:
    encoder = _cnn([(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)])
    return Task(encoder, _heads(512, tasks), torch.randn(16, 3, 32, 32))


def vit_l(tasks: int) -> Task:
    """An encoder of ViT-L's size, 302 million parameters, on 8 images of 197 patches."""
    layer = nn.TransformerEncoderLayer(
        1024, 16, 4096, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    encoder = nn.Sequential(nn.TransformerEncoder(layer, 24, enable_nested_tensor=False), _MeanOfPatches())
    return Task(encoder, _heads(1024, tasks), torch.randn(8, 197, 1024))


class _MeanOfPatches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


def _heads(width: int, tasks: int) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(width, 1) for _ in range(tasks))


MODELS = {"mlp-33k": mlp_33k, "mlp-5.8m": mlp_5_8m, "cnn-4.7m": cnn_4_7m}
