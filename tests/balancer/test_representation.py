"""Tasks compared at a representation: K passes through the heads, and one through the encoder."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import igb_kernels as igb

from .models import TASK_SCALES, TASKS, Net, Snapshot, grads_of, same
from .test_errors import Fails
from .test_missing_tasks import CASES

REFUSED = (
    "db_mtl", "db_mtl sigma, bias correction", "igb_v1 given", "famo lower", "moco", "moco libmtl", "excess_mtl",
    "excess_mtl eta 1",
)  # fmt: skip
"""They keep averages or sums of gradients over the steps."""
ALL = tuple(range(TASKS))
AT = [name for name in CASES if name not in REFUSED]


class Doubled(Net):
    """Two tensors between the encoder and its heads."""

    def split_losses(self, x: Tensor, targets: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        z = self.encoder(x)
        parts = [z.square(), z.sin()]
        outputs = [head(parts[0] - k * parts[1]) for k, head in enumerate(self.heads)]
        return [s * (o - y).square().mean() for s, o, y in zip(TASK_SCALES, outputs, targets, strict=False)], parts


def data(step: int, tasks: int = TASKS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    kwargs = {"generator": generator, "dtype": torch.float64}
    return torch.randn(6, 6, **kwargs), torch.randn(tasks, 6, 2, **kwargs)


def net_of(kind: type[Net] = Net, tasks: int = TASKS) -> Net:
    torch.manual_seed(3)
    return kind(tasks=tasks).double()


def losses_at(net: Net, step: int) -> tuple[list[Tensor], Tensor]:
    x, targets = data(step, len(net.heads))
    z = net.encoder(x)
    pairs = zip(TASK_SCALES, net.heads, targets, strict=False)
    return [scale * (head(z) - y).square().mean() for scale, head, y in pairs], z


def take_steps(
    net: Net, balancer: igb.Balancer, steps: int = 3, tasks: Sequence[int] | None = None
) -> list[igb.result.BalanceResult]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    results = []
    for step in range(steps):
        optimizer.zero_grad()
        losses, z = losses_at(net, step)
        if tasks is not None:
            losses = [loss if k in tasks else None for k, loss in enumerate(losses)]
        results.append(balancer.backward(losses, representation=z))
        assert z.grad is None
        optimizer.step()
    return results


@pytest.mark.parametrize("name", AT)
def test_every_method_as_by_hand(name, backend):
    """The reference: the representation is a leaf, which the same method takes for the shared parameters; what comes
    to its `.grad` is passed on by autograd."""
    net, plain = net_of(), net_of()
    balancer = igb.Balancer(**CASES[name](ALL), shared=net.shared, backend=backend)
    state: dict[str, object] | None = None
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01) for model in (net, plain)]
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses, z = losses_at(net, step)
        result = balancer.backward(losses, representation=z)

        x, targets = data(step)
        encoded = plain.encoder(x)
        leaf = encoded.detach().requires_grad_()
        by_hand = igb.Balancer(**CASES[name](ALL), shared=[leaf], backend=backend)
        if state is not None:
            by_hand.load_state_dict(state)
        pairs = zip(TASK_SCALES, plain.heads, targets, strict=False)
        want = by_hand.backward([scale * (head(leaf) - y).square().mean() for scale, head, y in pairs])
        if leaf.grad is not None:
            encoded.backward(leaf.grad)
        state = by_hand.state_dict()

        assert same(result.weights, want.weights)
        assert int(result.status) == int(want.status)
        torch.testing.assert_close(grads_of(net.shared), grads_of(plain.shared), rtol=1e-12, atol=1e-14)
        assert same(grads_of(net.own), grads_of(plain.own))
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("name", REFUSED)
def test_what_outlives_a_batch_is_refused(name):
    net = net_of()
    losses, z = losses_at(net, 0)
    balancer = igb.Balancer(**CASES[name](ALL), shared=net.shared)
    before = Snapshot(net.parameters(), balancer)
    with pytest.raises(ValueError, match=r"representation must be None for .* outlives the batch"):
        balancer.backward(losses, representation=z)
    before.check()
    balancer.backward(losses)


def test_the_same_for_losses_from_torch_stack_and_several_tensors():
    """The two tensors that heads take are computed from one: compared there, side by side."""
    want = None
    for kind in ("list", "stack", "dict"):
        net = net_of(Doubled)
        losses, parts = net.split_losses(*data(0))
        made = {"list": losses, "stack": torch.stack(losses), "dict": dict(zip("abc", losses, strict=True))}[kind]
        igb.Balancer("imtl_g", shared=net.shared).backward(made, representation=parts)
        grads = grads_of([*net.shared, *net.own])
        want = grads if want is None else want
        assert same(grads, want)
    net = net_of(Doubled)
    losses, parts = net.split_losses(*data(0))
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, parts, retain_graph=True)]) for loss in losses]
    weights, _ = igb.ops.solve("imtl_g", igb.ops.gram(torch.stack(rows)))
    sum(w * loss for w, loss in zip(weights, losses, strict=True)).backward()
    torch.testing.assert_close(grads_of(net.shared), want[: len(grads_of(net.shared))], rtol=1e-10, atol=1e-12)


def test_missing_tasks():
    net, few = net_of(), net_of()
    balancers = [igb.Balancer("igb_v1+upgrad", shared=net.shared) for net in (net, few)]
    losses, z = losses_at(net, 0)
    result = balancers[0].backward([losses[0], None, losses[2]], representation=z)
    others, z = losses_at(few, 0)
    want = balancers[1].backward([others[0], others[2]], representation=z)
    assert result.active == (0, 2)
    assert same(result.weights[[0, 2]], want.weights)
    assert same(grads_of(net.shared), grads_of(few.shared))


@pytest.mark.parametrize("heads", ["scaled", "weighted"])
def test_gradients_add_to_what_was_there(heads):
    nets = [net_of(), net_of()]
    for times, net in enumerate(nets, 1):
        own = {"heads": heads, "task_parameters": net.own} if heads == "weighted" else {}
        balancer = igb.Balancer("nash_mtl", shared=net.shared, **own)
        for _ in range(times):
            losses, z = losses_at(net, 0)
            balancer.backward(losses, representation=z)
    once, twice = (grads_of([*net.shared, *net.own]) for net in nets)
    torch.testing.assert_close(twice, 2 * once, rtol=1e-9, atol=1e-12)  # the second step has the state of the first


def test_graphs_are_kept_if_asked():
    net = net_of()
    losses, z = losses_at(net, 0)
    z.retain_grad()
    balancer = igb.Balancer("mgda", shared=net.shared)
    result = balancer.backward(losses, representation=z, retain_graph=True)
    first, at_z = grads_of(net.shared), z.grad.clone()
    rows = [torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in losses]
    torch.testing.assert_close(at_z, sum(w * row for w, row in zip(result.weights, rows, strict=True)))
    z.grad = at_z.clone()
    balancer.backward(losses, representation=z)
    assert same(grads_of(net.shared), 2 * first)
    assert same(z.grad, 2 * at_z)  # a tensor that keeps its gradient keeps the sum's
    with pytest.raises(RuntimeError, match="second time"):
        balancer.backward(losses, representation=z)


class Counted(torch.autograd.Function):
    """Identity that counts its backward passes."""

    passes = 0

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        Counted.passes += 1
        return grad


@pytest.mark.parametrize("method", ["nash_mtl", "grad_drop", "emtl", "equal", "igb_v1+imtl_g"])
def test_one_pass_through_the_encoder(method):
    Counted.passes = 0
    net = net_of()
    net.encoder = nn.Sequential(net.encoder, Apply(Counted))
    calls: dict[int, Tensor] = {}

    def note(p: Tensor) -> None:
        calls[id(p)] = p.grad.clone()

    for head in net.heads:
        head.weight.register_post_accumulate_grad_hook(note)
    losses, z = losses_at(net, 0)
    assert z.grad_fn is not None
    assert "Counted" in z.grad_fn.name()
    igb.Balancer(method, shared=net.shared).backward(losses, representation=z)
    assert Counted.passes == 1
    assert len(calls) == TASKS
    assert all(same(calls[id(head.weight)], head.weight.grad) for head in net.heads)


class Apply(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


@pytest.mark.parametrize("method", ["imtl_g", "igb_v1+nash_mtl", "grad_drop", "emtl"])
def test_with_a_scaler_the_bits_are_those_without(method):
    """An overflow in the encoder alone skips the step, and leaves no trace."""
    trained = []
    for scale in (None, 1024.0):
        net = net_of().float()
        balancer = igb.Balancer(method, shared=net.shared)
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        for step in range(4):
            optimizer.zero_grad()
            x, targets = (t.float() for t in data(step))
            if step == 2:
                if scaler is None:
                    continue
                before = Snapshot(net.parameters(), balancer)
            z = net.encoder(x)
            hook = net.shared[0].register_hook(lambda grad: grad * torch.inf) if step == 2 else None
            losses = [s * (h(z) - y).square().mean() for s, h, y in zip(TASK_SCALES, net.heads, targets, strict=False)]
            balancer.backward(losses, representation=z, scaler=scaler)
            if scaler is None:
                optimizer.step()
                continue
            scaler.step(optimizer)
            scaler.update()
            if hook is not None:
                hook.remove()
                optimizer.zero_grad()
                before.check()
        trained.append([*net.parameters(), *map(torch.as_tensor, flat_state(balancer.state_dict()))])
    assert same(trained[0], trained[1])


def flat_state(state: object) -> list[Tensor]:
    """The tensors of nested containers."""
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, dict):
        return [t for value in state.values() for t in flat_state(value)]
    return [t for value in state for t in flat_state(value)] if isinstance(state, list | tuple) else []


def test_a_compiled_encoder_runs_once():
    torch._dynamo.reset()
    net, plain = net_of(), net_of()
    losses, z = losses_at(plain, 0)
    balancers = [igb.Balancer("upgrad", shared=n.shared) for n in (plain, net)]
    balancers[0].backward(losses, representation=z)
    net.encoder = torch.compile(net.encoder, backend="aot_eager")
    losses, z = losses_at(net, 0)
    balancers[1].backward(losses, representation=z)
    torch.testing.assert_close(grads_of(net.shared), grads_of(plain.shared), rtol=1e-12, atol=1e-14)


# ---- Errors -------------------------------------------------------------------------------------------------------


def around(net: Net) -> tuple[list[Tensor], Tensor]:
    losses, z = losses_at(net, 0)
    losses[1] = losses[1] + net.shared[2].square().sum()
    return losses, z


def from_each_other(net: Net) -> tuple[list[Tensor], list[Tensor]]:
    z = net.encoder(data(0)[0])
    w = z.sin()
    return [(head(z) - head(w)).square().mean() for head in net.heads], [z, w]


def of_two_outputs(net: Net) -> tuple[list[Tensor], Tensor]:
    a, b = net.encoder(data(0)[0]).split(3)
    return [(head(a).mean() - head(b).mean()).square() for head in net.heads], a


def elsewhere(net: Net) -> tuple[list[Tensor], Tensor]:
    return losses_at(net, 0)[0], losses_at(net, 1)[1]


WRONG = {
    "around": (around, ValueError, r"reach shared\[2\] around it"),
    "from each other": (from_each_other, ValueError, "must hold tensors that do not depend on each other"),
    "an output is missing": (of_two_outputs, ValueError, r"reach shared\[0\] around it"),
    "another graph": (elsewhere, ValueError, r"reach shared\[0\] around it"),
    "a leaf": (lambda net: (losses_at(net, 0)[0], net.shared[0]), ValueError, "without graph"),
    "none": (lambda net: (losses_at(net, 0)[0], []), ValueError, "at least one tensor"),
    "no tensor": (lambda net: (losses_at(net, 0)[0], ["z"]), TypeError, "must be a tensor, found str"),
    "twice": (lambda net: ((found := losses_at(net, 0))[0], [found[1]] * 2), ValueError, "each tensor once"),
    "unused": (lambda net: ([h.bias.sum() for h in net.heads], losses_at(net, 0)[1]), ValueError, "none that depends"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("first", [True, False])
def test_errors_leave_everything(wrong, first):
    make, error, message = WRONG[wrong]
    net = net_of()
    balancer = igb.Balancer("igb_v1+nash_mtl", shared=net.shared)
    if not first:
        take_steps(net, balancer, 1)
    losses, z = make(net)
    before = Snapshot(net.parameters(), balancer)
    with pytest.raises(error, match=message):
        balancer.backward(losses, representation=z)
    before.check()


def test_a_pass_behind_the_representation_that_raises():
    net = net_of()
    balancer = igb.Balancer("igb_v1+nash_mtl", shared=net.shared)
    take_steps(net, balancer, 1)
    z = net.encoder[1](Fails.apply(net.encoder[0](data(1)[0])))
    z = net.encoder[3](net.encoder[2](z))
    before = Snapshot(net.parameters(), balancer)
    with pytest.raises(RuntimeError, match="this backward fails"):
        balancer.backward([head(z).square().mean() for head in net.heads], representation=z)
    before.check()


def test_not_with_batches_of_their_own():
    net = net_of()
    losses, z = losses_at(net, 0)
    balancer = igb.Balancer("sdm_grad", shared=net.shared)
    with pytest.raises(ValueError, match="representation must be None with independent batches"):
        balancer.backward(losses, representation=z, independent=[losses_at(net, 1)[0]])
    balancer.accumulate(losses_at(net, 2)[0])
    with pytest.raises(ValueError, match="representation must be None with micro-batches"):
        balancer.backward(losses, representation=z)
