"""TorchJD's documented ways to train, with its imports and with ours: the same parameters come out of both.

UPGrad and DualProj take TorchJD's regularisation here, so that they solve the same problem; every training is run again
as it is by default, where ours must never be in conflict.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
import torchjd.aggregation
import torchjd.autogram
import torchjd.autojac
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, mse_loss

from igb_kernels.integrations import torchjd as ours

STEPS, BATCH = 6, 8


class TorchJD:
    """What the examples import from its modules."""

    def __getattr__(self, name: str) -> Any:
        modules = (torchjd.aggregation, torchjd.autojac, torchjd.autogram)
        return next(getattr(module, name) for module in modules if hasattr(module, name))


class AsTorchJD:
    """Ours, regularised as TorchJD's."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(ours, name)
        if name in ("UPGrad", "UPGradWeighting", "DualProj", "DualProjWeighting"):
            return lambda: found(projector=ours.ConeProjector(reg_eps=1e-4))
        return found


@dataclass
class Batches:
    inputs: Tensor
    targets: list[Tensor]

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return zip(self.inputs, *self.targets, strict=True)


def batches(tasks: int = 2, outputs: int | None = 1) -> Batches:
    shape = (STEPS, BATCH) if outputs is None else (STEPS, BATCH, outputs)
    return Batches(torch.randn(STEPS, BATCH, 10), [torch.randn(shape) for _ in range(tasks)])


def perceptron(*widths: int, last: bool = False) -> nn.Sequential:
    layers = [[nn.Linear(a, b), nn.ReLU()] for a, b in pairwise(widths)]
    flat = [module for layer in layers for module in layer]
    return nn.Sequential(*(flat if last else flat[:-1]))


class Training:
    """Modules with an optimizer, which end up as the result."""

    def __init__(self, *modules: nn.Module) -> None:
        self.parameters = [p for module in modules for p in module.parameters()]
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.1)

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def result(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.parameters])


def two_tasks() -> tuple[nn.Module, list[nn.Module], Training]:
    encoder, heads = perceptron(10, 5, 3, last=True), [nn.Linear(3, 1), nn.Linear(3, 1)]
    return encoder, heads, Training(encoder, *heads)


def losses_of(heads: list[nn.Module], features: Tensor, *targets: Tensor) -> list[Tensor]:
    return [mse_loss(head(features), target) for head, target in zip(heads, targets, strict=True)]


# ---- The trainings --------------------------------------------------------------------------------------------------


def basic_usage(lib: Any) -> Tensor:
    model, aggregator = perceptron(10, 5, 2), lib.UPGrad()
    training = Training(model)
    for x, first, second in batches(outputs=None):
        output = model(x)
        lib.backward([mse_loss(output[:, 0], first), mse_loss(output[:, 1], second)])
        lib.jac_to_grad(model.parameters(), aggregator)
        training.step()
    return training.result()


def multi_task(lib: Any) -> Tensor:
    (encoder, heads, training), aggregator = two_tasks(), lib.UPGrad()
    for x, *targets in batches():
        features = encoder(x)
        lib.mtl_backward(losses_of(heads, features, *targets), features=features)
        lib.jac_to_grad(encoder.parameters(), aggregator)
        training.step()
    return training.result()


def instance_wise(lib: Any) -> Tensor:
    """One loss for each example of the batch; the Jacobian is formed."""
    model, aggregator = perceptron(10, 5, 1), lib.UPGrad()
    training = Training(model)
    for x, target in batches(1, None):
        lib.backward((model(x).squeeze(1) - target).square())
        lib.jac_to_grad(model.parameters(), aggregator)
        training.step()
    return training.result()


def instance_wise_by_gramian(lib: Any, first: int = 0) -> Tensor:
    """The same by TorchJD's engine: Gramians without Jacobians."""
    model, weighting = perceptron(10, 8, 5, 1), lib.UPGradWeighting()
    training, engine = Training(model), lib.Engine(model[first:], batch_dim=0)
    for x, target in batches(1, None):
        losses = (model(x).squeeze(1) - target).square()
        losses.backward(weighting(engine.compute_gramian(losses)))
        training.step()
    return training.result()


def by_a_part_of_the_jacobian(lib: Any) -> Tensor:
    return instance_wise_by_gramian(lib, first=2)


