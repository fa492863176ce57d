"""What `Balancer` takes, by name and by object, and what it refuses."""

import pytest
import torch
from torch import nn

import igb_kernels as igb

from .models import Snapshot, make_net
from .oracle import CASES, STORES


def leaf(*shape: int, dtype: torch.dtype = torch.float32, frozen: bool = False) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape, dtype=dtype), requires_grad=not frozen)


ONE, TWO, THREE = leaf(2), leaf(3), leaf(4)

BAD_PARAMETERS = {
    "none": ([], ValueError, "shared must hold at least one parameter, found none"),
    "used-up generator": (
        iter(()),
        ValueError,
        r"shared must hold at least one parameter, found none \(was a generator used up\?\)",
    ),
    "module without any": (nn.ReLU(), ValueError, "shared must hold at least one parameter"),
    "no tensor": ([ONE, "weight"], TypeError, r"shared\[1\] must be a tensor, found str"),
    "named pairs": ([("weight", ONE)], TypeError, r"shared\[0\] must be a tensor, found tuple"),
    "not a leaf": ([ONE, TWO * 2], ValueError, r"shared\[1\] must be a leaf tensor, found the result of <MulBackward0"),
    "without grad": (
        [ONE, torch.zeros(2, 3)],
        ValueError,
        r"shared\[1\], of shape \(2, 3\), must require grad",
    ),
    "twice": ([ONE, TWO, ONE], ValueError, r"shared\[2\] is the same tensor as shared\[0\]"),
    "all frozen": (
        [leaf(2, frozen=True)],
        ValueError,
        "shared must hold at least one parameter that requires grad, found 1 frozen",
    ),
    "frozen quantised": (
        [ONE, leaf(2, dtype=torch.uint8, frozen=True)],
        TypeError,
        r"shared\[1\] must have one of the dtypes .*, found torch.uint8",
    ),
    "eight bits": (
        [ONE, leaf(2, dtype=torch.float8_e5m2)],
        TypeError,
        r"shared\[1\] must have one of the dtypes .*, found torch.float8_e5m2",
    ),
    "without memory": (
        [ONE, nn.Parameter(torch.zeros(2, device="meta"))],
        ValueError,
        r"shared\[1\] must have memory as shared\[0\] on cpu, found meta",
    ),
    "no iterable": (3, TypeError, "shared must be .*found int"),
}


@pytest.mark.parametrize("bad", BAD_PARAMETERS)
@pytest.mark.parametrize("argument", ["shared", "task_parameters"])
def test_bad_parameters(bad, argument):
    given, error, message = BAD_PARAMETERS[bad]
    arguments = {"shared": [THREE], "heads": "weighted", "task_parameters": [THREE], argument: given}
    with pytest.raises(error, match=message.replace("shared", argument)):
        igb.Balancer("equal", **arguments)


BAD_ARGUMENTS = {
    "heads": ({"heads": "raw"}, ValueError, r"heads must be one of \('scaled', 'weighted'\), found 'raw'"),
    "weighted without": (
        {"heads": "weighted"},
        ValueError,
        'task_parameters go with heads="weighted".*none were given',
    ),
    "scaled with": ({"task_parameters": [TWO]}, ValueError, "task_parameters go with.*heads is 'scaled'"),
    "overlap": (
        {"heads": "weighted", "task_parameters": [TWO, ONE]},
        ValueError,
        "shared and task_parameters must be disjoint, found 1 tensors in both",
    ),
    "method": (
        {"gradients": "nash"},
        ValueError,
        r"gradient balancing must be one of \[.*'nash_mtl'.*found 'nash'",
    ),
    "rule": ({"gradients": "igb+nash_mtl"}, ValueError, r"loss balancing must be one of \[.*'igb_v1'.*found 'igb'"),
    "losses": ({"losses": "igb"}, ValueError, r"loss balancing must be one of \[.*'igb_v1'.*found 'igb'"),
    "turned round": ({"gradients": "nash_mtl+log"}, ValueError, "'nash_mtl'|'log'"),
    "three names": ({"gradients": "log+log+equal"}, ValueError, 'gradients must name "method" or "rule\\+method"'),
    "rule twice": ({"gradients": "log+equal", "losses": "log"}, ValueError, "then losses stays None"),
    "rule and rule": ({"gradients": "log", "losses": "log"}, ValueError, "losses must stay None.*found 'log'"),
    "empty name": ({"gradients": ""}, ValueError, "found ''"),
    "imtl_l by name": ({"gradients": "imtl_l"}, ValueError, "pass losses=IMTLL"),
    "uw by name": ({"gradients": "uw"}, ValueError, "uw has a parameter for each task: pass losses=UW"),
    "ldc_mtl by name": ({"gradients": "imtl_g", "losses": "ldc_mtl"}, ValueError, "pass losses=LDCMTL"),
    "imtl_l by name, composed": ({"gradients": "imtl_l+imtl_g"}, ValueError, "pass losses=IMTLL"),
    "a class": ({"gradients": igb.NashMTL}, TypeError, "gradients must be a method or its name, found"),
    "a number": ({"gradients": 3}, TypeError, "gradients must be a method or its name, found int"),
    "losses of a wrong type": ({"losses": igb.DBMTL()}, TypeError, "losses must be a loss-balancing rule.*found DBMTL"),
    "backend": ({"backend": "gpu"}, ValueError, "backend must be one of .*found 'gpu'"),
}


