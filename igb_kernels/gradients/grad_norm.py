"""GradNorm: learned weights that even out the tasks' rates of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from igb_kernels import ops
from igb_kernels.backends import Backend
from igb_kernels.backends.reference import Problem
from igb_kernels.card import Card
from igb_kernels.gradients._reference import measure
from igb_kernels.gradients.base import GradientBalancer, Needs, check_number
from igb_kernels.losses.learned import check_num_tasks
from igb_kernels.status import UNUSABLE, Status

KNOWN, STEPS, SUMS, GRADIENT = range(4)
"""Rows of the state, of K numbers each: L(0) is sums / steps; the gradient is the parameter's."""
FORMS = ("softmax", "direct")
INITIAL_LOSSES = ("first", "epoch")


class GradNorm(GradientBalancer):
    """Learns weights under which the norms of the weighted gradients follow the tasks' rates of training (Chen et al.,
    ICML 2018, equations 1 and 2).

    Minimises Σ_k |w_k ‖g_k‖ − T_k| over w with T_k = mean_j(w_j ‖g_j‖) · r_k^alpha held fixed, where r_k is
    L_k / L_k(0) over its mean: tasks that lag get more. Each step adds the gradient to that of the parameter (NaN where
    it had no weights); give it to an optimizer::

        balancer = igb_kernels.Balancer(GradNorm(num_tasks=3), shared=encoder.parameters())
        optimizer = torch.optim.Adam([{"params": model.parameters()}, *balancer.param_groups()])

    The rates are those of the raw losses, whatever loss balancing is in front. A task with L(0) ≤ 0, or whose L(0) is
    not known yet, has r = 1. In a step where tasks are missing, the sum of the others' weights is their number.

    Args:
        num_tasks: K.
        alpha: how strongly weights follow the rates; 0: equal norms.
        initial_losses: what L(0) is. "first": each task's loss in its first step that could be used. "epoch": its mean
            over the first epoch that has the task, told by `Balancer.end_epoch`; until then (while L(0) is known of no
            task of the step) weights are 1 and the parameter's gradient is 0. Or K finite numbers.
        form: what the parameter is. "softmax": logits, w = K · softmax(logits). "direct": w itself, as in the paper;
            each step cuts what is negative and makes the sum K again.
        device, dtype: of the parameter.

    Raises:
        ValueError: where an argument is out of range; in the first step where `num_tasks` is not the number of losses,
            or the parameter is not on the gradients' device.
    """

    name = "grad_norm"
    learning_rate = 0.025
    card = Card(
        title="GradNorm",
        paper="Chen et al., ICML 2018, arXiv:1711.02257",
        formula="w learned: |w_k |g_k| − mean_j(w_j |g_j|) r_k^alpha| → 0, r = L/L(0) over its mean; sum K",
        inputs="norms, losses",
        memory="K gradients",
        passes="K",
        degree=1.0,
        hazards="the parameter's gradient grows with the tasks' gradients: use Adam; needs a typical L(0)",
        parity='initial_losses="epoch" is LibMTL\'s; form="direct" is the paper\'s',
    )

    def __init__(
        self,
        num_tasks: int,
        alpha: float = 1.5,
        *,
        initial_losses: str | Sequence[float] | Tensor = "first",
        form: str = "softmax",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_num_tasks(num_tasks)
        self.alpha = check_number("alpha", alpha, 0)
        if form not in FORMS:
            raise ValueError(f"form must be one of {FORMS}, found {form!r}")
        self.form = form
        self._given: Tensor | None = None
        self._waits = isinstance(initial_losses, str) and initial_losses == "epoch"
        if not isinstance(initial_losses, str):
            self._given = torch.as_tensor(initial_losses, dtype=torch.float64).detach().clone()
            if self._given.shape != (num_tasks,) or not bool(self._given.isfinite().all()):
                raise ValueError(f"initial_losses must be {num_tasks} finite numbers, found {self._given.tolist()}")
        elif initial_losses not in INITIAL_LOSSES:
            raise ValueError(f"initial_losses must be numbers or one of {INITIAL_LOSSES}, found {initial_losses!r}")
        initial = torch.zeros if form == "softmax" else torch.ones
        self.parameter = torch.nn.Parameter(initial(num_tasks, device=device, dtype=dtype))

    @property
    def initial_losses(self) -> Tensor | None:
        """L(0) [K], float64; NaN until it is known, None before the first step."""
        if self.state is None:
            return None
        known, steps, sums, _ = self.state.view(4, -1)
        initial: Tensor = (sums / steps).masked_fill(known == 0, torch.nan)
        return initial

    def options(self) -> dict[str, float]:
        return {"alpha": self.alpha, "direct": float(self.form == "direct"), "wait": float(self._waits)}

    def needs(self) -> Needs:
        return Needs.NORMS

    def per_task(self) -> Tensor | None:
        parameter = self.of_step(self.parameter.detach())
        if self.form == "softmax":
            return parameter
        weights = parameter.clamp_min(0)  # carries NaN
        total = weights.sum()
        return torch.where(total == 0, 1.0, len(weights) * weights / total)

    def start(self, tasks: int, device: torch.device) -> None:
        if len(self.parameter) != tasks:
            raise ValueError(f"num_tasks must be the number of losses, {tasks}; found {len(self.parameter)}")
        if self.parameter.device != device:
            raise ValueError(
                f"GradNorm's parameter must be on the gradients' device, {device}; it is on {self.parameter.device}"
            )
        starts = self.state is None
        super().start(tasks, device)
        if not starts or self.state is None:
            return
        # Between steps the gradient is NaN, and stays it in a step without weights, as those of the model do.
        rows = self.state.view(4, -1)
        rows[GRADIENT].fill_(torch.nan)
        if self._given is not None:
            rows[:SUMS].fill_(1.0)
            rows[SUMS].copy_(self._given)

    def solve(self, measured: Tensor, losses: Tensor, scales: Tensor, backend: Backend) -> tuple[Tensor, Tensor]:
        return self._solve(measured, losses, backend)

    def commit(self, status: Tensor) -> None:
        assert self._next_state is not None, "solve() comes first"
        gradient = self._next_state.view(4, -1)[GRADIENT]
        addend = gradient.to(self.parameter.dtype, copy=True)
        gradient.fill_(torch.nan)
        super().commit(status)
        if self.form == "direct":  # the gradient is that of the weights in use
            self._normalise(status)
        if self.active is not None:
            addend = self.active.spread(addend)
        self.parameter.grad = addend if self.parameter.grad is None else self.parameter.grad.add_(addend)

    def _normalise(self, status: Tensor) -> None:
        """Makes the parameter the weights in use; where tasks are missing, the others keep their sum."""
        weights = self.per_task()
        assert weights is not None
        with torch.no_grad():
            if self.active is not None:
                total = self.of_step(self.parameter).clamp_min(0).sum()
                weights = self.active.put_(self.parameter.clone(), weights * (total / len(weights)))
            self.parameter.copy_(torch.where((status & UNUSABLE) != 0, self.parameter, weights))

    def end_epoch(self) -> None:
        if self._waits and self.state is not None:
            known, steps, _, _ = self.state.view(4, -1)
            known.copy_(steps > 0)  # an epoch without a usable step does not count

    def parameters(self) -> list[torch.nn.Parameter]:
        return [self.parameter]

    def state_dict(self) -> dict[str, Any]:
        """See the base class."""
        return {**super().state_dict(), "parameter": self.parameter.detach()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See the base class."""
        given = state["parameter"]
        if given.shape != self.parameter.shape:
            raise ValueError(f"num_tasks is {len(self.parameter)}, but the state has {len(given)} tasks")
        super().load_state_dict(state)
        with torch.no_grad():
            self.parameter.copy_(given)

    def __repr__(self) -> str:
        options = f"num_tasks={len(self.parameter)}, alpha={self.alpha:g}, form={self.form!r}"
        given = "epoch" if self._waits else "first" if self._given is None else self._given.tolist()
        return f"GradNorm({options}, initial_losses={given!r})"


@ops.register_solver(
    "grad_norm",
    options={"alpha": 1.5, "direct": 0.0, "wait": 0.0},
    needs_losses=True,
    per_task=lambda tasks: (tasks,),
    needs_per_task=True,
    initial_state=lambda tasks, options: [0.0] * (4 * tasks),
)
def _reference(problem: Problem) -> tuple[Tensor, Status]:
    losses, parameter, state, options = problem.losses, problem.per_task, problem.state, problem.options
    assert losses is not None  # checked by the op
    assert parameter is not None
    assert state is not None
    if not bool(parameter.isfinite().all()):
        return torch.full_like(parameter, torch.nan), Status.NON_FINITE
    tasks, count = measure(problem.gram), len(losses)
    known, steps, sums, gradient = state.view(4, count)
    unknown = known == 0
    sums += torch.where(unknown, losses, 0.0)
    steps += unknown
    if not options["wait"]:
        known.fill_(1.0)
    gradient.zero_()
    if not tasks.any or not known.any():
        return torch.ones_like(losses) if not tasks.any else tasks.active.double(), tasks.status

    initial = sums / steps
    ratios = (losses.clamp_min(0) / initial).clamp_max(1e300)
    has_rate = tasks.active & (known != 0) & (initial > 0)
    total = ratios[has_rate].sum()
    rates = torch.where(has_rate & (total > 0), ratios / total * has_rate.sum(), 1.0)

    # The subgradient of the objective, by autograd: abs has 0 at 0.
    learned = parameter.clone().requires_grad_()
    with torch.enable_grad():
        weights = learned if options["direct"] else count * learned.softmax(dim=0)
        norms = (weights * tasks.norms)[tasks.active]
        targets = (norms.mean() * rates[tasks.active] ** options["alpha"]).detach()
        distances = norms - targets
        rounding = 4 * (count + 2) * torch.finfo(torch.float64).eps * torch.maximum(norms.abs(), targets.abs())
        objective = distances[distances.detach().abs() > rounding.detach()].abs().sum()
    gradient.copy_(torch.autograd.grad(objective, learned)[0])
    return torch.where(tasks.active, weights.detach(), 0.0), tasks.status
