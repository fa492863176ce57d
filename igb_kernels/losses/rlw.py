"""RLW: random weights."""

from __future__ import annotations

import torch
from torch import Tensor

from igb_kernels import ops
from igb_kernels._seed import check_seed, drawn_seed
from igb_kernels.backends._random import normals
from igb_kernels.backends.reference import LossProblem
from igb_kernels.card import Card
from igb_kernels.losses.base import LossBalancer
from igb_kernels.status import Status

TOTALS = ("one", "tasks")


class RLW(LossBalancer):
    """Weights losses at random: s = softmax of K standard normals, drawn anew each step (Lin et al., TMLR 2022,
    arXiv:2111.10603, section 3.2).

    The numbers are a function of the seed and of the number of steps that could be used, computed where the losses are:
    nothing is drawn on the host, and the replays of a CUDA graph draw anew.

    Args:
        seed: an integer of at least 0, below 2^53; by default drawn from torch's CPU generator at the first step, so
            that `torch.manual_seed` decides. `state_dict` holds it.
        total: the scales' sum: "one", or "tasks" (K), as IGB4MTL has it.
    """

    name = "rlw"
    card = Card(
        title="RLW",
        paper="Lin et al., TMLR 2022, arXiv:2111.10603",
        formula="softmax(normals)_k",
        inputs="nothing",
        memory="nothing",
        passes="1",
        degree=1.0,
        parity='total="tasks": IGB4MTL',
    )

    def __init__(self, seed: int | None = None, *, total: str = "one") -> None:
        super().__init__()
        if total not in TOTALS:
            raise ValueError(f"total must be one of {TOTALS}, found {total!r}")
        self.seed, self.total = check_seed(seed), total

    def options(self) -> dict[str, float]:
        return {"times_tasks": float(TOTALS.index(self.total))}

    def start(self, tasks: int, device: torch.device) -> None:
        if self.state is None:
            self.state = torch.tensor([drawn_seed(self.seed), 0.0], dtype=torch.float64, device=device)

    def __repr__(self) -> str:
        return f"RLW(seed={self.seed}, total={self.total!r})"


@ops.register_rule("rlw", options={"times_tasks": 0.0}, initial_state=lambda tasks, options: [0.0, 0.0], state_head=2)
def _reference(problem: LossProblem) -> tuple[Tensor, Status]:
    tasks, state = len(problem.losses), problem.state
    assert state is not None  # checked by the op
    weights = weights_of(normals(int(state[0]), int(state[1]), tasks))
    state[1] += 1
    return weights * (tasks if problem.options["times_tasks"] else 1), Status(0)


def weights_of(drawn: Tensor) -> Tensor:
    """The weights [K], of sum 1, from what was drawn [K]."""
    return torch.softmax(drawn, dim=0)
