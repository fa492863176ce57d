"""One K×K solve and one scaling of K losses: the native call, the whole op from Python, and the same elsewhere."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import igb_kernels as igb
from igb_kernels import _C
from igb_kernels.backends import cpu

from .peers import solvers


def gramian(tasks: int, device: torch.device) -> Tensor:
    """Norms from 0.1 to 10, cosines around 0: what the originals still solve."""
    rows = torch.randn(tasks, 2 * tasks + 8, dtype=torch.float64) * torch.logspace(-1, 1, tasks)[:, None]
    return (rows @ rows.T).to(device)


def numbers(known: igb.ops.Solver | igb.ops.Rule, tasks: int, device: torch.device) -> Tensor | None:
    """What the method takes for each task, where it must have some."""
    if known.per_task is None or not known.needs_per_task:
        return None
    return torch.ones(known.per_task(tasks), dtype=torch.float64, device=device)


@pytest.mark.parametrize("tasks", [3, 8, 16, 64])
@pytest.mark.parametrize("method", sorted(igb.ops.SOLVERS))
def test_solve(compare, device, backends, method: str, tasks: int) -> None:
    gram, losses = gramian(tasks, device), torch.rand(tasks, dtype=torch.float64, device=device) + 0.5
    solver = igb.ops.SOLVERS[method]
    own, state = numbers(solver, tasks, device), solver.new_state(tasks, device)
    weights, options = torch.empty(tasks, dtype=torch.float64), list(solver.options.values())
    addresses = [0 if t is None else t.data_ptr() for t in (gram, losses, own, state, weights)]

    def native() -> int:
        g, losses_at, own_at, state_at, w = addresses
        return _C.solve(cpu.METHODS[method], tasks, g, True, losses_at, own_at, options, state_at, w)

    def solve(backend: str = backends[0]) -> Tensor:
        # A state of its own on the GPU, which takes a copy from the host to make.
        kept = state if device.type == "cpu" or state is None else state.clone()
        return igb.ops.solve(method, gram, losses, own, state=kept, backend=backend)[0]

    if device.type == "cpu":
        compare(solve, {"native call": native}, solvers(method, gram, losses), rounds=200 if tasks <= 16 else 20)
    else:
        compare(solve, {name: partial(solve, name) for name in backends[1:]}, {}, rounds=200)


@pytest.mark.parametrize("tasks", [3, 8, 64])
@pytest.mark.parametrize("rule", sorted(igb.ops.RULES))
def test_loss_scales(compare, device, backends, rule: str, tasks: int) -> None:
    losses, known = torch.rand(tasks, device=device) + 0.5, igb.ops.RULES[rule]
    own, state = numbers(known, tasks, device), known.new_state(tasks, device)

    def scales(backend: str = backends[0]) -> Tensor:
        kept = state if device.type == "cpu" or state is None else state.clone()
        return igb.ops.loss_scales(rule, losses, own, state=kept, backend=backend)[0]

    rivals = {name: partial(scales, name) for name in backends[1:]}
    compare(scales, rivals, {"reference": lambda: scales("reference")}, rounds=200)
