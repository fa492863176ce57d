"""RLW: the softmax of normals that follow from a seed and the number of usable steps."""

from __future__ import annotations

import copy

import pytest
import torch
from training import Training

from igb_kernels import Status, ops
from igb_kernels.backends._random import normals
from igb_kernels.losses import RLW


def drawn(backend, seed=7, step=0, tasks=5, **options):
    state = torch.tensor([seed, step], dtype=torch.float64)
    return ops.loss_scales("rlw", torch.ones(tasks, dtype=torch.float64), state=state, backend=backend, **options)[0]


@pytest.mark.parametrize("tasks", [1, 2, 3, 4, 5, 33])
@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**53 - 1])
def test_every_seed_draws_what_the_reference_draws(backend, seed, tasks):
    expected = torch.softmax(normals(seed, 3, tasks), dim=0)
    torch.testing.assert_close(drawn(backend, seed, 3, tasks), expected, rtol=1e-12, atol=0)


def test_normals_are_normal():
    values = normals(5, 0, 40_000)
    moments = [float((values**power).mean()) for power in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.05)
    pairs = values.view(-1, 4).T
    assert float((pairs @ pairs.T / 10_000 - torch.eye(4)).abs().max()) < 0.04


def test_mean_weights_are_equal(backend):
    mean = torch.stack([drawn(backend, step=step, tasks=3) for step in range(2000)]).mean(dim=0)
    torch.testing.assert_close(mean, torch.full((3,), 1 / 3, dtype=torch.float64), rtol=0, atol=0.02)


@pytest.mark.parametrize(("options", "total"), [({}, 1), ({"times_tasks": 1.0}, 5)])
def test_sum(backend, options, total):
    scales = drawn(backend, **options)
    assert float(scales.sum()) == pytest.approx(total, rel=1e-14)
    assert (scales > 0).all()


def sequence(rule, backend, steps=4):
    training = Training(rule, backend, None)
    return torch.stack([training.step([1.0, 2.0]).scales for _ in range(steps)])


def test_steps_and_seeds_differ(backend):
    first, second = sequence(RLW(1), backend), sequence(RLW(2), backend)
    assert len({tuple(row) for row in torch.cat([first, second]).tolist()}) == 8
    assert torch.equal(sequence(RLW(1), backend), first)


def test_manual_seed_decides_where_no_seed_is_given(backend):
    torch.manual_seed(3)
    first = sequence(RLW(), backend)
    other = sequence(RLW(), backend)
    torch.manual_seed(3)
    assert torch.equal(sequence(RLW(), backend), first)
    assert not torch.equal(other, first)


def test_nothing_is_drawn_on_the_host_after_the_first_step(backend):
    """So that a captured step is what a replay is."""
    training = Training(RLW(), backend, None)
    training.step([1.0, 2.0])
    assert training.rule.host_decision() is None
    before, address = torch.get_rng_state(), training.rule.state.data_ptr()
    training.step([1.0, 2.0])
    assert torch.equal(torch.get_rng_state(), before)
    assert training.rule.state.data_ptr() == address


def test_steps_that_cannot_be_used_draw_nothing(backend):
    bad = Training(RLW(4), backend, None)
    found = []
    for losses in ([1.0, 2.0], [torch.nan, 1.0], [1.0, 2.0]):
        result = bad.step(losses)
        if Status.NON_FINITE not in result.flags:
            found.append(result.scales)
    assert torch.equal(torch.stack(found), sequence(RLW(4), backend, 2))


def test_state_dict_holds_seed_and_step(backend):
    torch.manual_seed(0)
    first, second = Training(RLW(), backend, None), Training(RLW(), backend, None)
    first.step([1.0, 2.0])
    second.balancer.load_state_dict(copy.deepcopy(first.balancer.state_dict()))
    assert torch.equal(first.step([1.0, 2.0]).scales, second.step([1.0, 2.0]).scales)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"seed": -1}, "seed"), ({"seed": 2**53}, "seed"), ({"seed": 0.5}, "seed"), ({"total": "K"}, "total")],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        RLW(**arguments)
