"""STCH: the smooth maximum of the losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from igb_kernels import ops
from igb_kernels.backends.reference import LossProblem
from igb_kernels.card import Card
from igb_kernels.losses._means import BaseLosses
from igb_kernels.losses.base import LossBalancer
from igb_kernels.losses.log import TINY, unless_negative
from igb_kernels.status import Status

Numbers = Sequence[float] | Tensor


class STCH(LossBalancer):
    """Minimises a smooth maximum of the losses, for a chosen trade-off between them (Lin et al., ICML 2024,
    arXiv:2402.19078, equation 9).

    With preferences a and an ideal point z the scalarized loss is μ log Σ_k exp(a_k (L_k − z_k) / μ), so that
    s_k = a_k softmax(a (L − z) / μ)_k. It depends on the losses' units.

    With `nadir_epoch` or `nadir` it is K μ log Σ_k exp(a_k log(L_k / nadir_k) / μ), which does not, as in the authors'
    code: s_k = K a_k softmax(a log(L / nadir) / μ)_k / L_k. The nadir is the mean loss of one epoch, told by
    `Balancer.end_epoch`, or given; until it is known, the loss is Σ_k log L_k. Losses must not be negative then: for
    one that is, all scales are NaN and the status says NON_POSITIVE_LOSS.

    Args:
        mu: above 0; the smaller, the closer to the maximum.
        preference: K numbers a_k of at least 0, not all 0; by default 1/K each, and with a nadir 1.
        ideal: K numbers z_k: the losses' lowest values, or some that are out of reach; by default 0. Excludes a nadir.
        nadir_epoch: the epoch (from 0) whose mean losses are the nadir; of a task that it lacks, the next that has it.
        nadir: use these K positive numbers instead.
    """

    name = "stch"
    card = Card(
        title="STCH",
        paper="Lin et al., ICML 2024, arXiv:2402.19078",
        formula="a_k softmax(a (L - z) / mu)_k",
        inputs="losses",
        memory="nothing",
        passes="1",
        hazards="depends on the losses' units, unless it has a nadir; that needs end_epoch(), or nadir=",
        parity="nadir_epoch=4: the authors' code, LibMTL",
    )

    def __init__(
        self,
        mu: float = 1.0,
        *,
        preference: Numbers | None = None,
        ideal: Numbers | None = None,
        nadir_epoch: int | None = None,
        nadir: Numbers | None = None,
    ) -> None:
        super().__init__()
        if not 0 < mu < float("inf"):
            raise ValueError(f"mu must be a finite number above 0, found {mu!r}")
        if sum(given is not None for given in (ideal, nadir_epoch, nadir)) > 1:
            raise ValueError("ideal, nadir_epoch and nadir exclude each other")
        if nadir_epoch is not None and (not isinstance(nadir_epoch, int) or nadir_epoch < 0):
            raise ValueError(f"nadir_epoch must be None or an integer of at least 0, found {nadir_epoch!r}")
        self.mu, self.nadir_epoch = float(mu), nadir_epoch
        self.preference = _numbers("preference", preference)
        if self.preference is not None and not (bool((self.preference >= 0).all()) and bool(self.preference.any())):
            raise ValueError(f"preference must be at least 0 and not all 0, found {self.preference.tolist()}")
        self._point = _numbers("ideal", ideal) if nadir is None else _numbers("nadir", nadir)
        if nadir is not None and self._point is not None and not bool((self._point > 0).all()):
            raise ValueError(f"nadir must be positive, found {self._point.tolist()}")
        self._of_logs = nadir is not None or nadir_epoch is not None
        self._measured = None if nadir_epoch is None else BaseLosses(nadir_epoch)
        self._per_task: Tensor | None = None  # [2, K]: preferences, and the ideal point or nadir (NaN while unknown)

    @property
    def nadir(self) -> Tensor | None:
        """The nadir [K], float64, NaN until it is known; None without one, or before the first step."""
        return self._per_task[1] if self._of_logs and self._per_task is not None else None

    def start(self, tasks: int, device: torch.device) -> None:
        self._per_task = self._known(tasks, device)
        if self._measured is not None:
            self._measured.start(tasks, device)

    def _known(self, tasks: int, device: torch.device) -> Tensor:
        """`per_task` as far as the arguments tell."""
        for name, given in (("preference", self.preference), ("nadir" if self._of_logs else "ideal", self._point)):
            if given is not None and len(given) != tasks:
                raise ValueError(f"{name} must have one number for each of the {tasks} tasks, found {len(given)}")
        preference = torch.full((tasks,), 1.0 if self._of_logs else 1 / tasks, dtype=torch.float64)
        point = torch.full((tasks,), 0.0 if self.nadir_epoch is None else torch.nan, dtype=torch.float64)
        rows = ((self.preference, preference), (self._point, point))
        return torch.stack([default if given is None else given for given, default in rows]).to(device)

    def options(self) -> dict[str, float]:
        return {"mu": self.mu, "of_logs": float(self._of_logs)}

    def per_task(self) -> Tensor | None:
        if self.active is None or self._per_task is None:
            return self._per_task
        numbers = self.active.part(self._per_task)
        if self.preference is None and not self._of_logs:
            numbers[0] = 1 / len(self.active.ids)
        return numbers

    def commit(self, losses: Tensor, scales: Tensor, status: Tensor) -> None:
        if self._measured is not None:
            self._measured.add(losses, status, self.active)

    def end_epoch(self) -> None:
        if self._measured is not None:
            self._measured.end_epoch()
            nadir = self._measured.value()
            if nadir is not None and self._per_task is not None:
                self._per_task[1].copy_(nadir)  # in place, where the replays of a CUDA graph read it

    def state_dict(self) -> dict[str, Any]:
        """See the base class."""
        measured = None if self._measured is None else self._measured.state_dict()
        return {"measured": measured, "per_task": self._per_task}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See the base class."""
        measured, per_task = state["measured"], state["per_task"]
        if (measured is None) != (self._measured is None):
            raise ValueError(
                f"nadir_epoch is {self.nadir_epoch}, but the state is of {'none' if measured is None else 'one'}"
            )
        known = None if per_task is None else self._known(per_task.shape[1], per_task.device)
        if known is not None and self.nadir_epoch is not None:
            known[1] = per_task[1]
        self._per_task = known
        if self._measured is not None:
            self._measured.load_state_dict(measured)

    def __repr__(self) -> str:
        given = "" if self.preference is None else f", preference={self.preference.tolist()}"
        if self.nadir_epoch is not None:
            given += f", nadir_epoch={self.nadir_epoch}"
        elif self._point is not None:
            given += f", {'nadir' if self._of_logs else 'ideal'}={self._point.tolist()}"
        return f"STCH(mu={self.mu}{given})"


