"""Other libraries: the K×K problem as TorchJD and LibMTL solve it, where they are installed, as `make bench` does; and
checkouts of those that are no packages."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

Solve = Callable[[], object]


def solvers(method: str, gram: Tensor, losses: Tensor) -> dict[str, Solve]:
    """What finds the method's weights from the Gramian (TorchJD) or gradients that have it (LibMTL), by library."""
    found = {}
    if importlib.util.find_spec("torchjd") is not None and (name := TORCHJD.get(method)):
        found["torchjd"] = _torchjd(name, gram)
    for_three_alone = method == "cagrad" and len(gram) != 3  # as LibMTL 1.1.5's has it
    if importlib.util.find_spec("LibMTL") is not None and (name := LIBMTL.get(method)) and not for_three_alone:
        found["LibMTL"] = _libmtl(name, gram, losses)
    return found


TORCHJD = {
    "aligned_mtl": "AlignedMTLWeighting()",
    "cagrad": "CAGradWeighting(c=0.5)",
    "config": "ConFIG()",
    "dual_proj": "DualProjWeighting()",
    "fairgrad": "FairGradWeighting(alpha=1.0)",
    "gradvac": "GradVacWeighting()",
    "imtl_g": "IMTLGWeighting()",
    "mgda": "MGDAWeighting()",
    "modo": "MoDoWeighting()",
    "nash_mtl": "NashMTL(n_tasks={tasks})",
    "pcgrad": "PCGradWeighting()",
    "sdm_grad": "SDMGradWeighting()",
    "upgrad": "UPGradWeighting()",
}


def _torchjd(name: str, gram: Tensor) -> Solve:
    from torchjd import aggregation

    solver = eval(f"aggregation.{name.format(tasks=len(gram))}", {"aggregation": aggregation})
    return partial(solver, _rows_with(gram) if isinstance(solver, aggregation.Aggregator) else gram)


LIBMTL = {
    "cagrad": ("CAGrad", {"calpha": 0.5, "rescale": 1}),
    "gradvac": ("GradVac", {"beta": 0.5, "GradVac_beta": 0.5, "GradVac_group_type": 0}),
    "imtl_g": ("IMTL", {}),
    "mgda": ("MGDA", {"mgda_gn": "none"}),
    "pcgrad": ("PCGrad", {}),
}


def _libmtl(peer: tuple[str, dict[str, object]], gram: Tensor, losses: Tensor) -> Solve:
    """The weighting as it is, on gradients that are given instead of computed, and an update that goes nowhere."""
    name, arguments = peer
    rows = _rows_with(gram).float()

    class Given(getattr(libmtl("weighting"), name)):
        rep_grad, task_num, device = False, len(rows), torch.device("cpu")

        def _compute_grad_dim(self) -> None: ...

        def _compute_grad(self, *_: object, **__: object) -> Tensor:
            return rows

        def _get_grads(self, *_: object, **__: object) -> Tensor:
            return rows

        def _reset_grad(self, *_: object) -> None: ...

        def _backward_new_grads(self, *_: object, **__: object) -> None: ...

    weighting = Given()
    weighting.init_param()
    return partial(weighting.backward, losses.float(), **arguments)


def libmtl(part: str) -> ModuleType:
    """A part of LibMTL, of its checkout in the folder IGB_PEERS or else of the installed one. As a whole, it imports
    models that need an older torchvision; its weightings and architectures need none of them."""
    if "LibMTL" not in sys.modules:
        if (folder := checkout("median-research-group/LibMTL")) is not None:
            sys.path.insert(0, str(folder))
        sys.modules["LibMTL"] = importlib.util.module_from_spec(importlib.util.find_spec("LibMTL"))
    return importlib.import_module(f"LibMTL.{part}")


def _rows_with(gram: Tensor) -> Tensor:
    """K gradients of K elements with this Gramian: forming it again from them costs next to nothing."""
    return torch.linalg.cholesky(gram)


# ---- Checkouts ----------------------------------------------------------------------------------------------------


def checkout(repository: str) -> Path | None:
    """The checkout of "owner/name" in the folder that IGB_PEERS names, or None."""
    folder = Path(os.environ.get("IGB_PEERS", "")) / repository.replace("/", "+")
    return folder if "IGB_PEERS" in os.environ and folder.is_dir() else None


@contextmanager
def importing_from(folder: Path, substitutes: Mapping[str, ModuleType | None] | None = None) -> Iterator[None]:
    """Imports find the checkout's `methods` and `experiments` first, and these modules instead of the named ones (None:
    there is none); afterwards all is as before."""
    substitutes = substitutes or {}

    def set_aside() -> dict[str, ModuleType]:
        names = [
            name for name in sys.modules if name.split(".")[0] in ("methods", "experiments") or name in substitutes
        ]
        return {name: sys.modules.pop(name) for name in names}

    before, writes = set_aside(), sys.dont_write_bytecode
    sys.path.insert(0, str(folder))
    sys.modules.update(substitutes)
    sys.dont_write_bytecode = True  # nothing is left in the checkout
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.dont_write_bytecode = writes
        set_aside()
        sys.modules.update(before)
