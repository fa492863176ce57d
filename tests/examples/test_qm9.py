"""The QM9 example: its data, graphs and models, on the molecules kept in the repository."""

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "qm9"
sys.path.insert(0, str(EXAMPLE))

import bonds  # noqa: E402
import data  # noqa: E402
import graphs  # noqa: E402
import models  # noqa: E402

METHANE, AMMONIA, WATER, BENZENE = 1, 2, 3, 214


@pytest.fixture(scope="module")
def tiny() -> data.Molecules:
    return data.load("tiny", None, seed=0)


@pytest.fixture(scope="module")
def collated(tiny: data.Molecules) -> graphs.Graphs:
    return graphs.build(tiny, data.split(len(tiny), 0).train, cutoff=5.0, bond_features=True)


def target(molecules: data.Molecules, index: int, name: str) -> float:
    row = int(np.flatnonzero(molecules.index == index)[0])
    return float(molecules.targets[row, data.TARGET_NAMES.index(name)])


# --- data


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0.", [0.0]),
        ("[[6.2*^-5,-1.*^-6,0.],[1,2.5,-.5]]", [6.2e-5, -1e-6, 0.0, 1.0, 2.5, -0.5]),
        ("[2.1997E-6, 1e3]", [2.1997e-6, 1000.0]),
        ("[]", []),
    ],
)
def test_numbers_are_parsed(text: str, numbers: list[float]) -> None:
    assert data.parse_numbers(text) == numbers


def test_bad_text_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must hold only numbers.*'H'"):
        data.parse_numbers("[0.0, H]")
    with pytest.raises(ValueError, match="elements must be among H, C, N, O, F; found 'Xe'"):
        data.parse_elements("['C','Xe']")


def test_elements_are_parsed() -> None:
    assert data.parse_elements("['C','H', 'F']") == [6, 1, 9]


def test_units_of_textbook_molecules(tiny: data.Molecules) -> None:
    assert target(tiny, METHANE, "mu") == 0
    assert target(tiny, WATER, "mu") == pytest.approx(1.85, abs=0.01)
    assert target(tiny, AMMONIA, "mu") == pytest.approx(1.63, abs=0.01)
    assert target(tiny, BENZENE, "alpha") == pytest.approx(57.3, abs=0.1)
    assert target(tiny, BENZENE, "HOMO") == pytest.approx(-6735, abs=1)
    assert target(tiny, METHANE, "ZPVE") == pytest.approx(1218, abs=1)
    assert target(tiny, BENZENE, "Cv") == pytest.approx(17.2, abs=0.1)


def test_atomisation_energies(tiny: data.Molecules) -> None:
    # of methane: 17.1 eV without zero-point energy, from -40.47893 Hartree and the free atoms
    assert target(tiny, METHANE, "U0") == pytest.approx((-40.47893 + 37.846772 + 4 * 0.500273) * 27211.386, rel=1e-6)
    for name in ("U0", "U", "H", "G"):
        assert -18_000 < target(tiny, METHANE, name) < -16_000
        # atomisation energy is roughly that of the bonds: 3 to 5.5 eV an atom
        per_atom = tiny.targets[:, data.TARGET_NAMES.index(name)] / np.diff(tiny.ptr)
        assert (per_atom > -5700).all()
        assert (per_atom < -2500).all()


def test_subset_is_small_and_complete(tiny: data.Molecules) -> None:
    assert data.TINY_FILE.stat().st_size < 200_000
    assert len(tiny) == 400
    assert len(set(tiny.index.tolist())) == 400
    assert tiny.targets.shape == (400, 11)
    assert tiny.positions.shape == (tiny.ptr[-1], 3)
    assert tiny.numbers.shape == (tiny.ptr[-1],)
    assert set(tiny.numbers.tolist()) == {1, 6, 7, 8, 9}


def test_sample_is_random_and_repeatable() -> None:
    first = data.sample_rows(1000, 100, seed=3)
    assert (first == data.sample_rows(1000, 100, seed=3)).all()
    assert len(set(first.tolist())) == 100
    assert first.max() > 800  # rows are sorted by size: the first hundred would be the smallest
    with pytest.raises(ValueError, match="--molecules must be between 10 and the 1000 available; found 1001"):
        data.sample_rows(1000, 1001, seed=0)


