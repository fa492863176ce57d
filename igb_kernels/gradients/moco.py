"""MoCo: weights on corrected gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from igb_kernels import ops
from igb_kernels.backends.reference import Problem
from igb_kernels.card import Card
from igb_kernels.gradients._reference import measure, project_on_simplex
from igb_kernels.gradients._shares import SharesOfOne
from igb_kernels.gradients.base import Needs, check_number
from igb_kernels.status import Status

STEP, DECAY, FIRST_WEIGHT = range(3)
"""Layout of the state."""


class MoCo(SharesOfOne):
    """Weights of the min-norm objective, followed on moving averages of the gradients (Fernando et al., ICLR 2023).

    At step t = 1, 2, ...: Y_k ← Y_k − β_t (Y_k − L_k g_k / ‖g_k‖) with β_t = min(1, beta / t^beta_sigma), then
    λ ← P(λ − γ_t (Y Yᵀ + rho I) λ) with γ_t = gamma / t^gamma_sigma; the update is Σ_k λ_k Y_k (algorithm 1, in the
    normalised form of the official code; L_k is the raw loss). The losses' values enter, so a constant added to a loss
    changes the update.

    The step holds two sets of K moving averages, as DB-MTL's does.

    Args:
        beta, beta_sigma: of the moving averages' step.
        gamma, gamma_sigma: of the weights' step.
        rho: regularisation of the weights.
        normalize: average L_k g_k / ‖g_k‖; False: the plain gradients, as in the paper's text.
        parity: "libmtl" replaces the projection P on the simplex by LibMTL's softmax, which draws the weights to 1/K
            in every step, so that they never come near a weight of 0; and adds its 1e-8 to the norms.
    """

    name = "moco"
    card = Card(
        title="MoCo",
        paper="Fernando et al., ICLR 2023",
        formula="λ ← P(λ − γ_t (Y Yᵀ + rho I) λ) on averages Y of L_k g_k / |g_k|",
        inputs="Gramian of moving averages, norms, losses",
        memory="2K moving averages",
        passes="K",
        hazards="uses the losses' values: a constant added to a loss changes the update",
        parity='parity="libmtl": softmax instead of the projection',
    )

    def __init__(
        self,
        beta: float = 0.5,
        beta_sigma: float = 0.5,
        gamma: float = 0.1,
        gamma_sigma: float = 0.5,
        rho: float = 0.0,
        *,
        normalize: bool = True,
        parity: str | None = None,
    ) -> None:
        super().__init__()
        self.beta, self.beta_sigma = check_number("beta", beta, 0), check_number("beta_sigma", beta_sigma, 0)
        self.gamma, self.gamma_sigma = check_number("gamma", gamma, 0), check_number("gamma_sigma", gamma_sigma, 0)
        if self.beta == 0:
            raise ValueError("beta must be above 0: with 0 the moving averages never see a gradient")
        self.rho, self.normalize = check_number("rho", rho, 0), bool(normalize)
        if parity not in (None, "libmtl"):
            raise ValueError(f'parity must be None or "libmtl", found {parity!r}')
        self.parity = parity

    def options(self) -> dict[str, float]:
        return {
            "beta": self.beta,
            "beta_sigma": self.beta_sigma,
            "gamma": self.gamma,
            "gamma_sigma": self.gamma_sigma,
            "rho": self.rho,
            "use_softmax": float(self.parity == "libmtl"),
        }

    def needs(self) -> Needs:
        return Needs.GRAM

    def ema_decay(self) -> Tensor | None:
        assert self.state is not None, "start() comes first"
        return self.state[DECAY : DECAY + 1]

    def row_scales(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        return self._to_the_loss if self.normalize else None

    def _to_the_loss(self, sq_norms: Tensor, losses: Tensor) -> Tensor:
        """Factors that give each gradient its loss as length; 0 for one that vanishes."""
        guard = 1e-8 if self.parity == "libmtl" else 0.0
        return (losses.double() / (sq_norms.sqrt() + guard)).masked_fill(sq_norms == 0, 0.0)


@ops.register_solver(
    "moco",
    options={"beta": 0.5, "beta_sigma": 0.5, "gamma": 0.1, "gamma_sigma": 0.5, "rho": 0.0, "use_softmax": 0.0},
    needs_gram=True,
    initial_state=lambda tasks, options: [0.0, 1.0 - min(1.0, options["beta"]), *([1 / tasks] * tasks)],
    state_head=FIRST_WEIGHT,
)
def _reference(problem: Problem) -> tuple[Tensor, Status]:
    options, state = problem.options, problem.state
    assert state is not None  # checked by the op
    step, weights = float(state[STEP]) + 1, state[FIRST_WEIGHT:]
    slope = problem.gram @ weights + options["rho"] * weights
    moved = weights - options["gamma"] / step ** options["gamma_sigma"] * slope
    weights = moved.softmax(0) if options["use_softmax"] else project_on_simplex(moved)
    decay = 1 - min(1.0, options["beta"] / (step + 1) ** options["beta_sigma"])
    state.copy_(torch.cat([torch.tensor([step, decay], dtype=torch.float64), weights]))
    return weights, measure(problem.gram).status
