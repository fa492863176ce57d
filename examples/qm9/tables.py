"""What the run prints."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from data import TARGETS, Molecules, Split
from loop import Run, delta_m
from numpy.typing import NDArray
from ranks import Ranks
from rich.console import Console
from rich.table import Table
from timing import StepTime

import igb_kernels as igb


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def backend_used(asked: str, device: torch.device) -> str:
    """What `backend=asked` means on this device."""
    if asked != "auto":
        return asked
    own = igb.backends().get(device.type)
    return device.type if own else "reference"


def baseline_of(runs: Sequence[Run]) -> Run:
    """Equal weighting, or the first method where equal weighting is not among them."""
    return next((run for run in runs if run.method == "equal"), runs[0])


def test_errors(run: Run) -> NDArray[np.float64]:
    assert run.test_mae is not None  # every run that took a step is tested before it is shown
    return run.test_mae


def print_environment(console: Console, args: argparse.Namespace, ranks: Ranks) -> None:
    used = backend_used(args.backend, args.device)
    detail = igb.backends().get(used)
    console.print(
        f"device   {device_name(args.device)} ({args.device}), {torch.get_num_threads()} CPU threads\n"
        f"torch    {torch.__version__}\n"
        f"backend  {used}{f', {detail}' if detail else ''}",
        highlight=False,
    )
    if ranks.group is not None:
        console.print(
            f"ranks    {ranks.size}, each with {args.batch_size // ranks.size} of {args.batch_size} molecules a step",
            highlight=False,
        )


def print_data(
    console: Console, molecules: Molecules, split: Split, run: Run, steps_per_epoch: int, seconds: float
) -> None:
    shared, heads = (sum(p.numel() for p in part.parameters()) for part in (run.model.encoder, run.model.heads))
    console.print(
        f"data     {len(molecules)} molecules in {seconds:.1f} s: "
        f"{len(split.train)} train, {len(split.val)} validation, {len(split.test)} test\n"
        f"model    {shared:,} shared parameters, {heads:,} in {len(TARGETS)} heads\n"
        f"training {run.planned_steps} steps a method, {steps_per_epoch} an epoch",
        highlight=False,
    )


def results_table(runs: Sequence[Run], mean_mae: NDArray[np.float64]) -> Table:
    baseline = baseline_of(runs)
    table = Table(title="Test MAE (lower is better)")
    table.add_column("target")
    table.add_column("unit")
    table.add_column("predict the mean", justify="right")
    for run in runs:
        table.add_column(run.method if run.complete else f"{run.method} (stopped at step {run.steps})", justify="right")
    errors = np.stack([test_errors(run) for run in runs])
    for k, target in enumerate(TARGETS):
        best = errors[:, k].argmin()
        cells = [_number(error) for error in errors[:, k]]
        if len(runs) > 1:
            cells[best] = f"[bold]{cells[best]}[/]"
        table.add_row(target.name, target.unit, _number(mean_mae[k]), *cells)
    table.add_section()
    deltas = [
        f"{delta_m(test_errors(run), test_errors(baseline)):+.1f} %"
        if run is not baseline and run.steps == baseline.steps
        else "-"
        for run in runs
    ]
    table.add_row(f"Δm against {baseline.method}", "", "", *deltas)
    return table


def _number(error: float) -> str:
    return f"{error:.3f}" if error < 10 else f"{error:.1f}"


def times_table(runs: Sequence[Run], times: Mapping[str, StepTime]) -> Table:
    table = Table(title="Step time in ms (medians; parts timed in turns on the same batches)")
    table.add_column("part")
    for run in runs:
        passes = "1 pass" if run.balancer.gradients.name == "equal" else f"{len(TARGETS)} passes"
        table.add_column(f"{run.method} ({passes})", justify="right")
    columns = [times[run.method] for run in runs]
    for name, values in (
        ("batch", [column.batch for column in columns]),
        ("forward", [column.forward for column in columns]),
        ("backward passes", [column.passes for column in columns]),
        ("balancing", [column.balancing for column in columns]),
        ("optimizer", [column.optimizer for column in columns]),
    ):
        table.add_row(name, *(f"{value:.2f}" for value in values))
    table.add_section()
    table.add_row("step", *(f"[bold]{column.step:.2f}[/]" for column in columns))
    table.add_row("step, reference backend", *(f"{column.reference_step:.2f}" for column in columns))
    table.add_row("balancing, reference backend", *(f"{column.reference_balancing:.2f}" for column in columns))
    return table


def print_results(console: Console, runs: Sequence[Run], mean_mae: NDArray[np.float64]) -> None:
    console.print()
    console.print(results_table(runs, mean_mae))
    for run in runs:
        status = igb.Status(run.status)
        if status:
            console.print(f"{run.method}: in some step {status.name}", highlight=False)
        rule = run.balancer.losses
        if rule.name == "igb_v1" and len(run.val_errors) < 3:
            console.print(
                f"{run.method}: training ended before IGBv1 had its base losses (the second epoch's means) to act on",
                highlight=False,
            )
        if isinstance(rule, igb.IGBv2) and len(run.val_errors) <= rule.start_epoch:
            console.print(
                f"{run.method}: IGBv2's weights were random: its agent acts after {rule.start_epoch} epochs",
                highlight=False,
            )


def print_times(console: Console, runs: Sequence[Run], times: Mapping[str, StepTime]) -> None:
    console.print()
    console.print(times_table(runs, times))
