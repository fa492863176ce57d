"""Aligned-MTL: B G B = s² times the projector on the range of G, w = B p."""

from __future__ import annotations

import mpmath
import pytest
import torch
from golden import cases
from hypothesis import given
from hypothesis import strategies as st
from samplers import NONSINGULAR, WELL_POSED, gramian, jacobian
from variants import Variant, update_distance

import igb_kernels as igb
from igb_kernels import Status, ops
from igb_kernels.gradients import AlignedMTL
from igb_kernels.gradients.aligned_mtl import SCALES

GOLDEN = cases(*(f"aligned_mtl__torchjd_{scale}" for scale in SCALES))
every_scale = pytest.mark.parametrize("scale", range(3))


def solve(gram, scale=0, preference=None, backend="cpu"):
    return Variant("aligned_mtl", {"scale": scale}).solve(gram, per_task=preference, backend=backend)


def balance_matrix(gram, scale, backend):
    """B, a column for each unit preference."""
    columns = [solve(gram, scale, p, backend)[0] for p in torch.eye(len(gram), dtype=torch.float64)]
    return torch.stack(columns, dim=1)


def exact_weights(gram, scale):
    """With 60 digits, for preferences 1/K and a Gramian of full rank."""
    with mpmath.workdps(60):
        tasks = len(gram)
        values, vectors = mpmath.eigsy(mpmath.matrix(gram.tolist()))
        ascending = sorted(values)
        square = (ascending[0], ascending[(tasks - 1) // 2], mpmath.fsum(values) / tasks)[scale]
        parts = [mpmath.fsum(vectors[:, k]) / tasks * mpmath.sqrt(square / values[k]) for k in range(tasks)]
        weights = [mpmath.fsum(vectors[i, k] * parts[k] for k in range(tasks)) for i in range(tasks)]
        return torch.tensor([float(w) for w in weights], dtype=torch.float64)


@every_scale
@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
@pytest.mark.parametrize("family", WELL_POSED)
def test_against_60_digits(backend, family, tasks, scale):
    """Float64 `eigh` of the Gramian loses 5 to 10 digits where rows are 1e-3..1e3 long."""
    gram = gramian(jacobian(family, tasks))
    weights, status = solve(gram, scale, backend=backend)
    torch.testing.assert_close(weights, exact_weights(gram, scale), rtol=2e-13, atol=0)
    assert status == 0


@every_scale
@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("family", NONSINGULAR)
def test_aligned_gradients_are_orthogonal_and_of_equal_length(backend, family, tasks, scale):
    """The rows of B J: B G B = s² I."""
    if backend == "reference" and tasks == 64:
        pytest.skip("64 solves of 64 tasks")
    rows = jacobian(family, tasks)
    aligned = balance_matrix(gramian(rows), scale, backend) @ rows
    found = aligned @ aligned.T
    square = float(found.diagonal().mean())
    ill_conditioned = family in ("near parallel", "condition 1e8")
    limit = 1e-6 if ill_conditioned else 1e-9
    assert (found / square - torch.eye(tasks, dtype=torch.float64)).abs().max() <= limit
    values = torch.linalg.eigvalsh(gramian(rows))
    expected = (values[0], values[(tasks - 1) // 2], values.mean())[scale]
    if family in ("random", "all rows x 1e-8", "all rows x 1e8"):  # where eigvalsh is exact
        assert square == pytest.approx(float(expected), rel=1e-10)


@every_scale
@pytest.mark.parametrize("family", ["duplicates", "opposed", "rank deficient", "parallel", "zero row"])
@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_dependent_gradients_leave_a_projector(backend, family, tasks, scale):
    gram = gramian(jacobian(family, tasks))
    matrix = balance_matrix(gram, scale, backend)
    values, vectors = torch.linalg.eigh(gram)
    kept = vectors[:, values > 1e-10 * values[-1]]
    values = values[-kept.shape[1] :]
    square = (values[0], values[(len(values) - 1) // 2], values.mean())[scale]
    torch.testing.assert_close(matrix @ gram @ matrix, square * kept @ kept.T, rtol=0, atol=1e-9 * float(square))
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-9 * float(matrix.abs().max()))
    _, status = solve(gram, scale, backend=backend)
    expected = Status.ZERO_GRADIENT if family == "zero row" else Status.PARETO_STATIONARY
    assert status == expected


def test_copies_share_the_weight(backend):
    rows = jacobian("random", 4)
    weights, _ = solve(gramian(torch.cat([rows, rows[:1]])), backend=backend)
    assert float(weights[0]) == pytest.approx(float(weights[-1]), rel=1e-9)


@given(st.integers(1, 8), st.integers(0, 99), st.floats(0.1, 10))
def test_weights_are_linear_in_the_preference(backend, tasks, seed, factor):
    rows = jacobian("spread 1e-2..1e2", tasks, seed)
    p = torch.linspace(0.5, 2, tasks, dtype=torch.float64)
    once, _ = solve(gramian(rows), 0, p, backend)
    more, _ = solve(gramian(rows), 0, factor * p, backend)
    assert update_distance(rows, more, factor * once) <= 1e-12
    even, _ = solve(gramian(rows), backend=backend)
    ones, _ = solve(gramian(rows), 0, torch.ones(tasks), backend)
    assert update_distance(rows, ones, tasks * even) <= 1e-12


@every_scale
@pytest.mark.parametrize("ratio", [1e3, 1e6])
def test_a_small_task_is_not_lost_in_float32(backend, scale, ratio):
    """TorchJD's `eigh` in float32 drops it from a ratio of 3e3 on."""
    rows = jacobian("random", 3)
    rows[0] /= ratio
    exact, _ = solve(gramian(rows), scale, backend=backend)
    weights, status = solve(ops.gram(rows.float()), scale, backend=backend)
    assert status == 0
    torch.testing.assert_close(weights, exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", GOLDEN)
def test_golden(case, backend):
    scale = SCALES.index(case.params["scale_mode"])
    rows = case.jacobian
    gram = gramian(rows)
    weights, status = solve(gram, scale, backend=backend)
    if case.trust:
        case.assert_update(rows.T @ weights)
    elif not gram.isfinite().all():
        assert status == Status.NON_FINITE
    else:  # nearly parallel, where the original is off by 1e-3
        _, lengths, right = torch.linalg.svd(rows, full_matrices=False)
        square = lengths.square()[[-1, len(lengths) // 2]] if scale < 2 else lengths.square().mean()
        expected = (square[scale] if scale < 2 else square).sqrt() * len(rows) ** -0.5
        assert (rows.T @ weights).norm() <= expected * (1 + 1e-3)
        assert right.shape[0] == len(rows)


def test_preference_of_a_step(backend):
    """The update is that of the weights with this preference."""
    p, rows = torch.nn.Parameter(torch.zeros(12, dtype=torch.float64)), jacobian("random", 2)
    preference = [0.25, 2.0]
    igb.Balancer(AlignedMTL(preference, scale="rmse"), shared=[p], backend=backend).backward([p @ r + 1 for r in rows])
    weights, _ = solve(gramian(rows), 2, torch.tensor(preference, dtype=torch.float64))
    torch.testing.assert_close(p.grad, rows.T @ weights, rtol=1e-12, atol=1e-12)


def test_arguments():
    with pytest.raises(ValueError, match="scale must be one of"):
        AlignedMTL(scale="max")
    with pytest.raises(ValueError, match="preference"):
        AlignedMTL([-1.0, 1.0])
    with pytest.raises(ValueError, match="3 numbers"):
        AlignedMTL([1.0, 1.0]).start(3, torch.device("cpu"))
    assert repr(AlignedMTL([1.0, 2.0])) == "AlignedMTL(preference=[1.0, 2.0], scale='min')"
