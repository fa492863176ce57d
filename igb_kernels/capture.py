"""How K task gradients are obtained: the losses are read, and each runs its own backward pass.

A loss scale is the seed of its pass, so that scaling costs nothing. `p.grad` is taken after each pass: autograd hands
its buffer over without a copy, and it is right also for tied weights and parameters that a pass does not reach.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import copy
from functools import partial, reduce
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from igb_kernels._compile import REMEDY, is_about_donated_buffers
from igb_kernels._log import warn_once
from igb_kernels.peel import element_edges

Losses = Sequence[Tensor | None] | Mapping[str, Tensor | None] | Tensor


class TaskLosses:
    """The losses of a step: the tasks' names, values, and the graph nodes from which backward passes start.

    A task without a loss, or with one that does not require grad, is missing; everything here is of the others alone.
    """

    def __init__(
        self,
        losses: Losses,
        names: tuple[str, ...] | None,
        argument: str = "losses",
        *,
        need_graph: bool = True,
        only: Sequence[int] | None = None,
        tasks: tuple[int, str] | None = None,
        elsewhere: torch.device | None = None,
    ) -> None:
        """Reads and checks `losses`, which messages call `argument`.

        Args:
            names: those known before, if any.
            need_graph: without, there are only names and values.
            only: reads no other tasks than these, which must be there.
            tasks: K and where that is known from, if it is.
            elsewhere: where the losses are if all of them are missing, since other processes may have some; None: then
                that is an error.
        """
        self._elsewhere = elsewhere
        self._argument, self._need_graph, self._only = argument, need_graph, only
        self.names: tuple[str, ...] | None = None
        if isinstance(losses, Mapping):
            self.names = tuple(losses) if names is None else names
            if unknown := [name for name in losses if name not in self.names]:
                raise ValueError(
                    f"{argument} must have no other tasks than {list(self.names)}, found {unknown}: name those that "
                    "come later by Balancer(tasks=[...])"
                )
            losses = [losses.get(name) for name in self.names]
        self._whole: Tensor | None = None
        self.active: tuple[int, ...] | None = None
        """The tasks that are there, None: all."""
        if isinstance(losses, Tensor):
            self._read_vector(losses, tasks)
        else:
            self._read_scalars(list(losses), tasks)

    def among(self, ids: Sequence[int]) -> TaskLosses:
        """The same as those of a step of the tasks `ids`, of which other processes have what is missing here: the
        passes of these do nothing."""
        roots = dict(zip(self.ids, self.roots, strict=True))
        whole = copy(self)
        whole.roots = [roots.get(k) for k in ids]
        whole.active = None if len(ids) == self.total else tuple(ids)
        return whole

    def _read_scalars(self, losses: list[Tensor | None], tasks: tuple[int, str] | None) -> None:
        if not losses:
            raise ValueError(f"{self._argument} must hold at least one loss, found none")
        scalars: list[Tensor] = []
        ids: list[int] = []
        for k, loss in enumerate(losses):
            if loss is None or (self._only is not None and k not in self._only):
                continue
            if not isinstance(loss, Tensor):
                raise TypeError(f"{self._label(k)} must be a tensor or None, found {type(loss).__name__}")
            if loss.numel() != 1:
                raise ValueError(f"{self._label(k)} must be a scalar, found shape {tuple(loss.shape)}")
            if not loss.dtype.is_floating_point:
                raise TypeError(f"{self._label(k)} must have a floating dtype, found {loss.dtype}")
            if self._need_graph and not loss.requires_grad:
                continue
            if scalars and loss.device != scalars[0].device:
                raise ValueError(f"{self._label(k)} must be on {scalars[0].device} like the first, found {loss.device}")
            scalars.append(loss)
            ids.append(k)
        self._check_number(len(losses), tasks)
        self._check_there(ids)
        self.roots: list[Tensor | GradientEdge | None] = list(scalars)
        """Where the passes start; None: no pass."""
        self._alike = all(loss.dim() == 0 and loss.dtype is scalars[0].dtype for loss in scalars)
        with torch.no_grad():
            if not scalars:
                self.values = torch.empty(0, device=self._elsewhere)
            elif self._alike:
                self.values = torch.stack(scalars)
            else:
                dtype = reduce(torch.promote_types, (loss.dtype for loss in scalars))
                self.values = torch.stack([loss.reshape(()).to(dtype) for loss in scalars])

    def _read_vector(self, losses: Tensor, tasks: tuple[int, str] | None) -> None:
        if losses.dim() != 1 or len(losses) == 0:
            raise ValueError(
                f"{self._argument} must be a 1-D tensor of at least one loss, found shape {tuple(losses.shape)}"
            )
        if not losses.dtype.is_floating_point:
            raise TypeError(f"{self._argument} must have a floating dtype, found {losses.dtype}")
        self._check_number(len(losses), tasks)
        self.values, self.roots = losses.detach(), [losses] * len(losses)
        if not self._need_graph:
            ids = list(range(len(losses)) if self._only is None else self._only)
        elif not losses.requires_grad or losses.grad_fn is None:
            raise ValueError(f"{self._argument} must require grad: they do not depend on any parameter")
        else:
            edges = element_edges(losses)
            if edges is not None:
                # Each element starts its own pass; through the vector, every pass would run all K heads.
                ids = [k for k, edge in enumerate(edges) if edge is not None]
                self.roots = [GradientEdge(*edge) for edge in edges if edge is not None]
            else:
                warn_once(
                    "losses came as one tensor that is more than scalars put together by torch.stack, torch.cat or "
                    "losses[k] = loss: every backward pass runs all tasks' heads. A list of scalar losses avoids that"
                )
                ids, self._whole = list(range(len(losses))), losses
        self._check_there(ids)
        if len(ids) < len(losses):
            self.values = torch.stack([self.values[k] for k in ids])
        self._alike = True

    def _check_number(self, found: int, tasks: tuple[int, str] | None) -> None:
        self.total = found
        """K, with the tasks that are missing."""
        if tasks is not None and found != tasks[0]:
            raise ValueError(
                f"{self._argument} must hold {tasks[0]} tasks {tasks[1]}, found {found}; None stands for a missing one"
            )

    def _check_there(self, ids: list[int]) -> None:
        """Notes which tasks are there; ValueError where none is, or not those that must be."""
        if self._only is not None and len(ids) != len(self._only):
            raise ValueError(
                f"{self._argument} must hold the losses of the tasks {[self._name(k) for k in self._only]} as the last "
                f"step's did, found those of {[self._name(k) for k in ids]}"
            )
        if not ids and self._elsewhere is None:
            rule = "one loss that requires grad" if self._need_graph else "one loss"
            raise ValueError(f"{self._argument} must hold at least {rule}, found {self.total} tasks without")
        if len(ids) < self.total:
            self.active = tuple(ids)

    def _name(self, k: int) -> str | int:
        return k if self.names is None else self.names[k]

    def _label(self, k: int) -> str:
        return f"{self._argument}[{self._name(k)!r}]"

    def __len__(self) -> int:
        """A, the tasks that are there."""
        return len(self.roots)

    @property
    def ids(self) -> Sequence[int]:
        """The tasks that are there, ascending."""
        return range(self.total) if self.active is None else self.active

    def seeds(self, scales: Tensor) -> list[Tensor]:
        """The seed of each pass from the loss scales [K]."""
        if self._whole is not None:
            return list(torch.diag(scales).unbind())
        if self._alike:
            return list(scales.unbind())
        return [
            scale.to(loss.dtype).reshape(loss.shape) if isinstance(loss, Tensor) else scale
            for scale, loss in zip(scales.unbind(), self.roots, strict=True)
        ]


Roots = Tensor | GradientEdge | Sequence[Tensor]
Backward = Callable[[Roots, Tensor | Sequence[Tensor], bool], None]
"""A backward pass from these roots with these seeds; whether it keeps the graph."""


def run_backward(
    roots: Roots, seeds: Tensor | Sequence[Tensor], retain_graph: bool, inputs: Sequence[Tensor] | None = None
) -> None:
    """As `torch.autograd.backward`."""
    explained(torch.autograd.backward, roots, seeds, retain_graph=retain_graph, inputs=inputs)


def into(params: Sequence[Tensor]) -> Backward:
    """A backward pass whose gradients go to these parameters alone."""
    return partial(run_backward, inputs=[p for p in params if p.requires_grad])


def explained(engine: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls autograd's engine; where it fails for donated buffers, the error says what to do."""
    try:
        return engine(*args, **kwargs)
    except RuntimeError as error:
        if is_about_donated_buffers(error):
            raise RuntimeError(REMEDY) from error
        raise


