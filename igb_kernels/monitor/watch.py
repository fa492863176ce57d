"""Looks at windows of steps, and says in words what should not last."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from igb_kernels._log import logger
from igb_kernels.monitor.block import Block, mean_of_finite
from igb_kernels.status import UNUSABLE, Status

LEAST = 20
"""A task, or a pair, is judged by no fewer steps of a window than these, or all of a shorter one."""
NAMED = 5
"""Tasks or pairs that a message names; of more, it says how many."""
PARALLEL = 0.999
"""The cosine from which on two gradients are on one line."""

T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True)
class Thresholds:
    """From when on a monitor warns. Windows of steps follow each other, and are made of whole blocks.

    Raises:
        ValueError: for a number out of its range.
    """

    window: int = 200
    """Steps in a window, at least."""
    starved: float = 0.05
    """A task is starved if its mean share of the update is below this part of an equal share, 1/K. Its share in a step
    is |w_k| ‖g_k‖ over the sum of all tasks'; with methods that measure no norms, |w_k| over theirs. 0: never."""
    conflict_rate: float = 0.8
    """A pair is in steady conflict if its cosine is negative in more than this part of the steps, ..."""
    conflict_cosine: float = -0.1
    """... and below this in the mean. -1: never."""
    stationary: float = 0.9
    """Training is at Pareto-stationary points if the status says so in more than this part of the steps. 1: never."""
    unusable: float = 0.1
    """Steps without an update are no accident if they are more than this part; a GradScaler makes some. 1: never."""

    def __post_init__(self) -> None:
        if not isinstance(self.window, int) or self.window < 1:
            raise ValueError(f"window must be a number of steps, at least 1; found {self.window!r}")
        for name, low in (
            ("starved", 0),
            ("conflict_rate", 0),
            ("conflict_cosine", -1),
            ("stationary", 0),
            ("unusable", 0),
        ):
            if not low <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name} must be {low} to 1, found {value!r}")


class Watch:
    """Puts blocks together to windows, and logs what it finds in them, each finding once."""

    def __init__(self, thresholds: Thresholds) -> None:
        self._thresholds = thresholds
        self._blocks: list[Block] = []
        self._said: set[tuple[str, Hashable]] = set()

    def see(self, block: Block) -> None:
        """Adds a block, and judges the window that it completes."""
        self._blocks.append(block)
        if sum(map(len, self._blocks)) < self._thresholds.window:
            return
        window, self._blocks = Block.cat(self._blocks), []
        steps = f"steps {int(window.steps[0])} to {int(window.steps[-1])}"
        for text in (self._starved(window), self._conflicts(window), self._stationary(window), self._unusable(window)):
            if text:
                logger.warning("%s: %s", steps, text)

    def _starved(self, window: Block) -> str:
        shares, equal = window.shares, (1 / window.active.sum(1, keepdim=True)).where(window.active, torch.nan)
        known = shares.isfinite()
        mean, fair = mean_of_finite(shares), mean_of_finite(equal.where(known, torch.nan))
        found = (mean < self._thresholds.starved * fair) & (known.sum(0) >= self._least(window))
        tasks = self._new("starved", found.nonzero().flatten().tolist())
        if not tasks:
            return ""
        rows = [f"{window.tasks[k]!r} {mean[k]:.2%} (an equal share: {fair[k]:.1%})" for k in tasks]
        text = f"some tasks have next to no share of the update: {_listed(rows)}"
        if window.norms is not None and (
            unreached := [repr(window.tasks[k]) for k in tasks if not window.norms[known[:, k], k].any()]
        ):
            text += f". The gradients of {_listed(unreached)} are 0: do these losses depend on the shared parameters?"
        return (
            f"{text}. Scaling the losses (igb_v1), a method that goes by the gradients' directions (imtl_g, nash_mtl, "
            "db_mtl), or a factor on these losses gives them more"
        )

    def _conflicts(self, window: Block) -> str:
        if window.cosines is None:
            return ""
        known, mean = window.cosines.isfinite(), mean_of_finite(window.cosines)
        rate = ((window.cosines < 0) & known).sum(0) / known.sum(0)
        found = (rate > self._thresholds.conflict_rate) & (mean < self._thresholds.conflict_cosine)
        found &= known.sum(0) >= self._least(window)
        worst = sorted((pair for pair in window.pairs if found[pair]), key=lambda pair: float(mean[pair]))
        pairs = self._new("conflict", worst)
        if not pairs:
            return ""
        rows = [f"{_named(window, pair)} (mean cosine {mean[pair]:.2f}, < 0 in {rate[pair]:.0%})" for pair in pairs]
        return (
            f"gradients are in steady conflict: {_listed(rows)}. What helps one task hurts the other: let them share "
            "fewer layers or wider ones, or choose a method that lets no task lose (upgrad, mgda, nash_mtl)"
        )

    def _stationary(self, window: Block) -> str:
        rate = _rate(window.status, Status.PARETO_STATIONARY)
        if rate <= self._thresholds.stationary or not self._new("stationary", [None]):
            return ""
        text = f"the status is PARETO_STATIONARY in {rate:.0%} of the steps: gradients nearly depend on each other"
        if window.cosines is not None:
            mean = mean_of_finite(window.cosines)
            lines = [pair for pair in window.pairs if abs(mean[pair]) >= PARALLEL]
            if lines:
                text += f", those of {_listed([f'{_named(window, p)} (mean cosine {mean[p]:.3f})' for p in lines])}"
        return (
            f"{text}, or cancel each other. If the losses have settled, no step improves all tasks any more, and other "
            "weights between them only shift who loses; if not, look for a task that is there twice, or for a shared "
            "part too small to tell the tasks apart"
        )

    def _unusable(self, window: Block) -> str:
        rate = _rate(window.status, UNUSABLE)
        if rate <= self._thresholds.unusable or not self._new("unusable", [None]):
            return ""
        bits = [bit for bit in (Status.NON_FINITE, Status.NON_POSITIVE_LOSS) if _rate(window.status, bit)]
        bad = ~window.losses.isfinite() & window.active
        if Status.NON_POSITIVE_LOSS in bits:
            bad |= window.losses <= 0
        rows = [f"{task!r} in {int(n)} steps" for task, n in zip(window.tasks, bad.sum(0), strict=True) if n]
        return (
            f"{rate:.0%} of the steps made no update ({', '.join(str(bit.name) for bit in bits)}): "
            + (f"losses that cannot be used: {_listed(rows)}" if rows else "the losses are finite, gradients are not")
            + ". Look at what these losses divide by or take logarithms of, clip gradients, or lower the learning rate"
        )

    def _least(self, window: Block) -> int:
        return min(LEAST, len(window))

    def _new(self, kind: str, found: Iterable[T]) -> list[T]:
        """What has not been said before, and now is."""
        new = [each for each in found if (kind, each) not in self._said]
        self._said.update((kind, each) for each in new)
        return new


def _rate(status: Tensor, bits: int) -> float:
    """The part of the steps [N] with any of the bits."""
    return float(((status & int(bits)) != 0).double().mean())


def _named(window: Block, pair: tuple[int, int]) -> str:
    return " and ".join(repr(window.tasks[k]) for k in pair)


def _listed(rows: list[str]) -> str:
    more = len(rows) - NAMED
    return ", ".join(rows[:NAMED]) + (f", and {more} more" if more > 0 else "")
