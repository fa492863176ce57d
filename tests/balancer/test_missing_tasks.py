"""A step where tasks are missing is a step of the others alone; what belongs to the missing ones stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import igb_kernels as igb
from igb_kernels.gradients import METHODS
from igb_kernels.losses import RULES

from .models import TASK_SCALES, TASKS, Net, Snapshot, make_net, same
from .test_errors import Fails

ALL = tuple(range(TASKS))
SOME = (0, 2)
NUMBERS = (0.7, 2.0, 0.4)
"""A number for each task, where a method takes one."""

Make = Callable[[Sequence[int]], dict[str, Any]]
"""A balancer's arguments, for some of the tasks."""


def of(ids: Sequence[int]) -> list[float]:
    return [NUMBERS[k] for k in ids]


RANDOM = ("pcgrad", "gradvac", "grad_drop")
CASES: dict[str, Make] = {
    **{name: lambda ids, name=name: {"gradients": METHODS[name]()} for name in METHODS if name != "grad_norm"},
    **{name: lambda ids, name=name: {"gradients": METHODS[name](seed=1)} for name in RANDOM},
    "db_mtl sigma, bias correction": lambda ids: {"gradients": igb.DBMTL(0.9, 0.5, bias_correction=True)},
    "db_mtl beta 0": lambda ids: {"gradients": igb.DBMTL(0.0)},
    "emtl lower": lambda ids: {"gradients": igb.EMTL(lower=[0.01 * n for n in of(ids)])},
    "aligned_mtl preference": lambda ids: {"gradients": igb.AlignedMTL(of(ids))},
    "config preference": lambda ids: {"gradients": igb.ConFIG(of(ids))},
    "upgrad preference": lambda ids: {"gradients": igb.UPGrad(of(ids))},
    "grad_drop leak": lambda ids: {"gradients": igb.GradDrop([0.5 * n for n in of(ids)], seed=1)},
    "grad_norm": lambda ids: {"gradients": igb.GradNorm(len(ids))},
    "grad_norm direct": lambda ids: {"gradients": igb.GradNorm(len(ids), form="direct")},
    "grad_norm epoch": lambda ids: {"gradients": igb.GradNorm(len(ids), initial_losses="epoch")},
    "moco libmtl": lambda ids: {"gradients": igb.MoCo(parity="libmtl")},
    "mgda loss+": lambda ids: {"gradients": igb.MGDA("loss+")},
    "nash_mtl every 3": lambda ids: {"gradients": igb.NashMTL(1.2, 3)},
    "excess_mtl eta 1": lambda ids: {"gradients": igb.ExcessMTL(1.0)},
    "log": lambda ids: {"gradients": "log"},
    "gls": lambda ids: {"gradients": "gls+emtl"},
    "igb_v1": lambda ids: {"gradients": "imtl_g", "losses": igb.IGBv1(0)},
    "igb_v1 steps": lambda ids: {"gradients": "equal", "losses": igb.IGBv1(steps=2)},
    "igb_v1 given": lambda ids: {"gradients": "db_mtl", "losses": igb.IGBv1(base_losses=of(ids))},
    "rlw": lambda ids: {"gradients": "emtl", "losses": igb.RLW(seed=2)},
    "imtl_l": lambda ids: {"gradients": "equal", "losses": igb.IMTLL(len(ids))},
    "uw": lambda ids: {"gradients": "nash_mtl", "losses": igb.UW(len(ids))},
    "dwa": lambda ids: {"gradients": "equal", "losses": igb.DWA()},
    "dwa window": lambda ids: {"gradients": "imtl_g", "losses": igb.DWA(window=2)},
    "stch": lambda ids: {"gradients": "equal", "losses": igb.STCH()},
    "stch preference, ideal": lambda ids: {"gradients": "emtl", "losses": igb.STCH(preference=of(ids), ideal=of(ids))},
    "stch nadir_epoch": lambda ids: {"gradients": "equal", "losses": igb.STCH(nadir_epoch=0)},
    "stch nadir": lambda ids: {"gradients": "equal", "losses": igb.STCH(nadir=of(ids), preference=of(ids))},
    "famo": lambda ids: {"gradients": "equal", "losses": igb.FAMO()},
    "famo lower": lambda ids: {"gradients": "db_mtl", "losses": igb.FAMO(lower=[0.01 * n for n in of(ids)])},
    "ldc_mtl": lambda ids: {"gradients": "imtl_g", "losses": igb.LDCMTL(len(ids))},
    "ldc_mtl adjacent": lambda ids: {"gradients": "equal", "losses": igb.LDCMTL(len(ids), "ratio", pairs="adjacent")},
}  # fmt: skip
every_case = pytest.mark.parametrize("name", CASES)
HEADS = {"rlw": 2, "famo": 2, "pcgrad": 2, "gradvac": 2, "grad_drop": 2, "db_mtl": 3, "moco": 2}
"""Of states: how many numbers at their beginning belong to no task."""
SHARED_OUT = ("moco", "modo", "sdm_grad", "excess_mtl")
"""Their weights are brought to another sum in between, which rounds."""


