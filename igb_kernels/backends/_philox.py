"""Philox4x32-10 (Salmon et al., SC 2011) in Python: the numbers of csrc/core/philox.h, for the references."""

from __future__ import annotations

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
