"""QM9 from the PyPI package qm9pack: molecules with geometry and the 11 targets of the IGB benchmark."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd  # type: ignore[import-untyped]
from numpy.typing import NDArray

HARTREE_IN_MEV = 27211.386245988
ELEMENTS = {"H": 1, "C": 6, "N": 7, "O": 8, "F": 9}
TINY_FILE = Path(__file__).parent / "tiny" / "qm9_tiny.csv.gz"


@dataclass(frozen=True)
class Target:
    """One regression target: where it is read and how it becomes what we report."""

    name: str
    column: str
    unit: str
    factor: float = 1.0
    # Energies of the free atoms H, C, N, O, F in Hartree (B3LYP/6-31G(2df,p), QM9's own "atomref" table):
    # total energies are dominated by composition, so QM9 work reports what is left after subtracting them.
    atom_energies: tuple[float, float, float, float, float] | None = None


TARGETS = (
    Target("mu", "Dipole_debye", "D"),
    Target("alpha", "Polarizability_bohr3", "a0³"),
    Target("HOMO", "HOMO_au", "meV", HARTREE_IN_MEV),
    Target("LUMO", "LUMO_au", "meV", HARTREE_IN_MEV),
    Target("R2", "R2_bohr2", "a0²"),
    Target("ZPVE", "ZPVE_au", "meV", HARTREE_IN_MEV),
    Target("U0", "InternalEnergy_0K_au", "meV", HARTREE_IN_MEV,
           (-0.500273, -37.846772, -54.583861, -75.064579, -99.718730)),
    Target("U", "InternalEnergy_298K_au", "meV", HARTREE_IN_MEV,
           (-0.498857, -37.845355, -54.582445, -75.063163, -99.717314)),
    Target("H", "Enthalphy_298K_au", "meV", HARTREE_IN_MEV,
           (-0.497912, -37.844411, -54.581501, -75.062219, -99.716370)),
    Target("G", "GibbsFreeEnergy_298K_au", "meV", HARTREE_IN_MEV,
           (-0.510927, -37.861317, -54.598897, -75.079532, -99.733544)),
    Target("Cv", "Heatcapacity_Cv_cal_mol_K", "cal/mol/K"),
)  # fmt: skip
TARGET_NAMES = tuple(target.name for target in TARGETS)
COLUMNS = ("Index", "Elements", "XYZ_Ang", *(target.column for target in TARGETS))


@dataclass(frozen=True)
class Molecules:
    """Molecules end to end: molecule m owns atoms ptr[m] to ptr[m + 1]."""

    index: NDArray[np.int64]  # number in the original QM9, from 1
    numbers: NDArray[np.int64]  # atomic numbers
    positions: NDArray[np.float32]  # Å, shape (atoms, 3)
    ptr: NDArray[np.int64]
    targets: NDArray[np.float64]  # shape (molecules, 11), in the units of TARGETS

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True)
class Split:
    train: NDArray[np.int64]
    val: NDArray[np.int64]
    test: NDArray[np.int64]


def parse_numbers(text: str) -> list[float]:
    """The numbers of a nested list in text, in order; knows `0.`, `2.1E-6` and Mathematica's `6.2*^-5`."""
    flat = text.replace("*^", "e").replace("[", " ").replace("]", " ").replace(",", " ")
    try:
        return [float(token) for token in flat.split()]
    except ValueError as error:
        raise ValueError(f"geometry text must hold only numbers, commas and brackets; {error}: {text[:80]!r}") from None


def parse_elements(text: str) -> list[int]:
    """Atomic numbers from text such as `['C','H','H']`."""
    symbols = text.strip().strip("[]").replace("'", "").replace('"', "").replace(" ", "").split(",")
    unknown = sorted(set(symbols) - ELEMENTS.keys())
    if unknown:
        raise ValueError(f"elements must be among {', '.join(ELEMENTS)}; found {', '.join(map(repr, unknown))}")
    return [ELEMENTS[symbol] for symbol in symbols]


