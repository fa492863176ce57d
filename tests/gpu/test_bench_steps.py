"""Models and whole steps of the benchmarks on the GPU."""

from __future__ import annotations

import pytest
import torch
from bench.tiny import SIZES, tiny

from igb_kernels.bench import step
from igb_kernels.bench.cases import Options
from igb_kernels.bench.measure import Harness
from igb_kernels.bench.models import MODELS, Model

GPU = torch.device("cuda")


@pytest.mark.parametrize("name", MODELS)
def test_models_move(name):
    if reason := MODELS[name].missing():
        pytest.skip(reason)
    on_cpu = tiny(name, 2).losses()
    losses = tiny(name, 2).to(GPU).losses()
    assert all(loss.is_cuda for loss in losses)
    torch.testing.assert_close([loss.cpu() for loss in losses], on_cpu, rtol=2e-3, atol=2e-3)  # TF32 in convolutions


@pytest.mark.parametrize("name", ["resnet-50", "bert-base", "ple-sparse", "qm9-schnet"])
def test_models_are_made_there(name):
    if reason := MODELS[name].missing():
        pytest.skip(reason)
    task = MODELS[name].build(2, GPU, **{"batch": 4, **SIZES[name]})
    assert all(p.is_cuda for p in task.parameters)
    assert all(loss.is_cuda and loss.isfinite() for loss in task.losses())


@pytest.mark.parametrize("method", ["igb_v1+nash_mtl", "db_mtl"])
def test_a_step(gpu_backend, method):
    net = Model("tiny", "", MODELS["mlp-33k"].make, {}, {"batch": 8}, {"widths": (64, 256, 128)})
    harness = Harness(GPU, seconds=1e-3, least_rounds=2, most_rounds=2)
    found = step.measure(net, 3, method, Options(device=GPU, backend=gpu_backend, memory=True), 60.0, harness)
    assert found.backend == gpu_backend
    assert found.error < 1e-4
    assert found.timing.host_ms > 0
    assert found.extra_bytes > 0
    assert {"passes", "passes + copy", "eager", "reference"} <= set(found.rivals)
    assert all(rival.speed_up > 0 for rival in found.rivals.values())
