"""Aggregators and weightings beside TorchJD's: the same arguments, values and protocols."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable

import pytest
import torch
from samplers import FAMILIES
from torch import Tensor, nn
from torchjd import Stateful, aggregation
from torchjd.linalg import QuadprogProjector

import igb_kernels as igb
from igb_kernels.integrations import torchjd as ours

pytestmark = pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")

TASKS = 4


def jacobian(seed: int = 0, tasks: int = TASKS, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows of which some are in conflict."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tasks, 12, dtype=torch.float64, generator=generator)
    if tasks > 1:
        rows[1] -= 0.7 * rows[0]
    return rows.to(dtype)


def both(name: str, *args: object, **kwargs: object) -> tuple[nn.Module, nn.Module]:
    return getattr(aggregation, name)(*args, **kwargs), getattr(ours, name)(*args, **kwargs)


# ---- The same names and arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", aggregation.__all__)
def test_everything_is_there_with_the_same_arguments(name):
    theirs, own = getattr(aggregation, name), getattr(ours, name)
    expected, found = (inspect.signature(cls.__init__).parameters for cls in (theirs, own))
    assert list(found) == list(expected)
    for argument, parameter in expected.items():
        if not callable(parameter.default):  # GradDrop's f
            assert found[argument].default == parameter.default
    assert issubclass(own, aggregation.Aggregator if issubclass(theirs, aggregation.Aggregator) else ours.Weighting)
    assert issubclass(own, Stateful) or not issubclass(theirs, Stateful)


@pytest.mark.parametrize(
    ("name", "args", "changed"),
    [
        ("UPGrad", (), {"pref_vector": torch.arange(1.0, TASKS + 1)}),
        ("DualProj", (), {"pref_vector": torch.arange(1.0, TASKS + 1)}),
        ("AlignedMTL", (), {"pref_vector": torch.arange(1.0, TASKS + 1), "scale_mode": "rmse"}),
        ("ConFIG", (), {"pref_vector": torch.arange(1.0, TASKS + 1)}),
        ("CAGrad", (0.1,), {"c": 0.9, "norm_eps": 1e-3}),
        ("FairGrad", (1.0,), {"alpha": 2.0, "max_iters": 10}),
        ("GradVac", (), {"beta": 0.9, "eps": 1e-3}),
        ("MGDA", (), {"epsilon": 1e-4, "max_iters": 10}),
        ("NashMTL", (TASKS,), {"max_norm": 0.5, "update_weights_every": 2, "optim_niter": 5}),
        ("ExcessMTL", (), {"robust_step_size": 0.5, "n_warmup_steps": 3}),
    ],
)
def test_attributes_are_those_of_the_arguments_and_count_when_set(name, args, changed):
    """Also after construction, and in the representation."""
    aggregator = getattr(ours, name)(*args)
    as_argument = getattr(ours, name)(**{**({"n_tasks": TASKS} if name == "NashMTL" else {}), **changed})
    for attribute, value in changed.items():
        setattr(aggregator, attribute, value)
        assert getattr(aggregator, attribute) is value or getattr(aggregator, attribute) == value
    assert repr(aggregator) == repr(as_argument)
    assert str(aggregator) == str(as_argument)
    rows = jacobian(tasks=TASKS)
    found = []
    for each in (aggregator, as_argument, getattr(ours, name)(*args)):
        torch.manual_seed(0)
        found.append(torch.cat([each(rows) for _ in range(2)]))
    assert torch.equal(found[0], found[1])
    if name != "MGDA":  # is exact anyway
        assert not torch.equal(found[0], found[2])


# ---- The same values ------------------------------------------------------------------------------------------------

EXACT: dict[str, tuple[tuple[object, ...], float]] = {
    "AlignedMTL": ((), 1e-12),
    "ConFIG": ((), 1e-12),
    "Constant": ((torch.rand(TASKS, dtype=torch.float64),), 1e-14),
    "ExcessMTL": ((), 1e-12),
    "FairGrad": ((1.0,), 1e-7),
    "GradVac": ((), 1e-12),
    "IMTLG": ((), 1e-11),
    "Mean": ((), 1e-14),
    "NashMTL": ((TASKS,), 1e-6),
    "PCGrad": ((), 1e-13),
    "Random": ((), 1e-14),
    "Sum": ((), 1e-14),
}
"""Arguments, and how far apart the updates of the two may be: where TorchJD solves the problem itself."""


@pytest.mark.parametrize("name", EXACT)
def test_updates_are_those_of_torchjd(name):
    """Over several steps, so that states and random numbers agree, too."""
    args, tolerance = EXACT[name]
    theirs, own = both(name, *args)
    for seed in range(4):
        rows = jacobian(seed)
        torch.manual_seed(seed)
        expected = theirs(rows)
        torch.manual_seed(seed)
        assert float((own(rows) - expected).norm() / expected.norm()) < tolerance
    if isinstance(own, Stateful):
        for aggregator in (theirs, own):
            aggregator.reset()
        torch.manual_seed(9)
        expected = theirs(jacobian(9))
        torch.manual_seed(9)
        assert float((own(jacobian(9)) - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize("name", ["UPGrad", "DualProj"])
def test_cone_projections_are_those_of_torchjd_with_its_regularisation(name):
    theirs = getattr(aggregation, name)()
    as_theirs = getattr(ours, name)(projector=ours.ConeProjector(reg_eps=1e-4))
    by_theirs = getattr(ours, name)(projector=QuadprogProjector())
    for seed in range(4):
        expected = theirs(jacobian(seed))
        assert torch.allclose(as_theirs(jacobian(seed)), expected, rtol=0, atol=1e-11)
        assert torch.allclose(by_theirs(jacobian(seed)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("preference", [None, torch.tensor([3.0, 0.0, 1.0, 0.5], dtype=torch.float64)])
@pytest.mark.parametrize("name", ["UPGrad", "DualProj", "AlignedMTL", "ConFIG"])
def test_preferences_are_those_of_torchjd(name, preference):
    exact = {"projector": QuadprogProjector(norm_eps=0.0, reg_eps=1e-13)} if name in ("UPGrad", "DualProj") else {}
    theirs, own = getattr(aggregation, name)(preference, **exact), getattr(ours, name)(preference)
    for seed in range(4):
        expected = theirs(jacobian(seed))
        assert float((own(jacobian(seed)) - expected).norm() / expected.norm()) < 1e-9


@pytest.mark.parametrize("scale_mode", ["min", "median", "rmse"])
def test_aligned_mtl_has_the_scales_of_torchjd(scale_mode):
    theirs, own = both("AlignedMTL", scale_mode=scale_mode)
    assert torch.allclose(own(jacobian()), theirs(jacobian()), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match=r"scale_mode must be one of .*found 'mean'"):
        ours.AlignedMTL(scale_mode="mean")(jacobian())


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_excess_mtl_warms_up_as_that_of_torchjd(warmup):
    theirs, own = both("ExcessMTL", 0.3, warmup)
    for seed in range(6):
        expected = theirs(jacobian(seed))
        assert torch.allclose(own(jacobian(seed)), expected, rtol=1e-12, atol=1e-14)


def test_fair_grad_without_fairness_is_the_mean():
    theirs, own = both("FairGrad", 0)
    assert torch.allclose(own(jacobian()), theirs(jacobian()), rtol=1e-14, atol=0)


@pytest.mark.parametrize(("name", "tolerance"), [("MoDoWeighting", 1e-14), ("SDMGradWeighting", 1e-11)])
def test_weights_of_two_batches_are_those_of_torchjd(name, tolerance):
    theirs, own = both(name)
    cross = [jacobian(seed) @ jacobian(seed + 10).T for seed in range(3)]
    for matrix in [*cross, cross[0]]:
        assert torch.allclose(own(matrix), theirs(matrix), rtol=0, atol=tolerance)
    for weighting in (theirs, own):
        weighting.reset()
    assert torch.allclose(own(cross[0]), theirs(cross[0]), rtol=0, atol=tolerance)


def test_sdm_grad_with_a_preference_is_torchjds():
    theirs, own = both("SDMGradWeighting", pref_vector=torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=torch.float64))
    for seed in range(2):
        assert torch.equal(own(jacobian(seed) @ jacobian(5).T), theirs(jacobian(seed) @ jacobian(5).T))


def test_grad_drop_takes_one_sign_of_each_element_or_a_function_as_torchjd():
    rows, own = jacobian(), ours.GradDrop()
    positive, negative = rows.clamp_min(0).sum(0), rows.clamp_max(0).sum(0)
    torch.manual_seed(0)
    drawn = torch.stack([own(rows) for _ in range(400)])
    kept = (drawn - positive).abs() < 1e-12
    assert bool((kept | ((drawn - negative).abs() < 1e-12)).all())
    purity = 0.5 * (1 + rows.sum(0) / rows.abs().sum(0))
    assert float((kept.double().mean(0) - purity).abs().max()) < 0.12  # 5 standard deviations
    theirs, leaking = both("GradDrop", leak=torch.ones(TASKS, dtype=torch.float64))
    assert torch.allclose(leaking(rows), theirs(rows), rtol=0, atol=1e-13)
    changed, unchanged = ours.GradDrop(), ours.GradDrop()
    for own in (changed, unchanged):
        torch.manual_seed(0)
        own(rows)
    changed.leak = torch.zeros(TASKS)
    assert torch.equal(changed(rows), unchanged(rows)), "the random numbers go on"
    theirs, own = both("GradDrop", torch.round)
    torch.manual_seed(1)
    expected = theirs(rows)
    torch.manual_seed(1)
    assert torch.equal(own(rows), expected)


# ---- What they are made of ------------------------------------------------------------------------------------------

GRAMIAN: dict[str, tuple[object, ...]] = {
    "AlignedMTL": (),
    "CAGrad": (0.4,),
    "ConFIG": (),
    "DualProj": (),
    "FairGrad": (2.0,),
    "GradVac": (),
    "IMTLG": (),
    "MGDA": (),
    "NashMTL": (TASKS,),
    "PCGrad": (),
    "UPGrad": (),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", GRAMIAN)
def test_an_aggregation_is_the_weighted_sum_of_the_rows(name, dtype):
    aggregator = getattr(ours, name)(*GRAMIAN[name])
    weighting = getattr(ours, f"{name}Weighting")(*GRAMIAN[name])
    rows = jacobian(dtype=dtype)
    torch.manual_seed(0)
    weights = weighting(rows.double() @ rows.double().T)
    assert weights.dtype is torch.float64
    torch.manual_seed(0)
    found = aggregator(rows)
    assert found.dtype is dtype
    rounding = 4 * torch.finfo(dtype).eps * float((weights.abs() @ rows.double().abs()).max())
    assert torch.allclose(
        found.double(), weights @ rows.double(), rtol=0, atol=max(rounding, 1e-6 * (dtype != torch.float64))
    )
    torch.manual_seed(0)
    assert weighting.__class__(*GRAMIAN[name])(rows @ rows.T).dtype is dtype


@pytest.mark.parametrize("name", GRAMIAN)
def test_hooks_see_matrix_gramian_and_weights(name):
    aggregator, seen = getattr(ours, name)(*GRAMIAN[name]), []
    rows = jacobian()
    aggregator.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    aggregator.weighting.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    aggregator.gramian_weighting.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    found = aggregator(rows)
    (gramian, weights), (matrix, same_weights), (same_matrix, update) = seen
    assert matrix is rows
    assert same_matrix is rows
    assert update is found
    assert torch.equal(weights, same_weights)
    assert torch.allclose(gramian, rows @ rows.T, rtol=1e-13, atol=1e-13)
    aggregator.gramian_weighting.register_forward_hook(lambda _, inputs, output: torch.ones_like(output))
    assert torch.allclose(aggregator(rows), rows.sum(0), rtol=0, atol=1e-13), "a hook's weights are those in use"


def test_the_projector_is_one_of_torchjds():
    projector, rows = ours.ConeProjector(), jacobian()
    gram = rows @ rows.T
    tight = QuadprogProjector(norm_eps=0.0, reg_eps=1e-13)
    for u in (torch.rand(TASKS).double(), torch.eye(TASKS).double(), torch.rand(2, 3, TASKS).double()):
        found = projector(u, gram)
        assert found.shape == u.shape
        assert torch.allclose(found, tight(u, gram), rtol=0, atol=1e-9)
        assert bool((found @ gram >= -1e-12).all())
    assert projector(torch.eye(TASKS), gram.float()).dtype is torch.float32
    inside = aggregation.UPGrad(projector=projector)
    assert torch.allclose(inside(rows), ours.UPGrad()(rows), rtol=0, atol=1e-13)
    assert repr(projector) == "ConeProjector(reg_eps=0)"
    with pytest.raises(ValueError, match="U must have 4 columns as G has"):
        projector(torch.ones(3), gram)
    with pytest.raises(ValueError, match="reg_eps must be"):
        ours.ConeProjector(reg_eps=-1)


def test_they_are_parts_of_torchjds_own_compositions():
    rows = jacobian()
    smoothed = ours.GramianWeightedAggregator(ours.CRMOGMWeighting(ours.IMTLGWeighting(), alpha=0.5))
    expected = aggregation.GramianWeightedAggregator(
        aggregation.CRMOGMWeighting(aggregation.IMTLGWeighting(), alpha=0.5)
    )
    for seed in range(3):
        assert torch.allclose(smoothed(jacobian(seed)), expected(jacobian(seed)), rtol=1e-10, atol=0)
    assert torch.allclose(
        ours.GramianAggregator(aggregation.AlignedMTLWeighting())(rows),
        aggregation.AlignedMTL()(rows),
        rtol=1e-12,
        atol=0,
    )
    assert ours.GramianAggregator(aggregation.AlignedMTLWeighting()).status is None


# ---- Edges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", ["zero row", "all zero", "opposed", "duplicates", "rows 1e-8..1e8", "rank deficient"]
)
@pytest.mark.parametrize("name", GRAMIAN)
def test_no_row_is_too_odd(name, family):
    rows = FAMILIES[family](TASKS, torch.Generator().manual_seed(0)).float()
    aggregator = getattr(ours, name)(*GRAMIAN[name])
    assert bool(aggregator(rows).isfinite().all())
    assert isinstance(igb.Status(int(aggregator.status)), igb.Status)


@pytest.mark.parametrize("name", GRAMIAN)
def test_one_task(name):
    rows = jacobian(tasks=1)
    args = (1,) if name == "NashMTL" else GRAMIAN[name]
    found = getattr(ours, name)(*args)(rows)
    assert torch.nn.functional.cosine_similarity(found, rows[0], dim=0) > 1 - 1e-12


STATEFUL: dict[str, Callable[[], nn.Module]] = {
    "GradVac": lambda: ours.GradVac(),
    "NashMTL": lambda: ours.NashMTL(TASKS, update_weights_every=3),
    "ExcessMTL": lambda: ours.ExcessMTL(),
    "ExcessMTL, warming up": lambda: ours.ExcessMTL(0.3, 3),
    "DBMTL": lambda: ours.DBMTL(),
    "MetaBalance": lambda: ours.MethodAggregator(igb.MetaBalance()),
    "GradDrop": lambda: ours.GradDrop(),
}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", [*STATEFUL, *GRAMIAN])
def test_what_is_not_finite_gives_nan_and_a_status_and_leaves_the_state(name, value):
    make = STATEFUL.get(name) or (lambda: getattr(ours, name)(*GRAMIAN[name]))
    aggregator, other = make(), make()
    steps = [jacobian(seed) for seed in range(4)]
    steps[1][2, 3] = value
    found = []
    for seed, rows in enumerate(steps):
        torch.manual_seed(seed)
        found.append(aggregator(rows))
    assert bool(found[1].isnan().any())
    assert bool(torch.stack([found[0], *found[2:]]).isfinite().all())
    if name == "GradDrop":
        return  # it has used up a step of its random numbers
    for seed in (0, 2, 3):
        torch.manual_seed(seed)
        expected = other(steps[seed])
        assert torch.equal(found[seed], expected), "as if the step had not been"
    aggregator(steps[1])
    assert igb.Status.NON_FINITE in igb.Status(int(aggregator.status))


@pytest.mark.parametrize("name", STATEFUL)
def test_a_state_is_saved_copied_and_forgotten(name):
    torch.manual_seed(0)
    aggregator = STATEFUL[name]()
    for seed in range(2):
        aggregator(jacobian(seed))
    file = io.BytesIO()
    torch.save(aggregator.state_dict(), file)
    file.seek(0)
    restored, copied = STATEFUL[name](), copy.deepcopy(aggregator)
    restored.load_state_dict(torch.load(file))
    found = []
    for each in (aggregator, restored, copied):
        torch.manual_seed(5)
        found.append([each(jacobian(seed)) for seed in (5, 6)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    aggregator.reset()
    fresh = STATEFUL[name]()
    torch.manual_seed(5)
    again = aggregator(jacobian(5))
    torch.manual_seed(5)
    assert torch.equal(again, fresh(jacobian(5)))
    if name not in ("GradDrop", "ExcessMTL, warming up"):  # the one's weights are 1/m so early, too
        assert not torch.equal(again, found[0][0])


def test_another_number_of_rows_starts_a_state_anew():
    aggregator, fresh = ours.GradVac(), ours.GradVac()
    aggregator(jacobian())
    torch.manual_seed(0)
    found = aggregator(jacobian(tasks=3))
    torch.manual_seed(0)
    assert torch.equal(found, fresh(jacobian(tasks=3)))
    averaging = ours.DBMTL()
    averaging(jacobian())
    assert torch.equal(averaging(jacobian(tasks=3)), ours.DBMTL()(jacobian(tasks=3)))


def test_arguments_that_cannot_be():
    rows = jacobian()
    with pytest.raises(ValueError, match=r"pref_vector must hold 4 numbers, one for each row; found 2"):
        ours.UPGrad(torch.ones(2))(rows)
    with pytest.raises(ValueError, match=r"pref_vector must hold finite numbers of at least 0, found \[1.0, -1.0\]"):
        ours.DualProj(torch.tensor([1.0, -1.0]))
    with pytest.raises(ValueError, match="must have n_tasks = 3 rows, found 4"):
        ours.NashMTL(3)(rows)
    by_losses = ours.EMTL()
    by_losses.losses = torch.ones(TASKS)
    by_losses(rows)
    with pytest.raises(ValueError, match="losses must be set to 4 losses before each call, found None"):
        by_losses(rows)
    with pytest.raises(ValueError, match="method must go by the Gramian, found DBMTL"):
        ours.MethodWeighting(igb.DBMTL())(rows @ rows.T)
    with pytest.raises(TypeError, match="method must be a gradient-balancing method, found str"):
        ours.MethodAggregator("upgrad")
    with pytest.raises(ValueError, match="robust_step_size must be above 0"):
        ours.ExcessMTL(0.0)
    for name, argument in (("CAGrad", -1.0), ("MGDA", 0.0), ("NashMTL", 0)):
        with pytest.raises(ValueError, match=r"\w"):
            getattr(ours, name)(argument)


# ---- Methods that TorchJD does not have -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", [igb.MetaBalance(), igb.EMTL(), igb.DBMTL(beta=0.0), igb.NashMTL(), igb.Equal()])
def test_any_method_by_the_gramian_is_a_weighting(method):
    weighting, aggregator = ours.MethodWeighting(method), ours.MethodAggregator(method)
    for seed in range(2):
        rows = jacobian(seed)
        weighting.losses = aggregator.losses = torch.rand(TASKS)
        assert torch.allclose(weighting(rows @ rows.T) @ rows, aggregator(rows), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "method",
    [igb.DBMTL(beta=0.8), igb.DBMTL(beta=0.0), igb.MoCo(), igb.EMTL(), igb.ExcessMTL(), igb.UPGrad()],
    ids=repr,
)
def test_a_methods_aggregator_is_what_the_balancer_does(method):
    """On the gradients of losses that are linear in the parameters."""
    parameter = nn.Parameter(torch.zeros(12, dtype=torch.float64))
    balancer = igb.Balancer(copy.deepcopy(method), "none", shared=[parameter])
    aggregator = ours.MethodAggregator(method)
    for seed in range(3):
        rows, offsets = jacobian(seed), torch.rand(TASKS, dtype=torch.float64)
        losses = [row @ parameter + offset for row, offset in zip(rows, offsets, strict=True)]
        parameter.grad = None
        balancer.backward(losses)
        aggregator.losses = torch.stack(losses).detach()
        before = rows.clone()
        found = aggregator(rows)
        assert torch.allclose(found, parameter.grad, rtol=1e-12, atol=1e-14)
        assert torch.equal(rows, before), "the caller's matrix is read alone"
