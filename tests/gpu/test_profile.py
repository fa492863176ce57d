"""Profiles of steps on the GPU: the device's time, without a wait in a measured step."""

from __future__ import annotations

import json

import pytest
import torch

import igb_kernels as igb

from .models import CASES, balancer_of, make_net

CHOSEN = ["nash_mtl", "db_mtl"]


@pytest.fixture
def optimizer_of():
    return lambda net: torch.optim.SGD(net.parameters(), lr=1e-3, foreach=True)


@pytest.mark.parametrize("capture", ["passes", "hooks"])
@pytest.mark.parametrize("name", CHOSEN)
def test_device_times(gpu_backend, optimizer_of, name, capture, tmp_path):
    net = make_net()
    balancer, optimizer = balancer_of(CASES[name], net, gpu_backend, capture=capture), optimizer_of(net)
    with igb.profile(balancer, warmup=1) as found:
        for seed in range(8):
            optimizer.zero_grad()
            balancer.backward(net.losses(seed))
            optimizer.step()
    assert found.steps == 5
    assert all(part.device_ms is not None and part.device_ms >= 0 for part in found.parts())
    assert {"forward", "solver", "combine", "optimizer"} <= {part.name for part in found.parts()}
    assert sum(part.share for part in found.parts()) == pytest.approx(1)
    assert all(c.agree for c in found.compared()), str(found)
    assert found.copy_ms > 0
    assert found.peak_bytes > 0
    found.export_chrome_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1}
    assert "device ms" in str(found)


@pytest.mark.parametrize("name", CHOSEN)
def test_a_measured_step_waits_for_nothing(cuda_backend, optimizer_of, name):
    net = make_net()
    balancer, optimizer = balancer_of(CASES[name], net, cuda_backend), optimizer_of(net)
    batches = [net.batch(seed) for seed in range(8)]
    with igb.profile(balancer, warmup=3, reference=False) as found:
        for i, batch in enumerate(batches):
            torch.cuda.set_sync_debug_mode("error" if i >= 3 else "default")
            try:
                optimizer.zero_grad()
                balancer.backward(net.losses_of(*batch))
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert found.steps == 5


def test_steps_in_a_graph_are_not_recorded(cuda_backend):
    net = make_net()
    balancer, batch = balancer_of(CASES["nash_mtl"], net, cuda_backend), net.batch(0)

    def step() -> None:
        balancer.backward(net.losses_of(*batch))

    side = torch.cuda.Stream()
    with igb.profile(balancer, warmup=1, reference=False) as found, torch.cuda.stream(side):
        for _ in range(3):
            net.zero_grad()
            step()
        taken = len(found._recorded.steps)
        net.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            step()
        graph.replay()
        assert len(found._recorded.steps) == taken
    torch.cuda.synchronize()
    assert all(p.grad is not None for p in net.shared)
