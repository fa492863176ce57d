"""What a loss-balancing rule is."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from igb_kernels import ops
from igb_kernels.active import ActiveTasks
from igb_kernels.backends import Backend
from igb_kernels.card import Card
from igb_kernels.status import UNUSABLE


class LossBalancer:
    """Turns K losses into K scales s_k = ∂φ/∂L_k, the seeds of the tasks' backward passes.

    A rule is its name in `ops.loss_scales`, options, numbers for each task, and what it remembers between steps. It
    never sees parameters or gradients.

    In a step where tasks are missing, losses and scales are those of the `active` ones alone, [A] for [K]; state and
    numbers for each task are of all K, and what belongs to missing tasks stays as it is.
    """

    name: ClassVar[str]
    card: ClassVar[Card]
    learning_rate: ClassVar[float | None] = None
    """The recommended learning rate of `parameters`; None: the optimizer's."""

    def __init__(self) -> None:
        self.state: Tensor | None = None
        self._next_state: Tensor | None = None  # of the step's tasks
        self.active: ActiveTasks | None = None
        """The tasks of the step; None: all. Set before `scales`."""

    def start(self, tasks: int, device: torch.device) -> None:
        """Called at the first step with the number of tasks and the losses' device."""
        if self.state is None:
            self.state = ops.RULES[self.name].new_state(tasks, device, **self.options())

    def options(self) -> dict[str, float]:
        """The rule's options, in the order in which it was registered."""
        return {}

    def per_task(self) -> Tensor | None:
        """The rule's numbers for each of the step's tasks, or None."""
        return None

    def of_step(self, values: Tensor) -> Tensor:
        """Of numbers for all tasks [..., K], those for the step's."""
        return values if self.active is None else self.active.part(values)

    def write_of_step(self, values: Tensor, part: Tensor) -> None:
        """Writes numbers for the step's tasks [..., A] to those for all tasks [..., K]; in place, where the replays of
        a CUDA graph read them."""
        if self.active is None:
            values.copy_(part)
        else:
            self.active.put_(values, part)

    def scales(self, losses: Tensor, backend: Backend) -> tuple[Tensor, Tensor]:
        """Scales [K] in the losses' dtype and the status, int32 []. `commit` advances the state, not this."""
        self._next_state = None if self.state is None else self._narrowed(self.state)
        return backend.loss_scales(self.name, losses, self.per_task(), list(self.options().values()), self._next_state)

    def commit(self, losses: Tensor, scales: Tensor, status: Tensor) -> None:
        """Takes a finished step's losses and scales [K] into account, unless its status is unusable."""
        if self.state is not None and self._next_state is not None:
            unusable = (status & UNUSABLE).to(self.state.device) != 0
            # In place, where the replays of a CUDA graph read it.
            self.state.copy_(torch.where(unusable, self.state, self._widened(self.state, self._next_state)))

    def _narrowed(self, state: Tensor) -> Tensor:
        """The state of the step's tasks, a copy."""
        return state.clone() if self.active is None else ops.RULES[self.name].part(state, self.active)

    def _widened(self, state: Tensor, part: Tensor) -> Tensor:
        """The state with that of the step's tasks in its place."""
        return part if self.active is None else ops.RULES[self.name].whole(state, self.active, part)

    def after_step(self, losses: Tensor, backend: Backend) -> None:
        """Called by `Balancer.after_step` with the losses of the step's tasks [K] after the optimizer's step."""

    def host_decision(self) -> str | None:
        """What the host decides before the next step, so that it cannot be captured in a CUDA graph; None: nothing."""
        return None

    def end_epoch(self) -> None:
        """Called by `Balancer.end_epoch`."""

    def parameters(self) -> list[torch.nn.Parameter]:
        """The rule's learned parameters, for an optimizer."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """What influences the next step: numbers and tensors (not copies)."""
        return {"state": self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; ValueError where it does not fit, with nothing changed."""
        self.state = state["state"]

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
