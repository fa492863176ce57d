"""TorchJD's backward functions: m backward passes, whose rows stay where autograd made them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary
from torchjd import autojac
from torchjd.aggregation import Aggregator, GramianWeightedAggregator

from igb_kernels._compile import keep_saved_tensors, uncompiled
from igb_kernels._log import warn_once
from igb_kernels.capture import GradsSetAside, edge_of, explained, leaves, run_backward, take_grads
from igb_kernels.integrations.torchjd._aggregation import aggregate_of, dtype_of, to_write_over
from igb_kernels.ops import COMPLEX_DTYPES, DTYPES, MAX_TASKS, accumulator_dtype
from igb_kernels.peel import Edge, element_edges
from igb_kernels.store import Grads, apart

keep_saved_tensors()

_outgoing: MutableMapping[Tensor, list[Grads]] = WeakTensorKeyDictionary()
"""On the CPU, by the first of their tensors, the rows that `jac_to_grad` has used; the next passes let them go one by
one. Freed all at once, the C library returns them to the system, and every page faults again."""

BATCHED_BYTES = 16 << 20
"""Up to this size, a Jacobian comes from one batched backward pass, where the caller leaves it open: it costs the host
one pass. Beyond, passes one by one are faster, and their rows need no copies."""

# ---- Jacobians ------------------------------------------------------------------------------------------------------


class JacobianRows(Tensor):
    """A Jacobian [m, *shape] in m tensors of this shape, None for zeros. They become one, of which `rows` are views
    then, as soon as it is used as a tensor: it is one to whoever reads `.jac`, and costs no copy where nobody does."""

    rows: Grads
    whole: Tensor | None
    own: bool
    """Whether each row has memory of its own, which may become `.grad`."""

    @staticmethod
    def __new__(cls, rows: Grads, like: Tensor, own: bool = True) -> JacobianRows:
        """From the rows, and the tensor whose gradients they are."""
        size = (len(rows), *like.shape)
        made: JacobianRows = Tensor._make_wrapper_subclass(cls, size, dtype=like.dtype, device=like.device)
        made.rows, made.whole, made.own = rows, None, own
        return made

    def __init__(self, rows: Grads, like: Tensor, own: bool = True) -> None: ...

    def use_up(self) -> None:
        """Says that the rows have been written over."""
        self.rows = []

    def become_whole(self) -> Tensor:
        """The rows as one tensor."""
        if self.whole is None:
            size, dtype, device = self.shape, self.dtype, self.device
            if len(self.rows) != size[0]:
                raise RuntimeError("this .jac has been used up by jac_to_grad: read it before, or give retain_jac=True")
            self.whole = torch.zeros(size, dtype=dtype, device=device)
            views = self.whole.unbind()
            for view, row in zip(views, self.rows, strict=True):
                if row is not None:
                    view.copy_(row)
            self.rows, self.own = list(views), False
        return self.whole

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _OF_THE_SHAPE:
            with _PLAIN():
                return func(*args, **(kwargs or {}))
        return _of_wholes(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _of_wholes(func, args, kwargs)


def _of_wholes(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    args, kwargs = tree_map_only(JacobianRows, JacobianRows.become_whole, (args, kwargs or {}))
    return func(*args, **kwargs)


_PLAIN = torch._C.DisableTorchFunctionSubclass
_OF_THE_SHAPE = {
    Tensor.__len__,
    Tensor.dim,
    Tensor.numel,
    Tensor.size,
    *[getattr(Tensor, name).__get__ for name in ("device", "dtype", "ndim", "shape")],
}
"""What a tensor can be asked without having one memory."""

Jacobian = JacobianRows | Tensor


@dataclass(frozen=True)
class Seeds:
    """From where, and with what, the m backward passes start."""

    number: int
    """m."""
    roots: Sequence[Tensor]
    of_pass: Callable[[int], tuple[Sequence[Tensor | GradientEdge], Sequence[Tensor]]]
    """One pass's roots with seeds that are not zero, and these."""
    batch: Callable[[slice], Sequence[Tensor]]
    """The seeds of some passes, [n, *root.shape] for each root."""


