"""A loop with Accelerate, against the plain one, to the bit."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from balancer.models import same

import igb_kernels as igb

from .training import Log, Net, examples, plain_loop, uw_pcgrad, v1_db_mtl

accelerate = pytest.importorskip("accelerate")

from accelerate.state import AcceleratorState, GradientState  # noqa: E402

from igb_kernels.integrations.accelerate import backward  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Accelerators share their state within a process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Training:
    """A loop as Accelerate's documentation writes it."""

    def __init__(self, make: Any = v1_db_mtl, scaler: Any = None, **options: Any) -> None:
        self.accelerator = accelerate.Accelerator(cpu=True, **options)
        if scaler is not None:  # what Accelerate sets itself, but on CPUs
            self.accelerator.scaler, self.accelerator.native_amp = scaler, True
            self.accelerator.state._mixed_precision = "fp16"
        self.net, self.log = Net(), Log()
        self.balancer = self.log.watch(make(self.net.encoder.parameters()))
        groups = [{"params": self.net.parameters()}, *self.balancer.param_groups()]
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*examples()), 4)
        prepared = self.accelerator.prepare(self.net, torch.optim.SGD(groups, 0.05, 0.9), data)
        self.model, self.optimizer, self.data = prepared
        self.accelerator.register_for_checkpointing(self.balancer)

    def run(self, epochs: int = 3, clip: float | None = None, **options: Any) -> list[object]:
        for _ in range(epochs):
            for x, y in self.data:
                with self.accelerator.accumulate(self.model):
                    with self.accelerator.autocast():
                        losses = self.net.losses(x, y)
                    result = backward(self.accelerator, self.balancer, losses, **options)
                    assert result is None or result is self.log.results[-1]
                    if self.accelerator.sync_gradients and clip is not None:
                        params = [p for group in self.optimizer.param_groups for p in group["params"]]
                        self.accelerator.clip_grad_norm_(params, clip)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
            self.balancer.end_epoch()
        return self.log.of(self.net, self.balancer)


@pytest.mark.parametrize("make", [v1_db_mtl, uw_pcgrad])
def test_the_bits_of_the_plain_loop(make):
    assert same(Training(make).run(), plain_loop(make))


@pytest.mark.parametrize("decide_per", ["step", "micro_batch"])
@pytest.mark.parametrize("make", [v1_db_mtl, uw_pcgrad])
def test_gradient_accumulation(make, decide_per):
    training = Training(make, gradient_accumulation_steps=2)
    expected = plain_loop(make, micro_batches=2, divide_by=lambda count: 2, decide_per=decide_per, clip=0.5)
    assert same(training.run(clip=0.5, decide_per=decide_per), expected)


@pytest.mark.parametrize(
    ("steps", "decide_per", "scale"),
    [(1, "step", 2.0**24), (2, "step", 2.0**24), (2, "micro_batch", 2.0**10)],
)
def test_a_scaler(steps, decide_per, scale):
    """2^24 overflows, so that steps are skipped."""
    scalers = [torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3) for _ in range(2)]
    training = Training(scaler=scalers[0], gradient_accumulation_steps=steps)
    batches = {"micro_batches": steps, "divide_by": lambda count: steps, "decide_per": decide_per}
    expected = plain_loop(v1_db_mtl, clip=0.5, autocast=torch.float16, scaler=scalers[1], **batches)
    assert same(training.run(clip=0.5, decide_per=decide_per), expected)
    assert scalers[0].state_dict() == scalers[1].state_dict()
    assert (scalers[0].get_scale() < scale) == (scale > 2**20)


def test_bfloat16():
    training = Training(mixed_precision="bf16")
    assert same(training.run(), plain_loop(v1_db_mtl, autocast=torch.bfloat16))


@pytest.mark.parametrize("make", [v1_db_mtl, uw_pcgrad])
def test_a_resumed_training_has_the_bits_of_an_uninterrupted_one(make, tmp_path: pathlib.Path):
    whole = Training(make)
    whole.run(2)
    whole.accelerator.save_state(str(tmp_path))
    expected = whole.run(2)
    again = Training(make)
    again.accelerator.load_state(str(tmp_path))
    assert same(again.run(2), expected[10:])


def test_options_of_backward_reach_it():
    training = Training(lambda shared: igb.Balancer("modo", shared=shared))
    x, y = next(iter(training.data))
    other = [training.net.losses(x[i : i + 2], y[i : i + 2]) for i in (0, 2)]
    backward(training.accelerator, training.balancer, training.net.losses(x, y), independent=other)
    accumulating = Training(gradient_accumulation_steps=2)
    losses = accumulating.net.losses(x, y)
    with pytest.raises(ValueError, match=r"\['independent'\] must stay out of micro-batches"):
        backward(accumulating.accelerator, accumulating.balancer, losses, independent=other)


def test_decide_per_is_one_of_two():
    training = Training(gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match=r"decide_per must be one of .* found 'batch'"):
        training.run(decide_per="batch")


def test_losses_are_checked_by_the_balancer():
    training = Training()
    losses = training.net.losses(*next(iter(training.data)))
    with pytest.raises(ValueError, match="losses must be a 1-D tensor"):
        backward(training.accelerator, training.balancer, sum(losses.values()))


def test_several_processes_are_refused(monkeypatch):
    """As started by torchrun, be it with one process."""
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "0")
    training = Training()
    try:
        with pytest.raises(RuntimeError, match=r"one process .* found .*MULTI_CPU"):
            training.run()
    finally:
        torch.distributed.destroy_process_group()
