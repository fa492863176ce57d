"""Steps on a GPU are recorded without waiting for it."""

from __future__ import annotations

import pytest
import torch
from balancer.oracle import CASES

import igb_kernels as igb
from igb_kernels.monitor import Block
from igb_kernels.result import BalanceResult

from .models import DeviceNet, balancer_of, make_net

SECOND = 2_000_000_000  # cycles, about


class Kept:
    """A writer that keeps the blocks."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []

    def write(self, block: Block) -> None:
        self.blocks.append(block)

    def close(self) -> None: ...


def result_of(value: float, tasks: int = 3) -> BalanceResult:
    """Numbers that all say which step they are of."""
    numbers = torch.full((tasks,), value, device="cuda")
    status = torch.zeros((), dtype=torch.int32, device="cuda")
    return BalanceResult(
        None, numbers, numbers, numbers.double(), status, torch.full((tasks, tasks), value).cuda().double()
    )


def losses_seen(blocks: list[Block]) -> list[float]:
    return [loss for block in blocks for loss in block.losses[:, 1].tolist()]


def take(balancer: igb.Balancer, net: DeviceNet, seed: int) -> BalanceResult:
    net.zero_grad()
    return balancer.backward(net.losses(seed))


@pytest.mark.parametrize("name", ["nash_mtl", "db_mtl", "igb_v1+imtl_g"])
def test_training_waits_for_nothing(cuda_backend, name):
    """Steps, recording them, and sending and writing blocks: nothing asks the GPU."""
    net = make_net()
    balancer, monitor = balancer_of(CASES[name], net, cuda_backend), igb.Monitor(kept := Kept(), every=4)
    losses, results = [], []
    for seed in range(3):
        monitor.record(take(balancer, net, seed))
    torch.cuda.synchronize()
    for seed in range(3, 20):
        net.zero_grad()
        losses = net.losses(seed)
        torch.cuda.set_sync_debug_mode("error")
        try:
            results.append(monitor.record(balancer.backward(losses)))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    monitor.close()
    found = Block.cat(kept.blocks)
    assert found.steps.tolist() == list(range(20))
    for i, result in enumerate(results, 3):
        assert torch.equal(found.losses[i], result.losses.double().cpu())
        assert torch.equal(found.weights[i], result.weights.cpu())
        assert result.norms is None or torch.equal(found.norms[i], result.norms.cpu())


def test_a_block_is_written_when_it_has_arrived():
    monitor = igb.Monitor(kept := Kept(), every=3, warn=None)
    results = [result_of(float(i)) for i in range(8)]
    monitor.record(results[0])
    torch.cuda.synchronize()
    torch.cuda._sleep(SECOND)  # the GPU is behind
    for result in results[1:5]:
        monitor.record(result)
    assert not kept.blocks, "recording waited for the GPU"
    torch.cuda.synchronize()
    monitor.record(results[5])
    assert losses_seen(kept.blocks)[:3] == [0, 1, 2]
    torch.cuda._sleep(SECOND)
    monitor.record(results[6])
    monitor.flush()
    assert losses_seen(kept.blocks) == list(range(7))
    assert monitor.history()["weight/2"].tolist() == list(range(7))


def test_steps_that_follow_do_not_reach_a_block_on_its_way():
    """The buffer is written to again at once; results may be gone by then."""
    monitor = igb.Monitor(kept := Kept(), every=5, warn=None)
    monitor.record(result_of(0.0))
    torch.cuda._sleep(SECOND)
    for i in range(1, 23):
        monitor.record(result_of(float(i)))
    monitor.close()
    assert losses_seen(kept.blocks) == list(range(23))
    assert all(torch.equal(b.measured[:, 0, 1], b.losses[:, 0]) for b in kept.blocks)


def test_on_another_stream():
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), igb.Monitor(kept := Kept(), every=2, warn=None) as monitor:
        torch.cuda._sleep(SECOND // 10)
        for i in range(7):
            monitor.record(result_of(float(i)))
    assert losses_seen(kept.blocks) == list(range(7))


def test_replays_of_a_cuda_graph(cuda_backend):
    net = make_net()
    balancer, monitor = balancer_of(CASES["nash_mtl"], net, cuda_backend), igb.Monitor(every=2, warn=None)
    x, y = net.batch(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            net.zero_grad()
            balancer.backward(net.losses_of(x, y))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    net.zero_grad()
    with torch.cuda.graph(graph):
        result = balancer.backward(net.losses_of(x, y))
    want = []
    for seed in range(5):
        for static, fresh in zip((x, y), net.batch(seed), strict=True):
            static.copy_(fresh)
        graph.replay()
        monitor.record(result)
        want.append(result.losses.tolist())
    history = monitor.history()
    assert [[history[f"loss/{k}"][i] for k in range(len(want[0]))] for i in range(5)] == want
    assert len({tuple(row) for row in want}) == 5


def test_recording_cannot_be_captured():
    monitor, result = igb.Monitor(), result_of(1.0)
    monitor.record(result)
    with (
        pytest.raises(RuntimeError, match="record cannot be captured in a CUDA graph: record the result after each"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        monitor.record(result)
    assert monitor.history()["step"].tolist() == [0]
