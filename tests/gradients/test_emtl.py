"""EMTL: w_k = m (1 + lam (ρ_k − 1)) / |g_k| with ρ_k = r_k / mean(r), r_k = L_k / |g_k|."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samplers import WELL_POSED, gramian, jacobian

from igb_kernels import EMTL, backends, ops

LAMS = (0.0, 0.5, 1.0, 2.0)
LENGTHS = {"mean": torch.mean, "max": torch.amax, "none": lambda norms: torch.ones((), dtype=torch.float64)}

problems = st.builds(
    lambda family, tasks, seed: (
        jacobian(family, tasks, seed).norm(dim=1),
        10 ** torch.empty(tasks, dtype=torch.float64).uniform_(-2, 2, generator=torch.Generator().manual_seed(seed)),
    ),
    st.sampled_from(WELL_POSED),
    st.integers(1, 12),
    st.integers(0, 999),
)


def solve(norms, losses, backend, method=None, scales=None):
    """Through the class, which subtracts `lower` and undoes loss scales."""
    method = method or EMTL()
    method.start(len(norms), torch.device("cpu"))
    scales = torch.ones_like(losses) if scales is None else scales
    run = backends()[backend] and ops.resolve(backend, "cpu")
    return method.solve((scales * norms) ** 2, losses, scales, run)[0]


@pytest.mark.parametrize("scale", LENGTHS)
@pytest.mark.parametrize("lam", LAMS)
@given(problems)
def test_definition(backend, lam, scale, problem):
    norms, losses = problem
    length, ratios = LENGTHS[scale](norms), losses / norms
    shares = 1 + lam * (ratios / ratios.mean() - 1)
    weights = solve(norms, losses, backend, EMTL(lam, scale=scale))
    lengths = weights * norms
    assert float(lengths.sum()) == pytest.approx(float(length) * len(norms), rel=1e-12)
    if lam <= 1:
        torch.testing.assert_close(lengths, length * shares, rtol=1e-11, atol=1e-11 * float(length))
        assert (lengths >= (1 - lam) * length * (1 - 1e-12)).all()
    else:
        cut = shares.clamp_min(0)
        torch.testing.assert_close(lengths, length * cut * len(cut) / cut.sum(), rtol=1e-11, atol=1e-11 * float(length))
        assert (weights >= 0).all()


def test_lam_2_cuts_a_negative_weight_to_zero(backend):
    weights = solve(torch.ones(2, dtype=torch.float64), torch.tensor([0.1, 1.9]), backend, EMTL(2.0))
    assert weights.tolist() == pytest.approx([0.0, 2.0])


def test_lam_0_is_gradient_normalisation(backend):
    norms = torch.tensor([1.0, 3.0, 8.0], dtype=torch.float64)
    torch.testing.assert_close(solve(norms, torch.rand(3).double(), backend, EMTL(0.0)), 4 / norms)


def test_lam_1_is_the_sum_of_polyak_steps(backend):
    """w ∝ L / |g|²."""
    norms, losses = torch.tensor([1.0, 3.0, 8.0], dtype=torch.float64), torch.tensor([2.0, 1.0, 5.0]).double()
    polyak = losses / norms**2
    weights = solve(norms, losses, backend, EMTL(1.0))
    torch.testing.assert_close(weights / weights[0], polyak / polyak[0], rtol=1e-12, atol=0)


def test_equal_tasks_get_weight_one(backend):
    weights = solve(torch.full((4,), 0.3, dtype=torch.float64), torch.full((4,), 7.0).double(), backend)
    torch.testing.assert_close(weights, torch.ones(4, dtype=torch.float64))


def test_all_losses_zero_count_as_equal(backend):
    norms = torch.tensor([1.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(solve(norms, torch.zeros(2).double(), backend), 2 / norms)


@pytest.mark.parametrize("lower", [0.5, [0.5, 0.1, 3.0]])
def test_lower_is_subtracted_first(backend, lower):
    """A loss below it counts as reached."""
    norms, losses = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64), torch.tensor([2.0, 0.6, 1.0]).double()
    excess = (losses - torch.tensor(lower, dtype=torch.float64)).clamp_min(0)
    assert torch.equal(solve(norms, losses, backend, EMTL(lower=lower)), solve(norms, excess, backend))


def test_lower_for_another_number_of_tasks_is_refused(backend):
    with pytest.raises(ValueError, match=r"lower .* 3.* found 2"):
        solve(torch.ones(3).double(), torch.ones(3).double(), backend, EMTL(lower=[0.0, 1.0]))


@given(problems, st.integers(0, 999))
def test_loss_scales_in_front_change_no_direction(backend, problem, seed):
    """r is made of raw losses and norms: total weights on the raw gradients keep their ratios."""
    norms, losses = problem
    scales = 10 ** torch.empty_like(losses).uniform_(-3, 3, generator=torch.Generator().manual_seed(seed))
    plain, scaled = solve(norms, losses, backend), scales * solve(norms, losses, backend, scales=scales)
    torch.testing.assert_close(scaled / scaled.norm(), plain / plain.norm(), rtol=1e-11, atol=1e-13)


def test_a_task_without_gradient_is_left_out_of_both_means(backend):
    norms, losses = torch.tensor([2.0, 0.0, 4.0], dtype=torch.float64), torch.tensor([1.0, 9.0, 3.0]).double()
    weights = solve(norms, losses, backend)
    assert weights[1] == 0
    assert torch.equal(weights[[0, 2]], solve(norms[[0, 2]], losses[[0, 2]], backend))


def test_a_whole_gramian_does(backend):
    gram, losses = gramian(jacobian("random", 4)), torch.rand(4).double()
    full, norms = (ops.solve("emtl", g, losses, backend=backend)[0] for g in (gram, gram.diagonal()))
    assert torch.equal(full, norms)
