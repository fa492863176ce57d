"""Every operation, solver and loss rule on every backend that can be used here, against float64 on the CPU.

Operations are compared with what their formulas say in plain PyTorch, solvers and rules with the reference backend; its
own are compared with themselves, so they must be finite and repeat themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from igb_kernels import ops
from igb_kernels.backends import backends
from igb_kernels.balancer import Balancer
from igb_kernels.losses import RULES, LearnedLossBalancer
from igb_kernels.ops import DTYPES, accumulator_dtype
from igb_kernels.status import Status

INNER = {torch.float64: 1e-13}
"""The limit for inner products, relative to |g_i| |g_j|; in other dtypes that of sums in float32, below."""
ELEMENT = {torch.float64: 4e-15}
"""The limit for an element of a sum, relative to the sum of its terms' sizes."""
FLOAT32 = 1e-6
SOLVER = 1e-8
"""The limit for solvers: of the difference in the update, relative to Σ_k |w_k| |g_k|."""
SCALE = 1e-10
"""The limit for loss scales, relative to each."""
SHAPES = ((33, 17), (7,), (), (0,), (5, 1, 3), (700,))
TASKS = (2, 5)
STEPS = 3
"""Of solvers and rules: the state of one is used by the next."""


@dataclass(frozen=True)
class Check:
    """One comparison."""

    kind: str
    """"op", "solver", "rule" or "step"."""
    name: str
    backend: str
    device: str
    error: float
    limit: float
    message: str = ""
    """What was raised, or seen to be wrong."""

    @property
    def right(self) -> bool:
        return not self.message and self.error <= self.limit

    def __str__(self) -> str:
        found = self.message or f"error {self.error:.2g}, at most {self.limit:.2g} is rounding"
        return f"{self.kind} {self.name} on {self.backend} ({self.device}): {found}"


Measure = Callable[[], tuple[float, float]]
"""Returns error and limit."""


def places() -> list[tuple[str, torch.device]]:
    """The backends that can be used, with each device that they can be used on."""
    gpus = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    cpu = [torch.device("cpu")]
    devices = {"cpu": cpu, "cuda": gpus, "triton": gpus or cpu, "reference": cpu + gpus}
    return [(name, device) for name, there in backends().items() if there for device in devices[name]]


def self_test(backend: str, device: torch.device) -> list[Check]:
    """All checks of one backend on one device."""
    return [_run(backend, device, *check) for check in _checks(backend, device)]


def _run(backend: str, device: torch.device, kind: str, name: str, measure: Measure) -> Check:
    try:
        error, limit = measure()
    except Exception as raised:  # whatever it is, it is what is wrong
        return Check(kind, name, backend, str(device), float("inf"), 0.0, f"{type(raised).__name__}: {raised}")
    return Check(kind, name, backend, str(device), error, limit)


def _checks(backend: str, device: torch.device) -> Iterator[tuple[str, str, Measure]]:
    for dtype in DTYPES:
        for op, check in OPS.items():
            yield "op", f"{op} {str(dtype).removeprefix('torch.')}", partial(check, Sample.of(dtype), backend, device)
    for name in ops.SOLVERS:
        yield "solver", name, partial(_solver, name, backend, device)
    for name in ops.RULES:
        yield "rule", name, partial(_rule, name, backend, device)
    for name in ("igb_v1+nash_mtl", "db_mtl"):
        yield "step", name, partial(_step, name, backend, device)


# ---- Operations ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """Gradients of three tasks, of which one does not reach one parameter."""

    rows: list[list[Tensor | None]]
    dtype: torch.dtype

    @staticmethod
    def of(dtype: torch.dtype, seed: int = 0) -> Sample:
        """The same each time."""
        generator = torch.Generator().manual_seed(seed)
        rows: list[list[Tensor | None]] = [
            [(scale * torch.randn(shape, generator=generator)).to(dtype) for shape in SHAPES] for scale in (1, 0.3, 20)
        ]
        rows[1][0] = None
        return Sample(rows, dtype)

    def on(self, device: torch.device) -> list[list[Tensor | None]]:
        return [[None if t is None else t.to(device, copy=True) for t in row] for row in self.rows]

    def matrix(self) -> Tensor:
        """[K, D] in float64."""
        return _matrix(
            [[torch.zeros(s) if t is None else t for t, s in zip(r, SHAPES, strict=True)] for r in self.rows]
        )

    def accumulators(self, seed: int) -> list[list[Tensor]]:
        """Positive numbers, as moving averages of squares are."""
        wide = Sample.of(torch.float64, seed).rows
        return [
            [torch.zeros(shape) if t is None else t.abs() for t, shape in zip(row, SHAPES, strict=True)] for row in wide
        ]

    def inner(self) -> float:
        return INNER.get(self.dtype, FLOAT32)

    def element(self) -> float:
        return ELEMENT.get(self.dtype, FLOAT32)