def backward_passes(
    losses: TaskLosses, scales: Tensor, retain_graph: bool, backward: Backward = run_backward
) -> list[Callable[[], None]]:
    """The K backward passes, to be run one after the other."""
    last = max((k for k, root in enumerate(losses.roots) if root is not None), default=0)
    seeds = losses.seeds(scales.clone())  # a gradient can be a view of its pass's seed, and may be written over
    return [
        _nothing if root is None else partial(backward, root, seed, retain_graph or k < last)
        for k, (root, seed) in enumerate(zip(losses.roots, seeds, strict=True))
    ]


def _nothing() -> None:
    """The pass of a task that only other processes have."""


def task_passes(
    losses: TaskLosses,
    scales: Tensor,
    params: Sequence[Tensor],
    retain_graph: bool,
    *,
    backward: Backward = run_backward,
    onto: Sequence[Sequence[Tensor | None]] = (),
) -> Iterator[list[Tensor | None]]:
    """Runs the K backward passes and yields after each the gradients of `params`, taken from them; `onto` are
    gradients to which autograd adds those of each task."""
    for k, run in enumerate(backward_passes(losses, scales, retain_graph, backward)):
        if onto:
            for p, grad in zip(params, onto[k], strict=True):
                p.grad = grad
        run()
        yield take_grads(params)


