"""TorchJD's weightings: what they say is found exactly, in float64, by the kernels' solvers."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchjd import Stateful, aggregation
from torchjd.aggregation import ConstantWeighting, MeanWeighting, Weighting
from torchjd.linalg import DualConeProjector, PSDMatrix

from igb_kernels import ops
from igb_kernels._log import warn_once
from igb_kernels.backends import resolve
from igb_kernels.gradients import GradientBalancer, NashMTL
from igb_kernels.gradients._visits import STATE_COUNT
from igb_kernels.gradients.aligned_mtl import SCALES
from igb_kernels.gradients.base import Needs, check_number

SDM_GRAD_EPS = 1e-8
"""What TorchJD's SDMGrad adds to the squared mean norm."""


class ConeProjector(DualConeProjector):
    """Projects on the dual cone of a matrix's rows by an active-set method: exactly, on the rows' device.

    Args:
        reg_eps: projects with G + reg_eps · trace(G) · I in place of G. 0 is exact: the projection ascends no task,
            whatever the rows' lengths. `QuadprogProjector` takes 1e-4, and leaves conflicts where lengths differ; it
            also takes G for 0 where its trace is below `norm_eps`, which this one never does.
    """

    def __init__(self, *, reg_eps: float = 0.0) -> None:
        self.reg_eps = check_number("reg_eps", reg_eps, 0)

    @torch.no_grad()
    def __call__(self, U: Tensor, G: PSDMatrix) -> Tensor:
        """Weights like U, [..., m], in G's dtype, of the projections of Jᵀu on {d : J d ≥ 0}, where G = JJᵀ, [m, m].
        Where G is not finite they are NaN."""
        if U.shape[-1:] != G.shape[-1:]:
            raise ValueError(f"U must have {G.shape[-1]} columns as G has, found shape {tuple(U.shape)}")
        found = [ops.solve("dual_proj", G, per_task=u, reg_eps=self.reg_eps)[0] for u in U.reshape(-1, U.shape[-1])]
        return torch.stack(found).reshape(U.shape).to(G.dtype)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(reg_eps={self.reg_eps:g})"


class SolvedWeighting(Weighting[PSDMatrix]):
    """Weights from a Gramian by one call of `igb_kernels.ops.solve`, without a graph.

    They have the Gramian's dtype; they are found in float64. Nothing waits for a GPU, and nothing raises for what the
    Gramian holds: where it is not finite, all weights are NaN, state stays as it was, and `status` says so.
    """

    solver: ClassVar[str]
    status: Tensor | None = None
    """Bits of `igb_kernels.Status` of the last call, int32 [] on the Gramian's device."""

    def options(self) -> dict[str, float]:
        """The solver's options."""
        return {}

    def per_task(self, tasks: int, device: torch.device) -> Tensor | None:
        """The solver's numbers for each task."""
        return None

    def solver_state(self, tasks: int, device: torch.device) -> Tensor | None:
        """What the solver keeps from call to call, None: nothing."""
        return None

    @torch.no_grad()
    def forward(self, gramian: PSDMatrix, /) -> Tensor:
        """Weights [m] from the Gramian [m, m]."""
        tasks, device = len(gramian), gramian.device
        per_task, state = self.per_task(tasks, device), self.solver_state(tasks, device)
        weights, self.status = ops.solve(self.solver, gramian, None, per_task, state=state, **self.options())  # type: ignore[arg-type]
        return weights.to(gramian.dtype)


class StatefulSolvedWeighting(SolvedWeighting):
    """In front of one of TorchJD's that is Stateful: the solver's state starts anew where the number of rows changes,
    and is part of `state_dict`."""

    _kept: Tensor | None = None
    _kept_tasks = 0

    def solver_state(self, tasks: int, device: torch.device) -> Tensor | None:
        if self._kept is None or self._kept_tasks != tasks:
            self._kept = ops.SOLVERS[self.solver].new_state(tasks, device, **self.options())
            self._kept_tasks = tasks
        elif self._kept.device != device:
            self._kept = self._kept.to(device)
        return self._kept

    def reset(self) -> None:
        """Forgets the state."""
        super().reset()
        self._kept = None

    def get_extra_state(self) -> dict[str, Any]:
        """The state, as a part of `state_dict`."""
        return {"state": self._kept, "tasks": self._kept_tasks}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes the state from `state_dict`'s."""
        kept = state["state"]
        self._kept, self._kept_tasks = None if kept is None else kept.clone(), state["tasks"]


