"""The training scripts of nash-mtl, FAMO and IGB4MTL as they are, with our methods imported in the place of theirs.

They run where IGB_PEERS names a folder with checkouts (AvivNavon+nash-mtl, ...): these repositories are no packages.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.peers import checkout, importing_from
from igb_kernels.integrations import famo, igb4mtl, nash_mtl

from .protocol import in_float64

pytestmark = pytest.mark.skipif("IGB_PEERS" not in os.environ, reason="IGB_PEERS names no folder with checkouts")

WEIGHTS = {
    "AvivNavon/nash-mtl": {"methods.weight_methods": nash_mtl},
    "Cranial-XIX/FAMO": {"methods.weight_methods": famo},
}
WEIGHTS["YanqiDai/IGB4MTL"] = {"methods.loss_weight_methods": igb4mtl, "methods.gradient_weight_methods": igb4mtl}
NOT_NEEDED = dict.fromkeys(("cvxpy", "ecos", "scipy.optimize"))
"""What the originals import and ours do without."""


def require(repository: str, *packages: str) -> Path:
    folder = checkout(repository)
    if folder is None:
        pytest.skip(f"IGB_PEERS does not name a folder with a checkout of {repository}")
    for package in packages:
        pytest.importorskip(package)
    return folder


@contextmanager
def trainer(repository: str, experiment: str, whose: str, arguments: list[str], **attributes: Any) -> Iterator[Any]:
    """The module `experiments.<experiment>.trainer` with "our" or "their" methods, and its global `args`."""
    substitutes: dict[str, ModuleType | None] = {**WEIGHTS[repository], **NOT_NEEDED} if whose == "our" else {}
    if importlib.util.find_spec("seaborn") is None:  # two lines of the toy's plots
        substitutes["seaborn"] = ModuleType("seaborn")
    if importlib.util.find_spec("wandb") is None:
        substitutes["wandb"] = ModuleType("wandb")
    with importing_from(require(repository), substitutes):
        found = importlib.import_module(f"experiments.{experiment}.trainer")
        utils = importlib.import_module("experiments.utils")
        found.args = utils.common_parser.parse_args(arguments)
        utils.set_seed(found.args.seed)
        for name, value in attributes.items():
            setattr(found, name, value)
        yield found


def run_both(run: Any) -> tuple[Any, Any]:
    """What `run` returns with ours and theirs."""
    pytest.importorskip("cvxpy")
    return run("our"), run("their")


# ---- The toy problem: two parameters, no heads --------------------------------------------------------------------


def toy(repository: str, whose: str, method: str) -> dict[int, Tensor]:
    """The last points of trajectories from five starts."""
    require(repository, "matplotlib", "tqdm")
    arguments = ["--method", method, "--gamma", "0.01"] if "FAMO" in repository else ["--method", method]
    with trainer(repository, "toy", whose, arguments) as toy:
        found = toy.main(method_type=method, device=torch.device("cpu"), n_iter=40, scale=0.1)
    trajectories = found[0] if isinstance(found, tuple) else found
    return {start: torch.from_numpy(each["traj"][-1]) for start, each in trajectories.items()}


TOYS = [("AvivNavon/nash-mtl", method) for method in ("ls", "imtl", "mgda", "pcgrad", "cagrad")]
TOYS += [("Cranial-XIX/FAMO", method) for method in ("famo", "uw", "cagrad")]


ORIGIN = 1


@pytest.mark.parametrize(("repository", "method"), TOYS)
def test_toy(repository, method):
    ours, theirs = run_both(lambda whose: toy(repository, whose, method))
    for start, point in theirs.items():
        # At the origin, tasks pull one coordinate to opposite sides, and Adam makes steps of what rounding leaves.
        torch.testing.assert_close(ours[start], point, rtol=0, atol=5e-3 if start == ORIGIN else 1e-6)


@pytest.mark.parametrize(
    ("repository", "method"),
    [("AvivNavon/nash-mtl", "nashmtl"), ("Cranial-XIX/FAMO", "nashmtl"), ("Cranial-XIX/FAMO", "graddrop")],
)
def test_toy_runs(repository, method):
    """Where the originals cannot be followed: ECOS fails at some steps, and GradDrop draws other numbers."""
    points = toy(repository, "our", method)
    assert len(points) == 5
    assert all(point.isfinite().all() for point in points.values())


# ---- QM9 ----------------------------------------------------------------------------------------------------------

GRAPHS = 36


class TinyQM9:
    """As many of torch_geometric's QM9 as a test needs, of random molecules: the trainers take the first 10,000 for
    tests, the next for validation, and the rest for training; here it is 12 each."""

    def __init__(self, path: str, transform: Any) -> None:
        self.transform, self.chosen = transform, range(GRAPHS)
        generator = torch.Generator().manual_seed(0)
        self.data = types.SimpleNamespace(y=torch.randn(GRAPHS, 19, generator=generator))
        self.atoms = torch.randint(2, 5, (GRAPHS,), generator=generator).tolist()

    def shuffle(self) -> TinyQM9:
        return self

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: Any) -> Any:
        from torch_geometric.data import Data

        if isinstance(index, slice):
            part = object.__new__(type(self))
            part.__dict__.update(self.__dict__)
            part.chosen = self.chosen[
                slice(*(None if end is None else 12 * end // 10_000 for end in (index.start, index.stop)))
            ]
            return part
        graph = self.chosen[index]
        generator, atoms = torch.Generator().manual_seed(graph), self.atoms[graph]
        edges = torch.stack([torch.arange(atoms - 1), torch.arange(1, atoms)])
        data = Data(
            x=torch.randn(atoms, 11, generator=generator),
            pos=torch.randn(atoms, 3, generator=generator),
            edge_index=torch.cat([edges, edges.flip(0)], dim=1),
            edge_attr=torch.randn(2 * (atoms - 1), 4, generator=generator),
            y=self.data.y[graph : graph + 1],
        )
        return self.transform(data)


class Recorder:
    """In the place of a trainer's class of models: keeps those that it makes."""

    def __init__(self, cls: type[nn.Module]) -> None:
        self.cls, self.made = cls, []

    def __call__(self, *arguments: Any, **options: Any) -> nn.Module:
        self.made.append(self.cls(*arguments, **options))
        return self.made[-1]


