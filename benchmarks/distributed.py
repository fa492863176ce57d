"""Steps of several processes on this machine, by gloo: the bytes that each of them sends, counted, and their time.

    python -m benchmarks.distributed [--ranks 2 3 4] [--tasks 3 8] [--rounds 30] [--json PATH]

Bytes are those that the kernel has sent on the process's TCP sockets, whatever the code believes. Times are of whole
steps, forward pass included, of the slowest rank; contenders take turns in one run. Every rank has one thread and its
own batch. Rivals are checked to come to the same gradients.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import shlex
import socket
import stat
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import igb_kernels as igb
from igb_kernels.bench.machine import commit, machine
from igb_kernels.bench.models import MODELS, SMALL, MultiTask
from igb_kernels.bench.results import Timing
from igb_kernels.distributed.flat import BUCKET_BYTES, PART_BYTES
from igb_kernels.distributed.shards import all_gather

Step = Callable[[], None]
"""From a batch to `.grad`."""

Build = Callable[[int], MultiTask]
"""From the number of tasks."""


def built(model: str, tasks: int) -> MultiTask:
    return MODELS[model].build(tasks, torch.device("cpu"))


TIMEOUT = datetime.timedelta(minutes=2)
WARM_UP = 3


# ---- Bytes --------------------------------------------------------------------------------------------------------

BYTES_SENT, BYTES_RETRANSMITTED = 200, 208
"""Where Linux's struct tcp_info has them, since 4.19."""


def bytes_sent() -> int:
    """What has gone out on all TCP sockets that this process has open."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            fd = os.dup(int(name))
        except OSError:  # the listing's own
            continue
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            os.close(fd)
            continue
        with socket.socket(fileno=fd) as found:
            if found.family in (socket.AF_INET, socket.AF_INET6) and found.type == socket.SOCK_STREAM:
                info = found.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += struct.unpack_from("Q", info, BYTES_SENT)[0]
                total -= struct.unpack_from("Q", info, BYTES_RETRANSMITTED)[0]
    return total


def bytes_of(step: Step) -> int:
    """What this process sends in a step."""

    def settled() -> int:
        """A rank may be done with a step while its last bytes wait in the kernel."""
        last = -1
        while (now := bytes_sent()) != last:
            last = now
            time.sleep(0.02)
        return last

    before = settled()
    step()
    return settled() - before


# ---- Steps --------------------------------------------------------------------------------------------------------

METHODS: dict[str, tuple[Callable[[], igb.gradients.GradientBalancer], str, bool]] = {
    "igb_v1+nash_mtl": (igb.NashMTL, "nash_mtl", True),
    "igb_v1+imtl_g": (igb.IMTLG, "imtl_g", True),
    "igb_v1+emtl": (igb.EMTL, "emtl", False),
    "db_mtl": (lambda: igb.DBMTL(beta=0.9), "db_mtl", False),
    "db_mtl-beta0": (lambda: igb.DBMTL(beta=0.0), "db_mtl", False),
}
"""The method, its solver, and whether that needs the Gramian; else squared norms do."""


def _rule(method: str, tasks: int) -> igb.losses.LossBalancer | None:
    return igb.IGBv1(base_losses=[1.0] * tasks) if method.startswith("igb_v1") else None


def task_of(build: Build, tasks: int) -> MultiTask:
    """The same parameters on every rank, and a batch of its own."""
    torch.manual_seed(0)
    task = build(tasks)
    torch.manual_seed(1 + dist.get_rank())
    task.batch = torch.randn_like(task.batch)
    return task


def ours(task: MultiTask, method: str) -> Step:
    balancer = igb.Balancer(
        METHODS[method][0](),
        _rule(method, len(task.heads)),
        shared=task.shared,
        process_group=dist.group.WORLD,
    )

    def step() -> None:
        task.zero_grad()
        balancer.backward(task.losses())

    return step


def lagged(task: MultiTask) -> Step:
    """Nash-MTL between two updates of its weights."""
    balancer = igb.Balancer(igb.NashMTL(update_every=10**6), shared=task.shared, process_group=dist.group.WORLD)

    def step() -> None:
        task.zero_grad()
        balancer.backward(task.losses())

    step()  # in which the weights are found
    return step


def at_representation(task: MultiTask) -> Step:
    balancer = igb.Balancer(igb.NashMTL(), shared=task.shared, process_group=dist.group.WORLD)

    def step() -> None:
        task.zero_grad()
        representation = task.encoder(task.batch)
        balancer.backward(task.losses_at(representation), representation=representation)

    return step


def all_reduces(task: MultiTask, method: str, *, overlapped: bool) -> Step:
    """What people write: each task's gradients flattened and averaged over the ranks, then the same balancer on whole
    rows, by this package's operations; `overlapped`: a row is on its way while the next pass runs."""
    K, ranks = len(task.heads), dist.get_world_size()
    _, solver, by_gram = METHODS[method]
    sizes = [p.numel() for p in task.shared]
    heads = list(task.heads.parameters())
    averages = [[torch.zeros(sum(sizes))] for _ in range(K)] if method == "db_mtl" else None

    def scales_of(losses: Tensor) -> Tensor:
        if method.startswith("igb_v1"):
            return igb.ops.loss_scales("igb_v1", losses, torch.ones(K))[0]
        return igb.ops.loss_scales("log", losses, eps=1e-8)[0]

    def weights_of(rows: list[list[Tensor]], losses: Tensor) -> Tensor:
        if averages is not None:
            measured = igb.ops.ema_(averages, averages, rows, 0.9)
        else:
            measured = igb.ops.gram(rows) if by_gram else igb.ops.sq_norms(rows)
        return igb.ops.solve(solver, measured, losses.double() if solver == "emtl" else None)[0]

    def step() -> None:
        task.zero_grad()
        losses = task.losses()
        values = torch.stack([loss.detach() for loss in losses])
        dist.all_reduce(values)
        values /= ranks
        scales = scales_of(values)
        rows, sent = [], []
        for k, (loss, scale) in enumerate(zip(losses, scales, strict=True)):
            loss.backward(gradient=scale / ranks, retain_graph=k + 1 < K)
            row = torch.cat([p.grad.flatten() for p in task.shared])  # type: ignore[union-attr]
            for p in task.shared:
                p.grad = None
            rows.append([row])
            work = dist.all_reduce(row, async_op=True)
            sent.append(work)
            if not overlapped:
                work.wait()
        for work in sent:
            work.wait()
        weights = weights_of(rows, values * scales)
        update = rows[0][0]
        igb.ops.combine_([update], rows if averages is None else averages, weights)
        for p, grad in zip(task.shared, update.split(sizes), strict=True):
            p.grad = grad.view_as(p)
        of_heads = torch.cat([p.grad.flatten() for p in heads])  # type: ignore[union-attr]
        dist.all_reduce(of_heads)
        for p, grad in zip(heads, of_heads.split([p.numel() for p in heads]), strict=True):
            p.grad = grad.view_as(p)

    return step