def _jacobians(seeds: Seeds, inputs: Sequence[Tensor], retain_graph: bool, chunk_size: int | None) -> list[Jacobian]:
    """Of the seeds' roots with respect to each input."""
    if not inputs:
        return []
    if any([t.retains_grad for t in (*seeds.roots, *inputs)]):
        chunk_size = 1  # a batch of gradients would stay in their .grad
    if chunk_size is None:
        size = seeds.number * sum([t.nbytes for t in inputs])
        chunk_size = seeds.number if size <= BATCHED_BYTES else 1
    if min(chunk_size, seeds.number) == 1:
        return _in_rows(seeds, inputs, retain_graph)
    starts = range(0, seeds.number, chunk_size)
    chunks = [
        _in_batch(seeds, slice(start, start + chunk_size), inputs, retain_graph or start != starts[-1])
        for start in starts
    ]
    if len(chunks) == 1:
        return list(chunks[0])
    columns = zip(*chunks, strict=True)
    return [JacobianRows(list(chain(*column)), t, own=False) for t, column in zip(inputs, columns, strict=True)]


def _in_rows(seeds: Seeds, inputs: Sequence[Tensor], retain_graph: bool) -> list[Jacobian]:
    """By one pass after the other."""
    rows: list[Grads] = []
    held = [_outgoing.pop(t) for t in inputs if t in _outgoing]
    last = seeds.number - 1
    with GradsSetAside(inputs) as before:
        for k in range(seeds.number):
            roots, of_pass = seeds.of_pass(k)
            if roots:
                run_backward(roots, of_pass, retain_graph or k < last, inputs)  # type: ignore[arg-type]
            rows.append(take_grads(inputs, "inputs"))
            for outgoing in held:
                if outgoing:
                    outgoing.pop()
        before.put_back()
    return [JacobianRows(list(column), t) for t, column in zip(inputs, zip(*rows, strict=True), strict=True)]


def _in_batch(seeds: Seeds, passes: slice, inputs: Sequence[Tensor], retain_graph: bool) -> Sequence[Tensor]:
    """By one pass for several rows."""
    found = explained(
        torch.autograd.grad,
        seeds.roots,
        inputs,
        seeds.batch(passes),
        retain_graph=retain_graph,
        allow_unused=True,
        is_grads_batched=True,
    )
    number = len(range(seeds.number)[passes])
    return [
        t.new_zeros(number, *t.shape) if jacobian is None else jacobian.clone() if 0 in jacobian.stride() else jacobian
        for t, jacobian in zip(inputs, found, strict=True)
    ]


def _add_jacobians(inputs: Sequence[Tensor], jacobians: Sequence[Jacobian]) -> None:
    """To `.jac` of the inputs, out of place: what autograd makes may be shared by several."""
    sums: list[Jacobian] = []
    for t, new in zip(inputs, jacobians, strict=True):
        old = getattr(t, "jac", None)
        if old is not None and old.shape != new.shape:
            raise ValueError(f".jac must have shape {tuple(new.shape)} to be added to, found {tuple(old.shape)}")
        if old is None:
            sums.append(new)
        elif isinstance(old, JacobianRows) and isinstance(new, JacobianRows):
            rows = zip(old.rows, new.rows, strict=True)
            sums.append(JacobianRows([b if a is None else a if b is None else a + b for a, b in rows], t))
        else:
            sums.append(old + new)
    for t, jacobian in zip(inputs, sums, strict=True):
        t.jac = jacobian  # type: ignore[attr-defined]


# ---- TorchJD's functions --------------------------------------------------------------------------------------------


