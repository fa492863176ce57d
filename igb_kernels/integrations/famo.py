"""The `methods.weight_methods` of FAMO (Liu et al., NeurIPS 2023), and of FairGrad (Ban & Ji, ICML 2024), which is the
same and has one method more; on igb_kernels.

Their trainers run with one import changed::

    from igb_kernels.integrations.famo import METHODS, WeightMethods

It is nash-mtl's protocol (see `nash_mtl` beside this module) with `max_norm=1.0` for every method, and Gramians among
the extra outputs. As in the originals, PCGrad, CAGrad, GradDrop and FairGrad clip the gradient that they have made; all
others clip what is in `.grad` before their passes, so nothing after `zero_grad()`: clip it after `backward`, or use the
methods of `nash_mtl`, to have it clipped. Nothing but torch is needed. What differs is in `INTEGRATIONS.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from igb_kernels import gradients, losses
from igb_kernels.backends import Backend
from igb_kernels.gradients.base import GradientBalancer
from igb_kernels.integrations import _weight_methods as shared
from igb_kernels.integrations import nash_mtl
from igb_kernels.integrations._weight_methods import Outputs, RuleMethod, WeightMethod
from igb_kernels.result import BalanceResult

__all__ = [
    "FAMO",
    "IMTLG",
    "LOG_IMTLG",
    "LOG_MGDA",
    "METHODS",
    "MGDA",
    "RLW",
    "STL",
    "CAGrad",
    "DynamicWeightAverage",
    "FairGrad",
    "GradDrop",
    "LOG_CAGrad",
    "LinearScalarization",
    "NashMTL",
    "PCGrad",
    "ScaleInvariantLinearScalarization",
    "Uncertainty",
    "WeightMethod",
    "WeightMethods",
]

EPS = 1e-8


class FAMO(RuleMethod):
    """Weights under which every log loss falls at an equal rate: see `igb_kernels.FAMO`. After the optimizer's step,
    `update` wants the losses of the same batch again.

    Args:
        gamma: weight decay of the logits.
        w_lr: their learning rate.
        task_weights: not used, as in the original.
    """

    clips = "before"

    def __init__(
        self,
        n_tasks: int,
        device: torch.device | str,
        gamma: float = 1e-5,
        w_lr: float = 0.025,
        task_weights: Sequence[float] | Tensor | None = None,
        max_norm: float = 1.0,
    ) -> None:
        self._famo = losses.FAMO(gamma, w_lr)
        super().__init__(n_tasks, device, self._famo, max_norm=max_norm)

    @property
    def min_losses(self) -> Tensor:
        """What is subtracted from the losses."""
        return self._famo.lower

    def set_min_losses(self, losses: Tensor) -> None:
        """Sets the losses' lowest values [K], which are subtracted from now on."""
        self._famo.lower = losses

    def get_weighted_losses(self, losses: Tensor, **kwargs: Any) -> tuple[Tensor, Outputs]:
        """(z_k / c) log D_k with z = softmax(logits), D = losses − min_losses + 1e-8 and c = Σ z / D; the weights z and
        the logits."""
        self._check(losses)
        scales = self._step(losses.detach())
        distances = losses.detach() - self.min_losses.to(losses.device, losses.dtype) + EPS
        logits = self._famo.logits
        assert logits is not None, "a step makes them"
        values = scales * distances * distances.log()
        outputs = {"weights": logits.softmax(-1).to(losses.dtype), "logits": logits.to(losses.dtype)}
        return shared.with_gradient(losses, values, scales), outputs

    def update(self, curr_loss: Tensor) -> None:
        """Learns from the losses [K] after the optimizer's step."""
        self._check(curr_loss)
        if self._famo.state is None:
            raise RuntimeError("update comes after backward, which has not been called")
        self._famo.after_step(curr_loss.detach(), shared._run(curr_loss))


class _WithGram(shared.GradientMethod):
    """With the Gramian [K, K] of the gradients that the method saw among the outputs."""

    def _outcome(self, values: Tensor, result: BalanceResult) -> tuple[Tensor | None, Outputs | None]:
        loss, outputs = super()._outcome(values, result)
        if outputs is not None and result.gram is not None:  # there is none where weights are held
            outputs["GTG"] = result.gram.to(values.dtype)
        return loss, outputs


class NashMTL(_WithGram, shared.NashMTL):
    """Nash-MTL; "GTG" is divided by its norm."""

    clips = "before"

    def _outcome(self, values: Tensor, result: BalanceResult) -> tuple[Tensor | None, Outputs | None]:
        loss, outputs = super()._outcome(values, result)
        if outputs is not None and "GTG" in outputs:
            outputs["GTG"] = outputs["GTG"] / outputs["GTG"].norm()
        return loss, outputs


class IMTLG(_WithGram, shared.IMTLG):
    """IMTL-G."""

    clips = "before"

    def __init__(self, n_tasks: int, device: torch.device | str, max_norm: float = 1.0) -> None:
        super().__init__(n_tasks, device, max_norm)


class LOG_IMTLG(IMTLG):
    """IMTL-G of log(L + 1e-8)."""

    log_eps = EPS


class MGDA(shared.MGDA):
    """MGDA."""

    clips = "before"

    def __init__(
        self,
        n_tasks: int,
        device: torch.device | str,
        params: str = "shared",
        normalization: str = "none",
        max_norm: float = 1.0,
    ) -> None:
        super().__init__(n_tasks, device, params, normalization, max_norm)


