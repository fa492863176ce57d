"""Kept gradients in bfloat16: half the memory, and what it costs in accuracy. The benchmark that measures memory."""

import json
import pathlib
import sys

import pytest
import torch
from torch import Tensor

import igb_kernels as igb
from igb_kernels import passes

from .models import TASKS, Net, Snapshot, flat, grads_of, make_net, same
from .oracle import TOLERANCE, check_sum
from .test_passes import WIDTH, LiveBytes, wide_net

BF16 = torch.bfloat16
ROUNDING = 2.0**-8
"""The largest relative error of one rounding to bfloat16."""

KEEPING = ["imtl_g", "nash_mtl", "upgrad", "aligned_mtl", "emtl", "metabalance", "pcgrad", "excess_mtl", "grad_drop"]


def make(name: str, net: Net, **arguments: object) -> igb.Balancer:
    seeded = {"pcgrad": lambda: igb.PCGrad(seed=0), "grad_drop": lambda: igb.GradDrop(seed=0)}
    return igb.Balancer(seeded[name]() if name in seeded else name, shared=net.shared, **arguments)


def rows_of(net: Net) -> tuple[Tensor, Tensor]:
    """The tasks' gradients [K, D] as they come, and rounded to bfloat16; float64."""
    rows, rounded, losses = [], [], net.losses()
    for loss in losses:
        net.zero_grad()
        loss.backward(retain_graph=True)
        rows.append(grads_of(net.shared))
        rounded.append(flat([None if p.grad is None else p.grad.bfloat16() for p in net.shared], net.shared))
    net.zero_grad()
    return torch.stack(rows), torch.stack(rounded)


# ---- Accuracy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.parametrize("name", [name for name in KEEPING if name not in ("excess_mtl", "grad_drop")])
def test_the_rounded_gradients_are_measured_and_combined(name, kind, backend):
    net = make_net(kind)
    rows, rounded = rows_of(net)
    result = make(name, net, bank_dtype=BF16, backend=backend).backward(net.losses())
    assert {p.grad.dtype for p in net.shared} == {torch.float32}

    exact = rounded @ rounded.T
    measured = result.measured if result.gram is not None else torch.diag(result.measured)
    exact = exact if result.gram is not None else torch.diag(exact.diagonal())
    norms = rows.norm(dim=1)
    lengths = norms[:, None] * norms[None, :]
    assert float(((measured - exact).abs() / lengths).max()) < 1e-6
    full = rows @ rows.T
    full = full if result.gram is not None else torch.diag(full.diagonal())
    assert float(((measured - full).abs() / lengths).max()) < 2 * ROUNDING + ROUNDING**2 + 1e-6

    update, terms = grads_of(net.shared), result.weights.abs() @ rows.abs()
    check_sum(update, result.weights @ rounded, terms, torch.float32, "update")
    noise = 1e-5 * terms + torch.finfo(torch.float32).eps * terms.max()
    assert bool(((update - result.weights @ rows).abs() <= ROUNDING * terms + noise).all())


def test_every_element_is_of_one_sign():
    net = make_net()
    rows, rounded = rows_of(net)
    make("grad_drop", net, bank_dtype=BF16).backward(net.losses())
    sums = torch.stack([rounded.clamp_min(0).sum(0), rounded.clamp_max(0).sum(0)])
    error = (grads_of(net.shared) - sums).abs().min(dim=0).values
    assert bool((error <= TOLERANCE[torch.float32] * rounded.abs().sum(0) + 1e-30).all())
    assert not torch.equal(rows, rounded)


def test_excess_risks_are_those_of_the_rounded_gradients():
    net = make_net()
    rows, rounded = rows_of(net)
    balancer = make("excess_mtl", net, bank_dtype=BF16)
    result = balancer.backward(net.losses())
    check_sum(grads_of(net.shared), result.weights @ rounded, rows.abs().sum(0), torch.float32, "update")
    squares = torch.stack([flat(row, net.shared) for row in balancer.state_dict()["averages"]])
    assert torch.allclose(squares, rounded.square(), rtol=1e-6)


@pytest.mark.parametrize("batches", [1, 2])
def test_independent_batches(batches):
    """Weights come from rounded gradients, too: near those without rounding, and not the same."""
    updates = []
    for bank in (None, BF16):
        net = make_net()
        others = [net.losses(batch) for batch in range(1, batches + 1)]
        result = igb.Balancer(igb.MoDo(gamma=0.1), shared=net.shared, bank_dtype=bank).backward(
            net.losses(), independent=others
        )
        updates.append((result.weights, grads_of(net.shared)))
    assert torch.allclose(*(weights for weights, _ in updates), rtol=0.1)
    assert not torch.equal(*(weights for weights, _ in updates))
    cosine = torch.nn.functional.cosine_similarity(*(update for _, update in updates), dim=0)
    assert float(cosine) > 1 - 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", KEEPING)
