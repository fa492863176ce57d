"""LibMTL's own Trainer, on small models and the CPU.

LibMTL is the one in the checkouts that IGB_PEERS names (median-research-group+LibMTL), or else the installed one, which
is 1.1.5. What of it does not work with today's Python and PyTorch is made to work in subclasses, and said there.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

CHECKOUT = "median-research-group+LibMTL"


def _import_libmtl() -> types.ModuleType:
    """Imports LibMTL. The ResNets of 1.1.5 take a function for downloads from a torchvision of 2021; no test uses them,
    and so an empty module stands for it meanwhile."""
    if peers := os.environ.get("IGB_PEERS"):
        sys.path.insert(0, str(pathlib.Path(peers) / CHECKOUT))
    if importlib.util.find_spec("LibMTL") is None:
        pytest.skip("pip install --no-deps LibMTL", allow_module_level=True)
    try:
        return importlib.import_module("LibMTL")
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("torchvision"):
            raise
    empty = {name: types.ModuleType(name) for name in ("torchvision", "torchvision.models", "torchvision.models.utils")}
    empty["torchvision.models.utils"].load_state_dict_from_url = None
    before = {name: sys.modules.get(name) for name in empty}
    sys.modules.update(empty)
    try:
        return importlib.import_module("LibMTL")
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


LibMTL = _import_libmtl()
TODAY = "Nash_MTL" in vars(LibMTL.weighting)
"""Whether it is newer than 1.1.5: weightings and architectures go by name, and there are more of them."""


class MSE(LibMTL.loss.AbsLoss):
    def compute_loss(self, pred: Tensor, gt: Tensor) -> Tensor:
        return (pred - gt).square().mean() + 0.1


class MeanError(LibMTL.metrics.AbsMetric):
    def update_fun(self, pred: Tensor, gt: Tensor) -> None:
        self.record.append(float((pred - gt).abs().mean()))
        self.bs.append(len(pred))

    def score_fun(self) -> list[float]:
        return [sum(self.record) / len(self.record)]


class HPS(LibMTL.architecture.HPS):
    def zero_grad_share_params(self) -> None:
        """1.1.5 relies on gradients being set to zero, which PyTorch now sets to None."""
        self.encoder.zero_grad(set_to_none=False)


LibMTL.architecture.HPS_on_CPU = HPS


class Trainer(LibMTL.Trainer):
    """On the CPU, where LibMTL has "cuda:0"."""

    device = property(lambda self: torch.device("cpu"), lambda self, value: None)

    def _process_data(self, loader: list[Any]) -> tuple[Tensor, Any]:
        """1.1.5 calls the method `next` that iterators of Python 2 had."""
        try:
            return next(loader[1])
        except StopIteration:
            loader[1] = iter(loader[0])
            return next(loader[1])


class Batches(Dataset):
    def __init__(self, inputs: Tensor, targets: Any) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, i: int) -> tuple[Tensor, Any]:
        if isinstance(self.targets, Mapping):
            return self.inputs[i], {task: target[i] for task, target in self.targets.items()}
        return self.inputs[i], self.targets[i]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def tasks_of(number: int) -> list[str]:
    return ["mass", "charge", "spin", "gap", "dipole"][:number]


def loaders(tasks: Sequence[str], multi_input: bool, samples: int, batch: int) -> Any:
    """Batches of one set of inputs, or of one set for each task."""
    generator = torch.Generator().manual_seed(1)

    def inputs() -> Tensor:
        return torch.randn(samples, 6, generator=generator)

    def target(k: int) -> Tensor:
        return (3.0**k) * torch.randn(samples, 2, generator=generator)

    if multi_input:
        return {task: DataLoader(Batches(inputs(), target(k)), batch) for k, task in enumerate(tasks)}
    return DataLoader(Batches(inputs(), {task: target(k) for k, task in enumerate(tasks)}), batch)


def trainer_of(
    weighting: str,
    tasks: int = 3,
    *,
    rep_grad: bool = False,
    multi_input: bool = False,
    encoder: type[nn.Module] = Encoder,
    optim: Mapping[str, Any] = {"optim": "sgd", "lr": 0.02},
    dtype: torch.dtype = torch.float32,
    **weight_args: object,
) -> Trainer:
    """A trainer with a weighting that LibMTL knows by name."""
    torch.manual_seed(0)
    names = tasks_of(tasks)
    task_dict = {
        task: {"metrics": ["error"], "metrics_fn": MeanError(), "loss_fn": MSE(), "weight": [0]} for task in names
    }
    return Trainer(
        task_dict,
        weighting if TODAY else vars(LibMTL.weighting)[weighting],
        "HPS_on_CPU" if TODAY else HPS,
        encoder,
        nn.ModuleDict({task: nn.Linear(5, 2) for task in names}),
        rep_grad,
        multi_input,
        dict(optim),
        None,
        weight_args=weight_args,
        arch_args={},
    )


def train(trainer: Trainer, epochs: int = 3, samples: int = 14, batch: int = 4) -> Any:
    """Trains, the last batch of each epoch being smaller; returns the weights [tasks, epochs, steps]."""
    data = loaders(trainer.task_name, trainer.multi_input, samples, batch)
    torch.manual_seed(1)
    trained = trainer.train(data, loaders(trainer.task_name, trainer.multi_input, 4, 4), epochs, return_weight=True)
    return trainer.batch_weight if trained is None else trained
