"""The package's models, as the suites take them."""

from __future__ import annotations

import pytest
import torch

from igb_kernels.bench.models import MODELS, SMALL, MultiTask, Unavailable

USERS_MODELS = (*SMALL, "qm9-schnet")
"""For steps of other libraries' users."""


def built(name: str, tasks: int, device: torch.device) -> MultiTask:
    """The model on the device; skips where it cannot be made."""
    try:
        return MODELS[name].build(tasks, device)
    except Unavailable as reason:
        pytest.skip(str(reason))
