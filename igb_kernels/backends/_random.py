"""The random numbers of csrc/core/philox.h in PyTorch: Philox4x32-10 (Salmon et al., SC 2011)."""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOWER = 0xFFFFFFFF


def words(seed: int, step: int, streams: Tensor) -> Tensor:
    """The four 32-bit words of each stream, [n, 4]; streams [n] and words in int64, which wraps as its bits do."""
    x = [
        streams & _LOWER,
        (streams >> 32) & _LOWER,
        *(torch.full_like(streams, w & _LOWER) for w in (step, step >> 32)),
    ]
    keys = [seed & _LOWER, seed >> 32 & _LOWER]
    for _ in range(10):
        low, high = (value * multiplier for value, multiplier in zip((x[0], x[2]), _MULTIPLIERS, strict=True))
        x = [(high >> 32) & _LOWER ^ x[1] ^ keys[0], high & _LOWER, (low >> 32) & _LOWER ^ x[3] ^ keys[1], low & _LOWER]
        keys = [(key + key_step) & _LOWER for key, key_step in zip(keys, _KEY_STEPS, strict=True)]
    return torch.stack(x, dim=1)


def uniforms(seed: int, step: int, streams: Tensor) -> Tensor:
    """Of 24 bits in (0, 1), float64: four for each stream, [4 n]."""
    return ((words(seed, step, streams).flatten() >> 8).double() + 0.5) * 2.0**-24
