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
    probe = _Probe(shape)
    while function is not None and function.name().endswith("CopySlices"):
        before, *sources = function.next_functions
        source = sources[0] if sources else (None, 0)
        if len(sources) > 1:
            raise _NotUnderstoodError
        elements = probe.assigned_by(function, source[0] is not None)
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


class _Probe:
    """Finds the elements to which CopySlices nodes have copied their sources, for a tensor of this shape.

    No attribute tells. So a node is run on a gradient without numbers that takes note of what is done with it: the node
    has copied where that is to pass what came for some elements to the source, and what came for the others to the
    tensor before.
    """

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._parts: list[tuple[_Noted, Place]] = []

    def assigned_by(self, copy: Node, has_source: bool) -> Sequence[int]:
        """The elements, counted row by row."""
        gradient = _Noted(self._shape, self)
        with torch.no_grad():
            passed = copy(gradient)  # type: ignore[operator]
        before, *sources = passed if isinstance(passed, tuple) else (passed,)
        parts, self._parts = self._parts, []
        if len(parts) != 1:
            raise _NotUnderstoodError
        part, (size, stride, offset) = parts[0]
        if before is not None and (before is not gradient or gradient.is_zero or not part.is_zero):
            raise _NotUnderstoodError
        if has_source and getattr(sources[0], "is_zero", True):
            raise _NotUnderstoodError
        if not size:
            return [offset]
        return torch.arange(prod(self._shape)).as_strided(size, stride, offset).flatten().tolist()

    def note(self, operation: Any, noted: _Noted, *arguments: Any) -> _Noted:
        """What an operation on one of its tensors gives; _NotUnderstoodError unless it only passes elements on."""
        if operation is aten.copy_.default and isinstance(arguments[0], _Noted):
            noted.is_zero = arguments[0].is_zero
        elif operation is aten.as_strided.default and tuple(noted.shape) == self._shape:
            noted = _Noted(arguments[0], self, noted.is_zero)
            self._parts.append((noted, arguments))
        elif operation is aten.zeros_like.default:
            noted = _Noted(noted.shape, self, is_zero=True)
        elif operation is aten.clone.default:
            noted = _Noted(noted.shape, self, noted.is_zero)
        elif operation is aten.new_empty_strided.default and _is_contiguous(*arguments):
            if self._parts or tuple(arguments[0]) != self._shape:  # else it is to be a copy, and no better
                raise _NotUnderstoodError
        elif operation is not aten._to_copy.default:
            raise _NotUnderstoodError
        return noted


Place = tuple[Sequence[int], Sequence[int], int]
"""Of a part: its sizes, strides and offset in the whole."""


class _Noted(Tensor):
    """A tensor without numbers that holds zeros or (a part of) a gradient, and tells a probe what is done with it."""

    probe: _Probe
    is_zero: bool

    @staticmethod
    def __new__(cls, shape: Sequence[int], probe: _Probe, is_zero: bool = False) -> _Noted:
        noted: _Noted = Tensor._make_wrapper_subclass(cls, shape, device=torch.device("meta"))
        noted.probe, noted.is_zero = probe, is_zero
        return noted

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> _Noted:
        noted: _Noted = args[0]
        return noted.probe.note(operation, *args)


def _is_contiguous(size: Sequence[int], stride: Sequence[int]) -> bool:
    return all([step == prod(size[i + 1 :]) for i, step in enumerate(stride)])
