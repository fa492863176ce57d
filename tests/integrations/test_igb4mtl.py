"""IGB4MTL's protocol: loss methods, gradient methods, and what the trainers tell them."""

from __future__ import annotations

import pytest
import torch
from golden import cases
from torch import Tensor

import igb_kernels as igb
from igb_kernels.agents.sac import SACAgent
from igb_kernels.integrations import igb4mtl
from igb_kernels.losses import igb_v2

from .protocol import Model, seeded_model
from .test_nash_mtl import counted, grads, jacobian_of, update_of

CPU = torch.device("cpu")
OPTIONS = {"stl": {"main_task": 0}}


def make_loss(name: str, **options) -> igb4mtl.LossWeightMethods:
    made = igb4mtl.LossWeightMethods(name, n_tasks=3, device=CPU, **OPTIONS.get(name, {}), **options)
    if name == "igbv2":
        made.method.train_batch = 5
    return made


def make_gradient(name: str, **options) -> igb4mtl.GradientWeightMethods:
    return igb4mtl.GradientWeightMethods(name, n_tasks=3, device=CPU, **options)


def weigh(loss, model: Model, losses: Tensor | None = None) -> tuple[Tensor, Tensor]:
    found, features = model.losses()
    weighted, outputs = loss.get_weighted_losses(
        losses=found if losses is None else losses, representation=features, **model.places()
    )
    return weighted, outputs["weights"]


# ---- Pairs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [*igb4mtl.LOSS_METHODS])
@pytest.mark.parametrize("gradient", [*igb4mtl.GRADIENT_METHODS])
def test_every_pair(loss, gradient):
    """Two steps, and gradients for all that the losses depend on; log-variances are learned with every method."""
    model, first, second = seeded_model(), make_loss(loss), make_gradient(gradient)
    for _ in range(2):
        model.zero_grad()
        weighted, weights = weigh(first, model)
        assert not weights.requires_grad
        second.backward(losses=weighted, **model.places())
        assert all(g is not None and g.isfinite().all() for g in grads(model))
        assert all(p.grad is not None and p.grad.any() for p in first.parameters())
        assert [*second.parameters()] == []


@pytest.mark.parametrize("loss", ["si", "igbv1", "ls", "rlwlog"])
@pytest.mark.parametrize("gradient", ["mgda", "cagrad", "nashmtl", "imtl", "pcgrad", "ls"])
def test_passes_start_at_the_losses_themselves(loss, gradient):
    """So that each runs its own head alone, though the weighted losses are no torch.stack; with the same result."""
    found, head_passes = [], []
    for way in ("whole", "in pieces"):
        model = seeded_model()
        first, second = make_loss(loss), make_gradient(gradient)
        if loss == "igbv1":
            first.method.base_losses = torch.tensor([1.0, 2.0, 0.5])
        heads, _ = counted(model)
        weighted, _ = weigh(first, model)
        second.backward(losses=weighted if way == "whole" else 1 * weighted, **model.places())
        found.append(grads(model))
        head_passes.append([head.passes for head in heads])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    assert head_passes[0] == [1, 1, 1]
    assert head_passes[1] == ([1, 1, 1] if gradient == "ls" else [3, 3, 3])


def test_weighted_losses_changed_in_place():
    model, found = seeded_model(), []
    for in_place in (False, True):
        weighted, _ = weigh(make_loss("si"), model)
        factors = torch.tensor([1.0, 10.0, 100.0])
        weighted = weighted.mul_(factors) if in_place else weighted * factors
        model.zero_grad()
        make_gradient("cagrad").backward(losses=weighted, **model.places())
        found.append(grads(model))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("normalization", ["loss", "loss+"])
def test_mgda_divides_by_the_losses_it_is_given(normalization):
    """The weighted ones."""
    model = seeded_model()
    weighted, weights = weigh(make_loss("rlw"), model)
    gradient = make_gradient("mgda", normalization=normalization)
    _, outputs = gradient.backward(losses=weighted, **model.places())
    jacobian = jacobian_of(model, scales=weights)
    divisor = weighted.detach() * (jacobian.norm(dim=1) if normalization == "loss+" else 1)
    normalised, shares = jacobian / divisor[:, None], outputs["weights"] / 3
    shortest = normalised.T @ shares
    assert bool((normalised @ shortest >= shortest @ shortest * (1 - 1e-6)).all())
    torch.testing.assert_close(update_of(model), 3 * jacobian.T @ shares)


@pytest.mark.parametrize("loss", [*igb4mtl.LOSS_METHODS])
def test_loss_methods_alone(loss):
    """`backward` is that of the sum of the weighted losses, and so is `get_weighted_loss`."""
    model, found = seeded_model(), []
    for way in ("backward", "get_weighted_loss", "get_weighted_losses"):
        torch.manual_seed(1)
        method = make_loss(loss, **({"seed": 4} if loss == "igbv2" else {}))
        model.zero_grad()
        value, outputs = getattr(method, way)(losses=model.losses()[0], **model.places())
        if way == "get_weighted_losses":
            assert value.shape == (3,)
            value = value.sum()
        if way != "backward":
            value.backward()
        found.append([value.detach(), outputs["weights"], *(p.grad for p in method.parameters()), *grads(model)])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("loss", ["si", "uwlog", "rlwlog", "dwalog", "igbv1", "igbv2"])
@pytest.mark.parametrize("gradient", ["ls", "imtl", "pcgrad"])
def test_a_negative_loss_under_a_logarithm(loss, gradient):
    """Makes the step NaN, as everywhere here; in the original, that task ascends."""
    model = seeded_model()
    weighted, _ = weigh(make_loss(loss), model, model.losses()[0] - torch.tensor([1e3, 0.0, 0.0]))
    make_gradient(gradient).backward(losses=weighted, **model.places())
    assert update_of(model).isnan().all()


