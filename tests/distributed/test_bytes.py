"""What ranks send in a step, by the kernel's count."""

import pytest
import torch
from torch import nn

from benchmarks.distributed import ALL_REDUCES, SCHEMES, counted, formula
from benchmarks.models import Task

TASKS = 3


def model(tasks: int) -> Task:
    """Of a million parameters, against which the numbers for each task and parameter are nothing."""
    encoder = nn.Sequential(nn.Linear(32, 1000), nn.ReLU(), nn.Linear(1000, 1000))
    return Task(encoder, nn.ModuleList(nn.Linear(1000, 1) for _ in range(tasks)), torch.randn(4, 32))


@pytest.fixture(scope="module")
def each(two):
    return two.run(counted, model, TASKS)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_as_much_as_the_formula_says(each, scheme):
    for sent, sizes in (found[scheme] for found in each):
        assert sent == pytest.approx(formula(scheme, sizes), rel=0.01)


def test_less_than_all_reduces_of_the_rows(each):
    for found in each:
        ratio = found["ours"][0] / found[ALL_REDUCES][0]
        assert ratio == pytest.approx((TASKS + 1) / (2 * TASKS), rel=0.01)
