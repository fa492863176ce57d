"""IGBv2: what its agent sees and when it learns, that it helps, and that a state goes on bit for bit."""

from __future__ import annotations

import copy
import io
import subprocess
import sys

import numpy as np
import pytest
import torch
from golden import cases

import igb_kernels as igb
from igb_kernels.active import ActiveTasks
from igb_kernels.agents.sac import SACAgent
from igb_kernels.backends import resolve
from igb_kernels.losses import igb_v2

SMALL = {"hidden": (16, 16), "update_every": 4, "batch_size": 16, "steps_per_epoch": 3, "seed": 1}
"""An agent that learns often and quickly."""
BASE = {"base_losses": [1.0, 2.0]}
CPU = resolve("auto", "cpu")


def started(tasks, **options):
    rule = igb.IGBv2(**{**SMALL, "background": False, **options})
    rule.start(tasks, torch.device("cpu"))
    return rule


def step(rule, losses, gradient_status=0):
    """One step of a rule alone; returns its weights."""
    losses = torch.as_tensor(losses, dtype=torch.float64)
    scales, status = rule.scales(losses, CPU)
    rule.commit(losses, scales, status | gradient_status)
    return scales * losses


def losses_of(i, tasks=2):
    """Of step i: falling, unevenly."""
    return torch.tensor([(1 + k) * 0.97 ** (i * (k + 1)) + 0.01 * (i * 7 % 5) for k in range(tasks)])


def transitions(rule):
    return rule.state_dict()["learner"]["agent"]["transitions"]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype is b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ---- As IGB4MTL does it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("case", cases("igbv2__igb4mtl"))
def test_golden(case, background, monkeypatch):
    """Warm-up weights, transitions with their rewards, and the numbers of updates."""
    updates, noise = [], list(case.normals.float())
    monkeypatch.setattr(igb_v2, "normals", lambda seed, step, tasks: noise[step])
    monkeypatch.setattr(SACAgent, "train", lambda self, batch, seed: updates.append(batch))
    params, length = case.params, int(case.train_batch)
    rule = started(
        len(case.base_losses),
        state="raw",
        logprob="official",
        background=background,
        hidden=(8,),
        steps_per_epoch=length,
        reward_scale=float(case.reward_scale),
        update_after=params["update_after"],
        start_epoch=params["start_epoch"],
        update_every=params["update_every"],
        batch_size=params["batch"],
        buffer_size=params["buffer_size"],
    )
    for i, losses in enumerate(case.losses):
        if i == int(case.base_set_at_step):
            state = rule.state_dict()
            state["base"].update(base=case.base_losses)
            rule.load_state_dict(state)
        torch.testing.assert_close(step(rule, losses), case.weights[i], rtol=1e-6, atol=0.0)
    found, expected = transitions(rule), case.fields["buffer"]
    waiting = rule.state_dict()["learner"]["waiting"]
    found = {name: rows.tolist() for name, rows in found.items() if name != "position"}
    for i, name in enumerate(("state", "action", "reward", "next_state")):
        rows = found[name] + [v[i] if name == "reward" else v[i].tolist() for v in waiting]
        assert len(rows) == expected["size"]
        np.testing.assert_allclose(rows, expected[name], rtol=1e-6, atol=1e-8)
    assert bool(waiting) == (background and bool(case.fields["train_calls"]))
    assert updates == [batch for _, _, batch in case.fields["train_calls"]]


# ---- Recording ----------------------------------------------------------------------------------------------------


def test_the_agent_sees_losses_over_their_base():
    rule = started(2, **BASE, reward_scale=2.0)
    step(rule, [3.0, 8.0])
    weights = step(rule, [2.0, 7.0])
    step(rule, [2.5, 1.0])
    found = transitions(rule)
    assert found["state"].tolist() == [[3.0, 4.0], [2.0, 3.5]]
    assert found["next_state"].tolist() == [[2.0, 3.5], [2.5, 0.5]]
    assert found["reward"].tolist() == [2 * 0.5, 2 * -0.5]
    torch.testing.assert_close(found["action"][1].double(), weights)


