"""Two-dimensional problems whose task gradients are what the test says, balanced by real steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

import igb_kernels as igb
from igb_kernels.result import BalanceResult

TASKS = ("depth", "normals", "edges")
Gradients = Sequence[Sequence[float]]


def steps(
    method: str | igb.gradients.GradientBalancer,
    gradients: Callable[[int], Tensor | Gradients],
    count: int,
    *,
    names: Sequence[str] | None = TASKS,
    missing: Callable[[int], Iterable[int]] = lambda step: (),
    offset: Callable[[int], Tensor | float] = lambda step: 2.0,
    **options,
) -> Iterator[BalanceResult]:
    """Results of steps in which task k has the loss offset_k + g_k · p at p = 0, so that its gradient is g_k."""
    p, balancer = None, None
    for step in range(count):
        rows = torch.as_tensor(gradients(step), dtype=torch.float32)
        if p is None:
            p = torch.nn.Parameter(torch.zeros(rows.shape[1]))
            balancer = igb.Balancer(method, shared=[p], tasks=len(rows) if names is None else names, **options)
        offsets = torch.as_tensor(offset(step)).expand(len(rows))
        losses = [None if k in missing(step) else (row * p).sum() + offsets[k] for k, row in enumerate(rows)]
        p.grad = None
        yield balancer.backward(losses if names is None else dict(zip(names, losses, strict=True)))


def random_gradients(tasks: int = 3, size: int = 7) -> Callable[[int], Tensor]:
    """Of different directions and lengths in each step."""

    def of(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        return torch.randn(tasks, size, generator=generator) + 0.3

    return of
