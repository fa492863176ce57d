"""`backward`, `mtl_backward` and `jac_to_grad` beside TorchJD's: the same `.jac`, `.grad` and weights."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from balancer.models import ENCODERS, INPUTS
from torch import Tensor, nn
from torchjd import aggregation, autojac

from igb_kernels.integrations import torchjd as ours
from igb_kernels.integrations.torchjd import _autojac

TASKS = 3


class Model(nn.Module):
    """An encoder with heads that use all of its features, or, the last, none."""

    def __init__(self, encoder: str = "mlp", tasks: int = TASKS) -> None:
        super().__init__()
        self.encoder = ENCODERS[encoder]()
        self.heads = nn.ModuleList(nn.Linear(5, 2) for _ in range(tasks))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = self.encoder(x)
        return features, [(k + 1) * (head(features) - k).square().mean() for k, head in enumerate(self.heads)]


def fields(module: nn.Module) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """`.jac` and `.grad` of each parameter."""
    return {
        name: (None if not hasattr(p, "jac") else p.jac + 0, None if p.grad is None else p.grad.clone())
        for name, p in module.named_parameters()
    }


def assert_same(found: nn.Module, expected: nn.Module, rtol: float = 1e-5) -> None:
    atol = rtol * max(float(t.abs().max()) for field in fields(expected).values() for t in field if t is not None)
    for (name, own), theirs in zip(fields(found).items(), fields(expected).values(), strict=True):
        for kind, a, b in zip((".jac", ".grad"), own, theirs, strict=True):
            assert (a is None) == (b is None), f"{kind} of {name}"
            if a is not None:
                assert a.dtype is b.dtype
                assert torch.allclose(a, b, rtol=rtol, atol=atol), f"{kind} of {name}"


def twins(encoder: str = "mlp", **kwargs: int) -> tuple[Model, Model, Tensor]:
    torch.manual_seed(0)
    model = Model(encoder, **kwargs)
    return model, copy.deepcopy(model), INPUTS[encoder]()


# ---- The same fields ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("encoder", ["mlp", "conv", "gru", "embedding"])
def test_a_multi_task_step_leaves_what_torchjd_leaves(encoder, chunk_size):
    own, theirs, x = twins(encoder)
    updates = []
    for library, model, aggregator in ((ours, own, ours.AlignedMTL()), (autojac, theirs, aggregation.AlignedMTL())):
        features, losses = model(x)
        library.mtl_backward(losses, features, parallel_chunk_size=chunk_size)
        updates.append((library, model, aggregator))
    assert_same(own, theirs)
    weights = [library.jac_to_grad(model.encoder.parameters(), aggregator) for library, model, aggregator in updates]
    assert weights[0].dtype is weights[1].dtype is torch.float32
    assert torch.allclose(*weights, rtol=1e-3)
    assert not any(hasattr(p, "jac") for p in own.parameters())
    assert_same(own, theirs, rtol=1e-3)


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3])
@pytest.mark.parametrize(
    "of",
    [
        lambda x: [x.sum(), (x * x).sum(), x[0]],
        lambda x: torch.stack([x.sum(), (x * x).sum(), x.prod()]),
        lambda x: x * x,
        lambda x: (x * x).view(2, 2),
        lambda x: [(x * x)[:2].view(1, 2), x.sum(), x[3] * x[1:3]],
        lambda x: torch.stack([x, x * x]),
        lambda x: [x.sum()],
    ],
    ids=["scalars", "stacked", "vector", "matrix", "mixture", "stacked vectors", "one"],
)
def test_a_row_for_each_element(of, chunk_size):
    found = []
    for library in (ours, autojac):
        x = torch.tensor([1.0, -2.0, 3.0, 0.5], requires_grad=True)
        unused = torch.ones(2, requires_grad=True)
        library.backward(of(x), inputs=[x, unused], parallel_chunk_size=chunk_size)
        found.append((x.jac + 0, unused.jac + 0, x.grad, unused.grad))
    for a, b in zip(found[0][:2], found[1][:2], strict=True):
        assert torch.equal(a, b)
    assert found[0][2:] == (None, None)


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_rows_from_given_jacobians(chunk_size):
    given = [torch.randn(3, 2), torch.randn(3)]
    before = [g.clone() for g in given]
    found = []
    for library in (ours, autojac):
        x = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
        shift = torch.zeros(2, requires_grad=True)
        tensors = [x[:2] * x[1:] + shift, x.square().sum()]
        library.backward(tensors, jac_tensors=given, parallel_chunk_size=chunk_size)
        found.append((x.jac + 0, shift.jac + 0))
        library.jac_to_grad([shift, x], aggregation.Sum())
        found[-1] += (x.grad, shift.grad)
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-6)
    assert all(torch.equal(g, b) for g, b in zip(given, before, strict=True)), "a gradient may be a view of its seed"


def test_what_is_given_is_only_read():
    """A gradient can be a view of what its pass started from, and is written over later."""
    parameter = torch.randn(4, requires_grad=True)
    given = torch.randn(3, 2, 2)
    before, expected = given.clone(), given.sum(0).flatten()
    ours.backward(parameter.view(2, 2), jac_tensors=given, parallel_chunk_size=1)
    ours.jac_to_grad([parameter], ours.Sum())
    assert torch.allclose(parameter.grad, expected)
    assert torch.equal(given, before)
    parameter.grad = None
    features, starts = parameter.view(2, 2), [torch.randn(4), torch.randn(4)]
    before, expected = [start.clone() for start in starts], starts[0] + starts[1]
    tensors = [features.view(4), features.flatten()]
    ours.mtl_backward(tensors, features, grad_tensors=starts, parallel_chunk_size=1)
    ours.jac_to_grad([parameter], ours.Sum())
    assert torch.allclose(parameter.grad, expected)
    assert all(torch.equal(start, b) for start, b in zip(starts, before, strict=True))


def test_gradients_that_autograd_hands_out_twice_become_two():
    """Those of two parameters of a head that are added, and of rows that are expanded."""
    first, second = torch.ones(4, requires_grad=True), torch.ones(2, 2, requires_grad=True)
    shared = torch.ones(3, 4, requires_grad=True)
    starts = [torch.arange(4.0), torch.ones(4)]
    for _ in range(2):
        features = shared.sum(0)
        tensors = [features + (first + second.flatten()), features * 2]
        ours.mtl_backward(tensors, features, grad_tensors=starts, parallel_chunk_size=2)
    assert torch.equal(first.grad, 2 * torch.arange(4.0))
    assert torch.equal(second.grad.flatten(), 2 * torch.arange(4.0))
    shared.jac = None
    del shared.jac
    features = shared.sum(0)
    ours.mtl_backward([features.sum(), features.prod()], features, parallel_chunk_size=2)
    shared.jac[0, 0] += 1
    assert float(shared.jac[0].sum()) == 16


@pytest.mark.parametrize("chunk_size", [1, None])
def test_what_no_task_reaches_gets_zeros(chunk_size):
    reached, unreached = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    ours.backward([reached.sum(), reached.prod()], inputs=[reached, unreached], parallel_chunk_size=chunk_size)
    ours.jac_to_grad([reached, unreached], ours.UPGrad())
    assert torch.equal(unreached.grad, torch.zeros(3))


def test_heads_that_are_no_scalars_and_several_features():
    """One task does not reach the first features, one takes a head in front of which is nothing."""
    found = []
    starts = [torch.randn(4), torch.randn(2, 2), torch.ones(())]
    for library in (ours, autojac):
        torch.manual_seed(0)
        encoder, x = nn.Linear(3, 4), torch.randn(4, 3)
        heads = [nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(2))]
        first, second = encoder(x), torch.tanh(x @ encoder.weight.T)
        tensors = [first @ heads[0], (second[:2, :2] * heads[1]), second.sum() + heads[0].sum()]
        library.mtl_backward(tensors, [first, second], grad_tensors=starts)
        library.jac_to_grad(encoder.parameters(), aggregation.IMTLG() if library is autojac else ours.IMTLG())
        found.append([p.grad for p in (*encoder.parameters(), *heads)])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_given_parameters_get_something_and_others_nothing():
    found = []
    for library, model in zip((ours, autojac), twins()[:2], strict=True):
        torch.manual_seed(1)
        features, losses = model(INPUTS["mlp"]())
        library.mtl_backward(
            losses,
            features,
            tasks_params=[[model.heads[0].weight, model.unused], [], [model.heads[2].bias]],
            shared_params=[model.encoder[0].weight, model.encoder[0].bias],
        )
        found.append(model)
    assert_same(*found)
    assert found[0].unused.grad is not None
    assert found[0].heads[1].weight.grad is None


def test_no_shared_parameters():
    own, theirs, x = twins()
    for library, model in ((ours, own), (autojac, theirs)):
        features, losses = model(x)
        library.mtl_backward(losses, features, shared_params=[])
    assert_same(own, theirs)


def test_rows_of_another_dtype_are_aggregated_as_a_matrix():
    found = []
    for library, aggregator in ((ours, ours.IMTLG()), (autojac, aggregation.IMTLG())):
        parameter = torch.zeros(4, requires_grad=True)
        parameter.jac = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        library.jac_to_grad([parameter], aggregator)
        found.append(parameter.grad)
    assert found[0].dtype is torch.float32
    assert torch.allclose(*found, rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [1, None])
def test_what_is_there_is_added_to(chunk_size):
    """`.jac` of a second batch, `.grad` of a second update, and the heads'."""
    found = []
    for library, model in zip((ours, autojac), twins()[:2], strict=True):
        torch.manual_seed(1)
        for _ in range(2):
            for _ in range(2):
                features, losses = model(INPUTS["mlp"]())
                library.mtl_backward(losses, features, parallel_chunk_size=chunk_size)
            if library is ours:
                held = [p.grad for p in model.encoder.parameters()]
            library.jac_to_grad(model.encoder.parameters(), aggregation.Mean())
            if library is ours and held[0] is not None:
                assert all(p.grad is g for p, g in zip(model.encoder.parameters(), held, strict=True)), "in place"
        found.append(model)
    assert_same(*found)
    features, losses = found[0](INPUTS["mlp"]())
    first = next(found[0].encoder.parameters())
    first.jac = torch.zeros(TASKS + 1, *first.shape)
    with pytest.raises(ValueError, match=r"\.jac must have shape \(3, 8, 6\) to be added to, found \(4, 8, 6\)"):
        ours.mtl_backward(losses, features)


