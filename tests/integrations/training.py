"""A small task, and the plain PyTorch loop that trainers are held against."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import igb_kernels as igb

TASKS = ("depth", "normals", "edges")
BATCHES = 5
"""In an epoch; not a multiple of the micro-batches, so that an epoch's last step has fewer."""


def make_encoder_and_heads(seed: int = 0) -> tuple[nn.Module, nn.ModuleDict]:
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh())
    return encoder, nn.ModuleDict({task: nn.Linear(5, 2) for task in TASKS})


def examples(batches: int = BATCHES, size: int = 4) -> tuple[Tensor, Tensor]:
    """Inputs and targets [examples, tasks, 2], of tasks that differ in scale."""
    generator = torch.Generator().manual_seed(7)
    scales = torch.tensor([1.0, 4.0, 0.3])[:, None]
    count = batches * size
    return torch.randn(count, 6, generator=generator), scales * torch.randn(count, 3, 2, generator=generator)


def losses_of(encoder: nn.Module, heads: nn.ModuleDict, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    z = encoder(x)
    return {task: (head(z) - y[:, k]).square().mean() for k, (task, head) in enumerate(heads.items())}


def v1_db_mtl(shared: Any) -> igb.Balancer:
    return igb.Balancer("igb_v1+db_mtl", shared=shared)


def uw_pcgrad(shared: Any) -> igb.Balancer:
    """Learned weights, and a random order of tasks."""
    return igb.Balancer(igb.PCGrad(seed=3), losses=igb.UW(num_tasks=3), shared=shared)


class Net(nn.Module):
    """What the plain loop trains."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.heads = make_encoder_and_heads()

    def losses(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return losses_of(self.encoder, self.heads, x, y)


class Log:
    """What can be seen of a training: each step's losses and weights, and the parameters at its end."""

    def __init__(self) -> None:
        self.results: list[igb.BalanceResult] = []

    def watch(self, balancer: igb.Balancer) -> igb.Balancer:
        """Writes down what `backward` returns from now on."""
        backward = balancer.backward

        def watched(*args: Any, **kwargs: Any) -> igb.BalanceResult:
            self.results.append(backward(*args, **kwargs))
            return self.results[-1]

        balancer.backward = watched  # type: ignore[method-assign]
        return balancer

    def of(self, model: nn.Module, balancer: igb.Balancer, first: int = 0) -> list[object]:
        seen: list[object] = [[r.losses, r.weights, r.scales, r.status] for r in self.results[first:]]
        return [*seen, [p.detach().clone() for p in [*model.parameters(), *balancer.parameters()]]]


def plain_loop(
    make: Callable[..., igb.Balancer],
    *,
    epochs: int = 3,
    micro_batches: int = 1,
    divide_by: Callable[[int], int] | None = None,
    decide_per: str = "step",
    scaler: torch.amp.GradScaler | None = None,
    autocast: torch.dtype | None = None,
    clip: float | None = None,
    optimizer: Callable[[list[Any]], torch.optim.Optimizer] = lambda groups: torch.optim.SGD(groups, 0.05, 0.9),
    size: int = 4,
) -> list[object]:
    """The log of a training as README and TRAINING.md write it.

    Args:
        make: the balancer from `shared=`.
        divide_by: what a step of so many micro-batches divides its losses by; by default that number.
    """
    net, log = Net(), Log()
    balancer = log.watch(make(shared=net.encoder.parameters()))
    optimizer_ = optimizer([{"params": net.parameters()}, *balancer.param_groups()])
    batches = list(zip(*(part.split(size) for part in examples()), strict=True))
    for epoch in range(epochs):
        if epoch:
            balancer.end_epoch()
        for first in range(0, len(batches), micro_batches):
            window = batches[first : first + micro_batches]
            count = len(window) if divide_by is None else divide_by(len(window))
            optimizer_.zero_grad()
            for i, (x, y) in enumerate(window):
                with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
                    losses = net.losses(x, y)
                if decide_per == "step":
                    shares = {task: loss / count for task, loss in losses.items()}
                    step = balancer.backward if i == len(window) - 1 else balancer.accumulate
                    step(shares, scaler=scaler)
                else:  # the mean of the decisions' gradients
                    balancer.backward(losses, scaler=scaler)
            params = _optimized(optimizer_)
            if decide_per != "step":
                for p in [*net.parameters(), *balancer.parameters()]:
                    p.grad = None if p.grad is None else p.grad / count
            if scaler is not None:
                scaler.unscale_(optimizer_)
            if clip is not None:
                nn.utils.clip_grad_norm_(params, clip)
            if scaler is None:
                optimizer_.step()
            else:
                scaler.step(optimizer_)
                scaler.update()
    return log.of(net, balancer)


def _optimized(optimizer: torch.optim.Optimizer) -> Sequence[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