@uncompiled
def backward(
    tensors: Sequence[Tensor] | Tensor,
    /,
    *,
    jac_tensors: Sequence[Tensor] | Tensor | None = None,
    inputs: Iterable[Tensor] | None = None,
    retain_graph: bool = False,
    parallel_chunk_size: int | None = None,
) -> None:
    """Adds the Jacobian of the tensors, one row for each of their elements, to `.jac` of the inputs, as
    `torchjd.autojac.backward` does.

    Hooks on the inputs run in every pass, and find `.grad` of that pass alone.

    Args:
        tensors: what is differentiated, best as a list of scalars.
        jac_tensors: like the tensors, each with m rows in front: the Jacobian is multiplied by them.
        inputs: by default, all leaves of the graph.
        retain_graph: as for `torch.autograd.backward`.
        parallel_chunk_size: how many rows one pass computes; 1: none is batched, as is needed where a tensor on the way
            retains its gradient. None: all of them, where the Jacobian is small (16 MB), else 1.

    Raises:
        ValueError: for arguments that cannot be; whatever raises, `.grad` and `.jac` stay as they were.
    """
    _check_chunk_size(parallel_chunk_size)
    roots = _distinct("tensors", tensors)
    targets = _leaves_of(roots, "tensors") if inputs is None else list(dict.fromkeys(inputs))
    _check_targets(targets, ".jac")
    seeds = _unit_seeds(roots) if jac_tensors is None else _given_seeds(roots, jac_tensors)
    _add_jacobians(targets, _jacobians(seeds, targets, retain_graph, parallel_chunk_size))


