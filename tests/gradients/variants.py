"""Every solver with the options under which it is tested, and how two of its answers are compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from samplers import gramian
from torch import Tensor

from igb_kernels import Status, ops


@dataclass(frozen=True)
class Variant:
    method: str
    options: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([self.method, *(f"{k}={v:g}" for k, v in self.options.items())])

    def solve(self, gram: Tensor, losses: Tensor | None = None, *, state: Tensor | None = None, backend: str = "cpu"):
        """Weights and status flags."""
        if losses is None:
            losses = losses_for(len(gram))
        weights, status = ops.solve(self.method, gram, losses, state=state, backend=backend, **self.options)
        assert status.dtype is torch.int32
        assert status.shape == ()
        return weights, Status(int(status))

    def new_state(self, tasks: int) -> Tensor | None:
        return ops.SOLVERS[self.method].new_state(tasks, torch.device("cpu"), **self.options)

    @property
    def needs_gram(self) -> bool:
        return ops.SOLVERS[self.method].needs_gram

    @property
    def degree(self) -> int:
        """q such that the update is multiplied by c^q when all gradients are multiplied by c."""
        return 0 if self.method == "nash_mtl" or self.options.get("scale") == 2 else 1

    @property
    def has_absolute_eps(self) -> bool:
        return self.method == "db_mtl" and self.options.get("eps") != 0

    @property
    def scale_free(self) -> bool:
        """The direction does not change when a loss is multiplied by a constant."""
        return self.method != "equal" and not self.has_absolute_eps


VARIANTS = [
    Variant("equal"),
    Variant("db_mtl", {"beta": 0.0}),
    Variant("db_mtl", {"beta": 0.0, "eps": 0.0}),
    Variant("db_mtl", {"beta": 0.9, "sigma": 0.5, "eps": 0.0, "bias_correction": 1.0}),
    *(Variant("emtl", {"lam": lam}) for lam in (0.0, 0.5, 1.0, 2.0)),
    *(Variant("emtl", {"lam": 0.5, "scale": scale}) for scale in (1, 2)),
    Variant("imtl_g"),
    Variant("imtl_g", {"descent_safe": 1.0}),
    Variant("nash_mtl", {"max_norm": 0.0}),
    Variant("nash_mtl", {"max_norm": 1.0}),
]


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
