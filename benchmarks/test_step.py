"""The whole balanced step against the K bare backward passes that it contains."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import igb_kernels as igb
from benchmarks.models import MODELS, Task, vit_l
from igb_kernels.bench import eager

METHODS: dict[str, Callable[[], igb.Balancer]] = {
    "igb_v1+nash_mtl": lambda: igb.NashMTL(),
    "igb_v1+imtl_g": lambda: igb.IMTLG(),
    "igb_v1+emtl": lambda: igb.EMTL(),
    "db_mtl": lambda: igb.DBMTL(beta=0.9),
    "db_mtl-beta0": lambda: igb.DBMTL(beta=0.0),
}
ROUNDS = {"mlp-33k": 400, "mlp-5.8m": 15, "cnn-4.7m": 15}


def bare_passes(losses: list[Tensor], task: Task) -> None:
    """K backward passes that keep nothing: what no exact method can do without."""
    for k, loss in enumerate(losses):
        loss.backward(retain_graph=k + 1 < len(losses))
        for p in task.shared:
            p.grad = None


@pytest.mark.parametrize("tasks", [3, 8])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_step(compare, device, backends, method: str, model: str, tasks: int) -> None:
    task = MODELS[model](tasks).to(device)

    def balancer(backend: str) -> igb.Balancer:
        rule = igb.IGBv1(base_losses=[1.0] * tasks) if method.startswith("igb_v1") else None
        return igb.Balancer(METHODS[method](), rule, shared=task.shared, backend=backend)

    ours, *others = [balancer(backend) for backend in backends]
    reference = balancer("reference")

    def grads_of(balancer: igb.Balancer) -> Tensor:
        task.zero_grad()
        balancer.backward(task.losses())
        return torch.cat([p.grad.flatten() for p in task.shared])

    truth = grads_of(reference)
    for other in (ours, *others):
        agreement = torch.nn.functional.cosine_similarity(grads_of(other), truth, dim=0)
        assert float(agreement) > 1 - 1e-4, "a speed is worth nothing where the results disagree"

    def setup() -> tuple[list[Tensor]]:
        task.zero_grad()
        return (task.losses(),)

    def weights_of(gram: Tensor) -> Tensor:
        return igb.ops.solve("imtl_g", gram.double())[0]

    source = torch.zeros(tasks, sum(p.numel() for p in task.shared), device=device)
    bank = torch.zeros_like(source)

    def passes_and_copy(losses: list[Tensor]) -> None:
        """With about the memory traffic of a Gramian and a weighted sum, at the speed of a copy."""
        bare_passes(losses, task)
        bank.copy_(source)

    close = {name: other.backward for name, other in zip(backends[1:], others, strict=True)}
    close |= {"bare passes": lambda losses: bare_passes(losses, task), "passes + copy": passes_and_copy}
    slow = {
        "eager": lambda losses: eager.step(losses, task.shared, weights_of),
        "reference": reference.backward,
    }
    compare(ours.backward, close, slow, rounds=ROUNDS[model], setup=setup)


@pytest.mark.parametrize("tasks", [3, 8])
@pytest.mark.parametrize("model", [*MODELS, "vit-l"])
@pytest.mark.parametrize("method", ["igb_v1+imtl_g", "igb_v1+emtl", "db_mtl", "db_mtl-beta0"])
def test_captures(compare, device, backends, method: str, model: str, tasks: int) -> None:
    """Gradients taken while a pass runs against gradients taken after it, and the bare passes."""
    if model == "vit-l" and device.type == "cpu":
        pytest.skip("a step takes half a minute on a CPU")
    task = {**MODELS, "vit-l": vit_l}[model](tasks).to(device)
    rule = igb.IGBv1(base_losses=[1.0] * tasks) if method.startswith("igb_v1") else None
    hooks, passes = (
        igb.Balancer(METHODS[method](), rule, shared=task.shared, backend=backends[0], capture=capture)
        for capture in ("hooks", "passes")
    )

    def setup() -> tuple[list[Tensor]]:
        task.zero_grad()
        return (task.losses(),)

    found = []
    for balancer in (hooks, passes, hooks, passes):  # nothing is taken early in the first step
        balancer.backward(*setup())
        found.append([p.grad for p in task.shared])
    assert all(torch.equal(a, b) for a, b in zip(*found[2:], strict=True))
    close = {"passes": passes.backward, "bare passes": lambda losses: bare_passes(losses, task)}
    compare(hooks.backward, close, {}, rounds=ROUNDS.get(model, 10), setup=setup)
