"""What the protocols of nash-mtl, FAMO and IGB4MTL share: objects whose `backward(losses, shared_parameters, ...)` is
called in the place of `sum(losses).backward()`, and returns a loss and a dict."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from igb_kernels import gradients, losses, ops
from igb_kernels._log import warn_once
from igb_kernels.backends import Backend, resolve
from igb_kernels.balancer import Balancer
from igb_kernels.capture import TaskLosses, edge_of, leaves
from igb_kernels.gradients.base import GradientBalancer, Needs
from igb_kernels.losses.base import LossBalancer
from igb_kernels.result import BalanceResult

Outputs = dict[str, Any]
Tensors = Iterable[Tensor] | Tensor | None


class WeightMethods:
    """A method by its name in `methods`; everything is passed on to `.method`."""

    methods: ClassVar[Mapping[str, Callable[..., WeightMethod]]]

    def __init__(self, method: str, n_tasks: int, device: torch.device | str, **kwargs: Any) -> None:
        """`kwargs` are those of the method's class.

        Raises:
            ValueError: for a name that is not in `methods`.
        """
        if method not in self.methods:
            raise ValueError(f"method must be one of {list(self.methods)}, found {method!r}")
        self.method = self.methods[method](n_tasks=n_tasks, device=device, **kwargs)

    def get_weighted_loss(self, losses: Tensor, **kwargs: Any) -> tuple[Tensor, Outputs]:
        """See the method."""
        return self.method.get_weighted_loss(losses, **kwargs)

    def backward(self, losses: Tensor, **kwargs: Any) -> tuple[Tensor | None, Outputs | None]:
        """See the method."""
        return self.method.backward(losses, **kwargs)

    def __call__(self, losses: Tensor, **kwargs: Any) -> tuple[Tensor | None, Outputs | None]:
        """See the method."""
        return self.method.backward(losses, **kwargs)

    def parameters(self) -> list[Tensor]:
        """See the method."""
        return self.method.parameters()


class WeightMethod:
    """What all methods have.

    Args:
        n_tasks: K.
        device: of the losses.
        max_norm: `.grad` of the shared parameters is clipped to this norm; 0: it is not.
    """

    clips: ClassVar[str] = "after"
    """When: at the end of `backward`, or "before" its passes, so that what they add is as long as it is."""

    def __init__(self, n_tasks: int, device: torch.device | str, max_norm: float = 0.0) -> None:
        if not isinstance(n_tasks, int) or n_tasks < 1:
            raise ValueError(f"n_tasks must be an integer of at least 1, found {n_tasks!r}")
        if not 0 <= max_norm < float("inf"):
            raise ValueError(f"max_norm must be a finite number of at least 0, found {max_norm!r}")
        self.n_tasks, self.device, self.max_norm = n_tasks, torch.device(device), max_norm

    def get_weighted_loss(self, losses: Tensor, **kwargs: Any) -> tuple[Tensor, Outputs]:
        """The loss whose `backward()` does what the method wants, and extra outputs; `kwargs` as for `backward`."""
        raise NotImplementedError(f"{type(self).__name__} has no weighted loss: it works on gradients. Use backward()")

    def backward(
        self,
        losses: Tensor,
        shared_parameters: Tensors = None,
        task_specific_parameters: Tensors = None,
        last_shared_parameters: Tensors = None,
        representation: Tensors = None,
        **kwargs: Any,
    ) -> tuple[Tensor | None, Outputs | None]:
        """Adds the balanced gradients to `.grad`.

        Args:
            losses: K losses, a 1-D tensor; made by torch.stack, each pass runs its own head only.
            shared_parameters, task_specific_parameters: of the model.
            last_shared_parameters: those of the last shared layer.
            representation: the shared representation, one tensor or several.

        Returns:
            The weighted loss, or None where there is none; and extra outputs.
        """
        loss, outputs = self.get_weighted_loss(losses, shared_parameters=shared_parameters)
        self._clip(shared_parameters, "before")
        loss.backward()  # type: ignore[no-untyped-call]
        self._clip(shared_parameters, "after")
        return loss, outputs

    def __call__(self, losses: Tensor, **kwargs: Any) -> tuple[Tensor | None, Outputs | None]:
        """See `backward`."""
        return self.backward(losses, **kwargs)

    def parameters(self) -> list[Tensor]:
        """What the method learns, for an optimizer."""
        return []

    def _clip(self, shared_parameters: Tensors, when: str) -> None:
        if self.max_norm > 0 and when == self.clips:
            if shared_parameters is None:
                raise ValueError(f"shared_parameters must be given where max_norm is {self.max_norm}, found None")
            torch.nn.utils.clip_grad_norm_(listed(shared_parameters), self.max_norm)


def listed(tensors: Tensors) -> list[Tensor]:
    """One tensor, or several, as a list; None: none."""
    if tensors is None:
        return []
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


# ---- Methods that work on losses alone ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Where weighted losses φ [K] come from: a gradient method that knows it starts its passes at the losses."""

    losses: Tensor
    """[K], with their graph."""
    scales: Tensor | None = None
    """dφ_k/dL_k [K]; None: 1."""
    learned: tuple[Tensor, Tensor] | None = None
    """A parameter t [K] that φ depends on, too, and dφ_k/dt_k."""

    def attach(self, weighted: Tensor) -> Tensor:
        """The weighted losses, which remember it until they are changed in place."""
        weighted._igb_source = self, weighted._version  # type: ignore[attr-defined]
        return weighted

    @staticmethod
    def of(weighted: Tensor) -> Source:
        """That of weighted losses, if they remember it; else they are the losses."""
        source, version = getattr(weighted, "_igb_source", (None, None))
        return source if isinstance(source, Source) and version == weighted._version else Source(weighted)


