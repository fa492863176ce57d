"""What a gradient-balancing method is."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from igb_kernels import ops
from igb_kernels.active import ActiveTasks
from igb_kernels.backends import Backend
from igb_kernels.card import Card
from igb_kernels.losses import LossBalancer, Unscaled
from igb_kernels.status import Status


class Needs(enum.Enum):
    """What a step must know of the tasks' gradients, cheapest first."""

    NOTHING = "nothing"
    """All weights are 1: one backward pass serves all tasks."""
    HELD = "held"
    """The weights are those of an earlier step, `held_weights`: one pass does where heads are weighted, too."""
    RUNNING_NORMS = "running norms"
    """w_k = c · f(‖g_k‖): each gradient is added to the update when it comes, and forgotten."""
    NORMS = "norms"
    GRAM = "gram"
    EXCESS = "excess"
    """Σ g_k² / √(accumulated squares), in the place of squared norms."""
    ELEMENTS = "elements"
    """The update is chosen element by element, with random numbers from `counter`."""


class GradientBalancer:
    """Turns what is known of K gradients into K weights; the update of the shared parameters is Σ_k w_k g_k.

    A method is its name in `ops.solve`, options and state. It never sees parameters or gradients.

    In a step where tasks are missing, Gramian, losses and weights are those of the `active` ones alone, [A] for [K];
    state and numbers for each task are of all K, and what belongs to missing tasks stays as it is.
    """

    name: ClassVar[str]
    card: ClassVar[Card]
    learning_rate: ClassVar[float | None] = None
    """The recommended learning rate of `parameters`; None: the optimizer's."""
    crosses: ClassVar[bool] = False
    """Whether `solve` can take the cross-Gramian J₁J₂ᵀ of two batches."""

    def __init__(self) -> None:
        self.state: Tensor | None = None
        self._next_state: Tensor | None = None  # of the step's tasks
        self.active: ActiveTasks | None = None
        """The tasks of the step; None: all. Set before everything else in it."""

    def options(self) -> dict[str, float]:
        """The method's options, in the order in which it was registered."""
        return {}

    def needs(self) -> Needs:
        """What the next step needs."""
        return Needs.GRAM

    def per_task(self) -> Tensor | None:
        """The method's numbers for each of the step's tasks, or None."""
        return None

    def of_step(self, values: Tensor) -> Tensor:
        """Of numbers for all tasks [..., K], those for the step's."""
        return values if self.active is None else self.active.part(values)

    def default_losses(self) -> LossBalancer:
        """The loss balancing that is part of the method, used when the user names none."""
        return Unscaled()

    def ema_decay(self) -> Tensor | None:
        """The decay of the moving averages that take the gradients' place in the next step, or None."""
        return None

    def row_scales(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """What gives the factors on the gradients that enter the moving averages, float64 [K], from their squared
        norms and raw losses [K]; None: 1."""
        return None

    def start(self, tasks: int, device: torch.device) -> None:
        """Called before the first step with the number of tasks and the gradients' device."""
        if self.state is None:
            self.state = ops.SOLVERS[self.name].new_state(tasks, device, **self.options())

    def solve(self, measured: Tensor, losses: Tensor, scales: Tensor, backend: Backend) -> tuple[Tensor, Tensor]:
        """Weights and status of this step. `commit` then advances the state, unless the step is not finite.

        Args:
            measured: the Gramian of the scaled gradients [K, K], or their squared norms [K].
            losses: raw losses [K].
            scales: loss scales [K].

        Returns:
            weights [K], float64, and status, int32 [].
        """
        return self._solve(measured, losses if ops.SOLVERS[self.name].needs_losses else None, backend)

    def _solve(self, measured: Tensor, losses: Tensor | None, backend: Backend) -> tuple[Tensor, Tensor]:
        self._next_state = None if self.state is None else self._narrowed(self.state)
        options = list(self.options().values())
        return backend.solve(self.name, measured, losses, self.per_task(), options, self._next_state)

    def running_weight(self, sq_norm: Tensor) -> Tensor:
        """f(‖g_k‖) of `Needs.RUNNING_NORMS`, [1], from the squared norm [1]."""
        raise NotImplementedError(f"{self.name} does not need RUNNING_NORMS")

    def running_factor(self, sq_norms: Tensor) -> Tensor:
        """c of `Needs.RUNNING_NORMS`, [1], from all squared norms [K]; NaN if one is not finite."""
        raise NotImplementedError(f"{self.name} does not need RUNNING_NORMS")

    def counter(self) -> Tensor:
        """Seed and step of the random numbers of `Needs.ELEMENTS`, float64 [2]."""
        raise NotImplementedError(f"{self.name} does not need ELEMENTS")

    def leak(self) -> Tensor | None:
        """The fractions of each task's gradient [K] that `Needs.ELEMENTS` always passes; None: 0."""
        return None

    def held_weights(self) -> Tensor:
        """The weights [K] of a step that needs `Needs.HELD`."""
        raise NotImplementedError(f"{self.name} does not need HELD")

    def solve_held(self, sq_norm: Tensor, backend: Backend) -> tuple[Tensor, Tensor]:
        """Factor [1] and status for Σ_k held_weights_k g_k, from its squared norm [1]."""
        raise NotImplementedError(f"{self.name} does not need HELD")

    def withdraw(self, where: Tensor) -> None:
        """Takes back what `solve` has left for `commit`, where this is true, bool []: the step turned out unusable for
        a reason that `solve` could not see. Where tasks are missing, `commit` goes by the status anyway."""
        if self.active is None and self.state is not None and self._next_state is not None:
            self._next_state = torch.where(where.to(self.state.device), self.state, self._next_state)

    def commit(self, status: Tensor) -> None:
        """Makes the state that `solve` left the current one; `status` is the finished step's, int32 []."""
        if self.state is None or self._next_state is None or self._next_state is self.state:
            return
        # In place, where the replays of a CUDA graph read it.
        if self.active is None:
            self.state.copy_(self._next_state)
        else:
            failed = (status & int(Status.NON_FINITE)) != 0
            self.state.copy_(torch.where(failed, self.state, self._widened(self.state, self._next_state, self.active)))

    def _narrowed(self, state: Tensor) -> Tensor:
        """The state of the step's tasks, a copy."""
        return state.clone() if self.active is None else self._part(state, self.active)

    def _part(self, state: Tensor, active: ActiveTasks) -> Tensor:
        """The state of the active tasks, a copy."""
        return ops.SOLVERS[self.name].part(state, active)

    def _widened(self, state: Tensor, part: Tensor, active: ActiveTasks) -> Tensor:
        """The state with that of the active tasks in its place, a copy."""
        return ops.SOLVERS[self.name].whole(state, active, part)

    def end_epoch(self) -> None:
        """Called by `Balancer.end_epoch`."""

    def parameters(self) -> list[torch.nn.Parameter]:
        """The method's learned parameters, for an optimizer."""
        return []

    def host_decision(self) -> str | None:
        """What the host decides before each step, so that none can be captured in a CUDA graph; None: nothing."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What influences the next step: numbers and tensors (not copies)."""
        return {"state": self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; ValueError where it does not fit, with nothing changed."""
        self.state = state["state"]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v:g}' for k, v in self.options().items())})"


class WithPreference(GradientBalancer):
    """A method to which the user can say how much each task counts."""

    def __init__(self, preference: Sequence[float] | Tensor | None = None) -> None:
        super().__init__()
        self.preference: Tensor | None = None
        """float64 [K]: finite, not negative, not all 0; None: the same of all."""
        if preference is not None:
            values = torch.as_tensor(preference, dtype=torch.float64).detach().clone()
            usable = values.dim() == 1 and bool((values.isfinite() & (values >= 0)).all()) and bool((values > 0).any())
            if not usable:
                raise ValueError(
                    f"preference must be K finite numbers, at least 0 and not all 0; found {values.tolist()}"
                )
            self.preference = values

    def per_task(self) -> Tensor | None:
        """See the base class."""
        return None if self.preference is None else self.of_step(self.preference)

    def start(self, tasks: int, device: torch.device) -> None:
        """See the base class; ValueError where the preference is not for this number of tasks."""
        if self.preference is not None:
            if len(self.preference) != tasks:
                raise ValueError(f"preference must be {tasks} numbers, one for each task; found {len(self.preference)}")
            self.preference = self.preference.to(device)
        super().start(tasks, device)


def check_number(name: str, value: float, low: float, high: float = float("inf")) -> float:
    """`value` as a float, which must lie in [low, high] (half open at an infinite end)."""
    if not low <= value <= high or value == float("inf"):
        rule = f"at least {low:g}" if high == float("inf") else f"{low:g} to {high:g}"
        raise ValueError(f"{name} must be a finite number, {rule}; found {value!r}")
    return float(value)