@pytest.mark.parametrize("chunk_size", [1, None])
def test_retain_jac(chunk_size):
    own, theirs, x = twins()
    for library, model in ((ours, own), (autojac, theirs)):
        features, losses = model(x)
        library.mtl_backward(losses, features, parallel_chunk_size=chunk_size)
        params = list(model.encoder.parameters())
        library.jac_to_grad(params[:2], aggregation.Mean(), retain_jac=True)
        library.jac_to_grad(params, aggregation.Mean(), retain_jac=True)
    assert_same(own, theirs)


@pytest.mark.parametrize("chunk_size", [1, 2, None])
def test_retain_graph(chunk_size):
    own, _, x = twins()
    features, losses = own(x)
    ours.mtl_backward(losses, features, retain_graph=True, parallel_chunk_size=chunk_size)
    ours.mtl_backward(losses, features, parallel_chunk_size=chunk_size)
    with pytest.raises(RuntimeError, match="second time"):
        ours.mtl_backward(losses, features, parallel_chunk_size=chunk_size)
    encoded = twins()[0].encoder(x)
    ours.backward([encoded.sum(), encoded.prod()], parallel_chunk_size=chunk_size)
    with pytest.raises(RuntimeError, match="second time"):
        encoded.sum().backward()


def test_a_tensor_that_retains_its_gradient_is_an_input():
    """Its `.grad` is the aggregation alone; in TorchJD, what the passes retained is in it as well."""
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = x * x
    y.retain_grad()
    ours.backward([y.sum(), y[0] * y[1]], inputs=[y], parallel_chunk_size=1)
    assert torch.equal(y.jac, torch.tensor([[1.0, 1.0], [4.0, 1.0]]))
    ours.jac_to_grad([y], aggregation.Sum())
    assert torch.equal(y.grad, torch.tensor([5.0, 2.0]))
    assert x.grad is None
    with pytest.raises(ValueError, match=r"\.jac is for tensors that require grad and are leaves or retain it"):
        ours.backward([(x * x).sum()], inputs=[x * x])


