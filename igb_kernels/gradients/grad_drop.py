"""GradDrop: sign dropout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from igb_kernels import ops
from igb_kernels._seed import check_seed, drawn_seed
from igb_kernels.backends.reference import Problem
from igb_kernels.card import Card
from igb_kernels.gradients._reference import measure
from igb_kernels.gradients.base import GradientBalancer, Needs
from igb_kernels.status import Status


class GradDrop(GradientBalancer):
    """Keeps of every element only the gradients of one sign, drawn by how far they agree (Chen et al., NeurIPS 2020).

    With P = (1 + Σ_k g_k / Σ_k |g_k|) / 2 and U uniform, an element's positive gradients are kept where P > U, its
    negative ones where P < U (algorithm 1, on the gradients of the shared parameters). `BalanceResult.weights` are 1:
    what is kept is kept whole.

    The random numbers are a function of the seed, the step, the parameter's place and the element's index; they do not
    depend on threads or devices.

    Args:
        leak: K numbers from 0 to 1: the fraction of task k's gradient that always passes (default 0).
        seed: 0 to 2^53 − 1; by default drawn from torch's global generator at the first step.
    """

    name = "grad_drop"
    card = Card(
        title="GradDrop",
        paper="Chen et al., NeurIPS 2020",
        formula="elementwise: the gradients of one sign, drawn with P = (1 + Σ g / Σ |g|) / 2",
        inputs="every element",
        memory="K gradients",
        passes="K",
        degree=1.0,
        hazards="random; not a weighted sum: weights are reported as 1",
        parity="LibMTL drops on representation gradients instead",
    )

    def __init__(self, leak: Sequence[float] | Tensor | None = None, seed: int | None = None) -> None:
        super().__init__()
        self._leak = None if leak is None else torch.as_tensor(leak, dtype=torch.float64).detach().clone()
        if self._leak is not None and (
            self._leak.dim() != 1 or not bool(((self._leak >= 0) & (self._leak <= 1)).all())
        ):
            raise ValueError(f"leak must be K numbers from 0 to 1, found {self._leak.tolist()}")
        self.seed = check_seed(seed)

    def needs(self) -> Needs:
        return Needs.ELEMENTS

    def start(self, tasks: int, device: torch.device) -> None:
        if self._leak is not None:
            if len(self._leak) != tasks:
                raise ValueError(f"leak must have one number for each of the {tasks} tasks, found {len(self._leak)}")
            self._leak = self._leak.to(device)
        if self.state is None:
            self.state = torch.tensor([drawn_seed(self.seed), 0], dtype=torch.float64, device=device)

    def leak(self) -> Tensor | None:
        return None if self._leak is None else self.of_step(self._leak)

    def counter(self) -> Tensor:
        """Seed and step of the random numbers, float64 [2]."""
        assert self.state is not None, "start() comes first"
        return self.state

    def __repr__(self) -> str:
        return f"GradDrop(leak={None if self._leak is None else self._leak.tolist()}, seed={self.seed})"


@ops.register_solver("grad_drop", initial_state=lambda tasks, options: [0.0, 0.0], state_head=2)
def _reference(problem: Problem) -> tuple[Tensor, Status]:
    assert problem.state is not None  # checked by the op
    problem.state[1] += 1
    return torch.ones(len(problem.gram), dtype=torch.float64), measure(problem.gram, inactive=0.0).status
