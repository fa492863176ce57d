"""Fixtures of the whole-step tests."""

from collections.abc import Iterator

import pytest
import torch

from igb_kernels import _log, passes, store


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models are small: a second thread would only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[1, 2, 1000], ids=lambda rows: f"{rows}_at_once")
def rows_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large models' gradients are averaged or summed one by one, small ones' together."""
    monkeypatch.setattr(store, "rows_in_cache", lambda params: request.param)
    monkeypatch.setattr(passes, "rows_in_cache", lambda params: request.param)


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
