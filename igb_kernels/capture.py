"""How K task gradients are obtained: the losses are read, and each runs its own backward pass.

A loss scale is the seed of its pass, so that scaling costs nothing. `p.grad` is taken after each pass: autograd hands
its buffer over without a copy, and it is right also for tied weights and parameters that a pass does not reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial, reduce
from types import TracebackType
from typing import cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from igb_kernels._compile import REMEDY, is_about_donated_buffers
from igb_kernels._log import warn_once

Losses = Sequence[Tensor] | Mapping[str, Tensor] | Tensor


class TaskLosses:
    """K losses: their names, values, and the graph nodes from which their backward passes start."""

    def __init__(
        self,
        losses: Losses,
        names: tuple[str, ...] | None,
        argument: str = "losses",
        *,
        need_graph: bool = True,
    ) -> None:
        """Reads and checks `losses`, which messages call `argument`; `names` are those known before, if any.

        Without need for a graph there are only names and values.
        """
        self._argument, self._need_graph = argument, need_graph
        self.names: tuple[str, ...] | None = None
        if isinstance(losses, Mapping):
            self.names = tuple(losses) if names is None else names
            if set(self.names) != set(losses):
                raise ValueError(
                    f"{argument} must have the tasks {list(self.names)} of earlier steps, found {list(losses)}"
                )
            losses = [losses[name] for name in self.names]
        self._whole: Tensor | None = None
        if isinstance(losses, Tensor):
            self._read_vector(losses)
        else:
            self._read_scalars(losses)

    def _read_scalars(self, losses: Iterable[Tensor]) -> None:
        scalars = list(losses)
        if not scalars:
            raise ValueError(f"{self._argument} must hold at least one loss, found none")
        for k, loss in enumerate(scalars):
            if not isinstance(loss, Tensor):
                raise TypeError(f"{self._label(k)} must be a tensor, found {type(loss).__name__}")
            if loss.numel() != 1:
                raise ValueError(f"{self._label(k)} must be a scalar, found shape {tuple(loss.shape)}")
            if not loss.dtype.is_floating_point:
                raise TypeError(f"{self._label(k)} must have a floating dtype, found {loss.dtype}")
            if self._need_graph and not loss.requires_grad:
                raise ValueError(f"{self._label(k)} must require grad: it does not depend on any parameter")
            if loss.device != scalars[0].device:
                raise ValueError(f"{self._label(k)} must be on {scalars[0].device} like the first, found {loss.device}")
        self.roots: list[Tensor | GradientEdge] = list(scalars)
        self._alike = all(loss.dim() == 0 and loss.dtype is scalars[0].dtype for loss in scalars)
        with torch.no_grad():
            if self._alike:
                self.values = torch.stack(scalars)
            else:
                dtype = reduce(torch.promote_types, (loss.dtype for loss in scalars))
                self.values = torch.stack([loss.reshape(()).to(dtype) for loss in scalars])

    def _read_vector(self, losses: Tensor) -> None:
        if losses.dim() != 1 or len(losses) == 0:
            raise ValueError(
                f"{self._argument} must be a 1-D tensor of at least one loss, found shape {tuple(losses.shape)}"
            )
        if not losses.dtype.is_floating_point:
            raise TypeError(f"{self._argument} must have a floating dtype, found {losses.dtype}")
        self.values, self.roots = losses.detach(), [losses] * len(losses)
        if not self._need_graph:
            return
        if not losses.requires_grad or losses.grad_fn is None:
            raise ValueError(f"{self._argument} must require grad: they do not depend on any parameter")
        node: Node = losses.grad_fn
        edges = node.next_functions if node.name() == "StackBackward0" else ()
        for k, (function, _) in enumerate(edges):
            if function is None:
                raise ValueError(f"{self._label(k)} must require grad: it does not depend on any parameter")
        if len(edges) == len(losses):
            # Each stacked scalar starts its own pass; through the stack node, every pass would run all K heads.
            self.roots = [GradientEdge(function, output) for function, output in edges if function is not None]
        else:
            warn_once(
                "losses came as one tensor that torch.stack did not make: every backward pass runs all tasks' heads. "
                "A list of scalar losses avoids that"
            )
            self._whole = losses
        self._alike = True

    def _label(self, k: int) -> str:
        return f"{self._argument}[{k if self.names is None else repr(self.names[k])}]"

    def __len__(self) -> int:
        return len(self.roots)

    def seeds(self, scales: Tensor) -> list[Tensor]:
        """The seed of each pass from the loss scales [K]."""
        if self._whole is not None:
            return list(torch.diag(scales).unbind())
        if self._alike:
            return list(scales.unbind())
        return [
            scale.to(loss.dtype).reshape(loss.shape)
            for scale, loss in zip(scales.unbind(), self.roots, strict=True)
            if isinstance(loss, Tensor)
        ]


def backward_passes(
    losses: TaskLosses, scales: Tensor, retain_graph: bool, inputs: Sequence[Tensor] | None = None
) -> list[Callable[[], None]]:
    """The K backward passes, to be run one after the other; into `inputs` alone if given."""
    last = len(losses) - 1
    seeds = losses.seeds(scales.clone())  # a gradient can be a view of its pass's seed, and may be written over
    return [
        partial(_backward, root, seed, retain_graph or k < last, inputs)
        for k, (root, seed) in enumerate(zip(losses.roots, seeds, strict=True))
    ]


def task_passes(
    losses: TaskLosses,
    scales: Tensor,
    params: Sequence[Tensor],
    retain_graph: bool,
    *,
    into_params_only: bool = False,
    onto: Sequence[Sequence[Tensor | None]] = (),
) -> Iterator[list[Tensor | None]]:
    """Runs the K backward passes and yields after each the gradients of `params`, taken from them; `onto` are
    gradients to which autograd adds those of each task."""
    inputs = [p for p in params if p.requires_grad] if into_params_only else None
    for k, run in enumerate(backward_passes(losses, scales, retain_graph, inputs)):
        if onto:
            for p, grad in zip(params, onto[k], strict=True):
                p.grad = grad
        run()
        yield take_grads(params)


def joint_pass(losses: TaskLosses, scales: Tensor, retain_graph: bool, inputs: Sequence[Tensor] | None = None) -> None:
    """One backward pass of Σ_k scales_k L_k, into `inputs` alone if given; gradients stay where autograd puts them."""
    scales = scales.clone()  # a gradient can be a view of its pass's seed
    if losses._whole is not None:
        _backward(losses._whole, scales, retain_graph, inputs)
    else:
        roots = cast(Sequence[Tensor], losses.roots)  # the stub knows no mixture
        _backward(roots, losses.seeds(scales), retain_graph, inputs)


def _backward(
    roots: Tensor | GradientEdge | Sequence[Tensor],
    seeds: Tensor | Sequence[Tensor],
    retain_graph: bool,
    inputs: Sequence[Tensor] | None,
) -> None:
    try:
        torch.autograd.backward(roots, seeds, retain_graph=retain_graph, inputs=inputs)
    except RuntimeError as error:
        if is_about_donated_buffers(error):
            raise RuntimeError(REMEDY) from error
        raise


def take_grads(params: Sequence[Tensor], argument: str = "shared", first: int = 0) -> list[Tensor | None]:
    """The parameters' gradients, as plain memory; they lose them. Messages count from `first`."""
    grads = in_plain_memory([p.grad for p in params], argument, first)
    for p, grad in zip(params, grads, strict=True):
        if grad is not None:
            p.grad = None
    return grads


def in_plain_memory(grads: Sequence[Tensor | None], argument: str, first: int = 0) -> list[Tensor | None]:
    """The gradients, with a copy of each that is more than numbers at an address: sparse ones, and those that PyTorch
    is yet to conjugate or negate. `argument` names the parameters."""
    plain = list(grads)
    for i, grad in enumerate(grads):
        if grad is None:
            continue
        if grad.layout is not torch.strided:
            warn_once(
                f"{argument}[{first + i}], of shape {tuple(grad.shape)}, has sparse gradients: a task's gradients are "
                "compared and summed whole, so each is made dense, at the cost of memory and time for all rows, and "
                "so is .grad"
            )
            plain[i] = grad.to_dense()
        elif grad.is_neg() or grad.is_conj():
            plain[i] = grad.resolve_neg().resolve_conj()
    return plain


def leaves(losses: TaskLosses) -> list[Tensor]:
    """The leaf tensors that the losses' graphs accumulate gradients into."""
    seen, found = set(), []
    stack = [root.node if isinstance(root, GradientEdge) else root.grad_fn for root in losses.roots]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            found.append(variable)
        stack.extend(function for function, _ in node.next_functions)
    return found


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
