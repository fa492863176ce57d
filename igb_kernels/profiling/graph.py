"""Where the tasks' graphs come together: behind it, all that they share."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from torch.autograd.graph import Node


def meeting(roots: Sequence[Node], shared: Collection[int]) -> list[Node]:
    """The nodes that all roots' passes run through, and to which some pass comes from one that not all run through;
    without leaves whose ids are not in `shared`."""
    passes = [_reached(root) for root in roots]
    if not passes:
        return []
    common = set.intersection(*passes)
    front: dict[Node, None] = dict.fromkeys(root for root in roots if root in common)
    for nodes in passes:
        for node in nodes - common:
            front.update(dict.fromkeys(n for n, _ in node.next_functions if n in common))
    leaves = ((node, getattr(node, "variable", None)) for node in front)
    return [node for node, leaf in leaves if leaf is None or id(leaf) in shared]


def _reached(root: Node) -> set[Node]:
    seen: set[Node] = set()
    stack: list[Node] = [root]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(_next(node))
    return seen


def _next(node: Node) -> Iterable[Node]:
    return [n for n, _ in node.next_functions if n is not None]
