"""The operations under every balancer: their schemas, argument checks, and shapes for tracing.

Each is a `torch.library` op in the namespace `igb_kernels` (so it can be traced, profiled by name and used inside
`torch.compile`), with a public function of the same name in front that takes nested sequences:

- `gram`, `sq_norms`: K×P gradients to their Gramian or squared norms, in one read of the gradients,
- `ema_`: moving averages of gradients and their squared norms, in one pass,
- `accumulate_squares_`: sums of squared gradients over the steps, as Adagrad's, and what they make of the gradients,
- `combine_`: the weighted sum of K gradients per parameter; `sign_drop_`: GradDrop's sum, of one sign per element,
- `solve`: a method's weights from the Gramian; `loss_scales`: a rule's scales from the losses.

Gradients are addressed where they are; nothing is flattened. `None` stands for a parameter that a task does not reach.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from igb_kernels.active import ActiveTasks
from igb_kernels.backends import OptionalTensors, reference, resolve

NAMESPACE = "igb_kernels"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
COMPLEX_DTYPES = (torch.complex64, torch.complex128)
"""Of gradients; each element counts as its real and its imaginary part, two elements of half the size."""
MAX_TASKS = 1024
MIN_EPS = torch.finfo(torch.float32).tiny

Row = Sequence[Tensor | None]
Shape = Callable[[int], tuple[int, ...]]
"""Of numbers for K tasks, from K."""
InitialState = Callable[[int, Mapping[str, float]], list[float]]
"""The state before the first step, from K and the options."""

# ---- Methods and rules register what `solve` and `loss_scales` need to know of them -----------------------------


@dataclass(frozen=True, kw_only=True)
class Known:
    """What `solve` knows of a method and `loss_scales` of a rule."""

    name: str
    options: Mapping[str, float]
    per_task: Shape | None
    """The shape of its own numbers for K tasks, or None where it takes none."""
    needs_per_task: bool
    initial_state: InitialState | None
    state_head: int
    """How many of the state's numbers belong to the step; behind them are rows of K, or, of pairs, K rows of K."""
    state_of_pairs: bool

    def new_state(self, tasks: int, device: torch.device, **options: float) -> Tensor | None:
        """The state before the first step, float64, or None where there is none."""
        if self.initial_state is None:
            return None
        values = self.initial_state(tasks, {**self.options, **options})
        return torch.tensor(values, dtype=torch.float64, device=device)

    def rows(self, state: Tensor, tasks: int) -> Tensor:
        """What the state holds for each task, [..., K]."""
        return state[self.state_head :].view(-1, tasks)

    def part(self, state: Tensor, active: ActiveTasks) -> Tensor:
        """The state of the active tasks, a copy."""
        if len(state) == self.state_head:
            return state.clone()
        rows = self.rows(state, active.tasks)
        chosen = active.part_of_pairs(rows) if self.state_of_pairs else active.part(rows)
        return torch.cat([state[: self.state_head], chosen.flatten()])

    def whole(self, state: Tensor, active: ActiveTasks, part: Tensor) -> Tensor:
        """The state with that of the active tasks in its place, a copy."""
        whole = state.clone()
        whole[: self.state_head] = part[: self.state_head]
        if len(state) > self.state_head:
            rows, chosen = self.rows(whole, active.tasks), self.rows(part, len(active.ids))
            _ = active.put_pairs_(rows, chosen) if self.state_of_pairs else active.put_(rows, chosen)
        return whole


@dataclass(frozen=True, kw_only=True)
class Solver(Known):
    """A method; the mathematics is in csrc/core and, in float64 PyTorch, in `gradients`."""

    needs_gram: bool
    needs_losses: bool


@dataclass(frozen=True, kw_only=True)
class Rule(Known):
    """A rule for losses; in `losses`."""


SOLVERS: dict[str, Solver] = {}
RULES: dict[str, Rule] = {}


