"""What thousands of steps leave behind: no memory, no hooks, no graphs, no threads."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import igb_kernels as igb
from igb_kernels import losses
from igb_kernels.gradients import METHODS
from igb_kernels.losses import RULES

from .models import TASKS, Net, make_net

OWN_ARGUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "grad_norm": lambda: {"gradients": igb.GradNorm(TASKS)},
    **{
        rule.name: lambda rule=rule: {"gradients": "imtl_g", "losses": rule(TASKS)}
        for rule in (losses.UW, losses.IMTLL, losses.LDCMTL)
    },
    "igb_v2": lambda: igb_v2(True),
}
"""Of what cannot be made by name alone, or not to some purpose in a short run."""
VARIANTS: dict[str, Callable[[], dict[str, Any]]] = {
    "db_mtl beta 0": lambda: {"gradients": igb.DBMTL(beta=0.0)},
    "nash_mtl every 5": lambda: {"gradients": igb.NashMTL(update_every=5)},
    "igb_v1 steps": lambda: {"gradients": "db_mtl", "losses": igb.IGBv1(steps=40)},
    "igb_v2 in the foreground": lambda: igb_v2(False),
    "bfloat16 bank": lambda: {"gradients": "upgrad", "bank_dtype": torch.bfloat16},
}


def igb_v2(background: bool) -> dict[str, Any]:
    """An agent that acts from the second epoch on, and learns at every 50th step."""
    rule = igb.IGBv2(0, background=background, steps_per_epoch=25, update_after=1, start_epoch=1, update_every=50,
                     batch_size=8, buffer_size=60, hidden=(8,), seed=1)  # fmt: skip
    return {"gradients": "imtl_g", "losses": rule}


def arguments() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Every method and rule, and the ways of a step that their defaults do not take."""
    for name in METHODS:
        yield name, OWN_ARGUMENTS.get(name, lambda name=name: {"gradients": name})
    for name in RULES:
        yield name, OWN_ARGUMENTS.get(name, lambda name=name: {"gradients": "imtl_g", "losses": name})
    yield from VARIANTS.items()


CASES = dict(arguments())


class Training:
    """A net of 400 parameters, its balancer and optimizer, and a batch."""

    def __init__(self, make: Callable[[], dict[str, Any]]) -> None:
        self.net, self.taken = make_net(), 0
        self.batch = self.net.batch()
        self.balancer = igb.Balancer(**make(), shared=self.net.shared)
        self.params = [*self.net.parameters(), *self.balancer.parameters()]
        self.optimizer = torch.optim.SGD(self.params, lr=1e-3)

    def losses(self) -> list[Tensor]:
        x, targets = self.batch
        z = self.net.encoder(x)
        return [(head(z) - y).square().mean() for head, y in zip(self.net.heads, targets, strict=True)]

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.balancer.backward(self.losses())
        self.optimizer.step()
        self.taken += 1
        if self.balancer.losses.name == "famo":
            with torch.no_grad():
                self.balancer.after_step(self.losses())
        if self.taken % 25 == 0:
            self.balancer.end_epoch()


# ---- Many steps ---------------------------------------------------------------------------------------------------

WARM_UP, STEPS = 60, 560
"""Of each: by the end of the warm-up IGBv2 has learned; at both ends as many of its transitions wait for a burst."""
RESIDENT = Path("/proc/self/statm")


def resident_bytes() -> int:
    return int(RESIDENT.read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def sizes_of_globals() -> dict[str, int]:
    """Of every container and cache that a module of the package holds."""
    sizes = {}
    for module in [module for name, module in sys.modules.items() if name.split(".")[0] == "igb_kernels"]:
        for name, value in vars(module).items():
            if isinstance(value, dict | list | set) and not name.startswith("__"):
                sizes[f"{module.__name__}.{name}"] = len(value)
            elif hasattr(value, "cache_info"):
                sizes[f"{module.__name__}.{name}"] = value.cache_info().currsize
    return sizes


def objects() -> tuple[int, int]:
    """How many there are that the garbage collector knows, and how many tensors of them."""
    gc.collect()
    known = gc.get_objects()
    return len(known), sum(issubclass(type(thing), Tensor) for thing in known)


def hooks_of(training: Training) -> list[object]:
    parameters = [p._backward_hooks or p._post_accumulate_grad_hooks for p in training.params]
    modules = [m._forward_hooks or m._backward_hooks or m._forward_pre_hooks for m in training.net.modules()]
    return [hooks for hooks in parameters + modules if hooks]


def agents() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "igb_kernels agent"]


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def train(trainings: list[Training], steps: int) -> None:
    for _ in range(steps):
        for training in trainings:
            training.step()
    for training in trainings:
        training.balancer.state_dict()  # waits for the agents' bursts, whose objects come and go


