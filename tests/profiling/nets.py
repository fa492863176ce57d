"""A small network with an optimizer and a balancer, whose steps are profiled."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import igb_kernels as igb

NAMES = ("a", "b", "c")


class Training:
    """Steps of three tasks on seeded batches."""

    def __init__(self, method: object = "igb_v1+nash_mtl", width: int = 16, **options: object) -> None:
        torch.manual_seed(0)
        self.encoder = nn.Sequential(
            nn.Linear(6, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Dropout(0.2)
        )
        self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in NAMES)
        self.params = [*self.encoder.parameters(), *self.heads.parameters()]
        self.optimizer = torch.optim.Adam(self.params, lr=1e-2)
        self.balancer = igb.Balancer(method, shared=self.encoder, **options)

    def losses(self) -> tuple[Tensor, dict[str, Tensor]]:
        z = self.encoder(torch.randn(8, 6))
        return z, {name: scale * (head(z) - 1).square().mean() for name, scale, head in zip(
            NAMES, (1.0, 20.0, 0.1), self.heads, strict=True)}  # fmt: skip

    def step(self, at_representation: bool = False, micro_batches: int = 1) -> None:
        self.optimizer.zero_grad()
        for _ in range(micro_batches - 1):
            self.balancer.accumulate(self.losses()[1])
        z, losses = self.losses()
        self.balancer.backward(losses, **({"representation": z} if at_representation else {}))
        self.optimizer.step()

    def steps(self, count: int, **how: object) -> None:
        for _ in range(count):
            self.step(**how)