@pytest.mark.parametrize("chunk_size", [1, 2, None])
def test_features_that_retain_their_gradient(chunk_size):
    """Get that of the losses' sum, once."""
    own, plain, x = twins()
    for _ in range(2):
        features, losses = own(x)
        features.retain_grad()
        ours.mtl_backward(losses, features, parallel_chunk_size=chunk_size)
        expected, others = plain(x)
        expected.retain_grad()
        sum(others).backward()
        assert torch.allclose(features.grad, expected.grad, rtol=1e-5)
        assert len(next(own.encoder.parameters()).jac) == TASKS
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = x * x
    y.retain_grad()
    ours.backward([y.sum(), y[0]], inputs=[y], parallel_chunk_size=chunk_size)
    assert y.jac.tolist() == [[1, 1], [1, 0]]
    assert y.grad is None


def assigned(losses: list[Tensor]) -> Tensor:
    vector = torch.zeros(len(losses))
    for k, loss in enumerate(losses):
        vector[k] = loss
    return vector


@pytest.mark.parametrize("join", [torch.stack, assigned])
def test_losses_in_one_vector_run_their_own_heads_alone(join):
    own, plain, x = twins()
    ran: list[int] = []
    for k, head in enumerate(own.heads):
        head.weight.register_hook(lambda grad, k=k: ran.append(k))
    _, losses = own(x)
    ours.backward(join([*losses, torch.ones(())]), parallel_chunk_size=1)
    assert ran == [0, 1, 2]
    autojac.backward(join([*plain(x)[1], torch.ones(())]), parallel_chunk_size=1)
    assert_same(own, plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    own, theirs, x = twins()
    for library, model in ((ours, own.to(dtype)), (autojac, theirs.to(dtype))):
        features, losses = model(x.to(dtype))
        library.mtl_backward(losses, features)
    assert_same(own, theirs, rtol=2e-2 if dtype is torch.bfloat16 else 1e-12)
    weights = ours.jac_to_grad(own.encoder.parameters(), ours.UPGrad())
    assert weights.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert all(p.grad.dtype is dtype for p in own.encoder.parameters())


def test_sparse_gradients():
    """Of a head stay sparse; those that are compared become dense."""
    torch.manual_seed(0)
    table, head = nn.Embedding(6, 3, sparse=True), nn.Embedding(6, 3, sparse=True)
    features = table(torch.tensor([1, 2, 1]))
    losses = [(features * head(torch.tensor([0, 1, 1]))).sum(), features.square().sum()]
    ours.mtl_backward(losses, features, parallel_chunk_size=1)
    ours.jac_to_grad(table.parameters(), ours.UPGrad())
    assert head.weight.grad.is_sparse
    assert table.weight.grad.layout is torch.strided
    assert bool(table.weight.grad[[1, 2]].any(1).all())
    assert not table.weight.grad[[0, 3, 4, 5]].any()


# ---- `.jac` ---------------------------------------------------------------------------------------------------------


def rows_of(parameter: Tensor) -> Tensor:
    """A fresh `.jac`, in rows."""
    ours.backward([parameter.sum(), (parameter**2).sum()], inputs=[parameter], parallel_chunk_size=1)
    assert isinstance(parameter.jac, _autojac.JacobianRows)
    return parameter.jac


def test_rows_are_a_tensor_to_whoever_reads_them():
    parameter = torch.tensor([1.0, 2.0], requires_grad=True)
    jac = rows_of(parameter)
    assert (jac.shape, jac.dtype, jac.device, len(jac), jac.ndim, jac.dim(), jac.size(1), jac.numel()) == (
        (2, 2), torch.float32, parameter.device, 2, 2, 2, 2, 4,
    )  # fmt: skip
    assert jac.whole is None, "none of this needs one memory"
    expected = torch.tensor([[1.0, 1.0], [2.0, 4.0]])
    assert torch.equal(jac, expected)
    assert jac.whole is not None
    assert repr(jac) == repr(expected)
    assert jac.tolist() == expected.tolist()
    assert jac.numpy().tolist() == expected.tolist()
    assert torch.equal(copy.deepcopy(jac), expected)
    assert torch.equal(pickle.loads(pickle.dumps(jac)), expected)
    assert torch.equal(jac @ jac.T, expected @ expected.T)
    assert torch.equal(torch.cat([jac, jac]), torch.cat([expected, expected]))
    with torch._C.DisableTorchFunctionSubclass():
        assert torch.equal(jac + 1, expected + 1)
    jac.mul_(2)
    jac[0].zero_()
    expected = torch.tensor([[0.0, 0.0], [4.0, 8.0]])
    assert torch.equal(parameter.jac, expected), "what is written to it stays"
    parameter.jac += 1
    ours.jac_to_grad([parameter], aggregation.Sum())
    assert torch.equal(parameter.grad, torch.tensor([6.0, 10.0]))


def test_torchjd_takes_ours_and_we_theirs():
    """Each library's backward, with each library's jac_to_grad and aggregators."""
    updates = []
    for first in (ours, autojac):
        for second in (ours, autojac):
            for aggregators in (ours, aggregation):
                model, _, x = twins()
                features, losses = model(x)
                first.mtl_backward(losses, features, parallel_chunk_size=1)
                weights = second.jac_to_grad(model.encoder.parameters(), aggregators.AlignedMTL())
                assert weights.dtype is torch.float32
                updates.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    for update in updates:
        assert torch.allclose(update, updates[0], rtol=1e-3, atol=1e-4)


def test_used_up_rows_say_so():
    parameter = torch.tensor([1.0, 2.0], requires_grad=True)
    unread, jac = rows_of(parameter), None
    ours.jac_to_grad([parameter], ours.UPGrad())
    with pytest.raises(RuntimeError, match="used up by jac_to_grad: read it before, or give retain_jac=True"):
        unread.sum()
    jac = rows_of(parameter)
    expected = jac.clone()
    ours.jac_to_grad([parameter], ours.UPGrad())
    assert torch.equal(jac, expected), "what was read before stays"
    unread = rows_of(parameter)
    ours.jac_to_grad([parameter], ours.UPGrad(), retain_jac=True)
    assert torch.equal(unread, expected)


def test_no_row_is_copied():
    """Rows of passes one by one stay in autograd's memory, and the first becomes `.grad`."""
    model, _, x = twins()
    features, losses = model(x)
    ours.mtl_backward(losses, features, parallel_chunk_size=1)
    params = list(model.encoder.parameters())
    firsts = [p.jac.rows[0].data_ptr() for p in params]
    ours.jac_to_grad(params, ours.UPGrad())
    assert [p.grad.data_ptr() for p in params] == firsts
    features, losses = model(x)
    ours.mtl_backward(losses, features, parallel_chunk_size=TASKS)  # one tensor, that .grad must not keep alive
    jac, before = params[0].jac, params[0].jac.clone()
    for p in params:
        p.grad = None
    ours.jac_to_grad(params, ours.UPGrad())
    assert not any(p.grad.untyped_storage().data_ptr() == jac.untyped_storage().data_ptr() for p in params)
    assert torch.equal(jac, before)
    features, losses = model(x)
    ours.mtl_backward(losses, features, parallel_chunk_size=2)  # two tensors
    jac, before = params[0].jac, [row.clone() for row in params[0].jac.rows]
    for p in params:
        p.grad = None
    ours.jac_to_grad(params, ours.UPGrad())
    assert params[0].grad.untyped_storage().nbytes() == params[0].nbytes
    assert all(torch.equal(row, b) for row, b in zip(jac.rows, before, strict=True))


def test_what_waits_for_the_next_passes_ends_with_the_parameters():
    model, _, x = twins()
    for _ in range(2):
        features, losses = model(x)
        ours.mtl_backward(losses, features, parallel_chunk_size=1)
        rows = [weakref.ref(row) for row in next(model.encoder.parameters()).jac.rows]
        ours.jac_to_grad(model.encoder.parameters(), ours.UPGrad())
        assert [row() is None for row in rows[1:]] == [False, False]
    features, losses = model(x)
    waiting: list[int] = []
    last = next(model.encoder.parameters())
    hook = last.register_hook(lambda _: waiting.append(sum(row() is not None for row in rows[1:])))
    ours.mtl_backward(losses, features, parallel_chunk_size=1)
    hook.remove()
    assert waiting == [2, 1, 0]
    ours.jac_to_grad(model.encoder.parameters(), ours.UPGrad())
    before = len(_autojac._outgoing)
    del model, features, losses, last, hook
    gc.collect()
    assert len(_autojac._outgoing) < before


# ---- Aggregators and hooks ------------------------------------------------------------------------------------------


def filled(chunk_size: int | None = None) -> list[Tensor]:
    model, _, x = twins()
    features, losses = model(x)
    ours.mtl_backward(losses, features, parallel_chunk_size=chunk_size)
    return list(model.encoder.parameters())


AGGREGATORS: dict[str, Callable[[ModuleType], nn.Module]] = {
    "Mean": lambda library: library.Mean(),
    "Sum": lambda library: library.Sum(),
    "Random": lambda library: library.Random(),
    "Constant": lambda library: library.Constant(torch.tensor([1.0, 2.0, 3.0])),
    "TrimmedMean": lambda library: library.TrimmedMean(1),
    "Krum": lambda library: library.Krum(0),
    "PCD": lambda library: library.PCD(),
    "AlignedMTL": lambda library: library.AlignedMTL(),
    "PCGrad": lambda library: library.PCGrad(),
    "ConFIG": lambda library: library.ConFIG(),
    "ExcessMTL": lambda library: library.ExcessMTL(0.1),
}


@pytest.mark.parametrize("name", AGGREGATORS)
def test_every_aggregator_gives_what_torchjd_gives(name):
    found = []
    for library, functions in ((ours, ours), (aggregation, autojac)):
        params = filled()
        torch.manual_seed(0)
        weights = functions.jac_to_grad(params, AGGREGATORS[name](library))
        found.append((weights, torch.cat([p.grad.flatten() for p in params])))
    (weights, update), (expected_weights, expected) = found
    assert torch.allclose(update, expected, rtol=1e-3, atol=1e-4)
    if expected_weights is not None:
        assert torch.allclose(weights, expected_weights, rtol=1e-3)
    assert (weights is None) == (expected_weights is None) or name == "ConFIG"  # whose weights are known here


def test_hooks_on_aggregators_are_run_and_count():
    """On the outer modules they take the matrix, which is made for them; on the Gramian's weighting nothing is."""
    expected = filled()
    ours.jac_to_grad(expected, ours.Sum())
    for part in (lambda a: a, lambda a: a.weighting, lambda a: a.gramian_weighting):
        params, aggregator, seen = filled(), ours.UPGrad(), []
        aggregator.gramian_weighting.register_forward_hook(lambda _, inputs, output: torch.ones_like(output))
        part(aggregator).register_forward_hook(lambda _, inputs, output, seen=seen: seen.append(inputs[0].shape))
        weights = ours.jac_to_grad(params, aggregator)
        assert torch.equal(weights, torch.ones(3))
        size = sum(p.numel() for p in params)
        assert seen == [(3, 3) if part(aggregator) is aggregator.gramian_weighting else (3, size)]
        for p, e in zip(params, expected, strict=True):
            assert torch.allclose(p.grad, e.grad, rtol=1e-5)


def test_a_weighting_of_ones_own_gets_the_gramian_in_the_gradients_dtype():
    class Learned(ours.Weighting):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.eye(3))

        def forward(self, gramian: Tensor) -> Tensor:
            return (self.matrix @ gramian).sum(dim=1)

    params, expected = filled(), filled()
    weights = ours.jac_to_grad(params, ours.GramianWeightedAggregator(Learned()))
    autojac.jac_to_grad(expected, aggregation.GramianWeightedAggregator(Learned()))
    assert weights.requires_grad
    for p, e in zip(params, expected, strict=True):
        assert torch.allclose(p.grad, e.grad, rtol=1e-4, atol=1e-5)
        assert not p.grad.requires_grad


