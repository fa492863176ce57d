"""capture="hooks": gradients taken while a backward pass runs give the bits of those taken after it."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import igb_kernels as igb
from igb_kernels import balancer, losses, passes, store
from igb_kernels.gradients import METHODS

from . import test_parameters
from .models import TASKS, Net, Snapshot, make_net, same
from .oracle import CASES, STORES
from .test_accumulation import Branching, Transposed
from .test_errors import failing_in

STEPS = 5
WATCHED = 1
"""So many steps pass before gradients are taken early."""

FURTHER: dict[str, Callable[[], dict[str, object]]] = {
    "aligned_mtl": lambda: {"gradients": "aligned_mtl"},
    "cagrad": lambda: {"gradients": "cagrad"},
    "config": lambda: {"gradients": "config"},
    "dual_proj": lambda: {"gradients": "dual_proj"},
    "excess_mtl": lambda: {"gradients": igb.ExcessMTL(eta=1.0)},
    "fairgrad": lambda: {"gradients": "fairgrad"},
    "grad_drop": lambda: {"gradients": igb.GradDrop(seed=0)},
    "grad_norm": lambda: {"gradients": igb.GradNorm(TASKS)},
    "metabalance": lambda: {"gradients": "metabalance"},
    "mgda": lambda: {"gradients": "mgda"},
    "moco": lambda: {"gradients": "moco"},
    "moco, raw rows": lambda: {"gradients": igb.MoCo(normalize=False)},
    "modo": lambda: {"gradients": "modo"},
    "sdm_grad": lambda: {"gradients": "sdm_grad"},
    "upgrad": lambda: {"gradients": "upgrad"},
    "famo+imtl_g": lambda: {"gradients": "imtl_g", "losses": losses.FAMO()},
}
EVERY = {name: case.make for name, case in CASES.items()} | FURTHER
KEPT_IN_EVERY_WAY = [
    name for name in [*STORES, "excess_mtl", "moco"] if CASES.get(name, CASES["emtl"]).method != "equal"
]


@pytest.fixture(autouse=True, params=[1, 100], ids="buckets_of_{}".format)
def small_buckets(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one parameter each, or of a few bytes; the models count as large."""
    monkeypatch.setitem(store.BUCKET_BYTES, "cpu", request.param)
    for module in (store, passes):
        monkeypatch.setattr(module, "rows_in_cache", lambda params: 1)


only_small_buckets = pytest.mark.parametrize("small_buckets", [1], indirect=True)


class Situation:
    """Shared parameters, and the losses of each step."""

    def __init__(self, shared: Sequence[Tensor], losses: Callable[[int], Sequence[Tensor] | Tensor]) -> None:
        self.shared, self.losses = list(shared), losses
        self.own: list[Tensor] = []

    @classmethod
    def of(cls, net: Net) -> Situation:
        made = cls(net.shared, net.losses)
        made.own = net.own
        return made


def play(
    situation: Situation, make: Callable[[], dict[str, object]], captures: Sequence[str], **arguments: object
) -> list[object]:
    """What the steps give, each with its capture: results, gradients, and the state at the end."""
    balanced = {c: igb.Balancer(**make(), shared=situation.shared, capture=c, **arguments) for c in set(captures)}
    found: list[object] = []
    last = captures[0]
    everything = [*situation.shared, *situation.own]
    values = [p.detach().clone() for p in everything]
    for step, capture in enumerate(captures):
        if capture != last:
            balanced[capture].load_state_dict(balanced[last].state_dict())
        last = capture
        for p in everything:
            p.grad = None
        result = balanced[capture].backward(situation.losses(step))
        found.append([result.weights, result.scales, result.status, result.measured, [p.grad for p in everything]])
        with torch.no_grad():
            for p in everything:
                if p.grad is not None:
                    p -= 0.02 * p.grad.nan_to_num(0)
        assert not hooks_on(situation.shared)
    with torch.no_grad():
        for p, value in zip(everything, values, strict=True):
            p.copy_(value)
    return [*found, copy.deepcopy(balanced[last].state_dict())]


def hooks_on(params: Sequence[Tensor]) -> int:
    return sum(len(p._post_accumulate_grad_hooks or ()) for p in params)


