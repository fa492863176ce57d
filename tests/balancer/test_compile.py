"""Compiled models, compiled training steps, and operations inside compiled functions. One graph of each serves all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch._dynamo
import torch._functorch.config
from torch import Tensor

import igb_kernels as igb
from igb_kernels import ops, store

from .models import Net, Snapshot, make_net
from .truth import METHODS, Situation, play


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """As in a new process."""
    with torch._functorch.config.patch(donated_buffer=True):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def compiled() -> Iterator[dict[str, Situation]]:
    """A net with its encoder compiled, its heads, or all of it with the losses."""
    with torch._functorch.config.patch(donated_buffer=True):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        net = make_net(dtype=torch.float64)
        igb.Balancer("nash_mtl", shared=net.shared)
        encoder, head = (torch.compile(part, backend="aot_eager") for part in (net.encoder, net.heads[0]))
        whole = torch.compile(lambda x, y: losses_of(net, x, y), backend="aot_eager")
        forms = {
            "encoder": lambda step: losses_of(net, *net.batch(step), encoder=encoder),
            "head": lambda step: losses_of(net, *net.batch(step), head=head),
            "whole": lambda step: whole(*net.batch(step)),
            "stacked": lambda step: torch.stack(whole(*net.batch(step))),
        }

        def eager(step: int) -> list[Tensor]:
            return losses_of(net, *net.batch(step))

        yield {part: Situation(net.shared, losses, net.own, eager) for part, losses in forms.items()}
    torch.compiler.reset()


def losses_of(net: Net, x: Tensor, y: Tensor, encoder=None, head=None) -> list[Tensor]:
    z = (net.encoder if encoder is None else encoder)(x)
    heads = [net.heads[0] if head is None else head, *net.heads[1:]]
    return [(k + 1) * (h(z) - target).square().mean() for k, (h, target) in enumerate(zip(heads, y, strict=True))]


@pytest.mark.parametrize("part", ["encoder", "head", "whole", "stacked"])
@pytest.mark.parametrize("method", METHODS)
def test_steps_of_compiled_models(compiled, method, part):
    situation = compiled[part]
    net = make_net(dtype=torch.float64)
    for p, start in zip([*situation.shared, *situation.own], [*net.shared, *net.own], strict=True):
        p.data.copy_(start)
    play(situation, method, existing=True)


def balanced_step(net: Net, compiled_encoder, balancer: igb.Balancer) -> list[Tensor]:
    net.zero_grad()
    balancer.backward(losses_of(net, *net.batch(), encoder=compiled_encoder))
    return [p.grad.clone() for p in net.parameters()]


@pytest.mark.usefixtures("nothing_compiled")
def test_a_new_balancer_has_backward_passes_compiled_for_several_passes():
    """Even if the first is a plain one; PyTorch would refuse the second."""
    net = make_net(dtype=torch.float64)
    want = balanced_step(net, None, igb.Balancer("nash_mtl", shared=net.shared))
    with torch._functorch.config.patch(donated_buffer=True):
        balancer = igb.Balancer("nash_mtl", shared=net.shared)
        encoder = torch.compile(net.encoder, backend="aot_eager")
        sum(losses_of(net, *net.batch(), encoder=encoder)).backward()
        assert not torch._functorch.config.donated_buffer
        torch.testing.assert_close(balanced_step(net, encoder, balancer), want)


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("stacked", [False, True])
def test_backward_passes_compiled_for_one_pass(stacked):
    """They are refused with what to do, and that helps; the setting stays, without which they would not be refused."""
    net = make_net(dtype=torch.float64)
    encoder = torch.compile(net.encoder, backend="aot_eager")
    sum(losses_of(net, *net.batch(), encoder=encoder)).backward()
    balancer = igb.Balancer("db_mtl", shared=net.shared)
    assert torch._functorch.config.donated_buffer
    before = Snapshot(net.parameters(), balancer)
    losses = losses_of(net, *net.batch(), encoder=encoder)
    with pytest.raises(RuntimeError, match=r"one pass per graph.*donated_buffer = False.*torch.compiler.reset\(\)"):
        balancer.backward(torch.stack(losses) if stacked else losses)
    before.check()
    torch._functorch.config.donated_buffer = False
    torch.compiler.reset()
    found = balanced_step(net, encoder, balancer)
    torch.testing.assert_close(found, balanced_step(net, None, igb.Balancer("db_mtl", shared=net.shared)))


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("capture", ["passes", "hooks"])
def test_steps_of_what_inductor_makes(capture, tmp_path, monkeypatch):
    """Its backward passes give out buffers that they allocate themselves; a whole model with its losses."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # no graph of another test's
    monkeypatch.setattr(store, "BUCKET_BYTES", {"cpu": 300, "cuda": 300})  # several, for hooks
    net, plain = make_net(dtype=torch.float64), make_net(dtype=torch.float64)
    balancers = [igb.Balancer("igb_v1+nash_mtl", shared=n.shared, capture=capture) for n in (net, plain)]
    losses = torch.compile(lambda x, y: losses_of(net, x, y))
    for step in range(2):
        for n, of_net, balancer in zip(
            (net, plain), (losses, lambda x, y: losses_of(plain, x, y)), balancers, strict=True
        ):
            balancer.backward(of_net(*n.batch(step)))
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