@uncompiled
def mtl_backward(
    tensors: Sequence[Tensor],
    /,
    features: Sequence[Tensor] | Tensor,
    *,
    grad_tensors: Sequence[Tensor] | None = None,
    tasks_params: Sequence[Iterable[Tensor]] | None = None,
    shared_params: Iterable[Tensor] | None = None,
    retain_graph: bool = False,
    parallel_chunk_size: int | None = None,
) -> None:
    """Adds the tasks' gradients to `.grad` of their own parameters, and their Jacobian to `.jac` of the shared ones, as
    `torchjd.autojac.mtl_backward` does.

    Each task takes a pass through its head, and one from the features through what is behind them. On the CPU, what
    `jac_to_grad` has used of rows stays until these passes, one by one, need the memory again.

    Hooks on the shared parameters run in every pass, and find `.grad` of that pass alone.

    Args:
        tensors: one for each task: its loss; or not a scalar, with `grad_tensors`.
        features: what the heads take from the shared parameters.
        grad_tensors: like the tensors: where their gradients start from.
        tasks_params: the parameters of each task; by default, the leaves of its graph in front of the features.
        shared_params: by default, the leaves behind the features.
        retain_graph: as for `backward`.
        parallel_chunk_size: how many tasks one pass computes. None: 1, since few passes one by one take less time than
            their arithmetic in a batch.

    Raises:
        ValueError: for arguments that cannot be; whatever raises, `.grad` and `.jac` stay as they were.
    """
    _check_chunk_size(parallel_chunk_size)
    losses, shared_features = _distinct("tensors", tensors), _distinct("features", features)
    starts = _grads_of(losses, grad_tensors)
    shared = _leaves_of(shared_features, "features") if shared_params is None else list(dict.fromkeys(shared_params))
    if tasks_params is None:
        cut = {edge_of(f) for f in shared_features}
        heads = [_leaves_of([loss], "tensors", cut) for loss in losses]
    else:
        heads = [list(dict.fromkeys(params)) for params in tasks_params]
    if len(heads) != len(losses):
        raise ValueError(f"tasks_params must have {len(losses)} entries as tensors has, found {len(heads)}")
    ids = {id(p) for p in shared}
    if any(id(p) in ids for params in heads for p in params):
        raise ValueError(
            "tasks_params must have no tensor in common with shared_params: do features hold all they share?"
        )
    _check_targets(shared, ".jac")
    _check_targets([*chain(*heads)], ".grad")

    of_heads: list[list[Tensor]] = []
    of_features: list[Grads] = []

    def of_pass(k: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        reached = [(f, g) for f, g in zip(shared_features, of_features[k], strict=True) if g is not None]
        return [f for f, _ in reached], [g for _, g in reached]

    def batch(passes: slice) -> Sequence[Tensor]:
        columns = zip(*of_features[passes], strict=True)
        pairs = zip(shared_features, columns, strict=True)
        return [torch.stack([torch.zeros_like(f) if g is None else g for g in column]) for f, column in pairs]

    retaining = [f for f in shared_features if f.retains_grad]
    with GradsSetAside(retaining) as before:
        for loss, start, params in zip(losses, starts, heads, strict=True):
            ends = [*params, *shared_features]
            found = explained(torch.autograd.grad, loss, ends, start, retain_graph=retain_graph, allow_unused=True)
            of_heads.append(_own_memory(params, found, start))
            of_features.append(list(found[len(params) :]))
        of_retaining = [None if f.grad is None else f.grad.clone() for f in retaining]
        seeds = Seeds(len(losses), shared_features, of_pass, batch)
        jacobians = _jacobians(seeds, shared, retain_graph, parallel_chunk_size or 1)
        before.put_back()
    _add_jacobians(shared, jacobians)
    with torch.no_grad():
        grads = zip(chain(retaining, *heads), chain(of_retaining, *of_heads), strict=True)
        for p, grad in grads:
            if grad is not None:
                p.grad = grad if p.grad is None else p.grad.add_(grad)


@uncompiled
def jac_to_grad(
    tensors: Iterable[Tensor],
    /,
    aggregator: Aggregator,
    *,
    retain_jac: bool = False,
    optimize_gramian_computation: bool = False,
) -> Tensor | None:
    """Aggregates `.jac` of the tensors and adds the result to their `.grad`, as `torchjd.autojac.jac_to_grad` does.

    Rows stay where they are, and their Gramian is formed in float64, for every aggregator of this module, for others
    that go by the Gramian, and for Mean, Sum, Constant and Random. Others, and those with hooks that take the matrix,
    get it: the rows are copied into one, as TorchJD does.

    Args:
        tensors: with `.jac` of the same number of rows.
        aggregator: any of TorchJD's or this module's.
        retain_jac: leaves `.jac` as it is; else it is deleted.
        optimize_gramian_computation: where it can be done without the matrix, it is; True raises where it cannot.

    Returns:
        The weights [m], where the aggregator has any; float32 for gradients in half precision, else in their dtype.

    Raises:
        ValueError: for arguments that cannot be. Whatever raises, `.grad` and `.jac` stay as they were. Nothing does
            for rows that are not finite: `.grad` is NaN then, which a GradScaler sees.
    """
    targets = list(tensors)
    jacobians = _jacobians_of(targets)
    aggregate = aggregate_of(aggregator) if _are_rows(targets, jacobians) else None
    if optimize_gramian_computation and not (aggregate and isinstance(aggregator, GramianWeightedAggregator)):
        raise ValueError(
            "optimize_gramian_computation must be False for an aggregator that does not go by the Gramian, or has "
            f"hooks; found {aggregator!r}"
        )
    if aggregate is None:
        warn_once(
            f"jac_to_grad copies rows into one matrix for {type(aggregator).__name__}: it, or a hook on it, takes a "
            f"matrix; or there are more than {MAX_TASKS} rows, or they have another dtype than their tensor"
        )
        weights: Tensor | None = autojac.jac_to_grad(targets, aggregator, retain_jac=retain_jac)
        return weights
    columns = [j.rows if isinstance(j, JacobianRows) else j.unbind() for j in jacobians]
    rows: list[Grads] = [list(row) for row in zip(*columns, strict=True)]
    for p, t in enumerate(targets):
        if all(row[p] is None for row in rows):
            rows[0][p] = torch.zeros_like(t)
    own = [j for j in jacobians if isinstance(j, JacobianRows) and j.own and not retain_jac]
    weights = aggregate(targets, rows if len(own) == len(targets) else to_write_over(targets, rows))
    if not retain_jac:
        for t in targets:
            del t.jac  # type: ignore[attr-defined]
        for j in own:
            j.use_up()
    if len(own) == len(targets) and targets[0].device.type == "cpu":
        _outgoing[targets[0]] = rows[1:]
    return None if weights is None else weights.to(accumulator_dtype(dtype_of(targets).to_real()))


# ---- Arguments ------------------------------------------------------------------------------------------------------


def _check_chunk_size(size: int | None) -> None:
    if size is not None and size < 1:
        raise ValueError(f"parallel_chunk_size must be None or at least 1, found {size}")


def _distinct(argument: str, given: Sequence[Tensor] | Tensor) -> list[Tensor]:
    tensors = [given] if isinstance(given, Tensor) else list(given)
    if not tensors:
        raise ValueError(f"{argument} must hold at least one tensor, found none")
    if len({id(t) for t in tensors}) < len(tensors):
        raise ValueError(f"{argument} must hold each tensor once, found one twice")
    return tensors


def _leaves_of(tensors: Sequence[Tensor], argument: str, cut: Iterable[Any] = ()) -> list[Tensor]:
    for i, t in enumerate(tensors):
        if t.grad_fn is None:
            raise ValueError(f"{argument}[{i}] must be computed from parameters, found a tensor without grad_fn")
    return leaves(map(edge_of, tensors), set(cut))[0]


def _check_targets(targets: Sequence[Tensor], field: str) -> None:
    for t in targets:
        if not (t.requires_grad and (t.is_leaf or t.retains_grad)):
            found = f"shape {tuple(t.shape)}, requires_grad {t.requires_grad}, is_leaf {t.is_leaf}"
            raise ValueError(
                f"{field} is for tensors that require grad and are leaves or retain it, found one of {found}"
            )


def _grads_of(tensors: Sequence[Tensor], given: Sequence[Tensor] | None) -> list[Tensor]:
    """Where the tasks' gradients start from, in memory of their own: gradients can be views of it."""
    if given is None:
        for i, t in enumerate(tensors):
            if t.dim():
                raise ValueError(f"tensors[{i}] must be a scalar where grad_tensors is None, found {tuple(t.shape)}")
        return [torch.ones_like(t) for t in tensors]
    _check_like("grad_tensors", [g.shape for g in given], tensors)
    return [g.detach().clone() for g in given]


def _check_like(argument: str, shapes: Sequence[torch.Size], tensors: Sequence[Tensor]) -> None:
    if len(shapes) != len(tensors):
        raise ValueError(f"{argument} must have {len(tensors)} entries as tensors has, found {len(shapes)}")
    for i, (shape, t) in enumerate(zip(shapes, tensors, strict=True)):
        if shape != t.shape:
            raise ValueError(
                f"{argument}[{i}] must have the shape {tuple(t.shape)} of its tensor, found {tuple(shape)}"
            )


def _given_seeds(tensors: list[Tensor], jac_tensors: Sequence[Tensor] | Tensor) -> Seeds:
    given = [jac_tensors] if isinstance(jac_tensors, Tensor) else list(jac_tensors)
    _check_like("jac_tensors", [g.shape[1:] for g in given], tensors)
    if len({g.shape[0] for g in given}) > 1:
        raise ValueError(f"jac_tensors must have the same number of rows, found {[g.shape[0] for g in given]}")
    return Seeds(
        len(given[0]),
        tensors,
        lambda k: (tensors, [g[k].detach().clone() for g in given]),  # gradients can be views of them
        lambda passes: [g[passes].detach() for g in given],
    )


def _unit_seeds(tensors: list[Tensor]) -> Seeds:
    """One for each element of the tensors."""
    ends = list(accumulate([t.numel() for t in tensors], initial=0))
    if not ends[-1]:
        raise ValueError("tensors must have at least one element, found none")
    starts = cache(lambda: [start for t in tensors for start in _starts_of(t)])

    def of_pass(k: int) -> tuple[Sequence[Tensor | GradientEdge], Sequence[Tensor]]:
        return starts()[k]()

    def batch(passes: slice) -> Sequence[Tensor]:
        rows = range(ends[-1])[passes]
        seeds = []
        for t, (first, end) in zip(tensors, pairwise(ends), strict=True):
            seed = t.new_zeros(len(rows), t.numel())
            start, stop = max(first, rows.start), min(end, rows.stop)
            if start < stop:
                seed[start - rows.start : stop - rows.start, start - first : stop - first].fill_diagonal_(1)
            seeds.append(seed.view(len(rows), *t.shape))
        return seeds

    return Seeds(ends[-1], tensors, of_pass, batch)


Start = Callable[[], tuple[Sequence[Tensor | GradientEdge], Sequence[Tensor]]]
"""Of a pass: its roots, and their seeds."""


def _starts_of(t: Tensor) -> list[Start]:
    """Those of each element's pass. Losses that were put together to one vector start where they came from: through
    the node that joined them, each pass would run all the others' graphs."""
    if t.dim() == 0:
        return [lambda: ([t], [torch.ones_like(t)])]
    if t.dim() == 1 and (edges := element_edges(t)) is not None:
        return [partial(_start_along, edge, t) for edge in edges]

    def start_at(e: int) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        seed = t.new_zeros(t.numel())
        seed[e] = 1
        return [t], [seed.view(t.shape)]

    return [partial(start_at, e) for e in range(t.numel())]


def _start_along(edge: Edge | None, like: Tensor) -> tuple[Sequence[GradientEdge], Sequence[Tensor]]:
    return ([], []) if edge is None else ([GradientEdge(*edge)], [like.new_ones(())])


def _own_memory(params: Sequence[Tensor], found: Sequence[Tensor | None], start: Tensor) -> list[Tensor]:
    """What autograd.grad found for the parameters, in memory that nothing else has: zeros for none."""
    own = apart([g if g is not None and g.layout is torch.strided else None for g in [*found, start]])

    def owned(p: Tensor, g: Tensor | None, is_own: bool) -> Tensor:
        if g is None:
            return torch.zeros_like(p)
        if g.layout is not torch.strided or (is_own and g.is_contiguous()):
            return g
        return torch.empty_like(p, dtype=g.dtype).copy_(g)

    return [owned(p, g, o is not None) for p, g, o in zip(params, found, own, strict=False)]


def _are_rows(tensors: Sequence[Tensor], jacobians: Sequence[Jacobian]) -> bool:
    """Whether the kernels take the Jacobians' rows for the tensors' gradients."""
    known = all([j.dtype is t.dtype in DTYPES + COMPLEX_DTYPES for t, j in zip(tensors, jacobians, strict=True)])
    return known and 1 <= len(jacobians[0]) <= MAX_TASKS


def _jacobians_of(tensors: Sequence[Tensor]) -> list[Jacobian]:
    """Their `.jac`, checked."""
    if not all(hasattr(t, "jac") for t in _distinct("tensors", tensors)):
        raise ValueError("tensors must have .jac, found one without: call backward or mtl_backward before")
    _check_targets(tensors, ".grad")
    jacobians: list[Jacobian] = [t.jac for t in tensors]  # type: ignore[attr-defined]
    first = jacobians[0]
    for i, (t, j) in enumerate(zip(tensors, jacobians, strict=True)):
        if j.shape != (len(first), *t.shape) or j.device != first.device:
            rule = f"shape {(len(first), *t.shape)} and be on {first.device}"
            raise ValueError(f"tensors[{i}].jac must have {rule}, found {tuple(j.shape)}, on {j.device}")
    return jacobians
