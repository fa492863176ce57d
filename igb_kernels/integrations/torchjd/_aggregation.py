"""TorchJD's aggregators, on rows of gradients where they are, or on a Jacobian matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor
from torchjd import Stateful, aggregation
from torchjd.aggregation import (
    Aggregator,
    ConstantWeighting,
    GramianWeightedAggregator,
    MeanWeighting,
    RandomWeighting,
    SumWeighting,
    WeightedAggregator,
    Weighting,
)
from torchjd.linalg import DualConeProjector, Matrix, PSDMatrix

from igb_kernels import gradients, ops
from igb_kernels._log import warn_once
from igb_kernels.backends import Backend, resolve
from igb_kernels.capture import GradsSetAside, TaskLosses
from igb_kernels.gradients import GradientBalancer
from igb_kernels.hooks import Capture
from igb_kernels.integrations.torchjd._weighting import (
    AlignedMTLWeighting,
    CAGradWeighting,
    ConFIGWeighting,
    DualProjWeighting,
    FairGradWeighting,
    GradVacWeighting,
    HoldsMethod,
    IMTLGWeighting,
    MGDAWeighting,
    NashMTLWeighting,
    PCGradWeighting,
    UPGradWeighting,
)
from igb_kernels.ops import accumulator_dtype
from igb_kernels.passes import Passes, Step
from igb_kernels.status import Status, UsableSteps
from igb_kernels.store import Grads, KeptGradients, MovingAverages, Units


def to_write_over(tensors: Sequence[Tensor], rows: Sequence[Grads]) -> Sequence[Grads]:
    """The rows, with copies of what sums may be written over: of the first (or, where moving averages are in the rows'
    place, of the last) row's gradients, where a tensor has no `.grad` yet."""
    copied = [list(row) for row in rows]
    for row in {id(copied[0]): copied[0], id(copied[-1]): copied[-1]}.values():
        for p, (t, g) in enumerate(zip(tensors, row, strict=True)):
            if t.grad is None and g is not None:
                row[p] = g.clone()
    return copied


Aggregate = Callable[[Sequence[Tensor], Sequence[Grads]], Tensor | None]
"""Adds the update to `.grad` of P tensors from m rows of P gradients, which may be written over; returns
the weights [m], if there are any."""


def _of_weighting(name: str) -> Any:
    """An aggregator's property that is its weighting's."""
    return property(
        lambda self: getattr(self.gramian_weighting, name),
        lambda self, value: setattr(self.gramian_weighting, name, value),
    )


class _WeightingOfMatrix(Weighting[Matrix]):
    """A Gramian's weighting, of a matrix; the Gramian is in float64."""

    def __init__(self, weighting: Weighting[PSDMatrix]) -> None:
        super().__init__()
        self.weighting = weighting

    def forward(self, matrix: Matrix, /) -> Tensor:
        weights: Tensor = self.weighting(ops.gram(matrix))
        return weights.to(accumulator_dtype(matrix.dtype))


class GramianAggregator(GramianWeightedAggregator):
    """Weights from the Gramian, which is formed in float64, and their sum of the rows; without a graph.

    On a float16 or bfloat16 Jacobian the weights are float32.

    Args:
        gramian_weighting: what gives the weights.
    """

    def __init__(self, gramian_weighting: Weighting[PSDMatrix]) -> None:
        GramianWeightedAggregator.__init__(self, gramian_weighting)  # not that of TorchJD's class in between
        self.weighting = _WeightingOfMatrix(gramian_weighting)

    @torch.no_grad()
    def forward(self, matrix: Matrix, /) -> Tensor:
        """The weighted sum [n] of the matrix's rows, [m, n]."""
        weights = self.weighting(matrix)
        vector = matrix.new_empty(matrix.shape[1])
        ops.combine_([vector], matrix, weights)
        return vector  # type: ignore[no-any-return]

    @property
    def status(self) -> Tensor | None:
        """Bits of `igb_kernels.Status` of the last call, int32 [] on the rows' device; None before it."""
        return getattr(self.gramian_weighting, "status", None)