UNUSABLE = [([torch.nan, 1.0], 0), ([1.0, torch.inf], 0), ([-1.0, 1.0], 0), ([1.0, 1.0], int(igb.Status.NON_FINITE))]


@pytest.mark.parametrize(("losses", "gradient_status"), UNUSABLE)
@pytest.mark.parametrize("at", [1, 2, 12])
def test_unusable_steps_are_as_if_they_had_not_been(losses, gradient_status, at):
    rules = [started(2, base_epoch=0) for _ in range(2)]
    for i in range(16):
        if i == at:
            before = copy.deepcopy(rules[0].state_dict())
            step(rules[0], losses, gradient_status)
            assert same(rules[0].state_dict(), before)
        weights = [step(rule, losses_of(i)) for rule in rules]
        assert torch.equal(*weights)
        if i % 3 == 2:
            for rule in rules:
                rule.end_epoch()
    assert same(*(rule.state_dict() for rule in rules))
    assert transitions(rules[0])["state"].isfinite().all()


def test_an_exploding_loss_does_not_spoil_the_networks():
    for state in igb_v2.STATES:
        rule = started(2, **BASE, state=state, update_after=0, start_epoch=0)
        for i in range(12):
            weights = step(rule, [1e300, 1.0] if i == 3 else losses_of(i))
            assert weights.isfinite().all()
        assert all(layer.isfinite().all() for layer in rule._learner.actor.layers)


@pytest.mark.parametrize("at", [0, 1, 3])
def test_base_losses_may_be_set(at):
    """Transitions begin with them, and all rewards are over the last that were set."""
    rule, plain = started(2, state="raw"), started(2, state="raw", base_losses=[2.0, 4.0])
    for i in range(6):
        if i == at:
            rule.base_losses = torch.tensor([2.0, 4.0])
        assert torch.equal(step(rule, losses_of(i)), step(plain, losses_of(i)))
    found, expected = transitions(rule), transitions(plain)
    assert len(found["reward"]) == 6 - max(at, 1)
    for name in ("state", "action", "reward", "next_state"):
        assert torch.equal(found[name], expected[name][-len(found[name]) :])
    rule.base_losses = [4.0, 8.0]
    step(rule, losses_of(6))
    fall = (losses_of(5) - losses_of(6)) / torch.tensor([4.0, 8.0])
    assert float(transitions(rule)["reward"][-1]) == pytest.approx(float(fall.min()))


def test_steps_per_epoch_are_learned():
    rule = started(2, **BASE, steps_per_epoch=None, update_after=1)
    for i in range(6):
        step(rule, losses_of(i))
    assert rule.state_dict()["learner"]["updates"] == 0  # no epoch has ended
    rule.end_epoch()
    assert rule.steps_per_epoch == 6
    for i in range(6, 9):
        step(rule, losses_of(i))
    rule.end_epoch()
    assert rule.steps_per_epoch == 6
    assert rule.state_dict()["learner"]["updates"] == 2  # at step 8


def test_nothing_is_learned_before_the_base_losses(monkeypatch):
    """IGB4MTL samples its empty buffer and raises."""
    rule = started(2, base_epoch=4, update_after=0, start_epoch=0)
    for i in range(15):
        assert rule.state_dict()["learner"]["updates"] == 0
        step(rule, losses_of(i))
        if i % 3 == 2:
            rule.end_epoch()
    for i in range(15, 20):
        step(rule, losses_of(i))
    assert len(transitions(rule)["reward"]) == 5
    assert rule.state_dict()["learner"]["updates"] == 2  # at step 16


def test_the_ring_is_bounded():
    rule = started(2, **BASE, buffer_size=5)
    for i in range(9):
        step(rule, losses_of(i))
    found = transitions(rule)
    expected = [losses_of(i) / torch.tensor([1.0, 2.0]) for i in (5, 6, 7, 3, 4)]
    torch.testing.assert_close(found["state"], torch.stack(expected), rtol=1e-6, atol=0.0)
    assert found["position"] == 3


