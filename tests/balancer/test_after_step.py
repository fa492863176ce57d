"""Losses after the optimizer's step: read as those of `backward` are, without a graph; only FAMO learns from them."""

import copy

import pytest
import torch

import igb_kernels as igb
from igb_kernels import losses

from .models import TASKS, make_net, same

NAMES = ("a", "b", "c")


def stepped(rule="log", names=False):
    """A net and its balancer after a step."""
    net = make_net()
    balancer = igb.Balancer(rule, shared=net.shared)
    values = net.losses()
    balancer.backward(dict(zip(NAMES, values, strict=True)) if names else values)
    return net, balancer


def values_of(net, seed=1):
    with torch.no_grad():
        return torch.stack(net.losses(seed))


FORMS = {
    "list": lambda values: list(values),
    "tuple of one-element tensors": lambda values: tuple(v.reshape(1) for v in values),
    "tensor": lambda values: values,
    "tensor with a graph": lambda values: values.clone().requires_grad_() * 1,
    "dict": lambda values: dict(zip(NAMES, values, strict=True)),
    "dict in another order": lambda values: dict(reversed(list(zip(NAMES, values, strict=True)))),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_losses(form):
    states = []
    for name in ("dict" if "dict" in form else "list", form):
        net, balancer = stepped(losses.FAMO(), names="dict" in form)
        before = copy.deepcopy(balancer.state_dict())
        balancer.after_step(FORMS[name](values_of(net)))
        assert not same(before, balancer.state_dict())
        assert not balancer.losses.state.requires_grad
        states.append(balancer.state_dict()["losses"])
    assert same(*states)


@pytest.mark.parametrize("rule", ["none", "log", "igb_v1", "gls", "rlw", "dwa", "stch"])
def test_other_rules_do_nothing(rule):
    net, balancer = stepped(rule)
    before = copy.deepcopy(balancer.state_dict())
    balancer.after_step(values_of(net))
    assert same(balancer.state_dict(), before)


BAD = {
    "too few": (lambda v: v[:2], ValueError, f"losses must hold {TASKS} tasks as in earlier steps, found 2"),
    "other names": (lambda v: dict(zip("xyz", v, strict=True)), ValueError, "no other tasks than"),
    "no scalar": (lambda v: [v, v[0], v[1]], ValueError, r"losses\[0\] must be a scalar"),
    "numbers": (lambda v: v.tolist(), TypeError, r"losses\[0\] must be a tensor or None, found float"),
    "integers": (lambda v: v.long(), TypeError, "floating"),
    "matrix": (lambda v: torch.stack([v, v]), ValueError, "1-D"),
    "another device": (lambda v: v.to("meta"), ValueError, "must be on cpu"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("rule", ["famo", "log"])
def test_bad_losses(case, rule):
    make, error, message = BAD[case]
    net, balancer = stepped(rule, names=True)
    before = copy.deepcopy(balancer.state_dict())
    with pytest.raises(error, match=message):
        balancer.after_step(make(values_of(net)))
    assert same(balancer.state_dict(), before)


def test_it_comes_after_backward():
    net = make_net()
    with pytest.raises(RuntimeError, match="after_step comes after backward"):
        igb.Balancer("famo", shared=net.shared).after_step(values_of(net))


@pytest.mark.parametrize("gradients", ["equal", "imtl_g", "db_mtl"])
def test_it_teaches_across_methods(gradients):
    net = make_net()
    balancer = igb.Balancer(gradients, losses.FAMO(), shared=net.shared)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    for seed in range(3):
        optimizer.zero_grad()
        balancer.backward(net.losses(seed))
        optimizer.step()
        balancer.after_step(values_of(net, seed))
    assert bool(balancer.losses.logits.any())
