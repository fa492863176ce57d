"""What ranks send in a step, by the kernel's count."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import igb_kernels as igb
from benchmarks.distributed import ALL_REDUCES, SCHEMES, bytes_of, counted, formula, task_of
from igb_kernels.bench.models import MultiTask

TASKS = 3


def model(tasks: int) -> MultiTask:
    """Of a million parameters, against which the numbers for each task and parameter are nothing."""
    encoder = nn.Sequential(nn.Linear(32, 1000), nn.ReLU(), nn.Linear(1000, 1000))
    return MultiTask(encoder, nn.ModuleList(nn.Linear(1000, 1) for _ in range(tasks)), torch.randn(4, 32))


@pytest.fixture(scope="module")
def each(two):
    return two.run(counted, model, TASKS)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_as_much_as_the_formula_says(each, scheme):
    for sent, sizes in (found[scheme] for found in each):
        assert sent == pytest.approx(formula(scheme, sizes), rel=0.01)


def sent_in_group(rank: int, backend: str) -> int:
    """In a step of a group that has this backend."""
    task = task_of(model, TASKS)
    balancer = igb.Balancer("nash_mtl", shared=task.shared, process_group=dist.new_group(backend=backend))

    def step() -> None:
        task.zero_grad()
        balancer.backward(task.losses())

    step()
    return bytes_of(step)


def test_the_same_where_the_group_has_a_backend_for_each_device(two, each):
    """As `init_process_group()` makes it."""
    assert two.run(sent_in_group, "cpu:gloo")[0] == pytest.approx(each[0]["ours"][0], rel=0.01)


def test_less_than_all_reduces_of_the_rows(each):
    for found in each:
        ratio = found["ours"][0] / found[ALL_REDUCES][0]
        assert ratio == pytest.approx((TASKS + 1) / (2 * TASKS), rel=0.01)
