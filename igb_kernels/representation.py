"""A shared representation at which task gradients are compared, in place of the parameters behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from igb_kernels.capture import GradsSetAside, Roots, TaskLosses, edge_of, explained, leaves


class Representation:
    """Tensors through which all that the tasks share reaches their heads.

    Within the context, `backward` is a pass that ends at them, and at the leaves in front; their gradients come to
    `.grad` of leaves that stand for them. `pass_on` takes these, combined, to all that is behind.
    """

    def __init__(
        self,
        representation: Tensor | Sequence[Tensor],
        tasks: TaskLosses,
        shared: Sequence[Tensor],
        owners: Callable[[list[Tensor]], list[Tensor]],
    ) -> None:
        """Checks that the tensors cut the losses' graphs, so that no gradient is lost or counted twice. `owners` are
        the parameters that leaves of the graphs stand for."""
        self.tensors: list[Tensor] = [representation] if isinstance(representation, Tensor) else list(representation)
        if not self.tensors:
            raise ValueError("representation must hold at least one tensor, found none")
        for i, z in enumerate(self.tensors):
            label = "representation" if len(self.tensors) == 1 else f"representation[{i}]"
            if not isinstance(z, Tensor):
                raise TypeError(f"{label} must be a tensor, found {type(z).__name__}")
            if z.grad_fn is None:
                raise ValueError(f"{label} must be computed from the shared parameters, found a tensor without graph")
        cut = {edge_of(z) for z in self.tensors}
        if len(cut) < len(self.tensors):
            raise ValueError("representation must hold each tensor once, found one twice")
        self._leaves, reached = leaves(map(edge_of, tasks.roots), cut)
        self.heads = owners(self._leaves)
        """The parameters in front."""
        index = {id(p): i for i, p in enumerate(shared)}
        if around := [index[id(p)] for p in self.heads if id(p) in index]:
            raise ValueError(
                "representation must be all that the losses take from the shared parameters, found that they reach "
                f"shared[{min(around)}] around it"
            )
        if not reached:
            raise ValueError("representation must be what the losses are computed from, found none that depends on it")
        behind = [edge for z in self.tensors if z.grad_fn is not None for edge in z.grad_fn.next_functions]
        if len(self.tensors) > 1 and leaves(behind, cut)[1]:
            raise ValueError("representation must hold tensors that do not depend on each other, found one that does")
        self.params = [z.detach().requires_grad_() for z in self.tensors]
        """They stand for the tensors, and share their memory."""
        self._retained = [z for z in self.tensors if z.retains_grad]
        self._before = GradsSetAside([*shared, *self.heads, *self._retained])  # until all has gone well

    def __enter__(self) -> Representation:
        self._before.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._before.__exit__(*raised)
        if raised[0] is None:
            self._before.add_back()

    def backward(self, roots: Roots, seeds: Tensor | Sequence[Tensor], retain_graph: bool) -> None:
        """A backward pass from these roots."""
        if any(p is not leaf for p, leaf in zip(self.heads, self._leaves, strict=True)):
            self._backward_in_place(roots, seeds, retain_graph)
            return
        ends = [*self.tensors, *self.heads]
        # As inputs of `torch.autograd.backward`, what computed the tensors would be run too: a compiled encoder whole.
        grads = explained(torch.autograd.grad, roots, ends, seeds, retain_graph=retain_graph, allow_unused=True)
        for p, grad in zip([*self.params, *self.heads], grads, strict=True):
            if grad is not None:
                _accumulate(p, grad)

    def _backward_in_place(self, roots: Roots, seeds: Tensor | Sequence[Tensor], retain_graph: bool) -> None:
        """As `backward`, where leaves are not the parameters: what comes to them is taken on as soon as a pass ends."""
        ends = [*self.tensors, *self._leaves]
        # The nodes that computed the tensors are run, and are needed again.
        explained(torch.autograd.backward, roots, seeds, retain_graph=True, inputs=ends)
        for p, z in zip(self.params, self.tensors, strict=True):
            grad, z.grad = z.grad, None
            if grad is not None:
                _accumulate(p, grad)

    def pass_on(self, retain_graph: bool) -> None:
        """One backward pass behind the tensors."""
        for z in self._retained:
            z.grad = None  # the passes have left theirs
        reached = [(z, p.grad) for z, p in zip(self.tensors, self.params, strict=True) if p.grad is not None]
        if reached:
            explained(torch.autograd.backward, *map(list, zip(*reached, strict=True)), retain_graph=retain_graph)
        for z in self.tensors:
            if not any(z is kept for kept in self._retained) and z.retains_grad:
                z.grad = None


def _accumulate(p: Tensor, grad: Tensor) -> None:
    """As autograd does, to memory of the leaf's own: what the engine hands out may be shared with anything."""
    if p.grad is not None:
        p.grad = p.grad + grad if p.grad.layout is not torch.strided else p.grad.add_(grad)
    elif grad.layout is torch.strided:
        p.grad = torch.empty_like(p, dtype=grad.dtype).copy_(grad)
    else:
        p.grad = grad.clone()
    for hook in (p._post_accumulate_grad_hooks or {}).values():
        hook(p)
