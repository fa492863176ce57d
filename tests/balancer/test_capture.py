"""Steps that go into a CUDA graph, run here as they are captured: they do what other steps do, on memory that stays."""

import pytest
import torch

import igb_kernels as igb
from igb_kernels import Status, balancer, losses, store
from igb_kernels.losses import _means
from igb_kernels.status import UsableSteps

from .models import TASKS, Net, make_net, same
from .oracle import BASES, CASES, balancer_of

CAPTURED = [name for name, case in CASES.items() if case.update_every == 1 and name not in ("igb_v1", "igb_v1+db_mtl")]


@pytest.fixture
def capture(monkeypatch):
    def switch(on: bool = True) -> None:
        for module in (balancer, store, _means):
            monkeypatch.setattr(module, "captures_graph", lambda device: on)

    return switch


def step(balanced: igb.Balancer, net: Net, seed: int, spoil: bool = False) -> list[object]:
    net.zero_grad()
    losses = net.losses(seed)
    result = balanced.backward([losses[0] * torch.nan, *losses[1:]] if spoil else losses)
    return [result.weights, result.status, [p.grad for p in net.parameters()]]


def state_addresses(balanced: igb.Balancer) -> list[int]:
    found: list[int] = []

    def visit(state: object) -> None:
        if isinstance(state, torch.Tensor):
            found.append(state.data_ptr())
        for part in state.values() if isinstance(state, dict) else state if isinstance(state, list) else ():
            visit(part)

    visit(balanced.state_dict())
    return found


RULES = {
    "rlw": lambda: losses.RLW(0),
    "dwa": losses.DWA,
    "dwa window": lambda: losses.DWA(window=2),
    "gls": losses.GLS,
    "stch": lambda: losses.STCH(nadir_epoch=0),
    "famo": losses.FAMO,
    "uw": lambda: losses.UW(TASKS),
    "ldc_mtl": lambda: losses.LDCMTL(TASKS),
}


@pytest.mark.parametrize("rule", RULES)
def test_captured_steps_of_rules_are_ordinary_ones(capture, rule):
    """With losses told after each, ends of epochs and a non-finite step among them."""
    net = make_net()
    found = []
    for captures in (False, True):
        balanced = igb.Balancer("imtl_g", RULES[rule](), shared=net.shared)
        steps = []
        for seed in range(9):
            capture(captures and 1 <= seed < 7)
            steps.append(step(balanced, net, seed, spoil=seed == 4))
            balanced.after_step(torch.stack(net.losses(seed + 1)))
            if seed % 2:
                balanced.end_epoch()
        found.append([steps, balanced.state_dict()])
    assert same(*found)


@pytest.mark.parametrize("warm_up", [1, 2])
@pytest.mark.parametrize("name", CAPTURED)
def test_captured_steps_are_ordinary_ones(capture, name, warm_up):
    """Before, in and after the capture, a non-finite step among them."""
    net = make_net()
    plain, captured = balancer_of(CASES[name], net), balancer_of(CASES[name], net)
    want = [step(plain, net, seed, spoil=seed == 4) for seed in range(8)]
    found = []
    for seed in range(8):
        capture(warm_up <= seed < 6)
        found.append(step(captured, net, seed, spoil=seed == 4))
    assert same(found, want)


@pytest.mark.parametrize("name", [name for name in CAPTURED if name != "imtl_l"])  # whose state is a parameter
def test_from_the_capture_on_the_state_stays_in_place(capture, name):
    net = make_net()
    balanced = balancer_of(CASES[name], net)
    step(balanced, net, 0)
    before = state_addresses(balanced)
    for seed in range(1, 4):
        capture(seed == 1)
        step(balanced, net, seed)
        assert state_addresses(balanced) == before


