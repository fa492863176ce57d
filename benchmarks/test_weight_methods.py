"""Training steps of nash-mtl and IGB4MTL against the same with ours imported in their place; both from checkouts in the
folder that IGB_PEERS names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.models import MODELS
from benchmarks.peers import checkout, importing_from


@dataclass
class ProtocolTask:
    """A model as the trainers have it."""

    losses: Callable[[], Tensor]
    shared: list[Tensor]
    own: list[Tensor]

    def zero_grad(self) -> None:
        for p in (*self.shared, *self.own):
            p.grad = None

    def places(self) -> dict[str, Any]:
        return {
            "shared_parameters": self.shared,
            "task_specific_parameters": self.own,
            "last_shared_parameters": None,
            "representation": None,
        }


def _protocol_task(model: str, tasks: int, device: torch.device) -> ProtocolTask:
    if model == "qm9-schnet":
        return _qm9_task(device)
    task = MODELS[model](tasks).to(device)
    return ProtocolTask(lambda: torch.stack(task.losses()), task.shared, list(task.heads.parameters()))


def _qm9_task(device: torch.device) -> ProtocolTask:
    """The encoder of examples/qm9 on 120 molecules, with its 11 targets."""
    pytest.importorskip("torch_geometric")
    pytest.importorskip("pandas")
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "qm9"))
    data, graphs, models = (importlib.import_module(name) for name in ("data", "graphs", "models"))
    molecules = data.load("tiny", None, seed=0)
    built = graphs.build(molecules, data.split(len(molecules), 0).train, cutoff=5.0, bond_features=False).to(device)
    batch = built.batch(torch.arange(120, device=device))
    net = models.build_model("schnet", data.TARGET_NAMES).to(device)
    return ProtocolTask(
        lambda: torch.stack(list(net.losses(batch).values())),
        list(net.encoder.parameters()),
        list(net.heads.parameters()),
    )


PROTOCOL_MODELS = [*((model, tasks) for model in MODELS for tasks in (3, 11)), ("qm9-schnet", 11)]
PROTOCOL_ROUNDS = {"mlp-33k": 40, "mlp-5.8m": 5, "cnn-4.7m": 5, "qm9-schnet": 10}


def _require(repository: str) -> Path:
    folder = checkout(repository)
    if folder is None:
        pytest.skip(f"IGB_PEERS does not name a folder with a checkout of {repository}")
    for package in ("cvxpy", "ecos", "scipy"):
        pytest.importorskip(package)
    return folder


def _assert_agreement(task: ProtocolTask, steps: list[Callable[[Tensor], object]]) -> None:
    updates = []
    for step in steps:
        task.zero_grad()
        step(task.losses())
        updates.append(torch.cat([p.grad.flatten() for p in task.shared]))
    agreement = torch.nn.functional.cosine_similarity(*updates, dim=0)
    assert float(agreement) > 0.999, "a speed is worth nothing where the results disagree"


def _compare_protocol(compare, task: ProtocolTask, model: str, ours, theirs, exact: bool) -> None:
    if exact:  # ECOS fails at some steps, and the last weights are taken
        _assert_agreement(task, [ours, theirs])

    def setup() -> tuple[Tensor]:
        task.zero_grad()
        return (task.losses(),)

    compare(ours, {"original": theirs}, {}, rounds=PROTOCOL_ROUNDS[model], setup=setup)


@pytest.mark.parametrize(("model", "tasks"), PROTOCOL_MODELS)
@pytest.mark.parametrize("method", ["nashmtl", "imtl", "cagrad", "pcgrad"])
def test_nash_mtl_step(compare, device, method: str, model: str, tasks: int) -> None:
    """`WeightMethods(method).backward(...)` on losses of torch.stack."""
    from igb_kernels.integrations import nash_mtl

    task = _protocol_task(model, tasks, device)
    with importing_from(_require("AvivNavon/nash-mtl")):
        original = importlib.import_module("methods.weight_methods")
    ours, theirs = (module.WeightMethods(method, n_tasks=tasks, device=device) for module in (nash_mtl, original))
    steps = [lambda losses, m=m: m.backward(losses=losses, **task.places()) for m in (ours, theirs)]
    _compare_protocol(compare, task, model, *steps, exact=method == "imtl")


@pytest.mark.parametrize(("model", "tasks"), PROTOCOL_MODELS)
@pytest.mark.parametrize("pair", ["igbv1+ls", "igbv1+imtl", "igbv1+nashmtl"])
def test_igb4mtl_step(compare, device, pair: str, model: str, tasks: int) -> None:
    """`LossWeightMethods(...).get_weighted_losses(...)` and `GradientWeightMethods(...).backward(...)`."""
    from igb_kernels.integrations import igb4mtl

    task = _protocol_task(model, tasks, device)
    with importing_from(_require("YanqiDai/IGB4MTL")):
        losses = importlib.import_module("methods.loss_weight_methods")
        gradients = importlib.import_module("methods.gradient_weight_methods")
    names = pair.split("+")

    def step_of(loss_methods: Any, gradient_methods: Any) -> Callable[[Tensor], object]:
        weigh = loss_methods(names[0], n_tasks=tasks, device=device)
        balance = gradient_methods(names[1], n_tasks=tasks, device=device)
        weigh.method.base_losses = torch.ones(tasks, device=device)

        def step(losses: Tensor) -> object:
            weighted, _ = weigh.get_weighted_losses(losses=losses, **task.places())
            return balance.backward(losses=weighted, **task.places())

        return step

    ours = step_of(igb4mtl.LossWeightMethods, igb4mtl.GradientWeightMethods)
    theirs = step_of(losses.LossWeightMethods, gradients.GradientWeightMethods)
    _compare_protocol(compare, task, model, ours, theirs, exact=names[1] in ("ls", "imtl"))
