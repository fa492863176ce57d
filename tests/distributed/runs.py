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
        device: str = "cpu",
        **options: Any,
    ) -> None:
        self.ranks, self.rank, self.kind, self.dtype, self.device = ranks, rank, kind, dtype, device
        self.net = make_net(kind, dtype).to(device)
        torch.manual_seed(7 if rank is None else 7 + rank)  # ranks must not need the same
        group = None if rank is None else dist.group.WORLD
        options = {**STATES[name](), **options}
        self.balancer = igb.Balancer(**options, shared=self.net.shared, process_group=group)
        self.params = [*self.net.parameters(), *self.balancer.parameters()]
        self.optimizer = torch.optim.SGD(self.params, lr=lr, momentum=0.9)

    def batches(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """Of each rank."""
        found = batches(self.kind, step, self.ranks, self.dtype)
        return [(x.to(self.device), y.to(self.device)) for x, y in found]

    def losses(self, step: int) -> list[Tensor]:
        found = self.batches(step)
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
        return {name: [t.detach().cpu().clone() for t in tensors] for name, tensors in seen.items()}


def difference(a: dict[str, Sequence[Tensor]], b: dict[str, Sequence[Tensor]]) -> dict[str, float]:
    """The largest relative difference of anything that was seen; a loss that is missing is NaN in both."""

    def relative(x: Tensor, y: Tensor) -> float:
        if not torch.equal(x.isfinite(), y.isfinite()):
            return float("inf")
        x, y = (t.double().nan_to_num(0, 0, 0) for t in (x, y))
        return float((x - y).norm() / y.norm().clamp_min(1e-30))

    assert all(p.isfinite().all() and p.any() for p in b["params"]), "a training that diverged shows nothing"
    return {name: max(relative(x, y) for x, y in zip(a[name], b[name], strict=True)) for name in b}


def trained(rank: int, name: str, steps: int, ranks: int, options: dict[str, Any]) -> dict[str, Any]:
    """A whole training of this rank."""
    return Training(name, ranks, rank, **options).run(0, steps)


# ---- Variations ----------------------------------------------------------------------------------------------------


class Missing(Training):
    """Ranks lack tasks from the second step on, sometimes all of them; sometimes all ranks lack one."""

    def has(self, rank: int, task: int, step: int) -> bool:
        if step == 0:
            return True
        if (step % 5 == 3 and rank == 1) or (step % 4 == 2 and task == 1):
            return False
        return (3 * rank + 2 * task + step) % 4 != 0 or rank == 0

    def losses(self, step: int) -> list[Tensor | None]:
        found = self.batches(step)
        if self.rank is not None:
            all_tasks = losses_of(self.net, found[self.rank])
            return [loss if self.has(self.rank, k, step) else None for k, loss in enumerate(all_tasks)]
        of_ranks = [losses_of(self.net, batch) for batch in found]
        there = [[of[k] for r, of in enumerate(of_ranks) if self.has(r, k, step)] for k in range(3)]
        return [torch.stack(of_task).mean() if of_task else None for of_task in there]


class MicroBatches(Missing):
    """Two micro-batches for each decision; gradients of two decisions are added up. A rank's losses are the sums of its
    micro-batches', and count where it has any."""

    def parts(self, decision: int) -> list[list[Tensor | None]]:
        """The micro-batches of a decision: on one process, those of all ranks."""
        steps = (2 * decision, 2 * decision + 1)
        ranks = range(self.ranks) if self.rank is None else [self.rank]
        count = [sum(any(self.has(r, k, s) for s in steps) for r in range(self.ranks)) for k in range(3)]
        found = []
        for s in steps:
            of_ranks = self.batches(s)
            for r in ranks:
                losses = losses_of(self.net, of_ranks[r])
                share = [1.0] * 3 if self.rank is not None else [1 / max(1, n) for n in count]
                found.append([share[k] * x if self.has(r, k, s) else None for k, x in enumerate(losses)])
        return found

    def step(self, step: int, losses: Any = None) -> igb.result.BalanceResult:
        self.optimizer.zero_grad()
        for decision in (2 * step, 2 * step + 1):
            parts = self.parts(decision)
            if self.rank is None:
                parts = [part for part in parts if any(x is not None for x in part)]
            for part in parts[:-1]:
                self.balancer.accumulate(part)
            result = self.balancer.backward(parts[-1])
        self.optimizer.step()
        return result


class Scaled(Training):
    """With a GradScaler; the third step overflows on rank 1 alone."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.scaler = torch.amp.GradScaler(self.device, init_scale=1024.0)

    def step(self, step: int, losses: Any = None) -> igb.result.BalanceResult:
        self.optimizer.zero_grad()
        found = self.losses(step)
        if step == 2 and self.rank in (1, None):
            found[1] = found[1] * torch.tensor(float("inf"))
        result = self.balancer.backward(found, scaler=self.scaler)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return result


class AtRepresentation(Training):
    """Tasks are compared at the encoder's output."""

    def step(self, step: int, losses: Any = None) -> igb.result.BalanceResult:
        self.optimizer.zero_grad()
        found = self.batches(step)
        x, y = found[self.rank] if self.rank is not None else (
            torch.cat([x for x, _ in found]), torch.cat([y for _, y in found], dim=1)
        )  # fmt: skip
        z = self.net.encoder(x)
        losses = [s * (head(z) - t).square().mean() for head, t, s in zip(self.net.heads, y, TASK_SCALES, strict=False)]
        result = self.balancer.backward(losses, representation=z)
        self.optimizer.step()
        return result


class TwoBatches(Training):
    """With independent batches."""

    def step(self, step: int, losses: Any = None) -> igb.result.BalanceResult:
        self.optimizer.zero_grad()
        others = [self.losses(100 + step + 50 * i) for i in range(1 + step % 2)]
        result = self.balancer.backward(self.losses(step), independent=others)
        self.optimizer.step()
        return result


class Weighted(Missing):
    """The heads get the weights, too."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        group = None if self.rank is None else dist.group.WORLD
        self.balancer = igb.Balancer(
            **STATES[args[0]](),
            shared=self.net.shared,
            heads="weighted",
            task_parameters=self.net.own,
            process_group=group,
        )


VARIATIONS = {c.__name__: c for c in (Training, Missing, MicroBatches, Scaled, AtRepresentation, TwoBatches, Weighted)}


def varied(rank: int, variation: str, name: str, steps: int, ranks: int, options: dict[str, Any]) -> dict[str, Any]:
    """A whole training of this rank."""
    return VARIATIONS[variation](name, ranks, rank, **options).run(0, steps)