class PreferringWeighting(SolvedWeighting):
    """One with a preference vector: finite numbers, at least 0, one for each row."""

    @property
    def pref_vector(self) -> Tensor | None:
        """The preference [m], or None."""
        return self._pref_vector

    @pref_vector.setter
    def pref_vector(self, value: Tensor | None) -> None:
        if value is not None and not bool((value.isfinite() & (value >= 0)).all()):
            raise ValueError(f"pref_vector must hold finite numbers of at least 0, found {value.tolist()}")
        self.weighting = MeanWeighting() if value is None else ConstantWeighting(value)  # for TorchJD's own `forward`
        self._pref_vector = value

    def per_task(self, tasks: int, device: torch.device) -> Tensor | None:
        preference = self.pref_vector
        if preference is not None and len(preference) != tasks:
            raise ValueError(f"pref_vector must hold {tasks} numbers, one for each row; found {len(preference)}")
        return None if preference is None else preference.detach().to(device)


class _ProjectingWeighting(PreferringWeighting):
    """One that projects, by default exactly; `projector` may be any of TorchJD's."""

    @property
    def projector(self) -> DualConeProjector:
        """What projects."""
        return self._projector

    @projector.setter
    def projector(self, value: DualConeProjector | None) -> None:
        self._projector = ConeProjector() if value is None else value

    def options(self) -> dict[str, float]:
        return {"reg_eps": self._projector.reg_eps}

    @torch.no_grad()
    def forward(self, gramian: PSDMatrix, /) -> Tensor:
        if isinstance(self._projector, ConeProjector):
            return super().forward(gramian)
        self.status = None
        return super(SolvedWeighting, self).forward(gramian)  # type: ignore[no-any-return]


class UPGradWeighting(_ProjectingWeighting, aggregation.UPGradWeighting):
    """The weights of `UPGrad`."""

    solver = "upgrad"


class DualProjWeighting(_ProjectingWeighting, aggregation.DualProjWeighting):
    """The weights of `DualProj`."""

    solver = "dual_proj"


class AlignedMTLWeighting(PreferringWeighting, aggregation.AlignedMTLWeighting):
    """The weights of `AlignedMTL`."""

    solver = "aligned_mtl"

    def options(self) -> dict[str, float]:
        if self.scale_mode not in SCALES:
            raise ValueError(f"scale_mode must be one of {SCALES}, found {self.scale_mode!r}")
        return {"scale": float(SCALES.index(self.scale_mode))}


class CAGradWeighting(SolvedWeighting, aggregation.CAGradWeighting):
    """The weights of `CAGrad`."""

    solver = "cagrad"
    _REQUIRED_DEPS: ClassVar[list[str]] = []

    def options(self) -> dict[str, float]:
        return {"c": self.c}


class ConFIGWeighting(PreferringWeighting):
    """The weights of `ConFIG`, which TorchJD has as an aggregator alone.

    Args:
        pref_vector: the ratios [m] of the update's cosines with the rows, at least 0; None: ones.
    """

    solver = "config"

    def __init__(self, pref_vector: Tensor | None = None) -> None:
        super().__init__()
        self.pref_vector = pref_vector

    def __repr__(self) -> str:
        return f"{type(self).__name__}(pref_vector={self.pref_vector!r})"


class FairGradWeighting(SolvedWeighting, aggregation.FairGradWeighting):
    """The weights of `FairGrad`."""

    solver = "fairgrad"
    _REQUIRED_DEPS: ClassVar[list[str]] = []

    def options(self) -> dict[str, float]:
        return {"alpha": self.alpha}

    @torch.no_grad()
    def forward(self, gramian: PSDMatrix, /) -> Tensor:
        weights: Tensor = super().forward(gramian)
        return weights / len(weights) if self.alpha == 0 else weights  # TorchJD's limit is the mean


