"""Inputs that make gradient balancing hard: families of Jacobians, and ragged lists of gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from igb_kernels import ops

Grads = list[Tensor | None]

# ---- Jacobians ---------------------------------------------------------------------------------------------------


def _random(tasks: int, generator: torch.Generator) -> Tensor:
    return torch.randn(tasks, 2 * tasks + 8, dtype=torch.float64, generator=generator)


def _rows_spread(decades: float) -> Callable[[int, torch.Generator], Tensor]:
    """Row norms over 10^-decades .. 10^decades, ends included."""

    def sample(tasks: int, generator: torch.Generator) -> Tensor:
        exponents = torch.linspace(-decades, decades, tasks, dtype=torch.float64)
        return _random(tasks, generator) * 10 ** exponents[torch.randperm(tasks, generator=generator)][:, None]

    return sample


def _all_rows(factor: float) -> Callable[[int, torch.Generator], Tensor]:
    return lambda tasks, generator: factor * _random(tasks, generator)


def _condition_1e8(tasks: int, generator: torch.Generator) -> Tensor:
    """The Gramian's eigenvalues are 1 .. 1e-8."""
    u, _, v = torch.linalg.svd(_random(tasks, generator), full_matrices=False)
    return u @ (torch.logspace(0, -4, tasks, dtype=torch.float64)[:, None] * v)


def _near_parallel(tasks: int, generator: torch.Generator) -> Tensor:
    rows = _random(tasks, generator)
    return rows[:1] + 1e-3 * rows


def _duplicates(tasks: int, generator: torch.Generator) -> Tensor:
    rows = _random(tasks, generator)
    rows[tasks // 2 :] = rows[: tasks - tasks // 2].clone()
    return rows


def _parallel(tasks: int, generator: torch.Generator) -> Tensor:
    return _random(1, generator) * torch.arange(1, tasks + 1, dtype=torch.float64)[:, None]


def _opposed(tasks: int, generator: torch.Generator) -> Tensor:
    """The last row is the negative of the first."""
    rows = _random(tasks, generator)
    if tasks > 1:
        rows[-1] = -rows[0]
    return rows


def _zero_row(tasks: int, generator: torch.Generator) -> Tensor:
    rows = _random(tasks, generator)
    rows[tasks // 2] = 0
    return rows


def _all_zero(tasks: int, generator: torch.Generator) -> Tensor:
    return torch.zeros(tasks, 2 * tasks + 8, dtype=torch.float64)


def _rank_deficient(tasks: int, generator: torch.Generator) -> Tensor:
    return _random(tasks, generator)[:, : max(1, tasks // 2)]


FAMILIES: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "random": _random,
    "spread 1e-2..1e2": _rows_spread(2),
    "rows 1e-3..1e3": _rows_spread(3),
    "rows 1e-8..1e8": _rows_spread(8),
    "all rows x 1e-8": _all_rows(1e-8),
    "all rows x 1e8": _all_rows(1e8),
    "near parallel": _near_parallel,
    "condition 1e8": _condition_1e8,
    "duplicates": _duplicates,
    "parallel": _parallel,
    "opposed": _opposed,
    "zero row": _zero_row,
    "all zero": _all_zero,
    "rank deficient": _rank_deficient,
}
WELL_POSED = tuple(FAMILIES)[:3]
"""Gramians far from singular."""
NONSINGULAR = (*WELL_POSED, "all rows x 1e-8", "all rows x 1e8", "near parallel", "condition 1e8")


def jacobian(family: str, tasks: int, seed: int = 0) -> Tensor:
    """K×D rows, float64, contiguous."""
    return _jacobian(family, tasks, seed).clone()


@lru_cache(maxsize=256)
def _jacobian(family: str, tasks: int, seed: int) -> Tensor:
    return FAMILIES[family](tasks, torch.Generator().manual_seed(1000 * seed + tasks)).contiguous()


def gramian(rows: Tensor) -> Tensor:
    """Symmetric to the bit, as `ops.gram` makes it."""
    gram = rows @ rows.T
    return (gram + gram.T) / 2


def per_task_of(known: ops.Solver | ops.Rule, tasks: int) -> Tensor | None:
    """Numbers around 1 for a method or rule that takes some, as its `per_task`."""
    if known.per_task is None:
        return None
    shape = known.per_task(tasks)
    return torch.linspace(-1, 1, prod(shape), dtype=torch.float64).exp().reshape(shape)


# ---- Lists of gradients ------------------------------------------------------------------------------------------

SIZES = (0, 1, 3, 15, 16, 17, 63, 1000, 4095, 4096, 4097, 70001)
TASKS = (1, 2, 3, 4, 5, 8, 9, 13, 64, 128)

Dtypes = torch.dtype | Sequence[torch.dtype]


def sizes_for(tasks: int) -> tuple[int, ...]:
    """The sizes worth their time: the longest for few tasks only."""
    return SIZES if tasks in (1, 3) else SIZES[:-1]


def gradients(
    tasks: int,
    shapes: Sequence[int | tuple[int, ...]],
    dtypes: Dtypes,
    *,
    seed: int = 0,
    missing: Callable[[int, int], bool] = lambda k, p: False,
    layout: str = "contiguous",
) -> list[Grads]:
    """K rows of gradients of these shapes; None where `missing(task, column)`. One dtype, or one for each column."""
    generator = torch.Generator().manual_seed(seed)
    columns = [dtypes] * len(shapes) if isinstance(dtypes, torch.dtype) else list(dtypes)
    return [
        [
            None if missing(k, p) else laid_out(torch.randn(shape, generator=generator).to(dtype), layout, k)
            for p, (shape, dtype) in enumerate(zip(shapes, columns, strict=True))
        ]
        for k in range(tasks)
    ]


LAYOUTS = ("offset", "transposed", "gaps", "channels last", "mixed", "expanded")


def laid_out(t: Tensor, layout: str, task: int = 0) -> Tensor:
    """The values of `t` in another memory layout ("expanded": of its first slice, repeated with stride 0)."""
    if layout == "offset":
        return torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape).copy_(t)
    if layout == "transposed":
        return t.mT.contiguous().mT if t.dim() > 1 else t
    if layout == "gaps":
        return torch.empty(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype)[..., ::2].copy_(t) if t.dim() else t
    if layout == "channels last" or (layout == "mixed" and task % 2):
        return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
    if layout == "expanded":
        return t[:1].expand(t.shape) if t.dim() else t
    return t
