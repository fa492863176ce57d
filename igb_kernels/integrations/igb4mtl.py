"""The `methods` of IGB4MTL (Dai et al., UAI 2023), on igb_kernels.

Its trainers run with two imports changed::

    from igb_kernels.integrations.igb4mtl import GRADIENT_METHODS, LOSS_METHODS
    from igb_kernels.integrations.igb4mtl import GradientWeightMethods, LossWeightMethods

Names, arguments and returned values are theirs. Nothing but torch is needed; "igbv2" needs stable-baselines3. What
differs is in `INTEGRATIONS.md`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from igb_kernels import losses
from igb_kernels.integrations import _weight_methods as shared
from igb_kernels.integrations._weight_methods import (
    IMTLG,
    MGDA,
    STL,
    CAGrad,
    LinearScalarization,
    LossMethod,
    NashMTL,
    Outputs,
    PCGrad,
    RuleMethod,
    ScaleInvariantLinearScalarization,
    Uncertainty,
    WeightMethod,
)
from igb_kernels.losses.log import TINY

__all__ = [
    "GRADIENT_METHODS",
    "IMTLG",
    "LOSS_METHODS",
    "MGDA",
    "RLW",
    "STL",
    "CAGrad",
    "DynamicWeightAverage",
    "DynamicWeightAverageLog",
    "GradientWeightMethods",
    "ImprovableGapBalancing_v1",
    "ImprovableGapBalancing_v2",
    "LinearScalarization",
    "LossWeightMethods",
    "NashMTL",
    "PCGrad",
    "RLWLog",
    "ScaleInvariantLinearScalarization",
    "Uncertainty",
    "UncertaintyLog",
    "WeightMethod",
]


class UncertaintyLog(Uncertainty):
    """`Uncertainty` of log losses."""

    log = True


class RLW(shared.RLW):
    """Random weights, of sum K."""

    total = "tasks"


class RLWLog(RLW):
    """`RLW` of log losses."""

    log = True


class DynamicWeightAverage(shared.DynamicWeightAverage):
    """DWA."""


class DynamicWeightAverageLog(DynamicWeightAverage):
    """`DynamicWeightAverage` of log losses; the weights are those of the losses themselves."""

    log = True


class ImprovableGapBalancing_v1(LossMethod):
    """Weights K softmax(L / base_losses) of log losses; ones until `base_losses` [K] is set."""

    log = True

    def __init__(self, n_tasks: int, device: torch.device | str, **kwargs: Any) -> None:
        super().__init__(n_tasks, device, **kwargs)
        self.base_losses: Tensor | None = None

    def weights(self, losses: Tensor) -> Tensor:
        if self.base_losses is None:
            return torch.ones_like(losses)
        base = self.base_losses.to(losses.device, losses.dtype).clamp_min(TINY)
        return self.n_tasks * torch.softmax(losses / base, dim=-1)


def _agents(name: str, doc: str) -> Any:
    """An attribute that is the agent's."""
    return property(
        lambda self: getattr(self._agent, name), lambda self, value: setattr(self._agent, name, value), doc=doc
    )


class ImprovableGapBalancing_v2(RuleMethod):
    """Weights of log losses that a soft actor-critic agent chooses: see `igb_kernels.IGBv2`.

    `train_batch`, the number of steps in an epoch, must be set before the first step; `base_losses` [K] when they are
    known; `reward_scale`, `start_epoch`, `update_after` and `update_every` may be.

    Args:
        sac_lr: the agent's learning rate.
        buffer_size: of its transitions.
        options: others of `igb_kernels.IGBv2`; by default the original's states and densities ("raw", "official"), and
            updates within the step.
    """

    log = True

    def __init__(
        self,
        n_tasks: int,
        device: torch.device | str,
        sac_lr: float = 3e-4,
        buffer_size: float = 1e4,
        **options: Any,
    ) -> None:
        theirs = {"state": "raw", "logprob": "official", "background": False}
        self._agent = losses.IGBv2(learning_rate=sac_lr, buffer_size=int(buffer_size), **{**theirs, **options})
        super().__init__(n_tasks, device, self._agent)
        self.custom_step = 0
        self._knows_base = False

    def weights(self, losses: Tensor) -> Tensor:
        if self.train_batch is None:
            raise ValueError("train_batch must be set to the number of steps in an epoch before the first step")
        self._step(losses)
        self.custom_step += 1
        weights = self._agent.per_task()
        assert weights is not None, "a step chooses them"
        return weights.to(losses.device)

    @property
    def base_losses(self) -> Tensor | None:
        """[K]; None until they are set."""
        return self._agent.base_losses if self._knows_base else None

    @base_losses.setter
    def base_losses(self, values: Tensor) -> None:
        self._agent.base_losses = values
        self._knows_base = True

    train_batch = _agents("steps_per_epoch", "Steps in an epoch.")
    reward_scale = _agents("reward_scale", "What rewards are multiplied with.")
    start_epoch = _agents("start_epoch", "The agent chooses from here on; before, weights are random.")
    update_after = _agents("update_after", "The agent learns from here on, in epochs.")
    update_every = _agents("update_every", "Steps between the agent's updates.")


LOSS_METHODS: dict[str, type[LossMethod]] = {
    "ls": LinearScalarization,
    "stl": STL,
    "si": ScaleInvariantLinearScalarization,
    "uw": Uncertainty,
    "uwlog": UncertaintyLog,
    "rlw": RLW,
    "rlwlog": RLWLog,
    "dwa": DynamicWeightAverage,
    "dwalog": DynamicWeightAverageLog,
    "igbv1": ImprovableGapBalancing_v1,
    "igbv2": ImprovableGapBalancing_v2,
}
"""By the names that `LossWeightMethods` takes."""

GRADIENT_METHODS: dict[str, type[WeightMethod]] = {
    "ls": LinearScalarization,
    "pcgrad": PCGrad,
    "mgda": MGDA,
    "cagrad": CAGrad,
    "nashmtl": NashMTL,
    "imtl": IMTLG,
}
"""By the names that `GradientWeightMethods` takes."""


class LossWeightMethods(shared.WeightMethods):
    """One of `LOSS_METHODS`; its weighted losses go to a `GradientWeightMethods`::

        loss_method = LossWeightMethods("igbv1", n_tasks=3, device=device)
        gradient_method = GradientWeightMethods("imtl", n_tasks=3, device=device)
        for epoch in range(epochs):
            for batch in loader:
                optimizer.zero_grad()
                weighted_losses, loss_weights = loss_method.get_weighted_losses(losses=model.losses(batch))
                loss, gradient_weights = gradient_method.backward(
                    losses=weighted_losses,
                    shared_parameters=list(model.shared_parameters()),
                    task_specific_parameters=list(model.task_specific_parameters()),
                )
                optimizer.step()
            if epoch == 1:
                loss_method.method.base_losses = mean_losses_of_the_epoch

    The gradient method starts its passes at the losses themselves, if it gets the weighted ones as they are.
    """

    methods = LOSS_METHODS
    method: LossMethod

    def get_weighted_losses(self, losses: Tensor, **kwargs: Any) -> tuple[Tensor, Outputs]:
        """The weighted losses [K], and {"weights": [K]}."""
        return self.method.get_weighted_losses(losses, **kwargs)


class GradientWeightMethods(shared.WeightMethods):
    """One of `GRADIENT_METHODS`; see `LossWeightMethods`."""

    methods = GRADIENT_METHODS
