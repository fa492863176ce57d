"""The streaming operations on ResNet-50's gradients: 23.5 million elements in 156 tensors, K tasks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from igb_kernels.bench import ops
from igb_kernels.bench.cases import Case, Options

TASKS = (3, 8)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def cases(request) -> Callable[[str, int, str], Case]:
    """All of them, which share gradients."""
    device = torch.device("cuda" if request.config.getoption("--gpu") else "cpu")
    options = Options(tasks=TASKS, dtypes=tuple(DTYPES.values()), device=device)
    made = iter(ops.cases(options))
    names = [(name, tasks, dtype) for dtype in DTYPES for tasks in TASKS for name in ops.names()]
    found = dict(zip(names, made, strict=True))
    return lambda *which: found[which]


@pytest.mark.parametrize("name", ops.names())
@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_operation(measure, cases, dtype: str, tasks: int, name: str) -> None:
    measure(cases(name, tasks, dtype))
