"""What the methods' float64 references share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from igb_kernels.status import Status

INACTIVE = 1e-12
"""A task whose norm is at most this fraction of the largest counts as having no gradient."""


@dataclass
class Tasks:
    """The tasks that have a gradient."""

    norms: Tensor
    """[K] Euclidean norms."""
    active: Tensor
    """[K] bool."""
    status: Status

    @property
    def any(self) -> bool:
        return bool(self.active.any())

    def spread(self, values: Tensor) -> Tensor:
        """Values of the active tasks [A] as [K], with zeros for the others."""
        result = torch.zeros_like(self.norms)
        result[self.active] = values
        return result


def measure(gram: Tensor, inactive: float = INACTIVE) -> Tasks:
    """Norms and activity from a Gramian [K, K] or squared norms [K]."""
    norms = (gram.diagonal() if gram.dim() == 2 else gram).clamp_min(0).sqrt()
    active = norms > inactive * norms.max()
    status = Status(0) if bool(active.all()) else Status.ZERO_GRADIENT
    if not active.any():
        status |= Status.ALL_INACTIVE
    return Tasks(norms, active, status)


def project_on_simplex(values: Tensor) -> Tensor:
    """The nearest point [K] with no negative entry and sum 1."""
    descending = values.sort(descending=True).values
    excess = (descending.cumsum(0) - 1) / torch.arange(1, len(values) + 1, dtype=values.dtype)
    return (values - excess[descending > excess][-1]).clamp_min(0)


def unit_diagonal(gram: Tensor, tasks: Tasks) -> Tensor:
    """The cosines [A, A] of the active tasks."""
    norms = tasks.norms[tasks.active]
    cosines = (gram + gram.T)[tasks.active][:, tasks.active] / 2 / norms[:, None] / norms[None, :]
    cosines.fill_diagonal_(1.0)
    return cosines