def _numbers(name: str, given: Numbers | None) -> Tensor | None:
    if given is None:
        return None
    numbers = torch.as_tensor(given, dtype=torch.float64).detach().clone()
    if numbers.dim() != 1 or not bool(numbers.isfinite().all()):
        raise ValueError(f"{name} must be K finite numbers, found {numbers.tolist()}")
    return numbers


@ops.register_rule("stch", options={"mu": 1.0, "of_logs": 0.0}, per_task=lambda tasks: (2, tasks), needs_per_task=True)
def _reference(problem: LossProblem) -> tuple[Tensor, Status]:
    losses, mu = problem.losses, problem.options["mu"]
    assert problem.per_task is not None  # checked by the op
    preference, point = problem.per_task
    if problem.options["of_logs"]:
        slopes = 1 / losses.clamp_min(TINY)
        ratio = losses.clamp_min(TINY) / point.clamp_min(TINY)
        distance = torch.where(point.isnan().any(), 0.0, ratio.clamp(1e-300, 1e300).log())
        shares = torch.softmax((preference * distance / mu).clamp(-1e300, 1e300), dim=0)
        factors = torch.where(point.isnan().any(), 1.0, len(losses) * preference * shares)
        if not preference.isfinite().all():
            return torch.full_like(losses, torch.nan), Status.NON_FINITE
        return unless_negative(losses, factors * slopes)
    if not problem.per_task.isfinite().all():
        return torch.full_like(losses, torch.nan), Status.NON_FINITE
    distance = (losses - point).clamp(-1e300, 1e300)
    return preference * torch.softmax((preference * distance / mu).clamp(-1e300, 1e300), dim=0), Status(0)
