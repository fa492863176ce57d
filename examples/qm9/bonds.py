"""Bond and atom features of the QM9 benchmark, perceived from geometry (the benchmark takes them from RDKit)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Covalent radii in Å for single, double and triple bonds (Pyykkö and Atsumi 2009); H and F only bond singly.
RADII = {
    1: (0.32, 0.32, 0.32),
    6: (0.75, 0.67, 0.60),
    7: (0.71, 0.60, 0.54),
    8: (0.63, 0.57, 0.53),
    9: (0.64, 0.64, 0.64),
}
BONDED = 1.25  # pairs closer than this many single-bond lengths are bonded
NONE, SINGLE, DOUBLE, TRIPLE, AROMATIC = range(5)
BOND_CLASSES = 4
NODE_FEATURES = 11


def bond_classes(
    numbers: NDArray[np.int64], distance: NDArray[np.float32], pairs: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    """Class of each pair (m, A, A): the bond type whose usual length is nearest; aromatic is between single and double.

    numbers (m, A) is padded with 0; pairs (m, A, A) says which pairs exist.
    """
    table = np.zeros((max(RADII) + 1, 3), dtype=np.float32)
    for z, radii in RADII.items():
        table[z] = radii
    radius = table[numbers]
    single, double, triple = (radius[:, :, None, k] + radius[:, None, :, k] for k in range(3))
    lengths = np.stack([single, double, triple, (single + double) / 2])
    # argmin takes the first of equals, so bonds of H and F come out single
    nearest = np.abs(lengths - distance).argmin(axis=0) + SINGLE
    return np.where(pairs & (distance < BONDED * single), nearest, NONE).astype(np.uint8)


def node_features(numbers: NDArray[np.int64], classes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(m, A, 11): element one-hot (H C N O F), atomic number, aromatic, sp, sp2, sp3, bonded hydrogens."""
    bonded = classes != NONE
    neighbours = bonded.sum(axis=-1)
    hydrogens = (bonded & (numbers == 1)[:, None, :]).sum(axis=-1)
    aromatic = (classes == AROMATIC).sum(axis=-1) >= 2
    # Hybridisation from the number of neighbours: 4 around C, 3 around N and 2 around O are sp3, one less is sp2, ...
    full = np.select([numbers == 6, numbers == 7, numbers == 8, numbers == 9], [4, 3, 2, 1], default=0)
    missing = np.where(full > 0, np.clip(full - neighbours, 0, 2), -1)
    columns = [numbers == z for z in RADII]
    columns += [numbers, aromatic, missing == 2, missing == 1, missing == 0, hydrogens]
    return np.stack(columns, axis=-1).astype(np.float32)