def test_the_first_step_cannot_be_captured(capture):
    capture()
    net = make_net()
    with pytest.raises(RuntimeError, match="first step cannot be captured"):
        igb.Balancer("imtl_g", shared=net.shared).backward(net.losses())


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: {"gradients": igb.NashMTL(update_every=2)}, r"NashMTL\(update_every=2\) counts steps on the host"),
        (lambda: {"gradients": igb.IGBv1(steps=5)}, r"IGBv1\(steps=5\) has yet to measure its base losses on the host"),
        (lambda: {"gradients": igb.IGBv2()}, r"IGBv2\(.*\) lets its agent choose the weights on the host"),
    ],
)
def test_what_the_host_decides_cannot_be_captured(capture, make, reason):
    net = make_net()
    balanced = igb.Balancer(**make(), shared=net.shared)
    step(balanced, net, 0)
    capture()
    with pytest.raises(RuntimeError, match=reason):
        balanced.backward(net.losses(1))


def test_base_losses_of_an_epoch_are_measured_in_place(capture):
    """So replays of a step that was captured before count as well, and read them."""
    net, rule = make_net(), igb.IGBv1(1)
    balanced = igb.Balancer("imtl_g", rule, shared=net.shared)
    step(balanced, net, 0)
    capture()
    step(balanced, net, 1)
    assert bool(rule.base.state_dict()["sums"].all())  # which an eager step of an earlier epoch leaves alone
    capture(False)
    balanced.end_epoch()
    for seed in (2, 3):
        step(balanced, net, seed)
    read, base = rule.per_task(), torch.stack([torch.stack(net.losses(i)) for i in (2, 3)]).double().mean(dim=0)
    assert bool(read.isnan().all())
    balanced.end_epoch()
    torch.testing.assert_close(read, base, rtol=1e-6, atol=0.0)


def test_once_the_base_losses_are_known_igb_v1_can_be_captured(capture):
    net = make_net()
    for rule in (igb.IGBv1(steps=2), igb.IGBv1(0), igb.IGBv1(base_losses=BASES[:TASKS])):
        balanced = igb.Balancer("imtl_g", rule, shared=net.shared)
        capture(False)
        for seed in range(2):
            step(balanced, net, seed)
        balanced.end_epoch()
        capture()
        step(balanced, net, 2)


def test_a_parameter_that_is_first_reached_in_a_captured_step(capture):
    net = make_net()
    extra = torch.nn.Parameter(torch.ones(5))
    balanced = igb.Balancer(igb.DBMTL(0.9), shared=[*net.shared, extra])
    balanced.backward(net.losses(0))
    capture()
    losses = net.losses(1)
    with pytest.raises(RuntimeError, match=r"first gradient of task 1 in a captured step"):
        balanced.backward([losses[0], losses[1] + extra.sum(), *losses[2:]])
    capture(False)
    net.zero_grad()
    balanced.backward([loss + extra.sum() for loss in net.losses(2)])
    assert bool(extra.grad.isfinite().all())


def test_parameters_first_reached_after_a_capture(capture):
    net = make_net()
    extra = torch.nn.Parameter(torch.ones(5))
    plain, captured = (igb.Balancer(igb.DBMTL(0.9), shared=[*net.shared, extra]) for _ in range(2))
    for balanced in (plain, captured):
        for seed in range(4):
            capture(balanced is captured and seed == 1)
            net.zero_grad()
            extra.grad = None
            balanced.backward([loss + (extra.sum() if seed > 1 else 0) for loss in net.losses(seed)])
    assert same(captured.state_dict(), plain.state_dict())


def test_usable_steps_are_read_when_the_next_one_begins():
    steps, status = UsableSteps(3), torch.tensor(0, dtype=torch.int32)
    steps.add(status)
    status.fill_(int(Status.NON_FINITE))  # nothing has read it yet
    assert steps.count == 3
    for flag in (Status(0), Status.ZERO_GRADIENT, Status.NON_POSITIVE_LOSS, Status.NON_FINITE):
        steps.add(torch.tensor(int(flag), dtype=torch.int32))
    assert steps.count == 5
