"""Steady situations are said once, in words; healthy training says nothing."""

from __future__ import annotations

import math

import pytest
import torch

import igb_kernels as igb
from igb_kernels.monitor import Thresholds

from .problems import random_gradients, steps

CONFLICT = [[1.0, 0.3, 0.0], [-1.0, 0.3, 0.0], [0.0, 0.1, 1.0]]

AGREEING = [[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.1, 0.1, 1.0]]


def noisy(gradients, noise=0.05):
    """The gradients, each time a little different."""
    rows = torch.tensor(gradients)
    return lambda step: rows + noise * torch.randn(rows.shape, generator=torch.Generator().manual_seed(step))


def watch(method, gradients, count=250, thresholds=None, every=50, **options):
    with igb.Monitor(every=every, warn=thresholds or Thresholds()) as monitor:
        for result in steps(method, gradients, count, **options):
            monitor.record(result)


@pytest.mark.parametrize("method", ["nash_mtl", "upgrad", "mgda", "db_mtl", "igb_v1+imtl_g", "equal", "grad_drop"])
def test_healthy_training_says_nothing(said, method):
    watch(method, random_gradients(), 200)
    assert not [*said]


# ---- Starved tasks -----------------------------------------------------------------------------------------------


def test_a_starved_task(said):
    """MGDA takes the shortest combination: next to a short gradient, a long one in the same half-space gets nothing."""
    watch("mgda", noisy([[0.1, 0.0, 0.0], [10.0, 1.0, 0.0], [0.0, 0.1, 0.0]], 0.001), 400)
    assert len(said) == 1
    assert said[0].startswith(
        "steps 0 to 199: some tasks have next to no share of the update: 'normals' 0.00% (an equal"
    )
    assert "(an equal share: 33.3%)" in said[0]
    assert "igb_v1" in said[0]
    assert "'depth'" not in said[0]
    assert "are 0" not in said[0]


def test_a_task_without_gradient(said):
    watch("upgrad", lambda step: random_gradients()(step) * torch.tensor([[1.0], [1.0], [0.0]]))
    assert len(said) == 1
    assert "'edges' 0.00%" in said[0]
    assert "The gradients of 'edges' are 0: do these losses depend on the shared parameters?" in said[0]


def test_a_small_share_is_not_starving(said):
    """Equal weights on gradients of 1 to 15: the smallest has a share of a tenth of an equal one."""
    gradients = noisy([[1.0, 0.0, 0.0], [0.0, 15.0, 0.0], [0.0, 0.0, 15.0]])
    watch(igb.MGDA(), gradients, 200, thresholds=Thresholds(starved=0.0))
    with igb.Monitor(warn=Thresholds()) as monitor:
        for result in steps("imtl_g", gradients, 200):
            monitor.record(type(result)(**{**vars(result), "weights": torch.ones(3, dtype=torch.float64)}))
    assert not [*said]
    with igb.Monitor(warn=Thresholds(starved=0.15)) as monitor:
        for result in steps("imtl_g", gradients, 200):
            monitor.record(type(result)(**{**vars(result), "weights": torch.ones(3, dtype=torch.float64)}))
    assert "'depth' 3.2" in said[0]


def test_tasks_that_take_turns_do_not_starve(said):
    watch("nash_mtl", random_gradients(), 400, missing=lambda step: {0, 1, 2} - {step % 3})
    assert not [*said]


def test_a_task_that_is_rarely_there_is_not_judged(said):
    """Fewer than 20 steps of a window, in which its gradient is 0."""
    gone = lambda step: [2] if step % 20 else []  # noqa: E731
    watch("upgrad", lambda step: random_gradients()(step) * torch.tensor([[1.0], [1.0], [0.0]]), 400, missing=gone)
    assert not [*said]


# ---- Conflicts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["nash_mtl", "upgrad", "pcgrad"])
def test_steady_conflict(said, method):
    watch(method, noisy(CONFLICT), 400)
    assert len(said) == 1
    assert said[0].startswith(
        "steps 0 to 199: gradients are in steady conflict: 'depth' and 'normals' (mean cosine -0.8"
    )
    assert "< 0 in 100%)" in said[0]
    assert "edges" not in said[0]
    assert "upgrad" in said[0]


def test_a_new_conflict_is_said_later(said):
    late = noisy([CONFLICT[0], CONFLICT[1], [-1.0, -0.3, 0.4]])
    watch("upgrad", lambda step: noisy(CONFLICT)(step) if step < 200 else late(step), 600)
    assert len(said) == 2
    assert "steps 200 to 399" in said[1]
    assert "'depth' and 'edges'" in said[1]
    assert "'depth' and 'normals'" not in said[1]


def test_many_conflicts_are_one_message(said):
    rows = torch.eye(9) - 0.1  # cosines of -0.12
    watch("upgrad", lambda step: rows, 200, names=[f"t{k}" for k in range(9)])
    assert len(said) == 1
    assert said[0].count("mean cosine") == 5
    assert "and 31 more. What helps" in said[0]


