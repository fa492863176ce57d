"""The three-way oracle: float64 truth, eager PyTorch as the baseline, and the kernel's error against both.

The baseline computes in the accumulator's precision (float32 for half precision) and rounds to the output's dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from samplers import Grads
from tolerances import TOLERANCES
from torch import Tensor

from igb_kernels.backends._layout import in_memory_order
from igb_kernels.backends._random import uniforms
from igb_kernels.backends.reference import positive_share, sign_drop
from igb_kernels.ops import accumulator_dtype


def matrix(rows: Sequence[Grads], dtype: torch.dtype = torch.float64) -> Tensor:
    """The K×D matrix of the rows, zeros where a task does not reach a parameter."""
    like = columns(rows)
    flat = [
        [
            torch.zeros_like(column, dtype=dtype).flatten() if t is None else t.to(dtype).flatten()
            for t, column in zip(row, like, strict=True)
            if column is not None
        ]
        for row in rows
    ]
    return torch.stack([torch.cat([torch.zeros(0, dtype=dtype), *row]) for row in flat])


def columns(rows: Sequence[Grads]) -> Grads:
    """The first tensor of each column that is there."""
    return [next((t for t in column if t is not None), None) for column in zip(*rows, strict=True)]


@dataclass(frozen=True)
class ExpectedGram:
    truth: Tensor
    baseline: Tensor
    scale: Tensor
    tolerance: float

    def check(self, found: Tensor, context: object = "") -> None:
        """`found` [K, K] is the Gramian, or [K] the squared norms."""
        expected = (self.baseline, self.truth, self.scale)
        if found.dim() == 1:
            expected = tuple(t.diagonal() for t in expected)
        else:
            assert torch.equal(found, found.T), context
        assert found.dtype is torch.float64
        assert_no_worse(found, *expected, self.tolerance, context, excuse=self.tolerance)


def expected_gram(rows: Sequence[Grads]) -> ExpectedGram:
    dtype = torch.float64 if all(t is None or t.dtype is torch.float64 for t in columns(rows)) else torch.float32
    eager = matrix(rows, dtype)
    truth = _exact_gram(matrix(rows))
    norms = truth.diagonal().sqrt()
    return ExpectedGram(truth, (eager @ eager.T).double(), norms[:, None] * norms, TOLERANCES[dtype].inner)


def _exact_gram(exact: Tensor, block: int = 256) -> Tensor:
    """By blocks: one long product in float64 is no truth for float64 kernels (at D = 70,001 it errs by 4e-14)."""
    padded = torch.nn.functional.pad(exact, (0, -exact.shape[1] % block))
    blocks = padded.unflatten(1, (-1, block)).transpose(0, 1)
    return (blocks @ blocks.mT).sum(dim=0)


def assert_no_worse(
    found: Tensor,
    baseline: Tensor,
    truth: Tensor,
    scale: Tensor,
    tolerance: float,
    context: object = "",
    excuse: float = float("inf"),
) -> None:
    """The largest error of `found`, relative to `scale`, exceeds the baseline's by at most `tolerance`.

    The baseline excuses no more than `excuse`: over long rows, eager PyTorch's inner products lose far more than ours.
    """
    found_error, baseline_error = (_error(t.double(), truth, scale) for t in (found, baseline))
    limit = min(baseline_error, excuse) + tolerance
    assert found_error <= limit, f"{context}: error {found_error:.3g}, eager PyTorch's is {baseline_error:.3g}"


def _error(values: Tensor, truth: Tensor, scale: Tensor) -> float:
    difference = (values - truth).abs()
    assert not difference.isnan().any(), "NaN in the result: an element was not written, or wrongly read"
    relative = torch.where(difference == 0, 0.0, difference / scale)
    return float(relative.max()) if relative.numel() else 0.0


def assert_squares(
    out: Sequence[Grads], excess: Tensor, state: Sequence[Grads], grads: Sequence[Grads], eps: float
) -> None:
    """`out` is state + grads², and `excess` Σ grads² / √(out + eps) of each row; `state` as it was before."""
    truths, baselines = [], []
    for k, (out_row, state_row, row) in enumerate(zip(out, state, grads, strict=True)):
        truth, baseline = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for p, (o, s, g) in enumerate(zip(out_row, state_row, row, strict=True)):
            assert o is not None
            (exact, exact_squares), (eager, eager_squares) = (
                _squares(s, g, o.shape, d) for d in (torch.float64, o.dtype)
            )
            element = TOLERANCES[o.dtype].element
            assert_no_worse(o, eager, exact, exact.abs(), element, f"row {k}, column {p}", excuse=element)
            truth += (exact_squares / (exact + eps).sqrt()).sum()
            baseline += (eager_squares / (eager + eps).sqrt()).sum().double()
        truths.append(truth)
        baselines.append(baseline)
    inner = max(TOLERANCES[o.dtype].inner for row in out for o in row if o is not None)
    assert excess.dtype is torch.float64
    exact_excess = torch.stack(truths)
    assert_no_worse(excess, torch.stack(baselines), exact_excess, exact_excess, 2 * inner, "sums", excuse=inner)


def _squares(state: Tensor | None, grad: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """state + grad² and grad²."""
    squares = torch.zeros(shape, dtype=dtype) if grad is None else grad.to(dtype).square()
    return (squares if state is None else state.to(dtype) + squares), squares


def assert_one_sign(
    out: Grads,
    rows: Sequence[Grads],
    counter: Tensor,
    leak: Tensor | None,
    dtypes: Sequence[torch.dtype],
    slack: float = 0.0,
) -> None:
    """`out` is `rows` where one sign was dropped, for columns of these dtypes; decided as in float64 but at ties.

    A float64 sum of the rows in both ways it can be decided, and which one is right unless U is within 1e-6 of P.
    `slack` is for stores that do not round.
    """
    seed, step = map(int, counter.tolist())
    leaks = torch.zeros(len(rows), dtype=torch.float64) if leak is None else leak.double()
    for p, (o, dtype) in enumerate(zip(out, dtypes, strict=True)):
        assert o is not None
        values = [torch.zeros(o.shape) if row[p] is None else row[p] for row in rows]
        exact = torch.stack([v.double() for v in values])
        streams = (p << 40) + torch.arange(o.numel())
        drawn = in_memory_order(uniforms(seed, step, streams)[: o.numel()], o)
        clear = (drawn - positive_share(exact)).abs() >= 1e-6
        assert clear.double().mean() > 0.99 or o.numel() < 1000
        truth, size = sign_drop(exact, drawn, leaks), exact.abs().sum(dim=0)
        error = (o.double() - truth).abs()[clear]
        wide = TOLERANCES[dtype].element * len(rows) * size[clear]
        rounding = max(torch.finfo(o.dtype).eps / 2, slack) if o.dtype is not accumulator_dtype(o.dtype) else 0.0
        tiny = torch.finfo(o.dtype).tiny * torch.finfo(o.dtype).eps
        assert bool((error <= wide + rounding * truth.abs()[clear] + tiny).all()), f"column {p}"


def assert_sum(
    found: Tensor, terms: Sequence[tuple[float, Tensor | None]], dtype: torch.dtype, context: object = ""
) -> None:
    """`found` is Σ weight · tensor, summed in the accumulator of `dtype` and rounded once, to its own dtype."""
    wide = accumulator_dtype(dtype)
    truth, scale = torch.zeros(found.shape, dtype=torch.float64), torch.zeros(found.shape, dtype=torch.float64)
    eager = torch.zeros(found.shape, dtype=wide)
    for weight, t in terms:
        if t is not None:
            truth += weight * t.double()
            scale += abs(weight) * t.double().abs()
            eager += torch.tensor(weight, dtype=wide) * t.to(wide)
    assert_no_worse(found, eager.to(found.dtype), truth, scale, TOLERANCES[dtype].element, context)
