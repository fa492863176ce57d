"""The protocol of nash-mtl and FAMO beyond what their trainers do: what is asked of it, and what it refuses."""

from __future__ import annotations

import copy
import json
import logging
import random
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import igb_kernels as igb
from igb_kernels import ops
from igb_kernels.integrations import famo, nash_mtl

from .protocol import Model, seeded_model

CPU = torch.device("cpu")
OPTIONS = {"stl": {"main_task": 0}}
ALL = [(module, name) for module in (nash_mtl, famo) for name in module.METHODS]
GRADIENT = ("pcgrad", "mgda", "cagrad", "nashmtl", "imtl")
IDS = [f"{module.__name__.split('.')[-1]}-{name}" for module, name in ALL]


def make(module, name: str, tasks: int = 3, **options):
    return module.WeightMethods(name, n_tasks=tasks, device=CPU, **OPTIONS.get(name, {}), **options)


def step(method, model: Model, losses: Tensor | None = None, **places):
    found, features = model.losses()
    losses = found if losses is None else losses
    return method.backward(losses=losses, **{"representation": features, **model.places(), **places})


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters()]


def jacobian_of(model: Model, at: list[Tensor] | None = None, scales: Tensor | None = None) -> Tensor:
    """The gradients of the losses [K, D] on the shared parameters."""
    losses = model.losses()[0]
    scales = torch.ones_like(losses) if scales is None else scales
    at = list(model.encoder.parameters()) if at is None else at
    rows = [torch.autograd.grad(s * loss, at, retain_graph=True) for s, loss in zip(scales, losses, strict=True)]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def update_of(model: Model) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.encoder.parameters()])


# ---- What every method does ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "name"), ALL, ids=IDS)
@pytest.mark.parametrize("tasks", [1, 2, 8])
def test_any_number_of_tasks(module, name, tasks):
    model, method = seeded_model(tasks), make(module, name, tasks)
    for _ in range(3):
        model.zero_grad()
        loss, outputs = step(method, model)
        assert all(g is not None and g.isfinite().all() for g in grads(model))
        assert loss is None or loss.isfinite()
        assert not outputs or outputs["weights"].shape == (tasks,)
        assert not outputs or not outputs["weights"].requires_grad


@pytest.mark.parametrize(("module", "name"), ALL, ids=IDS)
def test_grad_is_added_to(module, name):
    """As by `loss.backward()`; where gradients are clipped at the end, their sum is."""
    torch.manual_seed(0)
    model, found = seeded_model(), []
    for earlier in (None, 2.0):
        method = make(module, name, max_norm=0.0)
        torch.manual_seed(1)
        for p in model.parameters():
            p.grad = None if earlier is None else torch.full_like(p, earlier)
        random.seed(1)
        step(method, model)
        found.append(grads(model))
    for alone, added in zip(*found, strict=True):
        torch.testing.assert_close(added, alone + 2.0)


@pytest.mark.parametrize(("module", "name"), ALL, ids=IDS)
def test_no_step_without_what_is_needed(module, name):
    model, method = seeded_model(), make(module, name)
    with pytest.raises(ValueError, match=r"losses must .*3"):
        step(method, model, torch.stack([*model.losses()[0], torch.ones(())]))
    if name in GRADIENT or module is famo:
        with pytest.raises(ValueError, match="shared_parameters must be given"):
            step(method, model, shared_parameters=None)
    assert all(g is None for g in grads(model))
    step(method, model)  # and goes on


@pytest.mark.parametrize(("module", "name"), ALL, ids=IDS)
def test_both_ways_to_call(module, name):
    model = seeded_model()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    found = []
    for call in ("backward", "__call__"):
        torch.manual_seed(5)
        random.seed(5)
        made = make(module, name)
        losses, features = model.losses()
        model.zero_grad()
        getattr(made, call)(losses=losses, representation=features, **model.places())
        found.append(grads(model))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("module", [nash_mtl, famo])