# ---- What trainers tell -------------------------------------------------------------------------------------------


def test_igbv1_s_base_losses():
    model, method = seeded_model(), make_loss("igbv1")
    losses = model.losses()[0].detach()
    assert method.method.base_losses is None
    assert weigh(method, model)[1].tolist() == [1.0, 1.0, 1.0]
    base = torch.tensor([1.0, 2.0, 0.5])
    method.method.base_losses = base
    assert method.method.base_losses is base
    weighted, weights = weigh(method, model)
    torch.testing.assert_close(weights, 3 * torch.softmax(losses / base, dim=0))
    torch.testing.assert_close(weighted.detach(), weights * losses.log())


@pytest.mark.parametrize("case", cases("igbv2__igb4mtl"))
def test_igbv2_golden(case, monkeypatch):
    """Warm-up weights, transitions and numbers of updates, from what the trainer tells."""
    updates, noise = [], list(case.normals.float())
    monkeypatch.setattr(igb_v2, "normals", lambda seed, step, tasks: noise[step])
    monkeypatch.setattr(SACAgent, "train", lambda self, batch, seed: updates.append(batch))
    method = igb4mtl.LossWeightMethods(
        "igbv2", n_tasks=len(case.base_losses), device=CPU, sac_lr=3e-4, buffer_size=case.params["buffer_size"]
    )
    method.method.train_batch = int(case.train_batch)
    method.method.reward_scale = float(case.reward_scale)
    for name in ("update_after", "start_epoch", "update_every"):
        assert getattr(method.method, name) == case.params[name]
    for i, losses in enumerate(case.losses):
        if i == int(case.base_set_at_step):
            assert method.method.base_losses is None
            method.method.base_losses = case.base_losses
        weights = method.get_weighted_losses(losses=losses)[1]["weights"]
        torch.testing.assert_close(weights.double(), case.weights[i], rtol=1e-6, atol=0.0)
    assert method.method.custom_step == len(case.losses)
    torch.testing.assert_close(method.method.base_losses, case.base_losses)
    buffer = method.method._agent.state_dict()["learner"]["agent"]["transitions"]
    for name in ("state", "action", "reward", "next_state"):
        expected = torch.tensor(case.fields["buffer"][name], dtype=torch.float64)
        torch.testing.assert_close(buffer[name].double(), expected, rtol=1e-6, atol=1e-8)
    assert updates == [batch for _, _, batch in case.fields["train_calls"]]


def test_igbv2_is_the_balancer_s():
    """The same steps from the same seed, agent included."""
    options = {"hidden": (8,), "batch_size": 8, "seed": 5}
    method = make_loss("igbv2", sac_lr=1e-2, buffer_size=64, **options)
    method.method.start_epoch = method.method.update_after = 0
    method.method.update_every = 4
    method.method.base_losses = torch.tensor([1.0, 2.0, 0.5])
    rule = igb.IGBv2(
        base_losses=[1.0, 2.0, 0.5], learning_rate=1e-2, buffer_size=64, steps_per_epoch=5, state="raw",
        logprob="official", background=False, start_epoch=0, update_after=0, update_every=4, **options,
    )  # fmt: skip
    model = seeded_model()
    balancer = igb.Balancer("imtl_g", rule, shared=model.encoder.parameters())
    gradient = make_gradient("imtl")
    for _ in range(10):
        found = []
        for ours in (True, False):
            model.zero_grad()
            if ours:
                weighted, weights = weigh(method, model)
                gradient.backward(losses=weighted, **model.places())
            else:
                result = balancer.backward(model.losses()[0])
                torch.testing.assert_close(weights.double(), result.scales * result.losses, rtol=1e-6, atol=0)
            found.append(update_of(model))
        torch.testing.assert_close(*found, rtol=1e-6, atol=1e-9)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(p.grad, alpha=-0.01)
    assert method.method._agent.state_dict()["learner"]["updates"] > 0


def test_igbv2_needs_to_know_the_epoch_s_length():
    model, method = seeded_model(), igb4mtl.LossWeightMethods("igbv2", n_tasks=3, device=CPU)
    with pytest.raises(ValueError, match="train_batch must be set to the number of steps in an epoch"):
        weigh(method, model)
    method.method.train_batch = 2
    weigh(method, model)
    for wrong, message in (([1.0, 2.0], "3 tasks"), ([1.0, 0.0, 2.0], "positive")):
        with pytest.raises(ValueError, match=f"base_losses must .*{message}"):
            method.method.base_losses = torch.tensor(wrong)
    assert method.method.base_losses is None


def test_names():
    theirs = {"ls", "stl", "si", "uw", "uwlog", "rlw", "rlwlog", "dwa", "dwalog", "igbv1", "igbv2"}
    assert set(igb4mtl.LOSS_METHODS) == theirs
    assert set(igb4mtl.GRADIENT_METHODS) == {"ls", "pcgrad", "mgda", "cagrad", "nashmtl", "imtl"}
    for methods in (igb4mtl.LOSS_METHODS, igb4mtl.GRADIENT_METHODS):
        for cls in methods.values():
            assert getattr(igb4mtl, cls.__name__) is cls
            assert cls.__name__ in igb4mtl.__all__
    for wrapper in (igb4mtl.LossWeightMethods, igb4mtl.GradientWeightMethods):
        with pytest.raises(ValueError, match=r"method must be one of .*found 'igb'"):
            wrapper("igb", n_tasks=3, device=CPU)
