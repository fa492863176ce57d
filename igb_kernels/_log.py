"""Slow paths are taken, and said once."""

from __future__ import annotations

import logging
from functools import cache

logger = logging.getLogger("igb_kernels")


@cache
def warn_once(message: str) -> None:
    """Logs `message` the first time this process says it."""
    logger.warning(message)
