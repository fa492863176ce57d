"""The original loss-balancing rules' effective weights, from golden vectors.

Our policy differs where a loss is not finite (every scale is NaN, NON_FINITE) or is negative under a logarithm (every
scale is NaN, NON_POSITIVE_LOSS; the originals silently ascend that task): there the policy is tested, also where the
case is trusted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from golden import Case, cases
from torch import Tensor

from igb_kernels import IMTLL, Status, ops
from igb_kernels.backends import resolve
from igb_kernels.losses import DWA, FAMO, LDCMTL, UW
from igb_kernels.losses.rlw import weights_of


def full(case: Case, value: float) -> Tensor:
    return torch.full_like(case.losses, value)


@dataclass(frozen=True)
class Rule:
    """What computes a golden file's weights."""

    name: str
    per_task: Callable[[Case], Tensor] | None = None
    options: Callable[[Case], dict[str, float]] = field(default=lambda case: {})
    under_a_logarithm: bool = False


FILES = {
    "ew__libmtl": Rule("none"),
    "si__igb4mtl": Rule("log", under_a_logarithm=True),
    "igbv1__igb4mtl": Rule("igb_v1", lambda case: case.base_losses, under_a_logarithm=True),
    "imtl_l__torchjd": Rule("imtl_l", lambda case: case.log_scale),
    "uw__torchjd": Rule("uw", lambda case: case.log_var),
    "uw_init__libmtl": Rule(
        "uw", lambda case: UW(len(case.losses), case.params["init"], dtype=torch.float64).per_task()
    ),
    "dwa__torchjd": Rule("dwa", lambda case: case.epochs.mean(dim=1), lambda case: {"temperature": case.params["T"]}),
    "gls__libmtl": Rule("gls", under_a_logarithm=True),
    "gls__torchjd": Rule("gls", under_a_logarithm=True),
    "stch__torchjd": Rule(
        "stch", lambda case: torch.stack([case.lam, case.reference]), lambda case: {"mu": case.params["mu"]}
    ),
    "stch__libmtl": Rule(
        "stch",
        lambda case: torch.stack([full(case, 1.0), case.warmup_losses.mean(dim=0)]),
        lambda case: {"mu": case.params["mu"], "of_logs": 1.0},
        under_a_logarithm=True,
    ),
    "ldc_mtl__qm9": Rule(
        "ldc_mtl",
        lambda case: torch.stack([case.sigma.logit(), case.initial_losses]),
        lambda case: {"form": 0.0, "all_pairs": 0.0, "lamb": case.params["lamb"]},
        under_a_logarithm=True,
    ),
    "ldc_mtl__celeba": Rule(
        "ldc_mtl",
        lambda case: torch.stack([case.sigma.logit(), case.initial_losses]),
        lambda case: {"form": 1.0, "all_pairs": 0.0, "lamb": case.params["lamb"]},
    ),
    "ldc_mtl__nyuv2": Rule(
        "ldc_mtl",
        lambda case: torch.stack([case.sigma.logit(), case.initial_losses]),
        lambda case: {"form": 2.0, "all_pairs": 0.0, "lamb": case.params["lamb"]},
    ),
}


def with_rules(*names: str) -> list[object]:
    """All cases of the files, each with its rule."""
    return [pytest.param(FILES[name], *p.values, id=p.id) for name in names for p in cases(name)]


def scales_of(rule: Rule, case: Case, backend: str, state: Tensor | None = None) -> tuple[Tensor, Status]:
    per_task = None if rule.per_task is None else rule.per_task(case)
    scales, status = ops.loss_scales(
        rule.name, case.losses, per_task, state=state, backend=backend, **rule.options(case)
    )
    return scales, Status(int(status))


@pytest.mark.parametrize(("rule", "case"), with_rules(*FILES))
def test_scales(rule, case, backend):
    losses = case.losses
    scales, status = scales_of(rule, case, backend)
    if not losses.isfinite().all():
        assert (status, scales.isnan().all()) == (Status.NON_FINITE, True)
    elif rule.under_a_logarithm and (losses < 0).any():
        assert (status, scales.isnan().all()) == (Status.NON_POSITIVE_LOSS, True)
    elif rule.name == "gls" and (losses == 0).any():
        assert (status, scales.any()) == (Status.NON_POSITIVE_LOSS, False)
    elif case.trust:
        assert status == 0
        case.assert_weights(scales)
    elif rule.name == "stch":  # the original adds an epsilon to the losses
        assert case.tags <= {"tiny", "zero-loss"}
        large = losses > 1e-6
        torch.testing.assert_close(scales[large], case.weights[large], rtol=1e-10, atol=0)
        assert (scales.isfinite() & (scales >= 0)).all()
    else:
        assert case.tags == {"zero-loss"}
        assert status == 0
        assert scales.isfinite().all()
        assert rule.name == "ldc_mtl" or (scales > 0).all()
        others = case.weights.isfinite() & (losses > 0)
        torch.testing.assert_close(scales[others], case.weights[others], rtol=1e-10, atol=0)


