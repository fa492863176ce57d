"""Nash-MTL: the bargaining solution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from igb_kernels import ops
from igb_kernels.backends import Backend
from igb_kernels.backends.reference import Problem
from igb_kernels.card import Card
from igb_kernels.gradients._reference import measure, unit_diagonal
from igb_kernels.gradients.base import GradientBalancer, Needs, check_number
from igb_kernels.status import Status, UsableSteps


class NashMTL(GradientBalancer):
    """The α > 0 with G α = 1 / α (Navon et al., ICML 2022, equation 3), the minimiser of ½ αᵀGα − Σ log α.

    It is unique and found exactly by Newton's method, also where the originals' convex-concave procedure with ECOS
    fails. The update has norm √K before clipping and does not change when a loss is multiplied by a constant; any
    positive loss scale in front is therefore without effect on the shared parameters.

    Args:
        max_norm: the update's norm is clipped to this; 0: no clipping. Below √K it always clips.
        update_every: α is computed at every n-th step and kept in between. With `heads="weighted"` the steps in
            between take one backward pass for all tasks. The host counts the steps, those that could be used, and so
            waits for the end of the last one before it starts the next; with 1 it waits for nothing. A step of other
            tasks than α is of computes it anew.
    """

    name = "nash_mtl"
    card = Card(
        title="Nash-MTL",
        paper="Navon et al., ICML 2022, arXiv:2202.01017",
        formula="G w = 1 / w",
        inputs="Gramian",
        memory="K gradients",
        passes="K; between update_every steps 1",
        invariance="update",
        degree=0.0,
        hazards="max_norm=1 clips every update of two or more tasks to length 1; a loss scale in front changes nothing",
    )

    def __init__(self, max_norm: float = 1.0, update_every: int = 1) -> None:
        super().__init__()
        self.max_norm = check_number("max_norm", max_norm, 0)
        if not isinstance(update_every, int) or update_every < 1:
            raise ValueError(f"update_every must be an integer of at least 1, found {update_every!r}")
        self.update_every = update_every
        self._steps = UsableSteps()
        self._solved_for: tuple[int, ...] | None = None  # the tasks that the weights are of, None: all
        self._solved: tuple[int, tuple[int, ...] | None] | None = None  # by the last step: usable ones before it, tasks

    @property
    def _holds(self) -> bool:
        if self.update_every == 1:
            return False
        return self._count() % self.update_every != 0 and self._solved_for == self._ids

    def _count(self) -> int:
        """Usable steps; waits for the end of the last one, which decides whose the weights are."""
        steps = self._steps.count
        if self._solved is not None and steps > self._solved[0]:
            self._solved_for = self._solved[1]
        self._solved = None
        return steps

    @property
    def _ids(self) -> tuple[int, ...] | None:
        return None if self.active is None else self.active.ids

    def options(self) -> dict[str, float]:
        return {"max_norm": self.max_norm, "hold": float(self._holds)}

    def needs(self) -> Needs:
        return Needs.HELD if self._holds else Needs.GRAM

    def held_weights(self) -> Tensor:
        assert self.state is not None, "start() comes first"
        return self.of_step(self.state)

    def solve_held(self, sq_norm: Tensor, backend: Backend) -> tuple[Tensor, Tensor]:
        self._next_state = self.state
        # To clip one gradient is to bargain with a single task whose weight is held at 1.
        one = torch.ones_like(sq_norm)
        return backend.solve(self.name, sq_norm.reshape(1, 1), None, None, [self.max_norm, 1.0], one)

    def commit(self, status: Tensor) -> None:
        super().commit(status)
        if self.update_every > 1:
            if not self._holds:
                self._solved = self._count(), self._ids
            self._steps.add(status)

    def host_decision(self) -> str | None:
        return f"NashMTL(update_every={self.update_every}) counts steps" if self.update_every > 1 else None

    def state_dict(self) -> dict[str, Any]:
        """See the base class."""
        return {
            **super().state_dict(),
            "steps": self._count(),
            "solved_for": self._solved_for,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See the base class."""
        super().load_state_dict(state)
        self._steps = UsableSteps(state["steps"])
        solved_for = state["solved_for"]
        self._solved_for, self._solved = None if solved_for is None else tuple(solved_for), None

    def __repr__(self) -> str:
        return f"NashMTL(max_norm={self.max_norm:g}, update_every={self.update_every})"


def _newton(cosines: Tensor, ridge: float = 0.0) -> tuple[Tensor, float]:
    """min ½ xᵀ(C + ridge) x − Σ log x by damped Newton, in steps relative to x.

    Returns x and the residual max |x (Cx) − 1|, which is infinite where x grows without bound.
    """

    def objective(x: Tensor) -> float:
        return float(x @ cosines @ x / 2 - x.log().sum())

    k, eye = len(cosines), torch.eye(len(cosines), dtype=torch.float64)
    x = torch.ones(k, dtype=torch.float64) * (k / max(float(cosines.sum()), 0.1)) ** 0.5
    longest = 100 * k / ridge if ridge else k / (2 * RIDGE)
    cosines = cosines + ridge * eye
    best, residual, stalled = x, float("inf"), 0
    for _ in range(100):
        misfit = 1 - x * (cosines @ x)
        now = float(misfit.abs().max())
        if now < residual:
            best, residual, stalled = x, now, 0
        elif residual < 1e-6:
            stalled += 1  # at the rounding floor, where a few more steps may still be lucky
        if stalled > 5:
            break
        y = torch.linalg.solve(eye + x[:, None] * cosines * x[None, :], misfit)
        length = min(1.0, 0.95 / max(float(-y.min()), 1e-300))
        slope = -float(misfit @ y)
        while now > 0.1 and length > 1e-12 and objective(x * (1 + length * y)) > objective(x) + 1e-4 * length * slope:
            length /= 2
        x = x * (1 + length * y)
        if float(x @ x) > longest:
            return x, float("inf")
    return best, residual


RIDGE = 1e-10
"""The first ridge on the cosines where a nonnegative combination of gradients vanishes: no finite solution without."""


@ops.register_solver(
    "nash_mtl",
    options={"max_norm": 1.0, "hold": 0.0},
    needs_gram=True,
    initial_state=lambda tasks, options: [1.0] * tasks,
)
def _reference(problem: Problem) -> tuple[Tensor, Status]:
    gram, state, max_norm = problem.gram, problem.state, problem.options["max_norm"]
    assert state is not None  # checked by the op
    tasks = measure(gram)
    status = tasks.status
    if not tasks.any:
        return torch.ones_like(tasks.norms), status
    if not problem.options["hold"]:
        cosines = unit_diagonal(gram, tasks)
        x, residual = _newton(cosines)
        ridge = RIDGE
        while residual == float("inf"):
            status |= Status.PARETO_STATIONARY
            x, residual = _newton(cosines, ridge)
            ridge *= 1e3
        state.copy_(tasks.spread(x / tasks.norms[tasks.active]))
    weights = torch.where(tasks.active, state, 0.0)
    norm = float((weights @ gram @ weights).clamp_min(0).sqrt())
    return (weights * (max_norm / norm) if 0 < max_norm < norm else weights), status
