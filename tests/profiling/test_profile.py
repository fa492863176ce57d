"""A profile says where the time goes, and changes nothing."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import threading
import time
from collections.abc import Callable

import pytest
import torch
from balancer.models import same
from torch import Tensor, nn
from torch.optim import optimizer as optim_hooks

import igb_kernels as igb
from igb_kernels import capture, representation
from igb_kernels.backends import cpu
from igb_kernels.profiling.advice import Figures, advice
from igb_kernels.profiling.graph import meeting
from igb_kernels.profiling.spans import Phase

from .nets import NAMES, Training

KINDS = ["warm-up", "memory", "reference", "measured", "measured", "measured", "reference", "measured"]
STEPS = len(KINDS)


def profiled(training: Training, steps: int = STEPS, **how: object) -> igb.profile:
    with igb.profile(training.balancer, warmup=1) as found:
        training.steps(steps, **how)
    return found


def parts_of(found: igb.profile) -> dict[str, float]:
    return {part.name: part.host_ms for part in found.parts()}


# ---- Nothing is changed ---------------------------------------------------------------------------------------------


def left_in(training: Training) -> list[object]:
    """Everything that a profile could leave something in."""
    balancer = training.balancer
    parts = [balancer, balancer._passes, balancer.losses, balancer.gradients, training.optimizer]
    hooks = [optim_hooks._global_optimizer_pre_hooks, optim_hooks._global_optimizer_post_hooks]
    return [
        *[(type(part), set(vars(part))) for part in parts],
        *[[type(value) for value in vars(part).values()] for part in parts],
        *[dict(hook) for hook in hooks],
        [dict(p._post_accumulate_grad_hooks or {}) for p in training.params],
        (capture.explained, representation.explained),
        (igb.Balancer.backward, igb.Balancer.__init__),
    ]


CASES = {
    "igb_v1+nash_mtl": {},
    "db_mtl": {},
    "grad_drop": {},
    "excess_mtl": {},
    "emtl": {},
    "rlw+imtl_g": {},
    "equal": {},
    "nash_mtl": {"heads": "weighted"},
    "upgrad": {"capture": "hooks"},
}


@pytest.mark.parametrize("how", [{}, {"at_representation": True}, {"micro_batches": 2}], ids=["", "at z", "micro"])
@pytest.mark.parametrize("method", CASES)
def test_the_same_bits(method, how):
    if "at_representation" in how and method in ("db_mtl", "excess_mtl"):
        pytest.skip("keeps what outlives the batch")
    results = []
    for with_profile in (False, True):
        training = Training(method)
        options = dict(CASES[method])
        if options.get("heads"):
            options["task_parameters"] = training.heads
        training.balancer = igb.Balancer(method, shared=training.encoder, **options)
        if with_profile:
            assert profiled(training, **how).steps == KINDS.count("measured")
        else:
            training.steps(STEPS, **how)
        state = training.balancer.state_dict()
        results.append([
            [p.detach() for p in training.params], [p.grad for p in training.params], copy.deepcopy(state),
            torch.get_rng_state(),
        ])  # fmt: skip
    assert same(*results)


def test_nothing_is_left():
    training = Training()
    training.steps(1)
    before = left_in(training)
    profiled(training)
    assert left_in(training) == before


class Stop(Exception):
    pass


def stop() -> None:
    raise Stop


class Failing(torch.autograd.Function):
    """Has a backward pass that raises."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        raise Stop


def steps_then(training: Training, steps: int, last: Callable[[dict[str, Tensor]], object]) -> None:
    with igb.profile(training.balancer, warmup=1):
        training.steps(steps)
        last(training.losses()[1])


@pytest.mark.parametrize("steps", range(7))
def test_nothing_is_left_after_an_exception(steps):
    """Between steps of every kind, and in them."""
    training = Training()
    training.steps(1)
    before = left_in(training)
    with pytest.raises(Stop):
        steps_then(training, steps, lambda losses: stop())
    assert left_in(training) == before

    with pytest.raises(Stop):
        steps_then(
            training, steps, lambda losses: training.balancer.backward({**losses, "b": Failing.apply(losses["b"])})
        )
    assert left_in(training) == before
    assert not torch._C._autograd._profiler_enabled()
    profiled(training)


def test_training_goes_on_after_a_step_that_raised():
    training = Training()
    with igb.profile(training.balancer, warmup=1) as found:
        for _ in range(STEPS):
            with pytest.raises(ValueError, match="scalar"):
                training.balancer.backward([torch.ones(2, requires_grad=True)])
            training.step()
    assert [step.kind for step in found._recorded.steps] == KINDS
    assert "sum" in str(found)


