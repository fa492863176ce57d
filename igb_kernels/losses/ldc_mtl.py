"""LDC-MTL: a learned router under a penalty on loss discrepancy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from igb_kernels import ops
from igb_kernels.backends.reference import LossProblem
from igb_kernels.card import Card
from igb_kernels.losses.learned import LearnedLossBalancer, check_num_tasks, inward
from igb_kernels.losses.log import TINY
from igb_kernels.status import UNUSABLE, Status

FORMS = ("log", "raw", "ratio", "plain")
ROUTERS = ("sigmoid", "sigmoid_relu", "softmax")
PAIRS = ("adjacent", "all")


class LDCMTL(LearnedLossBalancer):
    """Learns weights σ under which the tasks' weighted losses are small, and close to each other (Xiao et al., 2025,
    arXiv:2502.08585): minimises Σ_k σ_k x_k / S + lamb Σ_(pairs j, k) |τ_j x_j − τ_k x_k|.

    The losses x have a common unit, or are meant to; L0 are each task's losses of its first step that could be used:

    ======== ================ ===================== ==== =====================
    form     x                S                     τ    as the authors have it
    ======== ================ ===================== ==== =====================
    "log"    log(L / L0)      Σ σ, held             σ    QM9, lamb 0.05
    "raw"    L                Σ σ, held             σ    CelebA, lamb 0.01
    "ratio"  L min(L0) / L0   Σ σ, differentiated   σ    NYUv2, lamb 0.05
    "plain"  L                1                     1    Cityscapes, lamb 0.1
    ======== ================ ===================== ==== =====================

    σ is a function of K learned numbers θ: sigmoid(θ), sigmoid(max(θ, 0)), or softmax(θ) clamped to [0.2, 0.8]. (For
    NYUv2 and Cityscapes the authors compute θ from pooled features by a linear layer, which is not offered here.) Give
    θ to an optimizer, as for `UW`. Scales can be negative, where the penalty outweighs σ / S: it then pays to raise a
    loss. In the form "log", a negative loss makes every scale NaN, and the status says NON_POSITIVE_LOSS.

    Args:
        num_tasks: K.
        form: "log", "raw", "ratio" or "plain".
        router: "sigmoid", "sigmoid_relu" or "softmax".
        pairs: "all": the mean of the penalty over all orders of the tasks, 2/K Σ_(j < k); or "adjacent": the tasks next
            to each other in the given order, as the authors have it.
        lamb: strength of the penalty, at least 0.
        initial: where every θ_k starts. The authors: 1, or for "log" uniform in [0.2, 1].
        device, dtype: of the parameter.
    """

    name = "ldc_mtl"
    parameter_name = "router_logits"
    learning_rate = 1e-3
    state_rows = 2
    card = Card(
        title="LDC-MTL",
        paper="Xiao et al. 2025, arXiv:2502.08585",
        formula="(s_k / sum(s) + lamb s_k sign terms) / L_k, s learned",
        inputs="losses",
        memory="nothing",
        passes="1",
        hazards="scales may be negative; L0 comes from a single step",
        parity="pairs=\"adjacent\": the authors' trainers, up to their features and to QM9's new L0 every epoch",
    )

    def __init__(
        self,
        num_tasks: int,
        form: str = "log",
        *,
        router: str = "sigmoid",
        pairs: str = "all",
        lamb: float = 0.05,
        initial: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, value, known in (("form", form, FORMS), ("router", router, ROUTERS), ("pairs", pairs, PAIRS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, found {value!r}")
        if not 0 <= lamb < float("inf"):
            raise ValueError(f"lamb must be a finite number of at least 0, found {lamb!r}")
        if not -20 <= initial <= 20:
            raise ValueError(f"initial must be a number from -20 to 20, found {initial!r}")
        super().__init__(torch.full((check_num_tasks(num_tasks),), float(initial), device=device, dtype=dtype))
        self.form, self.router, self.pairs, self.lamb = form, router, pairs, float(lamb)
        self._initial_losses: Tensor | None = None  # L0; NaN until it is known

    @property
    def router_logits(self) -> torch.nn.Parameter:
        """The parameter θ [K]."""
        return self.parameter

    @property
    def initial_losses(self) -> Tensor | None:
        """L0 [K], float64; NaN until a step could be used, None before the first."""
        return self._initial_losses

    def start(self, tasks: int, device: torch.device) -> None:
        super().start(tasks, device)
        self._initial_losses = torch.full((tasks,), torch.nan, dtype=torch.float64, device=device)

    def options(self) -> dict[str, float]:
        choices = ("form", self.form, FORMS), ("router", self.router, ROUTERS), ("all_pairs", self.pairs, PAIRS)
        return {**{name: float(known.index(value)) for name, value, known in choices}, "lamb": self.lamb}

    def per_task(self) -> Tensor | None:
        assert self._initial_losses is not None, "start() comes first"
        return self.of_step(torch.stack([self.parameter.detach().double(), self._initial_losses]))

    def commit(self, losses: Tensor, scales: Tensor, status: Tensor) -> None:
        super().commit(losses, scales, status)
        assert self._initial_losses is not None
        known = self.of_step(self._initial_losses)
        keep = ((status & UNUSABLE) != 0) | ~known.isnan()
        self.write_of_step(self._initial_losses, torch.where(keep, known, losses.double()))

    def state_dict(self) -> dict[str, Any]:
        """See the base class."""
        return {**super().state_dict(), "initial_losses": self._initial_losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See the base class."""
        super().load_state_dict(state)
        self._initial_losses = state["initial_losses"]

    def __repr__(self) -> str:
        return (
            f"LDCMTL(num_tasks={len(self.parameter)}, form={self.form!r}, router={self.router!r}, "
            f"pairs={self.pairs!r}, lamb={self.lamb})"
        )