def register_solver(
    name: str,
    *,
    options: Mapping[str, float] | None = None,
    needs_gram: bool = False,
    needs_losses: bool = False,
    per_task: Shape | None = None,
    needs_per_task: bool = False,
    initial_state: InitialState | None = None,
    state_head: int = 0,
    state_of_pairs: bool = False,
) -> Callable[[reference.Solver], reference.Solver]:
    """Makes a method known to `solve`; decorates its float64 reference.

    `options` gives order and defaults; `per_task` the shape of its own numbers for K tasks, which `solve` may get,
    or must (`needs_per_task`). For the state see `Known`.
    """

    def register(function: reference.Solver) -> reference.Solver:
        solver = SOLVERS[name] = Solver(
            name=name,
            options=options or {},
            needs_gram=needs_gram,
            needs_losses=needs_losses,
            per_task=per_task,
            needs_per_task=needs_per_task,
            initial_state=initial_state,
            state_head=state_head,
            state_of_pairs=state_of_pairs,
        )
        reference.SOLVERS[name] = reference.KnownSolver(function, tuple(solver.options), needs_gram, needs_losses)
        return function

    return register


def register_rule(
    name: str,
    *,
    options: Mapping[str, float] | None = None,
    per_task: Shape | None = None,
    needs_per_task: bool = False,
    initial_state: InitialState | None = None,
    state_head: int = 0,
) -> Callable[[reference.Rule], reference.Rule]:
    """Makes a loss-balancing rule known to `loss_scales`, as `register_solver` does a method."""

    def register(function: reference.Rule) -> reference.Rule:
        RULES[name] = Rule(
            name=name,
            options=options or {},
            per_task=per_task,
            needs_per_task=needs_per_task,
            initial_state=initial_state,
            state_head=state_head,
            state_of_pairs=False,
        )
        reference.RULES[name] = reference.KnownRule(function, tuple(RULES[name].options))
        return function

    return register


# ---- Argument checks ---------------------------------------------------------------------------------------------


def _check_rows(op: str, grads: OptionalTensors, tasks: int, argument: str = "grads") -> torch.device:
    """Every column has one shape, dtype and device, and all have one device, which is returned."""
    if not 1 <= tasks <= MAX_TASKS:
        raise ValueError(f"{op}: the number of tasks must be 1 to {MAX_TASKS}, found {tasks}")
    if len(grads) % tasks:
        raise ValueError(f"{op}: {argument} must hold tasks × parameters tensors, found {len(grads)} for {tasks} tasks")
    params = len(grads) // tasks
    device: torch.device | None = None
    for p in range(params):
        shape = dtype = None
        for k in range(tasks):
            t = grads[k * params + p]
            if t is None:
                continue
            if shape is None:
                shape, dtype, device = t.shape, t.dtype, device or t.device
                if dtype not in DTYPES + COMPLEX_DTYPES:
                    rule = f"one of the dtypes {DTYPES + COMPLEX_DTYPES}"
                    raise TypeError(f"{op}: {argument}[{k}][{p}] must have {rule}, found {dtype}")
            if t.shape != shape or t.dtype is not dtype or t.device != device or t.layout is not torch.strided:
                raise ValueError(
                    f"{op}: {argument}[{k}][{p}] must be a dense tensor of shape {tuple(shape)}, {dtype}, on {device}, "
                    f"like the others; found {tuple(t.shape)}, {t.dtype}, on {t.device}, layout {t.layout}"
                )
    return device or torch.device("cpu")


def _check_like(op: str, name: str, tensors: OptionalTensors, like: OptionalTensors, dtypes: str) -> None:
    """`tensors` has the count and shapes of `like` and, as `dtypes` says, its "same" or its "accumulator" dtypes."""
    if len(tensors) != len(like):
        raise ValueError(f"{op}: {name} must hold {len(like)} tensors, found {len(tensors)}")
    for i, (t, other) in enumerate(zip(tensors, like, strict=True)):
        if t is None or other is None:
            continue
        allowed = (accumulator_dtype(other.dtype),) if dtypes == "accumulator" else _combined_dtypes(other.dtype)
        if t.shape != other.shape or t.dtype not in allowed or t.device != other.device:
            raise ValueError(
                f"{op}: {name}[{i}] must have shape {tuple(other.shape)}, dtype {' or '.join(map(str, allowed))}, on "
                f"{other.device}; found {tuple(t.shape)}, {t.dtype}, on {t.device}"
            )


def _check_update(
    op: str, out: Sequence[Tensor], state: OptionalTensors, grads: OptionalTensors, tasks: int
) -> torch.device:
    """`out` and `state` are accumulators for `grads`; returns the device of `out`."""
    device = _check_rows(op, out, tasks, "out")
    _check_rows(op, grads, tasks)
    for i, t in enumerate(out):
        if t.dtype is not accumulator_dtype(t.dtype):
            raise ValueError(f"{op}: out[{i}] must be float32 or float64 (or complex), found {t.dtype}")
    _check_like(op, "out", out, grads, "accumulator")
    _check_like(op, "state", state, out, "accumulator")
    return device


