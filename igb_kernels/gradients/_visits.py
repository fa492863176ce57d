"""What PCGrad and GradVac share: seeds, and the random orders in which gradients visit each other."""

from __future__ import annotations

import torch
from torch import Tensor

from igb_kernels._seed import check_seed, drawn_seed
from igb_kernels.backends._random import philox_words
from igb_kernels.backends.reference import Problem
from igb_kernels.gradients.base import GradientBalancer

SEED, STEP, STATE_COUNT = range(3)
"""Layout of the state's beginning."""


class VisitingGradientBalancer(GradientBalancer):
    """A method that draws, in each step and for each gradient, an order of the other tasks."""

    def __init__(self, seed: int | None) -> None:
        super().__init__()
        self.seed = check_seed(seed)

    def start(self, tasks: int, device: torch.device) -> None:
        starts = self.state is None
        super().start(tasks, device)
        if starts and self.state is not None:
            self.state[SEED].fill_(drawn_seed(self.seed))

    def __repr__(self) -> str:
        options = "".join(f", {name}={value:g}" for name, value in self.options().items())
        return f"{type(self).__name__}(seed={self.seed}{options})"


def random_orders(tasks: int, seed: int, step: int) -> Tensor:
    """Row i: the order in which gradient i visits the tasks; a uniform permutation by Fisher and Yates' shuffle."""
    rows = torch.arange(tasks)
    streams = (rows[:, None] << 32) + torch.arange(tasks // 4 + 1)
    words = philox_words(seed, step, streams).flatten(1)
    orders = rows.repeat(tasks, 1)
    for t in range(tasks - 1):
        other = t + (words[:, t] * (tasks - t) >> 32)
        orders[rows, t], orders[rows, other] = orders[rows, other], orders[rows, t]
    return orders


def orders_of(problem: Problem) -> Tensor | None:
    """The step's orders, given as times of the visits or drawn; None where times are not finite. Advances the step."""
    state, times = problem.state, problem.per_task
    assert state is not None  # checked by the op
    if times is not None and not bool(times.isfinite().all()):
        return None
    seed, step = (int(value) for value in state[:STATE_COUNT])
    state[STEP] += 1
    return random_orders(len(problem.gram), seed, step) if times is None else times.argsort(dim=1, stable=True)