def instance_wise_multi_task(lib: Any) -> Tensor:
    """One loss for each example and task."""
    (encoder, heads, training), weighting = two_tasks(), lib.UPGradWeighting()
    engine = lib.Engine(encoder, batch_dim=0)
    for x, *targets in batches():
        features = encoder(x)
        pairs = zip(heads, targets, strict=True)
        losses = torch.cat([(head(features) - target).square() for head, target in pairs], dim=1)
        weights = weighting(engine.compute_gramian(losses))
        losses.backward(weights.reshape(losses.shape))
        training.step()
    return training.result()


def monitored(lib: Any) -> Tensor:
    """With hooks that see weights, matrices and aggregations; they are a part of the result."""
    (encoder, heads, training), aggregator = two_tasks(), lib.UPGrad()
    seen: list[Tensor] = []
    aggregator.gramian_weighting.register_forward_hook(lambda _, inputs, weights: seen.append(weights))
    aggregator.register_forward_hook(
        lambda _, inputs, update: seen.append(cosine_similarity(update, inputs[0].mean(0), dim=0))
    )
    for x, *targets in batches():
        features = encoder(x)
        lib.mtl_backward(losses_of(heads, features, *targets), features=features)
        lib.jac_to_grad(encoder.parameters(), aggregator)
        training.step()
    assert len(seen) == 2 * STEPS
    return torch.cat([training.result(), *(value.flatten() for value in seen)])


def recurrent(lib: Any) -> Tensor:
    """One loss for each element of a sequence."""
    network, aggregator = nn.RNN(10, 6, num_layers=2), lib.UPGrad()
    training = Training(network)
    for x, target in zip(torch.randn(STEPS, 4, 3, 10), torch.randn(STEPS, 4, 3, 6), strict=True):
        output, _ = network(x)
        lib.backward((output - target).square().mean(dim=[1, 2]), parallel_chunk_size=1)
        lib.jac_to_grad(network.parameters(), aggregator)
        training.step()
    return training.result()


def in_groups(groups_of: Callable[[nn.Module], list[list[Tensor]]]) -> Callable[[Any], Tensor]:
    """An aggregation, with a state of its own, for each group of the encoder's parameters."""

    def training_of(lib: Any) -> Tensor:
        encoder, heads, training = two_tasks()
        groups = [(group, lib.GradVac()) for group in groups_of(encoder)]
        for x, *targets in batches():
            features = encoder(x)
            lib.mtl_backward(losses_of(heads, features, *targets), features=features)
            for group, aggregator in groups:
                lib.jac_to_grad(group, aggregator)
            training.step()
        return training.result()

    return training_of


EXAMPLES: dict[str, Callable[[Any], Tensor]] = {
    "basic usage": basic_usage,
    "multi-task learning": multi_task,
    "instance-wise": instance_wise,
    "instance-wise by Gramian": instance_wise_by_gramian,
    "partial": by_a_part_of_the_jacobian,
    "instance-wise multi-task": instance_wise_multi_task,
    "monitoring": monitored,
    "recurrent": recurrent,
    "together": in_groups(lambda encoder: [list(encoder.parameters())]),
    "per network": in_groups(lambda encoder: [[*encoder[0].parameters()], [*encoder[2:].parameters()]]),
    "per layer": in_groups(lambda encoder: [[*layer.parameters()] for layer in encoder if [*layer.parameters()]]),
    "per parameter": in_groups(lambda encoder: [[p] for p in encoder.parameters()]),
}


@pytest.fixture
def double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", EXAMPLES)
def test_both_libraries_come_to_the_same_parameters(name):
    results = []
    for lib in (TorchJD(), AsTorchJD()):
        torch.manual_seed(0)
        results.append(EXAMPLES[name](lib))
    assert torch.allclose(*results, rtol=0, atol=1e-9)
    torch.manual_seed(0)
    assert bool(EXAMPLES[name](ours).isfinite().all()), "as it is after one change of imports"


# ---- The same with what else a training has -------------------------------------------------------------------------


def scaled(lib: Any, overflow: bool = False) -> tuple[Tensor, float]:
    """Float16 autocast with a GradScaler."""
    (encoder, heads, training), aggregator = two_tasks(), lib.UPGrad()
    scaler = torch.amp.GradScaler(device="cpu", init_scale=2.0**10)
    for step, (x, *targets) in enumerate(batches()):
        with torch.autocast(device_type="cpu", dtype=torch.float16):
            features = encoder(x)
            losses = losses_of(heads, features, *targets)
        if overflow and step == 2:
            losses[0] = losses[0] * torch.inf
        lib.mtl_backward(scaler.scale(losses), features=features)
        lib.jac_to_grad(encoder.parameters(), aggregator)
        before = training.result()
        scaler.step(training.optimizer)
        assert torch.equal(training.result(), before) == (overflow and step == 2)
        scaler.update()
        training.optimizer.zero_grad()
    return training.result(), scaler.get_scale()