class Early:
    """Counts the buckets that reach the store before their pass is over."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self._depth = 0, 0
        take, run = store.KeptGradients.take, torch.autograd.backward

        def counting_take(rows, bucket, grads):
            self.count += self._depth > 0
            return take(rows, bucket, grads)

        def marking_run(*args, **kwargs):
            self._depth += 1
            try:
                return run(*args, **kwargs)
            finally:
                self._depth -= 1

        monkeypatch.setattr(store.KeptGradients, "take", counting_take)
        monkeypatch.setattr(torch.autograd, "backward", marking_run)

    def take(self) -> int:
        count, self.count = self.count, 0
        return count


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> Early:
    return Early(monkeypatch)


# ---- The same bits -----------------------------------------------------------------------------------------------


def test_every_method_is_played():
    played = {getattr(make()["gradients"], "name", make()["gradients"]) for make in EVERY.values()}
    assert set(METHODS) <= {name.split("+")[-1] for name in played}


@pytest.mark.parametrize("convention", ["scaled", "weighted"])
@pytest.mark.parametrize("name", EVERY)
def test_every_method_with_a_non_finite_step(name, convention):
    net = make_net()
    situation = Situation.of(net)
    situation.losses = lambda step: [
        loss * (torch.nan if step == 2 and k == 1 else 1) for k, loss in enumerate(net.losses(step))
    ]
    own = {"heads": "weighted", "task_parameters": net.own} if convention == "weighted" else {}
    plain, hooked = (play(situation, EVERY[name], [capture] * STEPS, **own) for capture in ("passes", "hooks"))
    assert same(hooked, plain)


@only_small_buckets
@pytest.mark.parametrize("name", KEPT_IN_EVERY_WAY)
def test_a_scaler_and_micro_batches(name):
    """A factor on the rows that changes, and steps whose gradients do not come from passes of their own."""
    net = make_net()
    found = []
    for capture in ("passes", "hooks"):
        balanced = igb.Balancer(**EVERY[name](), shared=net.shared, capture=capture)
        for step in range(STEPS):
            net.zero_grad()
            scaler = torch.amp.GradScaler("cpu", init_scale=3.0 * 2**step)
            if step == 2:
                balanced.accumulate(net.losses(10), scaler=scaler)
            result = balanced.backward(net.losses(step), scaler=scaler)
            found.append([capture, [p.grad for p in net.parameters()], result.weights, result.measured])
        found.append([capture, copy.deepcopy(balanced.state_dict())])
    for ours, theirs in zip(found[: STEPS + 1], found[STEPS + 1 :], strict=True):
        assert same(ours[1:], theirs[1:])


@pytest.mark.parametrize("name", ["imtl_g", "emtl", "excess_mtl", "grad_drop"])
def test_rounded_rows(name):
    situation = Situation.of(make_net())
    plain, hooked = (play(situation, EVERY[name], [c] * STEPS, bank_dtype=torch.bfloat16) for c in ("passes", "hooks"))
    assert same(hooked, plain)


@only_small_buckets
@pytest.mark.parametrize("name", KEPT_IN_EVERY_WAY)
def test_a_copy_goes_on_as_the_original(name):
    net = make_net()
    balanced = igb.Balancer(**EVERY[name](), shared=net.shared, capture="hooks")
    for step in range(2):
        balanced.backward(net.losses(step))
    twin, copied = copy.deepcopy((net, balanced))
    for step in range(2, 5):
        for model, b in ((net, balanced), (twin, copied)):
            model.zero_grad()
            b.backward(model.losses(step))
        assert same([p.grad for p in twin.parameters()], [p.grad for p in net.parameters()])
    assert same(copied.state_dict(), balanced.state_dict())


@only_small_buckets
@pytest.mark.parametrize("name", ["sdm_grad", "modo"])
def test_independent_batches(name):
    net = make_net()
    found = []
    for capture in ("passes", "hooks"):
        balanced = igb.Balancer(name, shared=net.shared, capture=capture)
        for step in range(3):
            net.zero_grad()
            balanced.backward(net.losses(step), independent=[net.losses(10 + step)])
        found.append([[p.grad for p in net.parameters()], balanced.state_dict()])
    assert same(*found)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("kind", ["conv", "gru", "embedding"])
@pytest.mark.parametrize("name", KEPT_IN_EVERY_WAY)
def test_every_way_to_keep_gradients_on_every_model(name, kind, backend):
    situation = Situation.of(make_net(kind, torch.bfloat16 if kind == "conv" else torch.float32))
    plain, hooked = (play(situation, EVERY[name], [c] * 3, backend=backend) for c in ("passes", "hooks"))
    assert same(hooked, plain)


@only_small_buckets
@pytest.mark.parametrize("name", EVERY)
def test_changing_the_capture_on_the_way(name):
    situation = Situation.of(make_net())
    changing = ["passes", "hooks", "hooks", "passes", "hooks", "hooks"]
    assert same(play(situation, EVERY[name], changing), play(situation, EVERY[name], ["passes"] * len(changing)))


@only_small_buckets
@pytest.mark.parametrize("name", KEPT_IN_EVERY_WAY)
def test_captured_steps(name, monkeypatch):
    """As the first steps of a CUDA graph would be."""
    situation = Situation.of(make_net())
    if CASES.get(name, CASES["imtl_g"]).update_every > 1:
        pytest.skip("counts steps on the host")
    plain = play(situation, EVERY[name], ["passes"] * STEPS)
    steps = iter(range(STEPS))
    ordinary = igb.Balancer.backward

    def capturing(self, losses):
        captures = 2 <= next(steps) < 4
        for module in (balancer, store):
            monkeypatch.setattr(module, "captures_graph", lambda device: captures)
        return ordinary(self, losses)

    monkeypatch.setattr(igb.Balancer, "backward", capturing)
    assert same(play(situation, EVERY[name], ["hooks"] * STEPS), plain)


# ---- Situations --------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.a, self.b, self.reentrant = nn.Linear(5, 5), nn.Linear(5, 5), reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.inner(x)
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)

    def inner(self, x: Tensor) -> Tensor:
        return torch.tanh(self.b(torch.tanh(self.a(x))))


def blocks(reentrant: bool | None, tied: bool) -> Situation:
    """Two blocks, or the same one twice."""
    torch.manual_seed(0)
    first = nn.Linear(4, 5)
    block = Block(reentrant)
    other = block if tied else Block(reentrant)
    heads = nn.ModuleList(nn.Linear(5, 2) for _ in range(TASKS))
    shared = nn.ModuleList([first, block, other])

    def losses(step: int) -> list[Tensor]:
        torch.manual_seed(step)
        z = other(block(first(torch.randn(6, 4))))
        return [(head(z) - k).square().mean() for k, head in enumerate(heads)]

    made = Situation(list(shared.parameters()), losses)
    made.own = list(heads.parameters())
    return made


def unreached() -> Situation:
    made, unused = Situation.of(make_net()), nn.Parameter(torch.randn(3, 2))
    made.shared.insert(1, unused)
    return made


def branching() -> Situation:
    net = Branching()
    return Situation(list(net.parameters()), net.losses)


def custom_function() -> Situation:
    """Gradients that come in other layouts, or spread out."""
    torch.manual_seed(0)
    shared = [nn.Parameter(torch.randn(5, 7)), nn.Parameter(torch.randn(4, 5).t())]

    def losses(step: int) -> list[Tensor]:
        Transposed.calls = 0
        torch.manual_seed(step)
        x = torch.randn(3, 5)
        return [sum(((x + k) @ Transposed.apply(w)).square().mean() for w in shared) for k in range(TASKS)]

    return Situation(shared, losses)


def of_form(form: Callable[[list[Tensor]], object]) -> Situation:
    net = make_net()
    made = Situation.of(net)
    made.losses = lambda step: form(net.losses(step))
    return made


def shuffled() -> Situation:
    made = Situation.of(make_net("conv"))
    made.shared = made.shared[1::2] + made.shared[::2]
    return made


def frozen_on_the_way() -> Situation:
    net = make_net()
    made = Situation.of(net)

    def losses(step: int) -> list[Tensor]:
        net.shared[1].requires_grad_(step != 2)
        return net.losses(step)

    made.losses = losses
    return made


def last_layer_skipped_on_the_way() -> Situation:
    """The last gradient of a bucket comes from another parameter, or not at all."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(4))

    def losses(step: int) -> list[Tensor]:
        torch.manual_seed(step)
        x = torch.randn(6, 5)
        for i in [[0, 1, 2, 3], [0, 1, 2, 3], [3, 1, 2, 0], [1, 3], [0, 1, 2, 3]][step]:
            x = torch.tanh(layers[i](x))
        return [(x - k).square().mean() for k in range(TASKS)]

    return Situation(list(layers.parameters()), losses)


