"""Half precision, bit by bit: every pattern is read and written as PyTorch does, in vectors and in their tails."""

from __future__ import annotations

import pytest
import torch

from igb_kernels import ops

HALVES = (torch.float16, torch.bfloat16)
TAIL = 15
"""Shorter than the narrowest unrolled step, and no multiple of any vector."""


def combined(values, out_dtype, piece):
    """`values` through combine_ with weight 1, cut into columns of `piece` elements."""
    out = torch.empty(values.shape, dtype=out_dtype)
    ops.combine_(list(out.split(piece)), [list(values.split(piece))], torch.ones(1))
    return out


def assert_same_bits(found, expected):
    """Equal to the bit, any NaN for a NaN; a sum that starts from 0 turns -0 into 0."""
    integer = torch.int16 if found.element_size() == 2 else torch.int32
    assert torch.equal(found.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    wrong = (found.view(integer) != expected.view(integer)) & numbers
    assert not wrong.any(), f"{int(wrong.sum())} differ, first {found[wrong][:3]}, expected {expected[wrong][:3]}"


def all_patterns(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def near_halves(dtype):
    """The float32 around each half-precision number: itself, midpoints to its neighbours, and both sides of these."""
    exact = all_patterns(dtype).float()
    bits = exact[exact.isfinite()].view(torch.int32)
    step = 1 << (13 if dtype is torch.float16 else 16)
    offsets = [base + nearby for base in (0, step // 2, step // 4) for nearby in (-1, 0, 1)]
    floats = torch.cat([bits + offset for offset in offsets]).view(torch.float32)
    if dtype is torch.float16:  # its subnormals are normal numbers in float32: their neighbours are counted from 0
        quarters = torch.arange(4 * 1025) * torch.tensor(2.0**-26)
        up, down = (torch.nextafter(quarters, torch.tensor(limit)) for limit in (1.0, -1.0))
        floats = torch.cat([floats, *(sign * near for sign in (1, -1) for near in (quarters, up, down))])
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 65519.99, 65520.0, 3.4e38, -3.4e38, 1e-45, 2**-25])
    return torch.cat([floats, special])


@pytest.mark.parametrize("piece", [2**16, TAIL])
@pytest.mark.parametrize("dtype", HALVES)
def test_every_pattern_is_kept(instruction_set, dtype, piece):
    patterns = all_patterns(dtype)
    assert_same_bits(combined(patterns, dtype, piece), patterns + torch.zeros((), dtype=dtype))


@pytest.mark.parametrize("piece", [2**16, TAIL])
@pytest.mark.parametrize("dtype", HALVES)
def test_every_pattern_is_read(instruction_set, dtype, piece):
    patterns = all_patterns(dtype)
    assert_same_bits(combined(patterns, torch.float32, piece), patterns.float() + 0.0)


@pytest.mark.parametrize("piece", [2**20, TAIL])
@pytest.mark.parametrize("dtype", HALVES)
def test_float32_is_rounded_as_pytorch_does(instruction_set, dtype, piece):
    """To nearest, ties to even; overflow to infinity; subnormals kept."""
    values = near_halves(dtype)
    values = values if piece > TAIL else values[::7]
    assert_same_bits(combined(values, dtype, piece), (values + 0.0).to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_random_float32_patterns_are_rounded_as_pytorch_does(instruction_set, dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-(2**31), 2**31, (2**18,), generator=generator).to(torch.int32).view(torch.float32)
    assert_same_bits(combined(values, dtype, 2**18), (values + 0.0).to(dtype))


@pytest.mark.parametrize("dtype", HALVES)
def test_a_sum_is_rounded_once(instruction_set, dtype):
    """1 + 2^-12 - 1 vanishes if the sum is rounded to half precision after each row."""
    rows = [[torch.full((100,), value, dtype=dtype)] for value in (1.0, 2**-12, -1.0)]
    out = torch.empty(100, dtype=dtype)
    ops.combine_([out], rows, torch.ones(3))
    assert torch.equal(out, rows[1][0])
