"""LibMTL with this package's weightings: its own Trainer, against its own weightings on the same seed."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import igb_kernels as igb
from igb_kernels._log import warn_once

from .libmtl_on_cpu import METHODS, TASKS, TASKS_OF, TODAY, LibMTL, Trainer, losses_of, model_of, train, trained
from .libmtl_on_cpu import trainer_of as new_trainer

libmtl = pytest.importorskip("igb_kernels.integrations.libmtl")

RECORDED = json.loads(Path(__file__).with_name("libmtl.json").read_text())
THEIRS = vars(LibMTL.weighting).copy()
NAMES = sorted(libmtl.install())
libmtl.uninstall()
CLOSE = {"CAGrad": 1e-4, "MGDA": 1e-5}
"""How close LibMTL's solvers come to the solution; all others to within rounding."""


@pytest.fixture(autouse=True)
def only_theirs() -> Iterator[None]:
    """LibMTL as it was, before and after each test."""
    yield
    libmtl.uninstall()
    assert vars(LibMTL.weighting).keys() - {"__builtins__"} == THEIRS.keys() - {"__builtins__"}
    assert all(vars(LibMTL.weighting)[name] is THEIRS[name] for name in libmtl.LIBMTL if name in THEIRS)


def arguments(name: str, trainer: bool = True) -> dict[str, Any]:
    """As the installed LibMTL calls them."""
    if name == "GradVac" and not TODAY:
        return {"beta": 0.5}
    return {"dist": "Normal"} if name == "RLW" else METHODS[name]


def parameters_of(trainer: Trainer) -> Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def gap(ours: Tensor, theirs: Tensor, before: Tensor) -> float:
    """Of two trainings' parameters, relative to how far they have come."""
    return float((ours - theirs).norm() / (theirs - before).norm())


def grads_of(model: torch.nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


# ---- Against LibMTL ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECORDED)
def test_nine_steps_are_those_that_libmtl_took(name):
    before, ours = trained(libmtl.weighting(name), name)
    assert gap(ours, torch.tensor(RECORDED[name]), before) < CLOSE.get(name, 2e-6)


IN_TRAINING = ["EW", "UW", "DWA", "GLS", "IMTL", "MGDA", "PCGrad", "GradNorm"]
IN_TRAINING += [
    "STCH",
    "FAMO",
    "GradVac",
    "MoCo",
    "DB_MTL",
    "ExcessMTL",
    "FairGrad",
    "MoDo",
    "SDMGrad",
    "UPGrad",
] * TODAY
SAME_WEIGHTS = {
    "EW",
    "UW",
    "DWA",
    "IMTL",
    "MGDA",
    "PCGrad",
    "GradNorm",
    "MoCo",
    "ExcessMTL",
    "FairGrad",
    "MoDo",
    "UPGrad",
}
"""LibMTL returns for the others something else than the weights that it uses."""


@pytest.mark.parametrize("multi_input", [False, True], ids=["one input", "an input for each task"])
@pytest.mark.parametrize("name", IN_TRAINING)
def test_a_training_in_place_of_theirs(name, multi_input):
    tasks = min(TASKS_OF.get(name, 3), 3)
    weight_args = arguments(name) | ({"mgda_gn": "none"} if name == "MGDA" else {})
    runs = []
    for replace in (False, True):
        libmtl.install(replace=replace)
        trainer = new_trainer(name, tasks, multi_input=multi_input, **weight_args)
        before = parameters_of(trainer)
        weights = train(trainer)
        runs.append((parameters_of(trainer), weights))
    (theirs, their_weights), (ours, weights) = runs
    assert isinstance(trainer.model, libmtl.Weighting)
    assert gap(ours, theirs, before) < CLOSE.get(name, 2e-6)
    assert weights.shape == (tasks, 3, 4)
    if name in SAME_WEIGHTS:
        np.testing.assert_allclose(weights, their_weights, rtol=1e-3 if name in CLOSE else 1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["UW", "IMTL", "GradNorm"])
def test_learned_parameters_go_with_the_optimizer_and_checkpoints(name):
    runs = []
    for replace in (False, True):
        libmtl.install(replace=replace)
        trainer = new_trainer(name, optim={"optim": "adam", "lr": 0.01, "weight_decay": 1e-3}, **arguments(name))
        before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
        train(trainer)
        runs.append(trainer.model.state_dict())
    theirs, ours = runs
    assert ours.keys() == theirs.keys()
    assert not torch.equal(ours["loss_scale"], before["loss_scale"])
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=2e-5)