def test_a_raised_step_changes_nothing():
    """The same weights are drawn again."""
    rule = started(2, **BASE)
    for i in range(20):
        before = rule.state_dict()
        losses = losses_of(i).double()
        first, _ = rule.scales(losses, CPU)
        assert same(rule.state_dict(), before)
        assert torch.equal(step(rule, losses), first * losses)


def missing(rule, losses, ids, gradient_status=0):
    """One step of a rule alone whose other tasks are missing; returns the weights of these."""
    rule.active = ActiveTasks.of(ids, rule._tasks, torch.device("cpu"))
    weights = step(rule, losses, gradient_status)
    rule.active = None
    return weights


def test_missing_tasks_have_their_last_losses():
    """Rewards are of the tasks of both steps; without one there is no transition, as with a task not seen yet."""
    rule = started(3, base_losses=[1.0, 2.0, 4.0])
    torch.testing.assert_close(missing(rule, [5.0, 5.0], (0, 1)).sum(), torch.tensor(2.0, dtype=torch.float64))
    missing(rule, [3.0, 8.0], (0, 2))  # the third had no loss before
    missing(rule, [7.0], (1,))  # no task of the step before
    assert len(transitions(rule)["reward"]) == 0
    missing(rule, [6.0, 4.0], (1, 2))  # the second alone is in both
    step(rule, [2.0, 8.0, 3.0])
    found = transitions(rule)
    assert found["state"].tolist() == [[3.0, 3.5, 2.0], [3.0, 3.0, 1.0]]
    assert found["reward"].tolist() == [0.5, -1.0]
    assert found["next_state"].tolist() == [[3.0, 3.0, 1.0], [2.0, 4.0, 0.75]]
    torch.testing.assert_close(found["action"].sum(dim=1), torch.full((2,), 3.0))


def test_a_single_task_of_a_step_has_weight_1():
    rule = started(3, base_losses=[1.0, 2.0, 4.0], start_epoch=0)
    for i in range(6):
        assert missing(rule, [3.0 - 0.1 * i], (i % 3,)).tolist() == [1.0]
    assert len(transitions(rule)["reward"]) == 0


@pytest.mark.parametrize("background", [False, True])
def test_a_state_with_missing_tasks_goes_on_bit_for_bit(background):
    sets = [(0, 1), (1, 2), (0, 1, 2), (2,), (0, 2), (0, 1)] * 6
    rules = [
        started(3, base_losses=[1.0, 2.0, 4.0], background=background, update_after=1, start_epoch=2) for _ in "ab"
    ]

    def run(rule, first, last):
        return [missing(rule, losses_of(i, 3)[list(sets[i])], sets[i]) for i in range(first, last)]

    start = run(rules[0], 0, 17)
    rules[1].load_state_dict(copy.deepcopy(rules[0].state_dict()))
    assert all(map(torch.equal, run(rules[0], 17, 36), run(rules[1], 17, 36)))
    assert rules[0].state_dict()["learner"]["updates"] > 0
    assert all(weights.isfinite().all() for weights in start)


def test_read_later_the_losses_of_the_step_before_are_acted_on(monkeypatch):
    """As on a GPU. What is recorded is the same; a step's end is taken into account by whatever comes next."""
    seen = []
    rule = started(2, **BASE, update_after=10**6, start_epoch=1)
    plain = started(2, **BASE, update_after=10**6, start_epoch=10**6)
    observed = rule._learner.actor

    def watch(state, noise):
        seen.append(state.tolist())
        return observed(state, noise)

    rule._learner.actor = watch
    monkeypatch.setattr(igb_v2, "_read_later", lambda losses: True)
    for i in range(9):
        step(rule, losses_of(i))
        step(plain, losses_of(i))
        assert rule._step == i  # this step's end is unread
    expected = torch.stack([losses_of(i) for i in range(2, 8)]) / torch.tensor([1.0, 2.0])
    torch.testing.assert_close(torch.tensor(seen), expected)
    rule._learner.actor = observed
    found, known = transitions(rule), transitions(plain)
    assert rule._step == 9
    for name in ("state", "reward", "next_state"):
        assert len(found[name]) == 8
        assert torch.equal(found[name], known[name])


