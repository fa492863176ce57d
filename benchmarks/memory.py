"""Peak memory of a step, beyond what K bare backward passes and what a plain step take.

    python -m benchmarks.memory [--gpu] [--json PATH]

On the CPU every allocation of torch is counted, on a GPU its caching allocator's. Figures do not depend on load.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

import igb_kernels as igb
from benchmarks.models import built
from benchmarks.peers import libmtl
from igb_kernels.bench import memory
from igb_kernels.bench.machine import commit
from igb_kernels.bench.models import SMALL, MultiTask
from igb_kernels.doctor.installation import processor

Step = Callable[[Tensor, list[Tensor]], object]
"""Makes `.grad` from the representation and the losses."""

STEPS = 3
"""The peak is that of the third step and those before it: in it, all state is there."""
PASSES, PLAIN = "K bare passes", "plain step"
KEPT, HALVED, STREAMED = "kept", "halved", "streamed"
BALANCERS: dict[str, tuple[Callable[[], dict[str, object]], str]] = {
    "equal": (lambda: {"gradients": "equal"}, ""),
    "nash_mtl": (lambda: {"gradients": "nash_mtl"}, KEPT),
    "imtl_g": (lambda: {"gradients": "imtl_g"}, KEPT),
    "upgrad": (lambda: {"gradients": "upgrad"}, KEPT),
    "igb_v1+nash_mtl": (lambda: {"gradients": "igb_v1+nash_mtl"}, KEPT),
    "grad_drop": (lambda: {"gradients": "grad_drop"}, KEPT),
    "emtl": (lambda: {"gradients": "emtl"}, KEPT),
    **{
        f"{name}, bfloat16 bank": (partial(dict, gradients=name, bank_dtype=torch.bfloat16), HALVED)
        for name in ("nash_mtl", "grad_drop")
    },
    "db_mtl, beta=0": (lambda: {"gradients": igb.DBMTL(beta=0.0)}, STREAMED),
    "db_mtl, beta=0.9": (lambda: {"gradients": "db_mtl"}, ""),
    "moco": (lambda: {"gradients": "moco"}, ""),
    "excess_mtl": (lambda: {"gradients": "excess_mtl"}, ""),
}
"""Each balancer, and which bar it must keep to."""


def bar(kind: str, tasks: int) -> float | None:
    """The most that a step may take beyond K bare passes, in gradients of the shared parameters."""
    return {KEPT: 1.05 * tasks, HALVED: 1.05 * tasks / 2, STREAMED: 2.0}.get(kind)


@dataclass(frozen=True)
class Row:
    model: str
    tasks: int
    step: str
    gradient_bytes: int
    """D: of all gradients of the shared parameters."""
    peak_bytes: int
    """Beyond the parameters: activations, gradients, state."""
    over_passes: float
    """In units of D, as what follows."""
    over_plain: float
    bar: float | None


# ---- Steps --------------------------------------------------------------------------------------------------------


def bare_passes(task: MultiTask) -> Step:
    """K backward passes that keep nothing."""

    def step(representation: Tensor, losses: list[Tensor]) -> None:
        for k, loss in enumerate(losses):
            loss.backward(retain_graph=k + 1 < len(losses))
            task.zero_grad()

    return step


def plain(task: MultiTask) -> Step:
    return lambda representation, losses: torch.stack(losses).sum().backward()


def ours(task: MultiTask, arguments: dict[str, object]) -> Step:
    balancer = igb.Balancer(**arguments, shared=task.shared)
    return lambda representation, losses: balancer.backward(losses)


def torchjd(task: MultiTask, name: str, thrifty: bool) -> Step:
    """At its defaults, or with the options that its documentation has for where memory matters."""
    from torchjd import aggregation
    from torchjd.autojac import jac_to_grad, mtl_backward

    aggregator = getattr(aggregation, name)(**({"n_tasks": len(task.heads)} if name == "NashMTL" else {}))
    chunk = {"parallel_chunk_size": 1} if thrifty else {}
    gramian = isinstance(aggregator, aggregation.GramianWeightedAggregator)
    options = {"optimize_gramian_computation": True} if thrifty and gramian else {}

    def step(representation: Tensor, losses: list[Tensor]) -> None:
        mtl_backward(losses, features=representation, **chunk)
        jac_to_grad(task.shared, aggregator, **options)

    return step


def libmtl_imtl(task: MultiTask) -> Step:
    class IMTL(libmtl("weighting").IMTL):
        rep_grad, task_num, device = False, len(task.heads), task.device

        def get_share_params(self) -> list[Tensor]:
            return task.shared

        def zero_grad_share_params(self) -> None:
            for p in task.shared:
                p.grad.zero_()  # the last of them are written to

    weighting = IMTL()
    weighting.init_param()
    return lambda representation, losses: weighting.backward(torch.stack(losses))


def steps(task: MultiTask, peers: bool) -> Iterator[tuple[str, str, Step]]:
    """Name, bar, and step of everything that is measured."""
    yield PASSES, "", bare_passes(task)
    yield PLAIN, "", plain(task)
    for name, (make, kind) in BALANCERS.items():
        yield name, kind, ours(task, make())
    if not peers:
        return
    if importlib.util.find_spec("torchjd") is not None:
        for name in ("NashMTL", "UPGrad", "IMTLG"):
            yield f"TorchJD {name}", "", torchjd(task, name, False)
            yield f"TorchJD {name}, thrifty", "", torchjd(task, name, True)
    if importlib.util.find_spec("LibMTL") is not None:
        yield "LibMTL IMTL", "", libmtl_imtl(task)


# ---- Measuring ----------------------------------------------------------------------------------------------------


def peak_of(task: MultiTask, step: Step) -> int:
    """The most that is held at a time in some steps, beyond what is held before them."""

    def run() -> None:
        for _ in range(STEPS):
            task.zero_grad()
            representation = task.encoder(task.batch)
            losses = task.losses_at(representation)
            step(representation, losses)
            del representation, losses
        task.zero_grad()

    return memory.peak_bytes(run, task.device)


def measure(model: str, tasks: int, device: torch.device, peers: bool) -> Iterator[Row]:
    torch.manual_seed(0)
    task = built(model, tasks, device)
    size = sum(p.numel() * p.element_size() for p in task.shared)
    floor: dict[str, int] = {}
    for name, kind, step in steps(task, peers):
        peak = peak_of(task, step)
        if name in (PASSES, PLAIN):
            floor[name] = peak
        over = [(peak - floor[other]) / size if other in floor else 0.0 for other in (PASSES, PLAIN)]
        yield Row(model, tasks, name, size, peak, *over, bar(kind, tasks))


HEADER = """| model, K | step | MB beyond the parameters | over K bare passes | over a plain step | bar |
|---|---|---|---|---|---|"""


def line(row: Row) -> str:
    """Of the table; differences in gradients of the shared parameters."""
    limit = "" if row.bar is None else f"{row.bar:.2f} {'kept' if row.over_passes <= row.bar else 'MISSED'}"
    return (
        f"| {row.model}, {row.tasks} | {row.step} | {row.peak_bytes / 1e6:.1f} | {row.over_passes:.2f} | "
        f"{row.over_plain:.2f} | {limit} |"
    )


def machine(device: torch.device) -> dict[str, object]:
    gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if device.type == "cuda" else {}
    return {
        "device": device.type,
        "cpu": processor(),
        **gpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "igb_kernels": igb.__version__,
        "backends": {name: str(availability) for name, availability in igb.backends().items()},
        "peers": {name: version(name) for name in ("torchjd", "LibMTL") if importlib.util.find_spec(name)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="measure on the GPU")
    parser.add_argument("--json", metavar="PATH", type=Path, help="where to save what was measured")
    parser.add_argument("--models", nargs="+", choices=SMALL, default=["mlp-5.8m", "cnn-4.7m"])
    parser.add_argument("--tasks", nargs="+", type=int, default=[3, 8])
    parser.add_argument("--without-peers", action="store_true", help="leave TorchJD and LibMTL out")
    options = parser.parse_args()
    device = torch.device("cuda" if options.gpu else "cpu")
    rows: list[Row] = []
    print(HEADER)
    for model in options.models:
        for tasks in options.tasks:
            for row in measure(model, tasks, device, not options.without_peers):
                print(line(row), flush=True)
                rows.append(row)
    if options.json:
        command = shlex.join(["python", "-m", "benchmarks.memory", *sys.argv[1:]])
        saved = {"machine": machine(device), "commit": commit(), "command": command, "steps": [asdict(r) for r in rows]}
        options.json.write_text(json.dumps(saved, indent=1) + "\n")


if __name__ == "__main__":
    main()