class _WeightsOfLosses(gradients.MGDA):
    """The weights w of log losses over Σ_k w_k s_k, so that those of the losses themselves have sum 1."""

    def solve(self, measured: Tensor, losses: Tensor, scales: Tensor, backend: Backend) -> tuple[Tensor, Tensor]:
        """See the base class."""
        weights, status = super().solve(measured, losses, scales, backend)
        return weights / (weights * scales).sum(), status


class LOG_MGDA(MGDA):
    """MGDA of log(L + 1e-8): the weights have sum 1, and the loss's weights on L, too."""

    log_eps = EPS

    def _hull(self, normalization: str) -> GradientBalancer:
        return _WeightsOfLosses(normalization, apply_to="raw")

    def _outcome(self, values: Tensor, result: BalanceResult) -> tuple[Tensor | None, Outputs | None]:
        loss, _ = super()._outcome(values, result)
        return loss, {"weights": (result.weights / result.weights.sum()).to(values.dtype)}


class PCGrad(shared.PCGrad):
    """PCGrad."""

    def __init__(self, n_tasks: int, device: torch.device | str, reduction: str = "sum", max_norm: float = 1.0) -> None:
        super().__init__(n_tasks, device, reduction, max_norm)


class CAGrad(shared.CAGrad):
    """CAGrad; the weights among the outputs are those of its dual problem, of sum 1: the direction in which the update
    leaves the mean gradient."""

    def __init__(self, n_tasks: int, device: torch.device | str, c: float = 0.4, max_norm: float = 1.0) -> None:
        super().__init__(n_tasks, device, c, max_norm)

    def _outcome(self, values: Tensor, result: BalanceResult) -> tuple[Tensor | None, Outputs | None]:
        assert result.gram is not None, "CAGrad forms it"
        beyond = (result.weights * (1 + self.c**2) - 1) / self.n_tasks
        total = beyond.sum()
        dual = torch.where(total > 0, beyond / total, 1 / self.n_tasks)
        return None, {"GTG": result.gram.to(values.dtype), "weights": dual}


class LOG_CAGrad(CAGrad):
    """CAGrad of log L."""

    log_eps = 0.0


class _SummedFairGrad(shared.TimesTasks, gradients.FairGrad):
    """FairGrad times K."""


class FairGrad(_WithGram):
    """FairGrad (Ban & Ji, ICML 2024), solved exactly, times K: see `igb_kernels.FairGrad`.

    Args:
        alpha: 1 is proportional fairness, Nash-MTL's.
    """

    heads = "scaled"

    def __init__(self, n_tasks: int, device: torch.device | str, alpha: float = 1.0, max_norm: float = 1.0) -> None:
        super().__init__(n_tasks, device, _SummedFairGrad(alpha), max_norm)
        self.alpha = alpha

    def _outcome(self, values: Tensor, result: BalanceResult) -> tuple[Tensor | None, Outputs | None]:
        _, outputs = super()._outcome(values, result)
        assert outputs is not None
        return None, {**outputs, "weights": result.weights / self.n_tasks}


class GradDrop(shared.GradientMethod):
    """GradDrop (Chen et al., NeurIPS 2020) on the gradients of the shared parameters: see `igb_kernels.GradDrop`."""

    heads = "scaled"

    def __init__(self, n_tasks: int, device: torch.device | str, max_norm: float = 1.0) -> None:
        super().__init__(n_tasks, device, gradients.GradDrop(), max_norm)

    def _outcome(self, values: Tensor, result: BalanceResult) -> tuple[Tensor | None, Outputs | None]:
        return None, None


class _ClipsBefore(WeightMethod):
    """Clips to 1, unless it is told not to."""

    clips = "before"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"max_norm": 1.0, **kwargs})


class STL(_ClipsBefore, nash_mtl.STL):
    """One task alone."""


class LinearScalarization(_ClipsBefore, nash_mtl.LinearScalarization):
    """Constant weights."""


class ScaleInvariantLinearScalarization(_ClipsBefore, nash_mtl.ScaleInvariantLinearScalarization):
    """Constant weights of log losses."""


class Uncertainty(_ClipsBefore, nash_mtl.Uncertainty):
    """Learned uncertainties."""


class RLW(_ClipsBefore, nash_mtl.RLW):
    """Random weights."""


class DynamicWeightAverage(_ClipsBefore, nash_mtl.DynamicWeightAverage):
    """DWA."""


METHODS: dict[str, type[WeightMethod]] = {
    "stl": STL,
    "ls": LinearScalarization,
    "uw": Uncertainty,
    "scaleinvls": ScaleInvariantLinearScalarization,
    "rlw": RLW,
    "dwa": DynamicWeightAverage,
    "pcgrad": PCGrad,
    "mgda": MGDA,
    "graddrop": GradDrop,
    "log_mgda": LOG_MGDA,
    "cagrad": CAGrad,
    "log_cagrad": LOG_CAGrad,
    "imtl": IMTLG,
    "log_imtl": LOG_IMTLG,
    "nashmtl": NashMTL,
    "famo": FAMO,
    "fairgrad": FairGrad,
}
"""By the names that `WeightMethods` takes."""


class WeightMethods(shared.WeightMethods):
    """One of `METHODS`, as `nash_mtl.WeightMethods`; with FAMO, the step ends with what it learns from::

    method = WeightMethods("famo", n_tasks=3, device=device, gamma=0.01)
    ...
    method.backward(losses=model.losses(batch), shared_parameters=list(model.shared_parameters()))
    optimizer.step()
    with torch.no_grad():
        method.method.update(model.losses(batch))
    """

    methods = METHODS
