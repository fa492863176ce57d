"""Training steps of nash-mtl and IGB4MTL against the same with ours imported in their place; both from checkouts in the
folder that IGB_PEERS names."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.models import built
from benchmarks.peers import checkout, importing_from
from igb_kernels.bench.models import SMALL, MultiTask

CASES = [*((model, tasks) for model in SMALL for tasks in (3, 8, 11)), ("qm9-schnet", 11)]
ROUNDS = {"mlp-33k": 40, "mlp-5.8m": 5, "cnn-4.7m": 5, "qm9-schnet": 5}


def places(task: MultiTask) -> dict[str, Any]:
    """As the trainers tell them."""
    return {
        "shared_parameters": task.shared,
        "task_specific_parameters": list(task.heads.parameters()),
        "last_shared_parameters": None,
        "representation": None,
    }


def _require(repository: str) -> Path:
    folder = checkout(repository)
    if folder is None:
        pytest.skip(f"IGB_PEERS does not name a folder with a checkout of {repository}")
    for package in ("cvxpy", "ecos", "scipy"):
        pytest.importorskip(package)
    return folder


def _assert_agreement(task: MultiTask, steps: list[Callable[[Tensor], object]]) -> None:
    updates = []
    for step in steps:
        task.zero_grad()
        step(torch.stack(task.losses()))
        updates.append(torch.cat([p.grad.flatten() for p in task.shared]))
    agreement = torch.nn.functional.cosine_similarity(*updates, dim=0)
    assert float(agreement) > 0.999, "a speed is worth nothing where the results disagree"


def _compare(compare, task: MultiTask, model: str, ours, theirs, exact: bool) -> None:
    if exact:  # ECOS fails at some steps, and the last weights are taken
        _assert_agreement(task, [ours, theirs])

    def setup() -> tuple[Tensor]:
        task.zero_grad()
        return (torch.stack(task.losses()),)

    compare(ours, {"original": theirs}, {}, rounds=ROUNDS[model], setup=setup)


@pytest.mark.parametrize(("model", "tasks"), CASES)
@pytest.mark.parametrize("method", ["nashmtl", "imtl", "cagrad", "pcgrad"])
def test_nash_mtl_step(compare, device, method: str, model: str, tasks: int) -> None:
    """`WeightMethods(method).backward(...)` on losses of torch.stack."""
    from igb_kernels.integrations import nash_mtl

    task = built(model, tasks, device)
    with importing_from(_require("AvivNavon/nash-mtl")):
        original = importlib.import_module("methods.weight_methods")
    ours, theirs = (module.WeightMethods(method, n_tasks=tasks, device=device) for module in (nash_mtl, original))
    steps = [lambda losses, m=m: m.backward(losses=losses, **places(task)) for m in (ours, theirs)]
    _compare(compare, task, model, *steps, exact=method == "imtl")


@pytest.mark.parametrize(("model", "tasks"), CASES)
@pytest.mark.parametrize("pair", ["igbv1+ls", "igbv1+imtl", "igbv1+nashmtl"])
def test_igb4mtl_step(compare, device, pair: str, model: str, tasks: int) -> None:
    """`LossWeightMethods(...).get_weighted_losses(...)` and `GradientWeightMethods(...).backward(...)`."""
    from igb_kernels.integrations import igb4mtl

    task = built(model, tasks, device)
    with importing_from(_require("YanqiDai/IGB4MTL")):
        losses = importlib.import_module("methods.loss_weight_methods")
        gradients = importlib.import_module("methods.gradient_weight_methods")
    names = pair.split("+")

    def step_of(loss_methods: Any, gradient_methods: Any) -> Callable[[Tensor], object]:
        weigh = loss_methods(names[0], n_tasks=tasks, device=device)
        balance = gradient_methods(names[1], n_tasks=tasks, device=device)
        weigh.method.base_losses = torch.ones(tasks, device=device)

        def step(losses: Tensor) -> object:
            weighted, _ = weigh.get_weighted_losses(losses=losses, **places(task))
            return balance.backward(losses=weighted, **places(task))

        return step

    ours = step_of(igb4mtl.LossWeightMethods, igb4mtl.GradientWeightMethods)
    theirs = step_of(losses.LossWeightMethods, gradients.GradientWeightMethods)
    _compare(compare, task, model, ours, theirs, exact=names[1] in ("ls", "imtl"))
