"""Along which edge of the graph each element of a vector of losses comes.

`torch.stack` arranges numbers and computes nothing; so does `losses[k] = loss`, which leaves a chain of CopySlices
nodes. A backward pass that starts below them runs its own task's head alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

aten = torch.ops.aten

Edge = tuple[Node, int]
"""Into a node of a graph: which of its outputs' gradients comes along it."""
Edges = list[Edge | None]
"""Of the elements of a tensor, row by row; None: no gradient goes there."""
Shape = tuple[int, ...]


def element_edges(vector: Tensor) -> Edges | None:
    """The edges along which the elements' gradients go on, each of shape []; None where the graph is not understood, or
    where someone listens to the vector's own gradient. Reads no numbers, so that nothing waits for a GPU."""
    if vector.grad_fn is None or vector.retains_grad or vector._backward_hooks:
        return None
    try:
        edges = _edges_of(vector.grad_fn, vector.output_nr, tuple(vector.shape))
        if any(edge is not None and _made_by(edge).device != vector.device for edge in edges):
            return None  # its pass would start on another device
    except _NotUnderstoodError:
        return None
    return edges


class _NotUnderstoodError(Exception):
    """A node may do more than arrange elements."""


def _made_by(edge: Edge) -> Any:
    """Shape, dtype and device of what comes along the edge."""
    function, output = edge
    return function._input_metadata[output]


def _edges_of(function: Node | None, output: int, shape: Shape | None = None) -> Edges:
    """Those of a tensor whose gradient enters `function`; the shape must be given where that may be None."""
    if function is None:
        if shape is None:
            raise _NotUnderstoodError
        return [None] * prod(shape)
    if shape is None:
        shape = tuple(int(size) for size in _made_by((function, output)).shape)
    if shape == ():
        return [(function, output)]
    arranged = _ARRANGING.get(function.name().rpartition("::")[2])
    if arranged is None:
        raise _NotUnderstoodError
    edges = arranged(function, shape)
    if len(edges) != prod(shape):
        raise _NotUnderstoodError
    return edges


def _of_stack(stack: Any, shape: Shape) -> Edges:
    if len(shape) > 1 and stack._saved_dim != 0:
        raise _NotUnderstoodError
    return [edge for function, output in stack.next_functions for edge in _edges_of(function, output, shape[1:])]


def _of_joined(cat: Node, shape: Shape) -> Edges:
    if len(shape) > 1:
        raise _NotUnderstoodError
    return [edge for part in cat.next_functions for edge in _edges_of(*part)]


def _of_reshaped(view: Node, shape: Shape) -> Edges:
    return _edges_of(*view.next_functions[0])


def _of_row(select: Any, shape: Shape) -> Edges:
    """One of stacked vectors."""
    sizes = tuple(select._saved_self_sym_sizes)
    stack = select.next_functions[0][0]
    while stack is not None and _ARRANGING.get(stack.name()) is _of_reshaped:  # `squeeze` where there was nothing to
        if tuple(_made_by(stack.next_functions[0]).shape) != sizes:
            break
        stack = stack.next_functions[0][0]
    if select._saved_dim != 0 or stack is None or stack.name() != "StackBackward0" or stack._saved_dim != 0:
        raise _NotUnderstoodError
    function, output = stack.next_functions[select._saved_index]
    return _edges_of(function, output, shape)


def _of_assigned(copy: Node, shape: Shape) -> Edges:
    """Each element's last assignment, along the chain of them; other elements are those of the tensor before."""
    found: dict[int, Edge | None] = {}
    function: Node | None = copy
    output = 0
    while function is not None and function.name().endswith("CopySlices"):
        before, *sources = function.next_functions
        source = sources[0] if sources else (None, 0)
        if len(sources) > 1:
            raise _NotUnderstoodError
        elements = _assigned_by(function, shape, source[0] is not None)
        edges = [None] * len(elements) if source[0] is None else _edges_of(*source)
        if len(edges) != len(elements):
            raise _NotUnderstoodError
        for element, edge in zip(elements, edges, strict=True):
            found.setdefault(element, edge)
        function, output = before
    if len(found) < prod(shape):
        found = dict(enumerate(_edges_of(function, output, shape))) | found
    return [found[element] for element in range(prod(shape))]


_ARRANGING: Mapping[str, Callable[[Node, Shape], Edges]] = {
    "StackBackward0": _of_stack,
    "CatBackward0": _of_joined,
    "SelectBackward0": _of_row,
    "CopySlices": _of_assigned,
    **dict.fromkeys(("SqueezeBackward0", "SqueezeBackward1", "UnsqueezeBackward0", "ViewBackward0"), _of_reshaped),
    **dict.fromkeys(("UnsafeViewBackward0", "ReshapeAliasBackward0", "AliasBackward0", "CloneBackward0"), _of_reshaped),
}


def _assigned_by(copy: Node, shape: Shape, has_source: bool) -> Sequence[int]:
    """The elements, counted row by row, to which a CopySlices node has copied its source.

    No attribute tells. So the node is run on a gradient without numbers that notes what is done with it: it has copied
    where that is to pass what came for some elements to the source, and what came for the others to the tensor before.
    """
    parts: list[Part] = []
    gradient = _Noted(shape, "gradient", parts)
    with torch.no_grad():
        passed = copy(gradient)  # type: ignore[operator]
    before, *sources = passed if isinstance(passed, tuple) else (passed,)
    if len(parts) != 1 or parts[0][1].shape != shape:
        raise _NotUnderstoodError
    part, whole, (size, stride, offset) = parts[0]
    if before is not None and (before is not whole or (whole.content, part.content) != ("gradient", "zeros")):
        raise _NotUnderstoodError
    if has_source and (getattr(sources[0], "content", None) != "gradient" or sources[0].shape != part.shape):
        raise _NotUnderstoodError
    return torch.arange(prod(shape)).as_strided(size, stride, offset).flatten().tolist() if size else [offset]


Part = tuple["_Noted", "_Noted", tuple[Sequence[int], Sequence[int], int]]
"""A part, the whole, and the part's sizes, strides and offset there."""


class _Noted(Tensor):
    """A tensor without numbers that knows whether it holds a gradient or zeros, and takes note of parts."""

    content: str
    parts: list[Part]
    """Of all that came from the same gradient."""

    @staticmethod
    def __new__(cls, shape: Sequence[int], content: str, parts: list[Part]) -> _Noted:
        noted: _Noted = Tensor._make_wrapper_subclass(cls, shape, device=torch.device("meta"))
        noted.content, noted.parts = content, parts
        return noted

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> _Noted:
        noted: _Noted = args[0]
        if func is aten.copy_.default and isinstance(args[1], _Noted):
            noted.content = args[1].content
            return noted
        if func is aten.new_empty_strided.default and _is_contiguous(*args[1:3]):
            return _Noted(args[1], "nothing", noted.parts)
        if func is aten.as_strided.default:
            part = _Noted(args[1], noted.content, noted.parts)
            noted.parts.append((part, noted, args[1:4]))
            return part
        if func is aten.zeros_like.default:
            return _Noted(noted.shape, "zeros", noted.parts)
        if func in (aten.clone.default, aten._to_copy.default):
            return _Noted(noted.shape, noted.content, noted.parts)
        raise _NotUnderstoodError


def _is_contiguous(size: Sequence[int], stride: Sequence[int]) -> bool:
    return all(step == prod(size[i + 1 :]) for i, step in enumerate(stride))