def test_a_forward_of_ones_own_is_used():
    class Halved(ours.UPGrad):
        def forward(self, matrix: Tensor) -> Tensor:
            return super().forward(matrix) / 2

    params, expected = filled(), filled()
    ours.jac_to_grad(params, Halved())
    ours.jac_to_grad(expected, ours.UPGrad())
    for p, e in zip(params, expected, strict=True):
        assert torch.allclose(2 * p.grad, e.grad, rtol=1e-5)


def test_optimised_computation():
    ours.jac_to_grad(filled(), ours.UPGrad(), optimize_gramian_computation=True)
    hooked = ours.UPGrad()
    hooked.register_forward_hook(lambda *_: None)
    for aggregator in (ours.Mean(), ours.GradDrop(), hooked):
        params = filled()
        with pytest.raises(ValueError, match="optimize_gramian_computation must be False for an aggregator"):
            ours.jac_to_grad(params, aggregator, optimize_gramian_computation=True)
        assert all(hasattr(p, "jac") and p.grad is None for p in params)


@pytest.mark.parametrize("chunk_size", [1, None])
@pytest.mark.parametrize("name", ["DBMTL", "GradDrop", "ExcessMTL"])
def test_methods_that_go_by_elements_see_all_tensors(name, chunk_size):
    """As one matrix would be, whatever the rows are, and whether or not there is a gradient already."""
    params, aggregator, other = filled(chunk_size), getattr(ours, name)(), getattr(ours, name)()
    for step in range(3):
        fresh = filled(chunk_size)
        for p, f in zip(params, fresh, strict=True):
            p.jac = (step + 1) * f.jac if chunk_size is None else f.jac
        matrix = torch.cat([p.jac.reshape(TASKS, -1) for p in filled()], dim=1) * (1 if chunk_size else step + 1)
        before = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in params])
        torch.manual_seed(step)
        weights = ours.jac_to_grad(params, aggregator)
        found = torch.cat([p.grad.flatten() for p in params]) - before
        torch.manual_seed(step)
        expected = other(matrix)
        if name == "GradDrop":  # the place of an element in its tensor decides on its random number
            assert weights is None
            signs = torch.stack([matrix.clamp_min(0).sum(0), matrix.clamp_max(0).sum(0)])
            assert float((signs - found).abs().min(0).values.max()) < 1e-4
        else:
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
        if step == 0:
            for p in params:
                p.grad = None


