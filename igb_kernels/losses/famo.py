"""FAMO: every task's log loss falls at an equal rate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from igb_kernels import ops
from igb_kernels._log import warn_once
from igb_kernels.active import ActiveTasks
from igb_kernels.backends import Backend
from igb_kernels.backends.reference import LossProblem
from igb_kernels.card import Card
from igb_kernels.losses.base import LossBalancer
from igb_kernels.status import Status

EPS = 1e-8
"""Added to losses under the logarithm."""
FRESH, WAITING, TOLD = 0.0, 1.0, 2.0
HEAD = 2
"""The state: whether it waits for a step's fall, the number of Adam's steps; then, [K] each, the logits, Adam's two
moments, the log losses before the optimizer's step (NaN for a task that was missing) and after it."""


class FAMO(LossBalancer):
    """Learns weights under which every task's log loss falls at an equal rate, with losses alone (Liu et al., NeurIPS
    2023, arXiv:2306.03792, algorithm 1).

    s_k = (z_k / D_k) / Σ_j z_j / D_j with z = softmax(ξ) and D = L − lower + 1e-8. How far each log D_k fell teaches ξ,
    by Adam with weight decay `gamma`; so the losses are wanted once more after the optimizer's step, on the same batch
    and scaled alike::

        result = balancer.backward(model.losses(batch))
        optimizer.step()
        with torch.no_grad():
            balancer.after_step(model.losses(batch))

    ξ moves when the next step begins, or, where tasks are missing, as soon as the losses of the others are told. Steps
    that cannot be used, and losses that are not finite, teach it nothing. A loss that is not above `lower` − 1e-8 makes
    every scale NaN, and the status says NON_POSITIVE_LOSS.

    The authors clip the gradient of the shared parameters to norm 1: `torch.nn.utils.clip_grad_norm_` after `backward`.

    Args:
        gamma: weight decay of ξ. The authors' command line has 1e-2, their class for other projects 1e-5.
        lr: learning rate of ξ.
        lower: a number or K numbers: the losses' lowest reachable values, subtracted first. Also an attribute, to be
            set as training goes on.
    """

    name = "famo"
    card = Card(
        title="FAMO",
        paper="Liu et al., NeurIPS 2023, arXiv:2306.03792",
        formula="(z_k / L_k) / sum(z / L), z = softmax(learned)",
        inputs="losses, and again after the step",
        memory="nothing",
        passes="1, and a forward pass",
        invariance="direction",
        hazards="learns nothing without after_step()",
        parity="gamma=1e-3: torchjd, LibMTL",
    )

    def __init__(
        self, gamma: float = 1e-3, lr: float = 0.025, *, lower: float | Sequence[float] | Tensor = 0.0
    ) -> None:
        super().__init__()
        for name, value in (("gamma", gamma), ("lr", lr)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a finite number of at least 0, found {value!r}")
        self.gamma, self.lr = float(gamma), float(lr)
        self.lower = lower
        self._untold = False  # the last step's losses after the optimizer's step have not come

    @property
    def lower(self) -> Tensor:
        """What is subtracted from the losses, [] or [K], float64."""
        return self._lower

    @lower.setter
    def lower(self, value: float | Sequence[float] | Tensor) -> None:
        lower = torch.as_tensor(value, dtype=torch.float64).detach().clone()
        if lower.dim() > 1 or not bool(lower.isfinite().all()):
            raise ValueError(f"lower must be a finite number or one for each task, found {value!r}")
        if self.state is not None:
            self._check_lower(lower, self._rows(self.state).shape[1])
        self._lower, self._has_lower = lower, bool(lower.any())

    @staticmethod
    def _check_lower(lower: Tensor, tasks: int) -> None:
        if lower.dim() == 1 and len(lower) != tasks:
            raise ValueError(f"lower must be one number or {tasks}, one for each task; found {len(lower)}")

    @property
    def logits(self) -> Tensor | None:
        """ξ [K], float64, as the last step used it; None before the first."""
        return None if self.state is None else self._rows(self.state)[0].clone()

    @staticmethod
    def _rows(state: Tensor) -> Tensor:
        """[5, K]: the state's numbers for each task."""
        return state[HEAD:].view(5, -1)

    def options(self) -> dict[str, float]:
        return {"gamma": self.gamma, "learning_rate": self.lr}

    def start(self, tasks: int, device: torch.device) -> None:
        self._check_lower(self._lower, tasks)
        super().start(tasks, device)

    def _excess(self, losses: Tensor) -> Tensor:
        """L − lower."""
        if not self._has_lower:
            return losses
        if self._lower.device != losses.device:
            self._lower = self._lower.to(losses.device)
        return losses.double() - (self.of_step(self._lower) if self._lower.dim() == 1 else self._lower)

    def scales(self, losses: Tensor, backend: Backend) -> tuple[Tensor, Tensor]:
        excess = self._excess(losses)
        if self.active is None:
            scales, status = super().scales(excess, backend)
        else:
            scales, status = self._scales_of_some(excess, self.active, backend)
        return scales.to(losses.dtype), status

    def _scales_of_some(self, excess: Tensor, active: ActiveTasks, backend: Backend) -> tuple[Tensor, Tensor]:
        """With tasks missing; a fall of all tasks that has yet to be learned from is learned from before."""
        assert self.state is not None, "start() comes first"
        whole = self.state.clone()
        self._learn(whole, backend)
        before = self._rows(whole)[3]
        before.fill_(torch.nan)
        part = ops.RULES[self.name].part(whole, active)
        found = backend.loss_scales(self.name, excess, None, list(self.options().values()), part)
        self._next_state = ops.RULES[self.name].whole(whole, active, part)
        return found

    def _widened(self, state: Tensor, part: Tensor) -> Tensor:
        return part  # it is of all tasks already

    def _learn(self, state: Tensor, backend: Backend) -> None:
        """Learns from a fall that has been told, and waits for none after."""
        ones = torch.ones_like(self._rows(state)[0])
        backend.loss_scales(self.name, ones, None, list(self.options().values()), state)
        state[0].fill_(FRESH)

    def commit(self, losses: Tensor, scales: Tensor, status: Tensor) -> None:
        super().commit(losses, scales, status)
        if self._untold:
            warn_once("FAMO learns nothing from a step without Balancer.after_step(losses) after the optimizer's")
        self._untold = True

    def after_step(self, losses: Tensor, backend: Backend) -> None:
        self._untold = False
        assert self.state is not None, "a step comes first"
        values = self._excess(losses.double()) + EPS
        after, before = values.log(), self._rows(self.state)[3]
        # Only for a step of these tasks that could be used and whose losses have not come yet; decided where they are.
        known = (self.state[0] == WAITING) & (values > 0).all() & (self.of_step(before) - after).isfinite().all()
        if self.active is None:
            rows = self._rows(self.state)
            rows[4].copy_(torch.where(known, after, rows[4]))
            self.state[0].masked_fill_(known, TOLD)
        else:  # at once: the next step may have other tasks
            part = ops.RULES[self.name].part(self.state, self.active)
            self._rows(part)[4].copy_(after)
            part[0].fill_(TOLD)
            self._learn(part, backend)
            known = known & (before.isnan().sum() == self.active.tasks - len(losses))
            learned = ops.RULES[self.name].whole(self.state, self.active, part)
            self.state.copy_(torch.where(known, learned, self.state))

    def __repr__(self) -> str:
        lower = f", lower={self._lower.tolist()}" if self._has_lower else ""
        return f"FAMO(gamma={self.gamma}, lr={self.lr}{lower})"


@ops.register_rule(
    "famo",
    options={"gamma": 1e-3, "learning_rate": 0.025},
    initial_state=lambda tasks, options: [0.0] * (HEAD + 5 * tasks),
    state_head=HEAD,
)
def _reference(problem: LossProblem) -> tuple[Tensor, Status]:
    state, options = problem.state, problem.options
    assert state is not None  # checked by the op
    distance = problem.losses + EPS
    if (distance <= 0).any():
        return torch.full_like(distance, torch.nan), Status.NON_POSITIVE_LOSS
    logits, mean, square, before, after = state[HEAD:].view(5, -1)
    if state[0] == TOLD:
        weights, fall = torch.softmax(logits, dim=0), before - after
        parameter = torch.nn.Parameter(logits.clone())
        parameter.grad = (torch.diag(weights) - torch.outer(weights, weights)) @ fall
        adam = torch.optim.Adam([parameter], options["learning_rate"], weight_decay=options["gamma"])
        adam.state[parameter] = {"step": state[1], "exp_avg": mean, "exp_avg_sq": square}  # which it writes to
        adam.step()
        logits.copy_(parameter.detach())
    before.copy_(distance.log())
    state[0] = WAITING
    shares = torch.softmax(logits, dim=0) / distance
    return shares / shares.sum(), Status(0)
