"""The compiled solvers and the float64 references are two implementations: they must agree."""

from __future__ import annotations

import pytest
import torch
from samplers import FAMILIES, NONSINGULAR, gramian, jacobian
from tolerances import ILL_CONDITIONED, SOLVER
from variants import VARIANTS, losses_for, update_distance

from igb_kernels import Status

# A singular Gramian leaves IMTL-G to the ridge, and how near a pivot or an eigenvalue is to 0 to rounding.
DECIDED_BY_ROUNDING = {"duplicates", "opposed", "rank deficient"}


def tolerance(variant, family):
    ill_conditioned = family in ("condition 1e8", "near parallel", "parallel")
    return ILL_CONDITIONED if variant.needs_gram and ill_conditioned else SOLVER


@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_backends_agree(variant, family, tasks):
    rows, losses = jacobian(family, tasks), losses_for(tasks)
    gram = gramian(rows)
    states = [variant.new_state(tasks) for _ in range(2)]
    (cpu, cpu_status), (reference, reference_status) = (
        variant.solve(gram, losses, state=state, backend=backend)
        for state, backend in zip(states, ("cpu", "reference"), strict=True)
    )
    assert cpu.isfinite().all()
    assert reference.isfinite().all()
    if (variant.method == "imtl_g" or not variant.unique) and family in DECIDED_BY_ROUNDING and tasks > 1:
        return
    assert cpu_status == reference_status
    assert update_distance(rows, cpu, reference) <= tolerance(variant, family)
    if states[0] is not None and variant.method != "nash_mtl":  # its alpha is as its weights
        cosines = variant.method == "gradvac"
        torch.testing.assert_close(*states, rtol=1e-12, atol=tolerance(variant, family) if cosines else 0)


@pytest.mark.parametrize("tasks", [128, 300])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_many_tasks(variant, tasks):
    rows = jacobian("spread 1e-2..1e2", tasks)
    cpu, reference = (variant.solve(gramian(rows), backend=backend)[0] for backend in ("cpu", "reference"))
    assert update_distance(rows, cpu, reference) <= SOLVER


@pytest.mark.parametrize("family", NONSINGULAR)
@pytest.mark.parametrize("variant", [v for v in VARIANTS if not v.needs_gram], ids=str)
def test_norms_do_where_the_gramian_is_not_needed(variant, family, backend):
    gram = gramian(jacobian(family, 5))
    full, full_status = variant.solve(gram, backend=backend)
    norms, status = variant.solve(gram.diagonal(), backend=backend)
    assert torch.equal(full, norms)
    assert full_status == status


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_gramian_may_have_any_dtype_and_layout(variant, backend, dtype):
    gram = gramian(jacobian("random", 4)).to(dtype)
    strided = torch.empty(4, 8, dtype=dtype)[:, ::2].copy_(gram)
    expected, _ = variant.solve(gram.double(), backend=backend)
    for given in (gram, strided, gram.T):
        assert torch.equal(variant.solve(given, backend=backend)[0], expected)


def test_negative_losses_count_as_reached(backend):
    """EMTL takes a loss below its lower bound for 0."""
    emtl = next(v for v in VARIANTS if v.method == "emtl" and v.options["lam"] == 0.5)
    gram = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64)
    negative, status = emtl.solve(gram, torch.tensor([-3.0, 2.0, 1.0]), backend=backend)
    zero, _ = emtl.solve(gram, torch.tensor([0.0, 2.0, 1.0]), backend=backend)
    assert torch.equal(negative, zero)
    assert status == Status(0)