class SumOfLosses(nn.Module):
    def __init__(self, task: MultiTask) -> None:
        super().__init__()
        self.encoder, self.heads, self._task = task.encoder, task.heads, task

    def forward(self) -> Tensor:
        return torch.stack(self._task.losses()).sum()


def plain_ddp(task: MultiTask) -> Step:
    """DistributedDataParallel and the plain sum of the losses, which balances nothing."""
    module = nn.parallel.DistributedDataParallel(SumOfLosses(task))

    def step() -> None:
        task.zero_grad()
        module().backward()

    return step


def bare_passes(task: MultiTask) -> Step:
    """K backward passes of this rank's batch that keep and send nothing."""

    def step() -> None:
        task.zero_grad()
        losses = task.losses()
        for k, loss in enumerate(losses):
            loss.backward(retain_graph=k + 1 < len(losses))
            for p in task.shared:
                p.grad = None

    return step


# ---- Formulas -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Of a step."""

    ranks: int
    tasks: int
    shared: int
    """Bytes of the shared parameters' gradients."""
    heads: int
    """Bytes of the task-specific ones'."""

    @property
    def others(self) -> float:
        """The share of the ranks that are not this one."""
        return (self.ranks - 1) / self.ranks


SCHEMES: dict[str, tuple[str, Callable[[MultiTask], Step], Callable[[int], float]]] = {
    "ours": ("f (K+1) Db", lambda task: ours(task, "igb_v1+nash_mtl"), lambda K: K + 1),
    "ours, norms alone": ("f (K+1) Db", lambda task: ours(task, "db_mtl-beta0"), lambda K: K + 1),
    "K all-reduces": (
        "2 f K Db",
        lambda task: all_reduces(task, "igb_v1+nash_mtl", overlapped=False),
        lambda K: 2 * K,
    ),
    "NashMTL(update_every=...)": ("2 f Db", lagged, lambda K: 2),
    "representation=": ("2 f Db", at_representation, lambda K: 2),
    "DDP, sum of losses": ("2 f Db", plain_ddp, lambda K: 2),
}
"""What is counted: the formula for the shared parameters in words, the step, and its multiple of f Db. To all of them,
heads add 2 f of their own bytes."""


