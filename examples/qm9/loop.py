"""Training one method, and test errors in physical units."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from data import Split
from graphs import Graphs
from models import MultiTaskModel
from numpy.typing import NDArray
from ranks import ALONE, Ranks
from torch import Tensor

import igb_kernels as igb

EVALUATION_BATCH = 256
WARM_UP = 0.1  # share of the steps over which the learning rate rises, before it falls along a cosine
SHOW_EVERY = 10  # steps between reads of the loss: each one waits for the device


@dataclass
class Run:
    """What one method did; complete only if every planned step was taken."""

    method: str
    model: MultiTaskModel
    balancer: igb.Balancer
    optimizer: torch.optim.Optimizer
    planned_steps: int
    ranks: Ranks = ALONE
    losses: Tensor = field(default_factory=lambda: torch.empty(0))  # (steps, K) raw losses
    weights: Tensor = field(default_factory=lambda: torch.empty(0))  # (steps, K) on the raw losses' gradients
    status: int = 0  # bits of igb.Status that came up in any step
    val_errors: list[float] = field(default_factory=list)  # a mean over tasks of standardised MAEs for each epoch
    test_mae: NDArray[np.float64] | None = None  # in the targets' units
    seconds: float = 0.0  # training, validation included

    @property
    def steps(self) -> int:
        return len(self.losses)

    @property
    def complete(self) -> bool:
        return self.steps == self.planned_steps


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to zero."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def epoch_batches(train: Tensor, batch_size: int, generator: torch.Generator) -> list[Tensor]:
    """One epoch's molecules in random order, in batches of equal size; the remainder waits for another epoch."""
    order = train[torch.randperm(len(train), generator=generator).to(train.device)]
    return list(torch.split(order, batch_size)[: len(train) // batch_size])


def mean_absolute_errors(model: MultiTaskModel, graphs: Graphs, molecules: Tensor, ranks: Ranks) -> Tensor:
    """(K,) on standardised targets; each rank predicts its part of the molecules."""
    total = torch.zeros(graphs.targets.shape[1], device=graphs.targets.device)
    with torch.no_grad():
        for chunk in torch.split(ranks.part(molecules), EVALUATION_BATCH):
            batch = graphs.batch(chunk)
            total += (torch.stack(model(batch), dim=1) - batch.targets).abs().sum(dim=0)
    return ranks.total(total) / len(molecules)


def train(
    run: Run,
    graphs: Graphs,
    split: Split,
    batch_size: int,
    seed: int,
    on_step: Callable[[int, float | None], None],
) -> None:
    """Takes the run's planned steps; Ctrl-C raises KeyboardInterrupt with the run's record up to date."""
    device = graphs.targets.device
    molecules = torch.from_numpy(split.train).to(device)
    held_out = torch.from_numpy(split.val).to(device)
    generator = torch.Generator().manual_seed(seed)  # the same batches for every method
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        run.optimizer, lambda step: learning_rate_factor(step, run.planned_steps)
    )
    losses_seen: list[Tensor] = []
    weights_seen: list[Tensor] = []
    status_seen: list[Tensor] = []
    best, best_state = math.inf, None
    start = time.perf_counter()
    try:
        while len(losses_seen) < run.planned_steps:
            for chosen in epoch_batches(molecules, batch_size, generator)[: run.planned_steps - len(losses_seen)]:
                run.optimizer.zero_grad()
                result = run.balancer.backward(run.model.losses(graphs.batch(run.ranks.part(chosen))))
                run.optimizer.step()
                scheduler.step()
                losses_seen.append(result.losses.detach())
                weights_seen.append(result.total_weights)
                status_seen.append(result.status)
                steps = len(losses_seen)
                shown = steps % SHOW_EVERY == 0 or steps == run.planned_steps
                on_step(steps, float(result.losses.mean()) if shown else None)
            run.balancer.end_epoch()
            error = float(mean_absolute_errors(run.model, graphs, held_out, run.ranks).mean())
            run.val_errors.append(error)
            if error < best:
                best = error
                best_state = {name: value.clone() for name, value in run.model.state_dict().items()}
    finally:
        run.seconds = time.perf_counter() - start
        if losses_seen:
            run.losses, run.weights = torch.stack(losses_seen).cpu(), torch.stack(weights_seen).cpu()
            for bits in set(torch.stack(status_seen).tolist()):
                run.status |= bits
        if best_state is not None:  # what is tested is the epoch that validated best, as in the benchmark
            run.model.load_state_dict(best_state)


def test(run: Run, graphs: Graphs, split: Split, std: NDArray[np.float64]) -> None:
    molecules = torch.from_numpy(split.test).to(graphs.targets.device)
    errors = mean_absolute_errors(run.model, graphs, molecules, run.ranks)
    run.test_mae = errors.cpu().numpy().astype(np.float64) * std


def delta_m(mae: NDArray[np.float64], baseline: NDArray[np.float64]) -> float:
    """Δm in %: the mean over tasks of the relative change of the error. Negative is better than the baseline."""
    return float(((mae - baseline) / baseline).mean() * 100)