def qm9pack_files() -> list[Path]:
    """The CSV parts of the installed package, found without importing it (its import needs pkg_resources)."""
    spec = importlib.util.find_spec("qm9pack")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("--data qm9pack needs the package qm9pack: pip install qm9pack (or use --data tiny)")
    folder = Path(next(iter(spec.submodule_search_locations))) / "data"
    files = sorted(folder.glob("qm9_part*.csv"))
    if not files:
        raise FileNotFoundError(f"qm9pack is installed but {folder} holds no qm9_part*.csv")
    return files


def read_tables(files: Iterable[Path]) -> pd.DataFrame:
    """The needed columns of all files as one table, geometries still in text."""
    parts = []
    for file in files:
        missing = set(COLUMNS) - set(pd.read_csv(file, nrows=0).columns)
        if missing:
            raise ValueError(
                f"{file} must have the columns {', '.join(COLUMNS)}; missing: {', '.join(sorted(missing))}"
            )
        parts.append(pd.read_csv(file, usecols=list(COLUMNS)))
    return pd.concat(parts, ignore_index=True)


def sample_rows(rows: int, molecules: int | None, seed: int) -> NDArray[np.int64]:
    """Row numbers in random order: the files are sorted by molecule size. None takes every row."""
    if molecules is not None and not 10 <= molecules <= rows:
        raise ValueError(f"--molecules must be between 10 and the {rows} available; found {molecules}")
    return np.random.default_rng(seed).permutation(rows)[:molecules]


def to_molecules(table: pd.DataFrame) -> Molecules:
    """Parses geometries and converts targets to the units of TARGETS."""
    numbers = [parse_elements(text) for text in table["Elements"]]
    geometries = [parse_numbers(text) for text in table["XYZ_Ang"]]
    for index, atoms, coordinates in zip(table["Index"], numbers, geometries, strict=True):
        if len(coordinates) != 3 * len(atoms):
            raise ValueError(
                f"molecule {index} must have 3 coordinates for each of its {len(atoms)} atoms; found {len(coordinates)}"
            )
    sizes = np.array([len(atoms) for atoms in numbers], dtype=np.int64)
    ptr = np.concatenate([[0], np.cumsum(sizes)])
    flat_numbers = np.concatenate([np.array(atoms, dtype=np.int64) for atoms in numbers])
    positions = np.concatenate([np.array(xyz, dtype=np.float32) for xyz in geometries]).reshape(-1, 3)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    counts = np.stack([np.bincount(owner[flat_numbers == z], minlength=len(sizes)) for z in ELEMENTS.values()], axis=1)
    targets = np.stack([_target_values(target, table, counts) for target in TARGETS], axis=1)
    if not np.isfinite(targets).all():
        row, column = np.argwhere(~np.isfinite(targets))[0]
        raise ValueError(f"targets must be finite; molecule {table['Index'].iloc[row]} has {TARGETS[column].name} "
                         f"= {targets[row, column]}")  # fmt: skip
    return Molecules(table["Index"].to_numpy(np.int64), flat_numbers, positions, ptr, targets)


def _target_values(target: Target, table: pd.DataFrame, counts: NDArray[np.int64]) -> NDArray[np.float64]:
    column = table[target.column]
    if not pd.api.types.is_numeric_dtype(column):
        column = column.str.replace("*^", "e", regex=False)
    values: NDArray[np.float64] = column.to_numpy(np.float64)
    if target.atom_energies is not None:
        values = values - counts @ np.array(target.atom_energies)
    return values * target.factor


def load(source: str, molecules: int | None, seed: int) -> Molecules:
    """A random sample of `molecules` molecules (None: all) from "qm9pack" or the repository's "tiny" subset."""
    table = read_tables([TINY_FILE] if source == "tiny" else qm9pack_files())
    return to_molecules(table.iloc[sample_rows(len(table), molecules, seed)])


def split(molecules: int, seed: int) -> Split:
    """Disjoint parts: an eighth each for validation and test, 10,000 at most as in the benchmark; the rest trains."""
    held_out = min(molecules // 8, 10_000)
    order = np.random.default_rng([seed, 1]).permutation(molecules)
    return Split(train=order[2 * held_out :], val=order[:held_out], test=order[held_out : 2 * held_out])


def standardisation(
    targets: NDArray[np.float64], train: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation of the training part; the other parts must not leak into them."""
    return targets[train].mean(axis=0), targets[train].std(axis=0)