class UPGrad(GramianAggregator, aggregation.UPGrad):
    """Each row is projected on the dual cone of all rows, and the projections are added (Quinton & Rey, 2024). Exact:
    the update ascends no task, whatever the rows' lengths.

    Args:
        pref_vector: factors [m] on the projections, at least 0; None: 1/m.
        projector: what projects; None: `ConeProjector()`. `ConeProjector(reg_eps=1e-4)` is as TorchJD's own default.
    """

    def __init__(self, pref_vector: Tensor | None = None, projector: DualConeProjector | None = None) -> None:
        GramianAggregator.__init__(self, UPGradWeighting(pref_vector, projector))


class DualProj(GramianAggregator, aggregation.DualProj):
    """The projection of the rows' mean on their dual cone (Lopez-Paz & Ranzato, NeurIPS 2017), exact.

    Args:
        pref_vector: factors [m] on the rows, at least 0; None: 1/m.
        projector: as for `UPGrad`.
    """

    def __init__(self, pref_vector: Tensor | None = None, projector: DualConeProjector | None = None) -> None:
        GramianAggregator.__init__(self, DualProjWeighting(pref_vector, projector))


class AlignedMTL(GramianAggregator, aggregation.AlignedMTL):
    """Aligned-MTL (Senushkin et al., CVPR 2023), also where rows differ in length by far.

    Args:
        pref_vector: factors [m] on the rows, at least 0; None: 1/m.
        scale_mode: "min", "median" or "rmse".
    """

    def __init__(self, pref_vector: Tensor | None = None, scale_mode: str = "min") -> None:
        GramianAggregator.__init__(self, AlignedMTLWeighting(pref_vector, scale_mode))


class CAGrad(GramianAggregator, aggregation.CAGrad):
    """CAGrad (Liu et al., NeurIPS 2021), exact, and at any scale of the rows.

    Args:
        c: the ball's radius, in lengths of the mean row.
        norm_eps: accepted and kept; there is nothing that it would have to prevent.
    """

    def __init__(self, c: float, norm_eps: float = 0.0001) -> None:
        GramianAggregator.__init__(self, CAGradWeighting(c, norm_eps))


class ConFIG(GramianAggregator):
    """ConFIG (Liu et al., 2024) from the Gramian alone.

    Args:
        pref_vector: the ratios [m] of the update's cosines with the rows, at least 0; None: ones.
    """

    def __init__(self, pref_vector: Tensor | None = None) -> None:
        super().__init__(ConFIGWeighting(pref_vector))

    @property
    def pref_vector(self) -> Tensor | None:
        """The preference [m], or None."""
        return self.gramian_weighting.pref_vector  # type: ignore[no-any-return]

    @pref_vector.setter
    def pref_vector(self, value: Tensor | None) -> None:
        self.gramian_weighting.pref_vector = value

    def __repr__(self) -> str:
        return f"ConFIG(pref_vector={self.pref_vector!r})"


class FairGrad(GramianAggregator, aggregation.FairGrad):
    """FairGrad (Ban & Ji, ICML 2024), solved by Newton's method.

    Args:
        alpha: the kind of fairness, at least 0; 0: the mean.
        max_iters: accepted and kept; the weights are exact, also where scipy's iterations run out.
    """

    def __init__(self, alpha: float, max_iters: int | None = None) -> None:
        GramianAggregator.__init__(self, FairGradWeighting(alpha, max_iters))


class GradVac(GramianAggregator, aggregation.GradVac):
    """GradVac (Wang et al., ICLR 2021); the rows' random orders are those that TorchJD draws with the same seed.

    Args:
        beta: how fast the goals follow, 0 to 1.
        eps: added to both divisors.
    """

    def __init__(self, beta: float = 0.5, eps: float = 1e-8) -> None:
        GramianAggregator.__init__(self, GradVacWeighting(beta, eps))


class IMTLG(GramianAggregator, aggregation.IMTLG):
    """IMTL-G (Liu et al., ICLR 2021), also where float32 rows differ in length by far."""

    def __init__(self) -> None:
        GramianAggregator.__init__(self, IMTLGWeighting())


class MGDA(GramianAggregator, aggregation.MGDA):
    """MGDA (Désidéri, 2012; Sener & Koltun, NeurIPS 2018): the shortest convex combination of the rows, exact.

    Args:
        epsilon, max_iters: accepted and kept; the weights are those that TorchJD's iterations go towards.
    """

    def __init__(self, epsilon: float = 0.001, max_iters: int = 100) -> None:
        GramianAggregator.__init__(self, MGDAWeighting(epsilon, max_iters))