def test_names(module):
    theirs = {"stl", "ls", "uw", "pcgrad", "mgda", "cagrad", "nashmtl", "scaleinvls", "rlw", "imtl", "dwa"}
    if module is famo:
        theirs |= {"graddrop", "log_mgda", "log_cagrad", "log_imtl", "famo", "fairgrad"}
    assert set(module.METHODS) == theirs
    for name, cls in module.METHODS.items():
        assert type(make(module, name).method) is cls
        assert getattr(module, cls.__name__) is cls
        assert cls.__name__ in module.__all__


@pytest.mark.parametrize("given", [tuple, iter, list])
def test_parameters_may_come_in_any_way(given):
    model, found = seeded_model(), []
    for way in (list, given):
        method = make(nash_mtl, "nashmtl")
        model.zero_grad()
        step(method, model, **{name: way(value) for name, value in model.places().items()})
        found.append(grads(model))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", GRADIENT)
def test_one_tensor_and_no_heads(name):
    """As in the toy problem."""
    x = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    make(nash_mtl, name, 2).backward(torch.stack([x[0] * x[1], (x**2).sum()]), shared_parameters=x)
    assert x.grad.isfinite().all()
    assert x.grad.any()


def test_a_list_of_losses():
    model, found = seeded_model(), []
    for way in (list, torch.stack):
        method = make(nash_mtl, "nashmtl")
        model.zero_grad()
        step(method, model, way(list(model.losses()[0].unbind())))
        found.append(grads(model))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


# ---- Passes -------------------------------------------------------------------------------------------------------


class Counter(nn.Module):
    """Counts the backward passes through it."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x = x.clone()
            x.register_hook(self._count)
        return x

    def _count(self, grad: Tensor) -> None:
        self.passes += 1


def counted(model: Model) -> tuple[list[Counter], Counter]:
    """The passes through each head, and through the encoder."""
    heads = [Counter() for _ in model.heads]
    encoder = Counter()
    model.heads = nn.ModuleList(nn.Sequential(c, head) for c, head in zip(heads, model.heads, strict=True))
    model.encoder[1] = nn.Sequential(encoder, model.encoder[1])
    return heads, encoder


@pytest.mark.parametrize(("module", "name"), ALL, ids=IDS)
def test_each_pass_runs_its_own_head_alone(module, name):
    model = seeded_model()
    heads, encoder = counted(model)
    step(make(module, name), model)
    passes = 1 if name in ("stl", "ls", "uw", "scaleinvls", "rlw", "dwa", "famo") else 3
    assert [c.passes for c in heads] == [1, 1, 1]
    assert encoder.passes == passes


def test_held_weights_take_one_pass():
    model, method = seeded_model(), make(nash_mtl, "nashmtl", update_weights_every=3)
    _, encoder = counted(model)
    passes, weights = [], []
    for _ in range(7):
        before = encoder.passes
        _, outputs = step(method, model)
        passes.append(encoder.passes - before)
        weights.append(outputs["weights"])
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.9)
    assert passes == [3, 1, 1, 3, 1, 1, 3]
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[2], weights[3])


@pytest.mark.parametrize("params", ["last", "rep"])
def test_gradients_compared_behind_the_encoder(params):
    """The weights are those of the gradients there, and all parameters get the gradient of the weighted loss."""
    model = seeded_model()
    losses, features = model.losses()
    at = [features] if params == "rep" else list(model.encoder[2].parameters())
    rows = [torch.autograd.grad(loss, at, retain_graph=True) for loss in losses]
    weights = 3 * ops.solve("mgda", ops.gram(rows))[0]
    expected = torch.autograd.grad((weights * losses).sum(), list(model.parameters()))
    heads, encoder = counted(model)
    loss, outputs = step(make(nash_mtl, "mgda", params=params), model)
    torch.testing.assert_close(outputs["weights"], weights)
    torch.testing.assert_close(loss, (weights * losses).sum().detach())
    for grad, truth in zip(grads(model), expected, strict=True):
        torch.testing.assert_close(grad, truth)
    assert encoder.passes == 1
    assert [c.passes for c in heads] == ([1, 1, 1] if params == "rep" else [2, 2, 2])


def test_a_representation_that_is_not_all(caplog):
    """As SegNetMtan's: tasks see the encoder around it."""
    model = seeded_model()
    losses, features = model.losses()
    losses = losses + model.encoder[0].weight.square().sum()
    rows = [torch.autograd.grad(loss, features, retain_graph=True) for loss in losses]
    weights = 3 * ops.solve("mgda", ops.gram(rows))[0]
    expected = torch.autograd.grad((weights * losses).sum(), list(model.parameters()), retain_graph=True)
    with caplog.at_level(logging.WARNING, "igb_kernels"):
        step(make(nash_mtl, "mgda", params="rep"), model, losses, representation=features)
    assert "other than through the representation" in caplog.text
    for grad, truth in zip(grads(model), expected, strict=True):
        torch.testing.assert_close(grad, truth)


