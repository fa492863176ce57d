"""Weights drawn from a normal distribution: a = K · softmax(u) with u ~ N(mean, std²), and how dense they lie."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

LOG_STD_RANGE = (-20.0, 2.0)


def weights_of(u: Tensor) -> Tensor:
    """The weights [..., K] of logits [..., K]: positive, of sum K."""
    return u.shape[-1] * torch.softmax(u, dim=-1)


def log_density(u: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """The log density of `weights_of(u)` among weights of sum K, with respect to any K − 1 of them.

    Logits that differ by a constant give the same weights, so the normal density is integrated along that direction:
    with z = (u − mean) / std, it leaves the part of z that is orthogonal to q ∝ 1 / std. What remains is the volume of
    the softmax, Π softmax(u), and K^(K − 1) for the factor K.

    Args:
        u, mean, log_std: [..., K]; differentiable in all of them.

    Returns:
        [...]. It is symmetric in the tasks, and unchanged under u → u + c.
    """
    K = u.shape[-1]
    z = (u - mean) * (-log_std).exp()
    log_precision = torch.logsumexp(-2 * log_std, dim=-1, keepdim=True)
    q = (-log_std - log_precision / 2).exp()
    z = z - (z * q).sum(dim=-1, keepdim=True) * q
    normal = z.square().sum(dim=-1) + 2 * log_std.sum(dim=-1) + log_precision.squeeze(-1)
    volume = torch.log_softmax(u, dim=-1).sum(dim=-1)
    return -0.5 * (normal + (K - 1) * math.log(2 * math.pi)) - volume - (K - 1) * math.log(K)


def official_log_density(u: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """What IGB4MTL takes for `log_density`: the volume it subtracts is that of tanh(u), which is not the squashing, so
    the result depends on the common shift of u."""
    z = (u - mean) * (-log_std).exp()
    normal = -(0.5 * z.square() + log_std + 0.5 * math.log(2 * math.pi))
    return (normal - 2 * (math.log(2) - u - softplus(-2 * u))).sum(dim=-1)


LOG_DENSITIES = {"exact": log_density, "official": official_log_density}


class Actor:
    """A copy of an agent's policy on the CPU: what a step asks for its weights, whatever the agent does meanwhile.

    Args:
        layers: weights and biases, of the hidden layers and at last those of the mean and of the log std.
    """

    def __init__(self, layers: Sequence[Tensor]) -> None:
        self.layers = list(layers)

    @torch.no_grad()
    def __call__(self, state: Tensor, noise: Tensor) -> Tensor:
        """The weights [K] drawn at a state [K] with these standard normals [K]; all float32."""
        if torch.is_autocast_enabled("cpu"):  # asked first, because turning it off takes as long as all that follows
            with torch.autocast("cpu", enabled=False):
                return self(state, noise)
        *hidden, mean, mean_bias, log_std, log_std_bias = self.layers
        h = state
        for weight, bias in zip(hidden[::2], hidden[1::2], strict=True):
            h = torch.addmv(bias, weight, h).relu_()
        std = torch.addmv(log_std_bias, log_std, h).clamp_(*LOG_STD_RANGE).exp_()
        return weights_of(torch.addmv(mean_bias, mean, h).addcmul_(std, noise))
