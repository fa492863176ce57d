"""Whole balanced steps of models that people train, against the K bare backward passes that they contain, and against
the same step by the reference backend, in plain PyTorch and by other libraries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from igb_kernels.backends import FASTEST_FIRST, backends, resolve
from igb_kernels.balancer import Balancer
from igb_kernels.bench import eager, loops
from igb_kernels.bench.cases import Case, Options
from igb_kernels.bench.measure import Contender, Copy, Harness
from igb_kernels.bench.memory import peak_bytes
from igb_kernels.bench.models import (
    ALL,
    LONGEST,
    LONGEST_NAMED,
    MODELS,
    SMALL,
    Model,
    MultiTask,
    matrix_flops_per_second,
)
from igb_kernels.bench.peers import quiet
from igb_kernels.bench.results import Measurement, Rival
from igb_kernels.gradients import DBMTL, METHODS, GradientBalancer
from igb_kernels.losses import RULES, LossBalancer

TASKS = (3, 8)
DEFAULTS = ("igb_v1+nash_mtl", "db_mtl", "imtl_g")
VARIANTS: dict[str, Callable[[], GradientBalancer]] = {"db_mtl-beta0": partial(DBMTL, beta=0.0)}
"""Methods with other options than their defaults."""

TOLERANCE = 1e-3
"""Of our update and the truth: their distance, over the truth's length. The passes are others each time."""
EAGER_TOLERANCE = 1e-2
"""Of a Gramian in float32."""
ANGLE = 0.05
"""Of another library's update and the truth, in radians (a cosine of 0.99875): other solvers stop earlier, and other
conventions have another length."""
PROFILED_STEPS = 3
"""In whose last, all state is there."""
PASSES, COPIED, EAGER, REFERENCE = "passes", "passes + copy", "eager", "reference"
WITH_FORWARD = "with forward"
"""Ours again, as other libraries' steps are timed: with the forward pass."""


def names() -> Sequence[str]:
    """What `--methods` may name."""
    return [*METHODS, *VARIANTS, "RULE+METHOD", *RULES]


def accepts(name: str) -> bool:
    """Whether it is a balancer's name."""
    rule, _, method = name.rpartition("+")
    if not rule and method in RULES:
        return True
    return (not rule or rule in RULES) and (method in METHODS or method in VARIANTS)


def cases(options: Options) -> Iterator[Case]:
    """Every balancer with every number of tasks on every model."""
    named = [name for name in options.methods if accepts(name)]
    methods = named if options.methods else list(DEFAULTS[:1] if options.quick else DEFAULTS)
    default = SMALL[:1] if options.quick else SMALL
    models = MODELS if ALL in options.models else options.models or default
    longest = LONGEST_NAMED if options.models and ALL not in options.models else LONGEST
    for model in models:
        for tasks in options.tasks or (TASKS[:1] if options.quick else TASKS):
            for method in methods:
                label = f"{method}, K = {tasks}, {model}"
                yield Case(label, partial(measure, MODELS[model], tasks, method, options, longest))


