"""A balancer's steps on any model, in plain PyTorch: K calls of `torch.autograd.grad`, then the reference formulas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import igb_kernels as igb

BASES = [0.7, 30.0, 0.02]
TASKS = len(BASES)

METHODS: dict[str, Callable[[], dict[str, object]]] = {
    "equal": lambda: {"gradients": "equal"},
    "nash_mtl": lambda: {"gradients": "nash_mtl"},
    "db_mtl beta 0": lambda: {"gradients": igb.DBMTL(0.0), "losses": "none"},
    "db_mtl": lambda: {"gradients": igb.DBMTL(0.9), "losses": "none"},
    "grad_drop": lambda: {"gradients": igb.GradDrop(seed=5)},
    "excess_mtl": lambda: {"gradients": igb.ExcessMTL(1.0)},
    "igb_v1+nash_mtl": lambda: {"gradients": "nash_mtl", "losses": igb.IGBv1(base_losses=BASES)},
}
"""One for each way in which a step treats gradients: left to autograd, kept, streamed, averaged, element by element,
kept with their squares; and with scaled losses. For `TASKS` tasks."""


@dataclass
class Situation:
    """A model with its losses at every step."""

    shared: Sequence[Tensor]
    losses: Callable[[int], list[Tensor]]
    own: Sequence[Tensor] = ()
    """Task-specific parameters."""
    plain: Callable[[int], list[Tensor]] | None = None
    """The same losses in a form of which `torch.autograd.grad` is right."""
    before: Callable[[int], object] = field(default=lambda step: None)
    """Called before each step."""


def reals(t: Tensor) -> Tensor:
    """A double precision view of the numbers, real and imaginary parts in turn; dense."""
    t = t.detach()
    t = (t.to_dense() if t.layout is not torch.strided else t).resolve_conj().resolve_neg()
    return (torch.view_as_real(t) if t.is_complex() else t).double()


def grads_of_task(loss: Tensor, params: Sequence[Tensor], seed: Tensor) -> list[Tensor]:
    """Zeros for parameters that are frozen or not reached."""
    live = [p for p in params if p.requires_grad]
    found = torch.autograd.grad(loss, live, seed, retain_graph=True, allow_unused=True)
    by_id = {id(p): g for p, g in zip(live, found, strict=True)}
    return [torch.zeros_like(reals(p)) if (g := by_id.get(id(p))) is None else reals(g).clone() for p in params]


class Truth:
    """What each step must write to the shared parameters and to the task-specific ones."""

    def __init__(self, name: str) -> None:
        self._name, self._steps = name, 0
        self._method = METHODS[name]()["gradients"]
        solver = self._method if isinstance(self._method, str) else self._method.name
        self._solver, self._state = solver, None
        self._kept: list[list[Tensor]] | None = None

    def step(self, losses: Sequence[Tensor], shared: Sequence[Tensor], own: Sequence[Tensor]) -> tuple[object, ...]:
        """The updates, and the sums of their terms' sizes, by which rounding is judged: shared, then own."""
        values = torch.stack([loss.detach() for loss in losses]).double()
        scales = torch.ones_like(values)
        if self._name.startswith("igb_v1"):
            scales = TASKS * (values / torch.tensor(BASES, dtype=torch.float64)).softmax(0) / values
        rows, own_rows = [], []
        for loss, scale in zip(losses, scales, strict=True):
            grads = grads_of_task(loss, [*shared, *own], scale.to(loss.dtype))
            rows.append(grads[: len(shared)])
            own_rows.append(grads[len(shared) :])
        update, sizes = self._update(rows, shared)
        own_update = [sum(column) for column in zip(*own_rows, strict=True)]
        own_sizes = [sum(t.abs() for t in column) for column in zip(*own_rows, strict=True)]
        self._steps += 1
        return [*update, *own_update], [*sizes, *own_sizes]

    def _update(self, rows: list[list[Tensor]], shared: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        if self._solver == "grad_drop":
            out = [reals(torch.empty_like(p)) for p in shared]
            counter = torch.tensor([5.0, self._steps], dtype=torch.float64)
            igb.ops.sign_drop_(out, rows, counter, backend="reference")
            return out, [sum(t.abs() for t in column) for column in zip(*rows, strict=True)]
        if self._name == "db_mtl":
            kept = self._kept or [[torch.zeros_like(t) for t in row] for row in rows]
            rows = [[0.9 * o + 0.1 * t for o, t in zip(*both, strict=True)] for both in zip(kept, rows, strict=True)]
            self._kept = rows
        matrix = torch.stack([torch.cat([t.flatten() for t in row]) for row in rows])
        measured = matrix @ matrix.T
        if self._solver == "excess_mtl":
            kept = self._kept or [[torch.zeros_like(t) for t in row] for row in rows]
            self._kept = [[o + t.square() for o, t in zip(*both, strict=True)] for both in zip(kept, rows, strict=True)]
            squares = torch.stack([torch.cat([t.flatten() for t in row]) for row in self._kept])
            measured = (matrix.square() / (squares + 1e-7).sqrt()).sum(1)
        options = {} if isinstance(self._method, str) else self._method.options()
        if self._state is None:
            self._state = igb.ops.SOLVERS[self._solver].new_state(TASKS, torch.device("cpu"), **options)
        weights, _ = igb.ops.solve(self._solver, measured, state=self._state, backend="reference", **options)
        columns = list(zip(*rows, strict=True))
        return (
            [sum(w * t for w, t in zip(weights, column, strict=True)) for column in columns],
            [sum(w.abs() * t.abs() for w, t in zip(weights, column, strict=True)) for column in columns],
        )


def check(p: Tensor, before: Tensor | None, want: Tensor, size: Tensor, what: str) -> None:
    """What was there `before`, plus the update, up to rounding of the sum of its terms' sizes."""
    if not p.requires_grad:
        assert p.grad is before, f"{what} is frozen"
        return
    got = torch.zeros_like(want) if p.grad is None else reals(p.grad)
    if before is not None:
        want, size = want + before, size + before.abs()
    tolerance = 1e-8 if p.dtype in (torch.float64, torch.complex128) else 5e-5
    error = (got - want).abs()
    assert bool((error <= tolerance * (size + 1e-3 * size.max()) + 1e-13).all()), f"{what}: off by {float(error.max())}"
    assert p.grad is None or (p.grad.dtype is p.dtype and p.grad.shape == p.shape)


def play(
    situation: Situation, method: str, steps: int = 3, existing: bool = False, **arguments: object
) -> igb.Balancer:
    """Steps of gradient descent, each against the truth; with `existing`, gradients are there to add to."""
    shared, own = list(situation.shared), list(situation.own)
    balancer, truth = igb.Balancer(**METHODS[method](), shared=shared, **arguments), Truth(method)
    for step in range(steps):
        situation.before(step)
        params = [*shared, *own]
        torch.manual_seed(100 + step)
        for p in params:
            p.grad = torch.randn_like(p) if existing and p.requires_grad else None
        before = [None if p.grad is None else reals(p.grad).clone() for p in params]
        want, sizes = truth.step((situation.plain or situation.losses)(step), shared, own)
        assert all(b is None or torch.equal(reals(p.grad), b) for p, b in zip(params, before, strict=True))
        balancer.backward(situation.losses(step))
        for i, (p, *expected) in enumerate(zip(params, before, want, sizes, strict=True)):
            check(p, *expected, what=f"step {step}, {'shared' if i < len(shared) else 'own'} {i}")
        with torch.no_grad():
            for p in params:
                if p.grad is not None:
                    p -= 0.01 * p.grad
    return balancer
