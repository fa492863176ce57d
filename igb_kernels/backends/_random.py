"""Random numbers without a state, as csrc/core/philox.h makes them, in plain Python."""

from __future__ import annotations

import math

MASK = (1 << 32) - 1


def philox(seed: int, step: int, stream: int) -> tuple[int, int, int, int]:
    """Four random 32-bit words: Philox4x32-10 (Salmon et al., SC 2011) with the key `seed`."""
    keys = [seed & MASK, seed >> 32]
    counter = [stream & MASK, stream >> 32, step & MASK, step >> 32]
    for _ in range(10):
        even, odd = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [odd >> 32 ^ counter[1] ^ keys[0], odd & MASK, even >> 32 ^ counter[3] ^ keys[1], even & MASK]
        keys = [(keys[0] + 0x9E3779B9) & MASK, (keys[1] + 0xBB67AE85) & MASK]
    return counter[0], counter[1], counter[2], counter[3]


def normals(seed: int, step: int, count: int) -> list[float]:
    """The standard normals of a step, by Box and Muller's transform."""
    found: list[float] = []
    for stream in range((count + 3) // 4):
        uniform = [(word + 0.5) / 2**32 for word in philox(seed, step, stream)]
        for u, v in (uniform[:2], uniform[2:]):
            radius, angle = math.sqrt(-2 * math.log(u)), 2 * math.pi * v
            found += [radius * math.cos(angle), radius * math.sin(angle)]
    return found[:count]