def measure(
    model: Model, tasks: int, method: str, options: Options, longest: float, harness: Harness
) -> Measurement | None:
    """One step, if the model can be made and run here."""
    device = options.device
    if set(options.dtypes) != {torch.float32}:
        harness.remark("steps are measured in float32 alone")
    if torch.float32 not in options.dtypes:
        return None
    if reason := model.left_out(tasks, device, seconds=longest, flops_per_second=matrix_flops_per_second(device)):
        harness.remark(reason)
        return None
    torch.manual_seed(0)
    step = WholeStep(model.build(tasks, device), method, options.backend)
    own = options.backend_name()
    rivals = {other: step.balanced(other) for other in FASTEST_FIRST[device.type] if other != own and backends()[other]}
    rivals |= {PASSES: step.passes(), COPIED: step.passes_and_copy()}
    if reason := model.left_out(tasks, device, copies=4):
        harness.remark(f"without plain PyTorch and the reference, {reason}")
    else:
        if (flat := step.eager()) is not None:
            rivals[EAGER] = flat
        if own != REFERENCE:
            rivals[REFERENCE] = replace(step.balanced(REFERENCE), error=None, note="the truth of all errors")
    compare = partial(
        harness.measure,
        suite="step",
        name=method,
        tasks=tasks,
        params=sum(p.numel() for p in step.task.shared),
        dtype=torch.float32,
        backend=own,
        model=model.name,
    )
    found = compare(step.balanced(options.backend), rivals)
    if peers := step.of_libraries(options.peers, harness):
        rounds = harness.rounds
        with quiet():
            whole = compare(step.balanced_with_forward(), peers)
        harness.rounds = rounds
        timed = Rival(
            whole.timing,
            None if whole.note else whole.timing.ms / found.timing.ms,
            whole.error,
            whole.note or "our own step with its forward pass: other libraries' speed-ups are over this",
        )
        found = replace(found, rivals={**found.rivals, WITH_FORWARD: timed, **whole.rivals})
    if not options.memory:
        return found
    del rivals, peers
    with quiet():
        return _with_memory(found, step, options.backend)


def _with_memory(found: Measurement, step: WholeStep, backend: str) -> Measurement:
    """Beyond the bare passes; of contenders anew, so that what they keep between steps counts."""
    floor = step.peak_bytes(step.passes())
    extra = {
        name: replace(rival, extra_bytes=step.peak_bytes(step.anew(name)) - floor)
        for name, rival in found.rivals.items()
        if name not in (PASSES, COPIED, WITH_FORWARD)
    }
    ours = step.peak_bytes(step.balanced(backend)) - floor
    return replace(found, extra_bytes=ours, rivals={**found.rivals, **extra})