def _check_sum(op: str, out: Sequence[Tensor], grads: OptionalTensors, tasks: int) -> torch.device:
    """A sum of the rows of `grads` can be written to `out`; returns the device of `out`."""
    _check_rows(op, grads, tasks)
    device = _check_rows(op, out, 1, "out")
    for k in range(tasks):
        _check_like(op, "out", out, grads[k * len(out) : (k + 1) * len(out)], "combined")
    return device


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums and moving averages of gradients of `dtype` are kept."""
    if dtype.is_complex:
        return dtype
    return torch.float64 if dtype is torch.float64 else torch.float32


def _combined_dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """The dtypes that a sum of gradients of `dtype` can be written in."""
    if dtype is torch.float32:
        return (torch.float32, torch.bfloat16, torch.float16)
    return (dtype, torch.float32) if dtype in (torch.bfloat16, torch.float16) else (dtype,)


def _check_vector(op: str, name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(t.shape) != shape:
        raise ValueError(f"{op}: {name} must have shape {shape}, found {tuple(t.shape)}")
    if not t.dtype.is_floating_point:
        raise TypeError(f"{op}: {name} must have a floating dtype, found {t.dtype}")


def _check_own(
    op: str,
    known: Known,
    tasks: int,
    device: torch.device,
    per_task: Tensor | None,
    options: Sequence[float],
    state: Tensor | None,
) -> None:
    """What a method or rule takes beside gradients and losses."""
    if len(options) != len(known.options):
        raise ValueError(f"{op}: {known.name} takes the options {list(known.options)}, found {len(options)} values")
    if known.per_task is None:
        if per_task is not None:
            raise ValueError(f"{op}: {known.name} takes no per_task, found {tuple(per_task.shape)}")
    elif per_task is not None:
        _check_vector(op, "per_task", per_task, known.per_task(tasks))
    elif known.needs_per_task:
        raise ValueError(f"{op}: {known.name} needs per_task, found None")
    if known.initial_state is not None:
        size = len(known.initial_state(tasks, known.options))
        if state is None or state.shape != (size,) or state.dtype is not torch.float64 or not state.is_contiguous():
            found = "None" if state is None else f"{tuple(state.shape)}, {state.dtype}"
            raise ValueError(f"{op}: state must be a contiguous float64 tensor of shape ({size},), found {found}")
        if state.device != device:
            raise ValueError(f"{op}: state must be on {device}, found it on {state.device}")


def _values(op: str, name: str, known: Mapping[str, float], given: Mapping[str, float]) -> list[float]:
    """The options by position, with defaults where they are not given."""
    for option in given:
        _check_known(op, f"an option of {name}", option, known)
    return [float({**known, **given}[option]) for option in known]


def _check_known(op: str, kind: str, name: str, known: Mapping[str, object]) -> None:
    if name not in known:
        raise ValueError(f"{op}: {kind} must be one of {sorted(known)}, found {name!r}")


# ---- The registered ops ------------------------------------------------------------------------------------------

_library = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]


def _define(schema: str) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """Registers the decorated function as the op's implementation on every device."""

    def register(function: Callable[..., object]) -> Callable[..., object]:
        name = schema.split("(", 1)[0]
        _library.define(schema)  # type: ignore[no-untyped-call]
        _library.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
        return function

    return register


@_define("gram(Tensor?[] grads, int tasks, str backend='auto') -> Tensor")
def _gram(grads: list[Tensor | None], tasks: int, backend: str = "auto") -> Tensor:
    device = _check_rows("gram", grads, tasks)
    run = resolve(backend, device.type)
    return run.gram(run.Table(grads, tasks), tasks)


@_define("sq_norms(Tensor?[] grads, int tasks, str backend='auto') -> Tensor")
def _sq_norms(grads: list[Tensor | None], tasks: int, backend: str = "auto") -> Tensor:
    device = _check_rows("sq_norms", grads, tasks)
    run = resolve(backend, device.type)
    return run.sq_norms(run.Table(grads, tasks), tasks)


