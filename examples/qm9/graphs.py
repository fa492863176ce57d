"""Molecular graphs, built once and kept end to end, so that a batch is a handful of gathers."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from bonds import NODE_FEATURES, bond_classes, node_features
from data import Molecules, standardisation
from numpy.typing import NDArray
from torch import Tensor

CHUNK = 2048  # molecules per vectorised pass: bounds the padded distance matrices to ~20 MB


@dataclass(frozen=True)
class Batch:
    """B molecules as one disconnected graph."""

    numbers: Tensor  # (N,) atomic numbers
    molecule: Tensor  # (N,) owner of each atom, 0..B-1
    edge_index: Tensor  # (2, E) source and destination atoms, sorted by destination
    distances: Tensor  # (E,) Å
    bonds: Tensor  # (E,) bond class, 0 = not bonded; empty unless features were asked for
    features: Tensor  # (N, NODE_FEATURES); likewise
    targets: Tensor  # (B, 11) standardised
    size: int  # B


@dataclass(frozen=True)
class Graphs:
    """All molecules of a run on one device. Edges hold atom numbers within their molecule (at most 29: one byte)."""

    numbers: Tensor
    ptr: Tensor
    edge_ptr: Tensor
    source: Tensor
    destination: Tensor
    distances: Tensor
    bonds: Tensor
    features: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> Graphs:
        return replace(self, **{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def batch(self, molecules: Tensor) -> Batch:
        atoms, molecule, first_atom = _ranges(self.ptr, molecules)
        edges, edge_molecule, _ = _ranges(self.edge_ptr, molecules)
        local = torch.stack([self.source[edges], self.destination[edges]])
        return Batch(
            numbers=self.numbers[atoms],
            molecule=molecule,
            edge_index=local + first_atom[edge_molecule],
            distances=self.distances[edges],
            bonds=self.bonds[edges] if len(self.bonds) else self.bonds,
            features=self.features[atoms] if len(self.features) else self.features,
            targets=self.targets[molecules],
            size=len(molecules),
        )


def _ranges(ptr: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of the chosen molecules' items, their owners 0..B-1, and each owner's first place in the batch."""
    counts = ptr[chosen + 1] - ptr[chosen]
    owner = torch.repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    items = torch.arange(len(owner), device=ptr.device) + (ptr[chosen] - first)[owner]
    return items, owner, first


def build(molecules: Molecules, train: NDArray[np.int64], cutoff: float, bond_features: bool) -> Graphs:
    """All-pairs edges up to `cutoff` Å (inf: complete graphs) and targets standardised on `train`.

    `bond_features` adds the benchmark's node and edge features.
    """
    sources, destinations, distances, bonds, features, edge_counts = [], [], [], [], [], []
    for start in range(0, len(molecules), CHUNK):
        stop = min(start + CHUNK, len(molecules))
        sizes = np.diff(molecules.ptr[start : stop + 1])
        atoms = slice(molecules.ptr[start], molecules.ptr[stop])
        real = np.arange(sizes.max()) < sizes[:, None]  # (m, A): which slots of the padded arrays hold an atom
        positions = np.zeros((*real.shape, 3), dtype=np.float32)
        positions[real] = molecules.positions[atoms]
        distance = np.linalg.norm(positions[:, :, None] - positions[:, None], axis=-1)
        pairs = real[:, :, None] & real[:, None] & ~np.eye(real.shape[1], dtype=bool)
        edges = pairs & (distance <= cutoff)
        owner, destination, source = edges.nonzero()
        edge_counts.append(np.bincount(owner, minlength=len(sizes)))
        sources.append(source.astype(np.uint8))
        destinations.append(destination.astype(np.uint8))
        distances.append(distance[edges])
        if bond_features:
            numbers = np.zeros(real.shape, dtype=np.int64)
            numbers[real] = molecules.numbers[atoms]
            classes = bond_classes(numbers, distance, pairs)
            bonds.append(classes[edges])
            features.append(node_features(numbers, classes)[real])
    mean, std = standardisation(molecules.targets, train)
    return Graphs(
        numbers=torch.from_numpy(molecules.numbers),
        ptr=torch.from_numpy(molecules.ptr),
        edge_ptr=torch.from_numpy(np.concatenate([[0], np.cumsum(np.concatenate(edge_counts))])),
        source=_joined(sources, np.zeros(0, np.uint8)),
        destination=_joined(destinations, np.zeros(0, np.uint8)),
        distances=_joined(distances, np.zeros(0, np.float32)),
        bonds=_joined(bonds, np.zeros(0, np.uint8)),
        features=_joined(features, np.zeros((0, NODE_FEATURES), np.float32)),
        targets=torch.from_numpy(((molecules.targets - mean) / std).astype(np.float32)),
    )


def _joined(parts: list[NDArray[Any]], empty: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts) if parts else empty)