def test_every_method_and_rule_is_there():
    made = [igb.Balancer(**make(ALL), shared=make_net().shared) for make in CASES.values()]
    assert {b.gradients.name for b in made} == set(METHODS)
    assert {b.losses.name for b in made} == set(RULES) - {"igb_v2"}  # see tests/losses/test_igb_v2.py


class Run:
    """A balancer over a model of three tasks that is told of `ids` alone, or of all with the others missing."""

    def __init__(self, name: str, ids: Sequence[int] = ALL, heads: str = "scaled") -> None:
        self.net, self.ids = make_net(), ids
        own = {"heads": heads, "task_parameters": self.net.own} if heads == "weighted" else {}
        self.balancer = igb.Balancer(**CASES[name](ids), shared=self.net.shared, **own)

    def losses(self, seed: int, there: Sequence[int]) -> list[Tensor | None]:
        losses = self.net.losses(seed)
        return [losses[k] if k in there else None for k in self.ids]

    def step(
        self, seed: int, there: Sequence[int] | None = None, train: bool = True
    ) -> tuple[igb.result.BalanceResult, list[Tensor]]:
        there = self.ids if there is None else there
        params = [*self.net.parameters(), *self.balancer.parameters()]
        for p in params:
            p.grad = None
        result = self.balancer.backward(self.losses(seed, there))
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]
        if train:
            with torch.no_grad():
                for p, grad in zip(params, grads, strict=True):
                    p -= 0.01 * grad
                self.balancer.after_step(self.losses(seed, there))
        return result, grads


def check_same_step(name: str, some: Any, alone: Any, ids: Sequence[int]) -> None:
    """`some`: of three tasks, the others missing; `alone`: of the others alone."""
    (some, some_grads), (alone, alone_grads) = some, alone
    index, missing = torch.tensor(ids), [k for k in ALL if k not in ids]
    off = 1e-12 if name.split()[0] in SHARED_OUT else 0.0
    tolerance = {"rtol": off, "atol": off}
    assert some.active == tuple(ids)
    assert alone.active is None
    assert same(some.status, alone.status)
    assert same(some.losses[index], alone.losses)
    assert same(some.scales[index], alone.scales)
    torch.testing.assert_close(some.weights[index], alone.weights, **tolerance)
    assert bool(some.losses[missing].isnan().all())
    assert not some.scales[missing].any()
    assert not some.weights[missing].any()
    assert (some.measured is None) == (alone.measured is None)
    if some.measured is not None:
        kept = some.measured[index] if some.measured.dim() == 1 else some.measured[index][:, index]
        assert same(kept, alone.measured)
        assert some.measured.count_nonzero() == alone.measured.count_nonzero()
    for ours, theirs in zip(some_grads, alone_grads, strict=True):
        if ours.shape == theirs.shape:
            torch.testing.assert_close(ours, theirs, rtol=max(1e-6, off) if off else 0.0, atol=off)
        else:  # of a parameter with a number for each task
            torch.testing.assert_close(ours[index], theirs, **tolerance)
            assert not ours[missing].any()


@every_case
@pytest.mark.parametrize("heads", ["scaled", "weighted"])
def test_steps_without_a_task_are_those_of_the_others(name, heads):
    """From the first step on, over an epoch's end."""
    some, alone = Run(name, heads=heads), Run(name, SOME, heads)
    train = name != "grad_norm direct"  # whose trained weights keep their sum where tasks are missing
    for seed in range(5):
        check_same_step(name, some.step(seed, SOME, train), alone.step(seed, train=train), SOME)
        if seed in (1, 3):
            some.balancer.end_epoch()
            alone.balancer.end_epoch()