@dataclass
class Training:
    net: Net
    balancer: igb.Balancer | None = None

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        self.net.zero_grad()
        result = self.balancer.backward(losses_of(self.net, x, y))
        self.balancer.after_step([loss.detach() for loss in losses_of(self.net, x, y)])
        return 2 * result.weights


def test_compiled_training_steps(nothing_compiled):
    """The graph breaks at `backward` and at `after_step`, and nothing in them is compiled."""
    eager, compiled = (Training(make_net(dtype=torch.float64)) for _ in range(2))
    step = torch.compile(compiled.step, backend="aot_eager")
    for make in METHODS.values():
        for training in (eager, compiled):
            training.balancer = igb.Balancer(**make(), shared=training.net.shared)
        for i in range(2):
            batch = eager.net.batch(i)
            torch.testing.assert_close(step(*batch), eager.step(*batch))
            found, want = ([p.grad for p in training.net.parameters()] for training in (compiled, eager))
            torch.testing.assert_close(found, want)
    reasons = torch._dynamo.utils.counters["graph_break"]
    assert reasons
    assert all("it runs backward passes" in reason or "function `disable`" in reason for reason in reasons)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 3  # the losses, the losses again, and `2 *`


def rows(*sizes: int, seed: int = 0) -> list[list[Tensor]]:
    torch.manual_seed(seed)
    return [[torch.randn(n) for n in sizes] for _ in range(3)]


def functional_step(grads: list[list[Tensor]], out: list[Tensor], state: list[list[Tensor]], losses: Tensor) -> object:
    """Every operation, in one graph."""
    scales, _ = ops.loss_scales("log", losses)
    gram = ops.gram([[grads[0][0], None], grads[1], grads[2]])
    weights, status = ops.solve("nash_mtl", gram, max_norm=0.0)
    ops.combine_(out, grads, weights * scales)
    norms = ops.ema_(state, state, grads, 0.9)
    squares = [[t.clone() for t in row] for row in state]
    excess = ops.accumulate_squares_(squares, [[t.square() for t in row] for row in state], grads, 1e-7)
    dropped = [torch.empty_like(o) for o in out]
    norm = ops.sign_drop_(dropped, grads, torch.tensor([3.0, 1.0], dtype=torch.float64))
    return weights, status, ops.sq_norms(grads), norms, excess, norm, squares, dropped, [o + 1 for o in out]


def test_operations_inside_a_compiled_function(nothing_compiled):
    """Without a break in the graph; for gradients of any size with one that is compiled once."""
    run = torch.compile(functional_step, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (7, 5, 11):
        grads, losses = rows(size, 2 * size), torch.rand(3)
        outputs = []
        for function in (functional_step, run):
            out, state = [torch.ones(size), torch.ones(2 * size)], rows(size, 2 * size, seed=1)
            outputs.append([function(grads, out, state, losses), out, state])
        torch.testing.assert_close(*outputs, rtol=0, atol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


SOLVED = [name for name, solver in ops.SOLVERS.items() if solver.per_task is None and not solver.needs_losses]


def test_every_solver_inside_a_compiled_function(nothing_compiled):
    def solve_all(gram: Tensor) -> list[Tensor]:
        return [ops.solve(name, gram)[0] for name in SOLVED]

    gram = ops.gram(rows(9))
    found = torch.compile(solve_all, fullgraph=True, backend="aot_eager")(gram)
    torch.testing.assert_close(found, solve_all(gram), rtol=0, atol=0, equal_nan=True)