class PCGrad(GramianAggregator, aggregation.PCGrad):
    """PCGrad (Yu et al., NeurIPS 2020); the rows' random orders are those that TorchJD draws with the same seed."""

    def __init__(self) -> None:
        GramianAggregator.__init__(self, PCGradWeighting())


class NashMTL(GramianAggregator, Stateful):
    """Nash-MTL (Navon et al., ICML 2022), solved by Newton's method.

    Args:
        n_tasks: m.
        max_norm: the update's norm is clipped to this; 0: no clipping.
        update_weights_every: after how many calls the weights are computed anew.
        optim_niter: accepted and kept; the weights are exact.
    """

    def __init__(
        self, n_tasks: int, max_norm: float = 1.0, update_weights_every: int = 1, optim_niter: int = 20
    ) -> None:
        super().__init__(NashMTLWeighting(n_tasks, max_norm, update_weights_every, optim_niter))

    n_tasks = _of_weighting("n_tasks")
    max_norm = _of_weighting("max_norm")
    update_weights_every = _of_weighting("update_weights_every")
    optim_niter = _of_weighting("optim_niter")

    def reset(self) -> None:
        """Forgets the weights, and how many calls there were."""
        self.gramian_weighting.reset()

    def __repr__(self) -> str:
        return repr(self.gramian_weighting).replace("Weighting", "", 1)