def _matrix(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    return torch.stack([torch.cat([t.detach().cpu().double().flatten() for t in row]) for row in rows])


def _worst(found: Tensor, truth: Tensor, scale: Tensor) -> float:
    """The largest error, relative to the scale; infinite where something is NaN."""
    found = found.detach().cpu().double()
    relative = torch.where(found == truth, 0.0, (found - truth).abs() / scale)
    return float(relative.nan_to_num(nan=torch.inf).max()) if relative.numel() else 0.0


def _like(rows: list[list[Tensor]], dtype: torch.dtype, device: torch.device) -> list[list[Tensor]]:
    return [[t.to(device, dtype, copy=True) for t in row] for row in rows]


def _gram(sample: Sample, backend: str, device: torch.device) -> tuple[float, float]:
    J = sample.matrix()
    norms = J.norm(dim=1)
    found = ops.gram(sample.on(device), backend=backend)
    return _worst(found, J @ J.T, norms[:, None] * norms), sample.inner()


def _sq_norms(sample: Sample, backend: str, device: torch.device) -> tuple[float, float]:
    truth = sample.matrix().square().sum(dim=1)
    return _worst(ops.sq_norms(sample.on(device), backend=backend), truth, truth), sample.inner()


def _ema_(sample: Sample, backend: str, device: torch.device) -> tuple[float, float]:
    wide, scales = accumulator_dtype(sample.dtype), torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    out = _like(sample.accumulators(1), wide, device)
    old = _matrix(out)
    norms = ops.ema_(out, out, sample.on(device), 0.9, scales.to(device), backend=backend)
    terms = 0.9 * old, 0.1 * scales[:, None] * sample.matrix()
    truth = terms[0] + terms[1]
    squares = truth.square().sum(dim=1)
    elements = _worst(_matrix(out), truth, terms[0].abs() + terms[1].abs()) / sample.element()
    return max(elements, _worst(norms, squares, squares) / sample.inner()), 1.0


def _accumulate_squares_(sample: Sample, backend: str, device: torch.device) -> tuple[float, float]:
    wide = accumulator_dtype(sample.dtype)
    out = _like(sample.accumulators(2), wide, device)
    squares = sample.matrix().square()
    truth = _matrix(out) + squares
    excess = ops.accumulate_squares_(out, out, sample.on(device), 1e-7, backend=backend)
    sums = (squares / (truth + 1e-7).sqrt()).sum(dim=1)
    return max(_worst(_matrix(out), truth, truth) / sample.element(), _worst(excess, sums, sums) / sample.inner()), 1.0


def _combine_(sample: Sample, backend: str, device: torch.device) -> tuple[float, float]:
    weights = torch.tensor([0.3, -1.7, 0.9], dtype=torch.float64)
    out = _like(sample.accumulators(3)[:1], accumulator_dtype(sample.dtype), device)
    before, terms = _matrix(out), weights[:, None] * sample.matrix()
    ops.combine_(out[0], sample.on(device), weights.to(device), accumulate=True, backend=backend)
    truth, scale = before + terms.sum(dim=0), before.abs() + terms.abs().sum(dim=0)
    return _worst(_matrix(out), truth, scale), sample.element()


def _sign_drop_(sample: Sample, backend: str, device: torch.device) -> tuple[float, float]:
    leak, counter = torch.tensor([0.0, 0.5, 0.1], dtype=torch.float64), torch.tensor([7.0, 3.0], dtype=torch.float64)
    wide = accumulator_dtype(sample.dtype)
    out, truth = ([torch.empty(s, dtype=d) for s in SHAPES] for d in (wide, torch.float64))
    exact = [[None if t is None else t.double() for t in row] for row in sample.rows]
    ops.sign_drop_(truth, exact, counter, leak, backend="reference")
    out = [t.to(device) for t in out]
    norm = ops.sign_drop_(out, sample.on(device), counter.to(device), leak.to(device), backend=backend)
    scale = sample.matrix().abs().sum(dim=0)
    errors = torch.where(scale == 0, 0.0, (_matrix([out]) - _matrix([truth]))[0].abs() / scale)
    errors = errors.nan_to_num(nan=torch.inf).sort().values[:-1]  # where U is P but for rounding, either sign is right
    squares = _matrix([out]).square().sum(dim=1)
    return max(float(errors[-1]) / sample.element(), _worst(norm, squares, squares) / sample.inner()), 1.0


def _rollback_(sample: Sample, backend: str, device: torch.device) -> tuple[float, float]:
    wide = accumulator_dtype(sample.dtype)
    wrong = 0.0
    for status, expected in ((0, 4), (int(Status.NON_FINITE), 5)):
        out, kept = (_like(sample.accumulators(seed)[:1], wide, device)[0] for seed in (4, 5))
        ops.rollback_(out, kept, torch.tensor(status, dtype=torch.int32, device=device), backend=backend)
        truth = _like(sample.accumulators(expected)[:1], wide, torch.device("cpu"))
        wrong = max(wrong, float((_matrix([out]) - _matrix(truth)).abs().max()))
    return wrong, 0.0


OPS: dict[str, Callable[[Sample, str, torch.device], tuple[float, float]]] = {
    "gram": _gram,
    "sq_norms": _sq_norms,
    "ema_": _ema_,
    "accumulate_squares_": _accumulate_squares_,
    "combine_": _combine_,
    "sign_drop_": _sign_drop_,
    "rollback_": _rollback_,
}


# ---- Solvers, rules, whole steps ----------------------------------------------------------------------------------


def _solver(name: str, backend: str, device: torch.device) -> tuple[float, float]:
    solver, worst = ops.SOLVERS[name], 0.0
    for tasks in TASKS:
        generator = torch.Generator().manual_seed(tasks)
        rows = torch.randn(tasks, 40, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, tasks)[:, None]
        per_task = _numbers(solver, tasks, generator)
        states = [solver.new_state(tasks, d) for d in (torch.device("cpu"), device)]
        for step in range(STEPS):
            J = rows + 0.1 * step
            losses = torch.rand(tasks, generator=generator, dtype=torch.float64) + 0.5
            results = [
                ops.solve(name, (J @ J.T).to(d), losses.to(d), _to(per_task, d), state=s, backend=b)
                for b, d, s in (("reference", torch.device("cpu"), states[0]), (backend, device, states[1]))
            ]
            (truth, bits), (found, found_bits) = ((w.cpu(), int(s)) for w, s in results)
            if bits != found_bits:
                raise ArithmeticError(f"status {Status(found_bits)!r} for {Status(bits)!r}, K = {tasks}")
            scale = (truth.abs() * J.norm(dim=1)).sum()
            worst = max(worst, _worst((J.T @ (found - truth)).norm(), torch.zeros((), dtype=torch.float64), scale))
        worst = max(worst, _between(states))
    return worst, SOLVER


def _rule(name: str, backend: str, device: torch.device) -> tuple[float, float]:
    rule, worst = ops.RULES[name], 0.0
    for tasks in TASKS:
        generator = torch.Generator().manual_seed(tasks)
        per_task = _numbers(rule, tasks, generator)
        states = [rule.new_state(tasks, d) for d in (torch.device("cpu"), device)]
        for _ in range(STEPS):
            losses = torch.rand(tasks, generator=generator, dtype=torch.float64) + 0.5
            results = [
                ops.loss_scales(name, losses.to(d), _to(per_task, d), state=s, backend=b)
                for b, d, s in (("reference", torch.device("cpu"), states[0]), (backend, device, states[1]))
            ]
            (truth, bits), (found, found_bits) = ((w.cpu(), int(s)) for w, s in results)
            if bits != found_bits:
                raise ArithmeticError(f"status {Status(found_bits)!r} for {Status(bits)!r}, K = {tasks}")
            worst = max(worst, _worst(found, truth, truth.abs()))
        if issubclass(RULES[name], LearnedLossBalancer):  # behind the parameter's gradient may be a workspace
            states = [None if state is None else state[:tasks] for state in states]
        worst = max(worst, _between(states))
    return worst, SCALE


def _numbers(known: ops.Known, tasks: int, generator: torch.Generator) -> Tensor | None:
    """Some numbers for each task: where they are of pairs, orders in which to visit the others."""
    if known.per_task is None:
        return None
    shape = known.per_task(tasks)
    drawn = torch.rand(shape, generator=generator, dtype=torch.float64)
    return drawn.argsort(dim=-1).double() if shape == (tasks, tasks) else drawn + 0.5


def _to(t: Tensor | None, device: torch.device) -> Tensor | None:
    return None if t is None else t.to(device)


def _between(states: Sequence[Tensor | None]) -> float:
    """The difference of two states, relative to the largest number in them, at least 1."""
    if states[0] is None or states[1] is None:
        return 0.0
    truth = states[0]
    finite = truth.nan_to_num(nan=0.0)  # a state may say "nothing yet" so
    return _worst(states[1].cpu().nan_to_num(nan=0.0), finite, finite.abs().max().clamp_min(1))


def _step(name: str, backend: str, device: torch.device) -> tuple[float, float]:
    """Two whole steps, to `.grad`, of a small network in float64."""

    def gradients(backend: str, device: torch.device) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        draw = partial(torch.randn, generator=generator, dtype=torch.float64)
        encoder = [nn.Parameter(draw(6, 5).to(device)), nn.Parameter(draw(5).to(device))]
        heads = [nn.Parameter(draw(5).to(device)) for _ in range(3)]
        x = draw(8, 6).to(device)
        balancer = Balancer(name, shared=encoder, backend=backend)
        for _ in range(2):
            z = torch.tanh(x @ encoder[0] + encoder[1])
            balancer.backward(
                [c * (z @ head - 1).square().mean() for c, head in zip((1.0, 9.0, 0.1), heads, strict=True)]
            )
        return _matrix([[p.grad for p in [*encoder, *heads] if p.grad is not None]])

    truth = gradients("reference", torch.device("cpu"))
    return _worst((gradients(backend, device) - truth).norm(), torch.zeros(()), truth.norm()), SOLVER


def timed(backend: str, device: torch.device) -> tuple[list[Check], float]:
    """The checks, and the seconds that they took."""
    start = time.perf_counter()
    return self_test(backend, device), time.perf_counter() - start