LEARNED = {"imtl_l__torchjd": (IMTLL, "log_scale", "dlog_scale"), "uw__torchjd": (UW, "log_var", "dlog_var")}
LEARNED_CASES = [pytest.param(*LEARNED[name], *p.values, id=p.id) for name in LEARNED for p in cases(name)]


@pytest.mark.parametrize(("rule", "parameter", "gradient", "case"), LEARNED_CASES)
def test_gradient_of_what_is_learned(rule, parameter, gradient, case, backend):
    rule = rule(len(case.losses), dtype=torch.float64)
    rule.load_state_dict({rule.parameter_name: getattr(case, parameter)})
    scales, status = rule.scales(case.losses, resolve(backend, "cpu"))
    rule.commit(case.losses, scales, status)
    if case.losses.isfinite().all():
        torch.testing.assert_close(rule.parameter.grad, getattr(case, gradient), rtol=1e-10, atol=1e-14)
    else:
        assert rule.parameter.grad.isnan().all()


@pytest.mark.parametrize(("form", "case"), [
    pytest.param(form, *p.values, id=p.id)
    for form, name in (("log", "qm9"), ("raw", "celeba"), ("ratio", "nyuv2"))
    for p in cases(f"ldc_mtl__{name}")
])  # fmt: skip
def test_gradient_of_the_router(form, case, backend):
    """Through the sigmoid that gives the case's σ."""
    rule = LDCMTL(len(case.losses), form, pairs="adjacent", lamb=case.params["lamb"], dtype=torch.float64)
    rule.load_state_dict({"router_logits": case.sigma.logit(), "initial_losses": case.initial_losses})
    scales, status = rule.scales(case.losses, resolve(backend, "cpu"))
    rule.commit(case.losses, scales, status)
    if not case.losses.isfinite().all() or (form == "log" and (case.losses < 0).any()):
        assert rule.router_logits.grad.isnan().all()
    elif case.trust:
        expected = case.dsigma * case.sigma * (1 - case.sigma)
        torch.testing.assert_close(
            rule.router_logits.grad, expected, rtol=1e-9, atol=1e-14 * float(expected.abs().max())
        )


@pytest.mark.parametrize("case", cases("rlw__torchjd", "rlw__libmtl", "rlw__igb4mtl"))
def test_random_weights(case):
    """From the originals' own normals; that kernel and reference draw the same ones is tested elsewhere."""
    total = len(case.losses) if case.file["peer"] == "IGB4MTL" else 1
    case.assert_weights(total * weights_of(case.normals))


@pytest.mark.parametrize("case", cases("dwa__torchjd"))
def test_dwa_over_epochs(case, backend):
    """The rule measures the epochs' means itself; the peer has weights also for losses that are not finite."""
    run, rule = resolve(backend, "cpu"), DWA(case.params["T"])
    rule.start(len(case.losses), torch.device("cpu"))
    for epoch in case.epochs:
        for losses in epoch:
            scales, status = rule.scales(losses, run)
            assert torch.equal(scales, torch.ones_like(losses))
            rule.commit(losses, scales, status)
        rule.end_epoch()
    case.assert_weights(rule.scales(torch.ones_like(case.losses), run)[0])


@pytest.mark.parametrize("case", cases("dwa_window__igb4mtl"))
def test_dwa_over_a_window(case, backend):
    run = resolve(backend, "cpu")
    ones = DWA(case.params["T"], window=int(case.params["iteration_window"]), placeholder_ones=True)
    ours = DWA(case.params["T"], window=int(case.params["iteration_window"]))
    found = {}
    for rule in (ones, ours):
        rule.start(len(case.losses), torch.device("cpu"))
        for losses in (*case.history, case.losses):
            scales, status = rule.scales(losses, run)
            rule.commit(losses, scales, status)
        found[rule] = scales
    if not case.losses.isfinite().all():
        assert found[ours].isnan().all()
        return
    assert torch.equal(found[ones], found[ours])  # the window is full
    if case.trust:
        case.assert_weights(found[ours])
    else:  # the peer's exponentials overflow
        assert case.weights.isnan().any()
        assert float(found[ours].sum()) == pytest.approx(len(case.losses))


@pytest.mark.parametrize("case", cases("famo__official", "famo__torchjd"))
def test_famo(case, backend):
    run, rule = resolve(backend, "cpu"), FAMO(case.params["gamma"], case.params["w_lr"])
    rule.start(len(case.steps[0].losses), torch.device("cpu"))
    for step in case.steps:
        scales, status = rule.scales(step.losses, run)
        rule.commit(step.losses, scales, status)
        rule.after_step(step.losses_after, run)
        if case.trust:
            assert status == 0
            step.assert_weights(scales)
        else:
            bad = Status.NON_POSITIVE_LOSS if step.losses.isfinite().all() else Status.NON_FINITE
            assert (Status(int(status)), scales.isnan().all()) == (bad, True)
            assert not rule.logits.any()
