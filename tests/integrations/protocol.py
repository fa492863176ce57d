"""The protocols of nash-mtl, FAMO and IGB4MTL as their trainers speak them, on a small model: what is asked of the
originals by `record_weight_methods.py`, and of ours by the tests."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

STEPS = 20
TASKS = 3
WEIGHTS_LR = 0.025


class Model(nn.Module):
    """An encoder and K heads whose losses differ in size; they stay positive."""

    def __init__(self, tasks: int = TASKS) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(3, 1) for _ in range(tasks))
        self.x = torch.randn(8, 3)
        self.targets = torch.randn(tasks, 8, 1)
        self.sizes = [1.0, 1.5, 0.8, 1.2, 0.7, 1.5, 0.9, 1.3, 0.6, 1.1, 0.8][:tasks]

    def losses(self) -> tuple[Tensor, Tensor]:
        """The losses [K], stacked, and the representation."""
        features = self.encoder(self.x)
        each = [
            size * ((head(features) - target) ** 2).mean() + 0.1
            for size, head, target in zip(self.sizes, self.heads, self.targets, strict=True)
        ]
        return torch.stack(each), features

    def places(self) -> dict[str, Any]:
        """What trainers pass beside losses and representation."""
        return {
            "shared_parameters": list(self.encoder.parameters()),
            "task_specific_parameters": list(self.heads.parameters()),
            "last_shared_parameters": list(self.encoder[2].parameters()),
        }


@dataclass
class Run:
    """What a training run leaves."""

    losses: list[list[float]] = field(default_factory=list)
    """Of each step [K]."""
    weights: list[list[float]] = field(default_factory=list)
    """Of each step, where the method tells them."""
    grams: list[list[list[float]]] = field(default_factory=list)
    """Of the gradients, before the step [K, K]."""
    inner: list[list[float]] = field(default_factory=list)
    """Of the update with each gradient [K]."""
    sq_norm: list[float] = field(default_factory=list)
    """Of the update."""
    final: list[float] = field(default_factory=list)
    """All parameters at the end."""


Step = Callable[[Model, Tensor, Tensor], "Tensor | None"]
"""From the model, its losses and representation to `.grad`, and weights where the method tells them."""


def train(model: Model, own: list[Tensor], step: Step, after: Callable[[Tensor], None] | None, gradients: bool) -> Run:
    """20 steps of Adam; `own` are the method's parameters, and `after` gets the losses after each step."""
    run, shared = Run(), list(model.encoder.parameters())
    optimizer = torch.optim.Adam([{"params": model.parameters(), "lr": 0.05}, {"params": own, "lr": WEIGHTS_LR}])
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses, features = model.losses()
        if gradients:
            rows = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses]
            jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
            run.grams.append((jacobian @ jacobian.T).tolist())
        run.losses.append(losses.tolist())
        weights = step(model, losses, features)
        if weights is not None:
            run.weights.append(torch.as_tensor(weights).tolist())
        if gradients:
            update = torch.cat([p.grad.flatten() for p in shared])
            run.inner.append((jacobian @ update).tolist())
            run.sq_norm.append(float(update @ update))
        optimizer.step()
        if after is not None:
            with torch.no_grad():
                after(model.losses()[0])
    run.final = torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()
    return run


def seeded_model(tasks: int = TASKS) -> Model:
    """The same model and the same random numbers afterwards, always; float64."""
    torch.manual_seed(3)
    random.seed(3)
    return Model(tasks).double()


@contextmanager
def in_float64() -> Iterator[None]:
    """What makes tensors of the default dtype, as the originals do, makes them in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def run_weight_methods(
    weight_methods: Any, method: str, options: dict[str, Any], *, gradients: bool = False, tasks: int = TASKS
) -> Run:
    """A run of nash-mtl's or FAMO's `WeightMethods`, theirs or ours."""
    with in_float64():
        model = seeded_model(tasks)
        made = weight_methods(method, n_tasks=tasks, device=torch.device("cpu"), **options)

        def step(model: Model, losses: Tensor, features: Tensor) -> Tensor | None:
            _, outputs = made.backward(losses=losses, representation=features, **model.places())
            return None if not outputs else outputs["weights"]

        after = made.method.update if method == "famo" else None
        return train(model, list(made.parameters()), step, after, gradients)


BASE_STEP = 5
"""After this step base losses are told."""


def run_pair(loss_methods: Any, gradient_methods: Any, loss: tuple[str, dict], gradient: tuple[str, dict]) -> Run:
    """A run of IGB4MTL's two, theirs or ours."""
    with in_float64():
        model, device = seeded_model(), torch.device("cpu")
        weigh = loss_methods(loss[0], n_tasks=TASKS, device=device, **loss[1])
        balance = gradient_methods(gradient[0], n_tasks=TASKS, device=device, **gradient[1])
        seen: list[Tensor] = []

        def step(model: Model, losses: Tensor, features: Tensor) -> Tensor:
            weighted, outputs = weigh.get_weighted_losses(losses=losses, representation=features, **model.places())
            balance.backward(losses=weighted, representation=features, **model.places())
            seen.append(losses.detach())
            if loss[0] == "igbv1" and len(seen) == BASE_STEP:
                weigh.method.base_losses = torch.stack(seen).mean(dim=0)
            return outputs["weights"].detach()

        return train(model, [*weigh.parameters(), *balance.parameters()], step, None, False)


# ---- Checkouts of the originals -----------------------------------------------------------------------------------


def checkout(repository: str) -> Path | None:
    """The checkout of "owner/name" in the folder that IGB_PEERS names, or None."""
    folder = Path(os.environ.get("IGB_PEERS", "")) / repository.replace("/", "+")
    return folder if "IGB_PEERS" in os.environ and folder.is_dir() else None


@contextmanager
def importing_from(folder: Path, **substitutes: ModuleType) -> Iterator[None]:
    """Imports find the checkout's `methods` and `experiments` first, and instead of the named modules (dots as double
    underscores) these; afterwards all is as before."""
    known = dict(sys.modules)
    for name in list(sys.modules):
        if name.split(".")[0] in ("methods", "experiments"):
            del sys.modules[name]
    sys.path.insert(0, str(folder))
    sys.modules.update({name.replace("__", "."): module for name, module in substitutes.items()})
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in list(sys.modules):
            if name.split(".")[0] in ("methods", "experiments") or name.replace(".", "__") in substitutes:
                del sys.modules[name]
        sys.modules.update({name: module for name, module in known.items() if name not in sys.modules})
