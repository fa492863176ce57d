"""Parameters and gradients of every kind that models have, each with every way in which a step treats gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import igb_kernels as igb

from .models import EmbeddingEncoder, Net, Snapshot, make_net, same
from .truth import METHODS, TASKS, Situation, play, reals

F64 = torch.float64


def data(*shape: int, step: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(step))


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> nn.Parameter:
    return nn.Parameter(data(*shape, step=1000 + seed, dtype=dtype))


def of_net(net: Net) -> Situation:
    return Situation(net.shared, net.losses, net.own)


def with_encoder(encoder: nn.Module, kind: str = "mlp") -> Net:
    torch.manual_seed(0)
    return Net(kind, encoder=encoder).double()


def tied_in_the_encoder() -> Situation:
    encoder = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    encoder[4].weight = encoder[2].weight
    return of_net(with_encoder(encoder))


def tied_with_a_head() -> Situation:
    """As a language model's embedding: the second task reads the encoder's weight once more."""
    net = make_net(dtype=F64)
    weight = net.shared[2]  # [5, 8]

    def losses(step: int) -> list[Tensor]:
        found = net.losses(step)
        z = net.encoder(net.batch(step)[0])
        return [found[0], found[1] + (z @ weight).square().mean(), found[2]]

    return Situation(net.shared, losses, net.own)


def unused_by_some() -> Situation:
    """The first parameter by all tasks, the second by none, and one by each in turn."""
    a, b, *others = [parameter(4, 3, seed=i) for i in range(2 + TASKS)]

    def losses(step: int) -> list[Tensor]:
        x = data(5, 4, step=step)
        return [
            (k + 1) * (torch.tanh(x @ a).sum(1) * (x @ others[(k + step) % TASKS]).sum(1)).square().mean()
            for k in range(TASKS)
        ]

    return Situation([a, b, *others], losses)


def frozen_on_the_way() -> Situation:
    net = make_net(dtype=F64)

    def before(step: int) -> None:
        net.shared[0].requires_grad_(step != 1)
        net.shared[1].requires_grad_(step > 0)

    return Situation(net.shared, net.losses, net.own, before=before)


def sparse_embedding() -> Situation:
    return of_net(with_encoder(EmbeddingEncoder(sparse=True), "embedding"))


def sparse_embedding_that_some_tasks_reach() -> Situation:
    table, weight = nn.Embedding(9, 4, sparse=True).double(), parameter(4, 3)

    def losses(step: int) -> list[Tensor]:
        x = data(5, 4, step=step)
        rows = table(torch.tensor([1, 3, 3, step]))
        return [(x @ weight).square().mean(), (rows @ weight).square().sum(), rows.sin().sum() + weight.sum()]

    return Situation([table.weight, weight], losses)


def complex_parameters() -> Situation:
    """Some are conjugated, so that gradients come yet to be conjugated; and a real one is the imaginary part, so that
    its gradient comes yet to be negated."""
    dtype = torch.complex128
    a, b, c = parameter(4, 3, dtype=dtype), parameter(3, 3, seed=1, dtype=dtype), parameter(3, seed=2, dtype=dtype)
    real, imaginary = parameter(3, seed=3), parameter(1, seed=4)

    def losses(step: int) -> list[Tensor]:
        x = data(5, 4, step=step, dtype=dtype)
        z = x @ a.conj() * torch.complex(real, imaginary.expand(3))
        y = z @ b + c.conj()
        tail = torch.complex(real[:1], imaginary)
        last = y.imag.square().mean() + tail.conj().imag.sum() + 50
        return [y.abs().square().mean(), (z.conj() * c.conj()).real.sum() + 50, last]

    return Situation([a, b, c, real, imaginary], losses)


def a_real_parameter_as_imaginary_part() -> Situation:
    """Of one element: autograd hands over a gradient that is yet to be negated."""
    r = parameter(1)
    scale = parameter(2, seed=1)

    def losses(step: int) -> list[Tensor]:
        w = data(3, 1, step=step, dtype=torch.complex128)
        z = torch.complex(torch.ones(1, dtype=F64), r)
        return [(z.conj() * w[k]).real.sum() + 10 + (k + 1) * scale.square().sum() for k in range(TASKS)]

    return Situation([r, scale], losses)


def complex_in_channels_last() -> Situation:
    weight = nn.Parameter(data(4, 2, 3, 3, dtype=torch.complex128).contiguous(memory_format=torch.channels_last))
    bias = parameter(4)

    def losses(step: int) -> list[Tensor]:
        x = data(5, 2, 6, 6, step=step, dtype=torch.complex128).contiguous(memory_format=torch.channels_last)
        z = nn.functional.conv2d(x, weight).abs().mean((2, 3)) + bias
        return [z.square().mean(), z.sin().sum() + 20, (z[:, 0] * z[:, 1]).mean() + 20]

    return Situation([weight, bias], losses)


def weight_normed() -> Situation:
    encoder = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)),
        nn.Tanh(),
        nn.utils.parametrizations.orthogonal(nn.Linear(8, 5)),
    )
    return of_net(with_encoder(encoder))


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


def parametrised_once_for_all_tasks() -> Situation:
    encoder = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh())
    parametrize.register_parametrization(encoder[2], "weight", Symmetric())
    net = with_encoder(encoder)

    def losses(step: int) -> list[Tensor]:
        with parametrize.cached():
            return [a + b for a, b in zip(net.losses(step), net.losses(step + 50), strict=True)]

    return Situation(net.shared, losses, net.own)


class LoRA(nn.Module):
    """A frozen base, a frozen quantised table that is not used, and an adapter of low rank."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.codes = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
        self.down = nn.Parameter(0.3 * torch.randn(2, base.in_features))
        self.up = nn.Parameter(0.3 * torch.randn(base.out_features, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.mT @ self.up.mT


def lora() -> Situation:
    net = with_encoder(nn.Sequential(LoRA(nn.Linear(6, 8)), nn.Tanh(), LoRA(nn.Linear(8, 5))))
    return Situation([p for p in net.encoder.parameters() if p.dtype is not torch.uint8], net.losses, net.own)


def recurrent(cell: type[nn.Module]) -> Callable[[], Situation]:
    def make() -> Situation:
        class Encoder(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.cell = cell(4, 5, num_layers=2, bidirectional=True, batch_first=True)

            def forward(self, x: Tensor) -> Tensor:
                return self.cell(x)[0][:, -1].unflatten(1, (2, 5)).sum(1)

        return of_net(with_encoder(Encoder(), "gru"))

    return make


class Checkpointed(nn.Module):
    """Two blocks that share a weight, with dropout, recomputed in each backward pass."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.on, self.use_reentrant = True, use_reentrant
        self.first, self.block = nn.Linear(6, 5), nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.2), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(2):
            x = checkpoint(self.block, x, use_reentrant=self.use_reentrant) if self.on else self.block(x)
        return x


def checkpointed(use_reentrant: bool, heads: bool = False) -> Callable[[], Situation]:
    def make() -> Situation:
        net = with_encoder(Checkpointed(use_reentrant))

        def losses(step: int, on: bool = True) -> list[Tensor]:
            net.encoder.on = on
            x, targets = net.batch(step)
            torch.manual_seed(step)
            z = net.encoder(x)
            found = []
            for head, y in zip(net.heads, targets, strict=True):
                out = checkpoint(head, z, use_reentrant=use_reentrant) if heads and on else head(z)
                found.append((out - y).square().mean())
            return found

        return Situation(net.shared, losses, net.own, plain=lambda step: losses(step, on=False))

    return make


class Scratch(torch.autograd.Function):
    """x @ w, whose gradient for w is written to the same memory at every call."""

    memory: ClassVar[dict[torch.Size, Tensor]] = {}
    on = True

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        out = Scratch.memory.setdefault(w.shape, torch.empty_like(w)) if Scratch.on else torch.empty_like(w)
        return grad @ w.mT, torch.mm(x.mT, grad, out=out)


def scratch_reused() -> Situation:
    a, b = parameter(4, 4), parameter(4, 4, seed=1)

    def losses(step: int, on: bool = True) -> list[Tensor]:
        Scratch.on = on
        y = Scratch.apply(Scratch.apply(data(5, 4, step=step), a).tanh(), b)
        return [y.square().mean(), y.sin().sum() + 9, (y[:, 0] * y[:, 1]).mean() + 9]

    return Situation([a, b], losses, plain=lambda step: losses(step, on=False))


class Twice(torch.autograd.Function):
    """a + b, with one tensor as the gradient of both."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        grad = grad.clone()
        return grad, grad


class Spread(torch.autograd.Function):
    """Identity; the gradient has stride 0, or that of a transposed matrix, as `grad` says."""

    @staticmethod
    def forward(ctx, x: Tensor, how: str) -> Tensor:
        ctx.how = how
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.how == "expanded":
            return grad.mean().expand_as(grad), None
        return (grad.t().contiguous().t() if ctx.how == "transposed" else grad), None


def gradients_that_alias() -> Situation:
    a, b, c, d = (parameter(4, 4, seed=i) for i in range(4))

    def losses(step: int) -> list[Tensor]:
        x = data(5, 4, step=step)
        y = x @ Twice.apply(a, b) + (c + d).sum(0)
        # `w.sum()` hands over an expanded gradient.
        return [y.square().mean(), y.sin().sum() + c.sum() + 20, (y[:, 0] * y[:, 1]).mean() + (a - b).sum() + 20]

    return Situation([a, b, c, d], losses)


def gradients_that_share_memory() -> Situation:
    """Views of one gradient, for two parameters whole and for two in parts; and views of a pass's seed."""
    a, b, c, d = parameter(4, 4), parameter(2, 8, seed=1), parameter(6, seed=2), parameter(10, seed=3)
    e, f, unlike = parameter(1, seed=4), parameter(1, seed=5), parameter(4, 4, seed=6)

    def losses(step: int) -> list[Tensor]:
        x = data(TASKS, 16, step=step)
        y = a.flatten() + b.flatten() + torch.cat([c, d]).view(4, 4).flatten()
        return [
            (y * x[k]).sum() + (unlike * x[k].view(4, 4)).sin().sum() + e.squeeze() + f.squeeze() + 50
            for k in range(TASKS)
        ]

    return Situation([a, unlike, b, c, e, d, f], losses)


def gradients_in_other_layouts() -> Situation:
    a, b = parameter(4, 4), nn.Parameter(data(4, 4, step=3).t())

    def losses(step: int) -> list[Tensor]:
        x, ways = data(5, 4, step=step), ("plain", "transposed", "expanded")
        y = [x @ Spread.apply(a, ways[(k + step) % 3]) + x @ Spread.apply(b, ways[k]) for k in range(TASKS)]
        return [y[k].square().mean() + k for k in range(TASKS)]

    return Situation([a, b], losses)


SITUATIONS: dict[str, Callable[[], Situation]] = {
    "tied in the encoder": tied_in_the_encoder,
    "tied with a head": tied_with_a_head,
    "unused by some": unused_by_some,
    "frozen on the way": frozen_on_the_way,
    "sparse embedding": sparse_embedding,
    "sparse embedding that some tasks reach": sparse_embedding_that_some_tasks_reach,
    "channels_last": lambda: of_net(make_net("conv", F64)),
    "complex": complex_parameters,
    "complex in channels_last": complex_in_channels_last,
    "a real parameter as imaginary part": a_real_parameter_as_imaginary_part,
    "weight norm": weight_normed,
    "parametrised": parametrised_once_for_all_tasks,
    "LoRA": lora,
    "LSTM": recurrent(nn.LSTM),
    "GRU": recurrent(nn.GRU),
    "checkpoint": checkpointed(use_reentrant=False),
    "checkpoint, heads too": checkpointed(use_reentrant=False, heads=True),
    "reentrant checkpoint": checkpointed(use_reentrant=True),
    "reentrant checkpoint, heads too": checkpointed(use_reentrant=True, heads=True),
    "scratch memory reused": scratch_reused,
    "gradients that alias": gradients_that_alias,
    "gradients that share memory": gradients_that_share_memory,
    "gradients in other layouts": gradients_in_other_layouts,
}


@pytest.mark.parametrize("existing", [False, True], ids=["", "added to"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_steps_are_those_of_plain_pytorch(situation, method, existing):
    if "layouts" in situation and method == "equal":
        pytest.skip("one joint pass sums the gradients before the function spreads them")
    play(SITUATIONS[situation](), method, existing=existing)


@pytest.mark.parametrize("situation", ["complex", "complex in channels_last", "sparse embedding", "unused by some"])
@pytest.mark.parametrize("method", METHODS)
def test_on_the_reference_backend(situation, method):
    play(SITUATIONS[situation](), method, existing=True, backend="reference")


@pytest.mark.parametrize("rows", [1, 1000])
@pytest.mark.parametrize("method", ["db_mtl beta 0", "db_mtl"])
def test_complex_gradients_one_by_one_or_together(method, rows, monkeypatch):
    for module in (igb.passes, igb.store):
        monkeypatch.setattr(module, "rows_in_cache", lambda params: rows)
    play(complex_parameters(), method)
    play(a_real_parameter_as_imaginary_part(), method, existing=True)


@pytest.mark.parametrize("method", METHODS)
def test_single_precision_complex_parameters(method):
    """Small whole numbers have exact gradients."""
    p = nn.Parameter(torch.tensor([[1 + 2j, -1j], [3.0, 2 - 1j]]))
    rows = [torch.tensor([[1, 2j], [1 - 1j, 1]]), torch.tensor([[1j, 1], [2, 2j]]), torch.tensor([[2, 1], [1j, 3]])]

    def losses(step: int) -> list[Tensor]:
        return [(p.conj() * (row + step)).real.sum() + 30 for row in rows]

    play(Situation([p], losses), method)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "equal"])
def test_complex_sums_are_written_over_the_gradients(method):
    p = parameter(4, dtype=torch.complex128)
    made: list[int] = []
    p.register_post_accumulate_grad_hook(lambda p: made.append(p.grad.data_ptr()))
    igb.Balancer(**METHODS[method](), shared=[p]).backward([(p * (k + 2j)).abs().sum() for k in range(TASKS)])
    assert p.grad.data_ptr() in made


@pytest.mark.parametrize("method", ["nash_mtl", "db_mtl", "excess_mtl", "grad_drop"])
def test_complex_state_goes_into_another_balancer(method):
    torch.manual_seed(0)
    first, second = complex_parameters(), complex_parameters()
    one, other = (igb.Balancer(**METHODS[method](), shared=s.shared) for s in (first, second))
    one.backward(first.losses(0))
    other.load_state_dict(one.state_dict())
    for p in first.shared:
        p.grad = None
    one.backward(first.losses(1))
    other.backward(second.losses(1))
    assert same([p.grad for p in first.shared], [p.grad for p in second.shared])


@pytest.mark.parametrize("part", [complex(float("nan"), 0.0), complex(0.0, float("inf"))], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_complex_gradients_that_are_not_finite(method, part):
    s = complex_parameters()
    balancer = igb.Balancer(**METHODS[method](), shared=s.shared)
    balancer.backward(s.losses(0))
    averages = balancer.state_dict()["averages"]
    kept = [[None if t is None else t.clone() for t in row] for row in averages]
    losses = s.losses(1)
    losses[1] = losses[1] + (s.shared[0] * part).abs().sum()
    assert igb.Status.NON_FINITE in balancer.backward(losses).flags
    assert not bool(reals(s.shared[0].grad).isfinite().all())
    assert same(balancer.state_dict()["averages"], kept)


@pytest.mark.parametrize("convention", ["scaled", "weighted"])
def test_what_dense_gradients_of_sparse_ones_cost_is_said_once(convention, warnings_said):
    net, table = make_net(), nn.Embedding(7, 5, sparse=True)
    own = {"heads": "weighted", "task_parameters": [*net.own, *table.parameters()]} if convention == "weighted" else {}
    balancer = igb.Balancer("imtl_g", shared=net.shared, **own)
    for _ in range(2):
        losses = net.losses()
        balancer.backward([losses[0] + table(torch.tensor([1, 2])).square().mean(), *losses[1:]])
    if convention == "scaled":  # what only one task has is as autograd makes it
        assert table.weight.grad.layout is torch.sparse_coo
        assert not warnings_said
    else:
        assert table.weight.grad.layout is torch.strided
        (message,) = warnings_said
        assert "task_parameters[6], of shape (7, 5), has sparse gradients" in message
        assert "memory and time for all rows" in message
    want = torch.zeros(7, 5)
    want[[1, 2]] = 2 * 2 * table.weight.detach()[[1, 2]] / 10  # two steps
    factor = float(table.weight.grad.to_dense()[1, 0] / want[1, 0])
    torch.testing.assert_close(table.weight.grad.to_dense(), factor * want)
    assert convention == "weighted" or factor == pytest.approx(1)


@pytest.mark.parametrize("convention", ["scaled", "weighted"])
def test_equal_weights_leave_sparse_gradients_sparse(convention, warnings_said):
    net = with_encoder(EmbeddingEncoder(sparse=True), "embedding")
    params = [net.encoder.positions, net.encoder.table.weight]
    want = torch.autograd.grad(sum(net.losses()), params)
    own = {"heads": "weighted", "task_parameters": net.own} if convention == "weighted" else {}
    balancer = igb.Balancer("equal", shared=net.shared, **own)
    balancer.backward(net.losses())
    assert params[1].grad.layout is torch.sparse_coo
    torch.testing.assert_close([p.grad.to_dense() for p in params], [w.to_dense() for w in want])
    assert not warnings_said
    losses = net.losses()
    rows = net.encoder.table(torch.tensor([1]))
    rows.register_hook(lambda grad: grad * torch.inf)  # the losses stay finite
    losses[0] = losses[0] + rows.square().sum()
    assert igb.Status.NON_FINITE in balancer.backward(losses).flags


class Fails(torch.autograd.Function):
    """Identity whose backward raises."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        raise RuntimeError("this backward fails")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("situation", ["complex", "sparse embedding", "reentrant checkpoint"])
def test_a_step_that_raises_changes_nothing(situation, method):
    s = SITUATIONS[situation]()
    balancer = igb.Balancer(**METHODS[method](), shared=s.shared)
    balancer.backward(s.losses(0))
    for p in s.shared:  # also with gradients that are no plain memory
        p.grad = p.grad.conj() if p.is_complex() else torch.ones_like(p).to_sparse() if p.dim() == 2 else p.grad
    found, copies = [p.grad for p in s.shared], [reals(p.grad).clone() for p in s.shared]
    before = Snapshot(s.own, balancer)
    losses = s.losses(1)
    losses[1] = losses[1] + Fails.apply(s.shared[0]).abs().sum()
    with pytest.raises(RuntimeError, match="this backward fails"):
        balancer.backward(losses)
    before.check()
    assert all(p.grad is grad for p, grad in zip(s.shared, found, strict=True))
    assert all(torch.equal(reals(p.grad), copy) for p, copy in zip(s.shared, copies, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_gradients_yet_to_be_conjugated_or_sparse_are_added_to(method):
    sums = []
    for odd in (False, True):
        s = complex_parameters()
        table = nn.Embedding(5, 3, _weight=data(5, 3))
        balancer = igb.Balancer(**METHODS[method](), shared=[*s.shared, table.weight])
        for p in [*s.shared, table.weight]:
            p.grad = torch.ones_like(p) * (1 + 2j if p.is_complex() else 1)
            if odd:
                p.grad = p.grad.conj_physical().conj() if p.is_complex() else p.grad
        table.weight.grad = table.weight.grad.to_sparse() if odd else table.weight.grad
        balancer.backward([loss + (table.weight * (k + 1)).sin().sum() for k, loss in enumerate(s.losses(0))])
        sums.append([reals(p.grad) for p in [*s.shared, table.weight]])
    assert same(*sums)


def test_a_module_with_a_frozen_base():
    """Passed as it is: what is frozen gets no gradient, what is thawed later does; a quantised base is left out."""
    net = with_encoder(nn.Sequential(LoRA(nn.Linear(6, 8)), nn.Tanh(), LoRA(nn.Linear(8, 5))))
    balancer = igb.Balancer("db_mtl", shared=net.encoder)
    assert len(balancer.shared) == 8
    frozen = [p for p in net.encoder.parameters() if not p.requires_grad]
    assert len(frozen) == 6
    balancer.backward(net.losses())
    assert all(p.grad is None for p in frozen)
    assert all(row.count(None) == 4 for row in balancer.state_dict()["averages"])
    base = net.encoder[0].base
    base.requires_grad_(True)
    balancer.backward(net.losses(1))
    assert base.weight.grad is not None
    assert net.encoder[2].base.weight.grad is None


@pytest.mark.parametrize("method", METHODS)
def test_gradients_set_to_zero_instead_of_none(method):
    """The same steps, with the objects staying; here they are views of one buffer, as some wrappers make them."""
    found = []
    for set_to_none in (True, False):
        net = make_net("conv", F64)
        balancer = igb.Balancer(**METHODS[method](), shared=net.shared)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        sizes = [p.numel() for p in net.parameters()]
        for p, part in zip(net.parameters(), torch.zeros(sum(sizes), dtype=F64).split(sizes), strict=True):
            p.grad = part.view_as(p)
        grads = [p.grad for p in net.parameters()]
        for step in range(3):
            optimizer.zero_grad(set_to_none=set_to_none)
            balancer.backward(net.losses(step))
            assert set_to_none or all(p.grad is g for p, g in zip(net.parameters(), grads, strict=True))
            optimizer.step()
        found.append(list(net.parameters()))
    # GradDrop draws by places in memory: buffers in channels_last order and views of it draw alike only without it.
    if method != "grad_drop":
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", METHODS)
def test_a_graph_that_is_kept(method):
    """Two balanced steps and a plain one on the same losses; then none."""
    net = make_net(dtype=F64)
    balancers = [igb.Balancer(**METHODS[method](), shared=net.shared) for _ in range(2)]
    losses = net.losses()
    balancers[0].backward(losses, retain_graph=True)
    first = [p.grad.clone() for p in net.parameters()]
    balancers[1].backward(losses, retain_graph=True)
    torch.testing.assert_close([p.grad for p in net.parameters()], [2 * g for g in first])
    net.zero_grad()
    sum(losses).backward(retain_graph=True)
    balancers[0].backward(losses)
    with pytest.raises(RuntimeError, match="second time"):
        balancers[0].backward(losses)


def test_reentrant_checkpoints_and_independent_batches():
    """Passes into the shared parameters alone are not to be had from these; PyTorch says what is."""
    s = checkpointed(use_reentrant=True)()
    balancer = igb.Balancer("sdm_grad", shared=s.shared)
    before = Snapshot([*s.shared, *s.own], balancer)
    batches = [s.losses(1), s.losses(2)]
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        balancer.backward(s.losses(0), independent=batches)
    before.check()
    s = checkpointed(use_reentrant=False)()
    igb.Balancer("sdm_grad", shared=s.shared).backward(s.losses(0), independent=[s.losses(1), s.losses(2)])


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_not_views_of_the_scales(method):
    """PyTorch makes the gradient of `p.squeeze()` a view of the loss's own, where p has one element."""
    p, q = parameter(1), parameter(1, seed=1)
    result = igb.Balancer(**METHODS[method](), shared=[p]).backward(
        [p.squeeze() + (k + 1) * q.square().sum() + 9 for k in range(TASKS)]
    )
    before = result.scales.clone()
    with torch.no_grad():
        for grad in (p.grad, q.grad):
            grad.zero_()
    assert torch.equal(result.scales, before)