@_define(
    "ema_(Tensor(a!)[] out, Tensor?[] state, Tensor?[] grads, Tensor decay, int tasks, Tensor? scales=None, "
    "str backend='auto') -> Tensor"
)
def _ema_(
    out: list[Tensor],
    state: list[Tensor | None],
    grads: list[Tensor | None],
    decay: Tensor,
    tasks: int,
    scales: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    device = _check_update("ema_", out, state, grads, tasks)
    if decay.numel() != 1:
        raise ValueError(f"ema_: decay must be one number, found {decay.numel()}")
    if scales is not None:
        _check_vector("ema_", "scales", scales, (tasks,))
    run = resolve(backend, device.type)
    out_table = run.Table(out, tasks)
    old, new = run.Table(state, tasks, out_table), run.Table(grads, tasks, out_table)
    norms = run.ema_(out_table, old, new, decay, tasks, scales)
    torch.autograd.graph.increment_version(out)
    return norms


@_define(
    "accumulate_squares_(Tensor(a!)[] out, Tensor?[] state, Tensor?[] grads, float eps, int tasks, str backend='auto')"
    " -> Tensor"
)
def _accumulate_squares_(
    out: list[Tensor],
    state: list[Tensor | None],
    grads: list[Tensor | None],
    eps: float,
    tasks: int,
    backend: str = "auto",
) -> Tensor:
    device = _check_update("accumulate_squares_", out, state, grads, tasks)
    if not eps >= MIN_EPS:
        raise ValueError(f"accumulate_squares_: eps must be at least {MIN_EPS}, found {eps}")
    run = resolve(backend, device.type)
    out_table = run.Table(out, tasks)
    old, new = run.Table(state, tasks, out_table), run.Table(grads, tasks, out_table)
    excess = run.accumulate_squares_(out_table, old, new, eps, tasks)
    torch.autograd.graph.increment_version(out)
    return excess


@_define("combine_(Tensor(a!)[] out, Tensor?[] grads, Tensor weights, bool accumulate=False, str backend='auto') -> ()")
def _combine_(
    out: list[Tensor], grads: list[Tensor | None], weights: Tensor, accumulate: bool = False, backend: str = "auto"
) -> None:
    _check_vector("combine_", "weights", weights, (weights.numel(),))
    device = _check_sum("combine_", out, grads, weights.numel())
    run = resolve(backend, device.type)
    out_table = run.Table(out, 1)
    run.combine_(out_table, run.Table(grads, weights.numel(), out_table), weights, accumulate)
    torch.autograd.graph.increment_version(out)


@_define(
    "sign_drop_(Tensor(a!)[] out, Tensor?[] grads, Tensor counter, int tasks, Tensor? leak=None, str backend='auto')"
    " -> Tensor"
)
def _sign_drop_(
    out: list[Tensor],
    grads: list[Tensor | None],
    counter: Tensor,
    tasks: int,
    leak: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    device = _check_sum("sign_drop_", out, grads, tasks)
    if counter.shape != (2,) or counter.dtype is not torch.float64 or counter.device != device:
        found = f"{tuple(counter.shape)}, {counter.dtype}, on {counter.device}"
        raise ValueError(f"sign_drop_: counter must have shape (2,), torch.float64, on {device}; found {found}")
    if leak is not None:
        _check_vector("sign_drop_", "leak", leak, (tasks,))
    run = resolve(backend, device.type)
    out_table = run.Table(out, 1)
    norm = run.sign_drop_(out_table, run.Table(grads, tasks, out_table), counter, leak)
    torch.autograd.graph.increment_version(out)
    return norm


@_define(
    "solve(str method, Tensor gram, Tensor? losses, Tensor? per_task, float[] options, Tensor(a!)? state, "
    "str backend='auto') -> (Tensor, Tensor)"
)
def _solve(
    method: str,
    gram: Tensor,
    losses: Tensor | None,
    per_task: Tensor | None,
    options: list[float],
    state: Tensor | None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    _check_known("solve", "method", method, SOLVERS)
    solver, tasks = SOLVERS[method], gram.shape[0] if gram.dim() else 0
    if not 1 <= tasks <= MAX_TASKS or not (gram.shape == (tasks, tasks) or (gram.dim() == 1 and not solver.needs_gram)):
        rule = "a K×K Gramian" if solver.needs_gram else "a K×K Gramian or K squared norms"
        raise ValueError(f"solve: gram must be {rule}, 1 <= K <= {MAX_TASKS}, for {method}; found {tuple(gram.shape)}")
    if solver.needs_losses:
        if losses is None:
            raise ValueError(f"solve: {method} needs losses, found None")
        _check_vector("solve", "losses", losses, (tasks,))
    _check_own("solve", solver, tasks, gram.device, per_task, options, state)
    weights, status = resolve(backend, gram.device.type).solve(method, gram, losses, per_task, options, state)
    if state is not None:
        torch.autograd.graph.increment_version([state])
    return weights, status


@_define(
    "loss_scales(str rule, Tensor losses, Tensor? per_task, float[] options, Tensor(a!)? state, str backend='auto')"
    " -> (Tensor, Tensor)"
)
def _loss_scales(
    rule: str,
    losses: Tensor,
    per_task: Tensor | None,
    options: list[float],
    state: Tensor | None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    _check_known("loss_scales", "rule", rule, RULES)
    _check_vector("loss_scales", "losses", losses, (losses.numel(),))
    if not 1 <= len(losses) <= MAX_TASKS:
        raise ValueError(f"loss_scales: losses must hold 1 to {MAX_TASKS} losses, found {len(losses)}")
    _check_own("loss_scales", RULES[rule], len(losses), losses.device, per_task, options, state)
    scales, status = resolve(backend, losses.device.type).loss_scales(rule, losses, per_task, options, state)
    if state is not None:
        torch.autograd.graph.increment_version([state])
    return scales, status


@_define("rollback_(Tensor(a!)[] out, Tensor?[] kept, Tensor status, str backend='auto') -> ()")
def _rollback_(out: list[Tensor], kept: list[Tensor | None], status: Tensor, backend: str = "auto") -> None:
    device = _check_rows("rollback_", out, 1, "out")
    _check_like("rollback_", "kept", kept, out, "accumulator")
    run = resolve(backend, device.type)
    out_table = run.Table(out, 1)
    run.rollback_(out_table, run.Table(kept, 1, out_table), status)
    torch.autograd.graph.increment_version(out)


def _fake(name: str, function: Callable[..., object]) -> None:
    torch.library.register_fake(f"{NAMESPACE}::{name}", function, lib=_library)


def _device_of(grads: OptionalTensors) -> torch.device:
    return next((t.device for t in grads if t is not None), torch.device("cpu"))


def _float64(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device=device)


def _new_status(device: torch.device) -> Tensor:
    return torch.empty((), dtype=torch.int32, device=device)


_fake("gram", lambda grads, tasks, backend="auto": _float64((tasks, tasks), _device_of(grads)))
_fake("sq_norms", lambda grads, tasks, backend="auto": _float64((tasks,), _device_of(grads)))
_fake(
    "ema_",
    lambda out, state, grads, decay, tasks, scales=None, backend="auto": _float64((tasks,), _device_of(out)),
)
_fake(
    "accumulate_squares_",
    lambda out, state, grads, eps, tasks, backend="auto": _float64((tasks,), _device_of(out)),
)
_fake("combine_", lambda out, grads, weights, accumulate=False, backend="auto": None)
_fake(
    "sign_drop_",
    lambda out, grads, counter, tasks, leak=None, backend="auto": _float64((1,), _device_of(out)),
)
_fake(
    "solve",
    lambda method, gram, losses, per_task, options, state, backend="auto": (
        _float64((gram.shape[0],), gram.device),
        _new_status(gram.device),
    ),
)
_fake(
    "loss_scales",
    lambda rule, losses, per_task, options, state, backend="auto": (
        torch.empty_like(losses),
        _new_status(losses.device),
    ),
)
_fake("rollback_", lambda out, kept, status, backend="auto": None)

# ---- Public functions --------------------------------------------------------------------------------------------

registered = getattr(torch.ops, NAMESPACE)
"""The ops themselves, for callers that hold rows as one flat list."""

Rows = Tensor | Sequence[Row]


def _flat(op: str, argument: str, rows: Rows) -> tuple[list[Tensor | None], int]:
    """Rows (or a K×D matrix) as one list in row-major order, and K. Its entries are not to be negated any more: PyTorch
    does that before an op for lists of tensors, but not for lists with None."""
    nested: list[Row] = [[row] for row in rows.unbind()] if isinstance(rows, Tensor) else [list(row) for row in rows]
    if len({len(row) for row in nested}) > 1:
        lengths = [len(row) for row in nested]
        raise ValueError(f"{op}: {argument} must hold the same number of tensors for every task, found {lengths}")
    return [None if t is None else t.resolve_neg() for row in nested for t in row], len(nested)


def gram(grads: Rows, *, backend: str = "auto") -> Tensor:
    """The Gramian G_ij = <g_i, g_j> of K gradients, in one read of them.

    Args:
        grads: K rows of P tensors each (None where a task does not reach a parameter), or a K×D matrix. Each column
            has one shape and dtype: float32, float64, bfloat16, float16, complex64 or complex128; all on one device.
            Complex elements count as two real ones, as for `torch.view_as_real`: the inner product is Re <g_i, g_j>.
        backend: "auto", or a name from `igb_kernels.backends()`.

    Returns:
        Tensor [K, K], float64, on the gradients' device; symmetric to the bit. Half precision is summed in float32
        chunks and those in float64, in an order that does not depend on the number of threads.

    Equivalent to::

        J = torch.stack([torch.cat([g.double().flatten() for g in row]) for row in grads])
        J @ J.T
    """
    flat, tasks = _flat("gram", "grads", grads)
    result: Tensor = registered.gram(flat, tasks, backend)
    return result


def sq_norms(grads: Rows, *, backend: str = "auto") -> Tensor:
    """The squared Euclidean norms of K gradients: the diagonal of `gram`, which see, at the cost of one pass."""
    flat, tasks = _flat("sq_norms", "grads", grads)
    result: Tensor = registered.sq_norms(flat, tasks, backend)
    return result


def ema_(
    out: Rows,
    state: Rows,
    grads: Rows,
    decay: float | Tensor,
    scales: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Writes out = decay · state + (1 − decay) · scales_k · grads and returns the squared norms of out, in one pass.

    Args:
        out: K rows of P tensors, without None; written. Float32 for half and single precision gradients, else float64.
        state: like `out`, and may be `out`; None counts as zeros.
        grads: as in `gram`; None counts as zeros.
        decay: one number. A tensor on another device is copied, which waits.
        scales: Tensor [K], floating, of factors on the gradients; None stands for ones. As for `decay`.

    Returns:
        Tensor [K], float64, on the device of `out`.
    """
    flat_out, tasks = _flat("ema_", "out", out)
    flat_state, flat_grads = _flat("ema_", "state", state)[0], _flat("ema_", "grads", grads)[0]
    if not isinstance(decay, Tensor):  # filled in on the device: a copy to it would wait
        decay = torch.full((1,), decay, dtype=torch.float64, device=_device_of(flat_out))
    result: Tensor = registered.ema_(flat_out, flat_state, flat_grads, decay, tasks, scales, backend)
    return result


def accumulate_squares_(out: Rows, state: Rows, grads: Rows, eps: float, *, backend: str = "auto") -> Tensor:
    """Writes out = state + grads², elementwise, and returns Σ grads² / √(out + eps) for each task, in one pass.

    These are the inner products of the gradients with Adagrad's steps: the excess risks of ExcessMTL (He et al., ICML
    2024).

    Args:
        out: K rows of P tensors, without None; written. Float32 for half and single precision gradients, else float64.
        state: like `out`, and may be `out`; None counts as zeros.
        grads: as in `gram`; None counts as zeros. In float32, an element beyond 1.8e19 has an infinite square.
        eps: one number, at least 1.2e-38.

    Returns:
        Tensor [K], float64, on the device of `out`.
    """
    flat_out, tasks = _flat("accumulate_squares_", "out", out)
    flat_state = _flat("accumulate_squares_", "state", state)[0]
    flat_grads = _flat("accumulate_squares_", "grads", grads)[0]
    result: Tensor = registered.accumulate_squares_(flat_out, flat_state, flat_grads, eps, tasks, backend)
    return result


def combine_(
    out: Sequence[Tensor], grads: Rows, weights: Tensor, *, accumulate: bool = False, backend: str = "auto"
) -> None:
    """Writes out = Σ_k weights_k · grads_k, or adds it to `out` with `accumulate`; one read of the gradients.

    Args:
        out: P tensors, written; each may be a tensor of `grads`. Float32 sums can be written in half precision.
        grads: as in `gram`.
        weights: Tensor [K], floating. From another device they are copied, which waits.
    """
    flat, tasks = _flat("combine_", "grads", grads)
    _check_vector("combine_", "weights", weights, (tasks,))
    registered.combine_(list(out), flat, weights, accumulate, backend)


def sign_drop_(
    out: Sequence[Tensor], grads: Rows, counter: Tensor, leak: Tensor | None = None, *, backend: str = "auto"
) -> Tensor:
    """GradDrop (Chen et al., NeurIPS 2020): sums in each coordinate the gradients of one sign, in one read of them.

    With the positive gradients' share P = (1 + Σ_k g_k / Σ_k |g_k|) / 2 (equation 1) and U uniform in (0, 1), the
    positive ones are kept where P > U and the negative ones elsewhere: out = Σ_k (leak_k + (1 − leak_k) · kept_k) · g_k
    (algorithm 1). U follows from seed, step, the parameter's place p and the coordinate's place in memory alone, so it
    is the same on every backend and with any number of threads. So is the choice, which takes sums in float32 (float64
    for float64), except on the reference backend, whose float64 sums may decide a tie otherwise.

    Args:
        out: P tensors, written; each may be a tensor of `grads`. Float32 sums can be written in half precision.
        grads: as in `gram`. Where one is NaN or infinite, or Σ_k |g_k| overflows, out is NaN.
        counter: Tensor [2], float64, on the device of `out`: seed and step, whole numbers from 0 to 2^53. The caller
            counts the steps.
        leak: Tensor [K], floating, of the shares that pass in any case; None stands for zeros. From another device it
            is copied, which waits.

    Returns:
        Tensor [1], float64, on the device of `out`: the squared norm of out.
    """
    flat, tasks = _flat("sign_drop_", "grads", grads)
    result: Tensor = registered.sign_drop_(list(out), flat, counter, tasks, leak, backend)
    return result


def solve(
    method: str,
    gram: Tensor,
    losses: Tensor | None = None,
    per_task: Tensor | None = None,
    *,
    state: Tensor | None = None,
    backend: str = "auto",
    **options: float,
) -> tuple[Tensor, Tensor]:
    """A method's weights from the Gramian of the gradients.

    Args:
        method: the name of a gradient-balancing method.
        gram: Tensor [K, K]; [K] squared norms do for methods that need no more.
        losses: Tensor [K], for methods that use them (EMTL, GradNorm).
        per_task: the method's own numbers for each task, floating: a preference [K], visiting orders [K, K].
        state: the method's float64 state, on the Gramian's device, updated in place; a new one if not given.
        options: the method's, by name; see its class.

    Returns:
        weights [K], float64, such that the update is Σ_k weights_k g_k; and the status, int32 [], bits of
        `igb_kernels.Status`. Both on the Gramian's device.
    """
    _check_known("solve", "method", method, SOLVERS)
    solver = SOLVERS[method]
    values = _values("solve", method, solver.options, options)
    if state is None:
        state = solver.new_state(gram.shape[0] if gram.dim() else 0, gram.device, **options)
    weights, status = registered.solve(method, gram, losses, per_task, values, state, backend)
    return weights, status


def loss_scales(
    rule: str,
    losses: Tensor,
    per_task: Tensor | None = None,
    *,
    state: Tensor | None = None,
    backend: str = "auto",
    **options: float,
) -> tuple[Tensor, Tensor]:
    """A loss-balancing rule's scales s_k = dφ_k/dL_k.

    Args:
        rule: the name of a loss-balancing rule.
        losses: Tensor [K], floating.
        per_task: the rule's own numbers for each task, floating: IGBv1's base losses [K] (NaN where unknown), a learned
            parameter; see its class.
        state: the rule's float64 state, on the losses' device, updated in place; a new one if not given. Rules with
            a learned parameter leave its gradient there.
        options: the rule's, by name; see its class.

    Returns:
        scales [K] in the losses' dtype, computed in float64; and the status, int32 [].
    """
    _check_known("loss_scales", "rule", rule, RULES)
    values = _values("loss_scales", rule, RULES[rule].options, options)
    if state is None:
        state = RULES[rule].new_state(losses.numel(), losses.device, **options)
    scales, status = registered.loss_scales(rule, losses, per_task, values, state, backend)
    return scales, status


def rollback_(out: Sequence[Tensor], kept: Row, status: Tensor, *, backend: str = "auto") -> None:
    """Copies `kept` (None: zeros) to `out` where the status says NON_FINITE, without a host sync."""
    registered.rollback_(list(out), list(kept), status, backend)
