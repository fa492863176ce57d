"""EMTL: equitable multi-task learning (our formulation)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from igb_kernels import ops
from igb_kernels.backends import Backend
from igb_kernels.backends.reference import Problem
from igb_kernels.card import Card
from igb_kernels.gradients._reference import measure
from igb_kernels.gradients.base import GradientBalancer, Needs, check_number
from igb_kernels.status import Status

SCALES = ("mean", "max", "none")


class EMTL(GradientBalancer):
    """Evens out the tasks' relative contributions r_k = L_k / ‖g_k‖ (raw loss over raw gradient norm).

    w_k = m (1 + lam (ρ_k − 1)) / ‖g_k‖ with ρ_k = r_k / mean_j r_j: the gradient of mean(r) + (lam/2) Var(r) / mean(r)
    with the norms frozen. After Yuan & Zhang 2023, arXiv:2306.09373, who regularise the variance of r; their algorithm
    is not published, and this formulation is ours.

    The direction does not change when a loss is multiplied by a constant. A task whose loss cannot reach 0 has r → ∞
    at its optimum and, with lam > 0, takes over the update: give `lower`, or use lam = 0, when losses end far from 0.

    Args:
        lam: strength of the variance term; 0 is plain gradient normalisation, up to 1 no weight is negative, above
            that negative weights are cut to 0.
        scale: m, the length of each gradient before the variance term: "mean" or "max" of the norms, or "none" (1).
        lower: a number or K numbers: the losses' lowest reachable values, subtracted first.
    """

    name = "emtl"
    card = Card(
        title="EMTL (our formulation)",
        paper="idea: Yuan & Zhang 2023, arXiv:2306.09373",
        formula="m (1 + lam (r_k / mean(r) − 1)) / |g_k|, r = L / |g|",
        inputs="norms, losses",
        memory="K gradients",
        passes="K",
        invariance="direction",
        degree=1.0,
        hazards="a task with irreducible loss takes over unless lower= says so",
    )

    def __init__(self, lam: float = 0.5, *, scale: str = "mean", lower: float | Sequence[float] | Tensor = 0.0) -> None:
        super().__init__()
        self.lam = check_number("lam", lam, 0)
        if scale not in SCALES:
            raise ValueError(f"scale must be one of {SCALES}, found {scale!r}")
        self.scale = scale
        self.lower = torch.as_tensor(lower, dtype=torch.float64)
        if self.lower.dim() > 1 or not bool(self.lower.isfinite().all()):
            raise ValueError(f"lower must be a finite number or one for each task, found {lower!r}")
        self._has_lower = bool((self.lower != 0).any())

    def options(self) -> dict[str, float]:
        return {"lam": self.lam, "scale": float(SCALES.index(self.scale))}

    def needs(self) -> Needs:
        return Needs.NORMS

    def start(self, tasks: int, device: torch.device) -> None:
        super().start(tasks, device)
        if self.lower.dim() == 1 and len(self.lower) != tasks:
            raise ValueError(f"lower must be one number or {tasks}, one for each task; found {len(self.lower)}")
        self.lower = self.lower.to(device)

    def solve(self, measured: Tensor, losses: Tensor, scales: Tensor, backend: Backend) -> tuple[Tensor, Tensor]:
        # The norms are of scaled gradients; the same scale on the losses makes r_k the raw ratio.
        excess = losses
        if self._has_lower:
            lower = self.of_step(self.lower) if self.lower.dim() == 1 else self.lower
            excess = (losses.double() - lower).clamp_min(0)
        return self._solve(measured, excess.double() * scales, backend)


@ops.register_solver("emtl", options={"lam": 0.5, "scale": 0.0}, needs_losses=True)
def _reference(problem: Problem) -> tuple[Tensor, Status]:
    losses = problem.losses
    assert losses is not None  # checked by the op
    tasks = measure(problem.gram)
    if not tasks.any:
        return torch.ones_like(tasks.norms), tasks.status
    norms = tasks.norms[tasks.active]
    ratio = losses.clamp_min(0)[tasks.active] / norms
    mean = ratio.mean()
    rho = ratio / mean if mean > 0 else torch.ones_like(ratio)
    length = (norms.mean(), norms.max(), torch.ones(()))[int(problem.options["scale"])]
    shares = (1 + problem.options["lam"] * (rho - 1)).clamp_min(0)
    shares = shares * len(norms) / shares.sum()  # Σ w n = A m also where a share was cut
    return tasks.spread(length * shares / norms), tasks.status