@pytest.mark.parametrize("molecules", [10, 400, 130_831])
def test_split_is_a_partition(molecules: int) -> None:
    split = data.split(molecules, seed=0)
    everything = np.concatenate([split.train, split.val, split.test])
    assert (np.sort(everything) == np.arange(molecules)).all()
    assert len(split.val) == len(split.test) == min(molecules // 8, 10_000)


def test_standardised_on_the_training_part(tiny: data.Molecules, collated: graphs.Graphs) -> None:
    train_part = torch.from_numpy(data.split(len(tiny), 0).train)
    standardised = collated.targets[train_part]
    assert torch.allclose(standardised.mean(0), torch.zeros(11), atol=1e-4)
    assert torch.allclose(standardised.std(0, correction=0), torch.ones(11), atol=1e-4)


@pytest.mark.skipif(find_spec("qm9pack") is None, reason="needs the PyPI package qm9pack")
def test_whole_package() -> None:
    molecules = data.load("qm9pack", 50, seed=0)
    assert len(molecules) == 50
    assert target(data.load("qm9pack", None, seed=0), WATER, "mu") == pytest.approx(1.85, abs=0.01)


# --- graphs and models


def test_batch_holds_its_molecules(tiny: data.Molecules, collated: graphs.Graphs) -> None:
    chosen = [7, 3, 399, 3]
    batch = collated.batch(torch.tensor(chosen))
    assert batch.size == 4
    assert torch.equal(batch.targets, collated.targets[chosen])
    atoms = np.concatenate([np.arange(tiny.ptr[m], tiny.ptr[m + 1]) for m in chosen])
    assert torch.equal(batch.numbers, torch.from_numpy(tiny.numbers[atoms]))
    positions = torch.from_numpy(tiny.positions[atoms])
    source, destination = batch.edge_index
    assert torch.equal(batch.molecule[source], batch.molecule[destination])
    assert torch.allclose((positions[source] - positions[destination]).norm(dim=1), batch.distances, atol=1e-5)
    near = torch.cdist(positions, positions) <= 5.0
    same = batch.molecule[:, None] == batch.molecule
    assert len(source) == int((near & same).sum()) - len(positions)
    assert (destination.diff() >= 0).all()


def test_bonds_and_atom_features(tiny: data.Molecules, collated: graphs.Graphs) -> None:
    def molecule(index: int) -> graphs.Batch:
        return collated.batch(torch.from_numpy(np.flatnonzero(tiny.index == index)))

    benzene, water = molecule(BENZENE), molecule(WATER)
    classes = torch.bincount(benzene.bonds.long(), minlength=5)
    assert classes[bonds.AROMATIC] == 12  # six, in both directions
    assert classes[bonds.SINGLE] == 12
    # element (H C N O F), number, aromatic, sp, sp2, sp3, hydrogens
    assert benzene.features[0].tolist() == [0, 1, 0, 0, 0, 6, 1, 0, 1, 0, 1]
    assert water.features[0].tolist() == [0, 0, 0, 1, 0, 8, 0, 0, 0, 1, 2]
    assert water.features[1].tolist() == [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("encoder", ["schnet", "nnconv"])
def test_each_loss_reaches_the_encoder_and_its_own_head(encoder: str, collated: graphs.Graphs) -> None:
    torch.manual_seed(0)
    model = models.build_model(encoder, data.TARGET_NAMES)
    losses = model.losses(collated.batch(torch.arange(6)))
    assert tuple(losses) == data.TARGET_NAMES
    assert all(loss.shape == () for loss in losses.values())
    torch.autograd.backward(losses["R2"])
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())
    reached = {task for task, head in model.heads.items() if any(p.grad is not None for p in head.parameters())}
    assert reached == {"R2"}


def test_prediction_does_not_depend_on_the_batch(collated: graphs.Graphs) -> None:
    torch.manual_seed(0)
    model = models.build_model("schnet", data.TARGET_NAMES)
    together = torch.stack(model(collated.batch(torch.arange(8))), dim=1)
    alone = torch.stack(model(collated.batch(torch.tensor([5]))), dim=1)
    assert torch.allclose(together[5], alone[0], atol=1e-5)
