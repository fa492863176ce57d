"""Fixtures of the monitor's tests."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the package logs."""
    caplog.set_level("WARNING", logger="igb_kernels")

    class Messages(list):
        def __iter__(self):
            return (record.getMessage() for record in caplog.records if record.name == "igb_kernels")

        def __len__(self) -> int:
            return sum(1 for _ in self)

        def __getitem__(self, i):
            return [*self][i]

    return Messages()