@ops.register_rule(
    "ldc_mtl",
    options={"form": 0.0, "router": 0.0, "all_pairs": 1.0, "lamb": 0.05},
    per_task=lambda tasks: (2, tasks),
    needs_per_task=True,
    initial_state=lambda tasks, options: [0.0] * (2 * tasks),
)
def _reference(problem: LossProblem) -> tuple[Tensor, Status]:
    losses, tasks, state = problem.losses, len(problem.losses), problem.state
    assert problem.per_task is not None  # checked by the op
    assert state is not None
    theta, initial = problem.per_task
    form, router = FORMS[int(problem.options["form"])], ROUTERS[int(problem.options["router"])]
    if not theta.isfinite().all():
        return torch.full_like(losses, torch.nan), Status.NON_FINITE
    if form == "log" and (losses < 0).any():
        return torch.full_like(losses, torch.nan), Status.NON_POSITIVE_LOSS

    sigma, jacobian = _route(theta, router)
    initial = torch.where(initial.isnan(), losses, initial).clamp_min(TINY)
    slope = torch.ones_like(losses)
    x = losses
    if form == "log":
        x = (losses.clamp_min(TINY) / initial).clamp(1e-300, 1e300).log()
        slope = 1 / losses.clamp_min(TINY)
    elif form == "ratio":
        slope = initial.min() / initial
        x = losses * slope

    unweighted = form == "plain"
    tau = torch.ones_like(sigma) if unweighted else sigma
    signs = torch.sign((tau * x)[:, None] - tau * x)  # of every pair
    everyone = torch.ones_like(signs)
    neighbours = everyone.tril(1).triu(-1)
    pairs = 2 / tasks * everyone if problem.options["all_pairs"] else neighbours
    pull = problem.options["lamb"] * (signs * pairs).sum(dim=1)

    total = 1.0 if unweighted else sigma.sum()
    of_sigma = x / total + (0 if unweighted else pull * x)
    if form == "ratio":
        of_sigma = of_sigma - (sigma @ x) / total**2
    of_theta = jacobian.T @ of_sigma
    state[:tasks] = of_theta if router == "softmax" else inward(theta, of_theta)
    return (sigma / total + pull * tau) * slope, Status(0)


def _route(theta: Tensor, router: str) -> tuple[Tensor, Tensor]:
    """σ [K] and its Jacobian [K, K] with respect to θ."""
    if router == "softmax":
        shares = torch.softmax(theta, dim=0)
        inside = ((shares >= 0.2) & (shares <= 0.8)).double()
        return shares.clamp(0.2, 0.8), inside[:, None] * (torch.diag(shares) - torch.outer(shares, shares))
    cut = theta <= 0 if router == "sigmoid_relu" else torch.zeros_like(theta, dtype=torch.bool)
    sigma = torch.sigmoid(theta.clamp(-20, 20).masked_fill(cut, 0))
    return sigma, torch.diag((sigma * torch.sigmoid(-theta.clamp(-20, 20))).masked_fill(cut, 0))