class LossMethod(WeightMethod):
    """Weights that are known from the losses; the weighted loss is Σ_k w_k L_k, or Σ_k w_k log L_k where `log`."""

    log: ClassVar[bool] = False

    def __init__(self, n_tasks: int, device: torch.device | str, max_norm: float = 0.0) -> None:
        super().__init__(n_tasks, device, max_norm)
        self.weights = torch.ones(n_tasks, device=self.device)
        """The last step's [K]."""

    def _weigh(self, losses: Tensor) -> Tensor:
        """The step's weights [K] from its losses, detached."""
        raise NotImplementedError

    def get_weighted_losses(self, losses: Tensor, **kwargs: Any) -> tuple[Tensor, Outputs]:
        """The weighted losses [K], to be summed or handed to a gradient method; and {"weights": [K]}."""
        self._check(losses)
        known = losses.detach()
        weights = self.weights = self._weigh(known)
        if not self.log:
            return Source(losses, weights).attach(weights * losses), {"weights": weights}
        values, scales = weights * known.log(), weights * log_scales(known)
        return with_gradient(losses, values.to(losses.dtype), scales.to(losses.dtype)), {"weights": weights}

    def get_weighted_loss(self, losses: Tensor, **kwargs: Any) -> tuple[Tensor, Outputs]:
        weighted, outputs = self.get_weighted_losses(losses)
        return weighted.sum(), outputs

    def _check(self, losses: Tensor) -> None:
        if not isinstance(losses, Tensor) or losses.shape != (self.n_tasks,):
            found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"losses must be a tensor of shape ({self.n_tasks},), found {found}")


def log_scales(losses: Tensor, eps: float = 0.0) -> Tensor:
    """The derivatives of log(L_k + eps) [K]; all NaN where a loss is negative, as everywhere in igb_kernels."""
    return ops.loss_scales("log", losses, eps=eps)[0]


def with_gradient(losses: Tensor, values: Tensor, scales: Tensor) -> Tensor:
    """These values [K], with the derivatives `scales` [K] by the losses."""
    return Source(losses, scales).attach(values + (losses - losses.detach()) * scales)


