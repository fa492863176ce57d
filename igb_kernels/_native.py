"""Finds the compiled module, or says why it is absent and how to build it."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch  # noqa: F401  (its OpenMP runtime must be loaded before ours is looked up: one thread pool, not two)

module: ModuleType | None
reason: str | None

try:
    module, reason = import_module("igb_kernels._C"), None
except ImportError as error:
    module = None
    reason = (
        f"the compiled module igb_kernels._C could not be imported ({error}); build it with "
        "`pip install .` in a checkout, or `python setup.py build_ext --inplace` for development"
    )
