"""The balanced step in plain PyTorch: K calls of `torch.autograd.grad`, flattened to float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import igb_kernels as igb
from igb_kernels.gradients import GradVac, PCGrad

from .models import TASKS, Net, flat

BASES = [0.7, 30.0, 0.02, 2.0, 0.5, 9.0, 1.0, 0.3]

TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-5, torch.bfloat16: 1.5 * 2**-8}
"""Of a sum Σ_k w_k g_k, as a fraction of Σ_k |w_k g_k|: bfloat16 is rounded once."""


@dataclass(frozen=True)
class Case:
    """A balancer, and the same in the oracle's terms."""

    name: str
    make: Callable[[], dict[str, object]]
    """Arguments of `Balancer` except the parameters."""
    rule: str = "none"
    method: str = "equal"
    options: dict[str, float] = field(default_factory=dict)
    update_every: int = 1


def _named(name: str, rule: str, method: str, **options: float) -> Case:
    return Case(name, lambda: {"gradients": name}, rule, method, options)


def _igb(name: str, method: str, gradients: Callable[[], object], **options: float) -> Case:
    return Case(
        name,
        lambda: {"gradients": gradients(), "losses": igb.IGBv1(base_losses=BASES[:TASKS])},
        "igb_v1_known",
        method,
        options,
    )


def _db(name: str, rule: str = "log_eps", losses: object = None, **options: float) -> Case:
    beta, sigma = options.pop("beta"), options.pop("sigma", 0.0)
    extra = {key: bool(value) for key, value in options.items() if key != "eps"}
    if "eps" in options:
        extra["eps"] = options["eps"]
    return Case(
        name,
        lambda: {"gradients": igb.DBMTL(beta, sigma, **extra), "losses": losses},
        rule,
        "db_mtl",
        {"beta": beta, "sigma": sigma, **options},
    )


def _nash(name: str, max_norm: float, update_every: int = 1) -> Case:
    return Case(
        name,
        lambda: {"gradients": igb.NashMTL(max_norm, update_every)},
        "none",
        "nash_mtl",
        {"max_norm": max_norm},
        update_every,
    )


CASES = {
    case.name: case
    for case in (
        _named("equal", "none", "equal"),
        _named("log", "log", "equal"),
        _named("igb_v1", "log", "equal"),  # no base losses yet: W = 1
        _igb("igb_v1 with bases", "equal", igb.Equal),
        Case("imtl_l", lambda: {"gradients": igb.Equal(), "losses": igb.IMTLL(TASKS)}, "imtl_l"),
        _named("db_mtl", "log_eps", "db_mtl", beta=0.9),
        _db("db_mtl beta 0", beta=0.0),
        _db("db_mtl beta 0, relative eps", beta=0.0, relative_eps=1.0),
        _db("db_mtl sigma", beta=0.9, sigma=0.5),
        _db("db_mtl bias correction", beta=0.9, bias_correction=1.0),
        _db("none+db_mtl", "none", "none", beta=0.5, eps=1e-4),
        _named("emtl", "none", "emtl"),
        Case(
            "emtl max, lower",
            lambda: {"gradients": igb.EMTL(1.5, scale="max", lower=[0.1, 0.5, 0.0])},
            "none",
            "emtl",
            {"lam": 1.5, "scale": 1.0},
        ),
        _named("imtl_g", "none", "imtl_g"),
        Case(
            "imtl_g descent_safe",
            lambda: {"gradients": igb.IMTLG(descent_safe=True)},
            "none",
            "imtl_g",
            {"descent_safe": 1.0},
        ),
        _named("nash_mtl", "none", "nash_mtl"),
        _nash("nash_mtl unclipped", 0.0),
        _nash("nash_mtl every 3", 1.2, 3),
        Case("pcgrad", lambda: {"gradients": PCGrad(seed=0)}, "none", "pcgrad"),
        Case("gradvac", lambda: {"gradients": GradVac(0.3, seed=0)}, "none", "gradvac", {"beta": 0.3}),
        _named("log+imtl_g", "log", "imtl_g"),
        _named("igb_v1+db_mtl", "log", "db_mtl", beta=0.9),
        _igb("igb_v1+emtl", "emtl", lambda: "emtl"),
        _igb("igb_v1+nash_mtl", "nash_mtl", lambda: "nash_mtl"),
    )
}
STORES = ["igb_v1 with bases", "db_mtl", "db_mtl beta 0", "emtl", "imtl_g", "nash_mtl every 3"]
"""A case for each way in which a step keeps its gradients, and for each kind of solve."""

LOWER = {"emtl max, lower": torch.tensor([0.1, 0.5, 0.0], dtype=torch.float64)}


def balancer_of(case: Case, net: Net, convention: str = "scaled", backend: str = "auto") -> igb.Balancer:
    own = {"heads": "weighted", "task_parameters": net.own} if convention == "weighted" else {}
    return igb.Balancer(**case.make(), shared=net.shared, backend=backend, **own)


