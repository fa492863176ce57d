"""MetaBalance: auxiliary gradients at the length of the target task's."""

from __future__ import annotations

import torch
from torch import Tensor

from igb_kernels import ops
from igb_kernels.backends.reference import Problem
from igb_kernels.card import Card
from igb_kernels.gradients._reference import measure
from igb_kernels.gradients.base import GradientBalancer, Needs, check_number
from igb_kernels.status import Status


class MetaBalance(GradientBalancer):
    """Brings the gradients of auxiliary tasks to the length of the target task's (He et al., WWW 2022,
    arXiv:2203.06801, algorithm 1, strategy C).

    w_k = r m_target / m_k + (1 − r), with m moving averages of the gradients' norms that start with the first ones; the
    target's own weight is 1. In a step without the target all weights are 1. The authors balance each parameter tensor
    by itself; here it is done for all shared parameters together.

    Args:
        r: from 0 (plain sum) to 1 (equal lengths).
        beta: decay of the averages of the norms, 0 to 1 (1 excluded).
        target: the index of the target task, by the order of `tasks` or of the first step's losses.
    """

    name = "metabalance"
    card = Card(
        title="MetaBalance",
        paper="He et al., WWW 2022, arXiv:2203.06801",
        formula="r m_target / m_k + (1 − r), m averages of |g|",
        inputs="norms",
        memory="K gradients",
        passes="K",
        degree=1.0,
        hazards="the order of the losses says which task is the target",
        parity="the authors balance each parameter tensor by itself",
    )

    def __init__(self, r: float = 0.7, beta: float = 0.9, target: int = 0) -> None:
        super().__init__()
        self.r, self.beta = check_number("r", r, 0, 1), check_number("beta", beta, 0, 1)
        if self.beta == 1:
            raise ValueError("beta must be below 1: with 1 the averages never see another norm")
        if not isinstance(target, int) or target < 0:
            raise ValueError(f"target must be the index of a task, found {target!r}")
        self.target = target

    def options(self) -> dict[str, float]:
        target = self.target
        if self.active is not None:
            target = self.active.ids.index(target) if target in self.active.ids else -1
        return {"r": self.r, "beta": self.beta, "target": float(target)}

    def needs(self) -> Needs:
        return Needs.NORMS

    def start(self, tasks: int, device: torch.device) -> None:
        if self.target >= tasks:
            raise ValueError(f"target must be the index of one of the {tasks} tasks, found {self.target}")
        super().start(tasks, device)

    def __repr__(self) -> str:
        return f"MetaBalance(r={self.r:g}, beta={self.beta:g}, target={self.target})"


@ops.register_solver(
    "metabalance",
    options={"r": 0.7, "beta": 0.9, "target": 0.0},
    initial_state=lambda tasks, options: [0.0] * tasks,
)
def _reference(problem: Problem) -> tuple[Tensor, Status]:
    options, average = problem.options, problem.state
    assert average is not None  # checked by the op
    tasks = measure(problem.gram, inactive=0.0)
    average.copy_(torch.where(average == 0, tasks.norms, average.lerp(tasks.norms, 1 - options["beta"])))
    if options["target"] < 0:
        return torch.ones_like(average), tasks.status
    ratio = (average[int(options["target"])] / average).nan_to_num(posinf=0.0)
    weights = options["r"] * ratio + 1 - options["r"]
    return torch.where(average == 0, 1.0, weights), tasks.status