def test_cosines_around_zero_are_no_conflict(said):
    watch("upgrad", noisy(torch.eye(3).tolist()), 400)
    assert not [*said]


def test_cosines_just_below_zero_are_no_conflict(said):
    """Negative in every step, and -0.05 in the mean."""
    rows = noisy([[1.0, 0.0, 0.0], [-0.05, 1.0, 0.0], [0.0, 0.0, 1.0]], 0.005)
    watch("upgrad", rows, 400)
    assert not [*said]
    watch("upgrad", rows, 200, thresholds=Thresholds(conflict_cosine=-0.02))
    assert "(mean cosine -0.05, < 0 in 100%)" in said[0]


def test_a_conflict_in_some_steps_is_not_steady(said):
    """In 70 % of them."""
    watch("upgrad", lambda step: noisy(CONFLICT if step % 10 < 7 else AGREEING)(step), 400)
    assert not [*said]
    watch(
        "upgrad",
        lambda step: noisy(CONFLICT if step % 10 < 7 else AGREEING)(step),
        200,
        thresholds=Thresholds(conflict_rate=0.6),
    )
    assert "< 0 in 70%" in said[0]


# ---- Pareto-stationary -------------------------------------------------------------------------------------------


def test_opposite_gradients(said):
    watch("nash_mtl", lambda step: [[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], 400)
    texts = [text for text in said if "PARETO_STATIONARY" in text]
    assert len(texts) == 1
    assert "the status is PARETO_STATIONARY in 100% of the steps" in texts[0]
    assert "those of 'depth' and 'normals' (mean cosine -1.000)" in texts[0]


def test_a_task_that_is_there_twice(said):
    def twice(step):
        rows = random_gradients()(step)
        return torch.stack([rows[0], rows[1], rows[0]])

    watch("imtl_g", twice)
    assert len(said) == 1
    assert "those of 'depth' and 'edges' (mean cosine 1.000)" in said[0]
    assert "a task that is there twice" in said[0]


def test_stationary_now_and_then(said):
    opposite = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0], [-1.0, 0, 0, 0, 0, 0, 0], [0, 0, 1.0, 0, 0, 0, 0]])
    watch("nash_mtl", lambda step: random_gradients()(step) if step % 5 == 0 else opposite, 400)
    assert not [text for text in said if "PARETO_STATIONARY" in text]


# ---- Steps without an update -------------------------------------------------------------------------------------


def test_non_finite_losses(said):
    bad = lambda step: torch.tensor([1.0, math.nan if step % 5 == 0 else 1.0, 2.0])  # noqa: E731
    watch("nash_mtl", random_gradients(), 400, offset=bad)
    assert len(said) == 1
    assert "steps 0 to 199: 20% of the steps made no update (NON_FINITE)" in said[0]
    assert "losses that cannot be used: 'normals' in 40 steps" in said[0]


def test_non_finite_gradients(said):
    def gradients(step):
        rows = random_gradients()(step)
        rows[1, 0] = math.inf if step % 5 == 0 else rows[1, 0]
        return rows

    watch("nash_mtl", gradients, 250)
    assert len(said) == 1
    assert "(NON_FINITE): the losses are finite, gradients are not" in said[0] or "'normals' in 40 steps" in said[0]


def test_non_positive_losses(said):
    watch(
        "db_mtl", random_gradients(), 250, offset=lambda step: torch.tensor([1.0, 1.0, -1.0 if step % 4 == 0 else 1.0])
    )
    assert len(said) == 1
    assert "25% of the steps made no update (" in said[0]
    assert "NON_POSITIVE_LOSS" in said[0]
    assert "'edges' in 50 steps" in said[0]


def test_overflows_of_a_scaler_are_ordinary(said):
    watch("nash_mtl", random_gradients(), 400, offset=lambda step: math.inf if step < 12 else 1.0)
    assert not [*said]


# ---- Windows and thresholds --------------------------------------------------------------------------------------


def test_windows_are_whole_blocks(said):
    watch("upgrad", noisy(CONFLICT), 120, thresholds=Thresholds(window=100), every=30)
    assert said[0].startswith("steps 0 to 119")


def test_an_unfinished_window_is_not_judged(said):
    watch("upgrad", noisy(CONFLICT), 199)
    assert not [*said]


def test_nothing_is_said_where_that_is_asked_for(said):
    never = Thresholds(starved=0, conflict_cosine=-1, stationary=1, unusable=1, window=50)
    opposite = [[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    watch("upgrad", lambda step: opposite, 200, thresholds=never)
    watch("upgrad", lambda step: opposite, 200, offset=lambda step: math.nan, thresholds=never)
    with igb.Monitor(every=10, warn=None) as monitor:
        for result in steps("upgrad", lambda step: opposite, 300):
            monitor.record(result)
    assert not [*said]
    watch("upgrad", lambda step: opposite, 200)
    assert len(said) >= 2


def test_one_task(said):
    watch("equal", lambda step: [[1.0, 2.0]], 250, names=["only"])
    assert not [*said]