# ---- What cannot be -------------------------------------------------------------------------------------------------


def test_errors_leave_everything_as_it_was():
    model, _, x = twins()

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            raise RuntimeError("on the way back")

    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for place in ("head", "encoder"):
        hidden = torch.tanh(model.encoder[0](x))
        features = model.encoder[2](Fails.apply(hidden) if place == "encoder" else hidden)
        losses = [head(features).sum() for head in model.heads]
        losses[1] = Fails.apply(losses[1]) if place == "head" else losses[1]
        for chunk_size in (1, None):
            with pytest.raises(RuntimeError, match="on the way back"):
                ours.mtl_backward(losses, features, retain_graph=True, parallel_chunk_size=chunk_size)
            for p in model.parameters():
                assert torch.equal(p.grad, torch.ones_like(p))
                assert not hasattr(p, "jac")


def test_aggregators_that_raise_leave_everything_as_it_was():
    params = filled()
    expected = [p.jac.clone() for p in params]
    with pytest.raises(ValueError, match="pref_vector must hold 3 numbers"):
        ours.jac_to_grad(params, ours.UPGrad(torch.ones(2)))
    wrong = ours.UPGrad()
    wrong.gramian_weighting.register_forward_hook(lambda _, inputs, output: output[:2])
    with pytest.raises(ValueError, match=r"a weighting must give 3 weights, one for each row; found \(2,\)"):
        ours.jac_to_grad(params, wrong)
    assert all(p.grad is None for p in params)
    assert all(torch.equal(p.jac, e) for p, e in zip(params, expected, strict=True))