def of_tasks(name: str, state: Any, ids: Sequence[int], key: str = "", head: int = 0) -> Any:
    """What a balancer's state holds for some of its tasks, as the state of a balancer of these alone."""
    if isinstance(state, dict):
        method = {"losses": state["method"][0], "gradients": state["method"][1]} if "method" in state else {}
        return {k: of_tasks(name, v, ids, k, HEADS.get(method.get(k, ""), head)) for k, v in state.items()}
    if key == "tasks":
        return len(ids)
    if key == "averages":
        return [state[k] for k in ids] if state else []
    if not isinstance(state, Tensor):
        return state
    if key == "state":
        behind, size = state[head:], len(state) - head
        if name.startswith("gradvac"):
            rows = behind.view(TASKS, TASKS)[list(ids)][:, list(ids)]
        else:
            rows = behind.view(size // TASKS, TASKS)[:, list(ids)]
        if name.split()[0] in SHARED_OUT[:3]:
            rows = rows / rows.sum()
        return torch.cat([state[:head], rows.flatten()])
    return state[..., list(ids)].clone()


@every_case
def test_a_step_without_a_task_after_full_ones(name):
    """Equals, to the bit, that of a balancer of the others with what all K have learned of them."""
    some, alone = Run(name), Run(name, SOME)
    for seed in range(4):
        some.step(seed)
        if seed == 1:
            some.balancer.end_epoch()
    if name.startswith("famo"):
        learned_from_all_first(some.balancer)
    if name == "nash_mtl every 3":
        some.balancer.losses.active = None
        state = some.balancer.state_dict()
        state["gradients"]["steps"] = 3  # a step that solves
        some.balancer.load_state_dict(state)
    alone.balancer.load_state_dict(of_tasks(name, some.balancer.state_dict(), SOME))
    alone.net.load_state_dict(some.net.state_dict())
    check_same_step(name, some.step(9, SOME), alone.step(9), SOME)


def learned_from_all_first(balancer: igb.Balancer) -> None:
    """A fall of all tasks' losses is learned from with all of them."""
    rule = balancer.losses
    rule.state[0] = 2  # told
    igb.ops.loss_scales("famo", torch.ones(TASKS), state=rule.state, **rule.options())
    rule.state[0] = 0


@every_case
def test_what_belongs_to_a_missing_task_stays(name):
    run = Run(name)
    for seed in range(3):
        run.step(seed)
        run.balancer.end_epoch()
    if name.startswith("famo"):
        learned_from_all_first(run.balancer)
    before = copy.deepcopy(of_tasks(name, run.balancer.state_dict(), (1,)))
    whole = copy.deepcopy(run.balancer.state_dict())
    for seed in (5, 6):
        run.step(seed, SOME, train=False)
        run.balancer.after_step(run.losses(seed, SOME))
    after = of_tasks(name, run.balancer.state_dict(), (1,))
    for state in (before, after):
        if name.split()[0] in SHARED_OUT[:3]:
            state["gradients"]["state"] = None
    forget_the_step(name, before)
    forget_the_step(name, after)
    assert same(before, after)
    if name.split()[0] in SHARED_OUT[:3]:
        head = HEADS.get(name.split()[0], 0)
        old, new = (s["gradients"]["state"][head:] for s in (whole, run.balancer.state_dict()))
        assert same(old[1], new[1])
        torch.testing.assert_close(new.sum(), old.sum(), rtol=1e-12, atol=0.0)


def forget_the_step(name: str, state: dict[str, Any]) -> None:
    """Drops what counts steps, and belongs to no task."""
    state["last"] = None
    for part in ("losses", "gradients"):
        own = state[part]
        for key in ("steps", "solved_for", "epoch", "recorded"):
            own.pop(key, None)
        method = state["method"][part == "gradients"]
        if own.get("state") is not None and method in HEADS:
            own["state"] = own["state"][HEADS[method] :]
        if method == "famo":
            own["state"] = own["state"][:3]  # the last two are of the last step


@every_case
def test_tasks_take_turns(name):
    """One at a time, some, all; saved and loaded in between."""
    sets = [(0,), (1,), (2,), (1,), (0, 2), ALL, (1, 2), (2,), ALL]
    whole, first, second = Run(name), Run(name), Run(name)
    torch.manual_seed(0)
    want = [whole.step(i, there) for i, there in enumerate(sets)]
    for there, (result, grads) in zip(sets, want, strict=True):
        assert result.active == (None if there == ALL else there)
        assert bool(result.weights.isfinite().all())
        assert all(bool(grad.isfinite().all()) for grad in grads)
    found = [first.step(i, there) for i, there in enumerate(sets[:4])]
    state = copy.deepcopy(first.balancer.state_dict())
    second.balancer.load_state_dict(state)
    assert same(second.balancer.state_dict(), state)
    second.net.load_state_dict(first.net.state_dict())
    with torch.no_grad():
        for p, q in zip(second.balancer.parameters(), first.balancer.parameters(), strict=True):
            p.copy_(q)
    found += [second.step(i, there) for i, there in enumerate(sets) if i >= 4]
    for (ours, our_grads), (theirs, their_grads) in zip(found, want, strict=True):
        assert same(ours.weights, theirs.weights)
        assert same(ours.scales, theirs.scales)
        assert same(our_grads, their_grads)
    assert same(second.balancer.state_dict(), whole.balancer.state_dict())


# ---- How a task can be missing -----------------------------------------------------------------------------------


def test_every_form_of_missing_losses():
    want = None
    for form in ("none", "constant", "detached", "stack", "dict", "dict with None"):
        net = make_net()
        names = {"tasks": ["a", "b", "c"]} if "dict" in form else {"tasks": TASKS}
        balancer = igb.Balancer("igb_v1+db_mtl", shared=net.shared, **names)
        a, b, c = net.losses()
        losses = {
            "none": [a, None, c],
            "constant": [a, torch.tensor(3.0), c],
            "detached": [a, b.detach(), c],
            "stack": torch.stack([a, torch.tensor(3.0), c]),
            "dict": {"c": c, "a": a},
            "dict with None": {"a": a, "b": None, "c": c},
        }[form]
        result = balancer.backward(losses)
        assert result.active == SOME
        assert result.names == (("a", "b", "c") if "dict" in form else None)
        found = [result.weights, result.scales, result.losses, *[p.grad for p in net.parameters()]]
        assert all(p.grad is None for p in net.heads[1].parameters())
        want = found if want is None else want
        assert same(found, want)


def test_the_first_step_defines_the_tasks():
    net = make_net()
    balancer = igb.Balancer("emtl", shared=net.shared)
    a, b, c = net.losses()
    assert balancer.backward({"a": a, "b": None, "c": c}).names == ("a", "b", "c")
    assert balancer.backward({"b": net.losses(1)[1]}).active == (1,)
    assert balancer.backward(net.losses(2)).active is None
    balancer = igb.Balancer("emtl", shared=net.shared)
    balancer.backward({"a": net.losses()[0]})
    with pytest.raises(ValueError, match=r"no other tasks than \['a'\], found \['b'\].*Balancer\(tasks="):
        balancer.backward({"b": b})


def test_a_printed_result_names_the_missing():
    net = make_net()
    result = igb.Balancer("imtl_g", shared=net.shared, tasks=["a", "b", "c"]).backward({"b": net.losses()[1]})
    assert "a: missing\nb: loss" in str(result)
    assert bool(result.cosines.isfinite().all())
    assert result.total_weights.tolist()[::2] == [0, 0]


@pytest.mark.parametrize(
    ("tasks", "error", "message"),
    [
        (0, ValueError, "tasks must be at least 1, found 0"),
        ("abc", TypeError, "tasks must be the tasks' names or their number, found 'abc'"),
        (True, TypeError, "their number, found True"),
        (["a", "a"], ValueError, r"each once, found \['a', 'a'\]"),
        ([], ValueError, "at least one task"),
    ],
)
def test_bad_tasks(tasks, error, message):
    with pytest.raises(error, match=message):
        igb.Balancer("equal", shared=make_net().shared, tasks=tasks)


def test_losses_must_fit_the_tasks():
    net = make_net()
    balancer = igb.Balancer("imtl_g", shared=net.shared, tasks=4)
    before = Snapshot(net.parameters(), balancer)
    with pytest.raises(ValueError, match=r"must hold 4 tasks as Balancer\(tasks=...\) says, found 3; None stands for"):
        balancer.backward(net.losses())
    before.check()
    trained = igb.Balancer("imtl_g", shared=net.shared)
    trained.backward(net.losses())
    with pytest.raises(ValueError, match=r"the state has 3 tasks, Balancer\(tasks=...\) says 4"):
        balancer.load_state_dict(trained.state_dict())
    named = igb.Balancer("imtl_g", shared=net.shared, tasks=["x", "y", "z"])
    trained.load_state_dict({**trained.state_dict(), "names": ["a", "b", "c"]})
    with pytest.raises(ValueError, match=r"the state has the tasks \('a', 'b', 'c'\)"):
        named.load_state_dict(trained.state_dict())


def test_independent_batches_have_the_same_tasks():
    net = make_net()
    for batches in (1, 2):
        some = igb.Balancer(igb.MoDo(0.01), shared=net.shared)
        alone = igb.Balancer(igb.MoDo(0.01), shared=net.shared)
        found = []
        for balancer, ids in ((some, ALL), (alone, SOME)):
            net.zero_grad()
            first, *others = ([net.losses(i)[k] if k in SOME else None for k in ids] for i in range(batches + 1))
            result = balancer.backward(first, independent=others)
            found.append([p.grad.clone() for p in net.shared])
        assert same(*found)
        first, other = net.losses(3), net.losses(4)
        first[1] = None
        before = Snapshot(net.parameters(), some)
        with pytest.raises(ValueError, match=r"independent\[0\] must have the tasks \[0, 2\] as losses does"):
            some.backward(first, independent=[other] * batches)
        before.check()
        assert result.active is None


def test_heads_that_come_later_are_balanced_as_the_others():
    """With two independent batches, passes go into parameters that are known."""
    net = make_net()
    balancer = igb.Balancer(igb.SDMGrad(), shared=net.shared)
    for there in ((0,), (1, 2)):
        net.zero_grad()
        batches = [[loss if k in there else None for k, loss in enumerate(net.losses(i))] for i in range(3)]
        want = torch.autograd.grad(
            sum(batches[0][k] for k in there), [p for k in there for p in net.heads[k].parameters()]
        )
        batches = [[loss if k in there else None for k, loss in enumerate(net.losses(i))] for i in range(3)]
        balancer.backward(batches[0], independent=batches[1:])
        torch.testing.assert_close([p.grad for k in there for p in net.heads[k].parameters()], list(want))


# ---- Accumulated micro-batches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["equal", "db_mtl", "emtl", "grad_drop", "excess_mtl", "uw"])
@pytest.mark.parametrize("heads", ["scaled", "weighted"])
def test_micro_batches_of_other_tasks_make_one_step(name, heads):
    one, parts = Run(name, heads=heads), Run(name, heads=heads)
    losses = one.net.losses(0)
    want = one.balancer.backward([losses[0], losses[1], None])
    losses = parts.net.losses(0)
    parts.balancer.accumulate([losses[0] / 2, None, None], retain_graph=True)
    parts.balancer.accumulate([None, losses[1], None], retain_graph=True)
    found = parts.balancer.backward([losses[0] / 2, None, None])
    assert found.active == want.active == (0, 1)
    torch.testing.assert_close(found.weights, want.weights, rtol=1e-5, atol=1e-8)
    pairs = zip(one.net.parameters(), parts.net.parameters(), strict=True)
    for p, q in pairs:
        if p.grad is None:
            assert q.grad is None or not q.grad.any()
        else:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5 * float(p.grad.abs().max()))


