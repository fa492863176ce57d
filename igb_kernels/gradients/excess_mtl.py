"""ExcessMTL: multiplicative weights on excess risks."""

from __future__ import annotations

import torch
from torch import Tensor

from igb_kernels import ops
from igb_kernels.active import ActiveTasks
from igb_kernels.backends.reference import Problem
from igb_kernels.card import Card
from igb_kernels.gradients._reference import measure
from igb_kernels.gradients.base import GradientBalancer, Needs, check_number
from igb_kernels.status import Status


class ExcessMTL(GradientBalancer):
    """Weights that grow with each task's excess risk (He et al., ICML 2024).

    With H_k the elementwise sum of squared gradients so far, e_k = Σ g_k² / √(H_k + 1e-7) estimates the excess risk;
    w_k ← w_k exp(eta e_k / e_k(0)), rescaled to sum to K. e_k(0) is the task's first one that is not 0, in general the
    first step's; it leaves the weight as it is. Label noise inflates a loss, but not its excess risk.

    The step holds K gradients and two sets of K accumulated squares (float32, or float64 for float64 gradients).

    Args:
        eta: step size of the weights.
        parity: "torchjd": the weights sum to 1, and the first step already moves them, by e_k itself.
    """

    name = "excess_mtl"
    card = Card(
        title="ExcessMTL",
        paper="He et al., ICML 2024",
        formula="w_k ← w_k exp(eta e_k / e_k(0)), e_k = Σ g_k² / √H_k",
        inputs="every element",
        memory="K gradients, 2K accumulated squares",
        passes="K",
        hazards="weights only ever spread; H makes e_k fade like 1/√t",
        parity='the default is LibMTL\'s; parity="torchjd": its first step and its sum of 1',
    )

    def __init__(self, eta: float = 0.01, *, parity: str | None = None) -> None:
        super().__init__()
        self.eta = check_number("eta", eta, 0)
        if parity not in (None, "torchjd"):
            raise ValueError(f'parity must be None or "torchjd", found {parity!r}')
        self.parity = parity

    def options(self) -> dict[str, float]:
        return {"eta": self.eta, "as_torchjd": float(self.parity == "torchjd")}

    def needs(self) -> Needs:
        return Needs.EXCESS

    def _widened(self, state: Tensor, part: Tensor, active: ActiveTasks) -> Tensor:
        # Only what the step's tasks have together is shared out among them anew.
        before = active.part(state.view(2, -1)[1])
        part = part.view(2, -1).clone()
        part[1] += before.logsumexp(0) - part[1].logsumexp(0)
        return super()._widened(state, part.flatten(), active)


@ops.register_solver(
    "excess_mtl",
    options={"eta": 0.01, "as_torchjd": 0.0},
    initial_state=lambda tasks, options: [0.0] * (2 * tasks),
)
def _reference(problem: Problem) -> tuple[Tensor, Status]:
    excess, options, state = problem.gram, problem.options, problem.state
    assert state is not None  # checked by the op
    excess = excess.diagonal() if excess.dim() == 2 else excess
    baseline, log_weights = state.clone().chunk(2)
    relative = excess / (baseline + (1e-7 if options["as_torchjd"] else 0.0))
    relative = torch.where(baseline == 0, excess if options["as_torchjd"] else 0.0, relative)
    log_weights = log_weights + options["eta"] * relative
    state.copy_(torch.cat([torch.where(baseline == 0, excess, baseline), log_weights - log_weights.max()]))
    weights = log_weights.softmax(0) * (1 if options["as_torchjd"] else len(excess))
    return weights, measure(problem.gram, inactive=0.0).status
