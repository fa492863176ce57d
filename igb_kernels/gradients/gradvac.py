"""GradVac: gradient vaccine."""

from __future__ import annotations

import torch
from torch import Tensor

from igb_kernels import ops
from igb_kernels.backends.reference import Problem
from igb_kernels.card import Card
from igb_kernels.gradients._reference import measure
from igb_kernels.gradients._visits import STATE_COUNT, VisitingGradientBalancer, orders_of
from igb_kernels.gradients.base import check_number
from igb_kernels.status import Status


class GradVac(VisitingGradientBalancer):
    """Lifts the cosines between gradients to what they were on average (Wang et al., ICLR 2021, equations 2 and 3).

    c_i starts as g_i and visits every j ≠ i in random order, as in PCGrad. Where their cosine ρ is below its goal
    φ_ij, c_i ← c_i + ‖c_i‖ (φ_ij √(1−ρ²) − ρ √(1−φ_ij²)) / (‖g_j‖ √(1−φ_ij²)) g_j, which lifts it to φ_ij; then
    φ_ij ← (1 − beta) φ_ij + beta ρ. The update is the sum of the c_i. Goals start at 0: the first step is PCGrad's.
    They are of the whole model: the originals' goals for each layer are not offered.

    Args:
        beta: how fast the goals follow, 0 to 1; with 0 it is PCGrad.
        seed: see `PCGrad`.
        eps: added to both divisors, ‖c_i‖ ‖g_j‖ of ρ and ‖g_j‖ √(1−φ_ij²).

    Raises:
        ValueError: where an argument is out of range.
    """

    name = "gradvac"
    card = Card(
        title="GradVac",
        paper="Wang et al., ICLR 2021, arXiv:2010.05874",
        formula="sum of gradients, each turned until its cosines with the others reach their moving averages",
        inputs="Gramian",
        memory="K gradients",
        passes="K",
        degree=1.0,
        hazards="random: give a seed; long steps where gradients that were parallel for long come apart",
        parity="eps=1e-8 is LibMTL's and torchjd's",
    )

    def __init__(self, beta: float = 0.5, seed: int | None = None, *, eps: float = 0.0) -> None:
        super().__init__(seed)
        self.beta, self.eps = check_number("beta", beta, 0, 1), check_number("eps", eps, 0)

    def options(self) -> dict[str, float]:
        return {"beta": self.beta, "eps": self.eps}


@ops.register_solver(
    "gradvac",
    options={"beta": 0.5, "eps": 0.0},
    needs_gram=True,
    per_task=lambda tasks: (tasks, tasks),
    initial_state=lambda tasks, options: [0.0] * (STATE_COUNT + tasks * tasks),
    state_head=STATE_COUNT,
    state_of_pairs=True,
)
def _reference(problem: Problem) -> tuple[Tensor, Status]:
    gram, beta, eps = (problem.gram + problem.gram.T) / 2, problem.options["beta"], problem.options["eps"]
    tasks, orders = measure(gram), orders_of(problem)
    if orders is None:
        return torch.full_like(tasks.norms, torch.nan), Status.NON_FINITE
    assert problem.state is not None  # checked by the op
    count, norms = len(gram), tasks.norms
    goals = problem.state[STATE_COUNT:].view(count, count)
    rows, altered = torch.arange(count), torch.eye(count, dtype=torch.float64)  # all gradients at once
    vanishes = 16 * count * torch.finfo(torch.float64).eps
    for visited in orders.T:
        lengths = ((altered @ gram) * altered).sum(dim=1).clamp_min(0).sqrt()
        meet = (lengths > vanishes * norms) & tasks.active[visited] & tasks.active
        cosines = (altered * gram[visited]).sum(dim=1) / (lengths * norms[visited] + eps)
        cosines = torch.where(meet, cosines.clamp(-1, 1), 0.0)
        goal = goals[rows, visited]
        sine, goal_sine = (1 - cosines**2).clamp_min(0).sqrt(), (1 - goal**2).clamp_min(0).sqrt()
        divisor = norms[visited] * goal_sine + eps
        lifted = meet & (cosines < goal) & (divisor > 0) & (visited != rows)
        multiples = lengths * (goal * sine - cosines * goal_sine) / divisor
        altered[rows, visited] += torch.where(lifted, multiples, 0.0)
        goals[rows, visited] = torch.where(visited == rows, goal, (1 - beta) * goal + beta * cosines)
    if not tasks.any:
        return torch.ones_like(norms), tasks.status
    return torch.where(tasks.active, altered[tasks.active].sum(dim=0), 0.0), tasks.status
