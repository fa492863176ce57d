"""Plain PyTorch in float64: what every other backend is compared with, and what runs where none of them does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from igb_kernels.backends import OptionalTensors
from igb_kernels.backends._layout import as_reals, bring_back, in_memory_order, on_cpu
from igb_kernels.backends._random import uniforms
from igb_kernels.status import Status


@dataclass(frozen=True)
class Problem:
    """What a solver is given; float64 on the CPU. It may write to the state."""

    gram: Tensor
    """[K, K], or the squared norms [K] for methods that need no more."""
    losses: Tensor | None
    per_task: Tensor | None
    options: Mapping[str, float]
    state: Tensor | None


@dataclass(frozen=True)
class LossProblem:
    """What a loss-balancing rule is given; float64 on the CPU. It may write to the state."""

    losses: Tensor
    per_task: Tensor | None
    options: Mapping[str, float]
    state: Tensor | None


Solver = Callable[[Problem], tuple[Tensor, Status]]
"""Weights [K] and status."""

Rule = Callable[[LossProblem], tuple[Tensor, Status]]
"""Scales [K] and status; where it has one of `status.UNUSABLE`, scales of NaN and the state as it was."""


@dataclass(frozen=True)
class KnownSolver:
    """A method's reference, and what it is given: the Gramian or its diagonal, the losses or None."""

    function: Solver
    options: tuple[str, ...]
    needs_gram: bool
    needs_losses: bool


@dataclass(frozen=True)
class KnownRule:
    """A rule's reference, and its options' names."""

    function: Rule
    options: tuple[str, ...]


SOLVERS: dict[str, KnownSolver] = {}
RULES: dict[str, KnownRule] = {}


class Table:
    """K rows of P tensors; complex ones as twice as many real numbers."""

    def __init__(self, tensors: OptionalTensors, tasks: int, like: Table | None = None) -> None:
        self.tensors, self.tasks = as_reals(tensors, len(tensors) // tasks), tasks

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


def ema_(out: Table, state: Table, grads: Table, decay: Tensor, tasks: int, scales: Tensor | None = None) -> Tensor:
    b, params = decay.double().reshape(()), len(out.tensors) // tasks
    take = (1 - b).expand(tasks) if scales is None else (1 - b) * scales.double().to(b.device)
    for i, (o, s, g) in enumerate(zip(out.tensors, state.tensors, grads.tensors, strict=True)):
        if o is not None:
            average = torch.zeros_like(o, dtype=torch.float64) if s is None else b * s.double()
            if g is not None:
                average += take[i // params] * g.double()
            o.copy_(average)
    return sq_norms(out, tasks)


def accumulate_squares_(out: Table, state: Table, grads: Table, eps: float, tasks: int) -> Tensor:
    params = len(out.tensors) // tasks
    excess = torch.zeros(
        tasks, dtype=torch.float64, device=next((o.device for o in out.tensors if o is not None), None)
    )
    for i, (o, s, g) in enumerate(zip(out.tensors, state.tensors, grads.tensors, strict=True)):
        if o is not None:
            squares = torch.zeros_like(o, dtype=torch.float64) if g is None else g.double().square()
            total = squares if s is None else s.double() + squares
            o.copy_(total)
            excess[i // params] += (squares / (total + eps).sqrt()).sum()
    return excess


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


def sign_drop_(out: Table, grads: Table, counter: Tensor, leak: Tensor | None) -> Tensor:
    params = len(out.tensors)
    leaks = torch.zeros(grads.tasks, dtype=torch.float64) if leak is None else leak.double()
    seed, step = map(int, counter.tolist())
    norm = torch.zeros(1, dtype=torch.float64, device=counter.device)
    for p, o in enumerate(out.tensors):
        if o is None:  # no task reaches it
            continue
        column = grads.tensors[p::params]
        present = [k for k, g in enumerate(column) if g is not None]
        rows = [torch.zeros_like(o, dtype=torch.float64), *(g.double() for g in column if g is not None)]
        blocks = (p << 40) + torch.arange(-(-o.numel() // 4), device=o.device)
        drawn = in_memory_order(uniforms(seed, step, blocks)[: o.numel()], o)
        o.copy_(sign_drop(torch.stack(rows), drawn, torch.cat([leaks.new_zeros(1), leaks[present]])))
        norm += o.double().square().sum()
    return norm


def sign_drop(grads: Tensor, drawn: Tensor, leak: Tensor) -> Tensor:
    """GradDrop of gradients [K, ...], float64, with the uniform numbers [...] for their coordinates and leaks [K]."""
    kept = torch.where(drawn < positive_share(grads), grads > 0, grads < 0)
    factors = torch.where(kept, 1.0, leak.to(grads).reshape(-1, *[1] * drawn.dim()))
    finite = grads.isfinite().all(dim=0)
    return torch.where(finite, (factors * grads).sum(dim=0), torch.nan)


def positive_share(grads: Tensor) -> Tensor:
    """Of the coordinates' sizes, summed over K gradients [K, ...]; a half where there is nothing."""
    size = grads.abs().sum(dim=0)
    return torch.where(size == 0, 0.5, (1 + grads.sum(dim=0) / size) / 2)


def rollback_(out: Table, kept: Table, status: Tensor) -> None:
    failed = (status & int(Status.NON_FINITE)) != 0
    for o, k in zip(out.tensors, kept.tensors, strict=True):
        if o is not None:
            o.copy_(torch.where(failed, torch.zeros_like(o) if k is None else k, o))


def solve(
    method: str,
    gram: Tensor,
    losses: Tensor | None,
    per_task: Tensor | None,
    options: Sequence[float],
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    solver = SOLVERS[method]
    read = _doubles(gram if solver.needs_gram or gram.dim() == 1 else gram.diagonal())
    values = _doubles(losses) if solver.needs_losses and losses is not None else None
    if bool(read.isfinite().all()) and (values is None or bool(values.isfinite().all())):
        own = None if per_task is None else _doubles(per_task)
        named = dict(zip(solver.options, options, strict=True))
        kept = on_cpu(state)
        weights, status = solver.function(Problem(read, values, own, named, kept))
        bring_back(state, kept)
    else:
        weights, status = torch.full((len(read),), torch.nan, dtype=torch.float64), Status.NON_FINITE
    return weights.to(gram.device), _status_on(gram.device, status)


def loss_scales(
    rule: str, losses: Tensor, per_task: Tensor | None, options: Sequence[float], state: Tensor | None
) -> tuple[Tensor, Tensor]:
    values = _doubles(losses)
    scales, status = torch.full_like(values, torch.nan), Status.NON_FINITE
    if bool(values.isfinite().all()):
        known, own, kept = RULES[rule], None if per_task is None else _doubles(per_task), on_cpu(state)
        named = dict(zip(known.options, options, strict=True))
        scales, status = known.function(LossProblem(values, own, named, kept))
        bring_back(state, kept)
    return scales.to(losses), _status_on(losses.device, status)


def _doubles(t: Tensor) -> Tensor:
    return t.detach().double().cpu()


def _status_on(device: torch.device, status: Status) -> Tensor:
    return torch.tensor(int(status), dtype=torch.int32, device=device)
