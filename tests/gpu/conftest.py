"""Everything here needs a GPU: it has the marker `gpu`, and is skipped where PyTorch finds none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import igb_kernels as igb
from igb_kernels import passes, store

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="PyTorch finds no GPU")
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(skip)


def require(backend: str) -> str:
    """The backend, or a skip that says why it cannot be used."""
    if not (found := igb.backends()[backend]):
        pytest.skip(f"backend {backend!r}: {found.detail}")
    return backend


@pytest.fixture(params=["cuda", "triton"])
def gpu_backend(request: pytest.FixtureRequest) -> str:
    """Runs the test with each backend for GPUs."""
    return require(request.param)


@pytest.fixture
def cuda_backend() -> str:
    """For what only the compiled kernels promise: no wait for the GPU, CUDA graphs."""
    return require("cuda")


@pytest.fixture(params=[1, 1000], ids="{}_at_once".format)
def rows_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large models' gradients are averaged or summed one by one, small ones' together."""
    monkeypatch.setattr(store, "rows_in_cache", lambda params: request.param)
    monkeypatch.setattr(passes, "rows_in_cache", lambda params: request.param)


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    yield
    torch.cuda.synchronize()  # an error of a kernel belongs to the test that launched it
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
