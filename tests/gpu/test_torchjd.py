"""TorchJD's functions with our aggregators on a GPU: the updates of the CPU, and nothing that waits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from .conftest import require
from .models import DeviceNet, assert_close, grads_of, make_net

ours = pytest.importorskip("igb_kernels.integrations.torchjd", reason="needs torchjd")
TASKS = 3

AGGREGATORS: dict[str, Callable[[], nn.Module]] = {
    "UPGrad": lambda: ours.UPGrad(),
    "DualProj": lambda: ours.DualProj(torch.tensor([0.5, 0.2, 0.3], device="cuda")),
    "AlignedMTL": lambda: ours.AlignedMTL(),
    "CAGrad": lambda: ours.CAGrad(0.4),
    "ConFIG": lambda: ours.ConFIG(),
    "FairGrad": lambda: ours.FairGrad(2.0),
    "GradVac": lambda: ours.GradVac(),
    "IMTLG": lambda: ours.IMTLG(),
    "MGDA": lambda: ours.MGDA(),
    "NashMTL": lambda: ours.NashMTL(TASKS),
    "PCGrad": lambda: ours.PCGrad(),
    "GradDrop": lambda: ours.GradDrop(),
    "ExcessMTL": lambda: ours.ExcessMTL(),
    "DBMTL": lambda: ours.DBMTL(),
    "Mean": lambda: ours.Mean(),
}


def step(net: DeviceNet, aggregator: nn.Module, seed: int, chunk_size: int | None) -> Tensor:
    """The gradients of a step."""
    x, y = net.batch(seed)
    features = net.encoder(x)
    losses = [(head(features) - target).square().mean() for head, target in zip(net.heads, y, strict=False)]
    net.zero_grad()
    ours.mtl_backward(losses, features, parallel_chunk_size=chunk_size)
    ours.jac_to_grad(net.shared, aggregator)
    return grads_of([*net.shared, *net.own])


@pytest.mark.parametrize("chunk_size", [None, 1])
@pytest.mark.parametrize("name", AGGREGATORS)
def test_updates_are_those_of_the_cpu(name, chunk_size):
    found = []
    for device in ("cuda", "cpu"):
        net, aggregator = make_net(dtype=torch.float64, device=device), AGGREGATORS[name]()
        if name == "DualProj":
            aggregator.pref_vector = aggregator.pref_vector.to(device)
        torch.manual_seed(0)
        found.append(torch.cat([step(net, aggregator, seed, chunk_size) for seed in range(3)]).cpu())
    assert_close(found[0], found[1], 1e-8)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_no_step_waits(name):
    require("cuda")
    net, aggregator = make_net(), AGGREGATORS[name]()
    for seed in range(3):
        x, y = net.batch(seed)
        for _ in range(2):
            features = net.encoder(x)
            losses = [(head(features) - target).square().mean() for head, target in zip(net.heads, y, strict=False)]
            torch.cuda.set_sync_debug_mode("error" if seed else "default")
            try:
                ours.mtl_backward(losses, features, parallel_chunk_size=1)
                ours.jac_to_grad(net.shared, aggregator)
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_the_projector():
    rows = torch.randn(TASKS, 8, dtype=torch.float64).cuda()
    gram = rows @ rows.T
    found = ours.ConeProjector()(torch.eye(TASKS, dtype=torch.float64).cuda(), gram)
    assert found.is_cuda
    assert_close(found.cpu(), ours.ConeProjector()(torch.eye(TASKS, dtype=torch.float64), gram.cpu()), 1e-9)
