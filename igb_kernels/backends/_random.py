"""Random numbers without a state, as csrc/core/philox.h makes them: Philox4x32-10 (Salmon et al., SC 2011)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


def philox(seed: int, step: int, stream: int) -> tuple[int, int, int, int]:
    """Four random words of 32 bits; the key is `seed`, the counter `step` above `stream`, 64 bits each."""
    words = [stream & _WORD, stream >> 32 & _WORD, step & _WORD, step >> 32 & _WORD]
    key = [seed & _WORD, seed >> 32 & _WORD]
    for _ in range(10):
        low, high = words[0] * _MULTIPLIERS[0], words[2] * _MULTIPLIERS[1]
        words = [high >> 32 ^ words[1] ^ key[0], high & _WORD, low >> 32 ^ words[3] ^ key[1], low & _WORD]
        key = [(k + s) & _WORD for k, s in zip(key, _KEY_STEPS, strict=True)]
    return words[0], words[1], words[2], words[3]


def philox_words(seed: int, step: int, streams: Tensor) -> Tensor:
    """`philox` for many streams: int64 [...] to int64 [..., 4]."""
    # int64 wraps as uint64 does, and the mask removes the sign that a shift brings in.
    words = [streams & _WORD, streams >> 32 & _WORD]
    words += [torch.full_like(streams, step & _WORD), torch.full_like(streams, step >> 32 & _WORD)]
    key = [seed & _WORD, seed >> 32 & _WORD]
    for _ in range(10):
        low, high = words[0] * _MULTIPLIERS[0], words[2] * _MULTIPLIERS[1]
        words = [
            high >> 32 & _WORD ^ words[1] ^ key[0],
            high & _WORD,
            low >> 32 & _WORD ^ words[3] ^ key[1],
            low & _WORD,
        ]
        key = [(k + s) & _WORD for k, s in zip(key, _KEY_STEPS, strict=True)]
    return torch.stack(words, dim=-1)


def uniforms(seed: int, step: int, streams: Tensor) -> Tensor:
    """Of 24 bits in (0, 1), float64: four for each stream, [4 n]."""
    return ((philox_words(seed, step, streams).flatten() >> 8).double() + 0.5) * 2.0**-24


def normals(seed: int, step: int, count: int) -> Tensor:
    """Standard normals [count], float64, by Box and Muller's transform of streams 0, 1, ..."""
    words = philox_words(seed, step, torch.arange((count + 3) // 4)).view(-1, 2)
    uniform = (words.double() + 0.5) / 2**32
    radius, angle = (-2 * uniform[:, 0].log()).sqrt(), 2 * math.pi * uniform[:, 1]
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1).flatten()[:count]