def test_mixed_precision():
    results = []
    for lib in (TorchJD(), AsTorchJD()):
        torch.manual_seed(0)
        results.append(scaled(lib)[0])
    assert torch.allclose(*results, rtol=0, atol=1e-4)


def test_a_step_that_overflows_is_skipped():
    """TorchJD's solver raises for it."""
    torch.manual_seed(0)
    result, scale = scaled(ours, overflow=True)
    assert bool(result.isfinite().all())
    assert scale == 2.0**9


def lightning_training(lib: Any) -> Tensor:
    from lightning import LightningModule, Trainer
    from torch.utils.data import DataLoader, TensorDataset

    class Model(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.encoder, heads, _ = two_tasks()
            self.heads = nn.ModuleList(heads)

        def training_step(self, batch: list[Tensor], _: int) -> None:
            x, *targets = batch
            features, optimizer = self.encoder(x), self.optimizers()
            lib.mtl_backward(losses_of(self.heads, features, *targets), features=features)
            lib.jac_to_grad(self.encoder.parameters(), lib.UPGrad())
            optimizer.step()
            optimizer.zero_grad()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    model, data = Model(), batches()
    loader = DataLoader(TensorDataset(data.inputs, *data.targets), batch_size=None)
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(accelerator="cpu", max_epochs=2, logger=False, **quiet).fit(model, loader)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_lightning():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for lib in (TorchJD(), AsTorchJD()):
            torch.manual_seed(0)
            results.append(lightning_training(lib))
    assert torch.allclose(*results, rtol=0, atol=1e-4)


def test_compiled_encoders_are_trained():
    """TorchJD documents that it cannot."""
    torch.manual_seed(0)
    encoder, heads, _ = two_tasks()
    plain, data = copy.deepcopy((encoder, heads)), batches()
    compiled = torch.compile(encoder, backend="aot_eager")
    results = []
    for run, (model, model_heads) in ((compiled, (encoder, heads)), (plain[0], plain)):
        training = Training(model, *model_heads)
        for x, *targets in data:
            features = run(x)
            ours.mtl_backward(losses_of(model_heads, features, *targets), features, parallel_chunk_size=1)
            ours.jac_to_grad(model.parameters(), ours.UPGrad())
            training.step()
        results.append(training.result())
    assert torch.allclose(*results, rtol=0, atol=1e-5)


# ---- Trainings by every method --------------------------------------------------------------------------------------

METHODS: dict[str, tuple[tuple[object, ...], float]] = {
    "AlignedMTL": ((), 1e-8),
    "ConFIG": ((), 1e-8),
    "Constant": ((torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64),), 1e-12),
    "DualProj": ((), 1e-9),
    "ExcessMTL": ((), 1e-10),
    "FairGrad": ((1.0,), 1e-5),
    "GradVac": ((), 1e-10),
    "IMTLG": ((), 1e-7),
    "Mean": ((), 1e-12),
    "NashMTL": ((3,), 1e-4),
    "PCGrad": ((), 1e-10),
    "Random": ((), 1e-12),
    "Sum": ((), 1e-12),
    "UPGrad": ((), 1e-9),
}
"""Arguments, and how far parameters may be apart in the end: rounding, grown over the steps, or TorchJD's tolerance."""


@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", METHODS)
def test_trainings_with_one_seed_take_the_same_course(name):
    args, tolerance = METHODS[name]
    results = []
    for lib in (TorchJD(), AsTorchJD()):
        torch.manual_seed(0)
        encoder, heads = perceptron(10, 8, 5, last=True), [nn.Linear(5, 1) for _ in range(3)]
        training, aggregator = Training(encoder, *heads), getattr(lib, name)(*args)
        for x, *targets in batches(3):
            features = encoder(x)
            lib.mtl_backward(losses_of(heads, features, *targets), features)
            lib.jac_to_grad(encoder.parameters(), aggregator)
            training.step()
        results.append(training.result())
    assert torch.allclose(*results, rtol=0, atol=tolerance)
