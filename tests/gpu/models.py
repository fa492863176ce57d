"""The small models of the whole-step tests, on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from balancer.models import TASK_SCALES, TASKS, Net
from balancer.oracle import CASES, Case
from torch import Tensor

import igb_kernels as igb

ON_THE_HOST = [name for name, case in CASES.items() if case.update_every > 1]
"""Cases in which the host counts steps."""


class DeviceNet(Net):
    """A `Net` whose batches are on its device."""

    def batch(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        device = self.heads[0].weight.device
        x, y = super().batch(seed)
        return x.to(device), y.to(device)

    def losses_of(self, x: Tensor, y: Tensor) -> list[Tensor]:
        z = self.encoder(x)
        return [
            scale * (head(z) - target).square().mean()
            for head, target, scale in zip(self.heads, y, TASK_SCALES, strict=False)
        ]


def make_net(
    kind: str = "mlp", dtype: torch.dtype = torch.float32, device: str = "cuda", tasks: int = TASKS
) -> DeviceNet:
    torch.manual_seed(0)
    return DeviceNet(kind, tasks).to(device, dtype)


def balancer_of(
    case: Case, net: Net, backend: str, convention: str = "scaled", capture: str = "passes"
) -> igb.Balancer:
    own = {"heads": "weighted", "task_parameters": net.own} if convention == "weighted" else {}
    arguments = case.make()
    if isinstance(rule := arguments.get("losses"), igb.IMTLL):
        arguments["losses"] = igb.IMTLL(len(rule.log_scales), device=net.shared[0].device)
    return igb.Balancer(**arguments, shared=net.shared, backend=backend, capture=capture, **own)


def grads_of(params: Sequence[Tensor]) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in params])


def assert_close(found: Tensor, want: Tensor, tolerance: float) -> None:
    """Up to a fraction of the largest element."""
    assert found.shape == want.shape
    assert torch.equal(found.isfinite(), want.isfinite())
    error = (found - want).nan_to_num().abs().max()
    assert float(error) <= tolerance * float(want.nan_to_num().abs().max()) + 1e-30