def formula(scheme: str, sizes: Sizes) -> float:
    """Bytes that a rank sends in a step, without the numbers for each task and parameter."""
    return sizes.others * (SCHEMES[scheme][2](sizes.tasks) * sizes.shared + 2 * sizes.heads)


def counted(
    rank: int, build: Build, tasks: int, schemes: Sequence[str] = tuple(SCHEMES)
) -> dict[str, tuple[int, Sizes]]:
    """By scheme, the bytes that this rank sends in the third step, and the sizes."""
    found = {}
    for scheme in schemes:
        task = task_of(build, tasks)
        step = SCHEMES[scheme][1](task)
        step()
        step()  # a DistributedDataParallel has made its buckets anew
        size = [sum(p.nbytes for p in params) for params in (task.shared, task.heads.parameters())]
        found[scheme] = bytes_of(step), Sizes(dist.get_world_size(), tasks, size[0], size[1])
        del step
        dist.barrier()
    return found


# ---- Times --------------------------------------------------------------------------------------------------------

ALL_REDUCES, OVERLAPPED = "K all-reduces", "K all-reduces, overlapped"
DDP, BARE = "DDP, sum of losses", "K bare passes"
RIVALS = (ALL_REDUCES, OVERLAPPED, DDP, BARE)


def timed(
    rank: int, build: Build, tasks: int, methods: Sequence[str], rounds: int
) -> dict[str, dict[str, list[float]]]:
    """By method and contender, the seconds of each round on the slowest rank."""
    found = {}
    for method in methods:
        steps = {
            "ours": ours(task := task_of(build, tasks), method),
            ALL_REDUCES: all_reduces(rival := task_of(build, tasks), method, overlapped=False),
            OVERLAPPED: all_reduces(task_of(build, tasks), method, overlapped=True),
            DDP: plain_ddp(task_of(build, tasks)),
            BARE: bare_passes(task_of(build, tasks)),
            **calibrations(task),
        }
        for name in ("ours", ALL_REDUCES):
            steps[name]()
        for mine, theirs in zip(task.parameters, rival.parameters, strict=True):
            error = float((mine.grad - theirs.grad).norm() / theirs.grad.norm())  # type: ignore[operator,union-attr]
            assert error < 1e-4, f"a speed is worth nothing where the results disagree, by {error} of {method}"
        found[method] = _in_turns(steps, rounds)
        steps.clear()
    return found


def _in_turns(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for i in range(WARM_UP + rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            dist.barrier()
            start = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - start)
    mine = torch.tensor([seconds[name][WARM_UP:] for name in names], dtype=torch.float64)
    dist.all_reduce(mine, op=dist.ReduceOp.MAX)
    return dict(zip(names, mine.tolist(), strict=True))


# ---- Ranks --------------------------------------------------------------------------------------------------------


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What the function returns on each of as many new processes; it gets the rank first."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(size, mp_context=get_context("spawn")) as pool,
    ):
        running = [pool.submit(_rank, rank, size, f"{folder}/store", function, arguments) for rank in range(size)]
        return [run.result() for run in running]