def test_no_two_updates_draw_the_same(monkeypatch):
    seeds = []
    monkeypatch.setattr(SACAgent, "train", lambda self, batch, seed: seeds.append(seed))
    rule = started(2, **BASE)
    run(rule, 0, 40)
    assert len(seeds) > 10
    assert len(set(seeds)) == len(seeds)


def test_one_task_needs_no_agent():
    rule = started(1, base_losses=[1.0])
    for i in range(30):
        assert step(rule, [2.0 / (i + 1)]).tolist() == [1.0]
    assert rule.state_dict()["learner"] is None


def test_the_policy_acts_from_start_epoch_on():
    """Before, the weights are random, and the losses do not matter."""
    rules = [started(2, **BASE, start_epoch=2) for _ in range(2)]
    for i in range(8):
        same_weights = torch.equal(step(rules[0], losses_of(i)), step(rules[1], 2 * losses_of(i)))
        assert same_weights == (i < 6)
    actor, noise = rules[0]._learner.actor, igb_v2.normals(1, 8, 2)
    expected = actor(losses_of(8) / torch.tensor([1.0, 2.0]), noise)
    torch.testing.assert_close(step(rules[0], losses_of(8)), expected.double())


@pytest.mark.parametrize("logprob", igb_v2.LOG_DENSITIES)
@pytest.mark.parametrize("tasks", [2, 100])
def test_weights_are_positive_and_sum_to_the_number_of_tasks(tasks, logprob):
    rule = started(tasks, base_losses=[1.0] * tasks, update_after=0, start_epoch=1, logprob=logprob)
    for i in range(14):
        weights = step(rule, torch.linspace(0.5, 2, tasks) * 0.98**i)
        assert (weights > 0).all()
        assert float(weights.sum()) == pytest.approx(tasks, rel=1e-5)


def test_the_target_entropy_goes_with_the_density():
    for logprob, target in (("exact", -2.0), ("official", -3.0)):
        rule = started(3, logprob=logprob)
        assert rule._learner.agent._sac.target_entropy == target


def test_random_numbers_of_others_are_left_alone():
    torch.manual_seed(0)
    np.random.seed(0)
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    rule = started(2, **BASE, update_after=0)
    for i in range(9):
        step(rule, losses_of(i))
    assert rule.state_dict()["learner"]["updates"] > 0
    assert torch.equal(torch.get_rng_state(), torch_before)
    assert np.random.get_state()[1].tolist() == numpy_before


def test_other_defaults_and_modes_do_not_matter():
    """float64 by default; no_grad and autocast around a step."""
    plain = [step(rule, losses_of(i)) for rule in [started(2, **BASE, update_after=0)] for i in range(24)]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            rule = started(2, **BASE, update_after=0)
            other = [step(rule, losses_of(i)) for i in range(24)]
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close(torch.stack(other), torch.stack(plain), rtol=1e-5, atol=1e-6)


# ---- Learning -----------------------------------------------------------------------------------------------------


def trained(seed, start_epoch=1):
    """Two losses exp(x_k / r_k) over shared x: the second has far to go, and falls a quarter as fast for its weight.
    Returns the mean weights of the last quarter and what is left of each loss."""
    x, roots = torch.zeros(2, requires_grad=True), torch.tensor([1.0, 2.0])
    rule = igb.IGBv2(
        base_losses=[1.0, 1.0],
        steps_per_epoch=20,
        update_after=1,
        start_epoch=start_epoch,
        hidden=(32, 32),
        update_every=10,
        batch_size=128,
        buffer_size=400,
        learning_rate=3e-3,
        gamma=0.5,
        reward_scale=1000.0,
        seed=seed,
        background=False,
    )
    balancer, optimizer = igb.Balancer(rule, shared=[x]), torch.optim.SGD([x], lr=2e-3)
    weights = []
    for _ in range(400):
        optimizer.zero_grad()
        result = balancer.backward(list((x / roots).exp()))
        optimizer.step()
        weights.append(result.losses * result.scales)
    return torch.stack(weights[300:]).mean(dim=0), (x / roots).exp().detach()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_learns_to_favour_the_task_that_falls_least(seed, monkeypatch):
    weights, left = trained(seed)
    monkeypatch.setattr(SACAgent, "train", lambda self, batch, seed: None)
    random_weights, left_by_random = trained(seed, start_epoch=10**9)
    assert abs(float(random_weights[1]) - 1) < 0.15
    assert float(weights[1]) > 1.2
    assert float(left.max()) < 0.97 * float(left_by_random.max())


