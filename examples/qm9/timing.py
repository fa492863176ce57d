"""Where a step's time goes, measured on the same batches in turns, so that drift of the machine hits all alike."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import numpy as np
import torch
from graphs import Graphs
from loop import Run
from torch import Tensor, nn

import igb_kernels as igb

WARM_UP = 3  # untimed rounds


@dataclass(frozen=True)
class StepTime:
    """Medians in ms."""

    batch: float  # putting the batch together
    forward: float
    passes: float  # the bare backward passes: K, or 1 where the method needs no more
    balancing: float  # balanced backward minus bare passes
    optimizer: float
    reference_balancing: float  # the same through the reference backend

    @property
    def step(self) -> float:
        return self.batch + self.forward + self.passes + self.balancing + self.optimizer

    @property
    def reference_step(self) -> float:
        return self.step - self.balancing + self.reference_balancing


class _Clock:
    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"

    def now(self) -> float:
        if self.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() * 1e3


def time_step(run: Run, graphs: Graphs, batches: list[Tensor], backend: str) -> StepTime:
    """Times copies of the run's model and balancer on these batches; the run itself stays as it is."""
    model = copy.deepcopy(run.model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)  # does all its work, but leaves the model in place
    shared = list(model.encoder.parameters())
    clock = _Clock(graphs.targets.device)
    balancers = []
    for name in (backend, "reference"):
        balancer = igb.Balancer(
            run.method, shared=model.encoder.parameters(), backend=name, process_group=run.ranks.group
        )
        balancer.load_state_dict(copy.deepcopy(run.balancer.state_dict()))
        balancers.append(balancer)
    single_pass = run.balancer.gradients.name == "equal"
    rows = []
    for round_, chosen in enumerate(batches):
        start = clock.now()
        batch = graphs.batch(run.ranks.part(chosen))
        row = {"batch": clock.now() - start}
        turns = ["bare", "balanced", "reference"]
        for turn in turns[round_ % 3 :] + turns[: round_ % 3]:
            optimizer.zero_grad()
            start = clock.now()
            losses = model.losses(batch)
            forward = clock.now()
            if turn == "bare":
                _bare_passes(list(losses.values()), shared, single_pass)
            else:
                balancers[turn == "reference"].backward(losses)
            backward = clock.now()
            row[turn] = backward - forward
            if turn == "balanced":
                optimizer.step()
                row |= {"forward": forward - start, "optimizer": clock.now() - backward}
        rows.append(row)
    timed = rows[WARM_UP:]
    median = {name: float(np.median([row[name] for row in timed])) for name in timed[0]}
    balancing, reference = (
        float(np.median([row[name] - row["bare"] for row in timed])) for name in ("balanced", "reference")
    )
    return StepTime(median["batch"], median["forward"], median["bare"], balancing, median["optimizer"], reference)


def _bare_passes(losses: list[Tensor], shared: list[nn.Parameter], single_pass: bool) -> None:
    """The passes alone: shared gradients are dropped, not added up."""
    if single_pass:
        torch.autograd.backward(losses)
        return
    for k, loss in enumerate(losses):
        torch.autograd.backward(loss, retain_graph=k + 1 < len(losses))
        for parameter in shared:
            parameter.grad = None
