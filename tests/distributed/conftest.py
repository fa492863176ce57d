"""Pools of ranks that serve all tests of a process."""

import pytest

from .pool import Pool


def _pool(size: int):
    pool = Pool(size)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def two():
    yield from _pool(2)


@pytest.fixture(scope="session")
def three():
    yield from _pool(3)
