"""IMTL-L: learned loss scales."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from igb_kernels import ops
from igb_kernels.losses.base import LossBalancer
from igb_kernels.status import Status


class IMTLL(LossBalancer):
    """Learns log scales t_k: minimises Σ_k exp(t_k) L_k − t_k (Liu et al., ICLR 2021, equation 9).

    s_k = exp(t_k), and each step adds exp(t_k) L_k − 1 to the gradient of t_k; its fixed point is t = −log L. Give
    `parameters()` to an optimizer::

        rule = igb_kernels.IMTLL(num_tasks=3)
        optimizer = torch.optim.Adam([*model.parameters(), *rule.parameters()])

    Args:
        num_tasks: K.
        device, dtype: of the parameter.
    """

    name = "imtl_l"

    def __init__(
        self, num_tasks: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        if not isinstance(num_tasks, int) or num_tasks < 1:
            raise ValueError(f"num_tasks must be an integer of at least 1, found {num_tasks!r}")
        self.log_scales = torch.nn.Parameter(torch.zeros(num_tasks, device=device, dtype=dtype))

    def start(self, tasks: int, device: torch.device) -> None:
        if len(self.log_scales) != tasks:
            raise ValueError(f"num_tasks must be the number of losses, {tasks}; found {len(self.log_scales)}")
        if self.log_scales.device != device:
            raise ValueError(
                f"IMTLL's parameter must be on the losses' device, {device}; it is on {self.log_scales.device}"
            )

    def per_task(self) -> Tensor | None:
        return self.log_scales.detach()

    def commit(self, losses: Tensor, scales: Tensor, status: Tensor) -> None:
        gradient = (scales * losses - 1).to(self.log_scales.dtype)
        self.log_scales.grad = gradient if self.log_scales.grad is None else self.log_scales.grad.add_(gradient)

    def parameters(self) -> list[torch.nn.Parameter]:
        return [self.log_scales]

    def state_dict(self) -> dict[str, Any]:
        """See the base class."""
        return {"log_scales": self.log_scales.detach().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See the base class."""
        log_scales = state["log_scales"]
        if log_scales.shape != self.log_scales.shape:
            raise ValueError(f"num_tasks is {len(self.log_scales)}, but the state has {len(log_scales)} log_scales")
        with torch.no_grad():
            self.log_scales.copy_(log_scales)

    def __repr__(self) -> str:
        return f"IMTLL(num_tasks={len(self.log_scales)})"


@ops.register_rule("imtl_l", needs_per_task=True)
def _reference(losses: Tensor, per_task: Tensor | None, options: Sequence[float]) -> tuple[Tensor, Status]:
    assert per_task is not None  # checked by the op
    if not bool(per_task.isfinite().all()):
        return torch.full_like(losses, torch.nan), Status.NON_FINITE
    return per_task.clamp(-20, 20).exp(), Status(0)
