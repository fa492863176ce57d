"""IMTL-L: learned loss scales."""

from __future__ import annotations

import torch
from torch import Tensor

from igb_kernels import ops
from igb_kernels.backends.reference import LossProblem
from igb_kernels.card import Card
from igb_kernels.losses.learned import LearnedLossBalancer, check_num_tasks, inward
from igb_kernels.status import Status


class IMTLL(LearnedLossBalancer):
    """Learns log scales t_k: minimises Σ_k exp(t_k) L_k − t_k (Liu et al., ICLR 2021, equation 9).

    s_k = exp(t_k), and each step adds exp(t_k) L_k − 1 to the gradient of t_k; its fixed point is t = −log L. Give
    its parameter to an optimizer::

        balancer = igb_kernels.Balancer("equal", losses=igb_kernels.IMTLL(num_tasks=3), shared=encoder.parameters())
        optimizer = torch.optim.Adam([{"params": model.parameters()}, *balancer.param_groups()])

    Args:
        num_tasks: K.
        device, dtype: of the parameter.
    """

    name = "imtl_l"
    parameter_name = "log_scales"
    card = Card(
        title="IMTL-L",
        paper="Liu et al., ICLR 2021",
        formula="exp(t_k), t learned",
        inputs="losses",
        memory="nothing",
        passes="1",
        hazards="no recommended learning rate: t follows the model's",
    )

    def __init__(
        self, num_tasks: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(torch.zeros(check_num_tasks(num_tasks), device=device, dtype=dtype))

    @property
    def log_scales(self) -> torch.nn.Parameter:
        """The parameter t [K]."""
        return self.parameter


@ops.register_rule(
    "imtl_l",
    per_task=lambda tasks: (tasks,),
    needs_per_task=True,
    initial_state=lambda tasks, options: [0.0] * tasks,
)
def _reference(problem: LossProblem) -> tuple[Tensor, Status]:
    log_scales, gradient = problem.per_task, problem.state
    assert log_scales is not None  # checked by the op
    assert gradient is not None
    if not bool(log_scales.isfinite().all()):
        return torch.full_like(log_scales, torch.nan), Status.NON_FINITE
    scales = log_scales.clamp(-20, 20).exp()
    gradient.copy_(inward(log_scales, scales * problem.losses - 1))
    return scales, Status(0)
