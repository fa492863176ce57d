"""What a loss-balancing rule is."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from igb_kernels.backends import Backend


class LossBalancer:
    """Turns K losses into K scales s_k = dφ_k/dL_k, the seeds of the tasks' backward passes.

    A rule is its name in `ops.loss_scales`, options, values per task, and what it remembers between steps. It never
    sees parameters or gradients.
    """

    name: ClassVar[str]

    def start(self, tasks: int, device: torch.device) -> None:
        """Called at the first step with the number of tasks and the losses' device."""

    def options(self) -> dict[str, float]:
        """The rule's options, in the order in which it was registered."""
        return {}

    def per_task(self) -> Tensor | None:
        """The rule's values per task [K], or None."""
        return None

    def scales(self, losses: Tensor, backend: Backend) -> tuple[Tensor, Tensor]:
        """Scales [K] in the losses' dtype and the status, int32 []. Changes no state."""
        return backend.loss_scales(self.name, losses, self.per_task(), list(self.options().values()))

    def commit(self, losses: Tensor, scales: Tensor, status: Tensor) -> None:
        """Takes a finished step's losses and scales [K] into account, unless its status says NON_FINITE."""

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
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; ValueError where it does not fit, with nothing changed."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