SOLVERS = {"MGDA": "mgda", "CAGrad": "cagrad", "Nash_MTL": "nash_mtl", "UPGrad": "upgrad"}


def rows_of(model: torch.nn.Module, losses: Tensor) -> Tensor:
    """Task gradients of the shared parameters [K, D], float64."""
    shared = list(model.get_share_params())
    grads = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in grads]).double()


def residual(name: str, rows: Tensor, update: Tensor, weights: Tensor) -> float:
    """How far an update is from what its method asks for; 0 at the solution, and relative."""
    gram, along = rows @ rows.T, rows @ update
    if name == "MGDA":  # g_k · d ≥ |d|²
        return float((update @ update - along.min()) / (update @ update))
    if name == "CAGrad":  # the largest smallest g_k · d in the ball, against the exact one
        exact, _ = igb.ops.solve("cagrad", gram, c=0.5)
        best = (gram @ exact).min()
        lost = best - (1 + 0.5**2) * along.min()
        return float(lost.abs() / rows.norm(dim=1).min() / update.norm())
    if name == "Nash_MTL":  # w_k (G w)_k = 1
        return float((weights * (gram @ weights) - 1).abs().max())
    return float(-(along / rows.norm(dim=1) / update.norm()).min())  # UPGrad: no conflict


@pytest.mark.parametrize("name", [name for name in SOLVERS if name in THEIRS])
def test_the_solution_where_libmtl_has_an_approximation(name):
    """Losses of 1 : 30 : 1000, on gradients that conflict."""
    worst = {"theirs": -1.0, "ours": -1.0}
    weight_args = METHODS[name] | ({"mgda_gn": "none"} if name == "MGDA" else {})
    for seed in range(3):
        for who in worst:
            cls = THEIRS[name] if who == "theirs" else libmtl.weighting(name)
            model = model_of(cls)
            losses = losses_of(model, 31 * seed) * torch.tensor([1.0, 30.0, 1000.0])
            rows = rows_of(model, losses)
            for p in model.get_share_params():
                p.grad = torch.zeros_like(p)
            options = {"UPGrad_reg_eps": 0.0} if (name, who) == ("UPGrad", "ours") else {}
            weights = torch.as_tensor(model.backward(losses, **{**weight_args, **options}), dtype=torch.float64)
            update = torch.cat([p.grad.flatten() for p in model.get_share_params()]).double()
            worst[who] = max(worst[who], residual(name, rows, update, weights))
    assert worst["ours"] < 1e-4, worst
    assert worst["theirs"] > 1e-3, worst


