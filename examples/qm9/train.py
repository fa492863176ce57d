"""Multi-task training on QM9: 11 molecular properties, one encoder, every balancing method from the same start."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import data
import graphs
import report
import tables
import torch
from cli import parse_arguments
from loop import Run, epoch_batches, test, train
from models import build_model
from ranks import ALONE, Ranks, joined, own_device
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from timing import WARM_UP, StepTime, time_step

import igb_kernels as igb

# 0.99 instead of Adam's 0.999: balanced gradients grow as losses fall, and its scale has to keep up
BETA2 = 0.99


def new_run(
    method: str,
    args: argparse.Namespace,
    steps: int,
    tasks: Sequence[str] = data.TARGET_NAMES,
    ranks: Ranks = ALONE,
) -> Run:
    """The method's model, balancer and optimizer; every method, on every rank, starts from the same parameters."""
    torch.manual_seed(args.seed)
    model = build_model(args.encoder, tasks).to(args.device)
    try:
        balancer = igb.Balancer(
            method, shared=model.encoder.parameters(), backend=args.backend, process_group=ranks.group
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"--methods must name methods of igb_kernels.Balancer; found {method!r}: {error}") from None
    # One momentum each: DB-MTL averages the shared parameters' gradients over steps by itself, and Adam's average
    # on top of that makes training oscillate.
    momentum = 0.0 if getattr(balancer.gradients, "beta", 0.0) > 0 else 0.9
    optimizer = torch.optim.Adam(
        [
            {"params": list(model.encoder.parameters()), "betas": (momentum, BETA2)},
            {"params": list(model.heads.parameters()), "betas": (0.9, BETA2)},
        ],
        lr=args.lr,
    )
    return Run(method, model, balancer, optimizer, steps, ranks)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    args.device = own_device(args.device)
    with joined(args.device) as ranks:
        return run_on(ranks, args)


def run_on(ranks: Ranks, args: argparse.Namespace) -> int:
    console = Console(quiet=ranks.rank > 0)
    try:
        return run_all(args, console, ranks)
    except (ValueError, FileNotFoundError, ImportError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        return 2
    except KeyboardInterrupt:  # outside training: there is nothing to report yet, or it was being reported
        console.print("interrupted", style="yellow")
        return 130


def run_all(args: argparse.Namespace, console: Console, ranks: Ranks) -> int:
    start = time.perf_counter()
    torch.set_num_threads(args.threads)
    tables.print_environment(console, args, ranks)
    molecules = data.load(args.data, args.molecules, args.seed)
    split = data.split(len(molecules), args.seed)
    if len(split.train) < args.batch_size:
        raise ValueError(
            f"--batch-size must be at most the {len(split.train)} training molecules; found {args.batch_size}"
        )
    if args.batch_size % ranks.size:
        raise ValueError(f"--batch-size must be a multiple of the {ranks.size} ranks; found {args.batch_size}")
    steps_per_epoch = len(split.train) // args.batch_size
    steps = args.steps or args.epochs * steps_per_epoch
    runs = [new_run(method, args, steps, ranks=ranks) for method in args.methods]
    encoder = runs[0].model.encoder
    collated = graphs.build(molecules, split.train, encoder.cutoff, encoder.needs_bonds).to(args.device)
    mean, std = data.standardisation(molecules.targets, split.train)
    mean_mae = abs(molecules.targets[split.test] - mean).mean(axis=0)
    tables.print_data(console, molecules, split, runs[0], steps_per_epoch, time.perf_counter() - start)

    times: dict[str, StepTime] = {}
    interrupted = train_all(runs, collated, split, args, console)
    runs = [run for run in runs if run.steps]
    for run in runs:
        test(run, collated, split, std)
    if not interrupted and args.timing_steps:
        batches = timing_batches(split, args)
        with console.status("timing steps in parts"):
            times = {run.method: time_step(run, collated, batches, args.backend) for run in runs}
    if not runs:
        console.print("interrupted before the first step: nothing to report")
        return 130
    tables.print_results(console, runs, mean_mae)
    if times:
        tables.print_times(console, runs, times)
    seconds = time.perf_counter() - start
    files = report.write(args, molecules, split, runs, mean_mae, times, seconds) if ranks.rank == 0 else []
    console.print(f"\n{'interrupted' if interrupted else 'finished'} after {seconds:.0f} s; files:", highlight=False)
    for file in files:
        console.print(f"  {file}", highlight=False, soft_wrap=True)
    return 130 if interrupted else 0


def train_all(
    runs: Sequence[Run], collated: graphs.Graphs, split: data.Split, args: argparse.Namespace, console: Console
) -> bool:
    """Trains the runs one after the other; True if Ctrl-C ended that early. Ranks that it ends at different steps have
    nothing to report together."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns, console=console, speed_estimate_period=10) as progress:
            bars = [progress.add_task(run.method, total=run.planned_steps, loss="-", start=False) for run in runs]
            for run, bar in zip(runs, bars, strict=True):
                progress.start_task(bar)

                def show(steps: int, loss: float | None, bar: TaskID = bar) -> None:
                    if loss is None:
                        progress.update(bar, completed=steps)
                    else:
                        progress.update(bar, completed=steps, loss=f"{loss:.4f}")

                train(run, collated, split, args.batch_size, args.seed, show)
    except KeyboardInterrupt:
        if runs[0].ranks.group is not None:
            raise
        console.print("interrupted: reporting what is done so far", style="yellow")
        return True
    return False


def timing_batches(split: data.Split, args: argparse.Namespace) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(args.seed)
    molecules = torch.from_numpy(split.train).to(args.device)
    batches: list[torch.Tensor] = []
    while len(batches) < args.timing_steps + WARM_UP:
        batches += epoch_batches(molecules, args.batch_size, generator)
    return batches[: args.timing_steps + WARM_UP]


if __name__ == "__main__":
    sys.exit(main())
