"""What the documentation's table says of a method or rule, next to its code."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """What users want to know before they choose; the table of methods is made from it, and tests read it."""

    title: str
    """As the field calls it."""
    paper: str
    """Authors, venue, year; arXiv number."""
    formula: str
    """The weights or scales in one line."""
    inputs: str
    """What it is computed from: losses, norms, Gramian, moving averages, every element."""
    memory: str
    """What a step holds beyond a plain one: "K gradients", "nothing"."""
    passes: str
    """Backward passes of a step: "1", "K"."""
    invariance: str = ""
    """Under L_k → c_k L_k: the "update" or its "direction" stays; or neither ("")."""
    degree: float | None = None
    """q where the update becomes c^q of itself when all gradients are multiplied by c (default options)."""
    hazards: str = ""
    """What to know before trusting it."""
    parity: str = ""
    """The options that reproduce existing code where it differs from the paper."""
