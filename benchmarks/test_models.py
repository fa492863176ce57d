"""Balanced steps of models that people train on several tasks; on a CPU of small batches, where passes are short."""

from __future__ import annotations

import pytest

from igb_kernels.bench import step
from igb_kernels.bench.cases import Case, Options
from igb_kernels.bench.measure import Harness
from igb_kernels.bench.models import LONGEST_NAMED, MODELS, SMALL
from igb_kernels.bench.results import Measurement

LONGEST = 1.0
"""Seconds of a CPU that the passes of a step may take."""
ROUNDS = 3
METHOD = "igb_v1+nash_mtl"


@pytest.mark.parametrize("tasks", [3, 8])
@pytest.mark.parametrize("model", [name for name in MODELS if name not in SMALL])
def test_model(measure, device, model: str, tasks: int) -> None:
    on_cpu = device.type == "cpu"
    if on_cpu and tasks > 3:
        pytest.skip("on a CPU with 3 tasks alone: the suites have ten minutes together")

    def run(harness: Harness) -> Measurement | None:
        harness.least_rounds = ROUNDS
        options = Options(device=device)
        return step.measure(MODELS[model], tasks, METHOD, options, LONGEST if on_cpu else LONGEST_NAMED, harness)

    measure(Case(METHOD, run))