def sparse_on_the_way() -> Situation:
    torch.manual_seed(0)
    table, layer = nn.Embedding(7, 5, sparse=True), nn.Linear(5, 5)

    def losses(step: int) -> list[Tensor]:
        x = table(torch.arange(3)) if step in (1, 3) else table.weight[:3]
        return [(layer(x) - k).square().mean() for k in range(TASKS)]

    return Situation([*layer.parameters(), table.weight], losses)


def views_of_one_gradient() -> Situation:
    """Autograd hands out one gradient's memory twice."""
    torch.manual_seed(0)
    shared = [nn.Parameter(torch.randn(4, 5)) for _ in range(3)]

    def losses(step: int) -> list[Tensor]:
        z = torch.tanh(shared[0].flatten() + shared[1].flatten()) + step + shared[2].flatten()
        return [(z - k).square().mean() for k in range(TASKS)]

    return Situation(shared, losses)


SITUATIONS: dict[str, Callable[[], Situation]] = {
    "tied weights": lambda: blocks(None, tied=True),
    "an unreached parameter": unreached,
    "branches in changing order": branching,
    "checkpoint": lambda: blocks(False, tied=False),
    "reentrant checkpoint": lambda: blocks(True, tied=False),
    "checkpoint of tied blocks": lambda: blocks(False, tied=True),
    "reentrant checkpoint of tied blocks": lambda: blocks(True, tied=True),
    "custom function": custom_function,
    "stack": lambda: of_form(torch.stack),
    "sparse on the way": sparse_on_the_way,
    "views of one gradient": views_of_one_gradient,
    "one vector": lambda: of_form(lambda losses: torch.stack(losses) * 1.0),
    "dict": lambda: of_form(lambda losses: dict(zip("abc", losses, strict=True))),
    "shuffled parameters": shuffled,
    "frozen on the way": frozen_on_the_way,
    "another order on the way": last_layer_skipped_on_the_way,
}


