"""What rules with a learned parameter share."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from igb_kernels.backends import Backend
from igb_kernels.losses.base import LossBalancer


class LearnedLossBalancer(LossBalancer):
    """A rule with one learned number for each task, whose gradient its kernel leaves in the state; a missing task's
    is 0."""

    parameter_name: ClassVar[str]
    """What `state_dict` and messages call it."""
    state_rows: ClassVar[int] = 1
    """The kernel's state in numbers for each task; the first row is the gradient."""

    def __init__(self, initial: Tensor) -> None:
        """`initial` [K], floating: where the parameter starts."""
        super().__init__()
        self.parameter = torch.nn.Parameter(initial)

    def start(self, tasks: int, device: torch.device) -> None:
        if len(self.parameter) != tasks:
            raise ValueError(f"num_tasks must be the number of losses, {tasks}; found {len(self.parameter)}")
        if self.parameter.device != device:
            raise ValueError(
                f"{type(self).__name__}'s parameter must be on the losses' device, {device}; "
                f"it is on {self.parameter.device}"
            )

    def per_task(self) -> Tensor | None:
        return self.of_step(self.parameter.detach())

    def scales(self, losses: Tensor, backend: Backend) -> tuple[Tensor, Tensor]:
        # Where there are no scales, the gradient stays NaN, as those of the model are.
        size = self.state_rows * len(losses)
        self._next_state = torch.full((size,), torch.nan, dtype=torch.float64, device=self.parameter.device)
        return backend.loss_scales(self.name, losses, self.per_task(), list(self.options().values()), self._next_state)

    def commit(self, losses: Tensor, scales: Tensor, status: Tensor) -> None:
        assert self._next_state is not None, "scales() comes first"
        gradient = self._next_state[: len(losses)].to(self.parameter.dtype)
        if self.active is not None:
            gradient = self.active.spread(gradient)
        self.parameter.grad = gradient if self.parameter.grad is None else self.parameter.grad.add_(gradient)

    def parameters(self) -> list[torch.nn.Parameter]:
        return [self.parameter]

    def state_dict(self) -> dict[str, Any]:
        """See the base class."""
        return {self.parameter_name: self.parameter.detach().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See the base class."""
        given = state[self.parameter_name]
        if given.shape != self.parameter.shape:
            raise ValueError(
                f"num_tasks is {len(self.parameter)}, but the state has {len(given)} {self.parameter_name}"
            )
        with torch.no_grad():
            self.parameter.copy_(given)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_tasks={len(self.parameter)})"


def inward(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient [K] of a parameter that counts as within [−20, 20]: beyond, none that leads further out."""
    held = gradient.clamp_max(0).where(parameter <= -20, gradient)
    return held.clamp_min(0).where(parameter >= 20, held)


def check_num_tasks(num_tasks: int) -> int:
    """`num_tasks`, which must be a positive integer."""
    if not isinstance(num_tasks, int) or num_tasks < 1:
        raise ValueError(f"num_tasks must be an integer of at least 1, found {num_tasks!r}")
    return num_tasks
