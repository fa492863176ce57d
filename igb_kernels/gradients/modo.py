"""MoDo: weights by double sampling."""

from __future__ import annotations

from torch import Tensor

from igb_kernels import ops
from igb_kernels.backends.reference import Problem
from igb_kernels.card import Card
from igb_kernels.gradients._reference import project_on_simplex
from igb_kernels.gradients._shares import SharesOfOne
from igb_kernels.gradients.base import Needs, check_number
from igb_kernels.status import Status


class MoDo(SharesOfOne):
    """One projected step a batch towards min-norm weights, unbiased by double sampling (Chen et al., NeurIPS 2023,
    arXiv:2305.20057, algorithm 1).

    w ← P(w − gamma (A + rho I) w) with A = J₁J₂ᵀ of two further batches; the update is Σ_k w_k g_k of the batch itself.
    The batches are passed as to `SDMGrad`, which see.

    Args:
        gamma: step of the weights. A is not normalised: the gradients' scale belongs to it.
        rho: regularisation of the weights.
    """

    name = "modo"
    crosses = True
    card = Card(
        title="MoDo",
        paper="Chen et al., NeurIPS 2023, arXiv:2305.20057",
        formula="w ← P(w − gamma (J₁J₂ᵀ + rho I) w)",
        inputs="cross-Gramian of two batches, or the Gramian",
        memory="2K gradients (with independent batches), or K",
        passes="2K + 2 (three batches), 2K (two) or K",
        hazards="gamma has the unit of 1 / gradient²",
    )

    def __init__(self, gamma: float = 0.1, rho: float = 0.0) -> None:
        super().__init__()
        self.gamma, self.rho = check_number("gamma", gamma, 0), check_number("rho", rho, 0)

    def options(self) -> dict[str, float]:
        return {"gamma": self.gamma, "rho": self.rho}

    def needs(self) -> Needs:
        return Needs.GRAM


@ops.register_solver(
    "modo",
    options={"gamma": 0.1, "rho": 0.0},
    needs_gram=True,
    initial_state=lambda tasks, options: [1 / tasks] * tasks,
)
def _reference(problem: Problem) -> tuple[Tensor, Status]:
    options, w = problem.options, problem.state
    assert w is not None  # checked by the op
    slope = problem.gram @ w + options["rho"] * w
    w.copy_(project_on_simplex(w - options["gamma"] * slope))
    return w.clone(), Status(0)