class IMTLGWeighting(SolvedWeighting, aggregation.IMTLGWeighting):
    """The weights of `IMTLG`."""

    solver = "imtl_g"


class MGDAWeighting(SolvedWeighting, aggregation.MGDAWeighting):
    """The weights of `MGDA`."""

    solver = "mgda"


class PCGradWeighting(SolvedWeighting, aggregation.PCGradWeighting):
    """The weights of `PCGrad`."""

    solver = "pcgrad"

    def solver_state(self, tasks: int, device: torch.device) -> Tensor:
        return torch.zeros(STATE_COUNT, dtype=torch.float64, device=device)  # of the solver's own orders, not used here

    def per_task(self, tasks: int, device: torch.device) -> Tensor:
        return _visits([torch.randperm(tasks) for _ in range(tasks)], device)


class GradVacWeighting(StatefulSolvedWeighting, aggregation.GradVacWeighting):
    """The weights of `GradVac`."""

    solver = "gradvac"

    def options(self) -> dict[str, float]:
        return {"beta": self.beta, "eps": self.eps}

    def per_task(self, tasks: int, device: torch.device) -> Tensor:
        others = torch.arange(tasks - 1)
        orders = [(others + (others >= i))[torch.randperm(tasks - 1)] for i in range(tasks)]
        return _visits([torch.cat([order, torch.tensor([i])]) for i, order in enumerate(orders)], device)


def _visits(orders: list[Tensor], device: torch.device) -> Tensor:
    """When each row visits the others, [m, m], from the order in which it does. Drawn by torch's global generator on
    the CPU, as TorchJD draws them: with the same seed, a training takes the same course."""
    times = torch.stack(orders).argsort(dim=1).double()
    return times.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else times.to(device)


class MoDoWeighting(StatefulSolvedWeighting, aggregation.MoDoWeighting):
    """Weights from J₁J₂ᵀ of two batches, as TorchJD's; the arguments are the same."""

    solver = "modo"

    def options(self) -> dict[str, float]:
        return {"gamma": self.gamma, "rho": self.rho}


class SDMGradWeighting(StatefulSolvedWeighting, aggregation.SDMGradWeighting):
    """Weights from J₁J₂ᵀ of two batches, as TorchJD's; the arguments are the same.

    With a `pref_vector` they are found by TorchJD itself.
    """

    solver = "sdm_grad"

    def options(self) -> dict[str, float]:
        return {
            "lam": self.lambda_,
            "lr": self.lr,
            "momentum": self.momentum,
            "iterations": float(self.n_iter),
            "eps": SDM_GRAD_EPS,
        }

    @torch.no_grad()
    def forward(self, gramian: PSDMatrix, /) -> Tensor:
        if self.pref_vector is None:
            return super().forward(gramian)
        warn_once("SDMGradWeighting with a pref_vector is solved by TorchJD: the kernels' pulls to equal weights")
        self.status = None
        return aggregation.SDMGradWeighting.forward(self, gramian)  # type: ignore[no-any-return]


