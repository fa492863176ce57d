"""BERT (Devlin et al., NAACL 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from igb_kernels.bench.models.base import MultiTask, linear_heads
from igb_kernels.bench.models.vision import transformer


class Bert(nn.Module):
    """From tokens to the pooled state of the first."""

    def __init__(self, vocabulary: int, positions: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width)
        self.segments = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width)
        self.layers = transformer(width, layers, heads, norm_first=False)
        self.pooler = nn.Sequential(nn.Linear(width, width), nn.Tanh())

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, S] of a single segment to [B, width]."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.words(tokens) + self.positions(places) + self.segments(torch.zeros_like(tokens))
        pooled: Tensor = self.pooler(self.layers(self.norm(x))[:, 0])
        return pooled


def bert(
    tasks: int,
    *,
    batch: int,
    tokens: int,
    vocabulary: int = 30_522,
    positions: int = 512,
    width: int = 768,
    layers: int = 12,
    attention_heads: int = 12,
    classes: int = 3,
) -> MultiTask:
    """A classification of the text for each task, all of the same batch."""
    encoder = Bert(vocabulary, positions, width, layers, attention_heads)
    targets = list(torch.randint(0, classes, (tasks, batch)))
    text = torch.randint(0, vocabulary, (batch, tokens))
    return MultiTask(encoder, linear_heads(width, tasks, classes), text, targets, [F.cross_entropy] * tasks)
