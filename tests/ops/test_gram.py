"""gram and sq_norms against float64 and eager PyTorch."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from oracle import expected_gram
from samplers import LAYOUTS, TASKS, gradients, sizes_for

from igb_kernels import ops

SHAPES = [(3, 5, 4, 7), (17,), (), (1, 1, 1, 1), (6, 1, 3, 3), (70, 33), (0, 4)]


def check(rows, expected=None, context="", backend="cpu"):
    expected = expected or expected_gram(rows)
    expected.check(ops.gram(rows, backend=backend), context)
    expected.check(ops.sq_norms(rows, backend=backend), context)


@cache
def expected_of_random(tasks, sizes, dtype):
    return expected_gram(gradients(tasks, sizes, dtype))


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_every_size(instruction_set, dtype, tasks):
    """One column of each size alone, so that no error hides behind a longer column, and all together."""
    together = sizes_for(tasks)
    for sizes in [*((size,) for size in together), together]:
        check(gradients(tasks, sizes, dtype), expected_of_random(tasks, sizes, dtype), sizes)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ops.DTYPES)
def test_every_layout(instruction_set, dtype, layout):
    check(gradients(5, SHAPES, dtype, layout=layout))


MISSING = {
    "some": lambda k, p: (k + 2 * p) % 3 == 0,
    "a column that no task reaches": lambda k, p: p == 1,
    "a task that reaches nothing": lambda k, p: k == 2,
    "the first task": lambda k, p: k == 0,
    "all but one": lambda k, p: (k, p) != (3, 2),
    "everything": lambda k, p: True,
}


@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize("dtype", ops.DTYPES)
@pytest.mark.parametrize("tasks", [4, 9])
def test_missing_entries(instruction_set, dtype, missing, tasks):
    rows = gradients(tasks, [17, 1000, 4097, 5], dtype, missing=MISSING[missing])
    check(rows)
    unreached = [k for k, row in enumerate(rows) if all(t is None for t in row)]
    assert not ops.gram(rows)[unreached].any()


def test_mixed_dtypes(instruction_set):
    dtypes = [torch.bfloat16, torch.float64, torch.float32, torch.float16]
    check(gradients(3, [4097, 100, 1000, 33], dtypes))
    check(gradients(3, [4097, 100, 1000, 33], dtypes, missing=lambda k, p: k == p))


@pytest.mark.parametrize("shapes", [[], [0], [0, (3, 0)], [0, 5, 0]])
def test_no_elements(instruction_set, backend, shapes):
    rows = gradients(3, shapes, torch.float32)
    check(rows, backend=backend)
    assert ops.gram(rows, backend=backend).shape == (3, 3)


def test_a_matrix_is_rows_of_one_tensor(backend):
    rows = torch.randn(4, 1000)
    nested = [[row] for row in rows]
    assert torch.equal(ops.gram(rows, backend=backend), ops.gram(nested, backend=backend))
    assert torch.equal(ops.sq_norms(rows, backend=backend), ops.sq_norms(nested, backend=backend))


def test_large_half_precision_gradients_do_not_overflow(instruction_set):
    rows = [[torch.full((5000,), sign * 65504, dtype=torch.float16)] for sign in (1, -1, 1)]
    check(rows)
    assert ops.gram(rows)[0, 1] == pytest.approx(-5000 * 65504.0**2, rel=1e-6)


def test_a_norm_ratio_of_1e6_keeps_its_digits(instruction_set):
    """The small task's own entries, not only the large one's, are right to float32."""
    rows = gradients(3, [70001], torch.float32)
    rows[1][0] *= 1e-6
    check(rows)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("position", [0, 31, 4099, -1])
def test_a_non_finite_gradient_shows(instruction_set, value, position):
    rows = gradients(4, [5, 4111], torch.float32)
    rows[2][1][position] = value
    for measured in (ops.gram(rows).diagonal(), ops.sq_norms(rows)):
        assert measured.isfinite().tolist() == [True, True, False, True]


def test_the_reference_is_the_definition():
    rows = gradients(3, [5, (2, 3), ()], torch.float64, missing=lambda k, p: (k, p) == (1, 0))
    check(rows, backend="reference")
    check(gradients(2, SHAPES, torch.bfloat16, layout="mixed"), backend="reference")
