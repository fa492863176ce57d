"""One K×K solve: the native call, the whole op from Python, and the float64 PyTorch reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import igb_kernels as igb
from igb_kernels import _C
from igb_kernels.backends import cpu

METHODS = ("nash_mtl", "imtl_g", "emtl", "db_mtl")


def gramian(tasks: int) -> Tensor:
    rows = torch.randn(tasks, 100 * tasks, dtype=torch.float64) * torch.logspace(-2, 2, tasks)[:, None]
    return rows @ rows.T


@pytest.mark.parametrize("tasks", [2, 8, 16, 40])
@pytest.mark.parametrize("method", METHODS)
def test_solve(compare, method: str, tasks: int) -> None:
    gram, losses = gramian(tasks), torch.rand(tasks, dtype=torch.float64) + 0.5
    solver = igb.ops.SOLVERS[method]
    state = solver.new_state(tasks, gram.device)
    weights, options = torch.empty(tasks, dtype=torch.float64), list(solver.options.values())
    addresses = [0 if t is None else t.data_ptr() for t in (gram, losses, state, weights)]

    def native() -> int:
        g, losses_at, state_at, w = addresses
        return _C.solve(cpu.METHODS[method], tasks, g, True, losses_at, options, state_at, w)

    ours, truth = (igb.ops.solve(method, gram, losses, backend=backend)[0] for backend in ("auto", "reference"))
    assert torch.allclose(ours, truth, rtol=1e-7)
    slow = {"reference": lambda: igb.ops.solve(method, gram, losses, backend="reference")}
    compare(lambda: igb.ops.solve(method, gram, losses), {"native call": native}, slow, rounds=200)
