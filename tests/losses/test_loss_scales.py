"""Scales of every rule: definitions, invariances, and the policy for losses that a rule cannot take."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from igb_kernels import Status, ops
from igb_kernels.status import UNUSABLE

TWO_ROWS = torch.tensor([[0.5, 2.0, 1.0], [0.25, 4.0, 3.0]])
UNKNOWN = torch.tensor([[0.5, 2.0, 1.0], [0.25, torch.nan, 3.0]])

RULES = {
    "none": {},
    "log": {},
    "log with eps": {"eps": 1e-8},
    "igb_v1": {"per_task": torch.tensor([0.5, 2.0, 1.0])},
    "igb_v1, unknown base": {"per_task": torch.tensor([0.5, torch.nan, 1.0])},
    "igb_v2": {"per_task": torch.tensor([1.0, 0.25, 1.75])},
    "imtl_l": {"per_task": torch.tensor([-1.0, 0.0, 3.0])},
    "uw": {"per_task": torch.tensor([-1.0, 0.0, 3.0])},
    "rlw": {},
    "rlw of sum K": {"times_tasks": 1.0},
    "dwa": {"per_task": TWO_ROWS, "temperature": 0.5},
    "dwa, unknown mean": {"per_task": UNKNOWN},
    "gls": {},
    "stch": {"per_task": TWO_ROWS, "mu": 10.0},
    "stch of logs": {"per_task": TWO_ROWS, "mu": 2.0, "of_logs": 1.0},
    "stch of logs, unknown nadir": {"per_task": UNKNOWN, "of_logs": 1.0},
    "famo": {},
    "ldc_mtl": {"per_task": TWO_ROWS},
    "ldc_mtl, unknown first losses": {"per_task": UNKNOWN},
    "ldc_mtl raw": {"per_task": TWO_ROWS, "form": 1.0},
    "ldc_mtl ratios": {"per_task": TWO_ROWS, "form": 2.0, "router": 1.0, "all_pairs": 0.0},
    "ldc_mtl plain": {"per_task": TWO_ROWS, "form": 3.0, "router": 2.0},
}
UNDER_A_LOGARITHM = [
    name for name in RULES if name.startswith(("log", "igb", "gls", "stch of", "famo", "ldc_mtl,")) or name == "ldc_mtl"
]
WITHOUT_LOSSES = [name for name in RULES if name.startswith(("none", "imtl", "uw", "rlw", "dwa"))]
"""Scales do not depend on this step's losses."""

every_rule = pytest.mark.parametrize("name", RULES)
positive = st.floats(1e-6, 1e6)
three_losses = st.lists(positive, min_size=3, max_size=3).map(lambda v: torch.tensor(v, dtype=torch.float64))


def scales_of(name, losses, backend, **changed):
    scales, status = ops.loss_scales(rule_of(name), losses, backend=backend, **{**RULES[name], **changed})
    return scales, Status(int(status))


def rule_of(name):
    return name.replace(",", " ").split()[0]


def new_state(name, tasks):
    return ops.RULES[rule_of(name)].new_state(tasks, torch.device("cpu"))


def definitions(per_task, losses):
    """Of the rules that have a closed form; of the others, their own tests know more."""
    first, second = (None, None) if per_task is None or per_task.dim() == 1 else per_task.double()
    return {
        "none": lambda: torch.ones(3, dtype=torch.float64),
        "log": lambda: 1 / losses,
        "log with eps": lambda: 1 / (losses + 1e-8),
        "igb_v1": lambda: 3 * torch.softmax(losses / per_task.double(), dim=0) / losses,
        "igb_v1, unknown base": lambda: 1 / losses,
        "igb_v2": lambda: per_task.double() / losses,
        "imtl_l": lambda: per_task.double().exp(),
        "uw": lambda: (-per_task.double()).exp() / 2,
        "dwa": lambda: 3 * torch.softmax(second / first / 0.5, dim=0),
        "dwa, unknown mean": lambda: torch.ones(3, dtype=torch.float64),
        "gls": lambda: losses.log().mean().exp() / (3 * losses),
        "stch": lambda: first * torch.softmax(first * (losses - second) / 10, dim=0),
        "stch of logs": lambda: 3 * first * torch.softmax(first * (losses / second).log() / 2, dim=0) / losses,
        "stch of logs, unknown nadir": lambda: 1 / losses,
        "famo": lambda: 1 / (losses + 1e-8) / (1 / (losses + 1e-8)).sum(),
    }


@pytest.mark.parametrize("name", definitions(None, None))
@given(three_losses)
def test_definition(name, backend, losses):
    scales, status = scales_of(name, losses, backend)
    expected = definitions(RULES[name].get("per_task"), losses)[name]()
    torch.testing.assert_close(scales, expected, rtol=1e-12, atol=1e-300)
    assert status == 0


@every_rule
@given(losses=three_losses)
def test_backends_agree(name, losses):
    found = {}
    for backend in ("cpu", "reference"):
        state = new_state(name, 3)
        scales, status = scales_of(name, losses, backend, state=state)
        learned = torch.zeros(0) if state is None else state[:3] if name.startswith("ldc_mtl") else state  # and room
        found[backend] = (scales, learned, status)
    for ours, reference in zip(*found.values(), strict=True):
        if isinstance(ours, Status):
            assert ours == reference
        else:
            noise = 1e-14 * float(reference.abs().amax()) if len(reference) else 0.0  # of a difference
            torch.testing.assert_close(ours, reference, rtol=1e-13, atol=noise)


