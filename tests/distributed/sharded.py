"""Trainings of models whose parameters are sharded, and the same on one process with the batches of all ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from balancer.models import TASK_SCALES, Net, make_net
from balancer.test_state import STATES
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import igb_kernels as igb

from .runs import Training, batches


class Whole(Net):
    """A model that is called as one, so that `fully_shard` sees its forward pass."""

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        z = self.encoder(x)
        return z, [head(z) for head in self.heads]


@functools.cache
def mesh_of(shape: tuple[int, ...], names: tuple[str, ...] | None = None) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def whole(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [(t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for t in tensors if t is not None]


def encoder_only(net: Whole, **options: Any) -> None:
    fully_shard(net.encoder, **options)


def everything(net: Whole, **options: Any) -> None:
    """Layers by themselves, the heads with the whole."""
    for layer in net.encoder:
        if list(layer.parameters()):
            fully_shard(layer, **options)
    fully_shard(net, **options)


def separate_heads(net: Whole) -> None:
    for module in (net.encoder, *net.heads):
        fully_shard(module)


def kept(net: Whole) -> None:
    everything(net, reshard_after_forward=False)


def mixed(net: Whole) -> None:
    everything(net, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32))


SHARDED: dict[str, Callable[[Whole], None]] = {
    "encoder": encoder_only,
    "everything": everything,
    "separate heads": separate_heads,
    "not resharded": kept,
    "mixed precision": mixed,
}
"""How models are changed, by name."""


class Run(Training):
    """A model that is sharded on a rank of a group, or whole on one process."""

    def __init__(
        self,
        name: str,
        ranks: int,
        rank: int | None = None,
        shard: str = "encoder",
        mode: str = "step",
        same_batch: bool = False,
        **options: Any,
    ) -> None:
        """`mode` is the method that takes a step; with the `same_batch`, ranks share that of rank 0."""
        self.ranks, self.rank, self.kind, self.dtype = ranks, rank, "mlp", options.pop("dtype", torch.float64)
        self.mode, self.same_batch = mode, same_batch
        self.net = make_net("mlp", self.dtype)
        if shard in MODELS:
            self.net.encoder = MODELS[shard]().to(self.dtype)
        self.net.__class__ = Whole
        if rank is not None:
            SHARDED[shard](self.net)
        torch.manual_seed(7 if rank is None else 7 + rank)
        options = {**STATES[name](), **options}
        if options.get("heads") == "weighted":
            options["task_parameters"] = self.net.heads
        group = None if rank is None else dist.group.WORLD
        self.balancer = igb.Balancer(**options, shared=self.net.encoder, process_group=group)
        self.params = [*self.net.parameters(), *self.balancer.parameters()]
        # A GradScaler cannot take the two kinds together.
        kinds = [[p for p in self.params if isinstance(p, DTensor) == sharded] for sharded in (True, False)]
        self.optimizers = [torch.optim.AdamW(params, lr=0.01) for params in kinds if params]
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=2)

    def losses(self, step: int) -> list[Tensor]:
        found = batches("mlp", step, 1 if self.same_batch else self.ranks, self.dtype)
        if self.rank is None:
            x, y = torch.cat([x for x, _ in found]), torch.cat([y for _, y in found], dim=1)
        else:
            x, y = found[0 if self.same_batch else self.rank]
        self.z, outputs = self.net(x)
        return [scale * (out - t).square().mean() for out, t, scale in zip(outputs, y, TASK_SCALES, strict=False)]

    def step(self, step: int) -> igb.result.BalanceResult:  # type: ignore[override]
        self.zero_grad()
        result = self.balancer.backward(self.losses(step))
        self.update()
        self.balancer.after_step(self.losses(step))
        if step % 3 == 2:
            self.balancer.end_epoch()
        return result

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def update(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def accumulated(self, step: int) -> igb.result.BalanceResult:
        """Three micro-batches, balanced as one."""
        self.zero_grad()
        for part in (0, 1):
            self.balancer.accumulate(self.losses(10 * step + part))
        result = self.balancer.backward(self.losses(10 * step + 2))
        self.update()
        return result

    def added(self, step: int) -> igb.result.BalanceResult:
        """Each micro-batch balanced by itself; what a plain pass has left is added to."""
        self.zero_grad()
        sum(self.losses(10 * step + 2)).backward()
        if self.rank is not None:  # the wrapper has averaged those of DTensors, nobody those of others
            for p in self.net.parameters():
                if not isinstance(p, DTensor):
                    dist.all_reduce(p.grad)
                    p.grad /= self.ranks
        self.balancer.backward(self.losses(10 * step))
        result = self.balancer.backward(self.losses(10 * step + 1))
        self.update()
        return result

    def at_representation(self, step: int) -> igb.result.BalanceResult:
        self.zero_grad()
        losses = self.losses(step)
        result = self.balancer.backward(losses, representation=self.z)
        self.update()
        return result

    def scaled(self, step: int) -> igb.result.BalanceResult:
        """The second step overflows on one rank."""
        self.zero_grad()
        losses = self.losses(step)
        if step == 1 and self.rank in (None, 1):
            losses[1] = losses[1] * float("inf")
        result = self.balancer.backward(losses, scaler=self.scaler)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        return result

    def run(self, first: int, last: int) -> dict[str, Any]:
        results = [getattr(self, self.mode)(step) for step in range(first, last)]
        return {
            "losses": [r.losses for r in results],
            "weights": [r.weights for r in results],
            "scales": [r.scales for r in results],
            "status": [r.status for r in results],
            "measured": [r.measured for r in results if r.measured is not None],
            "grads": whole([p.grad for p in self.params]),
            "params": whole(self.params),
        }


MODELS: dict[str, Callable[[], nn.Module]] = {}
"""Encoders of their own, by the way they are sharded."""
