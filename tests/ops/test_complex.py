"""Complex gradients count as their real and imaginary parts, on every backend; lazily negated ones as what they are."""

from __future__ import annotations

import pytest
import torch

from igb_kernels import ops

DTYPES = {torch.complex64: 1e-5, torch.complex128: 1e-12}


def rows(dtype, seed=0, missing=False):
    """Three gradients of a conjugated matrix, a matrix in another layout and real numbers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, dtype=dtype):
        return torch.randn(*shape, dtype=dtype, generator=generator)

    real = torch.float32 if dtype is torch.complex64 else torch.float64
    found = [[draw(5, 3).conj(), draw(3, 4).mT, draw(7, dtype=real)] for _ in range(3)]
    if missing:
        found[0][0] = found[1][1] = None
    return found


def doubled(nested):
    """The same gradients as real float64 ones."""
    return [
        [None if t is None else (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t).double() for t in row]
        for row in nested
    ]


def written(seed, dtype):
    """Memory to write to: not to be conjugated."""
    return [[t.resolve_conj() for t in row] for row in rows(dtype, seed)]


def close(found, want, dtype):
    tolerance = DTYPES[dtype]
    torch.testing.assert_close(
        [f.double() for f in found], [w.double() for w in want], rtol=tolerance, atol=10 * tolerance
    )


def parts(row):
    return [torch.view_as_real(t) if t.is_complex() else t for t in row]


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inner_products(backend, dtype, missing):
    grads = rows(dtype, missing=missing)
    want = ops.gram(doubled(grads), backend="reference")
    close([ops.gram(grads, backend=backend), ops.sq_norms(grads, backend=backend)], [want, want.diagonal()], dtype)


def test_the_inner_product_is_the_real_part():
    a, b = (torch.randn(9, dtype=torch.complex128) for _ in range(2))
    torch.testing.assert_close(ops.gram([[a], [b]])[0, 1], torch.vdot(a, b).real)
    torch.testing.assert_close(ops.gram(torch.stack([a, b]).conj())[0, 1], torch.vdot(a, b).real)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums(backend, dtype):
    grads, weights = rows(dtype, missing=True), torch.tensor([0.5, -2.0, 3.0])
    out = written(1, dtype)[0]
    want = [t.clone() for t in doubled([out])[0]]
    ops.combine_(want, doubled(grads), weights, accumulate=True, backend="reference")
    ops.combine_(out, grads, weights, accumulate=True, backend=backend)
    close(parts(out), want, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moving_averages_and_squares(backend, dtype):
    grads, state = rows(dtype, missing=True), rows(dtype, 2)
    for op, arguments in ((ops.ema_, (0.75,)), (ops.accumulate_squares_, (1e-7,))):
        if op is ops.accumulate_squares_:  # squares of the parts
            state = [
                [torch.complex(t.real.abs(), t.imag.abs()) if t.is_complex() else t.abs() for t in row] for row in state
            ]
        out = written(1, dtype)
        want = [[t.clone() for t in row] for row in doubled(out)]
        norms = op(want, doubled(state), doubled(grads), *arguments, backend="reference")
        found = op(out, state, grads, *arguments, backend=backend)
        close([found, *(p for row in out for p in parts(row))], [norms, *(t for row in want for t in row)], dtype)


def test_dropped_signs(backend):
    """Real and imaginary parts are elements of their own, as for optimizers."""
    grads, counter = rows(torch.complex128), torch.tensor([3.0, 1.0], dtype=torch.float64)
    out = written(1, torch.complex128)[0]
    want = [t.clone() for t in doubled([out])[0]]
    norm = ops.sign_drop_(want, doubled(grads), counter, backend="reference")
    found = ops.sign_drop_(out, grads, counter, backend=backend)
    close([found, *parts(out)], [norm, *want], torch.complex128)


def test_gradients_yet_to_be_negated(backend):
    """As the imaginary part of what is to be conjugated is."""
    negated = torch.complex(torch.zeros(1), torch.ones(1)).conj().imag
    assert negated.is_neg()
    grads = [[negated], [torch.ones(1)]]
    assert ops.gram(grads, backend=backend).tolist() == [[1, -1], [-1, 1]]
    out = [torch.zeros(1)]
    ops.combine_(out, grads, torch.tensor([3.0, 1.0]), backend=backend)
    assert out[0].tolist() == [-2]


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
def test_half_precision_complex_numbers_are_refused():
    half = torch.zeros(2, dtype=torch.complex64).to(torch.complex32)
    with pytest.raises(
        TypeError, match=r"grads\[0\]\[0\] must have one of the dtypes .*complex64.*found torch.complex32"
    ):
        ops.gram([[half]])
