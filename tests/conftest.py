"""Fixtures for all tests; hypothesis draws the same examples in every run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest

from igb_kernels import _native

hypothesis.settings.register_profile(
    "igb_kernels",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=10,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("igb_kernels")

BUILDERS = ("cpp", "cuda_kernels", "distributed", "examples", "gpu", "project", "triton_backend")
"""Folders whose tests share what takes long to make: one process runs each, first of all."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.parent.name not in BUILDERS)  # else one process is left alone with the last


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Parallel processes get such a folder whole, and most other tests one by one. (`--dist loadgroup` would do, but
    pytest-xdist 3.8 does not see its own marks with pytest 9.2.)"""
    from xdist.scheduler import LoadScopeScheduling

    class ByFolder(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.partition("::")[0]
            folder = module.split("/")[-2]
            if folder in BUILDERS:
                return folder
            return module if folder == "integrations" else nodeid  # what they import takes seconds

    return ByFolder(config, log)


INSTRUCTION_SETS = ("avx512bf16", "avx512", "avx2", "portable")
BACKENDS = ("cpu", "reference")


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with each instruction set of the CPU kernels."""
    assert _native.module is not None, _native.reason
    before = _native.module.instruction_set()
    if not _native.module.use_instruction_set(request.param):
        pytest.skip(f"this machine or build lacks {request.param}")
    yield request.param
    _native.module.use_instruction_set(before)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Runs the test with each backend."""
    return request.param
