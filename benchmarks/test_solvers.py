"""One K×K solve and one scaling of K losses: the native call, the whole op from Python, and plain PyTorch."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

import igb_kernels as igb
from igb_kernels import _C
from igb_kernels.backends import cpu

METHODS = ("nash_mtl", "imtl_g", "emtl", "db_mtl")


def gramian(tasks: int, device: torch.device) -> Tensor:
    rows = torch.randn(tasks, 100 * tasks, dtype=torch.float64) * torch.logspace(-2, 2, tasks)[:, None]
    return (rows @ rows.T).to(device)


@pytest.mark.parametrize("tasks", [2, 8, 16, 40])
@pytest.mark.parametrize("method", METHODS)
def test_solve(compare, device, backends, method: str, tasks: int) -> None:
    gram, losses = gramian(tasks, device), torch.rand(tasks, dtype=torch.float64, device=device) + 0.5
    solver = igb.ops.SOLVERS[method]
    state = solver.new_state(tasks, gram.device)
    weights, options = torch.empty(tasks, dtype=torch.float64), list(solver.options.values())
    addresses = [0 if t is None else t.data_ptr() for t in (gram, losses, state, weights)]

    def native() -> int:
        g, losses_at, state_at, w = addresses
        return _C.solve(cpu.METHODS[method], tasks, g, True, losses_at, options, state_at, w)

    def solve(backend: str = backends[0]) -> Tensor:
        # A state of its own on the GPU, which takes a copy from the host to make.
        own = None if device.type == "cpu" or state is None else state.clone()
        return igb.ops.solve(method, gram, losses, state=own, backend=backend)[0]

    assert torch.allclose(solve(), solve("reference"), rtol=1e-7)
    rivals = {"native call": native} if device.type == "cpu" else {name: partial(solve, name) for name in backends[1:]}
    compare(solve, rivals, {"reference": lambda: solve("reference")}, rounds=200)


@pytest.mark.parametrize("tasks", [3, 8, 64])
def test_loss_scales(compare, device, backends, tasks: int) -> None:
    losses, base = (torch.rand(tasks, device=device) + 0.5 for _ in range(2))
    base = base.double()

    def scales(backend: str = backends[0]) -> Tensor:
        return igb.ops.loss_scales("igb_v1", losses, base, backend=backend)[0]

    def eager() -> Tensor:
        values = losses.double()
        return (tasks * torch.softmax(values / base, dim=0) / values).to(losses.dtype)

    torch.testing.assert_close(scales(), eager())
    rivals = {name: partial(scales, name) for name in backends[1:]}
    compare(scales, {**rivals, "eager": eager}, {"reference": lambda: scales("reference")}, rounds=200)