def test_gradients_in_other_dtypes_are_kept_as_they_come(name, dtype):
    seen = []
    for bank in (None, BF16):
        net = make_net(dtype=dtype)
        balancer = make(name, net, bank_dtype=bank)
        for step in range(2):
            seen.append([balancer.backward(net.losses(step)).weights, grads_of(net.shared)])
    assert same(seen[:2], seen[2:])


@pytest.mark.parametrize("name", KEEPING)
def test_what_was_there_is_added_to(name):
    nets = make_net(), make_net()
    for net in nets:
        make(name, net, bank_dtype=BF16).backward(net.losses())
    before = [torch.randn_like(p) for p in nets[1].shared]
    updates = [p.grad for p in nets[0].shared]
    for p, old in zip(nets[1].shared, before, strict=True):
        p.grad = old.clone()
    make(name, nets[1], bank_dtype=BF16).backward(nets[1].losses())
    for p, old, update in zip(nets[1].shared, before, updates, strict=True):
        assert torch.allclose(p.grad, old + update, rtol=1e-5, atol=1e-6)


def test_parameters_that_no_task_or_one_task_reaches():
    net = make_net()
    extra = [torch.nn.Parameter(torch.randn(3)) for _ in range(2)]
    losses = net.losses()
    losses[1] = losses[1] + extra[1].square().sum()
    result = igb.Balancer("imtl_g", shared=[*net.shared, *extra], bank_dtype=BF16).backward(losses)
    assert extra[0].grad is None
    want = result.weights[1] * (2 * extra[1].detach()).bfloat16().float()
    assert torch.allclose(extra[1].grad, want, rtol=1e-5)


def test_a_gradient_that_is_not_finite():
    net = make_net()
    losses = net.losses()
    losses[1] = losses[1] * torch.nan
    result = igb.Balancer("imtl_g", shared=net.shared, bank_dtype=BF16).backward(losses)
    assert igb.Status.NON_FINITE in result.flags
    assert bool(grads_of(net.shared).isnan().all())


# ---- Memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1 / 2), (BF16, 1)], ids=str)
@pytest.mark.parametrize(
    ("name", "convention"), [("imtl_g", "scaled"), ("imtl_g", "weighted"), ("grad_drop", "scaled")]
)
def test_memory_of_the_bank(name, dtype, share, convention):
    """K rounded gradients and one as autograd makes it, or as the sum; between steps K - 1, which add nothing."""
    tasks = 8
    net, size = wide_net(tasks, dtype)
    own = {"heads": "weighted", "task_parameters": net.own} if convention == "weighted" else {}
    balancer = make(name, net, bank_dtype=BF16, **own)
    with LiveBytes() as made:
        for _ in range(3):
            losses = [head(net.encoder(torch.randn(2, WIDTH, dtype=dtype))).square().mean() for head in net.heads]
            balancer.backward(losses)
            del losses
            net.zero_grad()
    whole = 0 if dtype is BF16 else 1
    assert made.now / size == pytest.approx((tasks - 1) * share, abs=0.1)
    assert tasks * share + whole - 0.3 < made.peak / size < tasks * share + whole + 0.3
    del balancer
    assert made.now / size < 0.3


# ---- Errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8, "bfloat16"])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=r"bank_dtype must be None or torch\.bfloat16, found"):
        igb.Balancer("imtl_g", shared=make_net().shared, bank_dtype=dtype)


@pytest.mark.parametrize("gradients", ["equal", "igb_v1", "db_mtl", "moco", "db_mtl beta 0"])
def test_methods_that_keep_no_gradients_refuse_a_bank(gradients):
    net = make_net()
    method = igb.DBMTL(beta=0.0) if gradients == "db_mtl beta 0" else gradients
    balancer = igb.Balancer(method, shared=net.shared, bank_dtype=BF16)
    before = Snapshot(net.parameters(), balancer)
    with pytest.raises(ValueError, match=r"bank_dtype must be None for .*keeps no gradients"):
        balancer.backward(net.losses())
    before.check()


# ---- The benchmark ------------------------------------------------------------------------------------------------


def test_the_memory_benchmark_keeps_its_bars(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[2])
    monkeypatch.setattr(passes, "rows_in_cache", lambda params: 1)  # as of a large model
    from benchmarks import memory

    path = tmp_path / "memory.json"
    arguments = ["--models", "mlp-33k", "--tasks", str(TASKS), "--without-peers", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["memory", *arguments])
    memory.main()
    saved = json.loads(path.read_text())
    rows = {row["step"]: row for row in saved["steps"]}
    assert saved["machine"]["torch"] == torch.__version__
    assert saved["command"].endswith(" ".join(arguments))
    assert set(memory.BALANCERS) < set(rows)
    assert rows["equal"]["over_plain"] == pytest.approx(0, abs=0.1)
    assert rows["nash_mtl"]["over_passes"] == pytest.approx(TASKS - 1, abs=0.1)
    for row in rows.values():
        assert row["bar"] is None or row["over_passes"] <= row["bar"], row["step"]
    table = capsys.readouterr().out
    assert "| db_mtl, beta=0 |" in table
    assert "MISSED" not in table
