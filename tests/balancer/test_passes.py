"""How many backward passes a step takes, and what each runs; Nash-MTL's held steps; memory."""

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import igb_kernels as igb

from .models import TASKS, Net, grads_of, make_net
from .oracle import CASES, STORES, Oracle, balancer_of, check_step


class Counts:
    """Executions of a net's parts from now on."""

    def __init__(self, net: Net) -> None:
        self.head_forward, self.head_backward = [0] * len(net.heads), [0] * len(net.heads)
        self.encoder = 0
        for k, head in enumerate(net.heads):
            head.register_forward_hook(lambda *_, k=k: self._count(self.head_forward, k))
            head.weight.register_hook(lambda _, k=k: self._count(self.head_backward, k))
        net.encoder.register_forward_hook(lambda module, inputs, z: self._watch(z))

    @staticmethod
    def _count(counters: list[int], k: int) -> None:
        counters[k] += 1

    def _watch(self, z: Tensor) -> None:
        z.register_hook(lambda _: self._passed())

    def _passed(self) -> None:
        self.encoder += 1


@pytest.mark.parametrize("form", [list, tuple, torch.stack], ids=["list", "tuple", "stack"])
@pytest.mark.parametrize("name", ["equal", *STORES])
def test_each_pass_runs_its_own_head_only(name, form):
    net = make_net()
    counts = Counts(net)
    balancer = balancer_of(CASES[name], net)
    for step in range(1, 3):
        balancer.backward(form(net.losses(step)))
        assert counts.head_forward == counts.head_backward == [step] * TASKS
        assert counts.encoder == step * (1 if CASES[name].method == "equal" else TASKS)


def test_one_vector_runs_every_head_in_every_pass():
    """What peeling the stack saves: the same losses in a tensor that torch.stack did not make."""
    net = make_net()
    counts = Counts(net)
    igb.Balancer("imtl_g", shared=net.shared).backward(torch.stack(net.losses()) * 1.0)
    assert counts.head_backward == [TASKS] * TASKS


@pytest.mark.parametrize("form", [list, torch.stack], ids=["list", "stack"])
@pytest.mark.parametrize(("convention", "held_passes"), [("scaled", TASKS), ("weighted", 1)])
def test_nash_passes_while_weights_are_held(convention, held_passes, form):
    net = make_net()
    counts = Counts(net)
    balancer = balancer_of(CASES["nash_mtl every 3"], net, convention)
    passes = []
    for step in range(7):
        before = counts.encoder
        balancer.backward(form(net.losses(step)))
        passes.append(counts.encoder - before)
    assert passes == [TASKS if step % 3 == 0 else held_passes for step in range(7)]


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6])
@pytest.mark.parametrize("convention", ["scaled", "weighted"])
def test_nash_holds_its_weights_and_clips_each_update(convention, max_norm):
    net = make_net(dtype=torch.float64)
    arguments = {"heads": "weighted", "task_parameters": net.own} if convention == "weighted" else {}
    balancer = igb.Balancer(igb.NashMTL(max_norm, update_every=3), shared=net.shared, **arguments)
    solved = torch.zeros(TASKS)
    for step in range(6):
        net.zero_grad()
        losses = net.losses(step)
        rows = Oracle(CASES["equal"]).step(losses, net.shared, net.own)
        result = balancer.backward(losses)
        if step % 3 == 0:
            solved, _ = igb.ops.solve("nash_mtl", rows.gram, backend="reference", max_norm=0.0)
        length = float((solved @ rows.rows).norm())
        factor = max_norm / length if 0 < max_norm < length else 1.0
        assert max_norm != 0.5 or factor < 1
        torch.testing.assert_close(result.weights, factor * solved)
        rows.weights = factor * solved
        check_step(rows, grads_of(net.shared), grads_of(net.own), torch.float64, convention, joint=True)
        held = step % 3 != 0
        assert (result.gram is None) == (held and convention == "weighted")
        if held and convention == "weighted":
            assert result.norms is None
            assert result.cosines is None
        for parameter in net.parameters():
            parameter.data -= 0.05 * parameter.grad


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages made inside, and their peak; not those that operations found."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._found: dict[int, StorageWeakRef] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                ref = StorageWeakRef(tensor.untyped_storage())
                if ref.cdata not in self._made:
                    self._found[ref.cdata] = ref
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                ref = StorageWeakRef(tensor.untyped_storage())
                if ref.cdata not in self._found:
                    self._made[ref.cdata] = (ref, tensor.untyped_storage().nbytes())
        self._made = {key: entry for key, entry in self._made.items() if not entry[0].expired()}
        self.peak = max(self.peak, self.now)
        return result

    @property
    def now(self) -> int:
        return sum(size for ref, size in self._made.values() if not ref.expired())


