"""Ranks come to what one process comes to on the batches of all, and to the same bits on each."""

import pytest
import torch
from balancer.models import same
from balancer.test_state import STATES

from .runs import Training, difference, trained

STEPS = 20


@pytest.mark.parametrize("name", STATES)
def test_as_one_process(two, name):
    first, second = two.run(trained, name, STEPS, 2, {})
    assert same(first, second)
    torch.manual_seed(7)
    found = difference(first, Training(name, 2).run(0, STEPS))
    assert max(found.values()) < 1e-8, found
