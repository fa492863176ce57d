"""MMoE (Ma et al., KDD 2018) and PLE (Tang et al., RecSys 2020) on embeddings of categorical fields.

Shared is what the losses of several tasks reach: the embeddings and experts, and of PLE's first level also each task's
own experts, since the gate of the shared ones takes them in.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from igb_kernels.bench.models.base import MultiTask


def _network(widths: Sequence[int]) -> nn.Sequential:
    return nn.Sequential(*(m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())))


def _tower(inputs: int, widths: Sequence[int]) -> nn.Sequential:
    return nn.Sequential(*_network([inputs, *widths]), nn.Linear([inputs, *widths][-1], 1))


class Experts(nn.Module):
    """Networks of the same input."""

    def __init__(self, count: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(_network(widths) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs] to [B, count, outputs]."""
        return torch.stack([network(x) for network in self.networks], dim=1)


class Gate(nn.Module):
    """A mean of experts, with weights from the input."""

    def __init__(self, inputs: int, experts: int) -> None:
        super().__init__()
        self.logits = nn.Linear(inputs, experts)

    def forward(self, x: Tensor, experts: Tensor) -> Tensor:
        """[B, inputs] and [B, E, outputs] to [B, outputs]."""
        return torch.einsum("be,beo->bo", self.logits(x).softmax(dim=1), experts)


class Fields(nn.Module):
    """A table for each categorical field."""

    def __init__(self, fields: int, rows: int, width: int, sparse: bool) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, width, sparse=sparse) for _ in range(fields))

    def forward(self, ids: Tensor) -> Tensor:
        """[B, fields] to [B, fields · width]."""
        return torch.cat([table(column) for table, column in zip(self.tables, ids.unbind(dim=1), strict=True)], dim=1)


class MMoE(nn.Module):
    """All experts are everybody's."""

    def __init__(self, fields: Fields, experts: Experts) -> None:
        super().__init__()
        self.fields, self.experts = fields, experts

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The input of gates, and what the experts say of it."""
        x = self.fields(ids)
        return x.view_as(x), self.experts(x)  # the view: experts are not made of what gates read


class MMoEHead(nn.Module):
    """A task's gate and tower."""

    def __init__(self, inputs: int, experts: int, outputs: int, tower: Sequence[int]) -> None:
        super().__init__()
        self.gate, self.tower = Gate(inputs, experts), _tower(outputs, tower)

    def forward(self, representation: tuple[Tensor, Tensor]) -> Tensor:
        """[B]."""
        prediction: Tensor = self.tower(self.gate(*representation))[:, 0]
        return prediction


class PLE(nn.Module):
    """The first level of experts, and of the second those that are everybody's."""

    def __init__(self, fields: Fields, inputs: int, tasks: int, own: int, common: int, widths: Sequence[int]) -> None:
        super().__init__()
        first, second = [inputs, *widths], [widths[-1], *widths]
        self.fields = fields
        self.own = nn.ModuleList(Experts(own, first) for _ in range(tasks))
        self.common = Experts(common, first)
        self.gate = Gate(inputs, tasks * own + common)
        self.next = Experts(common, second)

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        """The input of gates, the shared experts of both levels, then each task's own of the first."""
        x = self.fields(ids)
        own, common = [experts(x) for experts in self.own], self.common(x)
        following = self.next(self.gate(x, torch.cat([*own, common], dim=1)))
        return x.view_as(x), common.view_as(common), following, *(t.view_as(t) for t in own)


class PLEHead(nn.Module):
    """A task's gates, its experts of the second level, and its tower."""

    def __init__(
        self, task: int, inputs: int, own: int, common: int, widths: Sequence[int], tower: Sequence[int]
    ) -> None:
        super().__init__()
        self.task = task
        self.gates = nn.ModuleList(Gate(size, own + common) for size in (inputs, widths[-1]))
        self.experts, self.tower = Experts(own, [widths[-1], *widths]), _tower(widths[-1], tower)

    def forward(self, representation: tuple[Tensor, ...]) -> Tensor:
        """[B]."""
        x, common, following, *own = representation
        z = self.gates[0](x, torch.cat([own[self.task], common], dim=1))
        z = self.gates[1](z, torch.cat([self.experts(z), following], dim=1))
        prediction: Tensor = self.tower(z)[:, 0]
        return prediction


def _clicks(encoder: nn.Module, heads: list[nn.Module], batch: int, fields: int, rows: int) -> MultiTask:
    """Yes or no for each task, and each row of a table as likely as any other."""
    targets = list(torch.randint(0, 2, (len(heads), batch)).float())
    ids = torch.randint(0, rows, (batch, fields))
    criteria = [F.binary_cross_entropy_with_logits] * len(heads)
    return MultiTask(encoder, nn.ModuleList(heads), ids, targets, criteria)


def mmoe(
    tasks: int,
    *,
    batch: int,
    fields: int = 26,
    rows: int = 100_000,
    width: int = 16,
    sparse: bool = False,
    experts: int = 8,
    widths: Sequence[int] = (256, 128),
    tower: Sequence[int] = (64,),
) -> MultiTask:
    """Clicks and what follows them."""
    inputs = fields * width
    encoder = MMoE(Fields(fields, rows, width, sparse), Experts(experts, [inputs, *widths]))
    heads: list[nn.Module] = [MMoEHead(inputs, experts, widths[-1], tower) for _ in range(tasks)]
    return _clicks(encoder, heads, batch, fields, rows)


def ple(
    tasks: int,
    *,
    batch: int,
    fields: int = 26,
    rows: int = 100_000,
    width: int = 16,
    sparse: bool = False,
    own: int = 2,
    common: int = 2,
    widths: Sequence[int] = (256, 128),
    tower: Sequence[int] = (64,),
) -> MultiTask:
    """The same tasks; two levels of experts, some of them a task's own."""
    inputs = fields * width
    encoder = PLE(Fields(fields, rows, width, sparse), inputs, tasks, own, common, widths)
    heads: list[nn.Module] = [PLEHead(k, inputs, own, common, widths, tower) for k in range(tasks)]
    return _clicks(encoder, heads, batch, fields, rows)
