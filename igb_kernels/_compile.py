"""What torch.compile has to be told: what is not to be compiled, and that graphs are passed through several times."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import torch._functorch.config

P = ParamSpec("P")
R = TypeVar("R")

REMEDY = (
    "a compiled function's backward pass was made for one pass per graph, by an earlier backward() without "
    "retain_graph, in this process or (through torch.compile's cache on disk) another; balancing takes K passes. Make "
    "the Balancer, or set torch._functorch.config.donated_buffer = False, before anything is compiled; or set it now, "
    "then call torch.compiler.reset(), and the next forward pass compiles anew"
)


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """As `torch.compiler.disable`, a break in the graph of a compiled function that calls it; but the compiler is not
    loaded before there is one."""
    wrapped: Callable[P, R] | None = None

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal wrapped
        if wrapped is None:
            if "torch._dynamo" not in sys.modules:
                return function(*args, **kwargs)
            why = "it runs backward passes, or keeps books on the host, which cannot be traced"
            wrapped = torch.compiler.disable(function, reason=why)  # type: ignore[no-untyped-call]
        return wrapped(*args, **kwargs)

    return call


def keep_saved_tensors() -> None:
    """Has torch.compile make backward passes that leave what the forward pass saved as it is, for those that follow.

    By default they may write to it. Once something has been compiled so, the setting stays: with it, PyTorch refuses
    the second pass; without, the pass would read what the first has left there.
    """
    dynamo = sys.modules.get("torch._dynamo.utils")
    if dynamo is None or not dynamo.counters["stats"]["unique_graphs"]:
        torch._functorch.config.donated_buffer = False


def is_about_donated_buffers(error: RuntimeError) -> bool:
    """Whether PyTorch refuses a pass because an earlier one may have written to what it needs."""
    return "donated buffer" in str(error)
