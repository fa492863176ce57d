"""LibMTL's own Trainer, on small models and the CPU, and its protocol alone, on any device.

LibMTL is the one in the checkouts that IGB_PEERS names (median-research-group+LibMTL), or else the installed one, which
is 1.1.5. What of it does not work with today's Python and PyTorch is made to work in subclasses, and said there.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pathlib
import random
import sys
import types
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
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


TASKS = ["mass", "charge", "spin"]


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
    optim: Mapping[str, Any] = MappingProxyType({"optim": "sgd", "lr": 0.02}),
    **weight_args: object,
) -> Trainer:
    """A trainer with a weighting that LibMTL knows by name."""
    torch.manual_seed(0)
    names = TASKS[:tasks]
    task_dict = {
        task: {"metrics": ["error"], "metrics_fn": MeanError(), "loss_fn": MSE(), "weight": [0]} for task in names
    }
    return Trainer(
        task_dict,
        weighting if TODAY else vars(LibMTL.weighting)[weighting],
        "HPS_on_CPU" if TODAY else HPS,
        Encoder,
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
    data, test = (loaders(trainer.task_name, trainer.multi_input, n, batch) for n in (samples, batch))
    torch.manual_seed(1)
    random.seed(1)
    trainer.train(data, test, epochs)
    return trainer.batch_weight


# ---- The protocol alone: the same numbers with every version of LibMTL ------------------------------------------

METHODS = {
    "EW": {},
    "UW": {},
    "DWA": {"T": 2.0},
    "GLS": {},
    "STCH": {"STCH_mu": 0.5, "STCH_warmup_epoch": 1},
    "FAMO": {"FAMO_w_lr": 0.025, "FAMO_w_gamma": 1e-3},
    "IMTL": {},
    "MGDA": {"mgda_gn": "loss+"},
    "CAGrad": {"calpha": 0.5, "rescale": 1},
    "PCGrad": {},
    "GradVac": {"GradVac_beta": 0.5, "GradVac_group_type": 0},
    "GradNorm": {"alpha": 1.5},
    "Nash_MTL": {"update_weights_every": 2, "optim_niter": 20, "max_norm": 1.0},
    "MoCo": {
        "MoCo_beta": 0.5,
        "MoCo_beta_sigma": 0.5,
        "MoCo_gamma": 0.1,
        "MoCo_gamma_sigma": 0.5,
        "MoCo_rho": 0.1,
    },
    "DB_MTL": {"DB_beta": 0.9, "DB_beta_sigma": 0.5},
    "ExcessMTL": {"robust_step_size": 0.1},
    "FairGrad": {"FairGrad_alpha": 2.0},
    "MoDo": {"MoDo_gamma": 1e-2, "MoDo_rho": 0.1},
    "SDMGrad": {"SDMGrad_lamda": 0.3, "SDMGrad_niter": 20},
    "UPGrad": {"UPGrad_norm_eps": 1e-4, "UPGrad_reg_eps": 1e-4},
}
"""LibMTL's weightings that can be compared, with arguments."""
THREE_BATCHES = ("MoDo", "SDMGrad")
TASKS_OF = {"PCGrad": 2, "GradVac": 2, "Nash_MTL": 2}
"""Of two tasks each has but one other to visit, and LibMTL's solver for Nash-MTL converges."""


def model_of(
    weighting: type, tasks: int = 3, *, rep_grad: bool = False, multi_input: bool = False, device: str = "cpu"
) -> nn.Module:
    """An encoder and heads behind LibMTL's protocol, with the same parameters everywhere."""
    names = TASKS[:tasks]
    heads = nn.ModuleDict({task: nn.Linear(5, 2) for task in names})
    model = type("MTLmodel", (HPS, weighting), {})(names, Encoder, heads, rep_grad, multi_input, torch.device(device))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(0.6 * torch.sin(1.3 * torch.arange(1, p.numel() + 1) ** 1.1 + i).view_as(p))
    model.init_param()
    return model.to(device)


def losses_of(model: nn.Module, seed: int = 0) -> Tensor:
    """One positive loss for each task, put into a tensor as LibMTL's Trainer does."""
    losses = torch.zeros(model.task_num).to(model.device)
    predictions = {}
    for k, task in enumerate(model.task_name):
        if model.multi_input or not predictions:
            x = torch.sin(torch.arange(24) * (1.7 + 0.1 * model.multi_input * k) + seed).view(4, 6).to(model.device)
            predictions |= model(x, task) if model.multi_input else model(x)
        target = (1 + k) * torch.cos(torch.arange(8) * (0.9 + k) + seed).view(4, 2).to(model.device)
        losses[k] = (predictions[task] - target).square().mean() + 0.1
    return losses


def trained(weighting: type, name: str, epochs: int = 3, steps: int = 3) -> tuple[Tensor, Tensor]:
    """The parameters before and after training as LibMTL's Trainer does with a weighting of this name."""
    model = model_of(weighting, TASKS_OF.get(name, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
    parameters = [*model.encoder.parameters(), *model.decoders.parameters()]
    before = torch.cat([p.detach().flatten() for p in parameters])
    model.train_loss_buffer = np.zeros([model.task_num, epochs])
    for epoch in range(epochs):
        model.epoch = epoch
        for step in range(steps):
            seeds = [100 * epoch + 10 * step + i for i in range(3 if name in THREE_BATCHES else 1)]
            losses = torch.stack([losses_of(model, seed) for seed in seeds]).squeeze(0)
            model.train_loss_buffer[:, epoch] += losses.detach().view(-1, model.task_num)[-1].numpy() / steps
            optimizer.zero_grad(set_to_none=False)
            model.backward(losses, **METHODS[name])
            optimizer.step()
            if name == "FAMO":
                with torch.no_grad():
                    model.update_w(losses_of(model, seeds[-1]))
    return before, torch.cat([p.detach().flatten() for p in parameters])
