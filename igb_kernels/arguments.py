"""What a balancer is given, checked: methods by name, tasks, parameters."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from igb_kernels.gradients import METHODS, Equal, GradientBalancer
from igb_kernels.losses import RULES, LearnedLossBalancer, LossBalancer
from igb_kernels.ops import COMPLEX_DTYPES, DTYPES


def methods_of(
    gradients: str | GradientBalancer | LossBalancer, losses: str | LossBalancer | None
) -> tuple[GradientBalancer, LossBalancer]:
    """The method and the rule that `Balancer` is given, as objects or names."""
    if isinstance(gradients, str):
        parts = gradients.split("+")
        if len(parts) > 2 or (len(parts) == 2 and losses is not None):
            raise ValueError(
                f'gradients must name "method" or "rule+method" (then losses stays None), found {gradients!r}'
            )
        if len(parts) == 2:
            losses = parts[0]
        gradients = _rule(parts[0]) if parts[-1] in RULES and len(parts) == 1 else _method(parts[-1])
    if isinstance(gradients, LossBalancer):
        if losses is not None:
            raise ValueError(f"losses must stay None where gradients is a loss-balancing rule, found {losses!r}")
        return Equal(), gradients
    if not isinstance(gradients, GradientBalancer):
        raise TypeError(f"gradients must be a method or its name, found {type(gradients).__name__}")
    if losses is None:
        losses = gradients.default_losses()
    elif isinstance(losses, str):
        losses = _rule(losses)
    if not isinstance(losses, LossBalancer):
        raise TypeError(f"losses must be a loss-balancing rule or its name, found {type(losses).__name__}")
    return gradients, losses


def _method(name: str) -> GradientBalancer:
    if name not in METHODS:
        raise ValueError(f"gradient balancing must be one of {sorted(METHODS)}, found {name!r}")
    if name == "grad_norm":
        raise ValueError("grad_norm has a parameter for each task: pass GradNorm(num_tasks=...) instead of its name")
    return METHODS[name]()


def _rule(name: str) -> LossBalancer:
    if name not in RULES:
        raise ValueError(f"loss balancing must be one of {sorted(RULES)}, found {name!r}")
    rule = RULES[name]
    if issubclass(rule, LearnedLossBalancer):
        example = f"losses={rule.__name__}(num_tasks=...)"
        raise ValueError(f"{name} has a parameter for each task: pass {example} instead of its name")
    return rule()


def known_tasks(given: Iterable[str] | int | None) -> tuple[int | None, tuple[str, ...] | None]:
    """The number of tasks and their names, as far as they are known before the first step."""
    if given is None or (isinstance(given, int) and not isinstance(given, bool)):
        if given is not None and given < 1:
            raise ValueError(f"tasks must be at least 1, found {given}")
        return given, None
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"tasks must be the tasks' names or their number, found {given!r}")
    names = tuple(given)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"tasks must name at least one task, and each once, found {list(names)}")
    return len(names), names


def parameters_of(argument: str, given: Iterable[Tensor] | nn.Module) -> list[Tensor]:
    """The tensors to balance, checked. Frozen parameters are among them, since they may be thawed later."""
    known = DTYPES + COMPLEX_DTYPES
    if isinstance(given, nn.Module):  # what is frozen for good may have a quantised dtype
        given = [p for p in given.parameters() if p.requires_grad or p.dtype in known]
    if not isinstance(given, Iterable):
        raise TypeError(f"{argument} must be an iterable of tensors or a module, found {type(given).__name__}")
    params = list(given)
    if not params:
        raise ValueError(f"{argument} must hold at least one parameter, found none (was a generator used up?)")
    first: dict[int, int] = {}
    for i, p in enumerate(params):
        if not isinstance(p, Tensor):
            raise TypeError(f"{argument}[{i}] must be a tensor, found {type(p).__name__}")
        if not p.is_leaf:
            raise ValueError(f"{argument}[{i}] must be a leaf tensor, found the result of {p.grad_fn}")
        if not (p.requires_grad or isinstance(p, nn.Parameter)):
            raise ValueError(f"{argument}[{i}], of shape {tuple(p.shape)}, must require grad")
        if p.dtype not in known:
            raise TypeError(f"{argument}[{i}] must have one of the dtypes {known}, found {p.dtype}")
        if p.is_meta and not params[0].is_meta:
            raise ValueError(
                f"{argument}[{i}] must have memory as {argument}[0] on {params[0].device}, found {p.device}"
            )
        if id(p) in first:
            raise ValueError(f"{argument}[{i}] is the same tensor as {argument}[{first[id(p)]}]")
        first[id(p)] = i
    if not any(p.requires_grad for p in params):
        raise ValueError(f"{argument} must hold at least one parameter that requires grad, found {len(params)} frozen")
    return params
