"""Threads, forked processes and compiled models."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import igb_kernels as igb

from .models import Net, grads_of, make_net, same
from .oracle import CASES, STORES, Oracle, balancer_of, check_step


def big_net(seed: int = 0) -> Net:
    """Large enough that the kernels share the work among threads."""
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Linear(6, 500), nn.Tanh(), nn.Linear(500, 600), nn.Tanh(), nn.Linear(600, 5))
    return Net(encoder=encoder)


def gradients(name: str, net: Net, steps: int = 2) -> list[torch.Tensor]:
    balancer = balancer_of(CASES[name], net)
    trace = []
    for step in range(steps):
        net.zero_grad()
        trace.append(balancer.backward(net.losses(step)).weights)
        trace += [p.grad for p in net.parameters()]
    return trace


class BalancedSteps(Dataset):
    """A balanced step for each item, in whichever process asks for it."""

    def __len__(self) -> int:
        return len(STORES)

    def __getitem__(self, index: int) -> torch.Tensor:
        net = make_net()
        gradients(STORES[index], net)
        return grads_of(net.shared)


@pytest.mark.parametrize("warm", [1, 2])
def test_in_a_forked_worker(warm):
    torch.set_num_threads(warm)
    gradients("imtl_g", big_net())  # the parent has used its threads
    here = BalancedSteps()
    want = [here[i] for i in range(len(here))]
    loader = DataLoader(here, batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60)
    assert same(list(loader), want)


@pytest.mark.parametrize("name", STORES)
def test_in_a_second_thread(name):
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(gradients, name, make_net()).result(timeout=60)
    assert same(got, gradients(name, make_net()))


class Given(torch.autograd.Function):
    """A loss with a given value and given gradients: torch's own sums would depend on the number of threads."""

    @staticmethod
    def forward(ctx, value: float, row: list[torch.Tensor], *params: torch.Tensor) -> torch.Tensor:
        ctx.row = row
        return torch.tensor(value)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (None, None, *(grad * g for g in ctx.row))


SHAPES = [(700, 900), (3,), (512, 513), (1,)]


def given_rows() -> list[list[torch.Tensor]]:
    torch.manual_seed(0)
    return [[torch.randn(shape) * 10.0**k for shape in SHAPES] for k in range(3)]


def given_steps(name: str, rows: list[list[torch.Tensor]], steps: int = 2) -> list[torch.Tensor]:
    """What balanced steps on gradients large enough for several threads leave."""
    shared = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    balancer = igb.Balancer(**CASES[name].make(), shared=shared)
    trace = []
    for step in range(steps):
        result = balancer.backward([Given.apply(k + step + 1.0, row, *shared) for k, row in enumerate(rows)])
        trace += [result.weights, *(p.grad.clone() for p in shared)]
    return trace


@pytest.mark.parametrize("name", STORES)
def test_bits_do_not_depend_on_the_number_of_threads(name):
    rows, results = given_rows(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(given_steps(name, rows))
    assert same(results[0], results[1])
    assert same(results[0], results[2])


@pytest.mark.parametrize("threads", [1, 2])
def test_balancers_in_two_threads_do_not_disturb_each_other(threads):
    torch.set_num_threads(threads)
    rows = given_rows()
    want = {name: given_steps(name, rows) for name in STORES}
    start = threading.Barrier(2)

    def work(names: list[str]) -> dict[str, list[torch.Tensor]]:
        start.wait(60)
        return {name: given_steps(name, rows) for name in names}

    with ThreadPoolExecutor(2) as pool:
        for got in pool.map(work, (STORES, STORES[::-1]), timeout=120):
            for name in STORES:
                assert same(got[name], want[name]), name


COUNT_THREADS = """
import os, torch
import igb_kernels as igb
torch.set_num_threads({threads})
p = [torch.nn.Parameter(torch.randn(1500, 1000)) for _ in range(2)]
def step(balancer):
    balancer.backward([(q * (k + 1)).square().sum() for k in range(3) for q in (p[0] + p[1],)])
    return len(os.listdir("/proc/self/task"))
sum((q * 2).square().sum() for q in p).backward()
before = step(igb.Balancer("equal", shared=p))
print(before, max(step(igb.Balancer(name, shared=p)) for name in ("imtl_g", "db_mtl", "nash_mtl", "emtl")))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
@pytest.mark.parametrize("threads", [1, 2])
def test_no_further_threads(threads):
    """One pool, of torch.get_num_threads() threads: a balanced step starts none that an ordinary one does not."""
    script = COUNT_THREADS.format(threads=threads)
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True, env=environment
    )
    before, after = map(int, result.stdout.split())
    assert after <= before


@pytest.mark.parametrize("name", ["equal", "db_mtl", "db_mtl beta 0", "imtl_g"])
def test_a_compiled_encoder(name):
    net, case = make_net(dtype=torch.float64), CASES[name]
    want = Oracle(case).step(net.losses(), net.shared, net.own)
    torch._dynamo.reset()
    plain = net.encoder
    net.encoder = torch.compile(plain, backend="aot_eager")
    losses = net.losses()
    balancer_of(case, net).backward(losses)
    joint = case.method == "equal"
    check_step(want, grads_of(list(plain.parameters())), grads_of(net.own), torch.float64, joint=joint)
