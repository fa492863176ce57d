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
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

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
    everything(net, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))


def replicas(net: Whole) -> None:
    fully_shard(net, mesh=mesh_of((dist.get_world_size() // 2, 2), ("replicate", "shard")))


def replicas_alone(net: Whole) -> None:
    fully_shard(net, mesh=mesh_of((2, 1), ("replicate", "shard")))


def tensor_parallel(net: Whole) -> None:
    """Norms stay plain."""
    parallelize_module(net.encoder, mesh_of((2,)), {"1": ColwiseParallel(), "3": RowwiseParallel()})


def sequence_parallel(net: Whole) -> None:
    """Gradients of norms come as what each rank's samples add to their sums."""
    plan = {
        "1": ColwiseParallel(),
        "3": RowwiseParallel(output_layouts=Shard(0)),
        "4": SequenceParallel(sequence_dim=0, use_local_output=True),
        "5": PrepareModuleInput(input_layouts=Shard(0), desired_input_layouts=Replicate(), use_local_output=True),
    }
    parallelize_module(net.encoder, mesh_of((2,)), plan)


def both(net: Whole) -> None:
    """Norms are sharded along one dimension of the mesh alone, the heads not at all."""
    mesh = mesh_of((2, 2), ("dp", "tp"))
    parallelize_module(net.encoder, mesh["tp"], {"1": ColwiseParallel(), "3": RowwiseParallel()})
    fully_shard(net.encoder, mesh=mesh["dp"])


WITH_NORM = ("tensor parallel", "sequence parallel", "fully sharded and tensor parallel")

SHARDED: dict[str, Callable[[Whole], None]] = {
    "whole": lambda net: None,
    "encoder": encoder_only,
    "everything": everything,
    "separate heads": separate_heads,
    "not resharded": kept,
    "mixed precision": mixed,
    "replicas": replicas,
    "replicas alone": replicas_alone,
    "tensor parallel": tensor_parallel,
    "sequence parallel": sequence_parallel,
    "fully sharded and tensor parallel": both,
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
        tensor_parallel: int = 1,
        shares: int | None = None,
        **options: Any,
    ) -> None:
        """`mode` is the method that takes a step; neighbouring ranks that are `tensor_parallel` share a batch.
        A step's batch has as many `shares` as ranks, or more."""
        self.ranks, self.rank, self.kind, self.dtype = ranks, rank, "mlp", options.pop("dtype", torch.float64)
        self.mode, self.tensor_parallel = mode, tensor_parallel
        self.shares = ranks // tensor_parallel if shares is None else shares
        self.net = make_net("mlp", self.dtype)
        if shard in WITH_NORM:
            self.net.encoder.insert(3, nn.LayerNorm(5, dtype=self.dtype))
            self.net.encoder.insert(0, nn.LayerNorm(6, dtype=self.dtype))
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
        kinds = [self.params]
        if mode == "scaled":  # a GradScaler cannot take the two kinds together
            kinds = [[p for p in self.params if isinstance(p, DTensor) == sharded] for sharded in (True, False)]
        self.optimizers = [torch.optim.AdamW(params, lr=0.01) for params in kinds if params]
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=2)

    def losses(self, step: int) -> list[Tensor]:
        found = batches("mlp", step, self.shares, self.dtype)
        if self.rank is not None:
            each = self.shares * self.tensor_parallel // self.ranks
            first = self.rank // self.tensor_parallel * each
            found = found[first : first + each]
        x, y = torch.cat([x for x, _ in found]), torch.cat([y for _, y in found], dim=1)
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