class WholeStep:
    """Contenders that balance the same model's losses. What one is given, and what is timed: K losses from a forward
    pass to `.grad`; for those with the forward pass, the whole.

    The truth is the update by the reference backend, which forms it in float64 from passes of its own; it is that of
    the first step, as everything else that is compared.
    """

    def __init__(self, task: MultiTask, method: str, backend: str = "auto") -> None:
        self.task, self.method, self._backend = task, method, backend
        self._truth: Tensor | None = None

    def balancer(self, backend: str, **options: Any) -> Balancer:
        """Anew, with further arguments of `Balancer`."""
        rule, method = _parts(self.method, len(self.task.heads))
        return Balancer(method, rule, shared=self.task.shared, backend=backend, **options)

    def losses(self) -> tuple[list[Tensor]]:
        """From a forward pass, without `.grad`."""
        self.task.zero_grad()
        return (self.task.losses(),)

    def update(self) -> Tensor:
        """What is in `.grad` of the shared parameters, [D]."""
        return torch.cat(
            [torch.zeros_like(p).flatten() if p.grad is None else p.grad.to_dense().flatten() for p in self.task.shared]
        )

    def distance(self, call: Callable[..., object]) -> float:
        """Of the update and the truth, over the truth's length."""
        truth = self.truth()
        call(*self.losses())
        return float((self.update() - truth).norm() / truth.norm())

    def angle(self, call: Callable[[], object]) -> float:
        """Between the update and the truth."""
        truth = self.truth()
        self.task.zero_grad()
        call()
        update = self.update()
        return float((update / update.norm() - truth / truth.norm()).norm())

    def truth(self) -> Tensor:
        """The first update by the reference backend."""
        if self._truth is None:
            self.balancer(REFERENCE).backward(*self.losses())
            self._truth = self.update()
        return self._truth

    def balanced(self, backend: str) -> Contender:
        """By a balancer."""
        call = self.balancer(backend).backward
        return Contender(call, partial(self.distance, call), TOLERANCE, self.losses)

    def balanced_with_forward(self) -> Contender:
        """By a balancer, from the batch on."""
        balancer = self.balancer(self._backend)

        def call() -> None:
            balancer.backward(self.task.losses())

        return Contender(call, partial(self.angle, call), ANGLE, self._without_grad)

    def _without_grad(self) -> tuple[()]:
        self.task.zero_grad()
        return ()

    def passes(self) -> Contender:
        """K backward passes that keep nothing: what no exact method can do without."""
        return Contender(self.bare_passes, setup=self.losses)

    def bare_passes(self, losses: list[Tensor]) -> None:
        """One after another."""
        for k, loss in enumerate(losses):
            loss.backward(retain_graph=k + 1 < len(losses))  # type: ignore[no-untyped-call]
            for p in self.task.shared:
                p.grad = None

    def passes_and_copy(self) -> Contender:
        """With about the memory traffic of a Gramian and a weighted sum, at the speed of a copy."""
        size = sum(p.nbytes for p in self.task.shared) * len(self.task.heads)
        copy = Copy(2 * size, self.task.device)

        def call(losses: list[Tensor]) -> None:
            self.bare_passes(losses)
            copy()

        return Contender(call, setup=self.losses)

    def eager(self) -> Contender | None:
        """In plain PyTorch; None where that would be something else."""
        balancer = self.balancer(self._backend)
        if not eager.Step.can(balancer.gradients):
            return None
        call = eager.Step(
            self.task.shared, balancer.gradients, balancer.losses, resolve(self._backend, self.task.device.type)
        )
        return Contender(call, partial(self.distance, call), EAGER_TOLERANCE, self.losses)

    def of_libraries(self, libraries: Iterable[str], harness: Harness) -> dict[str, Contender]:
        """Those that take such a step; a remark says of the others why not."""
        found = {}
        for library in libraries:
            try:
                found[library] = self.of_library(library)
            except loops.NotThere as reason:
                harness.remark(str(reason))
        return found

    def of_library(self, library: str) -> Contender:
        """By another library, from the batch on; raises NotThere."""
        rule, _, method = self.method.rpartition("+")
        if rule and rule not in SCALES:
            raise loops.NotThere(f"{library} is not compared at {self.method}: it has no {rule}")
        call = loops.STEPS[library](self.task, method, SCALES[rule])
        note = "forward pass included in both"
        if rule:
            note += f"; {rule} in plain PyTorch before"
        return Contender(call, partial(self.angle, call), ANGLE, self._without_grad, note, foreign=True)

    def anew(self, rival: str) -> Contender:
        """By a backend, by a library, or in plain PyTorch."""
        if rival in loops.STEPS:
            return self.of_library(rival)
        flat = self.eager() if rival == EAGER else None
        return self.balanced(rival) if flat is None else flat

    def peak_bytes(self, contender: Contender) -> int:
        """The most that its steps hold at a time, forward passes included, beyond what is held before them."""

        def run() -> None:
            for _ in range(PROFILED_STEPS):
                contender.call(*(contender.setup or tuple)())
            self.task.zero_grad()

        self.task.zero_grad()
        return peak_bytes(run, self.task.device)


def _parts(name: str, tasks: int) -> tuple[LossBalancer | None, GradientBalancer]:
    """Rule (None: the method's own) and method of a balancer."""
    rule, _, method = name.rpartition("+")
    if not rule and method in RULES:
        rule, method = method, "equal"
    scale = _made(RULES[rule], tasks) if rule else None
    return scale, _made(VARIANTS[method] if method in VARIANTS else METHODS[method], tasks)


def _made(make: Callable[..., Any], tasks: int) -> Any:
    """With what it cannot be made without, a seed for all alike, and base losses of 1: IGBv1 balances at once."""
    known = {"num_tasks": tasks, "seed": 0, "base_losses": [1.0] * tasks}
    return make(**{name: value for name, value in known.items() if name in signature(make).parameters})


def _igb_v1(losses: list[Tensor]) -> list[Tensor]:
    values = torch.stack([loss.detach() for loss in losses])
    return [loss * s for loss, s in zip(losses, len(losses) * values.softmax(dim=0) / values, strict=True)]


SCALES: dict[str, loops.Scale] = {
    "": list,
    "none": list,
    "igb_v1": _igb_v1,
    "log": lambda losses: [t.log() for t in losses],
}
"""Loss-balancing rules in a line of PyTorch, for libraries that do not have them; IGBv1 with base losses of 1."""