class MethodAggregator(HoldsMethod, Aggregator):
    """A gradient-balancing method of this package as an aggregator, also one that goes by the elements of gradients or
    by their moving averages::

        aggregator = MethodAggregator(igb_kernels.DBMTL(beta=0.9))

    Loss balancing that is part of a method (DB-MTL's logarithm) is left to the caller: give `backward` the logarithms.
    Moving averages start anew where rows of other shapes come.

    Args:
        method: the method; it is copied.
    """

    def __init__(self, method: GradientBalancer) -> None:
        super().__init__()
        self.hold(method)
        self._averages = MovingAverages()
        self._layout: object = None  # of the rows that these are averages of

    @torch.no_grad()
    def forward(self, matrix: Matrix, /) -> Tensor:
        """The update [n] from a Jacobian [m, n]."""
        vector = matrix.new_empty(matrix.shape[1]).requires_grad_()
        self.aggregate([vector], to_write_over([vector], [[row] for row in matrix.unbind()]))
        return vector.grad  # type: ignore[no-any-return]

    @torch.no_grad()
    def aggregate(self, tensors: Sequence[Tensor], rows: Sequence[Grads]) -> Tensor | None:
        """Adds the update to `.grad` of the tensors, from m rows of their gradients, which may be written over; returns
        the weights [m], float64."""
        device = tensors[0].device
        losses = self.start(len(rows), device)
        passes = Passes(self.method, tensors, "scaled", [], "auto", None, Capture(tensors))
        passes.averages = self._averages_for(tensors)
        scales = torch.ones_like(losses)
        with GradsSetAside(tensors) as before, GradsSetAside([]) as none:
            tasks = TaskLosses(losses, None, need_graph=False)
            step = Step(tasks, tasks.ids, losses, scales, scales, Units(), rows, False, before, none)
            done = passes.run(step, [])
            if done.stored is not None:
                done.stored.commit(done.status)
            self.method.commit(done.status)
        self.status = done.status
        return done.weights

    def _averages_for(self, tensors: Sequence[Tensor]) -> MovingAverages:
        device, shapes = tensors[0].device, [(t.shape, accumulator_dtype(t.dtype)) for t in tensors]
        if (shapes, device) != self._layout:
            rows = self._averages.rows()
            fits = all(
                [a is None or (a.shape, a.dtype) == s for a, s in zip(row, shapes, strict=False)] for row in rows
            )
            kept = [[None if a is None else a.to(device) for a in row] for row in rows]
            self._averages, self._layout = MovingAverages(kept if fits else []), (shapes, device)
        return self._averages

    def reset(self) -> None:
        """Forgets the method's state."""
        super().reset()
        self._averages, self._layout = MovingAverages(), None

    def get_extra_state(self) -> dict[str, Any]:
        """The method's state, as a part of `state_dict`."""
        return {**super().get_extra_state(), "averages": self._averages.rows()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes the method's state from `state_dict`'s."""
        super().set_extra_state(state)
        averages = [[None if a is None else a.clone() for a in row] for row in state["averages"]]
        self._averages, self._layout = MovingAverages(averages), None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.method!r})"


class DBMTL(MethodAggregator):
    """DB-MTL (Lin et al., 2023) on the rows as they are; the paper's are those of the losses' logarithms.

    Args:
        beta: decay of the moving averages of the rows, 0 to 1 (1 excluded).
        sigma: exponent with which the decay fades.
        options: as for `igb_kernels.DBMTL`.
    """

    def __init__(self, beta: float = 0.9, sigma: float = 0.0, **options: Any) -> None:
        super().__init__(gradients.DBMTL(beta, sigma, **options))


class EMTL(MethodAggregator):
    """EMTL (our formulation, see `igb_kernels.EMTL`) evens out loss over gradient norm. Set `losses` before each call::

        aggregator.losses = torch.stack(losses)
        jac_to_grad(encoder.parameters(), aggregator)

    Args:
        lam: strength of the variance term; 0: rows of equal length.
        options: as for `igb_kernels.EMTL`.
    """

    def __init__(self, lam: float = 0.5, **options: Any) -> None:
        super().__init__(gradients.EMTL(lam, **options))


class GradDrop(MethodAggregator):
    """GradDrop (Chen et al., NeurIPS 2020). The random numbers come from a generator of the kernel's, whose seed is
    drawn from torch's in the first call: they are not those of TorchJD.

    Args:
        f: what the share of positive gradients is mapped by; None: nothing. With one, TorchJD itself aggregates.
        leak: the share [m] of each row, 0 to 1, that always passes.
    """

    def __init__(self, f: Callable[[Tensor], Tensor] | None = None, leak: Tensor | None = None) -> None:
        super().__init__(gradients.GradDrop(leak))
        self.f, self._leak = f, leak

    @property
    def leak(self) -> Tensor | None:
        """The leak [m], or None."""
        return self._leak

    @leak.setter
    def leak(self, value: Tensor | None) -> None:
        drawn = self.method.state
        self.method, self._leak = gradients.GradDrop(value), value
        self.method.state = drawn

    def aggregate(self, tensors: Sequence[Tensor], rows: Sequence[Grads]) -> None:
        """As for other methods; there are no weights to return."""
        super().aggregate(tensors, rows)

    @torch.no_grad()
    def forward(self, matrix: Matrix, /) -> Tensor:
        """The update [n] from a Jacobian [m, n]."""
        if self.f is None:
            return super().forward(matrix)
        warn_once("GradDrop with a function f is aggregated by TorchJD: the kernel has none")
        vector: Tensor = aggregation.GradDrop(self.f, self._leak)(matrix)
        return vector

    def __repr__(self) -> str:
        return f"GradDrop(f={self.f!r}, leak={self._leak!r})"


class _WarmExcessMTL(gradients.ExcessMTL):
    """With TorchJD's warm-up: in its calls the weights are 1/m, and the baselines are the excess risks' means then."""

    def __init__(self, eta: float, warmup: int) -> None:
        super().__init__(eta, parity="torchjd")
        self.warmup = warmup
        self._warm = UsableSteps()
        self._sums: Tensor | None = None  # of the excess risks [m], while they warm up

    def solve(self, measured: Tensor, losses: Tensor, scales: Tensor, backend: Backend) -> tuple[Tensor, Tensor]:
        assert self.state is not None, "start() comes first"
        if self._warm.count < self.warmup:
            self._next_state = None
            finite = measured.isfinite().all()
            seen = torch.where(finite, measured, 0.0)
            self._sums = seen if self._sums is None else self._sums.to(seen.device) + seen
            weights = torch.where(finite, torch.full_like(measured, 1 / len(measured)), torch.nan)
            return weights, (~finite).int() * int(Status.NON_FINITE)
        if self._sums is not None:
            self.state[: len(measured)] = self._sums / self._warm.count
            self._sums = None
        return super().solve(measured, losses, scales, backend)

    def commit(self, status: Tensor) -> None:
        if self._next_state is None:
            self._warm.add(status)
        super().commit(status)

    def state_dict(self) -> dict[str, Any]:
        """See the base class."""
        return {**super().state_dict(), "warm": self._warm.count, "sums": self._sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See the base class."""
        super().load_state_dict(state)
        self._warm, self._sums = UsableSteps(state["warm"]), state["sums"]


class ExcessMTL(MethodAggregator):
    """ExcessMTL (He et al., ICML 2024), with TorchJD's arguments and weights.

    Two sets of m accumulated squares are kept, so that a call whose rows are not finite leaves them as they were.

    Args:
        robust_step_size: step size of the weights, above 0.
        n_warmup_steps: calls in which the weights are 1/m, and after which the mean excess risk is the baseline.
    """

    method: _WarmExcessMTL

    def __init__(self, robust_step_size: float = 1.0, n_warmup_steps: int = 0) -> None:
        super().__init__(_WarmExcessMTL(robust_step_size, n_warmup_steps))
        self.robust_step_size, self.n_warmup_steps = robust_step_size, n_warmup_steps

    @property
    def robust_step_size(self) -> float:
        """Step size of the weights."""
        return self.method.eta

    @robust_step_size.setter
    def robust_step_size(self, value: float) -> None:
        if not value > 0:
            raise ValueError(f"robust_step_size must be above 0, found {value!r}")
        self.method.eta = float(value)

    @property
    def n_warmup_steps(self) -> int:
        """Calls in which the weights are 1/m."""
        return self.method.warmup

    @n_warmup_steps.setter
    def n_warmup_steps(self, value: int) -> None:
        if value < 0:
            raise ValueError(f"n_warmup_steps must be at least 0, found {value!r}")
        self.method.warmup = value

    def __repr__(self) -> str:
        return f"ExcessMTL(robust_step_size={self.robust_step_size!r}, n_warmup_steps={self.n_warmup_steps!r})"


# ---- What jac_to_grad can do without making the rows one matrix -----------------------------------------------------

BY_NUMBER = (MeanWeighting, SumWeighting, ConstantWeighting, RandomWeighting)
"""Weightings that look at the matrix's shape, dtype and device alone."""


def aggregate_of(aggregator: Aggregator) -> Aggregate | None:
    """How the aggregator takes rows that are no matrix; None where it, or a hook on it, must see one."""
    if _has_hooks(aggregator):
        return None
    if isinstance(aggregator, MethodAggregator):
        return None if isinstance(aggregator, GradDrop) and aggregator.f is not None else aggregator.aggregate
    plain = type(aggregator).forward in (GramianAggregator.forward, WeightedAggregator.forward)
    if not plain or not isinstance(aggregator, WeightedAggregator) or _has_hooks(aggregator.weighting):
        return None
    if isinstance(aggregator, GramianWeightedAggregator):
        return partial(_by_gramian, aggregator)
    return partial(_by_number, aggregator) if type(aggregator.weighting) in BY_NUMBER else None


def _has_hooks(module: torch.nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _by_gramian(aggregator: GramianWeightedAggregator, tensors: Sequence[Tensor], rows: Sequence[Grads]) -> Tensor:
    kept = _kept(tensors, rows)
    gram = kept.gram()
    if not isinstance(aggregator, GramianAggregator):  # another's weighting may count on the Jacobian's dtype
        gram = gram.to(dtype_of(tensors))
    return _write(kept, aggregator.gramian_weighting(gram))


def _by_number(aggregator: WeightedAggregator, tensors: Sequence[Tensor], rows: Sequence[Grads]) -> Tensor:
    matrix = torch.empty(len(rows), 0, dtype=dtype_of(tensors), device=tensors[0].device)
    return _write(_kept(tensors, rows), aggregator.weighting(matrix))


def dtype_of(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype of the tensors' Jacobians, were they one matrix."""
    return reduce(torch.promote_types, [t.dtype for t in tensors])


def _kept(tensors: Sequence[Tensor], rows: Sequence[Grads]) -> KeptGradients:
    kept = KeptGradients(tensors, resolve("auto", tensors[0].device.type), Units())
    for row in rows:
        kept.add(row)
    return kept


def _write(kept: KeptGradients, weights: Tensor) -> Tensor:
    tasks = len(kept.rows) // len(kept.params)
    if weights.shape != (tasks,):
        raise ValueError(f"a weighting must give {tasks} weights, one for each row; found {tuple(weights.shape)}")
    with torch.no_grad(), GradsSetAside(kept.params) as before:
        before.make_plain("tensors")
        kept.write(weights.double(), before.previous)
    return weights
