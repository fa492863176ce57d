"""What people write in plain PyTorch today: flatten K gradients to a matrix, and let torch do the rest."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def flatten(rows: list[list[Tensor]]) -> Tensor:
    """[K, D]."""
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def unflatten(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
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


def step(losses: list[Tensor], shared: list[Tensor], weights_of: Callable[[Tensor], Tensor]) -> None:
    """A balanced step by flattening; `weights_of` maps the Gramian to weights."""
    rows = []
    for k, loss in enumerate(losses):
        torch.autograd.backward(loss, retain_graph=k + 1 < len(losses))
        rows.append([p.grad.clone() for p in shared if p.grad is not None])
        for p in shared:
            p.grad = None
    jacobian = flatten(rows)
    weights = weights_of(jacobian @ jacobian.T)
    for p, g in zip(shared, unflatten(weights.to(jacobian.dtype) @ jacobian, shared), strict=True):
        p.grad = g
