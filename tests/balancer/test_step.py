"""The whole step against the oracle: methods × models × dtypes × what heads get."""

import pytest
import torch

import igb_kernels as igb

from .models import TASKS, Net, grads_of, make_net
from .oracle import CASES, LOWER, STORES, TOLERANCE, Case, Oracle, balancer_of, check_step

pytestmark = pytest.mark.usefixtures("rows_at_once")

DTYPES = list(TOLERANCE)
STEPS = 4


def play(case: Case, net: Net, dtype: torch.dtype, convention: str, backend: str = "auto") -> None:
    balancer, oracle = balancer_of(case, net, convention, backend), Oracle(case)
    learned = balancer.parameters()
    optimizer = torch.optim.SGD([*net.parameters(), *learned], lr=0.02, momentum=0.5)
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = net.losses(step)
        expected = oracle.step(losses, net.shared, net.own, learned[0] if learned else None)
        result = balancer.backward(losses)
        joint = case.method == "equal" or (convention == "weighted" and step % case.update_every != 0)
        check_step(expected, grads_of(net.shared), grads_of(net.own), dtype, convention, joint=joint)
        if learned:
            want = (learned[0].detach().double().exp() * expected.losses - 1).to(learned[0].dtype)
            torch.testing.assert_close(learned[0].grad, want)
        assert all(p.grad.dtype is p.dtype and p.grad.shape == p.shape for p in net.parameters())
        assert int(result.status) == int(expected.status)
        torch.testing.assert_close(result.scales, expected.scales)
        torch.testing.assert_close(result.losses.double(), expected.losses, rtol=0, atol=0)
        rtol = max(TOLERANCE[dtype], 1e-6) if case.method == "emtl" else min(TOLERANCE[dtype], 3e-5)
        if not (joint and dtype is torch.bfloat16):  # the clipping factor is that of another rounding
            torch.testing.assert_close(result.weights, expected.weights, rtol=rtol, atol=1e-12)
        optimizer.step()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_method_on_an_mlp(name, dtype):
    play(CASES[name], make_net("mlp", dtype), dtype, "scaled")


@pytest.mark.parametrize("name", CASES)
def test_every_method_on_a_conv_net(name):
    play(CASES[name], make_net("conv"), torch.float32, "scaled")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["conv", "gru", "embedding"])
@pytest.mark.parametrize("name", STORES)
def test_every_way_to_keep_gradients_on_every_model(name, kind, dtype):
    play(CASES[name], make_net(kind, dtype), dtype, "scaled")


@pytest.mark.parametrize("name", CASES)
def test_every_method_with_weighted_heads(name):
    play(CASES[name], make_net(), torch.float32, "weighted")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STORES)
def test_weighted_heads_in_every_dtype(name, dtype):
    play(CASES[name], make_net("conv", dtype), dtype, "weighted")


@pytest.mark.parametrize("convention", ["scaled", "weighted"])
@pytest.mark.parametrize("name", STORES)
def test_on_the_reference_backend(name, convention):
    play(CASES[name], make_net("conv"), torch.float32, convention, backend="reference")


FOR_ANY_NUMBER_OF_TASKS = [n for n, c in CASES.items() if c.rule not in ("igb_v1_known", "imtl_l") and n not in LOWER]


@pytest.mark.parametrize("name", FOR_ANY_NUMBER_OF_TASKS)
def test_one_task(name):
    case, net = CASES[name], make_net(tasks=1)
    losses = net.losses()
    expected = Oracle(case, 1).step(losses, net.shared, net.own)
    result = balancer_of(case, net).backward(losses)
    check_step(expected, grads_of(net.shared), grads_of(net.own), torch.float32)
    assert result.weights.shape == (1,)


def test_many_tasks():
    torch.manual_seed(0)
    shared = [torch.nn.Parameter(torch.randn(40, 3)) for _ in range(2)]
    targets = torch.randn(64, 40, 3)
    losses = [((shared[0] + t * shared[1]).square()).mean() for t in targets]
    case = CASES["nash_mtl unclipped"]
    expected = Oracle(case, 64).step(losses, shared)
    igb.Balancer(**case.make(), shared=shared).backward(losses)
    check_step(expected, grads_of(shared), None, torch.float32)


@pytest.mark.parametrize(
    ("name", "measured"),
    [("equal", None), ("db_mtl", 1), ("db_mtl beta 0", 1), ("emtl", 1), ("imtl_g", 2), ("nash_mtl", 2)],
)
def test_result(name, measured):
    net, case = make_net(dtype=torch.float64), CASES[name]
    losses = net.losses()
    expected = Oracle(case).step(losses, net.shared, net.own)
    result = balancer_of(case, net).backward(dict(zip("abc", losses, strict=True)))
    assert result.names == ("a", "b", "c")
    close = torch.testing.assert_close
    close(result.losses, torch.stack(losses).detach())
    close(result.scales, expected.scales)
    close(result.total_weights, expected.weights * expected.scales)
    assert result.total_weights.dtype is result.weights.dtype is torch.float64
    assert result.status.dtype is torch.int32
    assert result.status.shape == ()
    assert result.flags == igb.Status(0)
    assert not any(t.requires_grad for t in (result.losses, result.scales, result.weights))
    gram, norms = expected.gram, expected.gram.diagonal().sqrt()
    if measured is None:
        assert result.norms is None
    else:
        close(result.norms, norms)
    if measured == 2:
        close(result.gram, gram)
        close(result.cosines, gram / norms[:, None] / norms[None, :])
    else:
        assert result.gram is None
        assert result.cosines is None
    lines = str(result).splitlines()
    assert [line.split(":")[0] for line in lines] == ["a", "b", "c", "status"]
    assert lines[-1] == "status: ordinary"
    assert f"loss {losses[0].item():.4g}, scale {float(expected.scales[0]):.4g}" in lines[0]


def test_result_of_a_vanishing_gradient():
    net = make_net()
    losses = [*net.losses()[:2], 0.0 * net.losses()[2] + 1.0]
    result = igb.Balancer("imtl_g", shared=net.shared).backward(losses)
    assert result.flags == igb.Status.ZERO_GRADIENT
    assert result.weights[2] == 0
    assert bool((result.cosines[2] == 0).all())
    assert str(result).splitlines()[0].startswith("0: loss ")
    assert str(result).endswith("status: ZERO_GRADIENT")


@pytest.mark.parametrize("name", ["equal", "db_mtl", "db_mtl beta 0", "emtl", "imtl_g", "nash_mtl"])
@pytest.mark.parametrize("vanishing", [1, TASKS])
def test_vanishing_gradients_leave_a_finite_update(name, vanishing):
    net = make_net()
    losses = [loss if k >= vanishing else 0.0 * loss + 1.0 for k, loss in enumerate(net.losses())]
    result = balancer_of(CASES[name], net).backward(losses)
    assert bool(grads_of(net.shared).isfinite().all())
    assert (igb.Status.ALL_INACTIVE in result.flags) == (vanishing == TASKS and name != "equal")
    if vanishing == TASKS:
        assert not grads_of(net.shared).any()


@pytest.mark.parametrize("relative", [False, True])
def test_db_mtl_without_eps_takes_a_vanishing_gradient(relative):
    net = make_net()
    losses = net.losses()
    losses[1] = 0.0 * losses[1] + 1.0
    igb.Balancer(igb.DBMTL(0.0, eps=0.0, relative_eps=relative), shared=net.shared).backward(losses)
    assert bool(grads_of(net.shared).isfinite().all())
