"""Plain PyTorch in float64: what every other backend is compared with, and what runs where none of them does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from igb_kernels.status import Status

OptionalTensors = Sequence[Tensor | None]

Solver = Callable[[Tensor, Tensor | None, Sequence[float], Tensor | None], tuple[Tensor, Status]]
"""(Gramian or squared norms, losses, options, state) -> (weights, status), all float64 on the CPU; may write state."""

Rule = Callable[[Tensor, Tensor | None, Sequence[float]], Tensor]
"""(losses, values per task, options) -> scales, float64 on the CPU."""

SOLVERS: dict[str, Solver] = {}
RULES: dict[str, Rule] = {}


def _matrix(tensors: OptionalTensors, tasks: int) -> Tensor:
    """The K×D float64 matrix whose rows are the tasks' gradients, with zeros where a task does not reach."""
    params = len(tensors) // tasks
    shapes: list[Tensor | None] = [None] * params
    for i, t in enumerate(tensors):
        if t is not None:
            shapes[i % params] = t
    columns = [t for t in shapes if t is not None]
    if not columns:
        device = None
        return torch.zeros(tasks, 0, dtype=torch.float64, device=device)
    rows = []
    for k in range(tasks):
        row = tensors[k * params : (k + 1) * params]
        parts = [
            torch.zeros(like.numel(), dtype=torch.float64, device=like.device) if t is None else t.double().flatten()
            for t, like in zip(row, shapes, strict=True)
            if like is not None
        ]
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def gram(grads: OptionalTensors, tasks: int) -> Tensor:
    rows = _matrix(grads, tasks)
    return rows @ rows.T


def sq_norms(grads: OptionalTensors, tasks: int) -> Tensor:
    return _matrix(grads, tasks).square().sum(dim=1)


def ema_(out: Sequence[Tensor], state: OptionalTensors, grads: OptionalTensors, decay: Tensor, tasks: int) -> Tensor:
    b = decay.double().reshape(())
    for o, s, g in zip(out, state, grads, strict=True):
        old = torch.zeros_like(o, dtype=torch.float64) if s is None else s.double()
        new = torch.zeros_like(o, dtype=torch.float64) if g is None else g.double()
        o.copy_(b * old + (1 - b) * new)
    return sq_norms(out, tasks)


def combine_(out: Sequence[Tensor], grads: OptionalTensors, weights: Tensor, accumulate: bool) -> None:
    params = len(out)
    w = weights.double()
    for p, o in enumerate(out):
        total = o.double() if accumulate else torch.zeros_like(o, dtype=torch.float64)
        for k in range(len(w)):
            g = grads[k * params + p]
            if g is not None:
                total = total + w[k] * g.double()
        o.copy_(total)


def solve(
    method: str, gram: Tensor, losses: Tensor | None, options: Sequence[float], state: Tensor | None
) -> tuple[Tensor, Tensor]:
    on_cpu = None if state is None else state.cpu()  # the same tensor where it already is there
    values = None if losses is None else losses.double().cpu()
    finite = bool(gram.isfinite().all()) and (values is None or bool(values.isfinite().all()))
    if finite:
        weights, status = SOLVERS[method](gram.double().cpu(), values, options, on_cpu)
        if state is not None and on_cpu is not None and state is not on_cpu:
            state.copy_(on_cpu)
    else:
        weights, status = torch.full((gram.shape[0],), torch.nan, dtype=torch.float64), Status.NON_FINITE
    return weights.to(gram.device), torch.tensor(int(status), dtype=torch.int32, device=gram.device)


def loss_scales(
    rule: str, losses: Tensor, per_task: Tensor | None, options: Sequence[float]
) -> tuple[Tensor, Tensor]:
    values = losses.double().cpu()
    status, scales = Status(0), torch.full_like(values, torch.nan)
    if not values.isfinite().all():
        status = Status.NON_FINITE
    else:
        scales = RULES[rule](values, None if per_task is None else per_task.double().cpu(), options)
        if scales.isnan().any():
            status, scales = Status.NON_POSITIVE_LOSS, torch.full_like(values, torch.nan)
    return scales.to(losses), torch.tensor(int(status), dtype=torch.int32, device=losses.device)


def rollback_(out: Sequence[Tensor], kept: OptionalTensors, status: Tensor) -> None:
    failed = (status & int(Status.NON_FINITE)) != 0
    for o, k in zip(out, kept, strict=True):
        o.copy_(torch.where(failed, torch.zeros_like(o) if k is None else k, o))
