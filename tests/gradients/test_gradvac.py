"""GradVac: cosines below their goals are lifted to them, and goals follow the cosines."""

from __future__ import annotations

import pytest
import torch
from golden import cases
from hypothesis import given
from hypothesis import strategies as st
from samplers import FAMILIES, NONSINGULAR, gramian, jacobian
from tolerances import SOLVER
from variants import update_distance

from igb_kernels import Status, ops
from igb_kernels.gradients import GradVac

GOALS = 2
"""Where they begin in the state."""


def new_state(tasks, goals=0.0):
    state = torch.zeros(GOALS + tasks * tasks, dtype=torch.float64)
    state[GOALS:] = torch.as_tensor(goals, dtype=torch.float64).expand(tasks, tasks).flatten()
    return state


def goals_in(state):
    tasks = round((len(state) - GOALS) ** 0.5)
    return state[GOALS:].view(tasks, tasks)


def solve(gram, times=None, *, state=None, backend="cpu", **options):
    weights, status = ops.solve("gradvac", gram, per_task=times, state=state, backend=backend, **options)
    return weights, Status(int(status))


def random_times(tasks, seed=0):
    return torch.rand(tasks, tasks, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def vaccinate(rows, times, goals, beta=0.5):
    """The update with the gradients themselves; moves the goals."""
    altered = rows.clone()
    for i, order in enumerate(times.argsort(dim=1).tolist()):
        for j in order:
            if j == i:
                continue
            size, unit = altered[i].norm(), rows[j] / rows[j].norm()
            cosine, goal = float(altered[i] @ unit / size), float(goals[i, j])
            goals[i, j] = (1 - beta) * goal + beta * cosine
            if cosine < goal:
                altered[i] += size * (goal * (1 - cosine**2) ** 0.5 / (1 - goal**2) ** 0.5 - cosine) * unit
    return altered.sum(dim=0)


@pytest.mark.parametrize("case", cases("gradvac__libmtl", "gradvac__torchjd"))
def test_existing_code(case, backend):
    """A few steps in a row. The orders leave out the gradient itself."""
    tasks = len(case.steps[0].jacobian)
    state = new_state(tasks)
    for step in case.steps:
        times = torch.zeros(tasks, tasks)
        for i, order in enumerate(step.fields["orders"]):
            for time, j in enumerate(order):
                times[i, j] = time
        weights, status = solve(gramian(step.jacobian), times, state=state, backend=backend, beta=0.5, eps=1e-8)
        if case.trust:
            step.assert_update(step.jacobian.T @ weights)
        assert weights.isfinite().all() or status == Status.NON_FINITE


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("tasks", [2, 3, 8])
@pytest.mark.parametrize(
    "family", ["random", "spread 1e-2..1e2", "rows 1e-3..1e3", "all rows x 1e-8", "all rows x 1e8"]
)
def test_the_gradients_themselves_give_the_same_updates(backend, family, tasks, beta):
    state, goals = new_state(tasks), torch.zeros(tasks, tasks, dtype=torch.float64)
    for step in range(6):
        rows, times = jacobian(family, tasks, step), random_times(tasks, step)
        weights, _ = solve(gramian(rows), times, state=state, backend=backend, beta=beta)
        expected = vaccinate(rows, times, goals, beta)
        scale = (weights.abs() * rows.norm(dim=1)).sum()
        assert (rows.T @ weights - expected).norm() <= SOLVER * scale
        torch.testing.assert_close(goals_in(state), goals, rtol=0, atol=1e-11)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_step_is_that_of_pcgrad(backend, family):
    """Also in the orders that both draw from one seed."""
    rows = jacobian(family, 6)
    rows[::2] *= -1
    gram, times = gramian(rows), random_times(6)
    for chosen in (None, times):
        weights, status = solve(gram, chosen, backend=backend)
        expected, expected_status = ops.solve("pcgrad", gram, per_task=chosen, backend=backend)
        assert update_distance(rows, weights, expected) <= SOLVER
        assert status == int(expected_status)


@pytest.mark.parametrize("family", NONSINGULAR)
def test_goals_that_stay_0_make_every_step_that_of_pcgrad(backend, family):
    states = new_state(4), torch.zeros(2, dtype=torch.float64)
    for step in range(4):
        rows = jacobian(family, 4, step)
        weights, _ = solve(gramian(rows), state=states[0], backend=backend, beta=0.0)
        expected, _ = ops.solve("pcgrad", gramian(rows), state=states[1], backend=backend)
        assert update_distance(rows, weights, expected) <= SOLVER
    assert not goals_in(states[0]).any()


@given(st.floats(-0.95, 0.95), st.floats(-0.95, 0.95), st.floats(1e-4, 1e4), st.floats(0, 1))
def test_a_cosine_is_lifted_to_its_goal(backend, cosine, goal, norm, beta):
    """Of the first gradient: the second's goal is out of the way. Then the goal moves."""
    state = new_state(2, [[0.0, goal], [-1.0, 0.0]])
    rows = torch.tensor([[1.0, 0.0], [norm * cosine, norm * (1 - cosine**2) ** 0.5]], dtype=torch.float64)
    weights, _ = solve(gramian(rows), state=state, backend=backend, beta=beta)
    assert weights[0] == 1
    altered = rows[0] + (weights[1] - 1) * rows[1]
    found = float(altered @ rows[1] / altered.norm() / rows[1].norm())
    assert found == pytest.approx(max(cosine, goal), abs=1e-9)
    assert goals_in(state)[0, 1] == pytest.approx((1 - beta) * goal + beta * cosine, abs=1e-12)
    assert goals_in(state).diagonal().tolist() == [0, 0]


def test_gradients_that_are_above_their_goals_stay(backend):
    rows = jacobian("random", 5).abs()
    assert torch.equal(solve(gramian(rows), backend=backend)[0], torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("goal", [0.0, 0.5, 1 - 1e-16, 1.0, -1.0])
@pytest.mark.parametrize("family", ["parallel", "duplicates", "opposed", "near parallel", "rank deficient"])
def test_rounding_beyond_a_cosine_of_1_makes_no_nan(backend, family, goal):
    """LibMTL takes the root of 1 - rho^2 as it comes."""
    for seed in range(5):
        rows, state = jacobian(family, 5, seed), new_state(5, goal)
        for _ in range(3):
            weights, status = solve(gramian(rows) * (1 + 1e-15), state=state, backend=backend)
            assert weights.isfinite().all()
            assert state.isfinite().all()
            assert goals_in(state).abs().max() <= 1
            assert status == 0


def test_a_goal_of_1_asks_for_nothing(backend):
    """One parameter: cosines are 1 or -1, goals may reach 1, and no multiple would."""
    state = new_state(2, 1.0)
    gram = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    assert solve(gram, state=state, backend=backend)[0].tolist() == [1, 1]
    assert goals_in(state)[0, 1] == 0.75


def test_parallel_gradients_of_one_parameter_train_on(backend):
    state = new_state(3)
    for step in range(80):
        signs = torch.tensor([[1.0], [1.0], [-1.0 if step > 70 else 1.0]], dtype=torch.float64)
        rows = signs * torch.tensor([[1.0], [3.0], [0.3]], dtype=torch.float64)
        weights, _ = solve(gramian(rows), state=state, backend=backend)
        assert (rows.T @ weights).abs() <= 20


@pytest.mark.parametrize("position", [0, 1, 3])
def test_goals_towards_a_task_without_gradient_fade(backend, position):
    """It counts as orthogonal to all, itself gets no weight, and the others' do not change."""
    rows, times = jacobian("random", 4), random_times(4)
    rows[position] = 0
    others = torch.arange(4) != position
    state, without = new_state(4, 0.4), new_state(3, 0.4)
    weights, status = solve(gramian(rows), times, state=state, backend=backend)
    expected, _ = solve(gramian(rows[others]), times[others][:, others], state=without, backend=backend)
    assert status == Status.ZERO_GRADIENT
    assert weights[position] == 0
    torch.testing.assert_close(weights[others], expected, rtol=1e-13, atol=0)
    goals = goals_in(state)
    torch.testing.assert_close(goals[others][:, others], goals_in(without), rtol=1e-13, atol=1e-15)
    assert goals[position, others].tolist() == goals[others, position].tolist() == [0.2, 0.2, 0.2]


@given(st.integers(2, 8), st.integers(0, 99))
def test_permuted_tasks_with_permuted_times_and_goals(backend, tasks, seed):
    rows, times = jacobian("rows 1e-3..1e3", tasks, seed), random_times(tasks, seed)
    goals = 0.9 * (2 * random_times(tasks, seed + 1) - 1)
    order = torch.randperm(tasks, generator=torch.Generator().manual_seed(seed))
    state, other = new_state(tasks, goals), new_state(tasks, goals[order][:, order])
    weights, _ = solve(gramian(rows), times, state=state, backend=backend)
    permuted, _ = solve(gramian(rows[order]), times[order][:, order], state=other, backend=backend)
    assert update_distance(rows[order], permuted, weights[order]) <= SOLVER
    off_diagonal = ~torch.eye(tasks, dtype=torch.bool)
    expected = goals_in(state)[order][:, order][off_diagonal]
    torch.testing.assert_close(goals_in(other)[off_diagonal], expected, rtol=0, atol=1e-12)


def test_eps_is_added_to_both_divisors(backend):
    gram, eps = torch.tensor([[4.0, -1.0], [-1.0, 9.0]], dtype=torch.float64), 0.3
    state = new_state(2, [[0.0, 0.6], [-1.0, 0.0]])
    weights, _ = solve(gram, state=state, backend=backend, eps=eps)
    cosine = -1 / (6 + eps)
    multiple = 2 * (0.6 * (1 - cosine**2) ** 0.5 - cosine * 0.8) / (3 * 0.8 + eps)
    assert weights.tolist() == pytest.approx([1, 1 + multiple], rel=1e-12)
    assert goals_in(state)[0, 1] == pytest.approx(0.5 * 0.6 + 0.5 * cosine, rel=1e-12)


def test_options_of_the_class():
    assert GradVac(0.2, eps=1e-8).options() == {"beta": 0.2, "eps": 1e-8}
    with pytest.raises(ValueError, match=r"beta must be a finite number, 0 to 1; found 1\.5"):
        GradVac(1.5)
    with pytest.raises(ValueError, match="eps must be a finite number, at least 0; found -1"):
        GradVac(eps=-1)
