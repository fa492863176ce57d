"""What a balanced step did."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from igb_kernels.status import Status


@dataclass(frozen=True)
class BalanceResult:
    """Losses, scales, weights and what they came from; device tensors, so that reading them is the caller's sync."""

    names: tuple[str, ...] | None
    """The tasks' names, where the losses came as a dict; everything below is in this order."""
    losses: Tensor
    """Raw losses [K]."""
    scales: Tensor
    """Loss scales s_k [K], in the losses' dtype: what loss balancing did."""
    weights: Tensor
    """Gradient-balancing weights w_k [K], float64, on the gradients of the scaled losses."""
    status: Tensor
    """Bits of `igb_kernels.Status`, int32 []."""
    measured: Tensor | None
    """What the weights came from, of the scaled gradients: the Gramian [K, K] or the squared norms [K], float64."""
    active: tuple[int, ...] | None = None
    """The tasks that took part; None: all. Missing ones have a loss of NaN, and otherwise zeros."""

    @property
    def total_weights(self) -> Tensor:
        """Weights on the gradients of the raw losses [K], float64: w_k s_k."""
        return self.weights * self.scales

    @property
    def gram(self) -> Tensor | None:
        """Gramian of the scaled gradients [K, K], or None where the method does not form it."""
        return self.measured if self.measured is not None and self.measured.dim() == 2 else None

    @property
    def norms(self) -> Tensor | None:
        """Norms of the scaled gradients [K] (DB-MTL with beta > 0: of their moving averages), or None."""
        if self.measured is None:
            return None
        return norms_of(self.measured.diagonal() if self.measured.dim() == 2 else self.measured)

    @property
    def cosines(self) -> Tensor | None:
        """Cosines between the tasks' gradients [K, K], 0 for vanishing ones; None where there is no Gramian."""
        return None if self.gram is None else cosines_of(self.gram)

    @property
    def flags(self) -> Status:
        """The status as `igb_kernels.Status`; waits for the device."""
        return Status(int(self.status))

    def __str__(self) -> str:
        """Readable; waits for the device."""
        rows = zip(self.losses.tolist(), self.scales.tolist(), self.weights.tolist(), strict=True)
        lines = [
            f"{self.names[k] if self.names else k}: "
            + (
                f"loss {loss:.4g}, scale {scale:.4g}, weight {weight:.4g}"
                if self.active is None or k in self.active
                else "missing"
            )
            for k, (loss, scale, weight) in enumerate(rows)
        ]
        return "\n".join([*lines, f"status: {self.flags.name or 'ordinary'}"])


def norms_of(squares: Tensor) -> Tensor:
    """Norms from squared norms, which rounding may have made negative; of any shape."""
    return squares.clamp_min(0).sqrt()


def cosines_of(gram: Tensor) -> Tensor:
    """Cosines [..., K, K] from Gramians [..., K, K]: 0 where a gradient vanishes."""
    norms = norms_of(gram.diagonal(dim1=-2, dim2=-1))
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    return gram * inverse[..., :, None] * inverse[..., None, :]
