"""Fixtures of the whole-step tests."""

from collections.abc import Iterator

import pytest
import torch

from igb_kernels import _log


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models are small: a second thread would only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def warnings_said(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """The package's warnings during the test, as if the process had not said any before."""
    _log.warn_once.cache_clear()
    with caplog.at_level("WARNING", logger="igb_kernels"):
        messages: list[str] = []
        caplog.handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
        yield messages
        del caplog.handler.emit  # pytest keeps the handler for later tests
    _log.warn_once.cache_clear()
