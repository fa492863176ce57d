"""A shared encoder and one head per target."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from bonds import BOND_CLASSES, NODE_FEATURES
from graphs import Batch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing, NNConv, Set2Set  # type: ignore[import-untyped]
from torch_geometric.nn.models.schnet import GaussianSmearing  # type: ignore[import-untyped]

MEAN_ATOMS = 18.0  # of QM9: keeps the summed atoms at the scale of the averaged ones
HEAVIEST = 9  # fluorine


class ContinuousFilter(MessagePassing):  # type: ignore[misc]  # untyped
    """SchNet's continuous-filter convolution, lighter on edges and gated by the receiving atom.

    The filter is linear in the radial basis: SchNet's MLP there has activations on every edge, which would be most of
    a backward pass, K times a step. The gate sees both ends of an edge and costs next to nothing: it is on atoms.
    """

    def __init__(self, width: int, gaussians: int) -> None:
        super().__init__(aggr="add")
        self.filter = nn.Linear(gaussians, width, bias=False)
        self.inward = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)  # without it, training with balanced gradients diverges at lower learning rates
        self.outward = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor, edge_index: Tensor, radial: Tensor) -> Tensor:
        messages = self.propagate(edge_index, x=self.inward(x), weight=self.filter(radial))
        update: Tensor = self.outward(self.norm(messages) * x)
        return update

    def message(self, x_j: Tensor, weight: Tensor) -> Tensor:
        return x_j * weight


class SchNetEncoder(nn.Module):
    """Embedding, residual continuous-filter blocks, and a sum and a mean over atoms (extensive, intensive targets)."""

    needs_bonds = False

    def __init__(self, width: int = 64, blocks: int = 3, gaussians: int = 24, cutoff: float = 5.0) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.out_features = 2 * width
        self.embedding = nn.Embedding(HEAVIEST + 1, width)
        self.smearing = GaussianSmearing(0.0, cutoff, gaussians)
        self.blocks = nn.ModuleList(ContinuousFilter(width, gaussians) for _ in range(blocks))
        self.readout = nn.Sequential(nn.Linear(2 * width, self.out_features), nn.SiLU())

    def forward(self, batch: Batch) -> Tensor:
        fade = 0.5 * (torch.cos(batch.distances * (math.pi / self.cutoff)) + 1)  # smooth to 0 at the cutoff
        radial = self.smearing(batch.distances) * fade[:, None]
        x = self.embedding(batch.numbers)
        for block in self.blocks:
            x = x + block(x, batch.edge_index, radial)
        total = x.new_zeros(batch.size, x.shape[1]).index_add(0, batch.molecule, x)
        atoms = torch.bincount(batch.molecule, minlength=batch.size)[:, None]
        representation: Tensor = self.readout(torch.cat([total / MEAN_ATOMS, total / atoms], dim=1))
        return representation


class NNConvEncoder(nn.Module):
    """The benchmark's network: edge-conditioned convolution and GRU, three steps, then Set2Set, on complete graphs."""

    needs_bonds = True
    cutoff = math.inf

    def __init__(self, dim: int = 64, steps: int = 3) -> None:
        super().__init__()
        self.steps = steps
        self.out_features = dim
        self.inward = nn.Linear(NODE_FEATURES, dim)
        edge_network = nn.Sequential(nn.Linear(BOND_CLASSES + 1, 128), nn.ReLU(), nn.Linear(128, dim * dim))
        self.conv = NNConv(dim, dim, edge_network, aggr="mean")
        self.gru = nn.GRU(dim, dim)
        self.set2set = Set2Set(dim, processing_steps=3)
        self.readout = nn.Linear(2 * dim, dim)

    def forward(self, batch: Batch) -> Tensor:
        bond = F.one_hot(batch.bonds.long(), BOND_CLASSES + 1)[:, 1:]
        edge_attr = torch.cat([bond.to(batch.distances.dtype), batch.distances[:, None]], dim=1)
        x = F.relu(self.inward(batch.features))
        hidden = x[None]
        for _ in range(self.steps):
            message = F.relu(self.conv(x, batch.edge_index, edge_attr))
            x, hidden = self.gru(message[None], hidden)
            x = x[0]
        return F.relu(self.readout(self.set2set(x, batch.molecule, dim_size=batch.size)))


class MultiTaskModel(nn.Module):
    """One encoder, one head per task; a task's loss depends on the encoder and its own head only."""

    def __init__(self, encoder: SchNetEncoder | NNConvEncoder, tasks: Sequence[str], head_width: int | None) -> None:
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict({task: _head(encoder.out_features, head_width) for task in tasks})

    def forward(self, batch: Batch) -> list[Tensor]:
        representation = self.encoder(batch)
        return [head(representation)[:, 0] for head in self.heads.values()]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Mean squared error on standardised targets, as in the benchmark: a scalar per task."""
        targets = batch.targets.unbind(dim=1)
        predictions = self(batch)
        return {
            task: F.mse_loss(prediction, target)
            for task, prediction, target in zip(self.heads, predictions, targets, strict=True)
        }


def _head(features: int, width: int | None) -> nn.Module:
    if width is None:
        return nn.Linear(features, 1)
    return nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, 1))


def build_model(encoder: str, tasks: Sequence[str]) -> MultiTaskModel:
    if encoder == "nnconv":
        return MultiTaskModel(NNConvEncoder(), tasks, head_width=None)
    return MultiTaskModel(SchNetEncoder(), tasks, head_width=64)
