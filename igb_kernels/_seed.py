"""Seeds that a float64 state holds."""

from __future__ import annotations

import torch

SEEDS = 2**53
"""How many integers float64 holds one by one."""


def check_seed(seed: int | None) -> int | None:
    """`seed`, which must be None or an integer that fits."""
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < SEEDS):
        raise ValueError(f"seed must be None or an integer, 0 to 2**53 - 1; found {seed!r}")
    return seed


def drawn_seed(seed: int | None) -> int:
    """`seed`, or one from torch's global generator on the CPU, so that `torch.manual_seed` decides."""
    return int(torch.randint(SEEDS, (), device="cpu")) if seed is None else seed
