"""The ops as PyTorch sees them: schemas, fakes, tracing, compilation."""

from __future__ import annotations

import copy

import pytest
import torch
from samplers import gradients, gramian, jacobian

from igb_kernels import ops

OPS = torch.ops.igb_kernels


def flat(rows):
    return [t for row in rows for t in row]


def rows(dtype=torch.float32, seed=0, missing=lambda k, p: False):
    return flat(gradients(3, [5, (2, 3), ()], dtype, seed=seed, missing=missing))


def some_missing(k, p):
    return p == 1 or k == 2


GRAM, LOSSES = gramian(jacobian("random", 3)), torch.tensor([0.5, 1.0, 2.0])
STATE = torch.ones(3, dtype=torch.float64)
COUNTER = torch.tensor([7.0, 3.0], dtype=torch.float64)
DECAY = torch.tensor(0.9, dtype=torch.float64)

CALLS = {
    "gram": (OPS.gram, (rows(), 3)),
    "gram, missing entries": (OPS.gram, (rows(missing=some_missing), 3)),
    "gram, half precision": (OPS.gram, (rows(torch.bfloat16), 3)),
    "gram, reference": (OPS.gram, (rows(), 3, "reference")),
    "sq_norms": (OPS.sq_norms, (rows(), 3)),
    "sq_norms, missing entries": (OPS.sq_norms, (rows(missing=some_missing), 3)),
    "ema_": (OPS.ema_, (rows(seed=1), rows(seed=2), rows(), DECAY, 3)),
    "ema_, missing entries": (OPS.ema_, (rows(seed=1), rows(seed=2, missing=some_missing), [None] * 9, DECAY, 3)),
    "ema_, half precision": (OPS.ema_, (rows(seed=1), [None] * 9, rows(torch.float16), DECAY, 3)),
    "ema_, scales": (OPS.ema_, (rows(seed=1), rows(seed=2), rows(), DECAY, 3, LOSSES)),
    "accumulate_squares_": (
        OPS.accumulate_squares_,
        (rows(seed=1), [t.square() for t in rows(seed=2)], rows(), 1e-7, 3),
    ),
    "accumulate_squares_, missing entries": (
        OPS.accumulate_squares_,
        (rows(seed=1), [None] * 9, rows(torch.bfloat16, missing=some_missing), 1e-7, 3),
    ),
    "combine_": (OPS.combine_, (rows(seed=1)[:3], rows(), LOSSES)),
    "combine_, missing entries": (OPS.combine_, (rows(seed=1)[:3], rows(missing=some_missing), LOSSES, True)),
    "sign_drop_": (OPS.sign_drop_, (rows(seed=1)[:3], rows(), COUNTER, 3)),
    "sign_drop_, leaks and missing entries": (
        OPS.sign_drop_,
        (rows(seed=1)[:3], rows(torch.float16, missing=some_missing), COUNTER, 3, LOSSES),
    ),
    "solve equal": (OPS.solve, ("equal", GRAM, None, None, [], None)),
    "solve emtl": (OPS.solve, ("emtl", GRAM.diagonal(), LOSSES, None, [0.5, 0.0], None)),
    "solve imtl_g": (OPS.solve, ("imtl_g", GRAM, None, None, [0.0], None)),
    "solve nash_mtl": (OPS.solve, ("nash_mtl", GRAM, None, None, [1.0, 0.0], STATE)),
    "solve db_mtl": (OPS.solve, ("db_mtl", GRAM.diagonal(), None, None, [0.9, 0.0, 1e-8, 0.0, 0.0], STATE)),
    "loss_scales none": (OPS.loss_scales, ("none", LOSSES, None, [], None)),
    "loss_scales log": (OPS.loss_scales, ("log", LOSSES, None, [1e-8], None)),
    "loss_scales igb_v1": (OPS.loss_scales, ("igb_v1", LOSSES.double(), LOSSES, [], None)),
    "loss_scales uw": (OPS.loss_scales, ("uw", LOSSES, LOSSES, [], STATE)),
    "loss_scales rlw": (OPS.loss_scales, ("rlw", LOSSES, None, [0.0], STATE[:2])),
    "loss_scales dwa": (OPS.loss_scales, ("dwa", LOSSES, GRAM[:2], [2.0], None)),
    "loss_scales gls": (OPS.loss_scales, ("gls", LOSSES, None, [], None)),
    "loss_scales stch": (OPS.loss_scales, ("stch", LOSSES, GRAM[:2], [1.0, 0.0], None)),
    "loss_scales famo": (OPS.loss_scales, ("famo", LOSSES, None, [1e-3, 0.025], STATE.repeat(6)[:17])),
    "loss_scales ldc_mtl": (OPS.loss_scales, ("ldc_mtl", LOSSES, GRAM[:2], [0.0, 0.0, 1.0, 0.05], STATE.repeat(2))),
    "loss_scales imtl_l": (OPS.loss_scales, ("imtl_l", LOSSES, LOSSES, [], STATE)),
    "rollback_": (OPS.rollback_, (rows()[:3], [None, *rows(seed=1)[1:3]], torch.ones((), dtype=torch.int32))),
}


def test_every_op_is_called_below():
    called = {op._qualified_op_name for op, _ in CALLS.values()}
    registered = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("igb_kernels::")}
    assert called == registered


@pytest.mark.parametrize("call", CALLS)
def test_opcheck(call):
    """Schema and mutation, autograd registration, fake tensors against real ones, and tracing with symbolic shapes."""
    op, arguments = CALLS[call]
    torch.library.opcheck(op.default, copy.deepcopy(arguments))


COMPILED = {
    "gram": lambda a, b: ops.gram([[a, None], [b, a]]),
    "sq_norms": lambda a, b: ops.sq_norms([[a], [b]]),
    "emtl": lambda a, b: ops.solve("emtl", ops.gram([[a], [b]]), a[:2].abs())[0],
    "nash_mtl": lambda a, b: ops.solve("nash_mtl", ops.gram([[a], [b]]))[0],
    "log": lambda a, b: ops.loss_scales("log", a.abs(), eps=1e-8)[0],
}


@pytest.mark.parametrize("function", COMPILED)
def test_inside_torch_compile(function):
    """Traced whole, with the same result as eagerly."""
    eager, (a, b) = COMPILED[function], (torch.randn(7), torch.randn(7))
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a, b), eager(a, b))


def test_written_outputs_inside_torch_compile():
    def step(out, average, a, b):
        norms = ops.ema_([[average]], [[average]], [[a]], 0.5)
        ops.combine_([out], [[a], [b]], torch.ones(2), accumulate=True)
        return norms, out + average

    tensors = [torch.randn(7) for _ in range(4)]
    eager, compiled = ([t.clone() for t in tensors] for _ in range(2))
    expected = step(*eager)
    found = torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    assert all(map(torch.equal, [*found, *compiled], [*expected, *eager]))