@pytest.mark.parametrize("name", KEPT_IN_EVERY_WAY)
@pytest.mark.parametrize("kind", SITUATIONS)
def test_situations(kind, name):
    situation = SITUATIONS[kind]()
    assert same(*(play(situation, EVERY[name], [capture] * STEPS) for capture in ("hooks", "passes")))


@only_small_buckets
@pytest.mark.parametrize("name", ["db_mtl", "db_mtl beta 0", "imtl_g"])
@pytest.mark.parametrize("kind", test_parameters.SITUATIONS)
def test_situations_of_parameters(kind, name):
    found = []
    for capture in ("hooks", "passes"):
        torch.manual_seed(0)
        given = test_parameters.SITUATIONS[kind]()

        def losses(step: int, given: test_parameters.Situation = given) -> Sequence[Tensor]:
            given.before(step)
            return given.losses(step)

        found.append(play(Situation(given.shared, losses), EVERY[name], [capture] * 4))
    assert same(*found)


@only_small_buckets
@pytest.mark.parametrize("kind", SITUATIONS)
def test_gradients_are_taken_early(kind, early):
    situation = SITUATIONS[kind]()
    balanced = igb.Balancer("imtl_g", shared=situation.shared, capture="hooks")
    taken = []
    for step in range(STEPS):
        balanced.backward(situation.losses(step))
        taken.append(early.take())
    assert taken[:WATCHED] == [0] * WATCHED
    if kind == "reentrant checkpoint of tied blocks":
        assert not any(taken)
    elif kind == "branches in changing order":
        assert any(taken)  # the pass after a surprise is watched
    else:
        assert taken[1] >= TASKS * (len(store.buckets_of(situation.shared)) - 1)
        assert taken[-1] >= (0 if kind == "another order on the way" else taken[1])


