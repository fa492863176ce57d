"""DWA: weights from how fast losses fall."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from igb_kernels import ops
from igb_kernels.backends import Backend
from igb_kernels.backends.reference import LossProblem
from igb_kernels.card import Card
from igb_kernels.losses._means import MeanLosses
from igb_kernels.losses.base import LossBalancer
from igb_kernels.status import UNUSABLE, Status


class DWA(LossBalancer):
    """Gives more weight to the tasks whose losses fall the slowest (Liu et al., CVPR 2019, arXiv:1803.10704,
    equation 7).

    s = K softmax(r / temperature) with r_k the ratio of two mean losses: of the last epoch to the one before it, as
    `Balancer.end_epoch` tells them; or, with `window`, of the last `window` steps to the `window` steps before them,
    this step among the former. Until both are known, s = 1. Steps that cannot be used do not count, epochs without any
    other neither. A mean of 0 that came from 0 counts as unchanged (r = 1).

    Args:
        temperature: above 0; higher is more even. The paper's is 2.
        window: the number of steps in each mean; None: epochs.
        placeholder_ones: steps before the first count as losses of 1, as in IGB4MTL, so that the weights of the first
            2 · window steps follow from the losses' units.
    """

    name = "dwa"
    card = Card(
        title="DWA",
        paper="Liu et al., CVPR 2019, arXiv:1803.10704",
        formula="K softmax(mean losses / earlier ones / T)_k",
        inputs="losses",
        memory="nothing",
        passes="1",
        degree=1.0,
        hazards="needs end_epoch(), or window=; losses of different size stay so",
        parity="window=25, placeholder_ones=True: IGB4MTL, Nash-MTL",
    )

    def __init__(self, temperature: float = 2.0, window: int | None = None, *, placeholder_ones: bool = False) -> None:
        super().__init__()
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be a finite number above 0, found {temperature!r}")
        if window is not None and (not isinstance(window, int) or window < 1):
            raise ValueError(f"window must be None or an integer of at least 1, found {window!r}")
        if placeholder_ones and window is None:
            raise ValueError("placeholder_ones goes with window, which is None")
        self.temperature, self.window, self.placeholder_ones = float(temperature), window, placeholder_ones
        # NaN is what is not known yet; everything is updated in place, where the replays of a CUDA graph read it.
        self._epoch: MeanLosses | None = None
        self._means: Tensor | None = None  # [2, K]: of the epoch before the last, and of the last
        self._recent: Tensor | None = None  # [2 window, K]: the losses of the last steps, oldest first
        self._next_recent: Tensor | None = None

    def start(self, tasks: int, device: torch.device) -> None:
        if self.window is None:
            self._epoch = MeanLosses.of(tasks, device)
            self._means = torch.full((2, tasks), torch.nan, dtype=torch.float64, device=device)
        else:
            before = 1.0 if self.placeholder_ones else torch.nan
            self._recent = torch.full((2 * self.window, tasks), before, dtype=torch.float64, device=device)

    def options(self) -> dict[str, float]:
        return {"temperature": self.temperature}

    def per_task(self) -> Tensor | None:
        if self._next_recent is None or self.window is None:
            return None if self._means is None else self.of_step(self._means)
        return self._next_recent.view(2, self.window, -1).mean(dim=1)

    def scales(self, losses: Tensor, backend: Backend) -> tuple[Tensor, Tensor]:
        if self._recent is not None:
            self._next_recent = torch.cat([self.of_step(self._recent)[1:], losses.double()[None]])
        return super().scales(losses, backend)

    def commit(self, losses: Tensor, scales: Tensor, status: Tensor) -> None:
        if self._epoch is not None:
            self._epoch.add(losses, status, self.active)
        elif self._recent is not None and self._next_recent is not None:
            unusable = (status & UNUSABLE) != 0
            self.write_of_step(self._recent, torch.where(unusable, self.of_step(self._recent), self._next_recent))

    def end_epoch(self) -> None:
        if self._epoch is not None and self._means is not None:
            last = self._epoch.take()
            self._means.copy_(torch.where(last.isnan(), self._means, torch.stack([self._means[1], last])))

    def state_dict(self) -> dict[str, Any]:
        """See the base class."""
        return {
            "sums": None if self._epoch is None else self._epoch.sums,
            "means": self._means,
            "recent": self._recent,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See the base class."""
        means, recent = state["means"], state["recent"]
        length = None if recent is None else len(recent) // 2
        if (means is not None or recent is not None) and length != self.window:
            raise ValueError(f"window is {self.window}, but the state's is {length}")
        self._means, self._recent, self._next_recent = means, recent, None
        self._epoch = None if means is None else MeanLosses(state["sums"])

    def __repr__(self) -> str:
        ones = ", placeholder_ones=True" if self.placeholder_ones else ""
        return f"DWA(temperature={self.temperature}, window={self.window}{ones})"


@ops.register_rule("dwa", options={"temperature": 2.0}, per_task=lambda tasks: (2, tasks), needs_per_task=True)
def _reference(problem: LossProblem) -> tuple[Tensor, Status]:
    assert problem.per_task is not None  # checked by the op
    earlier, later = problem.per_task
    if problem.per_task.isnan().any():
        return torch.ones_like(problem.losses), Status(0)
    ratios = torch.where(earlier == 0, 1.0, later / earlier).nan_to_num(nan=1.0, posinf=1e300, neginf=-1e300)
    logits = (ratios / problem.options["temperature"]).clamp(-1e300, 1e300)
    return len(logits) * torch.softmax(logits, dim=0), Status(0)
