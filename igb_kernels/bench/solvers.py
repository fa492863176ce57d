"""Every solver and every loss rule at K tasks, beside the native call, the reference backend and other libraries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from igb_kernels import _native, ops
from igb_kernels.backends import FASTEST_FIRST, backends
from igb_kernels.bench import peers
from igb_kernels.bench.cases import Case, Options, chosen
from igb_kernels.bench.measure import Contender, Harness
from igb_kernels.bench.results import Measurement
from igb_kernels.gradients import METHODS
from igb_kernels.losses import RULES

TASKS = (3, 8)
QUICK = ("cagrad", "db_mtl", "imtl_g", "mgda", "nash_mtl", "pcgrad", "upgrad", "igb_v1", "uw")
SPREAD = 4.0
"""The longest gradient over the shortest; where they are further apart, solvers of the originals stop to converge."""
TOLERANCE, RULE_TOLERANCE = 1e-8, 1e-6
"""For kernels: of the difference in the update, relative to Σ_k |w_k| |g_k|; of the scales, each relative to itself."""
PEER_TOLERANCE = 1e-3
"""For other libraries, which have stopping rules of their own."""


def names() -> Sequence[str]:
    """The methods and rules."""
    return [*sorted(METHODS), *sorted(RULES)]


def accepts(name: str) -> bool:
    """Whether it is a method or a rule."""
    return name in METHODS or name in RULES


def cases(options: Options) -> Iterator[Case]:
    """Every one at every K."""
    for name in chosen(QUICK if options.quick and not options.methods else names(), options):
        for tasks in options.tasks or TASKS:
            run = measure_solver if name in METHODS else measure_rule
            yield Case(f"{name}, K = {tasks}", partial(run, name, tasks, options))


def gramian(tasks: int) -> Tensor:
    """Cosines around 0, the norms' ratio as SPREAD says; the same each time."""
    random = torch.Generator().manual_seed(tasks)
    scales = torch.logspace(0, 1, tasks, base=SPREAD, dtype=torch.float64)
    rows = scales[:, None] * torch.randn(tasks, 2 * tasks + 8, dtype=torch.float64, generator=random)
    return rows @ rows.T


def numbers(known: ops.Known, tasks: int, device: torch.device) -> Tensor | None:
    """What it takes for each task, where it must have some."""
    if known.per_task is None or not known.needs_per_task:
        return None
    return torch.ones(known.per_task(tasks), dtype=torch.float64, device=device)


def measure_solver(method: str, tasks: int, options: Options, harness: Harness) -> Measurement:
    """One solve from Python. States go on from call to call, as in training, but results are those of first calls."""
    solver, device, own = ops.SOLVERS[method], options.device, options.backend_name()
    gram, losses = gramian(tasks), _losses(tasks)
    there = {name: t.to(device) for name, t in (("gram", gram), ("losses", losses))}
    per_task = numbers(solver, tasks, device)

    def truth(visits: Tensor | None = None, **options: float) -> Tensor:
        given = visits if visits is not None else None if per_task is None else per_task.cpu()
        return ops.solve(method, gram, losses, given, state=None, backend="reference", **options)[0]

    def on(backend: str) -> Contender:
        state = solver.new_state(tasks, device)

        def solve(state: Tensor | None) -> Tensor:
            return ops.solve(method, there["gram"], there["losses"], per_task, state=state, backend=backend)[0]

        def error() -> float:
            found = solve(solver.new_state(tasks, device)).cpu()
            return distance(gram, found, truth())

        return Contender(partial(solve, state), error, TOLERANCE)

    def by(peer: peers.Peer) -> Contender:
        def error() -> float:
            update, visits = peer.update()
            weights = truth(visits, **peer.options)
            rows = peers.rows_with(gram)
            return float((update.cpu().double() - rows.T @ weights).norm() / _size(gram, weights))

        return Contender(peer.call, error, PEER_TOLERANCE, foreign=True)

    rivals = {other: on(other) for other in _other_backends(own, device)}
    if own == "cpu":
        rivals["native call"] = Contender(_native_solve(solver, gram, losses, per_task))
    found = peers.solvers(method, there["gram"], there["losses"], options.peers)
    rivals |= {name: by(peer) for name, peer in found.items()}
    with peers.quiet():
        return harness.measure(
            on(own), rivals, suite="solvers", name=method, tasks=tasks, params=0, dtype=torch.float64, backend=own
        )


def measure_rule(rule: str, tasks: int, options: Options, harness: Harness) -> Measurement:
    """One scaling of losses in float32, as they come."""
    known, device, own = ops.RULES[rule], options.device, options.backend_name()
    losses = _losses(tasks).float()
    there, per_task = losses.to(device), numbers(known, tasks, device)

    def on(backend: str) -> Contender:
        state = known.new_state(tasks, device)

        def scales(state: Tensor | None) -> Tensor:
            return ops.loss_scales(rule, there, per_task, state=state, backend=backend)[0]

        def error() -> float:
            given = None if per_task is None else per_task.cpu()
            truth = ops.loss_scales(rule, losses.double(), given, backend="reference")[0]
            found = scales(known.new_state(tasks, device)).cpu().double()
            return float(((found - truth).abs() / truth.abs().clamp_min(torch.finfo(torch.float32).tiny)).max())

        return Contender(partial(scales, state), error, RULE_TOLERANCE)

    rivals = {other: on(other) for other in _other_backends(own, device)}
    if own == "cpu":
        rivals["native call"] = Contender(_native_scales(known, losses, per_task))
    return harness.measure(
        on(own), rivals, suite="solvers", name=rule, tasks=tasks, params=0, dtype=losses.dtype, backend=own
    )


def distance(gram: Tensor, found: Tensor, truth: Tensor) -> float:
    """|J'(w - w*)| relative to Σ_k |w*_k| |g_k|, the scale of its rounding errors."""
    off = found - truth
    return float((off @ gram @ off).clamp_min(0).sqrt() / _size(gram, truth))


def _size(gram: Tensor, weights: Tensor) -> Tensor:
    return weights.abs() @ gram.diagonal().sqrt()


def _losses(tasks: int) -> Tensor:
    return torch.linspace(0.5, 1.5, tasks, dtype=torch.float64)


def _other_backends(own: str, device: torch.device) -> list[str]:
    kernels = [name for name in FASTEST_FIRST[device.type] if backends()[name]]
    return [name for name in (*kernels, "reference") if name != own]


# ---- The native calls, without the operation in front of them -----------------------------------------------------


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _native_solve(solver: ops.Solver, gram: Tensor, losses: Tensor, per_task: Tensor | None) -> Callable[[], object]:
    module, tasks = _native.module, len(gram)
    assert module is not None
    state, weights = solver.new_state(tasks, gram.device), torch.empty(tasks, dtype=torch.float64)
    method, values = module.methods[solver.name], list(solver.options.values())

    def call() -> object:  # holds the tensors
        return module.solve(
            method, tasks, _address(gram), True, _address(losses), _address(per_task), values, _address(state),
            _address(weights),
        )  # fmt: skip

    return call


def _native_scales(rule: ops.Rule, losses: Tensor, per_task: Tensor | None) -> Callable[[], object]:
    module, tasks = _native.module, len(losses)
    assert module is not None
    state, doubles = rule.new_state(tasks, losses.device), losses.double()
    scales, values = torch.empty_like(doubles), list(rule.options.values())

    def call() -> object:
        return module.loss_scales(
            module.loss_rules[rule.name], tasks, _address(doubles), _address(per_task), values, _address(state),
            _address(scales),
        )  # fmt: skip

    return call