def joint_pass(losses: TaskLosses, scales: Tensor, retain_graph: bool, backward: Backward = run_backward) -> None:
    """One backward pass of Σ_k scales_k L_k; gradients stay where it puts them."""
    scales = scales.clone()  # a gradient can be a view of its pass's seed
    if losses._whole is not None:
        backward(losses._whole, scales, retain_graph)
    else:
        there = [
            (root, seed) for root, seed in zip(losses.roots, losses.seeds(scales), strict=True) if root is not None
        ]
        if there:
            roots, seeds = zip(*there, strict=True)
            backward(cast(Sequence[Tensor], roots), list(seeds), retain_graph)  # the stub knows no mixture


def take_grads(params: Sequence[Tensor], argument: str = "shared", first: int = 0) -> list[Tensor | None]:
    """The parameters' gradients, as plain memory; they lose them. Messages count from `first`."""
    grads = in_plain_memory([p.grad for p in params], argument, first)
    for p, grad in zip(params, grads, strict=True):
        if grad is not None:
            p.grad = None
    return grads


def in_plain_memory(grads: list[Tensor | None], argument: str, first: int = 0) -> list[Tensor | None]:
    """The gradients, with a copy of each that is more than numbers at an address: sparse ones, and those that PyTorch
    is yet to conjugate or negate. `argument` names the parameters."""
    strided = torch.strided
    odd = [i for i, g in enumerate(grads) if g is not None and (g.layout is not strided or g.is_neg() or g.is_conj())]
    plain = list(grads) if odd else grads
    for i in odd:
        grad = grads[i]
        assert grad is not None
        if grad.layout is strided:
            plain[i] = grad.resolve_neg().resolve_conj()
            continue
        warn_once(
            f"{argument}[{first + i}], of shape {tuple(grad.shape)}, has sparse gradients: a task's gradients are "
            "compared and summed whole, so each is made dense, at the cost of memory and time for all rows, and so is "
            ".grad"
        )
        plain[i] = grad.to_dense()
    return plain


Edge = tuple[Node | None, int]
"""Into a node of a graph: which of its outputs' gradients comes along it."""


def edge_of(tensor: Tensor | GradientEdge | None) -> Edge:
    """Along which the tensor's gradient enters its graph."""
    if tensor is None:
        return (None, 0)
    return (tensor.node, tensor.output_nr) if isinstance(tensor, GradientEdge) else (tensor.grad_fn, tensor.output_nr)


def leaves(edges: Iterable[Edge], cut: Collection[Edge] = ()) -> tuple[list[Tensor], bool]:
    """The leaf tensors into which a backward pass along the edges accumulates gradients, where it ends at those of
    `cut`; and whether it comes to one of these."""
    seen, found, at_cut = set(), [], False
    stack = [*edges]
    while stack:
        edge = stack.pop()
        if edge in cut:
            at_cut = True
            continue
        node = edge[0]
        if node is None or node in seen:
            continue
        seen.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            found.append(variable)
        stack.extend(node.next_functions)
    return found, at_cut


class GradsSetAside:
    """Within the context, `.grad` of the parameters starts as None; what it was is in `previous`, and comes back if
    the body raises."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = params

    def __enter__(self) -> GradsSetAside:
        self._found = [p.grad for p in self._params]
        self.previous = self._found
        for p, grad in zip(self._params, self._found, strict=True):
            if grad is not None:
                p.grad = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.put_back()

    def put_back(self) -> None:
        """Makes `.grad` what it was."""
        for p, grad in zip(self._params, self._found, strict=True):
            p.grad = grad

    def make_plain(self, argument: str) -> None:
        """Puts `previous` in plain memory, where it is to be written to."""
        self.previous = in_plain_memory(self._found, argument)

    def add_back(self) -> None:
        """Adds the new gradients to those set aside, in place where both are dense, as autograd would."""
        for p, previous in zip(self._params, self.previous, strict=True):
            if previous is None:
                continue
            if p.grad is None:
                p.grad = previous
            elif previous.layout is torch.strided:
                p.grad = previous.add_(p.grad)
            else:
                p.grad = p.grad + previous