# ---- What goes wrong ---------------------------------------------------------------------------------------------


def failing(net: Net) -> list[Tensor | None]:
    x, y = net.batch(5)
    z = net.encoder(x)
    return [
        scale * (head(Fails.apply(z) if k == 2 else z) - target).square().mean() if k in SOME else None
        for k, (head, target, scale) in enumerate(zip(net.heads, y, TASK_SCALES, strict=False))
    ]


@every_case
@pytest.mark.parametrize("started", [False, True])
def test_a_pass_that_raises_changes_nothing(name, started):
    runs = [Run(name) for _ in range(2)]
    for run in runs:
        torch.manual_seed(3)
        if started:
            run.step(0)
            run.step(1, (1,))
    broken = runs[0]
    before = Snapshot([*broken.net.parameters(), *broken.balancer.parameters()], broken.balancer)
    with pytest.raises(RuntimeError, match="this backward fails"):
        broken.balancer.backward(failing(broken.net))
    before.check()
    results = [run.step(2)[0] for run in runs]
    assert same(*(r.weights for r in results))
    assert same(*(run.balancer.state_dict() for run in runs))


@every_case
def test_a_step_that_is_not_finite_leaves_the_state(name):
    run = Run(name)
    run.step(0)
    run.step(1, SOME)
    before = copy.deepcopy(run.balancer.state_dict())
    losses = run.losses(2, SOME)
    losses[2] = losses[2] * torch.nan
    result = run.balancer.backward(losses)
    assert igb.Status.NON_FINITE in result.flags
    after = run.balancer.state_dict()
    before.pop("last")
    after.pop("last")
    assert same(before, after)


def test_after_step_wants_the_tasks_of_the_step():
    run = Run("famo")
    run.step(0)
    run.balancer.backward(run.losses(1, SOME))
    before = copy.deepcopy(run.balancer.state_dict())
    with pytest.raises(
        ValueError, match=r"the losses of the tasks \[0, 2\] as the last step's did, found those of \[0\]"
    ):
        run.balancer.after_step(run.losses(1, (0,)))
    assert same(run.balancer.state_dict(), before)
    run.balancer.after_step([loss.detach() for loss in run.net.losses(1)])  # what was missing is not read
    assert not same(run.balancer.state_dict(), before)
