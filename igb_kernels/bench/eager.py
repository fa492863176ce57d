"""What people write in plain PyTorch today: flatten K gradients to a matrix, and let torch do the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from igb_kernels.backends import Backend
from igb_kernels.gradients.base import GradientBalancer, Needs
from igb_kernels.losses import LossBalancer


def flatten(rows: list[list[Tensor]]) -> Tensor:
    """[K, D]."""
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def unflatten(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors that make up `flat` [D]."""
    parts = torch.split(flat, [t.numel() for t in like])
    return [part.view_as(t) for part, t in zip(parts, like, strict=True)]


def gram(rows: list[list[Tensor]]) -> Tensor:
    """J Jᵀ."""
    jacobian = flatten(rows)
    return jacobian @ jacobian.T


def sq_norms(rows: list[list[Tensor]]) -> Tensor:
    """The squared norms of the rows."""
    return flatten(rows).square().sum(dim=1)


def combine(rows: list[list[Tensor]], weights: Tensor) -> list[Tensor]:
    """Jᵀ w."""
    return unflatten(weights.to(rows[0][0].dtype) @ flatten(rows), rows[0])


def gram_and_combine(rows: list[list[Tensor]], weights: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Both, of one matrix."""
    jacobian = flatten(rows)
    return jacobian @ jacobian.T, unflatten(weights.to(jacobian.dtype) @ jacobian, rows[0])


def ema_norms(state: Tensor, rows: list[list[Tensor]], decay: float) -> tuple[Tensor, Tensor]:
    """DB-MTL's moving average and row norms, as LibMTL forms them."""
    jacobian = flatten(rows)
    state = jacobian + decay * (state - jacobian)
    return state, state.norm(dim=-1)


def accumulate_squares(state: Tensor, rows: list[list[Tensor]], eps: float) -> tuple[Tensor, Tensor]:
    """ExcessMTL's sums of squared gradients and the excess risks, as LibMTL forms them."""
    jacobian = flatten(rows)
    state = state + jacobian**2
    return state, (jacobian * (1 / (state + eps).sqrt()) * jacobian).sum(dim=-1)


def sign_drop(rows: list[list[Tensor]]) -> list[Tensor]:
    """GradDrop of the parameters' gradients, as TorchJD forms it."""
    jacobian = flatten(rows)
    share = 0.5 * (1 + jacobian.sum(dim=0) / jacobian.abs().sum(dim=0))
    drawn = torch.rand(share.shape, device=share.device, dtype=share.dtype)
    total = torch.zeros_like(jacobian[0])
    for row in jacobian:
        total += ((share > drawn) & (row > 0) | (share < drawn) & (row < 0)) * row
    return unflatten(total, rows[0])


class Step:
    """A balanced step by flattening: everything of the size of the gradients in plain PyTorch; loss scales and the K×K
    problem by this package."""

    def __init__(
        self, shared: Sequence[Tensor], method: GradientBalancer, rule: LossBalancer, backend: Backend
    ) -> None:
        self._shared, self._method, self._rule, self._backend = shared, method, rule, backend
        self._average: Tensor | None = None

    @staticmethod
    def can(method: GradientBalancer) -> bool:
        """Whether the method is one of weights from a Gramian or norms of gradients or their plain moving averages."""
        return method.needs() in (Needs.GRAM, Needs.NORMS) and type(method).row_scales is GradientBalancer.row_scales

    def __call__(self, losses: list[Tensor]) -> None:
        """From K losses to `.grad` of the shared parameters."""
        values = torch.stack([loss.detach() for loss in losses])
        for part in (self._rule, self._method):
            part.start(len(losses), values.device)
        scales, status = self._rule.scales(values, self._backend)
        rows = []
        for k, (loss, scale) in enumerate(zip(losses, scales, strict=True)):
            loss.backward(scale, retain_graph=k + 1 < len(losses))  # type: ignore[no-untyped-call]
            rows.append([torch.zeros_like(p) if p.grad is None else p.grad.to_dense().clone() for p in self._shared])
            for p in self._shared:
                p.grad = None
        jacobian = flatten(rows)
        del rows
        if (decay := self._method.ema_decay()) is not None:
            before = torch.zeros_like(jacobian) if self._average is None else self._average
            self._average = jacobian = jacobian + decay.to(jacobian.dtype) * (before - jacobian)
        squares = self._method.needs() is Needs.NORMS
        measured = jacobian.norm(dim=1).square() if squares else jacobian @ jacobian.T
        weights, solved = self._method.solve(measured.double(), values, scales, self._backend)
        update = weights.to(jacobian.dtype) @ jacobian
        for p, g in zip(self._shared, unflatten(update, self._shared), strict=True):
            p.grad = g
        self._rule.commit(values, scales, status | solved)
        self._method.commit(status | solved)
