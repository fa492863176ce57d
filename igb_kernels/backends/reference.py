"""Plain PyTorch in float64: what every other backend is compared with, and what runs where none of them does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from igb_kernels.backends import OptionalTensors
from igb_kernels.status import Status

Solver = Callable[[Tensor, Tensor | None, Sequence[float], Tensor | None], tuple[Tensor, Status]]
"""(Gramian or squared norms, losses, options, state) -> (weights, status), all float64 on the CPU; may write state."""

Rule = Callable[[Tensor, Tensor | None, Sequence[float]], tuple[Tensor, Status]]
"""(losses, values per task, options) -> (scales, status), float64 on the CPU."""


@dataclass(frozen=True)
class KnownSolver:
    """A method's reference, and what it is given: the Gramian or its diagonal, the losses or None."""

    function: Solver
    needs_gram: bool
    needs_losses: bool


SOLVERS: dict[str, KnownSolver] = {}
RULES: dict[str, Rule] = {}


@dataclass(frozen=True)
class Table:
    """K rows of P tensors."""

    tensors: OptionalTensors
    tasks: int
    like: Table | None = None

    @property
    def columns(self) -> list[Tensor | None]:
        """The first tensor of each column that is there."""
        params = len(self.tensors) // self.tasks
        return [next((t for t in self.tensors[p::params] if t is not None), None) for p in range(params)]

    def matrix(self) -> Tensor:
        """The K×D float64 matrix of the rows, with zeros where a task does not reach a parameter."""
        columns = self.columns
        device = next((t.device for t in columns if t is not None), None)
        rows = [
            [
                torch.zeros(column.numel(), dtype=torch.float64, device=device) if t is None else t.double().flatten()
                for t, column in zip(self.tensors[k * len(columns) : (k + 1) * len(columns)], columns, strict=True)
                if column is not None
            ]
            for k in range(self.tasks)
        ]
        empty = torch.zeros(0, dtype=torch.float64, device=device)
        return torch.stack([torch.cat([empty, *row]) for row in rows])


def gram(grads: Table, tasks: int) -> Tensor:
    rows = grads.matrix()
    return rows @ rows.T


def sq_norms(grads: Table, tasks: int) -> Tensor:
    return grads.matrix().square().sum(dim=1)


def ema_(out: Table, state: Table, grads: Table, decay: Tensor, tasks: int) -> Tensor:
    b = decay.double().reshape(())
    for o, s, g in zip(out.tensors, state.tensors, grads.tensors, strict=True):
        if o is not None:
            old = torch.zeros_like(o, dtype=torch.float64) if s is None else s.double()
            new = torch.zeros_like(o, dtype=torch.float64) if g is None else g.double()
            o.copy_(b * old + (1 - b) * new)
    return sq_norms(out, tasks)


def combine_(out: Table, grads: Table, weights: Tensor, accumulate: bool) -> None:
    w, params = weights.double(), len(out.tensors)
    for p, o in enumerate(out.tensors):
        assert o is not None
        total = o.double() if accumulate else torch.zeros_like(o, dtype=torch.float64)
        for k in range(grads.tasks):
            g = grads.tensors[k * params + p]
            if g is not None:
                total = total + w[k] * g.double()
        o.copy_(total)


def rollback_(out: Table, kept: Table, status: Tensor) -> None:
    failed = (status & int(Status.NON_FINITE)) != 0
    for o, k in zip(out.tensors, kept.tensors, strict=True):
        if o is not None:
            o.copy_(torch.where(failed, torch.zeros_like(o) if k is None else k, o))


def solve(
    method: str, gram: Tensor, losses: Tensor | None, options: Sequence[float], state: Tensor | None
) -> tuple[Tensor, Tensor]:
    solver = SOLVERS[method]
    read = (gram if solver.needs_gram or gram.dim() == 1 else gram.diagonal()).double().cpu()
    values = losses.double().cpu() if solver.needs_losses and losses is not None else None
    if bool(read.isfinite().all()) and (values is None or bool(values.isfinite().all())):
        on_cpu = None if state is None else state.cpu()  # the same tensor where it already is there
        weights, status = solver.function(read, values, options, on_cpu)
        if state is not None and on_cpu is not None and state is not on_cpu:
            state.copy_(on_cpu)
    else:
        weights, status = torch.full((len(read),), torch.nan, dtype=torch.float64), Status.NON_FINITE
    return weights.to(gram.device), torch.tensor(int(status), dtype=torch.int32, device=gram.device)


def loss_scales(rule: str, losses: Tensor, per_task: Tensor | None, options: Sequence[float]) -> tuple[Tensor, Tensor]:
    values = losses.double().cpu()
    scales, status = torch.full_like(values, torch.nan), Status.NON_FINITE
    if bool(values.isfinite().all()):
        scales, status = RULES[rule](values, None if per_task is None else per_task.double().cpu(), options)
    return scales.to(losses), torch.tensor(int(status), dtype=torch.int32, device=losses.device)