# ---- State --------------------------------------------------------------------------------------------------------


def run(rule, first, last):
    weights = []
    for i in range(first, last):
        weights.append(step(rule, losses_of(i)))
        if i % 3 == 2:
            rule.end_epoch()
    return weights


def saved(rule):
    file = io.BytesIO()
    torch.save(rule.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("at", [0, 5, 13, 30])
def test_a_resumed_run_has_the_same_bits(at, background):
    options = {"base_epoch": 0, "steps_per_epoch": None, "buffer_size": 20, "update_after": 2, "start_epoch": 3}
    first = started(2, **options, background=background)
    run(first, 0, at)
    state = saved(first)
    second = igb.IGBv2(**{**SMALL, **options, "seed": 99}, background=background)
    second.load_state_dict(state)
    assert torch.equal(torch.stack(run(first, at, 45)), torch.stack(run(second, at, 45)))
    assert same(saved(first), saved(second))
    assert not same(saved(first), state)


def test_a_state_from_the_background_goes_on_in_the_foreground():
    options = {**BASE, "update_after": 0, "start_epoch": 0}
    first, second = started(2, **options, background=True), started(2, **options)
    run(first, 0, 10)
    state = saved(first)
    assert state["learner"]["learned_ahead"]
    assert state["learner"]["waiting"]
    second.load_state_dict(state)
    assert len(transitions(second)["reward"]) == 9
    assert all(weights.isfinite().all() for weights in run(second, 10, 20))


REFUSED_STATES = [
    ({"hidden": (8,)}, "hidden"),
    ({"buffer_size": 7}, "buffer_size"),
    ({"logprob": "official"}, "logprob"),
    ({"state": "raw"}, "state"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED_STATES)
def test_a_state_of_another_agent_is_refused(options, message):
    state, other = saved(started(2)), started(2, **options)
    before = saved(other)
    with pytest.raises(ValueError, match=f"^{message} is .* but the state's is"):
        other.load_state_dict(state)
    assert same(saved(other), before)


# ---- Arguments ----------------------------------------------------------------------------------------------------

REFUSED = [
    ({"state": "log"}, "state must be one of .* found 'log'"),
    ({"logprob": "tanh"}, "logprob must be one of"),
    ({"buffer_size": 1e4}, "buffer_size must be an integer of at least 1, found 10000.0"),
    ({"hidden": (16, 0)}, r"hidden\[1\] must be an integer of at least 1"),
    ({"steps_per_epoch": 0}, "steps_per_epoch must be an integer of at least 1"),
    ({"start_epoch": -1}, "start_epoch must be an integer of at least 0"),
    ({"gamma": 1.5}, "gamma must be a number from 0 to 1"),
    ({"learning_rate": 0.0}, "learning_rate must be a finite number above 0"),
    ({"reward_scale": float("inf")}, "reward_scale must be a finite number above 0"),
    ({"seed": -1}, "seed must be None or an integer"),
    ({"steps": 3, "base_losses": [1.0]}, "steps and base_losses exclude each other"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        igb.IGBv2(**arguments)


def test_without_stable_baselines3_the_extra_is_named():
    script = """
import sys
sys.modules["stable_baselines3"] = None
import igb_kernels as igb
try:
    igb.IGBv2()
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert 'pip install "igb-kernels[igbv2]"' in result.stdout