class LinearScalarization(LossMethod):
    """Constant weights, `task_weights` [K]; ones by default."""

    def __init__(
        self,
        n_tasks: int,
        device: torch.device | str,
        task_weights: Sequence[float] | Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(n_tasks, device, **kwargs)
        weights = torch.ones(n_tasks) if task_weights is None else torch.as_tensor(task_weights)
        if weights.shape != (n_tasks,):
            raise ValueError(f"task_weights must have shape ({n_tasks},), found {tuple(weights.shape)}")
        self.task_weights = weights.to(self.device)

    def _weigh(self, losses: Tensor) -> Tensor:
        return self.task_weights


class ScaleInvariantLinearScalarization(LinearScalarization):
    """`LinearScalarization` of log losses."""

    log = True


class STL(LossMethod):
    """One task, `main_task`, alone."""

    def __init__(self, n_tasks: int, device: torch.device | str, main_task: int, **kwargs: Any) -> None:
        super().__init__(n_tasks, device, **kwargs)
        if not 0 <= main_task < n_tasks:
            raise ValueError(f"main_task must be 0 to {n_tasks - 1}, found {main_task!r}")
        self.main_task = main_task
        self.weights = torch.zeros(n_tasks, device=self.device)
        self.weights[main_task] = 1

    def _weigh(self, losses: Tensor) -> Tensor:
        return self.weights

    def get_weighted_loss(self, losses: Tensor, **kwargs: Any) -> tuple[Tensor, Outputs]:
        self._check(losses)  # the others' losses may be anything
        return losses[self.main_task], {"weights": self.weights}


class Uncertainty(LossMethod):
    """Learned log-variances t: Σ_k exp(−t_k) L_k / 2 + t_k / 2 (Kendall et al., CVPR 2018). Give `parameters()` to an
    optimizer."""

    def __init__(self, n_tasks: int, device: torch.device | str, **kwargs: Any) -> None:
        super().__init__(n_tasks, device, **kwargs)
        self.logsigma = torch.zeros(n_tasks, device=self.device, requires_grad=True)

    def get_weighted_losses(self, losses: Tensor, **kwargs: Any) -> tuple[Tensor, Outputs]:
        """See the base class."""
        self._check(losses)
        known, scales, transformed = losses.detach(), torch.ones_like(losses), losses
        if self.log:
            known, scales = known.log(), log_scales(known)
            transformed = with_gradient(losses, known, scales)
        precisions = (-self.logsigma).exp()
        self.weights = precisions.detach()
        source = Source(losses, self.weights * scales / 2, (self.logsigma, (1 - self.weights * known) / 2))
        return source.attach((precisions * transformed + self.logsigma) / 2), {"weights": self.weights}

    def parameters(self) -> list[Tensor]:
        return [self.logsigma]


class RLW(LossMethod):
    """Random weights, softmax of normals from torch's CPU generator (Lin et al., TMLR 2022)."""

    total: ClassVar[str] = "one"
    """Their sum: "one", or "tasks"."""

    def _weigh(self, losses: Tensor) -> Tensor:
        weights = torch.softmax(torch.randn(self.n_tasks, device="cpu"), dim=-1)
        return sent(self.n_tasks * weights if self.total == "tasks" else weights, losses.device)


class RuleMethod(LossMethod):
    """A rule of igb_kernels with a state."""

    def __init__(self, n_tasks: int, device: torch.device | str, rule: LossBalancer, **kwargs: Any) -> None:
        super().__init__(n_tasks, device, **kwargs)
        self._rule, self._started = rule, False

    def _step(self, losses: Tensor) -> Tensor:
        """The rule's scales [K] of a step with these losses, detached."""
        if not self._started:
            self._rule.start(self.n_tasks, losses.device)
            self._started = True
        scales, status = self._rule.scales(losses, _run(losses))
        self._rule.commit(losses, scales, status)
        return scales


class DynamicWeightAverage(RuleMethod):
    """K softmax(r / temp), r the ratio of the mean losses of the last `iteration_window` steps to those of the steps
    before them (Liu et al., CVPR 2019)."""

    reduction: ClassVar[str] = "sum"
    """Of the weighted losses: "sum", or "mean"."""

    def __init__(
        self, n_tasks: int, device: torch.device | str, iteration_window: int = 25, temp: float = 2.0, **kwargs: Any
    ) -> None:
        super().__init__(n_tasks, device, losses.DWA(temp, iteration_window, placeholder_ones=True), **kwargs)
        self.iteration_window = iteration_window
        self.running_iterations = 0

    def _weigh(self, losses: Tensor) -> Tensor:
        weights = self._step(losses)
        self.running_iterations += 1
        return weights if self.running_iterations > self.iteration_window + 1 else torch.ones_like(weights)

    def get_weighted_losses(self, losses: Tensor, **kwargs: Any) -> tuple[Tensor, Outputs]:
        """See the base class."""
        weighted, outputs = super().get_weighted_losses(losses)
        return (weighted / self.n_tasks if self.reduction == "mean" else weighted), outputs


def sent(numbers: Tensor, device: torch.device) -> Tensor:
    """Numbers from the CPU, on the device; nothing waits."""
    if device.type == "cuda":
        numbers = numbers.pin_memory()  # from the caching allocator, which keeps it until the copy is done
    return numbers.to(device, non_blocking=True)


def _run(tensor: Tensor) -> Backend:
    return resolve("auto", tensor.device.type)


# ---- Methods that work on gradients -------------------------------------------------------------------------------


class Given(LossBalancer):
    """Scales that are known before the step."""

    name = "given"
    card = losses.Unscaled.card
    values: Tensor | None = None
    """[K]; None: 1."""

    def start(self, tasks: int, device: torch.device) -> None:
        pass

    def scales(self, losses: Tensor, backend: Backend) -> tuple[Tensor, Tensor]:
        scales = torch.ones_like(losses) if self.values is None else self.of_step(self.values).to(losses.dtype)
        return scales, torch.zeros((), dtype=torch.int32, device=losses.device)


class GradientMethod(WeightMethod):
    """Weights from the tasks' gradients on the shared parameters.

    Task-specific parameters, and all others that the losses depend on, get the gradient of the weighted loss, or, where
    `heads` is "scaled", each that of its own loss.

    `result` is what the last `backward` did, a `igb_kernels.result.BalanceResult`.
    """

    heads: ClassVar[str] = "weighted"
    log_eps: ClassVar[float | None] = None
    """The method balances log(L + log_eps); None: L."""

    def __init__(
        self, n_tasks: int, device: torch.device | str, balancing: GradientBalancer, max_norm: float = 0.0
    ) -> None:
        super().__init__(n_tasks, device, max_norm)
        self.result: BalanceResult | None = None
        self._balancing, self._given = balancing, Given()
        self._balancer: Balancer | None = None

    def backward(
        self,
        losses: Tensor,
        shared_parameters: Tensors = None,
        task_specific_parameters: Tensors = None,
        last_shared_parameters: Tensors = None,
        representation: Tensors = None,
        **kwargs: Any,
    ) -> tuple[Tensor | None, Outputs | None]:
        """See the base class."""
        return self._balance(losses, shared_parameters, task_specific_parameters)

    def _balance(
        self, losses: Tensor, shared_parameters: Tensors, own: Tensors, representation: list[Tensor] | None = None
    ) -> tuple[Tensor | None, Outputs | None]:
        """What `backward` does; gradients are compared at the representation, if one is given."""
        if shared_parameters is None:
            raise ValueError(f"shared_parameters must be given to {type(self).__name__}, found None")
        shared = listed(shared_parameters)
        source, values = self._seen(losses)
        self._given.values = source.scales
        balancer = self._balancer_of(source.losses, shared, listed(own))
        self._clip(shared, "before")
        self.result = balancer.backward(source.losses, representation=representation)
        self._clip(shared, "after")
        if source.learned is not None:
            parameter, gradient = source.learned
            weights = self.result.weights if self.heads == "weighted" else 1
            gradient = (weights * gradient).to(parameter.dtype)
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return self._outcome(values, self.result)

    def _seen(self, losses: Tensor) -> tuple[Source, Tensor]:
        """Where passes begin, and the values that the method balances, detached."""
        values = losses.detach() if isinstance(losses, Tensor) else torch.stack([loss.detach() for loss in losses])
        if self.log_eps is None:
            return Source.of(losses), values
        return Source(losses, log_scales(values, self.log_eps)), (values + self.log_eps).log()

    def _balancer_of(self, losses: Tensor, shared: list[Tensor], own: list[Tensor]) -> Balancer:
        """The balancer for these parameters. What a method remembers is its own, and outlives them."""
        before = self._balancer
        if before is not None and [*map(id, shared)] == [*map(id, before.shared)]:
            return before
        options: dict[str, Any] = {}
        if self.heads == "weighted":
            known = {id(p) for p in shared}
            reached = {id(p): p for p in [*own, *_leaves_of(losses)[0]] if id(p) not in known}
            if reached:
                options = {"heads": "weighted", "task_parameters": reached.values()}
        self._balancer = Balancer(self._balancing, self._given, shared=shared, tasks=self.n_tasks, **options)
        return self._balancer

    def _outcome(self, values: Tensor, result: BalanceResult) -> tuple[Tensor | None, Outputs | None]:
        """What `backward` returns; `values` are the losses [K] that the method saw."""
        weights = result.weights
        return (weights.to(values.dtype) * values).sum(), {"weights": weights.to(values.dtype)}


def _leaves_of(losses: Tensor, cut: Iterable[Tensor] = ()) -> tuple[list[Tensor], bool]:
    """The leaf tensors that losses depend on other than through `cut`, and whether they depend on that."""
    return leaves(map(edge_of, TaskLosses(losses, None).roots), {edge_of(tensor) for tensor in cut})


class WeightedLossMethod(GradientMethod):
    """A gradient method that has a weighted loss: Σ_k w_k L_k with the weights w held constant."""

    params: str = "shared"
    """Where gradients are compared: "shared", "last" (shared parameters) or "rep" (the shared representation)."""

    def get_weighted_loss(
        self,
        losses: Tensor,
        shared_parameters: Tensors = None,
        last_shared_parameters: Tensors = None,
        representation: Tensors = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Outputs]:
        """The weighted loss and extra outputs. It takes K passes back to where gradients are compared, and the graph is
        kept for the pass of the weighted loss itself; `backward` needs no further one."""
        places = {"shared": shared_parameters, "last": last_shared_parameters, "rep": representation}
        tensors = listed(places[self.params])
        if not tensors:
            raise ValueError(f"{PLACES[self.params]} must be given where params is {self.params!r}, found none")
        source, values = self._seen(losses)
        self.result = self._solved(source, tensors)
        _, outputs = self._outcome(values, self.result)
        weights = self.result.weights.to(values.dtype)
        if self.log_eps is not None and source.scales is not None:
            losses = with_gradient(losses, values, source.scales)
        return (weights * losses).sum(), outputs or {}

    def backward(
        self,
        losses: Tensor,
        shared_parameters: Tensors = None,
        task_specific_parameters: Tensors = None,
        last_shared_parameters: Tensors = None,
        representation: Tensors = None,
        **kwargs: Any,
    ) -> tuple[Tensor | None, Outputs | None]:
        """See the base class."""
        if self.params == "shared":
            return self._balance(losses, shared_parameters, task_specific_parameters)
        if self.params == "rep" and shared_parameters is not None:
            shared, tensors = listed(shared_parameters), listed(representation)
            around = {id(p) for p in shared}.intersection(map(id, _leaves_of(Source.of(losses).losses, tensors)[0]))
            if tensors and not around:
                return self._balance(losses, shared, task_specific_parameters, tensors)
            warn_once(
                f"{type(self).__name__}: the losses depend on {len(around)} shared parameters other than through the "
                "representation, so the heads are run once more after the weights are known"
            )
        loss, outputs = self.get_weighted_loss(
            losses, last_shared_parameters=last_shared_parameters, representation=representation
        )
        self._clip(shared_parameters, "before")
        loss.backward()  # type: ignore[no-untyped-call]
        self._clip(shared_parameters, "after")
        return loss.detach(), outputs

    def _solved(self, source: Source, tensors: list[Tensor]) -> BalanceResult:
        """Weights from the gradients of the scaled losses at these tensors, which stay as they are."""
        method = self._balancing
        read = TaskLosses(source.losses, None, tasks=(self.n_tasks, "as n_tasks says"))
        if read.active is not None:
            raise ValueError(f"losses must all require grad, found that only those of the tasks {[*read.active]} do")
        method.start(self.n_tasks, read.values.device)
        scales = torch.ones_like(read.values) if source.scales is None else source.scales
        gram = None
        if method.needs() is Needs.HELD:
            weights, status = method.held_weights().clone(), torch.zeros((), dtype=torch.int32, device=scales.device)
        else:
            grads = [
                torch.autograd.grad(root, tensors, seed, retain_graph=True, allow_unused=True)
                for root, seed in zip(read.roots, read.seeds(scales), strict=True)
                if root is not None
            ]
            gram = ops.gram(grads)
            weights, status = method.solve(gram, read.values, scales, _run(gram))
        method.commit(status)
        return BalanceResult(None, read.values, scales, weights, status, gram)


PLACES = {"shared": "shared_parameters", "last": "last_shared_parameters", "rep": "representation"}


# ---- As the originals scale and draw ------------------------------------------------------------------------------


class TimesTasks(GradientBalancer):
    """In front of a method: its weights times K, so that they compare with those of a sum."""

    def solve(self, measured: Tensor, losses: Tensor, scales: Tensor, backend: Backend) -> tuple[Tensor, Tensor]:
        """See the base class."""
        weights, status = super().solve(measured, losses, scales, backend)
        return len(weights) * weights, status


class SummedMGDA(TimesTasks, gradients.MGDA):
    """MGDA with weights of sum K."""


class SummedCAGrad(TimesTasks, gradients.CAGrad):
    """CAGrad around the sum of the gradients."""


class ShuffledPCGrad(gradients.PCGrad):
    """PCGrad with the visits that `random.shuffle` orders, as the originals': so `random.seed` decides, and the same
    seed gives the same steps as theirs."""

    def __init__(self, tasks: int, reduction: str) -> None:
        super().__init__(seed=0, visit_self=True, reduction=reduction)
        self._order = range(tasks)

    def per_task(self) -> Tensor | None:
        """When each gradient visits each task [K, K]; drawn anew at every call."""
        order, times = list(self._order), []
        for _ in self._order:
            random.shuffle(order)
            times.append([float(order.index(k)) for k in self._order])
        assert self.state is not None, "start() comes first"
        return sent(torch.tensor(times, dtype=torch.float64, device="cpu"), self.state.device)


# ---- The methods of all three -------------------------------------------------------------------------------------


class NashMTL(WeightedLossMethod):
    """Nash-MTL (Navon et al., ICML 2022), solved exactly: see `igb_kernels.NashMTL`.

    Args:
        max_norm: see `WeightMethod`. Below √K it always clips.
        update_weights_every: the weights are those of the last multiple of it; steps in between take one pass.
        optim_niter: not used: there are no inner iterations to be counted.
    """

    def __init__(
        self,
        n_tasks: int,
        device: torch.device | str,
        max_norm: float = 1.0,
        update_weights_every: int = 1,
        optim_niter: int = 20,
    ) -> None:
        super().__init__(n_tasks, device, gradients.NashMTL(0.0, update_weights_every), max_norm)
        self.update_weights_every, self.optim_niter = update_weights_every, optim_niter


class MGDA(WeightedLossMethod):
    """MGDA (Désidéri, 2012; Sener & Koltun, NeurIPS 2018), solved exactly: see `igb_kernels.MGDA`. The weights have sum
    K and act on the gradients as they are, whatever the normalization.

    Args:
        params: where gradients are compared: "shared", "last" or "rep".
        normalization: what they are divided by before: "none", "norm", "loss" or "loss+" (both).
    """

    def __init__(
        self,
        n_tasks: int,
        device: torch.device | str,
        params: str = "shared",
        normalization: str = "none",
        max_norm: float = 0.0,
    ) -> None:
        if params not in PLACES:
            raise ValueError(f"params must be one of {list(PLACES)}, found {params!r}")
        if normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization must be one of {list(NORMALIZATIONS)}, found {normalization!r}")
        super().__init__(n_tasks, device, self._hull(NORMALIZATIONS[normalization]), max_norm)
        self.params, self.normalization = params, normalization

    def _hull(self, normalization: str) -> GradientBalancer:
        return SummedMGDA(normalization, apply_to="raw")

    def _seen(self, losses: Tensor) -> tuple[Source, Tensor]:
        if self.normalization in ("loss", "loss+") and self.log_eps is None:
            return Source(losses), losses.detach()  # it divides by the losses that it is given
        return super()._seen(losses)


NORMALIZATIONS = {"none": "none", "norm": "l2", "loss": "loss", "loss+": "loss+"}
"""Theirs to ours."""


class IMTLG(WeightedLossMethod):
    """IMTL-G (Liu et al., ICLR 2021): see `igb_kernels.IMTLG`."""

    def __init__(self, n_tasks: int, device: torch.device | str, max_norm: float = 0.0) -> None:
        super().__init__(n_tasks, device, gradients.IMTLG(), max_norm)


class PCGrad(GradientMethod):
    """PCGrad (Yu et al., NeurIPS 2020) in the originals' way: orders from Python's `random`, and each gradient visits
    itself, too. See `igb_kernels.PCGrad`.

    Args:
        reduction: "sum" or "mean" of the projected gradients of the shared parameters.
    """

    heads = "scaled"

    def __init__(self, n_tasks: int, device: torch.device | str, reduction: str = "sum", max_norm: float = 0.0) -> None:
        super().__init__(n_tasks, device, ShuffledPCGrad(n_tasks, reduction), max_norm)
        self.reduction = reduction

    def _outcome(self, values: Tensor, result: BalanceResult) -> tuple[Tensor | None, Outputs | None]:
        return None, {}


class CAGrad(GradientMethod):
    """CAGrad (Liu et al., NeurIPS 2021), solved exactly, divided by 1 + c² and times K: see `igb_kernels.CAGrad`.

    Args:
        c: the ball's radius relative to the mean gradient.
    """

    heads = "scaled"

    def __init__(self, n_tasks: int, device: torch.device | str, c: float = 0.4, max_norm: float = 0.0) -> None:
        super().__init__(n_tasks, device, SummedCAGrad(c, rescale=1), max_norm)
        self.c = c

    def _outcome(self, values: Tensor, result: BalanceResult) -> tuple[Tensor | None, Outputs | None]:
        return None, {}
