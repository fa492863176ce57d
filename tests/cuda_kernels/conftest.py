"""The CUDA kernels on the CPU, as a native module for backends/cuda.py and for the tests of the kernels themselves."""

from typing import Any

import pytest

from .emulated import build, load


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The functions of `_C.cuda`; streams are ignored."""
    return load(build(tmp_path_factory.mktemp("emulated") / "build"))