def test_arguments_that_cannot_be():
    model, _, x = twins()
    features, losses = model(x)
    leaf = torch.ones(2, requires_grad=True)
    shared = list(model.encoder.parameters())
    for message, call in {
        "tensors must hold at least one tensor, found none": lambda: ours.backward([]),
        "tensors must hold each tensor once, found one twice": lambda: ours.backward([losses[0], losses[0]]),
        r"tensors\[0\] must be computed from parameters": lambda: ours.backward([leaf]),
        "tensors must have at least one element": lambda: ours.backward([features[:0]]),
        "parallel_chunk_size must be None or at least 1, found 0": lambda: ours.backward(losses, parallel_chunk_size=0),
        "jac_tensors must have 3 entries as tensors has, found 1": lambda: ours.backward(losses, jac_tensors=leaf),
        r"jac_tensors\[0\] must have the shape \(6, 5\)": lambda: ours.backward(features, jac_tensors=[features]),
        "jac_tensors must have the same number of rows": lambda: ours.backward(
            losses, jac_tensors=[torch.ones(2), torch.ones(2), torch.ones(3)]
        ),
        r"\.jac is for tensors that require grad": lambda: ours.backward(losses, inputs=[torch.ones(2)]),
        "features must hold at least one": lambda: ours.mtl_backward(losses, []),
        r"tensors\[0\] must be a scalar where grad_tensors is None": lambda: ours.mtl_backward([features], features),
        r"grad_tensors\[2\] must have the shape \(\)": lambda: ours.mtl_backward(
            losses, features, grad_tensors=[torch.ones(()), torch.ones(()), torch.ones(1)]
        ),
        "tasks_params must have 3 entries as tensors has, found 1": lambda: ours.mtl_backward(
            losses, features, tasks_params=[[]]
        ),
        "tasks_params must have no tensor in common with shared_params": lambda: ours.mtl_backward(
            losses, features, tasks_params=[shared, [], []]
        ),
        r"\.grad is for tensors that require grad": lambda: ours.mtl_backward(
            losses, features, tasks_params=[[torch.ones(1)], [], []]
        ),
        "tensors must have .jac, found one without": lambda: ours.jac_to_grad(shared, ours.UPGrad()),
        "tensors must hold at least one": lambda: ours.jac_to_grad([], ours.UPGrad()),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    shared[0].jac, shared[1].jac = torch.ones(2, *shared[0].shape), torch.ones(3, *shared[1].shape)
    with pytest.raises(ValueError, match=r"tensors\[1\].jac must have shape \(2, 8\)"):
        ours.jac_to_grad(shared[:2], ours.UPGrad())
    with pytest.raises(ValueError, match="each tensor once"):
        ours.jac_to_grad([shared[0], shared[0]], ours.UPGrad())
