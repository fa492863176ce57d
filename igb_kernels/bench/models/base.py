"""A multi-task model with its batch: shared encoder, K heads, K losses; and what is known of it before it is made."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from igb_kernels.bench.machine import free_bytes

Representation = Tensor | tuple[Tensor, ...]
Criterion = Callable[[Tensor, Tensor], Tensor]
"""A scalar loss from prediction and target."""


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Its mean."""
    return (prediction - target).square().mean()


@dataclass
class MultiTask:
    """A shared encoder with K heads, and a batch. All parameters of the encoder are shared, no others are."""

    encoder: nn.Module
    """From a batch to its representation: a tensor, or several of which none is made from another, so that gradients
    can be taken at them."""
    heads: nn.ModuleList
    """From the representation to one task's prediction."""
    batch: Any
    targets: Sequence[Tensor] = ()
    """By default ones, for each task."""
    criteria: Sequence[Criterion] = ()
    """By default the mean squared error, for each task."""

    def __post_init__(self) -> None:
        self.shared = list(self.encoder.parameters())
        self.parameters = [*self.shared, *self.heads.parameters()]
        self.device = self.shared[0].device
        self.targets = self.targets or [torch.ones((), device=self.device)] * len(self.heads)
        self.criteria = self.criteria or [squared_error] * len(self.heads)

    def to(self, device: torch.device) -> MultiTask:
        """The same on a device; modules are moved."""
        targets = [t.to(device) for t in self.targets]
        return MultiTask(
            self.encoder.to(device), self.heads.to(device), _to(self.batch, device), targets, self.criteria
        )

    def losses(self) -> list[Tensor]:
        """K scalars, from a forward pass."""
        return self.losses_at(self.encoder(self.batch))

    def losses_at(self, representation: Representation) -> list[Tensor]:
        """K scalars, from what the encoder returned."""
        return [self.loss(k, head(representation)) for k, head in enumerate(self.heads)]

    def loss(self, task: int, prediction: Tensor) -> Tensor:
        """A task's scalar."""
        return self.criteria[task](prediction, self.targets[task])

    def zero_grad(self) -> None:
        """Sets all to None."""
        for p in self.parameters:
            p.grad = None


def _to(batch: Any, device: torch.device) -> Any:
    """A tensor, a tuple of such, or a dataclass with some, on the device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, tuple):
        return tuple(_to(part, device) for part in batch)
    if is_dataclass(batch) and not isinstance(batch, type):
        tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
        return replace(batch, **{name: _to(t, device) for name, t in tensors.items() if isinstance(t, Tensor)})
    raise TypeError(f"batch must hold tensors, in a tuple or a dataclass, found {type(batch).__name__}")


def linear_heads(width: int, tasks: int, outputs: int = 1) -> nn.ModuleList:
    """One matrix for each task."""
    return nn.ModuleList(nn.Linear(width, outputs) for _ in range(tasks))


# ---- What is known before -----------------------------------------------------------------------------------------


class Unavailable(Exception):
    """Says why a model cannot be made here."""


@dataclass(frozen=True)
class Load:
    """What a step asks of a machine, as a forward pass on the device "meta" tells, which computes nothing."""

    shared: int
    """Elements of the shared parameters."""
    total: int
    """Elements of all parameters."""
    activation_bytes: int
    """What a forward pass keeps for the backward passes; where attention is fused, less is."""
    forward_flops: int
    """Of products of matrices and convolutions."""

    def gradient_bytes(self, tasks: int) -> int:
        """Of K gradients of the shared parameters in float32."""
        return 4 * tasks * self.shared

    def step_flops(self, tasks: int) -> int:
        """Of a forward pass and K backward passes, each twice as much; those through heads are counted as if all were
        the encoder's."""
        return (1 + 2 * tasks) * self.forward_flops


@dataclass(frozen=True)
class Model:
    """A model that people train on several tasks, made with random weights and random input."""

    name: str
    about: str
    """What it stands for, in a line."""
    make: Callable[..., MultiTask]
    """From the number of tasks, and sizes by name, to the model on the current default device."""
    cpu: Mapping[str, Any]
    """Sizes of the input on a CPU: `batch` among them."""
    gpu: Mapping[str, Any]
    sizes: Mapping[str, Any] = field(default_factory=dict)
    """Others, if not the defaults of `make`."""
    missing: Callable[[], str] = str
    """Why it cannot be made here; "" where it can."""
    on_meta: bool = True
    """Whether it runs on the device "meta"; if not, it is small."""

    def build(self, tasks: int, device: torch.device, **sizes: Any) -> MultiTask:
        """The model on a device, at the sizes for it or those given.

        Raises:
            Unavailable: where it cannot be made here.
            ValueError: for fewer than one task.
        """
        if tasks < 1:
            raise ValueError(f"tasks must be at least 1, found {tasks}")
        if reason := self.missing():
            raise Unavailable(f"{self.name} is not available because {reason}")
        with device:
            return self.make(tasks, **{**self.sizes, **self.inputs(device), **sizes})

    def inputs(self, device: torch.device) -> Mapping[str, Any]:
        """Sizes of the input on a device."""
        return self.gpu if device.type == "cuda" else self.cpu

    def load(self, tasks: int, device: torch.device, **sizes: Any) -> Load:
        """What a step on the device asks for. Raises as `build`."""
        from torch.utils.flop_counter import FlopCounterMode

        place = torch.device("meta" if self.on_meta else "cpu")
        model = self.build(tasks, place, **{**self.inputs(device), **sizes})
        own = {p.untyped_storage()._cdata for p in model.parameters}
        kept: dict[int, Tensor] = {}

        def keep(saved: Tensor) -> Tensor:
            key = saved.untyped_storage()._cdata
            if key not in own:
                kept[key] = saved
            return saved

        counter = FlopCounterMode(display=False)
        with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            model.losses()
        return Load(
            sum(p.numel() for p in model.shared),
            sum(p.numel() for p in model.parameters),
            sum(t.untyped_storage().nbytes() for t in kept.values()),
            counter.get_total_flops(),
        )

    def left_out(
        self,
        tasks: int,
        device: torch.device,
        *,
        copies: int = 1,
        seconds: float | None = None,
        flops_per_second: float | None = None,
        **sizes: Any,
    ) -> str:
        """Why the model is not run on this machine, in words; "" where it can be.

        Args:
            copies: of K gradients that are held at a time: 1 for a balanced step, more for what flattens them.
            seconds, flops_per_second: the most that a step may take, and what the device computes.
        """
        if reason := self.missing():
            return f"{self.name} is not available because {reason}"
        load = self.load(tasks, device, **sizes)
        needed = 4 * load.total + load.activation_bytes + copies * load.gradient_bytes(tasks)
        free = free_bytes(device)
        if free is not None and needed > free:
            return (
                f"{self.name} with {tasks} tasks is left out: a step holds about {needed / 2**30:.1f} GiB, "
                f"{free / 2**30:.1f} are free"
            )
        if seconds is not None and flops_per_second is not None:
            takes = load.step_flops(tasks) / flops_per_second
            if takes > seconds:
                return (
                    f"{self.name} with {tasks} tasks is left out: its passes alone take about {takes:.1f} s a step "
                    f"here, more than {seconds:g}"
                )
        return ""


@cache
def matrix_flops_per_second(device: torch.device) -> float:
    """What products of matrices come to here, in float32: a bound on how fast a model can run. Measured once."""

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    size = 4096 if device.type == "cuda" else 1024
    a = torch.ones(size, size, device=device)
    best = float("inf")
    for _ in range(5):
        synchronize()
        start = time.perf_counter()
        a @ a
        synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
