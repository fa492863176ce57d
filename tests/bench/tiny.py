"""Sizes at which every model of the benchmarks takes a step in milliseconds."""

from __future__ import annotations

from typing import Any

import torch

from igb_kernels.bench.models import MODELS, MultiTask

_TRANSFORMER = {"width": 16, "layers": 2, "attention_heads": 2, "classes": 4}
_VIT = {**_TRANSFORMER, "image": 16, "patch": 8}
_FIELDS = {"fields": 3, "rows": 20, "width": 4, "widths": (8, 6), "tower": (5,)}
SIZES: dict[str, dict[str, Any]] = {
    "mlp-33k": {"widths": (6, 8, 5)},
    "mlp-5.8m": {"widths": (6, 9)},
    "cnn-4.7m": {"channels": ((4, 1), (6, 2)), "image": 8},
    "resnet-50": {"blocks": (1, 2), "width": 4, "image": 32},
    "vit-b": _VIT,
    "vit-l": _VIT,
    "segnet-mtan": {"widths": (4, 6), "depths": (2, 3), "image": (16, 24), "classes": 3},
    "bert-base": {**_TRANSFORMER, "vocabulary": 11, "positions": 6, "tokens": 6},
    **{name: {**_FIELDS, "experts": 3} for name in ("mmoe", "mmoe-sparse")},
    **dict.fromkeys(("ple", "ple-sparse"), _FIELDS),
    "qm9-schnet": {},
}
BATCH = 4


def tiny(name: str, tasks: int = 3) -> MultiTask:
    """The model, with seeded weights and input, and without its most parameters."""
    torch.manual_seed(0)
    return MODELS[name].build(tasks, torch.device("cpu"), **{"batch": BATCH, **SIZES[name]})