def parameters_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture
def tiny_qm9(monkeypatch, tmp_path):
    """In a folder of its own, where the trainers put logs."""
    datasets = pytest.importorskip("torch_geometric.datasets")
    monkeypatch.setattr(datasets, "QM9", TinyQM9)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "save").mkdir()


def qm9(repository: str, whose: str, arguments: list[str], epochs: int = 2) -> Tensor:
    """The parameters after two epochs of three batches."""
    require(repository, "torch_geometric", "tqdm")
    device = torch.device("cpu")
    with in_float64(), trainer(repository, "quantum_chemistry", whose, arguments, device=device) as quantum:
        quantum.Net = Recorder(quantum.Net)
        quantum.args.scale_y = True
        options = {"data_path": ".", "batch_size": 4, "device": device, "lr": 1e-3, "n_epochs": epochs}
        if repository != "YanqiDai/IGB4MTL":
            methods = importlib.import_module("experiments.utils").extract_weight_method_parameters_from_args(
                quantum.args
            )
            options |= {"method": quantum.args.method, "weight_method_params": methods, "method_params_lr": 0.025}
        quantum.main(**options, targets=quantum.targets)
        return parameters_of(quantum.Net.made[0])


ROUNDING = {"imtl": 1e-7, "dwalog": 1e-5}
"""Of parameters that Adam moves by 1e-3 at each of six steps. IMTL-G solves; DWA's history is in float32 there."""


@pytest.mark.parametrize("method", ["imtl", "uw"])
def test_nash_mtl_s_qm9(tiny_qm9, method):
    ours, theirs = run_both(lambda whose: qm9("AvivNavon/nash-mtl", whose, ["--method", method]))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDING.get(method, 1e-9))


def test_famo_s_qm9(tiny_qm9):
    """The trainer tells it the losses after each step."""
    ours, theirs = run_both(lambda whose: qm9("Cranial-XIX/FAMO", whose, ["--method", "famo"]))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("loss", "gradient"), [("igbv1", "imtl"), ("uw", "ls"), ("dwalog", "pcgrad")])
def test_igb4mtl_s_qm9(tiny_qm9, loss, gradient):
    arguments = ["--loss_method", loss, "--gradient_method", gradient, "--base_epoch", "0"]
    ours, theirs = run_both(lambda whose: qm9("YanqiDai/IGB4MTL", whose, arguments))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=ROUNDING.get(loss, ROUNDING.get(gradient, 1e-9)))


def test_igb4mtl_s_qm9_with_the_agent(tiny_qm9):
    """The trainer tells it the epoch's length, the base losses and the reward's scale."""
    pytest.importorskip("stable_baselines3")
    arguments = ["--loss_method", "igbv2", "--gradient_method", "nashmtl", "--base_epoch", "0"]
    assert qm9("YanqiDai/IGB4MTL", "our", arguments, epochs=6).isfinite().all()


# ---- NYUv2 --------------------------------------------------------------------------------------------------------


def write_nyuv2(folder: Path) -> None:
    """Two images of 32×32 for each of training, validation and test, in the files that the trainers read."""
    np = pytest.importorskip("numpy")
    random = np.random.default_rng(0)
    for part in ("train", "val", "test"):
        for name, channels in (("image", 3), ("label", None), ("depth", 1), ("normal", 3)):
            (folder / part / name).mkdir(parents=True)
            for i in range(2):
                size = (32, 32) if channels is None else (32, 32, channels)
                values = random.integers(0, 13, size) if channels is None else random.random(size)
                np.save(folder / part / name / f"{i}.npy", values.astype("float32"))


def test_igb4mtl_s_nyuv2(tmp_path, monkeypatch):
    """Three decoders, and losses that torch.stack made: our passes run one decoder each."""
    require("YanqiDai/IGB4MTL", "tqdm")
    write_nyuv2(tmp_path)
    monkeypatch.chdir(tmp_path)
    arguments = ["--loss_method", "igbv1", "--gradient_method", "pcgrad", "--base_epoch", "0", "--n-epochs", "2"]

    def run(whose: str) -> Tensor:
        device = torch.device("cpu")
        with trainer("YanqiDai/IGB4MTL", "nyuv2", whose, arguments, device=device) as nyuv2:
            nyuv2.args.model, nyuv2.args.apply_augmentation = "segnet", False
            nyuv2.SegNet, nyuv2.SegNetMtan = Recorder(nyuv2.SegNet), lambda: None
            nyuv2.main(path=tmp_path, lr=1e-4, bs=2, device=device)
            return parameters_of(nyuv2.SegNet.made[0])

    ours, theirs = run_both(run)
    # float32, and Adam moves each element by 1e-4, also where its gradient is all rounding.
    assert float((ours - theirs).abs().mean()) < 1e-5