@only_small_buckets
def test_after_a_surprise_the_next_pass_is_watched(early):
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(5, 5, bias=False) for _ in range(3))
    balanced = igb.Balancer("imtl_g", shared=layers, capture="hooks")
    taken = []
    for step in range(8):
        x = torch.randn(6, 5)
        for layer in layers[2 - min(step // 2, 2) :]:
            x = torch.tanh(layer(x))
        balanced.backward([(x - k).square().mean() for k in range(TASKS)])
        taken.append(early.take())
    # Another layer comes with the third step, and one more with the fifth.
    assert taken == [TASKS * buckets for buckets in (0, 1, 1, 0, 2, 0, 3, 3)]


# ---- Fallbacks ---------------------------------------------------------------------------------------------------


@only_small_buckets
def test_the_fallback_is_said_once(warnings_said, early):
    situation = blocks(True, tied=True)
    for _ in range(2):
        balanced = igb.Balancer("imtl_g", shared=situation.shared, capture="hooks")
        for step in range(3):
            balanced.backward(situation.losses(step))
    assert not early.take()
    assert sum('capture="hooks" falls back to "passes"' in message for message in warnings_said) == len(warnings_said)
    assert any("reentrant checkpoints of tied blocks" in message for message in warnings_said)
    assert len(warnings_said) == len(set(warnings_said))


@pytest.mark.parametrize("late", [0, TASKS - 1])
@pytest.mark.parametrize("name", KEPT_IN_EVERY_WAY)
def test_a_second_piece_after_its_bucket_was_taken(name, late, warnings_said):
    """A model where one task goes twice through the same block from the third step on."""
    torch.manual_seed(0)
    first, block, other = nn.Linear(4, 5), Block(True), Block(True)

    def losses(step: int) -> list[Tensor]:
        torch.manual_seed(step)
        z = block(first(torch.randn(6, 4)))
        ends = [(block if step >= 2 and k == late else other)(z) for k in range(TASKS)]
        return [(end - k).square().mean() for k, end in enumerate(ends)]

    situation = Situation(list(nn.ModuleList([first, block, other]).parameters()), losses)
    found = [play(situation, EVERY[name], [capture] * STEPS) for capture in ("hooks", "passes")]
    assert same(*found)
    assert any("changes after it has come" in message for message in warnings_said)


@only_small_buckets
def test_hooks_that_write_to_other_gradients(warnings_said):
    net = make_net()

    def double_the_last(_: Tensor) -> None:
        net.shared[-1].grad.mul_(2.0)

    handle = net.shared[0].register_post_accumulate_grad_hook(double_the_last)
    situation = Situation.of(net)
    balanced = [igb.Balancer("imtl_g", shared=net.shared, capture=capture) for capture in ("passes", "hooks")]
    grads = []
    for b in balanced:
        for step in range(3):
            net.zero_grad()
            b.backward(situation.losses(step))
        grads.append([p.grad for p in net.parameters()])
    handle.remove()
    assert same(*grads)
    assert any("hooks that write to other parameters' gradients" in message for message in warnings_said)


# ---- The user's hooks, and ours ----------------------------------------------------------------------------------


@only_small_buckets
def test_hooks_of_the_user_see_what_they_saw():
    """In their order, with the gradient in place, and what they write counts."""
    net = make_net()
    seen: dict[str, list[object]] = {}
    grads = []
    for capture in ("passes", "hooks"):
        balanced = igb.Balancer("imtl_g", shared=net.shared, capture=capture)
        log = seen.setdefault(capture, [])

        def after(i: int, order: int, log: list[object] = log) -> Callable[[Tensor], None]:
            def hook(param: Tensor) -> None:
                log.append((i, order, param.grad.clone()))
                param.grad.clamp_(-0.01, 0.01)

            return hook

        handles = [p.register_hook(lambda g: g * 1.5) for p in net.shared]
        for step in range(4):
            net.zero_grad()
            handles += [p.register_post_accumulate_grad_hook(after(i, step)) for i, p in enumerate(net.shared)]
            balanced.backward(net.losses(step))
            assert hooks_on(net.shared) == (step + 1) * len(net.shared)
        for handle in handles:
            handle.remove()
        grads.append([p.grad for p in net.parameters()])
    assert same(*grads)
    assert same(seen["hooks"], seen["passes"])


@only_small_buckets
def test_nothing_is_left_of_a_balancer():
    net = make_net()
    balanced = igb.Balancer("db_mtl", shared=net.shared, capture="hooks")
    for step in range(3):
        balanced.backward(net.losses(step))
    alive = [weakref.ref(balanced), weakref.ref(balanced._passes.capture)]
    params = [weakref.ref(p) for p in net.shared]
    assert not hooks_on(net.shared)
    del balanced
    assert all(ref() is None for ref in alive), "without the garbage collector"
    net.zero_grad()
    del net
    gc.collect()
    assert all(ref() is None for ref in params)


@only_small_buckets
def test_backward_passes_beside_the_balancer():
    net = make_net()
    balanced = igb.Balancer("imtl_g", shared=net.shared, capture="hooks")
    for step in range(3):
        balanced.backward(net.losses(step))
    net.zero_grad()
    sum(net.losses(7)).backward()
    want = [p.grad for p in net.parameters()]
    net.zero_grad()
    other = make_net()
    sum(other.losses(7)).backward()
    assert same(want, [p.grad for p in other.parameters()])


@only_small_buckets
def test_retained_graphs():
    net = make_net()
    found = []
    for capture in ("passes", "hooks"):
        balanced = igb.Balancer("db_mtl", shared=net.shared, capture=capture)
        losses = net.losses()
        for _ in range(3):
            net.zero_grad()
            balanced.backward(losses, retain_graph=True)
        found.append([[p.grad for p in net.parameters()], balanced.state_dict()])
    assert same(*found)


# ---- Errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", range(TASKS))
@pytest.mark.parametrize("name", KEPT_IN_EVERY_WAY)
def test_a_pass_that_fails(name, task):
    """In a step that is watched and in one with hooks; the next step is as if nothing had been."""
    net = make_net()
    hooked, plain = (igb.Balancer(**EVERY[name](), shared=net.shared, capture=c) for c in ("hooks", "passes"))
    for step in range(3):
        before = Snapshot(net.parameters(), hooked)
        with pytest.raises(RuntimeError, match="this backward fails"):
            hooked.backward(failing_in(task)(net))
        before.check()
        assert not hooks_on(net.shared)
        grads = []
        for balanced in (hooked, plain):
            net.zero_grad()
            balanced.backward(net.losses(step))
            grads.append([p.grad for p in net.parameters()])
        assert same(*grads)


@only_small_buckets
@pytest.mark.parametrize("name", KEPT_IN_EVERY_WAY)
def test_sparse_gradients(name, warnings_said):
    """Made dense in the pass, with the same bits as after it; also where they become sparse on the way."""
    found = []
    for capture in ("hooks", "passes"):
        torch.manual_seed(0)
        table, layer = nn.Embedding(7, 5, sparse=True), nn.Linear(5, 5)
        shared = [table.weight, *layer.parameters()]
        balanced = igb.Balancer(**EVERY[name](), shared=shared, capture=capture)
        for step in range(4):
            for p in shared:
                p.grad = None
            x = table.weight[:3] if step == 1 else table(torch.arange(3))
            balanced.backward([(layer(x) - k).square().mean() for k in range(TASKS)])
            found.append([p.grad for p in shared])
        assert not hooks_on(shared)
    assert same(found[:4], found[4:])
    assert len(warnings_said) == 1
    assert warnings_said[0].startswith("shared[0], of shape (7, 5), has sparse gradients")


@only_small_buckets
def test_an_error_in_a_hook():
    net = make_net()
    balanced = igb.Balancer("db_mtl", shared=net.shared, capture="hooks")
    for step in range(2):
        balanced.backward(net.losses(step))
    net.double()
    net.zero_grad()
    before = Snapshot(net.parameters(), balanced)
    with pytest.raises(ValueError, match=r"has gradients in torch\.float64, its moving averages are in torch\.float32"):
        balanced.backward(net.losses(2))
    before.check()
    assert not hooks_on(net.shared)


def test_bad_capture():
    with pytest.raises(ValueError, match=r"capture must be one of \('passes', 'hooks'\), found 'pass'"):
        igb.Balancer("equal", shared=make_net().shared, capture="pass")
