"""UW: learned uncertainties."""

from __future__ import annotations

import torch
from torch import Tensor

from igb_kernels import ops
from igb_kernels.backends.reference import LossProblem
from igb_kernels.card import Card
from igb_kernels.losses.learned import LearnedLossBalancer, check_num_tasks, inward
from igb_kernels.status import Status


class UW(LearnedLossBalancer):
    """Learns each task's log-variance t_k: minimises Σ_k exp(−t_k) L_k / 2 + t_k / 2 (Kendall et al., CVPR 2018,
    equations 7 and 10).

    s_k = exp(−t_k) / 2, and each step adds 1/2 − exp(−t_k) L_k / 2 to the gradient of t_k; its fixed point is
    t = log L. t counts as within [−20, 20], where a loss that is not positive would drive it ever further down. Give
    its parameter to an optimizer::

        balancer = igb_kernels.Balancer("equal", losses=UW(num_tasks=3), shared=encoder.parameters())
        optimizer = torch.optim.Adam([{"params": model.parameters()}, *balancer.param_groups()], lr=1e-3)

    Args:
        num_tasks: K.
        initial: where every t_k starts; LibMTL starts at −0.5.
        device, dtype: of the parameter.
    """

    name = "uw"
    parameter_name = "log_variances"
    learning_rate = 0.025
    card = Card(
        title="UW",
        paper="Kendall et al., CVPR 2018, arXiv:1705.07115",
        formula="exp(-t_k) / 2, t learned",
        inputs="losses",
        memory="nothing",
        passes="1",
        hazards="a loss that reaches 0 or below takes over, up to a scale of exp(20) / 2",
        parity="initial=-0.5: LibMTL",
    )

    def __init__(
        self,
        num_tasks: int,
        initial: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not -20 <= initial <= 20:
            raise ValueError(f"initial must be a number from -20 to 20, found {initial!r}")
        super().__init__(torch.full((check_num_tasks(num_tasks),), float(initial), device=device, dtype=dtype))

    @property
    def log_variances(self) -> torch.nn.Parameter:
        """The parameter t [K]."""
        return self.parameter


@ops.register_rule(
    "uw",
    per_task=lambda tasks: (tasks,),
    needs_per_task=True,
    initial_state=lambda tasks, options: [0.0] * tasks,
)
def _reference(problem: LossProblem) -> tuple[Tensor, Status]:
    log_variances, gradient = problem.per_task, problem.state
    assert log_variances is not None  # checked by the op
    assert gradient is not None
    if not bool(log_variances.isfinite().all()):
        return torch.full_like(log_variances, torch.nan), Status.NON_FINITE
    precisions = 1 / log_variances.clamp(-20, 20).exp()
    gradient.copy_(inward(log_variances, (1 - precisions * problem.losses) / 2))
    return precisions / 2, Status(0)
