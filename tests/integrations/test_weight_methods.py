"""nash-mtl's, FAMO's and IGB4MTL's methods against 20 training steps of the originals, on the same seed
(`record_weight_methods.py` has recorded them)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from igb_kernels import ops
from igb_kernels.integrations import famo, igb4mtl, nash_mtl

from .protocol import PAIRS, RUNS, SOLVED, Case, Run, run_pair, run_weight_methods

MODULES = {"AvivNavon/nash-mtl": nash_mtl, "Cranial-XIX/FAMO": famo}
ORIGINALS = json.loads(Path(__file__).with_name("weight_methods.json").read_text())

ROUNDING = 1e-9
FLOAT32 = 1e-7
"""Some of the originals round the weights that they return."""
TOLERANCES = {
    "dwa": 1e-6,  # float32
    "dwalog": 1e-6,
    "cagrad": 1e-5,  # SLSQP
    "log_cagrad": 5e-3,
    "log_mgda": 1e-4,  # a projected gradient method that stops at changes of 1e-5
    "nashmtl": 1e-5,  # ECOS
}
"""How far the originals are from exact, where they are not."""


def original(name: str) -> Run:
    return Run(**ORIGINALS[name])


def assert_near(found: Any, expected: Any, tolerance: float) -> None:
    """Relative to the largest of the expected numbers."""
    found, expected = (torch.tensor(numbers, dtype=torch.float64) for numbers in (found, expected))
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def assert_same_run(ours: Run, theirs: Run, tolerance: float) -> None:
    assert_near(ours.losses, theirs.losses, tolerance)
    assert_near(ours.final, theirs.final, 10 * tolerance)
    assert ours.outputs == theirs.outputs
    for name in ("weights", "values"):
        found, expected = getattr(ours, name), getattr(theirs, name)
        assert bool(found) == bool(expected)
        if expected:
            assert_near(found[-1], expected[-1], max(10 * tolerance, FLOAT32))


@pytest.mark.parametrize("case", [case for case in RUNS if not case.gradients], ids=lambda case: case.id)
def test_runs(case: Case):
    ours = run_weight_methods(MODULES[case.repository].WeightMethods, case)
    assert_same_run(ours, original(case.id), TOLERANCES.get(case.method, ROUNDING))


@pytest.mark.parametrize(("loss", "gradient"), PAIRS)
def test_pairs(loss, gradient):
    ours = run_pair(igb4mtl.LossWeightMethods, igb4mtl.GradientWeightMethods, loss, gradient)
    assert_same_run(ours, original(f"igb4mtl-{loss}-{gradient}"), TOLERANCES.get(loss, ROUNDING))


# ---- Where the originals iterate: how well both solve their problem -----------------------------------------------


def both(method: str) -> tuple[Run, Run]:
    """Our run and theirs."""
    assert method in SOLVED
    case = next(case for case in RUNS if case.method == method and case.gradients)
    return run_weight_methods(nash_mtl.WeightMethods, case), original(case.id)


def float64(numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_nash_mtl_is_solved():
    """α (Gα) = 1: to rounding here; there, ECOS fails at some steps, and the last α is taken instead."""
    ours, theirs = both("nashmtl")
    residuals = []
    for run in (ours, theirs):
        gram, weights = float64(run.grams), float64(run.weights)
        residuals.append((weights * (gram @ weights[..., None])[..., 0] - 1).abs().amax(dim=1))
    assert float(residuals[0].max()) < 1e-10
    failed = (residuals[1] > 1e-2).nonzero()
    assert len(failed) > 0
    first = int(failed[0])
    assert first > 5
    assert_near(ours.losses[: first + 1], theirs.losses[: first + 1], 1e-6)  # the same until then


def test_mgda_is_solved():
    """The shortest vector d of the hull has g_k · d ≥ |d|² for all k."""
    ours, theirs = both("mgda")
    gaps = []
    for run in (ours, theirs):
        gram, weights = float64(run.grams), float64(run.weights) / 3
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(weights), dtype=torch.float64))
        inner = (gram @ weights[..., None])[..., 0]
        gaps.append(((weights * inner).sum(dim=1) - inner.amin(dim=1)) / gram.diagonal(dim1=1, dim2=2).amax(dim=1))
    assert float(gaps[0].max()) < 1e-12
    assert float(gaps[1].max()) > 1e-6
    assert_near(ours.losses, theirs.losses, 2e-2)


def test_cagrad_is_solved():
    """Of the updates within c |g0| of the mean gradient g0, it is the one whose least g_k · d is the largest."""
    ours, theirs = both("cagrad")
    c, tasks = 0.4, 3
    for run in (ours, theirs):
        gram, scale = float64(run.grams), (1 + c**2) / tasks
        inner, sq_norm = scale * float64(run.inner), scale**2 * float64(run.sq_norm)
        mean_sq = gram.mean(dim=(1, 2))
        distance = (sq_norm - 2 * inner.mean(dim=1) + mean_sq).sqrt() / mean_sq.sqrt()
        weights = torch.stack([ops.solve("cagrad", g, c=c)[0] for g in gram])
        best = (gram @ weights[..., None])[..., 0].amin(dim=1)
        assert float((distance - c).abs().max()) < (1e-12 if run is ours else 1e-3)
        excess = (best - inner.amin(dim=1)) / best.abs()
        assert float(excess.abs().max()) < (1e-12 if run is ours else 1e-3)
    assert_near(ours.losses, theirs.losses, TOLERANCES["cagrad"])