WIDTH = 320


def wide_net(tasks: int, dtype: torch.dtype) -> tuple[Net, int]:
    """A net whose activations are small beside its parameters, and the bytes of one gradient of the shared ones: more
    than `store.rows_in_cache` counts as small."""
    torch.manual_seed(0)
    encoder = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(6)), nn.Linear(WIDTH, 5))
    net = Net(tasks=tasks, encoder=encoder).to(dtype)
    return net, sum(p.numel() * p.element_size() for p in net.shared)


def peak_of_a_step(name: str, dtype: torch.dtype, tasks: int, with_gradients: bool) -> float:
    """Peak of what a step makes beyond the model, in units of one gradient of the shared parameters."""
    net, size = wide_net(tasks, dtype)
    balancer = balancer_of(CASES[name], net)
    for _ in range(3):  # the third step finds all its state: averages take turns in two sets of buffers
        net.zero_grad()
        if with_gradients:
            for p in net.parameters():
                p.grad = torch.zeros_like(p)
        z = net.encoder(torch.randn(2, WIDTH, dtype=dtype))
        losses = [head(z).square().mean() for head in net.heads]
        with LiveBytes() as made:
            balancer.backward(losses)
        del losses, z
    return made.peak / size


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize(
    ("name", "dtype", "low", "high"),
    [
        ("equal", torch.float32, 0.9, 1.3),
        ("db_mtl beta 0", torch.float32, 1.5, 2.3),
        ("db_mtl beta 0", torch.float64, 1.5, 2.3),
        ("db_mtl beta 0", torch.bfloat16, 2.5, 4.3),  # the sum is kept in float32: two gradients' size
        ("db_mtl beta 0, relative eps", torch.float32, 7.9, 8.4),
        ("db_mtl", torch.float32, 0.9, 2.3),  # its averages are there
        ("imtl_g", torch.float32, 7.9, 8.4),
        ("nash_mtl", torch.float32, 7.9, 8.4),
    ],
)
def test_memory_of_a_step_with_eight_tasks(name, dtype, low, high, with_gradients):
    assert low < peak_of_a_step(name, dtype, 8, with_gradients) < high


def test_memory_of_streaming_does_not_grow_with_the_tasks():
    few, many = (peak_of_a_step("db_mtl beta 0", torch.float32, tasks, False) for tasks in (2, 16))
    assert many < few + 0.2


@pytest.mark.parametrize(
    ("name", "kept", "peak"),
    [
        ("imtl_g", 7, 8),  # all rows but the first, which is in .grad
        ("db_mtl", 16, 18),  # two sets of moving averages; then one gradient, or the sum
    ],
)
def test_memory_kept_between_steps_does_not_add_to_the_peak(name, kept, peak):
    net, size = wide_net(8, torch.float32)
    balancer = balancer_of(CASES[name], net)
    with LiveBytes() as made:
        for _ in range(4):
            losses = [head(net.encoder(torch.randn(2, WIDTH))).square().mean() for head in net.heads]
            balancer.backward(losses)
            del losses
            net.zero_grad()
    assert made.now / size == pytest.approx(kept, abs=0.3)
    assert made.peak / size < peak + 0.4
    del balancer
    assert made.now / size < 0.3