@every_rule
@pytest.mark.parametrize("bad", [[1.0, torch.nan, 2.0], [1.0, -1.0, 2.0]])
def test_the_state_stays_where_there_are_no_scales(name, backend, bad):
    state = new_state(name, 3)
    if state is None:
        return
    state.fill_(2.0)
    _, status = scales_of(name, torch.tensor(bad), backend, state=state)
    assert (state == 2.0).all() == bool(status & UNUSABLE)


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scales_are_computed_in_float64_and_come_in_the_losses_dtype(name, backend, dtype):
    losses = torch.tensor([0.3, 7.0, 1.5]).to(dtype)
    scales, _ = scales_of(name, losses, backend)
    exact, _ = scales_of(name, losses.double(), backend)
    assert torch.equal(scales, exact.to(dtype))


@every_rule
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_non_finite_loss_makes_every_scale_nan(name, backend, value):
    scales, status = scales_of(name, torch.tensor([1.0, value, 2.0]), backend)
    assert scales.isnan().all()
    assert status == Status.NON_FINITE


@pytest.mark.parametrize("name", UNDER_A_LOGARITHM)
def test_a_negative_loss_under_a_logarithm(name, backend):
    scales, status = scales_of(name, torch.tensor([1.0, -0.1, 2.0]), backend)
    assert scales.isnan().all()
    assert status == Status.NON_POSITIVE_LOSS


@pytest.mark.parametrize("name", [name for name in RULES if name not in UNDER_A_LOGARITHM])
def test_a_negative_loss_elsewhere_is_ordinary(name, backend):
    negative, status = scales_of(name, torch.tensor([1.0, -0.1, 2.0]), backend)
    assert name not in WITHOUT_LOSSES or torch.equal(negative, scales_of(name, torch.ones(3), backend)[0])
    assert negative.isfinite().all()
    assert status == 0


@pytest.mark.parametrize("name", [name for name in UNDER_A_LOGARITHM if not name.startswith(("gls", "ldc_mtl"))])
def test_a_zero_loss_has_a_finite_scale(name, backend):
    """So that a finished task with a zero gradient contributes 0, not NaN."""
    scales, status = scales_of(name, torch.tensor([1.0, 0.0, 2.0]), backend)
    assert (scales.isfinite() & (scales > 0)).all()
    assert status == 0


def test_eps_carries_a_slightly_negative_loss(backend):
    """log(L + eps) is defined down to −eps."""
    losses = torch.tensor([1.0, -0.5e-8, 2.0], dtype=torch.float64)
    scales, status = scales_of("log with eps", losses, backend)
    torch.testing.assert_close(scales, 1 / (losses + 1e-8))
    assert status == 0


@given(three_losses, three_losses)
def test_igb_weights_are_positive_and_sum_to_k(backend, losses, base):
    scales, _ = scales_of("igb_v1", losses, backend, per_task=base)
    weights = scales * losses
    assert float(weights.sum()) == pytest.approx(3)
    assert (weights >= 0).all()


@given(three_losses, three_losses, three_losses)
def test_igb_updates_are_free_of_the_losses_scales(backend, losses, base, factors):
    """s_k ∝ 1 / c_k under L_k, base_k → c_k L_k, c_k base_k."""
    before, _ = scales_of("igb_v1", losses, backend, per_task=base)
    after, _ = scales_of("igb_v1", factors * losses, backend, per_task=factors * base)
    torch.testing.assert_close(factors * after, before, rtol=1e-6, atol=1e-280)


@pytest.mark.parametrize("base", [[0.0, 1.0, 1.0], [1e-300, 1.0, 1.0], [torch.inf, 1.0, 1.0]])
@pytest.mark.parametrize("losses", [[1.0, 2.0, 3.0], [1e12, 1e-12, 1.0], [1e300, 1.0, 1.0]])
def test_igb_survives_extreme_bases(backend, base, losses):
    losses, base = (torch.tensor(v, dtype=torch.float64) for v in (losses, base))
    scales, status = scales_of("igb_v1", losses, backend, per_task=base)
    assert status == 0
    assert float((scales * losses).sum()) == pytest.approx(3)


@pytest.mark.parametrize(("log_scale", "scale"), [(1e3, 20.0), (-1e3, -20.0), (19.0, 19.0)])
def test_imtl_l_clamps_log_scales(backend, log_scale, scale):
    scales, status = scales_of("imtl_l", torch.ones(1).double(), backend, per_task=torch.tensor([log_scale]))
    assert float(scales) == pytest.approx(float(torch.tensor(scale).double().exp()), rel=1e-12)
    assert status == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_imtl_l_reports_a_log_scale_that_is_not_finite(backend, value):
    scales, status = scales_of("imtl_l", torch.ones(3), backend, per_task=torch.tensor([0.0, value, 0.0]))
    assert scales.isnan().all()
    assert status == Status.NON_FINITE


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_igb_v2_reports_a_weight_that_is_not_finite(backend, value):
    scales, status = scales_of("igb_v2", torch.ones(3), backend, per_task=torch.tensor([1.0, value, 1.0]))
    assert scales.isnan().all()
    assert status == Status.NON_FINITE


@every_rule
def test_one_task(name, backend):
    per_task = RULES[name].get("per_task")
    changed = {} if per_task is None else {"per_task": per_task[..., :1]}
    scales, status = scales_of(name, torch.tensor([4.0], dtype=torch.float64), backend, **changed)
    others = {"imtl_l": torch.e**-1, "uw": torch.e / 2, "stch": 0.5, "stch of logs": 0.5 / 4}
    others |= {"stch of logs, unknown nadir": 0.5 / 4, "ldc_mtl ratios": 1.0}
    others |= {"ldc_mtl raw": 1.0, "ldc_mtl plain": 0.8}  # where the router's share of 1 is clamped
    ones = name in WITHOUT_LOSSES or name in ("gls", "famo")
    assert float(scales) == pytest.approx(others.get(name, 1.0 if ones else 0.25), rel=1e-6)
    assert status == 0
