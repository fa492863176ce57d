"""One K×K solve and one scaling of K losses: the native call, the whole op from Python, and the same elsewhere."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from igb_kernels.bench import peers, solvers
from igb_kernels.bench.cases import Case, Options
from igb_kernels.gradients import METHODS
from igb_kernels.losses import RULES


def options(device: torch.device) -> Options:
    """With all peers, on the CPU."""
    return Options(device=device, peers=tuple(peers.installed()) if device.type == "cpu" else ())


@pytest.mark.parametrize("tasks", [3, 8, 16, 64])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_solve(measure, device, method: str, tasks: int) -> None:
    measure(Case(method, partial(solvers.measure_solver, method, tasks, options(device))))


@pytest.mark.parametrize("tasks", [3, 8, 64])
@pytest.mark.parametrize("rule", sorted(RULES))
def test_loss_scales(measure, device, rule: str, tasks: int) -> None:
    measure(Case(rule, partial(solvers.measure_rule, rule, tasks, options(device))))