# ---- Weighted losses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "name", "options"),
    [
        *(
            (module, name, {})
            for module, name in ALL
            if name not in ("pcgrad", "cagrad", "log_cagrad", "graddrop", "fairgrad", "rlw")
        ),
        (nash_mtl, "mgda", {"params": "last"}),
        (nash_mtl, "mgda", {"params": "rep"}),
        (nash_mtl, "mgda", {"normalization": "norm"}),
        (nash_mtl, "mgda", {"normalization": "loss"}),
        (nash_mtl, "mgda", {"normalization": "loss+"}),
        (famo, "log_mgda", {"normalization": "norm"}),
    ],
)
def test_the_weighted_loss_does_the_same(module, name, options):
    model, found = seeded_model(), []
    for way in ("backward", "get_weighted_loss"):
        method = make(module, name, max_norm=0.0, **options)
        for _ in range(2):
            model.zero_grad()
            losses, features = model.losses()
            loss, outputs = getattr(method, way)(losses=losses, representation=features, **model.places())
            if way == "get_weighted_loss":
                assert all(g is None for g in grads(model))
                loss.backward()
        found.append([loss.detach(), outputs["weights"], *grads(model)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["pcgrad", "cagrad"])
def test_no_weighted_loss(name):
    with pytest.raises(NotImplementedError, match=r"has no weighted loss.*backward\(\)"):
        make(nash_mtl, name).get_weighted_loss(seeded_model().losses()[0])


@pytest.mark.parametrize("normalization", ["none", "norm", "loss", "loss+"])
def test_mgda_s_normalizations(normalization):
    """The hull is that of the normalised gradients; its weights act on the gradients as they are."""
    model = seeded_model()
    _, outputs = step(make(nash_mtl, "mgda", normalization=normalization), model)
    jacobian, losses = jacobian_of(model), model.losses()[0].detach()
    divisor = torch.ones(3, dtype=torch.float64)
    if normalization in ("norm", "loss+"):
        divisor = divisor * jacobian.norm(dim=1)
    if normalization in ("loss", "loss+"):
        divisor = divisor * losses
    normalised = jacobian / divisor[:, None]
    weights = outputs["weights"] / 3
    shortest = normalised.T @ weights
    assert weights.sum() == pytest.approx(1)
    assert bool((normalised @ shortest >= shortest @ shortest * (1 - 1e-9)).all())
    torch.testing.assert_close(update_of(model), 3 * jacobian.T @ weights)


# ---- Changes on the way -------------------------------------------------------------------------------------------


def test_other_shared_parameters_midway():
    """As after layers were frozen: what the method remembers goes on."""
    model, method = seeded_model(), make(nash_mtl, "nashmtl", update_weights_every=2, max_norm=0.0)
    _, first = step(method, model)
    for p in model.encoder[0].parameters():
        p.requires_grad_(False)
    model.zero_grad()
    _, second = step(method, model, shared_parameters=list(model.encoder[2].parameters()))
    assert torch.equal(first["weights"], second["weights"])  # held
    _, third = step(method, model, shared_parameters=list(model.encoder[2].parameters()))
    gram = jacobian_of(model, list(model.encoder[2].parameters()))
    gram = gram @ gram.T
    torch.testing.assert_close(third["weights"] * (gram @ third["weights"]), torch.ones(3, dtype=torch.float64))
    assert model.encoder[0].weight.grad is None


@pytest.mark.parametrize("earlier", [0.0, 100.0])
def test_when_famo_s_code_clips(earlier):
    """What was in `.grad` before the passes, except where it makes the gradient itself."""
    model = seeded_model()
    for name, after in (("ls", False), ("nashmtl", False), ("imtl", False), ("mgda", False), ("cagrad", True)):
        for p in model.parameters():
            p.grad = torch.full_like(p, earlier)
        step(make(famo, name, max_norm=0.01), model)
        norm = float(update_of(model).norm())
        assert (norm <= 0.01 + 1e-9) == after
        assert norm < 20


@pytest.mark.parametrize("name", ["ls", "imtl", "nashmtl", "pcgrad"])
def test_max_norm(name):
    model = seeded_model()
    step(make(nash_mtl, name, max_norm=0.125), model)
    assert float(update_of(model).norm()) == pytest.approx(0.125, rel=1e-4)


def test_heads_get_their_own_losses_gradient_whole():
    """Nash-MTL's clipping is of the shared parameters alone."""
    model, found = seeded_model(), []
    for max_norm in (0.0, 0.01):
        model.zero_grad()
        step(make(nash_mtl, "nashmtl", max_norm=max_norm), model)
        found.append([p.grad for p in model.heads.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


# ---- FAMO's own ---------------------------------------------------------------------------------------------------


def test_famo_s_lowest_losses():
    """May be set as training goes on; the weights are those of log(L - lowest)."""
    model, method = seeded_model(), make(famo, "famo")
    step(method, model)
    losses = model.losses()[0].detach()
    method.method.update(losses)
    lowest = losses / 2
    method.method.set_min_losses(lowest)
    model.zero_grad()
    loss, outputs = step(method, model)
    z, distance = outputs["weights"], losses - lowest + 1e-8
    c = (z / distance).sum()
    torch.testing.assert_close(loss.detach(), (z * distance.log()).sum() / c)
    torch.testing.assert_close(update_of(model), jacobian_of(model).T @ (z / distance / c))
    for wrong in (torch.ones(2), torch.tensor([torch.nan, 1, 1])):
        with pytest.raises(ValueError, match="lower must be"):
            method.method.set_min_losses(wrong)
    torch.testing.assert_close(method.method.min_losses, lowest)


def test_famo_learns_after_backward_only():
    method = make(famo, "famo")
    with pytest.raises(RuntimeError, match="update comes after backward"):
        method.method.update(torch.ones(3))
    step(method, seeded_model())
    with pytest.raises(ValueError, match=r"losses must be a tensor of shape \(3,\)"):
        method.method.update(torch.ones(2))


def test_fairgrad():
    """(G w)^alpha = 1 / w for the weights told; the update is K times theirs."""
    model = seeded_model()
    _, outputs = step(make(famo, "fairgrad", alpha=2.0, max_norm=0.0), model)
    jacobian, weights = jacobian_of(model), outputs["weights"].double()
    torch.testing.assert_close((jacobian @ jacobian.T) @ weights, weights ** (-1 / 2))
    torch.testing.assert_close(update_of(model), 3 * jacobian.T @ weights)
    torch.testing.assert_close(outputs["GTG"], jacobian @ jacobian.T)


def test_graddrop():
    """Of every element the gradients of one sign are kept, whole."""
    torch.manual_seed(0)
    model = seeded_model()
    assert step(make(famo, "graddrop", max_norm=0.0), model) == (None, None)
    jacobian = jacobian_of(model)
    update = update_of(model)
    either = torch.stack([jacobian.clamp_min(0).sum(0), jacobian.clamp_max(0).sum(0)])
    assert bool(((update - either).abs().amin(0) < 1e-12).all())


@pytest.mark.parametrize("name", ["imtl", "log_imtl", "cagrad", "log_cagrad", "nashmtl"])
def test_famo_s_gramians(name):
    model = seeded_model()
    _, outputs = step(make(famo, name), model)
    losses = model.losses()[0].detach()
    scales = torch.ones(3) if not name.startswith("log_") else 1 / (losses + (1e-8 if name == "log_imtl" else 0))
    jacobian = jacobian_of(model, scales=scales)
    gram = jacobian @ jacobian.T
    torch.testing.assert_close(outputs["GTG"], gram / gram.norm() if name == "nashmtl" else gram)


def test_no_gramian_where_weights_are_held():
    """There, the original raises."""
    model, method = seeded_model(), make(famo, "nashmtl", update_weights_every=2)
    assert ["GTG" in step(method, model)[1] for _ in range(3)] == [True, False, True]


@pytest.mark.parametrize("name", ["log_imtl", "log_mgda", "log_cagrad", "scaleinvls", "famo"])
def test_a_negative_loss_under_a_logarithm(name):
    """Makes the step NaN; the originals ascend that task."""
    model = seeded_model()
    step(make(famo, name, max_norm=0.0), model, model.losses()[0] - torch.tensor([1e3, 0.0, 0.0]))
    assert update_of(model).isnan().all()


# ---- Refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nash", {}, "method must be one of .*'nashmtl'.*found 'nash'"),
        ("ls", {"task_weights": [1.0]}, r"task_weights must have shape \(3,\), found \(1,\)"),
        ("stl", {"main_task": 3}, "main_task must be 0 to 2, found 3"),
        ("mgda", {"params": "all"}, "params must be one of .*found 'all'"),
        ("mgda", {"normalization": "l2"}, "normalization must be one of .*found 'l2'"),
        ("nashmtl", {"max_norm": -1.0}, "max_norm must be a finite number of at least 0, found -1.0"),
        ("nashmtl", {"update_weights_every": 0}, "update_every must be an integer of at least 1, found 0"),
        ("pcgrad", {"reduction": "max"}, "reduction must be one of .*found 'max'"),
        ("dwa", {"iteration_window": 0}, "window must be None or an integer of at least 1, found 0"),
    ],
)
def test_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        nash_mtl.WeightMethods(name, n_tasks=3, device=CPU, **options)


@pytest.mark.parametrize("tasks", [0, -1, 2.0])
def test_refused_numbers_of_tasks(tasks):
    with pytest.raises(ValueError, match="n_tasks must be an integer of at least 1"):
        nash_mtl.WeightMethods("ls", n_tasks=tasks, device=CPU)


@pytest.mark.parametrize(("params", "place"), [("last", "last_shared_parameters"), ("rep", "representation")])
def test_refused_without_where_to_compare(params, place):
    model = seeded_model()
    with pytest.raises(ValueError, match=f"{place} must be given where params is {params!r}"):
        step(make(nash_mtl, "mgda", params=params), model, **{place: None})
    assert all(g is None for g in grads(model))


def test_importing_needs_torch_alone():
    script = (
        "import json, sys\n"
        "from igb_kernels.integrations import famo, igb4mtl, nash_mtl\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert not {"cvxpy", "ecos", "scipy", "stable_baselines3"} & set(json.loads(result.stdout))


def test_a_copy_goes_on_alone():
    model, method = seeded_model(), make(nash_mtl, "nashmtl", update_weights_every=2)
    step(method, model)
    other, copied = copy.deepcopy((model, method))
    model.zero_grad()
    other.zero_grad()
    step(method, model)
    step(copied, other)
    assert all(torch.equal(a, b) for a, b in zip(grads(model), grads(other), strict=True))


def test_the_last_result_is_there():
    model, method = seeded_model(), make(nash_mtl, "nashmtl")
    step(method, model)
    assert method.method.result.flags == igb.Status(0)
    jacobian = jacobian_of(model)
    torch.testing.assert_close(method.method.result.gram, jacobian @ jacobian.T)
