"""The gradients and models that are measured. Sizes only: random weights, random input."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Task:
    """A shared encoder with K linear heads and a batch."""

    encoder: nn.Module
    heads: nn.ModuleList
    batch: Any

    def __post_init__(self) -> None:
        self.shared = list(self.encoder.parameters())
        self.parameters = [*self.shared, *self.heads.parameters()]

    def to(self, device: torch.device) -> Task:
        """The same on a device."""
        return Task(self.encoder.to(device), self.heads.to(device), _moved(self.batch, device))

    def losses(self) -> list[Tensor]:
        representation = self.encoder(self.batch)
        return [(head(representation) - 1).square().mean() for head in self.heads]

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None


def _moved(batch: Any, device: torch.device) -> Any:
    """A tensor, or a dataclass with some, on the device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **{name: t.to(device) for name, t in tensors.items() if isinstance(t, Tensor)})


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


def qm9_schnet(tasks: int) -> Task:
    """The encoder of examples/qm9 on 120 molecules."""
    import pytest

    sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "qm9"))
    data, graphs, models = (pytest.importorskip(name) for name in ("data", "graphs", "models"))
    molecules = data.load("tiny", None, seed=0)
    built = graphs.build(molecules, data.split(len(molecules), 0).train, cutoff=5.0, bond_features=False)
    net = models.build_model("schnet", [str(k) for k in range(tasks)])
    return Task(net.encoder, nn.ModuleList(net.heads.values()), built.batch(torch.arange(120)))


MODELS = {"mlp-33k": mlp_33k, "mlp-5.8m": mlp_5_8m, "cnn-4.7m": cnn_4_7m}
USERS_MODELS = {**MODELS, "qm9-schnet": qm9_schnet}
"""For steps of other libraries' users."""
