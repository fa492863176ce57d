"""The protocols of nash-mtl, FAMO and IGB4MTL as their trainers speak them, on a small model: what is asked of the
originals by `record_weight_methods.py`, and of ours by the tests."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    values: list[float] = field(default_factory=list)
    """Of the loss that each step returned, if it did."""
    outputs: list[str] = field(default_factory=list)
    """The names of the extra outputs."""
    final: list[float] = field(default_factory=list)
    """All parameters at the end."""


Step = Callable[[Model, Tensor, Tensor], "tuple[Tensor | None, dict[str, Any] | None]"]
"""From the model, its losses and representation to `.grad`; returns a loss and extra outputs."""


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
        value, outputs = step(model, losses, features)
        run.outputs = sorted(outputs or ())
        if outputs:
            run.weights.append(torch.as_tensor(outputs["weights"]).tolist())
        if value is not None:
            run.values.append(float(value.detach()))
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


@contextmanager
def in_float64() -> Iterator[None]:
    """What makes tensors of the default dtype, as the originals do, makes them in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def seeded_model(tasks: int = TASKS) -> Model:
    """The same model and the same random numbers afterwards, always; float64."""
    with in_float64():
        torch.manual_seed(3)
        random.seed(3)
        return Model(tasks)


@dataclass(frozen=True)
class Case:
    """A run of one of nash-mtl's or FAMO's methods."""

    repository: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    tasks: int = TASKS
    gradients: bool = False
    """Whether Gramians and updates are recorded, to see how close a solver comes."""

    @property
    def id(self) -> str:
        options = "".join(f"-{value}" for value in self.options.values())
        return f"{self.repository.split('/')[1].lower()}-{self.method}{options}-{self.tasks}"


def run_weight_methods(weight_methods: Any, case: Case) -> Run:
    """A run of a repository's `WeightMethods`, theirs or ours."""
    with in_float64():
        model = seeded_model(case.tasks)
        made = weight_methods(case.method, n_tasks=case.tasks, device=torch.device("cpu"), **case.options)

        def step(model: Model, losses: Tensor, features: Tensor) -> Any:
            return made.backward(losses=losses, representation=features, **model.places())

        after = made.method.update if case.method == "famo" else None
        return train(model, list(made.parameters()), step, after, case.gradients)


LOSS_OPTIONS: dict[str, dict[str, Any]] = {
    "stl": {"main_task": 1},
    "dwa": {"iteration_window": 4},
    "dwalog": {"iteration_window": 4},
}
NASH_MTL = ("stl", "ls", "uw", "scaleinvls", "rlw", "dwa", "imtl", "pcgrad", "mgda", "cagrad", "nashmtl")
FAMO = (*NASH_MTL[:8], "cagrad", "log_mgda", "log_cagrad", "log_imtl", "famo")
"""Without GradDrop, whose random numbers differ."""
SOLVED = ("mgda", "cagrad", "nashmtl")
"""By an iteration in the originals."""
RUNS = [
    Case(repository, method, LOSS_OPTIONS.get(method, {}), gradients=methods is NASH_MTL and method in SOLVED)
    for repository, methods in (("AvivNavon/nash-mtl", NASH_MTL), ("Cranial-XIX/FAMO", FAMO))
    for method in methods
]
RUNS += [
    Case("AvivNavon/nash-mtl", "mgda", {"params": params, "normalization": normalization}, tasks=2)
    for params, normalization in (("shared", "none"), ("last", "none"), ("rep", "none"), ("shared", "loss"))
]
RUNS += [
    Case("AvivNavon/nash-mtl", "pcgrad", {"reduction": "mean"}, tasks=8),
    Case("AvivNavon/nash-mtl", "nashmtl", {"update_weights_every": 3}, tasks=2),
    Case("AvivNavon/nash-mtl", "nashmtl", {"max_norm": 0.0}, tasks=2),
    Case("Cranial-XIX/FAMO", "nashmtl", tasks=2),
    Case("Cranial-XIX/FAMO", "mgda", tasks=2),
]
LOSSES = ("ls", "si", "uw", "uwlog", "rlw", "rlwlog", "dwa", "dwalog", "igbv1")
PAIRS = [("stl", "ls"), *((loss, gradient) for loss in LOSSES for gradient in ("ls", "imtl", "pcgrad"))]
PAIRS = [pair for pair in PAIRS if pair not in (("uw", "pcgrad"), ("uwlog", "pcgrad"))]
"""Of IGB4MTL, those that its code computes exactly. UW learns nothing there with PCGrad."""


BASE_STEP = 5
"""After this step base losses are told."""


def run_pair(loss_methods: Any, gradient_methods: Any, loss: str, gradient: str) -> Run:
    """A run of IGB4MTL's two, theirs or ours."""
    with in_float64():
        model, device = seeded_model(), torch.device("cpu")
        weigh = loss_methods(loss, n_tasks=TASKS, device=device, **LOSS_OPTIONS.get(loss, {}))
        balance = gradient_methods(gradient, n_tasks=TASKS, device=device)
        seen: list[Tensor] = []

        def step(model: Model, losses: Tensor, features: Tensor) -> Any:
            weighted, outputs = weigh.get_weighted_losses(losses=losses, representation=features, **model.places())
            value, _ = balance.backward(losses=weighted, representation=features, **model.places())
            seen.append(losses.detach())
            if loss == "igbv1" and len(seen) == BASE_STEP:
                weigh.method.base_losses = torch.stack(seen).mean(dim=0)
            return value, outputs

        return train(model, [*weigh.parameters(), *balance.parameters()], step, None, False)
