"""DB-MTL: dual balancing."""

from __future__ import annotations

import torch
from torch import Tensor

from igb_kernels import ops
from igb_kernels.backends.reference import Problem
from igb_kernels.card import Card
from igb_kernels.gradients._reference import measure
from igb_kernels.gradients.base import GradientBalancer, Needs, check_number
from igb_kernels.losses import Log, LossBalancer
from igb_kernels.status import Status

STEP, DECAY, DECAY_PRODUCT = range(3)
"""Layout of the state."""


class DBMTL(GradientBalancer):
    """Log losses, moving averages of the gradients, all rescaled to the largest norm.

    At step t = 1, 2, ...: B_k ← (1 − β_t) g_k + β_t B_k with β_t = beta / t^sigma and g_k the gradient of log L_k; the
    update is Σ_k α_k B_k with α_k = max_j ‖B_j‖ / (‖B_k‖ + eps) (Lin et al. 2023, arXiv:2308.12029, equations 2 to 4).

    With beta = 0 nothing is stored: each gradient is added to the update as it comes, and the step needs the memory of
    one gradient beyond the update. With beta > 0 the step holds two sets of K moving averages (float32, or float64 for
    float64 gradients), so that a step that turns out non-finite can leave them as they were.

    Args:
        beta: decay of the moving averages, 0 to 1 (1 excluded).
        sigma: exponent with which the decay fades.
        bias_correction: divide the averages by 1 − Π β_t, so that the first updates have their full size. LibMTL and
            the paper do not.
        eps: added to the norms.
        relative_eps: eps counts as 1e-12 · max_j ‖B_j‖ instead, which keeps the norms equal at any scale.
    """

    name = "db_mtl"
    card = Card(
        title="DB-MTL",
        paper="Lin et al. 2023, arXiv:2308.12029",
        formula="max_j |B_j| / (|B_k| + eps)",
        inputs="norms, losses",
        memory="beta > 0: 2K moving averages; beta = 0: 2 gradients",
        passes="K",
        invariance="update",
        degree=0.0,
        hazards="first updates are 1 − beta of their size unless bias_correction; the best-fitted task sets the step",
        parity="the defaults are LibMTL's",
    )

    def __init__(
        self,
        beta: float = 0.9,
        sigma: float = 0.0,
        *,
        bias_correction: bool = False,
        eps: float = 1e-8,
        relative_eps: bool = False,
    ) -> None:
        super().__init__()
        self.beta = check_number("beta", beta, 0, 1)
        if self.beta == 1:
            raise ValueError("beta must be below 1: with 1 the moving averages never see a gradient")
        self.sigma = check_number("sigma", sigma, 0)
        self.eps = check_number("eps", eps, 0)
        self.bias_correction, self.relative_eps = bool(bias_correction), bool(relative_eps)

    def options(self) -> dict[str, float]:
        return {
            "beta": self.beta,
            "sigma": self.sigma,
            "eps": self.eps,
            "relative_eps": float(self.relative_eps),
            "bias_correction": float(self.bias_correction),
        }

    def needs(self) -> Needs:
        # A relative eps is known only when all norms are.
        return Needs.NORMS if self.beta > 0 or self.relative_eps else Needs.RUNNING_NORMS

    def default_losses(self) -> LossBalancer:
        return Log(eps=1e-8)

    def ema_decay(self) -> Tensor | None:
        if self.beta == 0:
            return None
        assert self.state is not None, "start() comes first"
        return self.state[DECAY : DECAY + 1]

    def running_weight(self, sq_norm: Tensor) -> Tensor:
        return (1 / (sq_norm.sqrt() + self.eps)).masked_fill(sq_norm == 0, 0.0)

    def running_factor(self, sq_norms: Tensor) -> Tensor:
        largest = sq_norms.max().sqrt().reshape(1)
        return largest.masked_fill(~largest.isfinite(), torch.nan)


@ops.register_solver(
    "db_mtl",
    options={"beta": 0.9, "sigma": 0.0, "eps": 1e-8, "relative_eps": 0.0, "bias_correction": 0.0},
    initial_state=lambda tasks, options: [0.0, options["beta"], 1.0],
    state_head=3,
)
def _reference(problem: Problem) -> tuple[Tensor, Status]:
    options, state = problem.options, problem.state
    assert state is not None  # checked by the op
    tasks = measure(problem.gram, inactive=0.0)
    product = float(state[DECAY_PRODUCT] * state[DECAY])
    correction = 1 / (1 - product) if options["bias_correction"] else 1.0
    norms = correction * tasks.norms
    largest = float(norms.max())
    weights = correction * largest / (norms + (1e-12 * largest if options["relative_eps"] else options["eps"]))
    step = float(state[STEP]) + 1
    state.copy_(torch.tensor([step, options["beta"] / (step + 1) ** options["sigma"], product], dtype=torch.float64))
    if not tasks.any:
        return torch.ones_like(norms), tasks.status
    return torch.where(tasks.active, weights, 0.0), tasks.status