def _rank(rank: int, size: int, store: str, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        return function(rank, *arguments)
    finally:
        dist.destroy_process_group()


# ---- A model of a step --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Costs:
    """What ranks of a machine, or of many, pay."""

    hop: float
    """Seconds until a message of no size is there."""
    sent: float
    """Seconds for a byte that a rank sends."""
    touched: float
    """Seconds for a byte of memory read or written."""
    cores: int | None = None
    """Of the one machine that all ranks share; None: each has its own."""
    overlaps: bool = False
    """Whether something else than the processor that computes sends: what goes out during a pass then takes no time."""

    def crowd(self, ranks: int) -> float:
        """How much longer everything takes because ranks share the cores."""
        return 1.0 if self.cores is None else max(1.0, ranks / self.cores)


def predicted(scheme: str, sizes: Sizes, costs: Costs, passes: float) -> float:
    """Seconds of a step with a Gramian, of which K forward and backward passes take `passes`.

    Large messages go in rings of N - 1 hops, small all-reduces up and down a tree. Both forms read each row once for
    the Gramian and once for the sum; with shards these have 1/N of a row, but N of them are added up first.
    """
    N, K, row, f = sizes.ranks, sizes.tasks, sizes.shared, sizes.others
    ring, tree = (N - 1) * costs.hop, 2 * math.ceil(math.log2(N)) * costs.hop
    crowd = costs.crowd(N)
    send = crowd * costs.sent
    heads = tree + 2 * f * sizes.heads * send
    if scheme == "ours":
        buckets = math.ceil(row / max(BUCKET_BYTES, N * PART_BYTES))
        one_way = buckets * ring + f * row * send
        # Pack, copy the own part, add all parts; then Gramian and sum of shards.
        local = K * (2 + 2 / N + (N + 1) / N) * row + (2 * K + 1) / N * row
        hidden = (K - 1) * min(one_way, passes / K) if costs.overlaps else 0.0
        wire = (K + 1) * one_way - hidden + 2 * tree + heads
    elif scheme in (ALL_REDUCES, OVERLAPPED):
        there_and_back = 2 * (ring + f * row * send)
        local = K * (2 + 3 * f) * row + (2 * K + 1) * row
        hidden = (K - 1) * min(there_and_back, passes / K) if costs.overlaps and scheme == OVERLAPPED else 0.0
        wire = K * there_and_back - hidden + tree + heads
    else:
        raise ValueError(f"scheme must be ours or one of K all-reduces, found {scheme!r}")
    return wire + crowd * (passes + local * costs.touched)


SMALL_MESSAGE, GATHER, COPY = "all-reduce of one number", "all-gather of a row", "copy of a row"


def calibrations(task: MultiTask) -> dict[str, Step]:
    """Messages and copies by themselves, for a model of steps."""
    ranks = dist.get_world_size()
    number, own = torch.zeros(1), torch.zeros(sum(p.numel() for p in task.shared) // ranks)
    row = torch.zeros(ranks * len(own))
    other = torch.zeros_like(row)
    return {
        SMALL_MESSAGE: lambda: dist.all_reduce(number),
        GATHER: lambda: all_gather(row, own),
        COPY: lambda: other.copy_(row),
    }


def costs_of(ms: dict[str, dict[str, float]], ranks: int, row: int) -> Costs:
    """From the calibrations' times on as many ranks."""
    small, gather, copy = (ms[name]["ms"] / 1e3 for name in (SMALL_MESSAGE, GATHER, COPY))
    hop = small / (2 * math.ceil(math.log2(ranks)))
    return Costs(hop, (gather - (ranks - 1) * hop) / (row * (1 - 1 / ranks)), copy / (2 * row), os.cpu_count())


# ---- The command --------------------------------------------------------------------------------------------------


def count(ranks: Sequence[int], tasks: Sequence[int], model: str) -> list[dict[str, Any]]:
    rows = []
    print(
        "| N, K | scheme | formula | bytes counted | over the formula | of K all-reduces |\n|---|---|---|---|---|---|"
    )
    for N in ranks:
        for K in tasks:
            each = on_ranks(N, counted, partial(built, model), K)
            most = {scheme: max(one[scheme][0] for one in each) for scheme in SCHEMES}
            for scheme, (sent, sizes) in each[0].items():
                sent, exact = most[scheme], formula(scheme, sizes)
                row = {"ranks": N, "tasks": K, "scheme": scheme, "formula": exact, "counted": sent}
                rows.append(row | {"each": [one[scheme][0] for one in each], "sizes": asdict(sizes)})
                print(
                    f"| {N}, {K} | {scheme} | {SCHEMES[scheme][0]} | {sent:,} | {sent / exact - 1:+.3%} | "
                    f"{sent / most[ALL_REDUCES]:.3f} |",
                    flush=True,
                )
    return rows


def time_steps(
    ranks: Sequence[int], tasks: Sequence[int], methods: Sequence[str], model: str, rounds: int
) -> list[dict[str, Any]]:
    rows = []
    print(f"\n| N, K | method | ours, ms | ours / {' | ours / '.join(RIVALS)} |")
    print("|---|---|---|---|---|---|---|")
    for N in ranks:
        for K in tasks:
            for method, seconds in on_ranks(N, timed, partial(built, model), K, methods, rounds)[0].items():
                own = seconds["ours"]
                ratios = {
                    name: statistics.median(a / b for a, b in zip(own, other, strict=True))
                    for name, other in seconds.items()
                    if name in RIVALS
                }
                rows.append(
                    {
                        "ranks": N,
                        "tasks": K,
                        "method": method,
                        "ms": {name: asdict(Timing.of(times)) for name, times in seconds.items()},
                        "ours_over": ratios,
                    }
                )
                cells = " | ".join(f"{ratio:.2f}" for ratio in ratios.values())
                print(f"| {N}, {K} | {method} | {1e3 * statistics.median(own):.1f} | {cells} |", flush=True)
    return rows


def check_model(timings: Sequence[dict[str, Any]], model: str) -> list[dict[str, Any]]:
    """What the model makes of passes, messages and copies on the fewest ranks, against the steps' times on all."""
    task = built(model, 1)
    row = sum(p.nbytes for p in task.shared)
    rows = []
    print("\n| N, K | scheme | measured, ms | model, ms | model's error |\n|---|---|---|---|---|")
    for timing in timings:
        N, K, ms = timing["ranks"], timing["tasks"], timing["ms"]
        base = next(t for t in timings if (t["tasks"], t["method"]) == (K, timing["method"]))
        if timing["method"] != timings[0]["method"]:
            continue
        costs = costs_of(base["ms"], base["ranks"], row)
        passes = base["ms"][BARE]["ms"] / 1e3 / costs.crowd(base["ranks"])
        sizes = Sizes(N, K, row, K * sum(p.nbytes for p in task.heads.parameters()))
        for scheme in ("ours", ALL_REDUCES):
            found, expected = ms[scheme]["ms"], 1e3 * predicted(scheme, sizes, costs, passes)
            error = expected / found - 1
            rows.append({"ranks": N, "tasks": K, "scheme": scheme, "ms": found, "model_ms": expected, "error": error})
            print(f"| {N}, {K} | {scheme} | {found:.0f} | {expected:.0f} | {error:+.0%} |", flush=True)
    print(
        f"\nWith {base['ranks']} ranks: {1e6 * costs.hop:.0f} us a hop, {1e-9 / costs.sent:.2f} GB/s sent and "
        f"{1e-9 / costs.touched:.1f} GB/s of memory touched by each"
    )
    return rows


def plan(ranks: Sequence[int], tasks: Sequence[int], params: float, hop: float, link: float, pass_: float) -> None:
    """A table from the model and assumed costs; nothing in it is measured."""
    costs = Costs(hop, 1 / link, 0.0, overlaps=True)
    print(
        f"Modelled, not measured: {params:.3g} float32 parameters, {1e6 * hop:.0f} us a hop, {link / 1e9:.0f} GB/s a "
        f"rank, {1e3 * pass_:.0f} ms a pass; ms beyond K passes\n"
    )
    print("| N, K | GB sent | ours | K all-reduces, overlapped | K all-reduces |\n|---|---|---|---|---|")
    for N in ranks:
        for K in tasks:
            sizes = Sizes(N, K, int(4 * params), 0)
            beyond = [
                1e3 * (predicted(s, sizes, costs, K * pass_) - K * pass_) for s in ("ours", OVERLAPPED, ALL_REDUCES)
            ]
            print(f"| {N}, {K} | {formula('ours', sizes) / 1e9:.2f} | {' | '.join(f'{ms:.0f}' for ms in beyond)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--tasks", nargs="+", type=int, default=[3, 8])
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS), help="to be timed on two ranks")
    parser.add_argument("--model", choices=SMALL, default="mlp-5.8m")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", metavar="PATH", type=Path, help="where to save what was measured")
    assumed = parser.add_argument_group("a plan", "from the model and what is assumed here, without measuring")
    assumed.add_argument("--plan", action="store_true")
    assumed.add_argument("--params", type=float, default=1e8, help="shared parameters, in float32 (%(default)g)")
    assumed.add_argument("--hop", type=float, default=1e-5, help="seconds a hop (%(default)g)")
    assumed.add_argument("--link", type=float, default=2.5e10, help="bytes a second that a rank sends (%(default)g)")
    assumed.add_argument(
        "--pass-seconds", type=float, default=0.05, help="of a forward and backward pass (%(default)g)"
    )
    options = parser.parse_args()
    if options.plan:
        plan(options.ranks, options.tasks, options.params, options.hop, options.link, options.pass_seconds)
        return
    saved: dict[str, Any] = {"bytes": count(options.ranks, options.tasks, options.model)}
    if options.methods:
        first, *more = options.ranks
        saved["times"] = time_steps([first], options.tasks, options.methods, options.model, options.rounds)
        saved["times"] += time_steps(more, options.tasks, options.methods[:1], options.model, options.rounds)
        saved["model"] = check_model(saved["times"], options.model)
    if options.json:
        about = {
            "machine": machine(),
            "commit": commit(),
            "command": shlex.join(["python", "-m", "benchmarks.distributed", *sys.argv[1:]]),
            "model_name": options.model,
        }
        options.json.write_text(json.dumps(about | saved, indent=1) + "\n")


if __name__ == "__main__":
    main()