# ---- Representations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multi_input", [False, True], ids=["one input", "an input for each task"])
def test_a_training_at_representations(multi_input):
    runs = []
    for replace in (False, True):
        libmtl.install(replace=replace)
        trainer = new_trainer("IMTL", rep_grad=True, multi_input=multi_input)
        before = parameters_of(trainer)
        weights = train(trainer)
        runs.append((parameters_of(trainer), weights))
    (theirs, their_weights), (ours, weights) = runs
    assert gap(ours, theirs, before) < 2e-5
    np.testing.assert_allclose(weights, their_weights, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("multi_input", [False, True], ids=["one input", "an input for each task"])
@pytest.mark.parametrize("mgda_gn", ["none", "l2", "loss", "loss+"])
def test_mgda_at_representations(mgda_gn, multi_input):
    grads = []
    for cls in (THEIRS["MGDA"], libmtl.weighting("MGDA")):
        # Of two tasks, theirs is exact, but for 0.999 in the place of 1.
        model = model_of(cls, 2, rep_grad=True, multi_input=multi_input)
        model.backward(losses_of(model), mgda_gn=mgda_gn)
        grads.append(grads_of(model))
    for name, grad in grads[0].items():
        off = float((grads[1][name] - grad).abs().max() / grads[0]["encoder.layers.0.weight"].abs().max())
        assert off < 1e-2, f"{name}: {off}"


@pytest.mark.parametrize("multi_input", [False, True], ids=["one input", "an input for each task"])
@pytest.mark.parametrize("name", ["cagrad", "nash_mtl", "aligned_mtl", "excess_mtl", "uw", "log+imtl_g", "equal"])
def test_representations_with_other_methods(name, multi_input):
    """The weights are those for the summed gradients of each task's representations; the encoder gets each of them
    weighted, and the heads theirs."""
    model = model_of(libmtl.weighting(name), rep_grad=True, multi_input=multi_input)
    losses = losses_of(model)
    kwargs = {"max_norm": 0.0} if name == "nash_mtl" else {}
    model.backward(losses, **kwargs)
    result, got = model.balance_result, grads_of(model)

    plain = model_of(libmtl.weighting("equal"), multi_input=multi_input)
    losses = losses_of(plain)
    encoder = list(plain.encoder.parameters())
    for k, loss in enumerate(losses):
        rows = torch.autograd.grad(loss, encoder, retain_graph=True)
        for p, row in zip(encoder, rows, strict=True):
            p.grad = (0 if p.grad is None else p.grad) + result.total_weights[k].float() * row
    own = result.total_weights if name in libmtl.WEIGHTED_HEADS else result.scales
    heads = list(plain.decoders.parameters())
    for p, grad in zip(heads, torch.autograd.grad(losses, heads, own.float()), strict=True):
        p.grad = grad
    for key, grad in grads_of(plain).items():
        torch.testing.assert_close(got[key], grad, rtol=1e-4, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")


def test_the_gramian_is_that_of_summed_representations():
    model = model_of(libmtl.weighting("imtl_g"), rep_grad=True)
    losses = losses_of(model)
    grads = [torch.autograd.grad(losses[k], model.rep_tasks[t], retain_graph=True)[0] for k, t in enumerate(TASKS)]
    rows = torch.stack([grad.sum(dim=0) for grad in grads]).double()
    model.backward(losses)
    torch.testing.assert_close(model.balance_result.gram, rows @ rows.T, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", libmtl.NOT_AT_REPRESENTATIONS)
def test_methods_of_parameters_alone(name):
    model = model_of(libmtl.weighting(name), rep_grad=True)
    with pytest.raises(ValueError, match=f"rep_grad must be False for {name}"):
        model.backward(losses_of(model))
    assert all(p.grad is None for p in model.parameters())


def test_representations_of_different_sizes():
    model = model_of(libmtl.weighting("imtl_g"), rep_grad=True, multi_input=True)
    losses = losses_of(model)
    model.rep_tasks["mass"] = torch.zeros(4, 7, requires_grad=True)
    with pytest.raises(ValueError, match=r"one size for all tasks with rep_grad, found \[\(7,\), \(5,\), \(5,\)\]"):
        model.backward(losses)


# ---- Names and arguments ----------------------------------------------------------------------------------------


def test_every_method_and_rule_has_a_name():
    known = libmtl.install()
    assert all(vars(LibMTL.weighting)[name] is cls for name, cls in known.items())
    assert {f"igb_{name}" for name in libmtl.LIBMTL} <= known.keys()
    assert {"igb_IGBv1", "igb_IGBv2", "igb_IMTLG", "igb_ConFIG", "igb_EMTL", "igb_DualProj", "igb_Log"} <= known.keys()
    methods = {cls.method.name for cls in known.values()}
    rules = {cls.rule.name for cls in known.values() if cls.rule is not None}
    assert methods == igb.gradients.METHODS.keys()
    assert rules == igb.losses.RULES.keys() - {"none"}


@pytest.mark.parametrize("name", NAMES)
def test_every_one_of_them_trains(name):
    libmtl.install()
    trainer = new_trainer(name)
    before = parameters_of(trainer)
    weights = train(trainer, epochs=2, samples=8)
    assert np.isfinite(weights).all()
    assert bool(parameters_of(trainer).isfinite().all())
    assert not torch.equal(parameters_of(trainer), before)


def test_combinations_by_name():
    libmtl.install("igb_v1+db_mtl", "uw+grad_norm")
    trainer = new_trainer("igb_v1+db_mtl", DB_beta=0.5)
    train(trainer)
    balancer = trainer.model.balancer
    assert isinstance(balancer.losses, igb.IGBv1)
    assert balancer.gradients.beta == 0.5
    means = trainer.model.train_loss_buffer
    assert means.shape == (3, 3)
    assert bool((balancer.losses.base_losses > 0).all())

    trainer = new_trainer("uw+grad_norm")
    train(trainer)
    learned = {name: p for name, p in trainer.model.named_parameters() if "scale" in name}
    assert learned.keys() == {"loss_scale", "grad_scale"}
    assert all(p.grad is not None and p.grad.any() for p in learned.values())


def test_base_losses_are_those_of_the_second_epoch():
    libmtl.install()
    trainer = new_trainer("igb_IGBv1")
    train(trainer, epochs=3, samples=12)  # batches of one size
    base = trainer.model.balancer.losses.base_losses
    np.testing.assert_allclose(base, trainer.model.train_loss_buffer[:, 1], rtol=1e-6)


def test_dwa_takes_the_means_that_the_trainer_has():
    model = model_of(libmtl.weighting("DWA"))
    model.train_loss_buffer = np.array([[1.0, 2.0, 0.0], [1.0, 1.0, 0.0], [4.0, 1.0, 0.0]])
    for epoch in (0, 1):
        model.epoch = epoch
        np.testing.assert_array_equal(model.backward(losses_of(model), T=2.0), np.ones(3))
    model.epoch = 2
    weights = model.backward(losses_of(model), T=2.0)
    np.testing.assert_allclose(weights, 3 * torch.softmax(torch.tensor([2.0, 1.0, 0.25]) / 2, 0), rtol=1e-6)


def test_a_resumed_training_tells_the_epochs_before():
    model = model_of(libmtl.weighting("STCH"))
    model.epoch = 3
    model.backward(losses_of(model), STCH_warmup_epoch=2)
    assert bool(model.balancer.losses.nadir.isnan().all())
    model.epoch = 4
    model.backward(losses_of(model), STCH_warmup_epoch=2)
    torch.testing.assert_close(model.balancer.losses.nadir, losses_of(model).detach().double(), rtol=1e-1, atol=0)


def test_arguments_may_change_and_state_stays():
    model = model_of(libmtl.weighting("ExcessMTL"))
    model.backward(losses_of(model), robust_step_size=0.1)
    first = model.balancer
    second = model.backward(losses_of(model), robust_step_size=0.1)
    assert model.balancer is first
    np.testing.assert_allclose(model.backward(losses_of(model), robust_step_size=0.0), second, rtol=1e-6)
    assert model.balancer is not first
    assert not np.allclose(model.backward(losses_of(model), robust_step_size=10.0), second)


def test_options_of_a_class_and_of_the_trainer():
    cls = libmtl.weighting("cagrad", c=0.2, rescale=2)
    model = model_of(cls)
    model.backward(losses_of(model))
    assert (model.balancer.gradients.c, model.balancer.gradients.rescale) == (0.2, 2)
    model.backward(losses_of(model), calpha=0.3)
    assert (model.balancer.gradients.c, model.balancer.gradients.rescale) == (0.3, 2)
    assert model_of(libmtl.weighting("uw", initial=0.25)).loss_scale.tolist() == [0.25] * 3


def test_command_lines():
    libmtl.install("igb_v1+cagrad", replace=["MoCo"])
    parser, prepare_args = LibMTL.config.LibMTL_args, LibMTL.config.prepare_args
    cases = [("igb_CAGrad", ["--calpha", "0.25"], {"calpha": 0.25, "rescale": 1})]
    cases += [("igb_v1+cagrad", ["--rescale", "2"], {"calpha": 0.5, "rescale": 2}), ("igb_IGBv1", [], {})]
    cases += [("igb_MGDA", ["--mgda_gn", "l2"], {"mgda_gn": "l2"}), ("MGDA", ["--mgda_gn", "l2"], {"mgda_gn": "l2"})]
    if TODAY:
        found = {"MoCo_beta": 0.5, "MoCo_beta_sigma": 0.5, "MoCo_gamma": 0.1, "MoCo_gamma_sigma": 0.5, "MoCo_rho": 0.25}
        cases += [("MoCo", ["--MoCo_rho", "0.25"], found), ("igb_DB_MTL", [], {"DB_beta": 0.9, "DB_beta_sigma": 0})]
    for name, given, expected in cases:
        params = parser.parse_args(["--weighting", name, *given])
        kwargs, _, _ = prepare_args(params)
        assert kwargs["weight_args"] == expected
        assert params.weighting == name
        libmtl.weighting(name.removeprefix("igb_") if name in ("igb_CAGrad", "igb_MGDA") else "cagrad")
    with pytest.raises(ValueError, match="No support weighting"):
        prepare_args(parser.parse_args(["--weighting", "igb"]))


@pytest.mark.parametrize("name", [name for name in libmtl.LIBMTL if name in THEIRS])
def test_defaults_are_those_of_libmtls_command_line(name):
    kwargs, _, _ = LibMTL.config.prepare_args(LibMTL.config.LibMTL_args.parse_args(["--weighting", name]))
    made = []
    for weight_args in ({}, kwargs["weight_args"]):
        model = model_of(libmtl.weighting(name))
        model.backward(losses_of(model), **weight_args)
        made.append(repr(model.balancer))
    assert made[0] == made[1]


def test_some_in_place_of_theirs():
    known = libmtl.install(replace=["MGDA"])
    assert LibMTL.weighting.MGDA is known["MGDA"]
    assert LibMTL.weighting.IMTL is THEIRS["IMTL"]
    assert LibMTL.weighting.GradDrop is THEIRS["GradDrop"]
    libmtl.install(replace=True)
    ours = [name for name in libmtl.LIBMTL if isinstance(vars(LibMTL.weighting).get(name), type(libmtl.Weighting))]
    replaced = {name for name in ours if issubclass(vars(LibMTL.weighting)[name], libmtl.Weighting)}
    assert replaced == {name for name in libmtl.LIBMTL if name in THEIRS} - {"GradDrop"}
    libmtl.uninstall()
    libmtl.uninstall()
    assert LibMTL.weighting.MGDA is THEIRS["MGDA"]
    assert not hasattr(LibMTL.weighting, "igb_MGDA")


def test_unknown_names_change_nothing():
    with pytest.raises(ValueError, match=r"replace must name weightings of LibMTL, .*; found \['igb_v1'\]"):
        libmtl.install(replace=["igb_v1"])
    with pytest.raises(ValueError, match="found 'igb_v1\\+nash'"):
        libmtl.install("igb_v1+nash")
    for name in ("DBMTL", "nash_mtl+igb_v1", "uw+uw+mgda", ""):
        with pytest.raises(ValueError, match='"rule\\+method" of the methods'):
            libmtl.weighting(name)
    assert "igb_EW" not in vars(LibMTL.weighting)


@pytest.mark.parametrize(
    ("name", "weight_args", "error", "message"),
    [
        ("MGDA", {"calpha": 0.5}, TypeError, "weight_args must be arguments of MGDA.*found 'calpha'"),
        ("EW", {"T": 2.0}, TypeError, "arguments of Equal.*found 'T'"),
        ("famo+modo", {"gamma": 0.1}, TypeError, "arguments of FAMO and MoDo.*both have it"),
        ("RLW", {"dist": "Uniform"}, ValueError, "dist must be 'Normal' with igb_kernels, found 'Uniform'"),
        ("GradVac", {"GradVac_group_type": 1}, ValueError, "GradVac_group_type must be 0 with igb_kernels, found 1"),
        ("MGDA", {"mgda_gn": "max"}, ValueError, "normalization must be one of"),
        ("Nash_MTL", {"update_weights_every": 0}, ValueError, "update_every must be"),
        ("UW", {"num_tasks": 3}, TypeError, "found 'num_tasks'"),
        ("UW", {"initial": 0.0}, TypeError, "found 'initial'"),
    ],
)
def test_arguments_that_are_not_understood(name, weight_args, error, message):
    model = model_of(libmtl.weighting(name))
    with pytest.raises(error, match=message):
        model.backward(losses_of(model), **weight_args)
    assert all(p.grad is None for p in model.parameters())
    model.backward(losses_of(model))


def test_options_are_checked_with_the_class():
    with pytest.raises(TypeError, match="found 'betta'"):
        libmtl.weighting("igb_v1+db_mtl", betta=0.5)


def test_the_wrong_number_of_losses():
    model = model_of(libmtl.weighting("DB_MTL"))
    with pytest.raises(ValueError, match="losses must hold 3 tasks"):
        model.backward(losses_of(model)[:2])


# ---- The rest of the protocol -----------------------------------------------------------------------------------


@pytest.mark.parametrize("multi_input", [False, True], ids=["one input", "an input for each task"])
def test_each_task_runs_its_own_modules_alone(multi_input, caplog):
    """Through the tensor that the Trainer puts the losses in, each pass would run all heads, and all encoders."""
    warn_once.cache_clear()
    libmtl.install()
    trainer = new_trainer("igb_DB_MTL", multi_input=multi_input)
    runs = dict.fromkeys(TASKS, 0)
    for task in TASKS:
        hook = lambda *_, task=task: runs.__setitem__(task, runs[task] + 1)  # noqa: E731
        trainer.model.decoders[task].weight.register_post_accumulate_grad_hook(hook)
    with caplog.at_level(logging.WARNING, "igb_kernels"):
        train(trainer, epochs=1, samples=8)
    assert runs == dict.fromkeys(TASKS, 2)
    assert not caplog.records


@pytest.mark.parametrize("name", ["MoDo", "SDMGrad"])
def test_three_batches(name):
    """Of one batch three times, heads get what LibMTL gives them: the mean, or the sum."""
    model = model_of(libmtl.weighting(name))
    losses = torch.stack([losses_of(model, seed) for seed in (0, 1, 2)]).squeeze(0)
    model.backward(losses)
    got = grads_of(model)
    plain = model_of(libmtl.weighting("EW"))
    for seed in (0, 1, 2):
        plain.backward(losses_of(plain, seed))
    for key, grad in grads_of(plain).items():
        if key.startswith("decoders"):
            torch.testing.assert_close(got[key], grad / 3 if name == "MoDo" else grad)


def test_one_batch_for_a_method_of_three_is_said(caplog):
    warn_once.cache_clear()
    model = model_of(libmtl.weighting("SDMGrad"))
    with caplog.at_level(logging.WARNING, "igb_kernels"):
        model.backward(losses_of(model))
    assert "samples three for the names" in caplog.text


def test_famo_is_told_the_losses_after_the_step():
    model = model_of(libmtl.weighting("FAMO"))
    with pytest.raises(RuntimeError, match="update_w comes after backward"):
        model.update_w(losses_of(model).detach())
    first = model.backward(losses_of(model))
    model.update_w(losses_of(model).detach() * torch.tensor([0.5, 1.0, 1.0]))
    assert not np.allclose(model.backward(losses_of(model)), first)


def test_nash_mtl_clips_what_the_shared_parameters_get_alone():
    model = model_of(libmtl.weighting("Nash_MTL"))
    weights = model.backward(losses_of(model), max_norm=0.1)
    norm = torch.cat([p.grad.flatten() for p in model.encoder.parameters()]).norm()
    torch.testing.assert_close(norm, torch.tensor(0.1), rtol=1e-4, atol=0)
    plain = model_of(libmtl.weighting("EW"))
    plain.backward(losses_of(plain))
    for k, task in enumerate(TASKS):
        expected = plain.decoders[task].weight.grad * float(weights[k])
        torch.testing.assert_close(model.decoders[task].weight.grad, expected)


def test_models_are_copied_with_their_state():
    """LibMTL's bilevel methods copy the model."""
    model = model_of(libmtl.weighting("DB_MTL"))
    model.backward(losses_of(model))
    other = copy.deepcopy(model)
    for m in (model, other):
        m.zero_grad()
        m.backward(losses_of(m, 3))
    for key, grad in grads_of(model).items():
        assert torch.equal(grad, grads_of(other)[key])
    assert other.balancer is not model.balancer
    assert other.balancer.shared[0] is next(other.encoder.parameters())


def test_what_a_step_did_can_be_read():
    model = model_of(libmtl.weighting("log+imtl_g"))
    assert model.balancer is None
    assert model.balance_result is None
    weights = model.backward(losses_of(model))
    assert isinstance(weights, np.ndarray)
    np.testing.assert_array_equal(weights, model.balance_result.weights)
    assert model.balance_result.cosines.shape == (3, 3)
