"""Every solver with the options under which it is tested, and how two of its answers are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from samplers import gramian
from torch import Tensor

from igb_kernels import Status, ops
from igb_kernels.gradients import METHODS


@dataclass(frozen=True)
class Variant:
    """A method with options, and what the tests of all methods may expect of it; the rest is on its card."""

    method: str
    options: Mapping[str, float] = field(default_factory=dict)
    degree: float | None = None
    """Overrides the card's: q such that the update becomes c^q of itself when all gradients are multiplied by c."""
    per_task: Callable[[int], Tensor] | None = None
    """The method's own numbers for K tasks, where it must have some or they are part of the variant."""
    inactive_ratio: float | None = 1e-12
    """A task whose norm is at most this fraction of the largest is reported as without gradient; None: it never is."""
    weightless: bool = True
    """A task without gradient gets weight 0, and changes nothing for the others."""
    symmetric: bool = True
    """Permuted tasks get permuted weights."""
    unique: bool = True
    """Copies of a task get the same weight; and every singular Gramian has one answer."""

    def __str__(self) -> str:
        return " ".join([self.method, *(f"{k}={v:g}" for k, v in self.options.items())])

    def solve(
        self,
        gram: Tensor,
        losses: Tensor | None = None,
        *,
        per_task: Tensor | None = None,
        state: Tensor | None = None,
        backend: str = "cpu",
    ):
        """Weights and status flags."""
        if losses is None:
            losses = losses_for(len(gram))
        if per_task is None and self.per_task is not None:
            per_task = self.per_task(len(gram))
        weights, status = ops.solve(self.method, gram, losses, per_task, state=state, backend=backend, **self.options)
        assert status.dtype is torch.int32
        assert status.shape == ()
        return weights, Status(int(status))

    def new_state(self, tasks: int) -> Tensor | None:
        return ops.SOLVERS[self.method].new_state(tasks, torch.device("cpu"), **self.options)

    @property
    def needs_gram(self) -> bool:
        return ops.SOLVERS[self.method].needs_gram

    @property
    def scale_degree(self) -> float | None:
        return METHODS[self.method].card.degree if self.degree is None else self.degree

    @property
    def has_absolute_eps(self) -> bool:
        return self.method == "db_mtl" and self.options.get("eps") != 0

    @property
    def scale_free(self) -> bool:
        """The direction does not change when a loss is multiplied by a constant."""
        return METHODS[self.method].card.invariance != "" and not self.has_absolute_eps


def in_turn(tasks: int) -> Tensor:
    """Times at which every gradient visits task after task: a task more or less leaves the order of the others."""
    return torch.arange(tasks, dtype=torch.float64).repeat(tasks, 1)


def learned(tasks: int) -> Tensor:
    """Numbers around 1, each another."""
    return 10 ** torch.linspace(-0.4, 0.3, tasks, dtype=torch.float64)


