"""A whole training step as TorchJD and LibMTL take it, in their own code: forward pass, K backward passes, update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from igb_kernels.bench.models import MultiTask
from igb_kernels.bench.peers import libmtl

Scale = Callable[[list[Tensor]], list[Tensor]]
"""What is done to the losses first."""
Step = Callable[[], object]

TORCHJD = {
    "aligned_mtl": "AlignedMTL",
    "cagrad": "CAGrad",
    "config": "ConFIG",
    "dual_proj": "DualProj",
    "fairgrad": "FairGrad",
    "imtl_g": "IMTLG",
    "mgda": "MGDA",
    "nash_mtl": "NashMTL",
    "upgrad": "UPGrad",
}
"""Methods and their aggregators; those that draw random numbers come to something else each time."""
TORCHJD_ARGUMENTS: Mapping[str, Callable[[int], dict[str, Any]]] = {
    "cagrad": lambda tasks: {"c": 0.5},
    "fairgrad": lambda tasks: {"alpha": 1.0},
    "nash_mtl": lambda tasks: {"n_tasks": tasks},
}
LIBMTL: Mapping[str, tuple[str, dict[str, Any]]] = {
    "aligned_mtl": ("Aligned_MTL", {}),
    "cagrad": ("CAGrad", {"calpha": 0.5, "rescale": 1}),
    "db_mtl": ("DB_MTL", {"DB_beta": 0.9, "DB_beta_sigma": 0}),
    "fairgrad": ("FairGrad", {"FairGrad_alpha": 1.0}),
    "imtl_g": ("IMTL", {}),
    "mgda": ("MGDA", {"mgda_gn": "none"}),
    "nash_mtl": ("Nash_MTL", {"update_weights_every": 1, "optim_niter": 20, "max_norm": 1.0}),
    "upgrad": ("UPGrad", {"UPGrad_norm_eps": 1e-4, "UPGrad_reg_eps": 1e-4}),
}
"""Weightings with LibMTL's default arguments."""


class NotThere(Exception):
    """Says why a library takes no such step."""


def torchjd_step(task: MultiTask, method: str, scale: Scale) -> Step:
    """As TorchJD documents it, at its defaults; raises NotThere."""
    if method not in TORCHJD:
        raise NotThere(f"torchjd has no {method} that can be compared")
    if find_spec("torchjd") is None:
        raise NotThere("torchjd is not installed")
    from torchjd import aggregation
    from torchjd.autojac import jac_to_grad, mtl_backward

    arguments = TORCHJD_ARGUMENTS[method](len(task.heads)) if method in TORCHJD_ARGUMENTS else {}
    aggregator = getattr(aggregation, TORCHJD[method])(**arguments)

    def step() -> None:
        representation = task.encoder(task.batch)
        losses = scale(task.losses_at(representation))
        mtl_backward(losses, representation if isinstance(representation, Tensor) else list(representation))
        jac_to_grad(task.shared, aggregator)

    return step


def libmtl_model(weighting: type, task: MultiTask) -> Any:
    """As LibMTL's Trainer makes it, of the task's modules."""
    architecture = libmtl("architecture").HPS

    class Model(architecture, weighting):  # type: ignore[misc,valid-type]
        def zero_grad_share_params(self) -> None:
            """LibMTL 1.1.5 relies on zeros, where PyTorch now sets None."""
            self.encoder.zero_grad(set_to_none=False)

    names = [str(k) for k in range(len(task.heads))]
    heads = nn.ModuleDict(dict(zip(names, task.heads, strict=True)))
    model = Model(names, lambda: task.encoder, heads, False, False, task.device)
    model.init_param()
    model.epoch = 0
    return model


def libmtl_losses(model: Any, task: MultiTask, scale: Scale = list) -> Tensor:
    """One tensor [K], filled as LibMTL's Trainer does, from a forward pass of its architecture."""
    losses = torch.zeros(len(task.heads), device=task.device)
    predictions = model(task.batch).values()
    for k, loss in enumerate(scale([task.loss(k, prediction) for k, prediction in enumerate(predictions)])):
        losses[k] = loss
    return losses


def libmtl_step(task: MultiTask, method: str, scale: Scale) -> Step:
    """Through LibMTL's architecture and weighting, as its Trainer does; raises NotThere."""
    if method not in LIBMTL:
        raise NotThere(f"libmtl has no {method} that can be compared")
    if find_spec("LibMTL") is None:
        raise NotThere("libmtl is not installed")
    name, arguments = LIBMTL[method]
    if (weighting := getattr(libmtl("weighting"), name, None)) is None:
        raise NotThere(f"the installed libmtl has no {name}")
    model = libmtl_model(weighting, task)

    def step() -> None:
        model.zero_grad(set_to_none=False)
        model.backward(libmtl_losses(model, task, scale), **arguments)

    return step


STEPS: Mapping[str, Callable[[MultiTask, str, Scale], Step]] = {"torchjd": torchjd_step, "libmtl": libmtl_step}