def rule_scales(rule: str, losses: Tensor, log_scales: Tensor | None = None) -> Tensor:
    """Scales [K] from raw losses [K], both float64."""
    if rule == "none":
        return torch.ones_like(losses)
    if rule == "log":
        return 1 / losses
    if rule == "log_eps":
        return 1 / (losses + 1e-8)
    if rule == "igb_v1_known":
        ratio = losses / torch.tensor(BASES[: len(losses)], dtype=torch.float64)
        return len(losses) * ratio.softmax(0) / losses
    assert rule == "imtl_l", rule
    assert log_scales is not None
    return log_scales.detach().double().exp()


@dataclass
class Expected:
    """What one step must do."""

    losses: Tensor
    scales: Tensor
    weights: Tensor
    status: Tensor
    rows: Tensor
    """What is combined on the shared parameters, [K, D]: scaled gradients or their moving averages."""
    head_rows: Tensor
    """Scaled gradients of the task-specific parameters [K, H]."""

    @property
    def shared(self) -> Tensor:
        return self.weights @ self.rows

    @property
    def gram(self) -> Tensor:
        return self.rows @ self.rows.T

    def heads(self, convention: str) -> Tensor:
        return self.head_rows.sum(0) if convention == "scaled" else self.weights @ self.head_rows


def _gradients(loss: Tensor, params: Sequence[Tensor], seed: Tensor) -> list[Tensor | None]:
    live = [p for p in params if p.requires_grad]
    grads = iter(torch.autograd.grad(loss, live, seed, retain_graph=True, allow_unused=True))
    return [next(grads) if p.requires_grad else None for p in params]


class Oracle:
    """Plays a case step by step; leaves graph and `.grad` alone."""

    def __init__(self, case: Case, tasks: int = TASKS) -> None:
        self._case, self._steps = case, 0
        self._averages: Tensor | None = None
        solver = igb.ops.SOLVERS[case.method]
        self._state = solver.new_state(tasks, torch.device("cpu"), **case.options)

    def step(
        self,
        losses: Sequence[Tensor],
        shared: Sequence[Tensor],
        heads: Sequence[Tensor] = (),
        log_scales: Tensor | None = None,
    ) -> Expected:
        case = self._case
        dtype = losses[0].dtype
        for loss in losses:
            dtype = torch.promote_types(dtype, loss.dtype)
        values = torch.stack([loss.detach().reshape(()).to(dtype) for loss in losses]).double()
        scales = rule_scales(case.rule, values, log_scales).to(dtype)
        rows, head_rows = [], []
        for loss, scale in zip(losses, scales, strict=True):
            seed = scale.to(loss.dtype).reshape(loss.shape)
            grads = _gradients(loss, [*shared, *heads], seed)
            rows.append(flat(grads[: len(shared)], shared))
            head_rows.append(flat(grads[len(shared) :], heads) if heads else torch.zeros(0, dtype=torch.float64))
        matrix = torch.stack(rows)
        if case.method == "db_mtl":
            matrix = self._average(matrix)
        excess = (values - LOWER.get(case.name, 0.0)).clamp_min(0) * scales.double()
        options = dict(case.options)
        if case.method == "nash_mtl":
            options["hold"] = float(self._steps % case.update_every != 0)
        weights, status = igb.ops.solve(
            case.method, matrix @ matrix.T, excess, state=self._state, backend="reference", **options
        )
        self._steps += 1
        return Expected(values, scales, weights, status, matrix, torch.stack(head_rows))

    def _average(self, rows: Tensor) -> Tensor:
        decay = self._case.options["beta"] / (self._steps + 1) ** self._case.options.get("sigma", 0.0)
        old = torch.zeros_like(rows) if self._averages is None else self._averages
        self._averages = (1 - decay) * rows + decay * old
        return self._averages


def check_sum(got: Tensor, want: Tensor, terms: Tensor, dtype: torch.dtype, what: str, joint: bool = False) -> None:
    """`got` is `want` up to the dtype's tolerance of the sum's absolute terms, and what is rounding noise of the
    passes themselves; more of it after a joint pass, where tasks were added in the graph."""
    noise = (8 if joint else 0.25) * torch.finfo(dtype).eps * terms.max()
    bound = TOLERANCE[dtype] * terms + noise + 1e-30
    error = (got - want).abs()
    assert bool((error <= bound).all()), f"{what}: off by {float((error / bound).max()):.3g} of the tolerance"


def check_step(
    expected: Expected,
    shared: Tensor,
    heads: Tensor | None,
    dtype: torch.dtype,
    convention: str = "scaled",
    before: Tensor | None = None,
    heads_before: Tensor | None = None,
    joint: bool = False,
) -> None:
    """The flattened gradients are what was there `before` plus what the oracle expects."""
    size = expected.weights.abs() @ expected.rows.abs()
    before = torch.zeros_like(size) if before is None else before
    check_sum(shared, before + expected.shared, size + before.abs(), dtype, "shared", joint)
    if heads is None:
        return
    factor = expected.weights.abs() if convention == "weighted" else torch.ones_like(expected.weights)
    size = factor @ expected.head_rows.abs()
    heads_before = torch.zeros_like(size) if heads_before is None else heads_before
    check_sum(heads, heads_before + expected.heads(convention), size + heads_before.abs(), dtype, "heads", joint)