@pytest.mark.parametrize("bad", BAD_ARGUMENTS)
def test_bad_arguments(bad):
    given, error, message = BAD_ARGUMENTS[bad]
    with pytest.raises(error, match=message):
        igb.Balancer(**{"gradients": "equal", "shared": [ONE], **given})


NUMBERS = {
    "beta below": (lambda: igb.DBMTL(-0.1), "beta must be a finite number, 0 to 1; found -0.1"),
    "beta 1": (lambda: igb.DBMTL(1.0), "beta must be below 1"),
    "beta NaN": (lambda: igb.DBMTL(float("nan")), "beta must be a finite number.*found nan"),
    "sigma": (lambda: igb.DBMTL(sigma=-1), "sigma must be a finite number, at least 0; found -1"),
    "eps": (lambda: igb.DBMTL(eps=float("inf")), "eps must be a finite number"),
    "lam": (lambda: igb.EMTL(-1), "lam must be a finite number"),
    "scale": (lambda: igb.EMTL(scale="sum"), "scale must be one of .*found 'sum'"),
    "lower": (lambda: igb.EMTL(lower=[0.0, float("nan")]), "lower must be a finite number or one for each task"),
    "max_norm": (lambda: igb.NashMTL(-1), "max_norm must be a finite number"),
    "update_every": (lambda: igb.NashMTL(update_every=0), "update_every must be an integer of at least 1, found 0"),
    "update_every float": (lambda: igb.NashMTL(update_every=2.0), "update_every must be an integer.*found 2.0"),
    "base_epoch": (lambda: igb.IGBv1(-1), "base_epoch must be an integer of at least 0, found -1"),
    "steps": (lambda: igb.IGBv1(steps=0), "steps must be an integer of at least 1, found 0"),
    "base losses": (lambda: igb.IGBv1(base_losses=[1.0, 0.0]), "base_losses must be K positive finite numbers"),
    "steps and base losses": (
        lambda: igb.IGBv1(steps=1, base_losses=[1.0]),
        "steps and base_losses exclude each other",
    ),
    "num_tasks": (lambda: igb.IMTLL(0), "num_tasks must be an integer of at least 1, found 0"),
    "log eps": (lambda: igb.Log(eps=-1e-8), "eps must be .*at least 0.*found -1e-08"),
    "log eps inf": (lambda: igb.Log(eps=float("inf")), "eps must be a finite number"),
}


@pytest.mark.parametrize("bad", NUMBERS)
def test_bad_numbers(bad):
    make, message = NUMBERS[bad]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("given", "rule", "method"),
    [
        ("equal", "Unscaled()", "Equal()"),
        ("log", "Log(eps=0.0)", "Equal()"),
        ("igb_v1", "IGBv1(base_epoch=1)", "Equal()"),
        ("db_mtl", "Log(eps=1e-08)", "DBMTL("),
        ("none+db_mtl", "Unscaled()", "DBMTL("),
        ("igb_v1+db_mtl", "IGBv1(base_epoch=1)", "DBMTL("),
        ("log+nash_mtl", "Log(eps=0.0)", "NashMTL(max_norm=1, update_every=1)"),
        (igb.IGBv1(steps=3), "IGBv1(steps=3)", "Equal()"),
        (igb.IMTLG(), "Unscaled()", "IMTLG("),
        (igb.EMTL(), "Unscaled()", "EMTL("),
    ],
)
def test_names(given, rule, method):
    balancer = igb.Balancer(given, shared=[ONE, TWO])
    assert repr(balancer.losses) == rule
    assert repr(balancer.gradients).startswith(method)
    assert repr(balancer).startswith(f"Balancer({method}")
    assert "shared=2 tensors" in repr(balancer)


def test_a_module_and_a_generator_are_parameters():
    net = make_net()
    for shared in (net.encoder, net.encoder.parameters(), tuple(net.shared)):
        balancer = igb.Balancer("imtl_g", shared=shared, heads="weighted", task_parameters=net.heads)
        assert [id(p) for p in balancer.shared] == [id(p) for p in net.shared]
        assert [id(p) for p in balancer.task_parameters] == [id(p) for p in net.own]


@pytest.mark.parametrize("name", ["equal", *STORES])
def test_nothing_happens_before_backward(name):
    net = make_net()
    before = Snapshot(net.parameters())
    igb.Balancer(**CASES[name].make(), shared=net.shared)
    before.check()


def test_losses_on_another_device():
    net = make_net()
    elsewhere = torch.ones(5, device="meta", requires_grad=True)
    with pytest.raises(ValueError, match="losses must be on cpu like the shared parameters, found meta"):
        igb.Balancer("imtl_g", shared=net.shared).backward([elsewhere.sum(), elsewhere.prod()])
    balancer = igb.Balancer("imtl_g", shared=net.shared)
    balancer.backward(net.losses())
    with pytest.raises(ValueError, match="losses must be on cpu as in earlier steps, found meta"):
        balancer.backward([elsewhere.sum(), elsewhere.prod(), elsewhere.sum()])
    with pytest.raises(ValueError, match=r"independent\[0\] must be on cpu like losses, found meta"):
        igb.Balancer("modo", shared=net.shared).backward(
            net.losses(), independent=[[elsewhere.sum(), elsewhere.prod(), elsewhere.sum()]]
        )
