"""A call that cannot be served says which op, which argument, the rule and what was found; and writes nothing."""

from __future__ import annotations

import pytest
import torch

from igb_kernels import ops
from igb_kernels.backends import resolve

F32 = torch.full((3,), 7.0)
F64, BF16, INT, LONGER = F32.double(), F32.bfloat16(), F32.int(), torch.full((4,), 7.0)
SPARSE = F32.to_sparse()
GRAM, LOSSES, STATE = torch.eye(2, dtype=torch.float64), torch.ones(2), torch.ones(2, dtype=torch.float64)
ONE = torch.ones(1)
COUNTER = torch.zeros(2, dtype=torch.float64)
WRITTEN = (F32, F64, BF16, INT, LONGER, STATE)


def ema(out=F32, state=None, grads=F32, decay=0.5, scales=None):
    return lambda: ops.ema_([[out]], [[state]], [[grads]], decay, scales)


def squares(out=F32, state=None, grads=F32, eps=1e-7):
    return lambda: ops.accumulate_squares_([[out]], [[state]], [[grads]], eps)


def combine(out, rows, weights=None):
    return lambda: ops.combine_(out, rows, torch.ones(len(rows)) if weights is None else weights)


def drop(out, rows, counter=COUNTER, leak=None):
    return lambda: ops.sign_drop_(out, rows, counter, leak)


def solve(*arguments, **named):
    return lambda: ops.solve(*arguments, **named)


def scales(*arguments, **named):
    return lambda: ops.loss_scales(*arguments, **named)


