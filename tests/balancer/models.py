"""Small multi-task models whose tasks differ in scale, and what the tests ask of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

TASKS = 3
TASK_SCALES = (1.0, 20.0, 0.05, 3.0, 0.4, 7.0, 1.5, 0.2)
BATCH = 6


class ConvEncoder(nn.Module):
    """BatchNorm and channels_last: gradients of weights come in strides of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, stride=2), nn.Tanh()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.contiguous(memory_format=torch.channels_last)).mean(dim=(2, 3))


class RecurrentEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0][:, -1]


class EmbeddingEncoder(nn.Module):
    """Rows that a batch does not hold have zero gradient; `positions` are added without a matrix product."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 5, sparse=sparse)
        self.positions = nn.Parameter(0.1 * torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.table(x) + self.positions).mean(dim=1)


ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh()),
    "conv": lambda: ConvEncoder().to(memory_format=torch.channels_last),
    "gru": RecurrentEncoder,
    "embedding": EmbeddingEncoder,
}
INPUTS: dict[str, Callable[[], Tensor]] = {
    "mlp": lambda: torch.randn(BATCH, 6),
    "conv": lambda: torch.randn(BATCH, 2, 7, 7),
    "gru": lambda: torch.randn(BATCH, 3, 4),
    "embedding": lambda: torch.randint(0, 11, (BATCH, 4)),
}


class Net(nn.Module):
    """An encoder with a linear head for each task."""

    def __init__(self, kind: str = "mlp", tasks: int = TASKS, encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.kind = kind
        self.encoder = ENCODERS[kind]() if encoder is None else encoder
        self.heads = nn.ModuleList(nn.Linear(5, 2) for _ in range(tasks))

    @property
    def shared(self) -> list[nn.Parameter]:
        return list(self.encoder.parameters())

    @property
    def own(self) -> list[nn.Parameter]:
        return list(self.heads.parameters())

    def batch(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Inputs and targets, in the model's dtype."""
        torch.default_generator.manual_seed(1000 + seed)  # torch.manual_seed would take note of it for GPUs, each time
        x, y = INPUTS[self.kind](), torch.randn(len(self.heads), BATCH, 2)
        dtype = self.heads[0].weight.dtype
        return (x.to(dtype) if x.is_floating_point() else x), y.to(dtype)

    def losses(self, seed: int = 0) -> list[Tensor]:
        """One positive loss for each task, from batch `seed`."""
        x, targets = self.batch(seed)
        z = self.encoder(x)
        return [
            scale * (head(z) - y).square().mean()
            for head, y, scale in zip(self.heads, targets, TASK_SCALES, strict=False)
        ]


def make_net(kind: str = "mlp", dtype: torch.dtype = torch.float32, tasks: int = TASKS, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net(kind, tasks).to(dtype)


def flat(grads: Iterable[Tensor | None], params: Sequence[Tensor]) -> Tensor:
    """Gradients as one float64 vector, zeros where there is none."""
    return torch.cat(
        [
            torch.zeros(p.numel(), dtype=torch.float64) if g is None else g.detach().double().flatten()
            for g, p in zip(grads, params, strict=True)
        ]
    )


def grads_of(params: Sequence[Tensor]) -> Tensor:
    return flat([p.grad for p in params], params)


def same(a: object, b: object) -> bool:
    """Equal to the bit, through nested containers; NaN equals NaN."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return (
            a.dtype is b.dtype
            and a.shape == b.shape
            and torch.equal(a.isnan(), b.isnan())
            and bool(((a == b) | a.isnan()).all())
        )
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


class Snapshot:
    """Parameters, their gradients (objects and values) and a balancer's state at one moment."""

    def __init__(self, params: Iterable[Tensor], balancer: object = None) -> None:
        self._params, self._balancer = list(params), balancer
        self._values = [p.detach().clone() for p in self._params]
        self._grads = [p.grad for p in self._params]
        self._grad_values = [None if g is None else g.clone() for g in self._grads]
        self._state = self._copy_state()

    def _copy_state(self) -> object:
        return None if self._balancer is None else copy.deepcopy(self._balancer.state_dict())

    def check(self) -> None:
        """Fails unless everything is as it was."""
        for i, p in enumerate(self._params):
            assert same(p.detach(), self._values[i]), f"parameter {i} has changed"
            assert p.grad is self._grads[i], f".grad of parameter {i} is another object"
            assert same(p.grad, self._grad_values[i]), f".grad of parameter {i} has changed"
        assert same(self._copy_state(), self._state), "the balancer's state has changed"