class HoldsMethod(Stateful):
    """What holds a gradient-balancing method of this package, whose state is part of `state_dict`."""

    method: GradientBalancer
    """A copy of the one that was given."""
    losses: Tensor | None
    """The losses [m], for methods that go by them; to be set before each call then, which takes them."""
    status: Tensor | None
    """Bits of `igb_kernels.Status` of the last call, int32 [] on the rows' device."""

    def hold(self, method: GradientBalancer) -> None:
        """Comes after `torch.nn.Module.__init__`."""
        if not isinstance(method, GradientBalancer):
            raise TypeError(f"method must be a gradient-balancing method, found {type(method).__name__}")
        self.method = copy.deepcopy(method)
        self._initial = copy.deepcopy(self.method.state_dict())
        self._tasks: int | None = None
        self.losses = self.status = None

    def start(self, tasks: int, device: torch.device) -> Tensor:
        """Comes before each call; returns the losses, ones where the method does not use them."""
        if self._tasks not in (None, tasks):
            self.reset()
        self._tasks = tasks
        state = self.method.state
        if state is not None and state.device != device:
            self.method.state = state.to(device)
        self.method.start(tasks, device)
        if ops.SOLVERS[self.method.name].needs_losses or self.method.row_scales() is not None:
            losses, self.losses = self.losses, None
            if losses is None or losses.shape != (tasks,):
                found = None if losses is None else tuple(losses.shape)
                raise ValueError(f"losses must be set to {tasks} losses before each call, found {found}")
            return losses.detach().to(device)
        return torch.ones(tasks, dtype=torch.float64, device=device)

    def reset(self) -> None:
        """Forgets the method's state."""
        self.method.load_state_dict(copy.deepcopy(self._initial))
        self._tasks = None

    def get_extra_state(self) -> dict[str, Any]:
        """The method's state, as a part of `state_dict`."""
        return {"method": self.method.state_dict(), "tasks": self._tasks}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Takes the method's state from `state_dict`'s."""
        self.method.load_state_dict(copy.deepcopy(state["method"]))
        self._tasks = state["tasks"]


class MethodWeighting(HoldsMethod, Weighting[PSDMatrix]):
    """The weights of a gradient-balancing method of this package that goes by Gramian, norms or losses, for those that
    TorchJD does not have::

        weighting = MethodWeighting(igb_kernels.MetaBalance(target=0))

    Loss balancing that is part of a method (DB-MTL's logarithm) is left to the caller.

    Args:
        method: the method; it is copied.

    Raises:
        ValueError: in the first call where the method needs the gradients themselves.
    """

    def __init__(self, method: GradientBalancer) -> None:
        super().__init__()
        self.hold(method)

    @torch.no_grad()
    def forward(self, gramian: PSDMatrix, /) -> Tensor:
        """Weights [m], in the Gramian's dtype, from the Gramian [m, m]."""
        tasks, device = len(gramian), gramian.device
        losses = self.start(tasks, device)
        if self.method.ema_decay() is not None or self.method.needs() in (Needs.EXCESS, Needs.ELEMENTS):
            raise ValueError(f"method must go by the Gramian, found {self.method!r}: MethodAggregator takes it")
        scales = torch.ones_like(losses)
        weights, self.status = self.method.solve(gramian.double(), losses, scales, resolve("auto", device.type))
        self.method.commit(self.status)
        return weights.to(gramian.dtype)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.method!r})"


class NashMTLWeighting(MethodWeighting):
    """The weights of `NashMTL`, from the Gramian; the arguments are the same."""

    method: NashMTL

    def __init__(
        self, n_tasks: int, max_norm: float = 1.0, update_weights_every: int = 1, optim_niter: int = 20
    ) -> None:
        if n_tasks < 1:
            raise ValueError(f"n_tasks must be at least 1, found {n_tasks}")
        super().__init__(NashMTL(max_norm, update_weights_every))
        self.n_tasks, self.optim_niter = n_tasks, optim_niter

    @property
    def max_norm(self) -> float:
        """What the update's norm is clipped to, or 0."""
        return self.method.max_norm

    @max_norm.setter
    def max_norm(self, value: float) -> None:
        self.method.max_norm = NashMTL(value).max_norm

    @property
    def update_weights_every(self) -> int:
        """After how many calls the weights are computed anew."""
        return self.method.update_every

    @update_weights_every.setter
    def update_weights_every(self, value: int) -> None:
        self.method.update_every = NashMTL(update_every=value).update_every

    def forward(self, gramian: PSDMatrix, /) -> Tensor:
        """Weights [n_tasks] from the Gramian [n_tasks, n_tasks]."""
        if len(gramian) != self.n_tasks:
            raise ValueError(f"the Gramian must have n_tasks = {self.n_tasks} rows, found {len(gramian)}")
        return super().forward(gramian)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(n_tasks={self.n_tasks}, max_norm={self.max_norm}, "
            f"update_weights_every={self.update_weights_every}, optim_niter={self.optim_niter})"
        )
