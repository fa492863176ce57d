"""The network of examples/qm9, which a checkout has and an installed package has not."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from igb_kernels.bench.models.base import MultiTask

FOLDER = Path(__file__).resolve().parents[3] / "examples" / "qm9"
NEEDED = ("torch_geometric", "pandas", "numpy")
MODULES = ("bonds", "data", "graphs", "models")
"""That the folder has."""
MOLECULES = 120


def missing() -> str:
    """Why it cannot be made here; "" where it can."""
    if not (FOLDER / "models.py").is_file():
        return "examples/qm9 is not installed: it is in a checkout of the repository"
    absent = [name for name in NEEDED if find_spec(name) is None]
    return f"{', '.join(absent)} is not installed" if absent else ""


def qm9_schnet(tasks: int, *, batch: int = MOLECULES) -> MultiTask:
    """SchNet on molecules that are in the repository; on whatever default device, they are read on the CPU."""
    device = torch.get_default_device()
    with torch.device("cpu"), _importing() as (data, graphs, models):
        molecules = data.load("tiny", None, seed=0)
        train = data.split(len(molecules), 0).train
        built = graphs.build(molecules, train, cutoff=5.0, bond_features=False)
        net = models.build_model("schnet", [str(k) for k in range(tasks)])
        task = MultiTask(net.encoder, nn.ModuleList(net.heads.values()), built.batch(torch.arange(batch)))
    return task.to(device)


@contextmanager
def _importing() -> Iterator[tuple[Any, Any, Any]]:
    """The folder's modules, whose names are common ones: afterwards these stand for what they did before."""
    before = {name: sys.modules.pop(name) for name in MODULES if name in sys.modules}
    sys.path.insert(0, str(FOLDER))
    try:
        _, data, graphs, models = (importlib.import_module(name) for name in MODULES)
        yield data, graphs, models
    finally:
        sys.path.remove(str(FOLDER))
        for name in MODULES:
            sys.modules.pop(name, None)
        sys.modules.update(before)
