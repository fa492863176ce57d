"""`state_dict` holds all that influences the next step, bit for bit; a state that does not fit changes nothing."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch

import igb_kernels as igb
from igb_kernels import losses

from .models import TASKS, Net, Snapshot, make_net, same
from .oracle import BASES, CASES

pytestmark = pytest.mark.usefixtures("rows_at_once")


class Run:
    """A model, its balancer and its optimizer; epochs of three steps, gradients of two batches added up."""

    def __init__(self, make: Any, dtype: torch.dtype = torch.float32, kind: str = "mlp") -> None:
        self.net = make_net(kind, dtype)
        self.balancer = igb.Balancer(**make(), shared=self.net.shared)
        params = [*self.net.parameters(), *self.balancer.parameters()]
        self.optimizer = torch.optim.SGD(params, lr=0.01, momentum=0.9)

    def steps(self, first: int, last: int) -> list[object]:
        """Everything that can be seen of steps first..last-1."""
        trace: list[object] = []
        for step in range(first, last):
            self.optimizer.zero_grad()
            results = [self.balancer.backward(self.net.losses(2 * step + half)) for half in (0, 1)]
            trace.append([r.losses for r in results])
            params = [*self.net.parameters(), *self.balancer.parameters()]
            trace += [[r.weights, r.scales, r.status, r.measured] for r in results if r.measured is not None]
            trace.append([p.grad.clone() for p in params])
            self.optimizer.step()
            self.balancer.after_step(self.net.losses(2 * step + 1))
            trace.append([p.detach().clone() for p in params])
            if step % 3 == 2:
                self.balancer.end_epoch()
        return trace

    def states(self) -> dict[str, Any]:
        parts = {"net": self.net, "balancer": self.balancer, "optimizer": self.optimizer}
        return {name: part.state_dict() for name, part in parts.items()}

    def save(self) -> dict[str, Any]:
        file = io.BytesIO()
        torch.save(self.states(), file)
        file.seek(0)
        return torch.load(file, weights_only=True)

    def load(self, states: dict[str, Any]) -> None:
        self.net.load_state_dict(states["net"])
        self.balancer.load_state_dict(states["balancer"])
        self.optimizer.load_state_dict(copy.deepcopy(states["optimizer"]))  # optimizers write into what they load


def igb_v2(background: bool, seed: int | None = 1) -> dict[str, object]:
    """An agent that learns from the fifth step on and acts from the ninth on."""
    rule = igb.IGBv2(0, background=background, steps_per_epoch=4, update_after=1, start_epoch=2, update_every=2,
                     batch_size=8, buffer_size=6, hidden=(8,), seed=seed)  # fmt: skip
    return {"gradients": "imtl_g", "losses": rule}


STATES = {
    **{name: CASES[name].make for name in CASES},
    "igb_v1 mid-epoch": lambda: {"gradients": "emtl", "losses": igb.IGBv1(1)},
    "igb_v1 mid-steps": lambda: {"gradients": "equal", "losses": igb.IGBv1(steps=9)},
    "imtl_l+db_mtl": lambda: {"gradients": igb.DBMTL(0.9, 0.3), "losses": igb.IMTLL(TASKS)},
    "moco": lambda: {"gradients": "moco"},
    "modo": lambda: {"gradients": igb.MoDo(gamma=0.01)},
    "sdm_grad": lambda: {"gradients": igb.SDMGrad(lr=0.1)},
    "excess_mtl": lambda: {"gradients": igb.ExcessMTL(0.5)},
    "grad_drop": lambda: {"gradients": igb.GradDrop(seed=3)},
    "grad_norm": lambda: {"gradients": igb.GradNorm(TASKS)},
    "uw": lambda: {"gradients": "imtl_g", "losses": losses.UW(TASKS)},
    "rlw": lambda: {"gradients": "equal", "losses": losses.RLW(3)},
    "dwa": lambda: {"gradients": "emtl", "losses": losses.DWA()},
    "dwa window": lambda: {"gradients": "imtl_g", "losses": losses.DWA(window=2)},
    "gls+db_mtl": lambda: {"gradients": "gls+db_mtl"},
    "stch": lambda: {"gradients": "equal", "losses": losses.STCH(nadir_epoch=1)},
    "famo": lambda: {"gradients": losses.FAMO()},
    "ldc_mtl": lambda: {"gradients": "imtl_g", "losses": losses.LDCMTL(TASKS)},
    "igb_v2 in the foreground": lambda: igb_v2(background=False),
    "igb_v2 in the background": lambda: igb_v2(background=True),
    "nash every 7": lambda: {"gradients": igb.NashMTL(update_every=7)},
    "metabalance": lambda: {"gradients": "metabalance"},
    "cagrad": lambda: {"gradients": "cagrad"},
    "upgrad": lambda: {"gradients": "upgrad"},
}
WITH_STATE = [
    "db_mtl sigma",
    "db_mtl bias correction",
    "nash_mtl every 3",
    "pcgrad",
    "gradvac",
    "grad_norm",
    "moco",
    "modo",
    "sdm_grad",
    "excess_mtl",
    "grad_drop",
    "metabalance",
    "igb_v1 mid-epoch",
    "imtl_l+db_mtl",
    "rlw",
    "dwa window",
    "stch",
    "famo",
    "ldc_mtl",
    "igb_v2 in the background",
]


@pytest.mark.parametrize("name", STATES)
def test_next_steps_have_the_same_bits(name):
    run = Run(STATES[name])
    for saved_at in (0, 2, 5):
        run.steps(max(0, saved_at - 3), saved_at)
        states = run.save()
        if saved_at:
            assert same(states["balancer"], copy.deepcopy(run.balancer.state_dict()))
        other = Run(STATES[name])
        other.load(states)
        run_on = Run(STATES[name])
        run_on.load(copy.deepcopy(run.save()))
        assert same(other.steps(saved_at, saved_at + 3), run_on.steps(saved_at, saved_at + 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WITH_STATE)
def test_an_uninterrupted_run_has_the_same_bits(name, dtype):
    whole, first, second = (Run(STATES[name], dtype, "conv") for _ in range(3))
    want = whole.steps(0, 8)
    start = first.steps(0, 4)
    second.load(first.save())
    assert same(start + second.steps(4, 8), want)


@pytest.mark.parametrize("name", [*WITH_STATE, "igb_v1 mid-steps"])
def test_later_steps_change_no_copy(name):
    run = Run(STATES[name])
    run.steps(0, 2)
    copied, saved = copy.deepcopy(run.balancer.state_dict()), run.save()
    kept = copy.deepcopy(copied)
    run.steps(2, 5)
    assert same(copied, kept)
    assert same(saved["balancer"], kept)
    assert not same(run.balancer.state_dict(), kept)


@pytest.mark.parametrize("name", [*WITH_STATE, "igb_v1 mid-steps"])
def test_a_loaded_snapshot_can_be_loaded_again(name):
    """As after going back to the best epoch twice: steps must not write into what was loaded."""
    run = Run(STATES[name])
    run.steps(0, 2)
    snapshot = run.save()
    kept = copy.deepcopy(snapshot["balancer"])
    run.load(snapshot)
    first = run.steps(2, 6)
    assert same(snapshot["balancer"], kept)
    again = Run(STATES[name])
    again.load(torch.load(io.BytesIO(_bytes(snapshot)), weights_only=True))
    assert same(again.steps(2, 6), first)


def _bytes(states: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.save(states, file)
    return file.getvalue()


@pytest.mark.parametrize("name", WITH_STATE)
def test_two_balancers_from_one_state_are_independent(name):
    source = Run(STATES[name])
    source.steps(0, 2)
    states = source.save()
    first, second = Run(STATES[name]), Run(STATES[name])
    first.load(states)
    second.load(states)
    want = first.steps(2, 5)
    assert same(second.steps(2, 5), want)


@pytest.mark.parametrize("name", WITH_STATE)
def test_state_can_be_pickled(name):
    run = Run(STATES[name])
    run.steps(0, 2)
    state = run.balancer.state_dict()
    assert same(pickle.loads(pickle.dumps(state)), state)


def test_names_are_part_of_the_state():
    net = make_net()
    first = igb.Balancer("imtl_g", shared=net.shared)
    first.backward(dict(zip("abc", net.losses(), strict=True)))
    second = igb.Balancer("imtl_g", shared=net.shared)
    second.load_state_dict(first.state_dict())
    losses = dict(zip("cba", net.losses()[::-1], strict=True))
    assert second.backward(losses).names == ("a", "b", "c")
    with pytest.raises(ValueError, match="no other tasks than"):
        second.backward(dict(zip("xyz", net.losses(), strict=True)))


def trained(make: Any, dtype: torch.dtype = torch.float32, tasks: int = TASKS, kind: str = "mlp") -> dict[str, Any]:
    net = make_net(kind, dtype, tasks)
    balancer = igb.Balancer(**make(), shared=net.shared)
    for step in range(2):
        balancer.backward(net.losses(step))
    return copy.deepcopy(balancer.state_dict())


def db(beta: float = 0.9) -> dict[str, Any]:
    return {"gradients": igb.DBMTL(beta)}


def imtl_l(tasks: int = TASKS) -> dict[str, Any]:
    return {"gradients": "equal", "losses": igb.IMTLL(tasks)}


def given(tasks: int = TASKS) -> dict[str, Any]:
    return {"gradients": "equal", "losses": igb.IGBv1(base_losses=BASES[:tasks])}


REFUSED = {
    "another method": (lambda: trained(db), CASES["nash_mtl"].make, r"log\+db_mtl.*none\+nash_mtl"),
    "another rule": (lambda: trained(CASES["log+imtl_g"].make), CASES["imtl_g"].make, r"log\+imtl_g.*none\+imtl_g"),
    "another model": (lambda: trained(db, kind="conv"), db, "moving averages do not fit the shared parameters"),
    "another dtype": (lambda: trained(db, torch.float64), db, "moving averages do not fit.*float64"),
    "another number of tasks": (lambda: trained(lambda: imtl_l(2), tasks=2), imtl_l, "num_tasks|log_scales"),
    "other base losses": (lambda: trained(lambda: given(2), tasks=2), given, "base_losses"),
    "no state": (dict, db, "method"),
}


@pytest.mark.parametrize("trained_before", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_a_state_that_does_not_fit(case, trained_before):
    state, make, message = REFUSED[case]
    runs = []
    for refuse in (False, True):
        run = Run(make)
        if trained_before:
            run.steps(0, 2)
        if refuse:
            before = Snapshot([*run.net.parameters(), *run.balancer.parameters()], run.balancer)
            with pytest.raises((ValueError, KeyError), match=message):
                run.balancer.load_state_dict(state())
            before.check()
        runs.append(run.steps(2, 4))
    assert same(*runs)


def test_a_balancer_can_be_loaded_back_to_before_its_first_step():
    net = make_net()
    balancer = igb.Balancer("igb_v1+db_mtl", shared=net.shared)
    fresh = copy.deepcopy(balancer.state_dict())
    first = balancer.backward(net.losses())
    balancer.load_state_dict(fresh)
    assert same(balancer.state_dict(), fresh)
    net.zero_grad()
    assert same(balancer.backward(net.losses()).weights, first.weights)
    balancer.load_state_dict(fresh)
    assert len(balancer.backward(Net.losses(net)[:2]).weights) == 2


@pytest.mark.parametrize(
    "make", [lambda lower: igb.EMTL(lower=lower), lambda p: igb.UPGrad(preference=p), igb.ConFIG, igb.AlignedMTL]
)
def test_numbers_for_each_task_are_checked_after_a_state_was_loaded(make):
    """As before the first step: solvers take them to be as many as the tasks."""
    net = make_net()
    first, second = (igb.Balancer(make([0.5] * tasks), shared=net.shared) for tasks in (TASKS, TASKS + 1))
    first.backward(net.losses())
    second.load_state_dict(first.state_dict())
    before = Snapshot(net.parameters(), second)
    with pytest.raises(ValueError, match=f"(lower|preference) must .*{TASKS}.*found {TASKS + 1}"):
        second.backward(net.losses())
    before.check()
