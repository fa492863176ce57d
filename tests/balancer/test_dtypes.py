"""Gradients in another dtype than their parameters, and models that change theirs on the way."""

import pytest
import torch

from .models import Snapshot, grads_of, make_net
from .oracle import CASES, STORES, Oracle, balancer_of, check_step

needs_grad_dtype = pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch lacks Tensor.grad_dtype")


@needs_grad_dtype
@pytest.mark.parametrize("existing", ["none", "all", "first"])
@pytest.mark.parametrize("convention", ["scaled", "weighted"])
@pytest.mark.parametrize("name", ["equal", *STORES])
def test_wide_gradients_of_narrow_parameters(name, convention, existing):
    """bfloat16 parameters with `grad_dtype` float32: balanced, or refused before anything has changed."""
    net, case = make_net(dtype=torch.bfloat16), CASES[name]
    balancer, oracle = balancer_of(case, net, convention), Oracle(case)
    oracle.step(net.losses(), net.shared, net.own)
    balancer.backward(net.losses())
    net.zero_grad()
    for i, p in enumerate(net.parameters()):
        p.grad_dtype = torch.float32
        if existing == "all" or (existing == "first" and i == 0):
            p.grad = torch.ones_like(p, dtype=torch.float32)
    before, heads_before = grads_of(net.shared), grads_of(net.own)
    snapshot, losses = Snapshot(net.parameters(), balancer), net.losses(1)
    expected = oracle.step(losses, net.shared, net.own)
    try:
        balancer.backward(losses)
    except BaseException:
        snapshot.check()
        raise
    assert all(p.grad.dtype is torch.float32 for p in net.parameters())
    check_step(
        expected,
        grads_of(net.shared),
        grads_of(net.own),
        torch.bfloat16,
        convention,
        before,
        heads_before,
        joint=case.method == "equal" or (convention == "weighted" and case.update_every > 1),
    )


@pytest.mark.parametrize("name", ["equal", *STORES])
def test_a_model_that_becomes_narrower_on_the_way(name):
    """`model.float()` keeps the parameters and changes what they are: nothing may be read as what it was."""
    net, case = make_net(dtype=torch.float64), CASES[name]
    balancer, oracle = balancer_of(case, net), Oracle(case)
    for step in range(2):
        oracle.step(net.losses(step), net.shared, net.own)
        balancer.backward(net.losses(step))
    net.zero_grad()
    net.float()
    snapshot, losses, refused = Snapshot(net.parameters(), balancer), net.losses(3), False
    expected = oracle.step(losses, net.shared, net.own)
    try:
        balancer.backward(losses)
    except (ValueError, TypeError):
        refused = True
    if refused:
        snapshot.check()
    else:
        joint = case.method == "equal"
        check_step(expected, grads_of(net.shared), grads_of(net.own), torch.float32, joint=joint)