@pytest.mark.skipif(not RESIDENT.exists(), reason="reads the process's memory from /proc")
def test_thousands_of_steps_leave_nothing_behind():
    trainings = [Training(make) for make in CASES.values()]
    train(trainings, WARM_UP)
    sizes, (known, tensors), resident = sizes_of_globals(), objects(), resident_bytes()
    train(trainings, STEPS - WARM_UP)
    (known_now, tensors_now), more_resident = objects(), resident_bytes() - resident
    assert tensors_now <= tensors
    assert known_now < known + 50
    assert more_resident < 2e6  # 200 bytes a step
    assert sizes_of_globals() == sizes
    assert not any(map(hooks_of, trainings))
    trainings.clear()
    assert wait_for(lambda: not agents())


# ---- What a step holds on to --------------------------------------------------------------------------------------


@contextmanager
def no_collector() -> Iterator[None]:
    """Memory is freed by reference counts alone: a cycle keeps what it holds. `gc.collect` counts new objects only."""
    gc.disable()
    gc.freeze()  # and does not look through all others each time
    try:
        yield
    finally:
        gc.unfreeze()
        gc.enable()


class Mark(torch.autograd.Function):
    """The identity; its node in the graph holds an object."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, held: object) -> Tensor:
        ctx.held = held
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if isinstance(ctx.held, Bomb) and ctx.held.passes_left == 0:
            raise RuntimeError("boom")
        if isinstance(ctx.held, Bomb):
            ctx.held.passes_left -= 1
        return grad, None


class Held:
    """What a graph holds."""


class Bomb(Held):
    passes_left = 1


def marked(net: Net, batch: tuple[Tensor, Tensor], held: Held) -> list[Tensor]:
    z = Mark.apply(net.encoder(batch[0]), held)
    return [(head(z) - y).square().mean() for head, y in zip(net.heads, batch[1], strict=True)]


@pytest.mark.parametrize("form", [list, torch.stack], ids=["list", "stack"])
@pytest.mark.parametrize("name", CASES)
def test_a_graph_ends_with_its_losses(name, form):
    training = Training(CASES[name])
    with no_collector():
        for retain_graph in (False, True, False):
            held = Held()
            graph, given = weakref.ref(held), form(marked(training.net, training.batch, held))
            del held
            result = training.balancer.backward(given, retain_graph=retain_graph)
            assert graph() is not None
            del given
            assert graph() is None
            assert not result.losses.requires_grad


@pytest.mark.parametrize("name", CASES)
def test_a_graph_ends_with_its_losses_when_the_step_raises(name):
    training = Training(CASES[name])
    with no_collector():
        held = Bomb()
        held.passes_left = 0
        graph, given = weakref.ref(held), marked(training.net, training.batch, held)
        del held
        with pytest.raises(RuntimeError, match="boom"):
            training.balancer.backward(given)
        del given
        assert wait_for(lambda: graph() is None, 0)


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("name", ["modo", "sdm_grad"])
def test_graphs_of_independent_batches_end_with_their_losses(name, batches):
    training = Training(CASES[name])
    with no_collector():
        held = [Held() for _ in range(batches + 1)]
        graphs, given = [weakref.ref(h) for h in held], [marked(training.net, training.batch, h) for h in held]
        del held
        training.balancer.backward(given[0], independent=given[1:])
        del given
        assert [graph() for graph in graphs] == [None] * (batches + 1)


@pytest.mark.parametrize("name", CASES)
def test_a_step_leaves_no_cycles_and_neither_does_a_balancer(name):
    training = Training(CASES[name])
    for _ in range(3):
        training.step()
    with no_collector():
        training.balancer.backward(training.losses())
        assert gc.collect() == 0
        balancer = weakref.ref(training.balancer)
        del training.balancer
        assert balancer() is None
