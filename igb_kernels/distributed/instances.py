"""Modules that exist in this process: parameters do not know what they belong to."""

from __future__ import annotations

import gc
from typing import TypeVar

T = TypeVar("T")


def instances_of(kind: type[T]) -> list[T]:
    """All objects of the class or of those derived from it. Each refers to its class, and the collector finds it by
    that much sooner than by going through all objects."""
    kinds = _with_derived(kind)
    return [found for found in gc.get_referrers(*kinds) if type(found) in kinds]


def _with_derived(kind: type) -> set[type]:
    return {kind}.union(*map(_with_derived, type.__subclasses__(kind)))
