"""Whole steps on the Triton backend against the balancer's oracle; `test_interpreter.py` runs this."""

from __future__ import annotations

import pytest
import torch
from balancer.models import make_net, same
from balancer.oracle import CASES
from balancer.test_step import play

import igb_kernels as igb
from igb_kernels import passes, store

METHODS = ["db_mtl", "db_mtl beta 0", "emtl", "imtl_g", "nash_mtl every 3"]


@pytest.mark.parametrize("rows", [1, 1000], ids=lambda rows: f"{rows}_at_once")
@pytest.mark.parametrize("name", METHODS)
def test_every_method(name, rows, monkeypatch):
    monkeypatch.setattr(store, "rows_in_cache", lambda params: rows)
    monkeypatch.setattr(passes, "rows_in_cache", lambda params: rows)
    play(CASES[name], make_net("conv"), torch.float32, "scaled", backend="triton")


@pytest.mark.parametrize("name", ["db_mtl", "emtl", "imtl_g"])
def test_hooks_give_the_bits_of_passes(name, monkeypatch):
    monkeypatch.setitem(store.BUCKET_BYTES, "cpu", 300)
    found = []
    for capture in ("passes", "hooks"):
        net = make_net()
        balanced = igb.Balancer(**CASES[name].make(), shared=net.shared, backend="triton", capture=capture)
        for step in range(2):
            net.zero_grad()
            balanced.backward(net.losses(step))
        found.append([[p.grad for p in net.parameters()], balanced.state_dict()])
    assert same(*found)


def test_mixed_dtypes_added_to_gradients_that_were_there():
    torch.manual_seed(0)
    shared = [torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(7).double())]
    factors = torch.rand(3, 2)
    grads = []
    for backend in ("triton", "reference"):
        for p in shared:
            p.grad = torch.ones_like(p)
        losses = [f[0] * (shared[0] - f[1]).square().mean() + (shared[1] * f[1]).exp().mean() for f in factors]
        igb.Balancer("igb_v1+nash_mtl", shared=shared, backend=backend).backward(losses)
        grads.append([p.grad for p in shared])
    for ours, theirs in zip(*grads, strict=True):
        assert (ours - 1).abs().max() > 0.01
        torch.testing.assert_close(ours, theirs)


def test_a_step_with_nan_leaves_the_averages_alone():
    net = make_net()
    mtl = igb.Balancer("db_mtl", shared=net.shared, backend="triton")
    mtl.backward(net.losses(0))
    kept = [[average.clone() for average in row] for row in mtl.state_dict()["averages"]]
    losses = net.losses(1)
    result = mtl.backward([losses[0], losses[1] * torch.nan, losses[2]])
    assert result.flags & igb.Status.NON_FINITE
    for row, old_row in zip(mtl.state_dict()["averages"], kept, strict=True):
        assert all(torch.equal(average, old) for average, old in zip(row, old_row, strict=True))