def test_copies_and_pickles_are_of_the_balancers_own_class():
    training = Training()
    with igb.profile(training.balancer):
        training.steps(2)
        copied = copy.deepcopy((training.encoder, training.balancer))[1]
        restored = pickle.loads(pickle.dumps(training.balancer))
    for balancer in (copied, restored):
        assert type(balancer) is igb.Balancer
        assert type(balancer._passes) is type(training.balancer._passes)
        assert same(balancer.state_dict(), training.balancer.state_dict())


def test_one_profile_at_a_time():
    first, second = Training(), Training("db_mtl")
    with igb.profile(first.balancer) as profile:
        with pytest.raises(RuntimeError, match="is being profiled"), igb.profile(first.balancer):
            pass
        with igb.profile(second.balancer, warmup=0) as other:
            first.steps(3)
            second.steps(4)
    assert other.steps == 2
    with pytest.raises(RuntimeError, match="used once"), profile:
        pass
    with pytest.raises(RuntimeError, match="nothing has been profiled"):
        print(igb.profile(first.balancer))


def test_two_profiles_may_end_in_any_order():
    first, second = Training(), Training()
    profiles = [igb.profile(training.balancer, warmup=0).__enter__() for training in (first, second)]
    for found in profiles:
        first.steps(2)
        second.steps(2)
        found.__exit__(None, None, None)
    assert [found.tasks for found in profiles] == [3, 3]
    assert capture.explained.__module__ == "igb_kernels.capture"


@pytest.mark.parametrize("arguments", [{"warmup": -1}, {"steps": 0}])
def test_errors(arguments):
    with pytest.raises(ValueError, match="warmup must be at least 0, and steps at least 1"):
        igb.profile(Training().balancer, **arguments)
    with pytest.raises(TypeError, match=r"must be an igb_kernels\.Balancer, found Linear"):
        igb.profile(nn.Linear(1, 1))


# ---- What it says ---------------------------------------------------------------------------------------------------

PAUSE = 0.03


