"""Trainings that ranks take part in, and the same on one process with the batches of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from balancer.models import INPUTS, TASK_SCALES, Net, make_net
from balancer.test_state import STATES
from torch import Tensor

import igb_kernels as igb


def batches(kind: str, step: int, ranks: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets of each rank."""
    torch.default_generator.manual_seed(500 + step)
    made = [(INPUTS[kind](), torch.randn(3, 6, 2)) for _ in range(ranks)]
    return [(x.to(dtype) if x.is_floating_point() else x, y.to(dtype)) for x, y in made]


def losses_of(net: Net, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
    z = net.encoder(batch[0])
    return [
        scale * (head(z) - y).square().mean() for head, y, scale in zip(net.heads, batch[1], TASK_SCALES, strict=False)
    ]


class Training:
    """A model, balancer and optimizer, on one rank of a group or alone on all ranks' batches."""

    def __init__(
        self,
        name: str,
        ranks: int,
        rank: int | None = None,
        kind: str = "mlp",
        dtype: torch.dtype = torch.float64,
        lr: float = 0.01,
        **options: Any,
    ) -> None:
        self.ranks, self.rank, self.kind, self.dtype = ranks, rank, kind, dtype
        self.net = make_net(kind, dtype)
        torch.manual_seed(7 if rank is None else 7 + rank)  # ranks must not need the same
        group = None if rank is None else dist.group.WORLD
        options = {**STATES[name](), **options}
        self.balancer = igb.Balancer(**options, shared=self.net.shared, process_group=group)
        self.params = [*self.net.parameters(), *self.balancer.parameters()]
        self.optimizer = torch.optim.SGD(self.params, lr=lr, momentum=0.9)

    def losses(self, step: int) -> list[Tensor]:
        found = batches(self.kind, step, self.ranks, self.dtype)
        if self.rank is not None:
            return losses_of(self.net, found[self.rank])
        whole = torch.cat([x for x, _ in found]), torch.cat([y for _, y in found], dim=1)
        return losses_of(self.net, whole)

    def step(self, step: int, losses: Callable[[int], Any] | None = None) -> igb.result.BalanceResult:
        losses = self.losses if losses is None else losses
        self.optimizer.zero_grad()
        result = self.balancer.backward(losses(step))
        self.optimizer.step()
        self.balancer.after_step(losses(step))
        if step % 3 == 2:
            self.balancer.end_epoch()
        return result

    def run(self, first: int, last: int) -> dict[str, Any]:
        """What steps first..last-1 came to."""
        results = [self.step(step) for step in range(first, last)]
        seen = {
            "losses": [r.losses for r in results],
            "weights": [r.weights for r in results],
            "scales": [r.scales for r in results],
            "grads": [p.grad for p in self.params if p.grad is not None],
            "params": list(self.params),
        }
        return {name: [t.detach().clone() for t in tensors] for name, tensors in seen.items()}


def difference(a: dict[str, Sequence[Tensor]], b: dict[str, Sequence[Tensor]]) -> dict[str, float]:
    """The largest relative difference of anything that was seen."""
    return {
        name: max(
            float((x - y).double().norm() / y.double().norm().clamp_min(1e-30))
            for x, y in zip(a[name], b[name], strict=True)
        )
        for name in b
    }


def trained(rank: int, name: str, steps: int, ranks: int, options: dict[str, Any]) -> dict[str, Any]:
    """A whole training of this rank."""
    return Training(name, ranks, rank, **options).run(0, steps)
