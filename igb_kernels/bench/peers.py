"""The K×K problem as TorchJD and LibMTL solve it, where they are installed, and which of our options mean theirs."""

from __future__ import annotations

import importlib
import importlib.util
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

MODULES = {"torchjd": "torchjd", "libmtl": "LibMTL"}
"""What to import, by our name for it."""


def installed() -> list[str]:
    """The names of those that are."""
    return [name for name, module in MODULES.items() if importlib.util.find_spec(module) is not None]


@dataclass(frozen=True)
class Peer:
    """A method's weights from a Gramian, or from gradients that have it, by another library."""

    call: Callable[[], object]
    """One more call, as in training."""
    update: Callable[[], tuple[Tensor, Tensor | None]]
    """A first call: the update in terms of the rows of the Gramian's Cholesky factor, and the order [K, K] of visits
    where one was drawn, as `per_task`."""
    options: Mapping[str, float]
    """Ours that mean the same."""


def solvers(method: str, gram: Tensor, losses: Tensor, libraries: tuple[str, ...]) -> dict[str, Peer]:
    """What there is for a method, by library; the Gramian is float64."""
    found = {}
    if "torchjd" in libraries and method in TORCHJD:
        found["torchjd"] = _torchjd(TORCHJD[method], gram)
    if "libmtl" in libraries and method in LIBMTL and LIBMTL[method].at_most >= len(gram) >= LIBMTL[method].at_least:
        found["libmtl"] = _libmtl(LIBMTL[method], gram, losses)
    return found


@dataclass(frozen=True)
class _Known:
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, float] = field(default_factory=dict)
    visits: str = ""
    """"others" or "all": in random orders, each gradient visits those."""
    at_least: int = 1
    at_most: int = 1 << 30


def _times(orders: list[list[int]]) -> Tensor:
    """When each gradient visits each other."""
    times = torch.zeros(len(orders), len(orders), dtype=torch.float64)
    for i, order in enumerate(orders):
        times[i, order] = torch.arange(len(order)).double()
    return times


# ---- TorchJD ------------------------------------------------------------------------------------------------------

TORCHJD = {
    "aligned_mtl": _Known("AlignedMTLWeighting"),
    "cagrad": _Known("CAGradWeighting", {"c": 0.5}),
    "config": _Known("ConFIG"),
    "dual_proj": _Known("DualProjWeighting", options={"reg_eps": 1e-4}),
    "equal": _Known("SumWeighting"),
    "fairgrad": _Known("FairGradWeighting", {"alpha": 1.0}),
    "gradvac": _Known("GradVacWeighting", options={"eps": 1e-8}, visits="others"),
    "imtl_g": _Known("IMTLGWeighting"),
    "mgda": _Known("MGDAWeighting"),
    "modo": _Known("MoDoWeighting", {"gamma": 0.1, "rho": 0.0}, {"gamma": 0.1}),
    "nash_mtl": _Known("NashMTL", {"n_tasks": None}),
    "pcgrad": _Known("PCGradWeighting", visits="all"),
    "sdm_grad": _Known("SDMGradWeighting", {"lr": 5.0}, {"eps": 1e-8}),
    "upgrad": _Known("UPGradWeighting", options={"reg_eps": 1e-4}),
}


def _torchjd(known: _Known, gram: Tensor) -> Peer:
    from torchjd import aggregation

    rows = rows_with(gram)

    def make() -> tuple[Callable[[], Tensor], bool]:
        arguments = {name: len(gram) if value is None else value for name, value in known.arguments.items()}
        solver = getattr(aggregation, known.name)(**arguments)
        whole = isinstance(solver, aggregation.Aggregator)
        return partial(solver, rows if whole else gram), whole

    def update() -> tuple[Tensor, Tensor | None]:
        call, whole = make()
        before = torch.get_rng_state()
        orders = [_permuted(i, len(gram), known.visits) for i in range(len(gram) if known.visits else 0)]
        torch.set_rng_state(before)
        found = call()
        return (found if whole else rows.T @ found), _times(orders) if orders else None

    return Peer(make()[0], update, known.options)


def _permuted(i: int, tasks: int, visits: str) -> list[int]:
    visited = [j for j in range(tasks) if visits == "all" or j != i]
    return [visited[j] for j in torch.randperm(len(visited)).tolist()]


# ---- LibMTL -------------------------------------------------------------------------------------------------------

LIBMTL = {
    # LibMTL 1.1.5 writes the number of tasks, 3, into the objective.
    "cagrad": _Known("CAGrad", {"calpha": 0.5, "rescale": 1}, {"rescale": 1.0}, at_least=3, at_most=3),
    "gradvac": _Known("GradVac", {"beta": 0.5, "GradVac_beta": 0.5, "GradVac_group_type": 0}, visits="others"),
    "imtl_g": _Known("IMTL", at_least=2),
    "mgda": _Known("MGDA", {"mgda_gn": "none"}, at_least=2),
    "pcgrad": _Known("PCGrad", options={"visit_self": 1.0}, visits="all"),
}
"""With the arguments of every version."""


def _libmtl(known: _Known, gram: Tensor, losses: Tensor) -> Peer:
    """The weighting as it is, on gradients that are given instead of computed, and an update that is kept."""
    rows = rows_with(gram).float()

    class Given(getattr(libmtl("weighting"), known.name)):  # type: ignore[misc]
        rep_grad, task_num, device = False, len(rows), rows.device
        found: Tensor

        def _compute_grad_dim(self) -> None: ...

        def _compute_grad(self, *_: object, **__: object) -> Tensor:
            return rows

        def _get_grads(self, *_: object, **__: object) -> Tensor:
            return rows

        def _reset_grad(self, update: Tensor) -> None:
            self.found = update

    def make() -> Any:
        weighting = Given()
        weighting.init_param()
        return weighting

    def update() -> tuple[Tensor, Tensor | None]:
        weighting, before = make(), random.getstate()
        orders = [_shuffled(i, len(gram), known.visits) for i in range(len(gram) if known.visits else 0)]
        random.setstate(before)
        weighting.backward(losses.float(), **known.arguments)
        return weighting.found.detach().double(), _times(orders) if orders else None

    return Peer(partial(make().backward, losses.float(), **known.arguments), update, known.options)


def _shuffled(i: int, tasks: int, visits: str) -> list[int]:
    visited = [j for j in range(tasks) if visits == "all" or j != i]
    random.shuffle(visited)
    return visited


def libmtl(part: str) -> ModuleType:
    """A part of LibMTL. As a whole, it imports models that need an older torchvision; its weightings and architectures
    need none of them."""
    if "LibMTL" not in sys.modules:
        spec = importlib.util.find_spec("LibMTL")
        if spec is None:
            raise ImportError("LibMTL is not installed (pip install --no-deps LibMTL)")
        sys.modules["LibMTL"] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"LibMTL.{part}")


def rows_with(gram: Tensor) -> Tensor:
    """K gradients of K elements with this Gramian: forming it again from them costs next to nothing."""
    rows: Tensor = torch.linalg.cholesky(gram)
    return rows


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of the solvers behind the libraries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
