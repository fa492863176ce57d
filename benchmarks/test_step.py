"""The whole balanced step against the K bare backward passes that it contains."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.models import built
from igb_kernels.bench import step
from igb_kernels.bench.cases import Case, Options
from igb_kernels.bench.models import LONGEST, MODELS, SMALL

METHODS = ("igb_v1+nash_mtl", "igb_v1+imtl_g", "igb_v1+emtl", "db_mtl", "db_mtl-beta0")
ROUNDS = {"mlp-33k": 400, "mlp-5.8m": 15, "cnn-4.7m": 15}


@pytest.mark.parametrize("tasks", [3, 8])
@pytest.mark.parametrize("model", SMALL)
@pytest.mark.parametrize("method", METHODS)
def test_step(measure, device, method: str, model: str, tasks: int) -> None:
    options = Options(device=device)
    measure(Case(method, partial(step.measure, MODELS[model], tasks, method, options, LONGEST)))


@pytest.mark.parametrize("tasks", [3, 8])
@pytest.mark.parametrize("model", [*SMALL, "vit-l"])
@pytest.mark.parametrize("method", METHODS[1:])
def test_captures(compare, device, backends, method: str, model: str, tasks: int) -> None:
    """Gradients taken while a pass runs against gradients taken after it, and the bare passes."""
    if model == "vit-l" and device.type == "cpu":
        pytest.skip("a step takes half a minute on a CPU")
    whole = step.WholeStep(built(model, tasks, device), method, backends[0])
    hooks, passes = (whole.balancer(backends[0], capture=capture) for capture in ("hooks", "passes"))
    found: list[list[Tensor]] = []
    for balancer in (hooks, passes, hooks, passes):  # nothing is taken early in the first step
        balancer.backward(*whole.losses())
        found.append([p.grad for p in whole.task.shared])
    assert all(torch.equal(a, b) for a, b in zip(*found[2:], strict=True))
    close = {"after each pass": passes.backward, "passes": whole.bare_passes}
    compare(hooks.backward, close, {}, rounds=ROUNDS.get(model, 10), setup=whole.losses)