# Each: the call, the exception, and parts of its message in their order: op, argument, rule, what was found.
CALLS = {
    "no tasks": (lambda: ops.gram([]), ValueError, "gram … tasks … 1 to 1024 … found 0"),
    "too many tasks": (lambda: ops.sq_norms([[F32]] * 1025), ValueError, "sq_norms … tasks … 1024 … found 1025"),
    "ragged rows": (lambda: ops.gram([[F32], [F32, F32]]), ValueError, "gram … grads … same number … found [1, 2]"),
    "shapes": (lambda: ops.gram([[F32], [LONGER]]), ValueError, "gram … grads[1][0] … (3,) … found (4,)"),
    "dtypes": (lambda: ops.sq_norms([[F32], [F64]]), ValueError, "sq_norms … grads[1][0] … float32 … found … float64"),
    "integers": (lambda: ops.gram([[INT]]), TypeError, "gram … grads[0][0] … one of the dtypes … found torch.int32"),
    "sparse": (lambda: ops.gram([[F32], [SPARSE]]), ValueError, "gram … grads[1][0] … dense … found … sparse_coo"),
    # ema_
    "more state": (lambda: ops.ema_([[F32]], [[F32]] * 2, [[F32]], 0.5), ValueError, "ema_ … state … 1 … found 2"),
    "fewer gradients": (
        lambda: ops.ema_([[F32], [F32]], [[None], [None]], [[F32]], 0.5),
        ValueError,
        "ema_ … grads … tasks × parameters … found 1",
    ),
    "half out": (ema(BF16, grads=BF16), ValueError, "ema_ … out[0] … float32 … found … bfloat16"),
    "half out, no gradient": (ema(BF16, grads=None), (TypeError, ValueError), "ema_ … out … float32 … bfloat16"),
    "float32 average of float64": (ema(F32, grads=F64), ValueError, "ema_ … out[0] … float64 … found … float32"),
    "shape of the average": (ema(LONGER), ValueError, "ema_ … out[0] … (3,) … found (4,)"),
    "dtype of state": (ema(state=F64), ValueError, "ema_ … state[0] … float32 … found … float64"),
    "shape of state": (ema(state=LONGER), ValueError, "ema_ … state[0] … (3,) … found (4,)"),
    "two decays": (ema(decay=torch.ones(2)), ValueError, "ema_ … decay … one number … found 2"),
    "two scales": (ema(scales=torch.ones(2)), ValueError, "ema_ … scales … (1,) … found (2,)"),
    "whole scales": (ema(scales=ONE.int()), TypeError, "ema_ … scales … floating … found torch.int32"),
    "None in out": (ema(out=None), (TypeError, ValueError, RuntimeError), "ema_ … out … None"),
    # accumulate_squares_
    "half sums": (squares(BF16, grads=BF16), ValueError, "accumulate_squares_ … out[0] … float32 … found … bfloat16"),
    "float32 sums of float64": (squares(grads=F64), ValueError, "accumulate_squares_ … out[0] … float64 … found"),
    "shape of the sums": (squares(state=LONGER), ValueError, "accumulate_squares_ … state[0] … (3,) … found (4,)"),
    "no eps": (squares(eps=0.0), ValueError, "accumulate_squares_ … eps … at least 1.17 … found 0.0"),
    "eps is not a number": (squares(eps=torch.nan), ValueError, "accumulate_squares_ … eps … at least … found nan"),
    # combine_
    "more outputs": (combine([F32, F32], [[F32]]), ValueError, "combine_ … out … 1 tensors … found 2"),
    "fewer weights": (combine([F32], [[F32], [F32]], ONE), ValueError, "combine_ … weights … (2,) … found (1,)"),
    "weights as a matrix": (combine([F32], [[F32]], ONE[None]), ValueError, "combine_ … weights … (1,) … found (1, 1)"),
    "whole weights": (combine([F32], [[F32]], ONE.int()), TypeError, "combine_ … weights … floating … found torch.int"),
    "shape of out": (combine([LONGER], [[F32]]), ValueError, "combine_ … out[0] … (3,) … found (4,)"),
    "float64 into float32": (combine([F32], [[F64]]), ValueError, "combine_ … out[0] … float64 … found … float32"),
    "float32 into float64": (combine([F64], [[F32]]), ValueError, "combine_ … out[0] … float32 … found … float64"),
    "half into bfloat16": (
        combine([BF16], [[F32.half()]]),
        ValueError,
        "combine_ … out[0] … float16 … found … bfloat",
    ),
    "integer out": (combine([INT], [[None]]), (TypeError, ValueError), "combine_ … out … dtype … found … int32"),
    "a later row": (
        combine([F32, F32], [[None, F32], [F32, LONGER]]),
        ValueError,
        "combine_ … grads[1][1] … (3,) … found (4,)",
    ),
    # sign_drop_
    "more outputs to drop": (drop([F32, F32], [[F32]]), ValueError, "sign_drop_ … out … 1 tensors … found 2"),
    "float32 into float64, dropped": (drop([F64], [[F32]]), ValueError, "sign_drop_ … out[0] … float32 … float64"),
    "three counters": (drop([F32], [[F32]], STATE[[0, 1, 1]]), ValueError, "sign_drop_ … counter … (2,) … found (3,)"),
    "float32 counter": (drop([F32], [[F32]], LOSSES), ValueError, "sign_drop_ … counter … float64 … found … float32"),
    "more leaks": (drop([F32], [[F32]], leak=LOSSES), ValueError, "sign_drop_ … leak … (1,) … found (2,)"),
    "whole leaks": (drop([F32], [[F32]], leak=ONE.int()), TypeError, "sign_drop_ … leak … floating … torch.int32"),
    # solve
    "unknown method": (solve("unknown", GRAM), ValueError, "solve … method … nash_mtl … found 'unknown'"),
    "norms for a Gramian": (solve("nash_mtl", LOSSES), ValueError, "solve … gram … K×K Gramian … found (2,)"),
    "not square": (solve("emtl", GRAM[:1], LOSSES), ValueError, "solve … gram … squared norms … found (1, 2)"),
    "a scalar": (solve("equal", ONE[0]), ValueError, "solve … gram … K×K … found ()"),
    "no losses": (solve("emtl", GRAM), ValueError, "solve … emtl … losses … found None"),
    "too many losses": (solve("emtl", GRAM, torch.ones(3)), ValueError, "solve … losses … (2,) … found (3,)"),
    "unknown option": (solve("emtl", GRAM, LOSSES, beta=1), ValueError, "solve … option of emtl … lam … found 'beta'"),
    "short state": (solve("nash_mtl", GRAM, state=STATE[:1]), ValueError, "solve … state … (2,) … found (1,)"),
    "float32 state": (solve("nash_mtl", GRAM, state=LOSSES), ValueError, "solve … state … float64 … found … float32"),
    "too few options": (
        lambda: ops.registered.solve("emtl", GRAM, LOSSES, None, [0.5], None),
        ValueError,
        "solve … emtl … options … lam … found 1",
    ),
    "no state": (
        lambda: ops.registered.solve("nash_mtl", GRAM, None, None, [1.0, 0.0], None),
        ValueError,
        "solve … state … float64 … found None",
    ),
    # loss_scales
    "unknown rule": (scales("unknown", LOSSES), ValueError, "loss_scales … rule … igb_v1 … found 'unknown'"),
    "unknown rule option": (scales("log", LOSSES, beta=1), ValueError, "loss_scales … option of log … eps … 'beta'"),
    "no base losses": (scales("igb_v1", LOSSES), ValueError, "loss_scales … igb_v1 … per_task … found None"),
    "too few log scales": (scales("imtl_l", LOSSES, ONE), ValueError, "loss_scales … per_task … (2,) … found (1,)"),
    "whole losses": (scales("none", INT), TypeError, "loss_scales … losses … floating … found torch.int32"),
    "a matrix of losses": (scales("none", GRAM), ValueError, "loss_scales … losses … found (2, 2)"),
    # rollback_ and backends
    "shape of kept": (
        lambda: ops.rollback_([F32], [LONGER], ONE.int()),
        ValueError,
        "rollback_ … kept[0] … (3,) … found (4,)",
    ),
    "nothing kept": (lambda: ops.rollback_([F32], [], ONE.int()), ValueError, "rollback_ … kept … 1 … found 0"),
    "unknown backend": (lambda: ops.gram([[F32]], backend="x"), ValueError, "backend … cpu … reference … found 'x'"),
    "another device": (lambda: resolve("cpu", "cuda"), ValueError, "backend='cpu' … on the CPU … found … cuda"),
}


@pytest.mark.parametrize("name", CALLS)
def test_error(name):
    call, exception, message = CALLS[name]
    before = [t.clone() for t in WRITTEN]
    with pytest.raises(exception) as raised:
        call()
    rest = found = str(raised.value)
    for part in message.split(" … "):
        _, separator, rest = rest.partition(part)
        assert separator, f"{part!r} is missing, or not at its place, in: {found}"
    assert all(map(torch.equal, WRITTEN, before)), "something was written"
