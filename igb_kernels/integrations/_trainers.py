"""What trainers' loops need around a balancer: micro-batches, epochs, and refusals of what would go wrong unseen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from igb_kernels.balancer import Balancer
from igb_kernels.capture import Losses
from igb_kernels.result import BalanceResult

DECISIONS = ("step", "micro_batch")


def checked_decision(decide_per: str) -> str:
    """`decide_per`, which must be one of DECISIONS."""
    if decide_per not in DECISIONS:
        raise ValueError(f"decide_per must be one of {DECISIONS}, found {decide_per!r}")
    return decide_per


def backward(
    balancer: Balancer,
    losses: Losses,
    *,
    decide_per: str,
    micro_batches: int,
    last: bool,
    are_shares: bool = False,
    scaler: torch.amp.GradScaler | None = None,
    **options: Any,
) -> BalanceResult | None:
    """The backward pass of one of an optimizer step's micro-batches; at the last, `.grad` is that of their mean loss.

    Args:
        decide_per: "step": one decision on the micro-batches' mean losses, as for one big batch; None is returned
            before the last. "micro_batch": the mean of a decision for each.
        micro_batches: how many the step has, as far as the trainer's losses are concerned.
        are_shares: the losses of the step's micro-batches add up to its mean; else each is a mean itself.
        options: of `Balancer.backward`.
    """
    if micro_batches == 1:
        return balancer.backward(losses, scaler=scaler, **options)
    if checked_decision(decide_per) == "micro_batch":
        # Scale-invariant rules would undo a division of the losses, so their gradients are divided.
        means = _each(losses, lambda loss: loss * micro_batches) if are_shares else losses
        return balancer.backward(means, scaler=_Share(micro_batches, scaler), **options)
    if options:
        raise ValueError(f'{sorted(options)} must stay out of micro-batches, but with decide_per="micro_batch"')
    shares = losses if are_shares else _each(losses, lambda loss: loss / micro_batches)
    if last:
        return balancer.backward(shares, scaler=scaler)
    balancer.accumulate(shares, scaler=scaler)
    return None


class _Share(torch.amp.GradScaler):
    """Has the balancer leave gradients divided by the number of micro-batches, times another scaler's factor."""

    def __init__(self, micro_batches: int, scaler: torch.amp.GradScaler | None) -> None:
        super().__init__(enabled=False)
        self._micro_batches, self._scaler = micro_batches, scaler

    def is_enabled(self) -> bool:
        return True

    def scale(self, outputs: Any) -> Any:
        return (outputs if self._scaler is None else self._scaler.scale(outputs)) / self._micro_batches


def _each(losses: Losses, change: Callable[[Tensor], Tensor]) -> Losses:
    """The losses with each that there is changed; what is no tensor stays for the balancer to complain about."""
    if isinstance(losses, Tensor):
        return change(losses)
    if isinstance(losses, Mapping):
        return {name: change(loss) if isinstance(loss, Tensor) else loss for name, loss in losses.items()}
    return [change(loss) if isinstance(loss, Tensor) else loss for loss in losses]


def total(losses: Losses) -> Tensor:
    """The sum of the losses that there are, for logs and progress bars: it has no graph."""
    given = [losses] if isinstance(losses, Tensor) else losses.values() if isinstance(losses, Mapping) else losses
    with torch.no_grad():
        return sum((loss.detach().sum() for loss in given if isinstance(loss, Tensor)), torch.zeros(()))


def tasks_of(result: BalanceResult) -> list[tuple[int, str | int]]:
    """The tasks that took part, with what logs call them."""
    return [(k, result.names[k] if result.names else k) for k in result.active or range(len(result.losses))]


class Means:
    """The tasks' mean losses and weights over steps; nothing waits for the device before they are taken."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None
        self._names: tuple[str, ...] | None = None

    def add(self, result: BalanceResult) -> None:
        """Counts a step. A task without a loss, or with one that is NaN, is left out."""
        there = ~result.losses.isnan()
        rows = torch.stack([there.double(), result.losses.double(), result.total_weights]).where(there, 0.0)
        self._sums = rows if self._sums is None else self._sums + rows
        self._names = result.names

    def take(self) -> dict[str, float]:
        """The means since the last call, by what logs call them."""
        if self._sums is None:
            return {}
        logs: dict[str, float] = {}
        for k, (count, loss, weight) in enumerate(self._sums.T.tolist()):
            name = self._names[k] if self._names else k
            if count:
                logs |= {f"task_loss/{name}": loss / count, f"task_weight/{name}": weight / count}
        self._sums = None
        return logs


class Progress:
    """How far a training has come, as far as its balancer is concerned."""

    def __init__(self) -> None:
        self.epoch: int | None = None
        """Of the last decision; None before any, and when it has been ended."""
        self.waiting = 0
        """Micro-batches without a decision."""

    def start(self, balancer: Balancer) -> None:
        """A training starts, maybe after another that ended somewhere: with a new epoch, and without leftovers."""
        if self.epoch is not None:
            self.epoch = -1
        if self.waiting:
            balancer.load_state_dict(balancer.state_dict())  # drops what was accumulated
            self.waiting = 0

    def before_backward(self, balancer: Balancer, epoch: int) -> None:
        """Ends the balancer's epoch before the first step of the next one.

        Where a trainer says that one has ended, some checkpoints have been saved, and others will be: those who resume
        would end it twice, or never.
        """
        if self.epoch not in (None, epoch):
            balancer.end_epoch()
            self.epoch = None

    def after_backward(self, result: BalanceResult | None, epoch: int) -> None:
        """Takes note of a decision, or of another micro-batch without one."""
        if result is None:
            self.waiting += 1
        else:
            self.epoch, self.waiting = epoch, 0

    def saved(self, balancer: Balancer) -> dict[str, Any]:
        """What goes into a trainer's checkpoint."""
        return {"epoch": self.epoch, "balancer": balancer.state_dict()}

    def restore(self, state: dict[str, Any], balancer: Balancer) -> None:
        """Loads what `saved` returned; ValueError where it does not fit, with nothing changed."""
        balancer.load_state_dict(state["balancer"])
        self.epoch, self.waiting = state["epoch"], 0


def check_model(balancer: Balancer, model: nn.Module) -> None:
    """ValueError unless the shared parameters are the model's: others would get gradients that no optimizer sees."""
    known = {id(p) for p in model.parameters()}
    if strange := sum(id(p) not in known for p in balancer.shared):
        raise ValueError(
            f"the balancer's shared parameters must be parameters of the {type(model).__name__} that is trained, "
            f"found {strange} of {len(balancer.shared)} that are not"
        )


def check_optimized(balancer: Balancer, optimizers: list[torch.optim.Optimizer]) -> None:
    """ValueError unless some optimizer has the balancer's learned parameters."""
    known = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    if any(id(p) not in known for p in balancer.parameters()):
        raise ValueError(
            f"the optimizer must have *balancer.param_groups() among its groups: {balancer!r} has learned parameters"
        )


def move_parameters(balancer: Balancer, device: torch.device) -> None:
    """Brings the balancer's learned parameters to where the trainer has brought the model."""
    for p in balancer.parameters():
        p.data = p.data.to(device)
