"""A training step with TorchJD, before and after the change of imports."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks.models import USERS_MODELS, built
from igb_kernels.bench.models import MultiTask

ROUNDS = {"mlp-33k": 100, "mlp-5.8m": 6, "cnn-4.7m": 6, "qm9-schnet": 5}

METHODS: dict[str, Callable[[ModuleType | SimpleNamespace, int], torch.nn.Module]] = {
    "UPGrad": lambda library, tasks: library.UPGrad(),
    "IMTLG": lambda library, tasks: library.IMTLG(),
    "NashMTL": lambda library, tasks: library.NashMTL(tasks),
}


def step_with(library: ModuleType | SimpleNamespace, task: MultiTask, aggregator: torch.nn.Module) -> None:
    """Forward and backward, as TorchJD documents it."""
    features = task.encoder(task.batch)
    library.mtl_backward(task.losses_at(features), features)
    library.jac_to_grad(task.shared, aggregator)


@pytest.mark.filterwarnings("ignore::UserWarning")  # cvxpy's
@pytest.mark.parametrize("tasks", [3, 8, 11])
@pytest.mark.parametrize("model", USERS_MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_torchjd_step(compare, device, method: str, model: str, tasks: int) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    from torchjd import autojac

    from igb_kernels.integrations import torchjd as ours

    theirs = SimpleNamespace(**{**vars(aggregation), **vars(autojac)})
    torch.manual_seed(0)
    task = built(model, tasks, device)

    def step_of(library: ModuleType | SimpleNamespace) -> Callable[[], None]:
        aggregator = METHODS[method](library, tasks)
        return lambda: step_with(library, task, aggregator)

    def setup() -> tuple[()]:
        task.zero_grad()
        return ()

    def update_of(step: Callable[[], None]) -> Tensor:
        step(*setup())
        return torch.cat([p.grad.flatten() for p in task.shared])

    after, before = step_of(ours), step_of(theirs)
    agreement = torch.nn.functional.cosine_similarity(update_of(after), update_of(before), dim=0)
    assert float(agreement) > 1 - 1e-2, "a speed is worth nothing where the results disagree"
    compare(after, {"torchjd": before}, {}, rounds=ROUNDS[model], setup=setup)