class Slow(torch.autograd.Function):
    """Takes its time on the way back."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        time.sleep(PAUSE)
        return grad


class SlowSolver(igb.IMTLG):
    def solve(self, *arguments):
        time.sleep(PAUSE)
        return super().solve(*arguments)


class SlowOptimizer(torch.optim.SGD):
    def step(self, closure=None):
        time.sleep(PAUSE)
        return super().step(closure)


def slow_steps(training: Training, where: str, steps: int, by_hand: bool = False) -> None:
    optimizer = (SlowOptimizer if where == "optimizer" else torch.optim.SGD)(training.params, lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        if where == "forward":
            time.sleep(PAUSE)
        losses = training.losses()[1]
        if where == "backward pass of b":
            losses["b"] = Slow.apply(losses["b"])
        training.balancer.backward(losses)
        if where == "between backward and optimizer":
            time.sleep(PAUSE)
        if by_hand:
            with torch.no_grad():
                for p in training.params:
                    p -= 1e-3 * p.grad
        else:
            optimizer.step()


@pytest.mark.parametrize(
    "where", ["forward", "backward pass of b", "solver", "between backward and optimizer", "optimizer"]
)
def test_time_is_where_it_was_spent(where):
    training = Training(SlowSolver() if where == "solver" else "imtl_g")
    with igb.profile(training.balancer, warmup=0, reference=False) as found:
        slow_steps(training, where, 6)
    parts = parts_of(found)
    assert parts.pop(where) >= 1e3 * PAUSE
    assert max(parts.values()) < 1e3 * PAUSE
    assert list(parts_of(found)) == [
        "forward", "loss scales", *[f"backward pass of {name}" for name in NAMES], "taking gradients",
        "Gramian and norms", "solver", "combine", "rest of the balancer", "between backward and optimizer", "optimizer",
    ]  # fmt: skip


def test_without_an_optimizer_the_time_between_is_the_forward_pass():
    training = Training("imtl_g")
    with igb.profile(training.balancer, warmup=0) as found:
        slow_steps(training, "forward", 7, by_hand=True)
    parts = parts_of(found)
    assert parts.pop("forward") >= 1e3 * PAUSE
    assert "optimizer" not in parts
    assert "between backward and optimizer" not in parts
    assert found.steps == 4


def test_the_parts_make_up_the_step():
    found = profiled(Training(width=256))
    for step in found._measured:
        spans = [span for outer in step.spans.outer for span in outer.all()]
        assert all(span.host_ms() >= 0 for span in spans)
        assert [span.start.host for span in step.spans.outer] == sorted(span.start.host for span in step.spans.outer)
        whole = step.start.ms_to(step.end)
        assert sum(span.host_ms() for span in spans) <= whole * (1 + 1e-9)
        gaps = [step.start, *[moment for outer in step.spans.outer for moment in (outer.start, outer.end)], step.end]
        assert all(later.host >= earlier.host for earlier, later in itertools.pairwise(gaps))
    assert sum(part.share for part in found.parts()) == pytest.approx(1)


@pytest.mark.parametrize("losses", ["dict", "list", "stack", "vector"])
def test_names_of_passes(losses):
    training = Training("imtl_g")
    with igb.profile(training.balancer, warmup=0, reference=False) as found:
        for _ in range(3):
            by_name = training.losses()[1]
            scalars = list(by_name.values())
            given = {
                "dict": by_name,
                "list": scalars,
                "stack": torch.stack(scalars),
                "vector": torch.stack(scalars) * 1,
            }
            training.balancer.backward(given[losses])
            training.optimizer.step()
    names = NAMES if losses == "dict" else ("task 0", "task 1", "task 2")
    assert [name for name in parts_of(found) if "pass" in name] == [f"backward pass of {name}" for name in names]
    assert ("torch.stack did not make" in " ".join(found.advice())) == (losses == "vector")


def test_names_of_other_passes():
    assert "backward pass of all tasks" in parts_of(profiled(Training("equal")))
    found = parts_of(profiled(Training("imtl_g"), at_representation=True))
    assert [name for name in found if "pass" in name] == [
        *[f"backward pass of {name}" for name in NAMES], "backward pass behind the representation",
    ]  # fmt: skip


def test_micro_batches_are_one_step():
    found = profiled(Training("imtl_g"), micro_batches=3)
    assert [step.kind for step in found._recorded.steps] == KINDS
    passes = [span for outer in found._measured[0].spans.outer for span in outer.all() if span.phase is Phase.PASS]
    assert len(passes) == 9
    assert {span.name for span in passes} == {f"backward pass of {name}" for name in NAMES}


def test_optimizers_of_other_threads_are_not_in_the_step():
    training, other = Training("imtl_g"), torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    with igb.profile(training.balancer, warmup=0) as found:
        for _ in range(4):
            training.step()
            thread = threading.Thread(target=other.step)
            thread.start()
            thread.join()
    for step in found._measured:
        spans = [span for outer in step.spans.outer for span in outer.all()]
        assert sum(span.phase is Phase.OPTIMIZER for span in spans) == 2  # zero_grad and step


def test_only_so_many_steps_are_measured():
    training = Training()
    with igb.profile(training.balancer, warmup=1, steps=2) as found:
        training.steps(20)
        assert found.finished
    assert found.steps == 2
    assert len(found._recorded.steps) == 5


def test_too_few_steps_say_so():
    found = profiled(Training(), steps=2)
    assert "Nothing was measured: 2 steps were taken, it needs 4" in str(found)
    assert found.advice() == []


# ---- The reference, memory, traces ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["igb_v1+nash_mtl", "db_mtl", "grad_drop", "excess_mtl", "emtl"])
@pytest.mark.parametrize("capture_", ["passes", "hooks"])
def test_the_reference_comes_to_the_same(method, capture_):
    found = profiled(Training(method, capture=capture_))
    compared = found.compared()
    assert compared[-1].name == "all"
    assert all(c.agree and c.ratio is not None and c.reference_ms > 0 for c in compared)
    assert {"solver", "loss scales"} <= {c.name for c in compared}
    assert found.copy_ms > 0


def test_no_ratio_where_the_results_differ(monkeypatch):
    right = cpu.combine_

    def wrong(out, grads, weights, accumulate):
        right(out, grads, weights * 1.001, accumulate)

    monkeypatch.setattr(cpu, "combine_", wrong)
    found = profiled(Training())
    ratios = {c.name: c.ratio for c in found.compared()}
    assert ratios["combine"] is None
    assert ratios["all"] is None
    assert ratios["Gramian and norms"] is not None
    assert "results differ" in str(found)


def test_peak_memory():
    """One step holds 40 MB for a moment, and K gradients of the encoder."""
    training = Training("imtl_g", width=700)
    with igb.profile(training.balancer, warmup=1) as found:
        for _ in range(4):
            training.optimizer.zero_grad()
            losses = training.losses()[1]
            torch.ones(10_000_000)
            training.balancer.backward(losses)
            training.optimizer.step()
    assert 40e6 <= found.peak_bytes <= 45e6
    again = profiled(Training("imtl_g", width=700))
    D = 4 * (6 * 700 + 700 + 700 * 700 + 700)
    assert 2 * D <= again.peak_bytes <= 5 * D


def test_another_profiler_may_run():
    training = Training()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        found = profiled(training)
    assert found.peak_bytes is None
    assert "another profiler is running" in str(found)


def test_chrome_trace(tmp_path):
    training = Training()
    found = profiled(training)
    found.export_chrome_trace(tmp_path / "trace.json")
    events = [e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e["ph"] == "X"]
    steps = [event for event in events if event["name"].startswith("step ")]
    assert [event["name"] for event in steps] == [f"step {i} ({kind})" for i, kind in enumerate(KINDS)]
    for name in ("forward", "backward pass of b", "combine: combine_", "solver: solve", "optimizer"):
        found_in = [
            [
                e
                for e in events
                if e["name"] == name and s["ts"] <= e["ts"] and e["ts"] + e["dur"] <= s["ts"] + s["dur"] + 1e-3
            ]
            for s in steps
        ]
        assert all(found_in), name


def test_json_has_what_the_text_shows():
    found = profiled(Training())
    data = json.loads(json.dumps(found.to_dict()))
    assert {part["name"] for part in data["parts"]} == set(parts_of(found))
    assert data["tasks"] == 3
    assert data["backends"] == ["cpu"]
    assert data["gradient_bytes"] == sum(p.nbytes for p in found._balancer.shared)
    for part in data["parts"]:
        assert part["name"] in str(found)
        assert f"{part['host_ms']:.3f}" in str(found)


# ---- Advice ---------------------------------------------------------------------------------------------------------


def figures(**known: object) -> Figures:
    shares = dict.fromkeys(Phase, 0.0) | {Phase.PASS: 0.9, Phase.FORWARD: 0.07, Phase.MEASURE: 0.03}
    default: dict[str, object] = {
        "balancer": Training("nash_mtl").balancer, "step_ms": 100.0, "device_ms": None, "tasks": 3, "shares": shares,
        "copy_ms": 1.0, "compared": 3.0, "passes_ms": [30.0, 30.0, 30.0], "head_ms": [5.0, 5.0, 5.0],
        "at_representation": False, "stacked_otherwise": False, "backends": ["cpu"], "optimizer": None,
    }  # fmt: skip
    shares.update(known.pop("shares", {}))
    return Figures(**(default | known))


def test_advice_on_passes():
    said = " ".join(advice(figures()))
    assert "3 backward passes are 90% of your step, 90 ms" in said
    assert "would take about 40 ms in their place (15 ms through the heads, and one pass of 25 ms through" in said
    assert "Balancing beside the passes is 3.0% of the step: nothing to gain here." in said
    assert "gain little" in " ".join(advice(figures(head_ms=[28.0, 28.0, 28.0])))
    averaging = Training("db_mtl")
    averaging.step()
    assert "keeps what outlives the batch" in " ".join(advice(figures(balancer=averaging.balancer)))
    assert "representation" not in " ".join(advice(figures(at_representation=True)))
    assert "representation" not in " ".join(advice(figures(shares={Phase.PASS: 0.2})))


def test_advice_on_the_rest():
    assert "near what memory allows" in " ".join(advice(figures(shares={Phase.COMBINE: 0.3})))
    far = " ".join(advice(figures(shares={Phase.CAPTURE: 0.3}, compared=9.0)))
    assert "The largest part is: taking gradients, the host's own time" in far
    slow = Training("nash_mtl", backend="reference").balancer
    assert 'made with backend="reference"' in " ".join(advice(figures(balancer=slow, backends=["reference"])))
    assert "The forward pass, with loading the batch, is 60%" in " ".join(advice(figures(shares={Phase.FORWARD: 0.6})))
    fused = advice(figures(shares={Phase.OPTIMIZER: 0.2}, optimizer="Adam"))
    assert "Adam(..., fused=True)" in " ".join(fused)


def test_the_reason_for_the_reference_backend(monkeypatch):
    monkeypatch.setattr("igb_kernels._native.module", None)
    monkeypatch.setattr("igb_kernels._native.reason", "it was not built")
    assert "is used because cpu: it was not built." in " ".join(advice(figures(backends=["reference"])))


def test_where_tasks_meet():
    training = Training()
    z, losses = training.losses()
    shared = {id(p) for p in training.encoder.parameters()}
    assert meeting([loss.grad_fn for loss in losses.values()], shared) == [z.grad_fn]
    first = training.encoder[0].weight
    around = [losses["a"] + first.sum(), losses["b"]]
    nodes = meeting([loss.grad_fn for loss in around], shared)
    assert z.grad_fn in nodes
    assert any(getattr(node, "variable", None) is first for node in nodes)
    assert meeting([], shared) == []