VARIANTS = [
    Variant("equal", weightless=False),
    Variant("db_mtl", {"beta": 0.0}, inactive_ratio=0.0),
    Variant("db_mtl", {"beta": 0.0, "eps": 0.0}, degree=1, inactive_ratio=0.0),
    Variant("db_mtl", {"beta": 0.9, "sigma": 0.5, "eps": 0.0, "bias_correction": 1.0}, degree=1, inactive_ratio=0.0),
    *(Variant("emtl", {"lam": lam}) for lam in (0.0, 0.5, 1.0, 2.0)),
    Variant("emtl", {"lam": 0.5, "scale": 1}),
    Variant("emtl", {"lam": 0.5, "scale": 2}, degree=0),
    Variant("excess_mtl", {"eta": 1.0}, inactive_ratio=0.0, weightless=False),
    Variant("excess_mtl", {"eta": 1.0, "as_torchjd": 1.0}, inactive_ratio=0.0, weightless=False),
    Variant("grad_drop", inactive_ratio=0.0, weightless=False),
    Variant("imtl_g"),
    Variant("imtl_g", {"descent_safe": 1.0}),
    Variant("metabalance", inactive_ratio=0.0, weightless=False, symmetric=False),  # the first task is the target
    Variant("moco", {"gamma": 1e-3}, weightless=False),
    Variant("moco", {"gamma": 1e-3, "rho": 0.1, "use_softmax": 1.0}, weightless=False),
    Variant("modo", {"gamma": 1e-3}, inactive_ratio=None, weightless=False),
    Variant("nash_mtl", {"max_norm": 0.0}),
    Variant("nash_mtl", {"max_norm": 1.0}),
    # More iterations amplify rounding.
    Variant("sdm_grad", {"lr": 0.1, "iterations": 3.0}, inactive_ratio=None, weightless=False),
    Variant("pcgrad", weightless=False, symmetric=False, unique=False),
    Variant("pcgrad", {"mean": 1.0}, weightless=False, symmetric=False, unique=False),
    Variant("pcgrad", {"visit_self": 1.0}, per_task=in_turn, symmetric=False, unique=False),
    Variant("gradvac", weightless=False, symmetric=False, unique=False),
    Variant("gradvac", {"beta": 0.3}, per_task=in_turn, symmetric=False, unique=False),
    Variant("grad_norm", per_task=learned, weightless=False, symmetric=False, unique=False),
    Variant(
        "grad_norm", {"alpha": 0.5, "direct": 1.0}, per_task=learned, weightless=False, symmetric=False, unique=False
    ),
    Variant("grad_norm", {"wait": 1.0}, per_task=learned, unique=False),
    *(Variant("fairgrad", {"alpha": a}, degree=(1 - a) / (1 + a)) for a in (0.0, 0.5, 1.0, 2.0, 5.0)),
    # The preference 1/K counts tasks without gradient; copies among rows of other lengths differ by rounding.
    *(Variant("aligned_mtl", {"scale": s}, weightless=False, unique=False) for s in (0, 1, 2)),
    Variant("aligned_mtl", {"scale": 2}, per_task=lambda tasks: torch.ones(tasks), unique=False),
    Variant("config"),
    Variant("mgda", inactive_ratio=0.0, weightless=False, unique=False),
    Variant("mgda", {"drop_zero": 1.0}, inactive_ratio=0.0, unique=False),
    Variant("dual_proj", inactive_ratio=0.0, weightless=False, unique=False),
    Variant("dual_proj", {"reg_eps": 1e-4}, inactive_ratio=0.0, weightless=False, unique=False),
    Variant("upgrad", inactive_ratio=0.0, weightless=False, unique=False),
    Variant("upgrad", {"reg_eps": 1e-4}, inactive_ratio=0.0, weightless=False, unique=False),
    Variant("cagrad", inactive_ratio=0.0, weightless=False, unique=False),
    Variant("cagrad", {"c": 0.9, "rescale": 1}, inactive_ratio=0.0, weightless=False, unique=False),
]

KNOWN_ALONE = ("equal", "db_mtl", "emtl", "imtl_g", "nash_mtl")
"""Methods whose weight of a single task test_properties knows; of the others it is finite and positive."""


def variant_of(method: str) -> Variant:
    """Some variant of each method."""
    return next(variant for variant in VARIANTS if variant.method == method)


def losses_for(tasks: int) -> Tensor:
    generator = torch.Generator().manual_seed(tasks)
    return 10 ** torch.empty(tasks, dtype=torch.float64).uniform_(-2, 2, generator=generator)


def update_distance(rows: Tensor, a: Tensor, b: Tensor) -> float:
    """|J'(a - b)| relative to Σ_k |b_k| |g_k|, the scale of its rounding errors."""
    scale = (b.abs() * rows.norm(dim=1)).sum()
    return float((rows.T @ (a - b)).norm() / scale) if scale > 0 else float((a - b).abs().max())


def projections(rows: Tensor, weights: Tensor) -> Tensor:
    """u_k · d for the unit gradients u_k and the update d."""
    return gramian(rows) @ weights / rows.norm(dim=1)
