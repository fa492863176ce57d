"""Methods compared over several seeds: Δm against single-task networks and against equal weights, and step times.

    python examples/qm9/compare.py --seeds 0 1 2 --molecules 4000 --epochs 20
    python examples/qm9/compare.py ... --timing-steps 300    # on a machine that does nothing else

What is trained is kept in --out, so that an interrupted comparison goes on where it was. Other flags: see train.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cli
import data
import graphs
import numpy as np
import torch
from loop import Run, delta_m, epoch_batches, test, train
from models import build_model
from tables import backend_used, device_name
from train import new_run

import igb_kernels as igb

RULES = ("equal", "igb_v1", "igb_v2")
METHODS = [*RULES, "db_mtl", "igb_v1+db_mtl", "igb_v2+db_mtl", "nash_mtl", "igb_v1+nash_mtl", "igb_v2+nash_mtl"]
SINGLE = "single-task"
OUT = Path(__file__).parent / "runs" / "compare"
BLOCK = 100  # steps timed in a row: two of the bursts in which IGBv2's agent learns
WARM_UP = 10  # untimed steps of a block


class Experiment:
    """One seed's molecules, and the training of any method on them."""

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.args = argparse.Namespace(**{**vars(args), "seed": seed})
        molecules = data.load(args.data, args.molecules, seed)
        self.split = data.split(len(molecules), seed)
        encoder = build_model(args.encoder, data.TARGET_NAMES).encoder
        self.graphs = graphs.build(molecules, self.split.train, encoder.cutoff, encoder.needs_bonds).to(args.device)
        self.std = data.standardisation(molecules.targets, self.split.train)[1]
        self.steps = args.steps or args.epochs * (len(self.split.train) // args.batch_size)

    def errors_of(self, method: str, file: Path) -> None:
        """Trains the method, or a network for each task, and saves what the table needs."""
        if method == SINGLE:
            runs = [self._trained("equal", [k]) for k in range(len(data.TARGET_NAMES))]
        else:
            runs = [self._trained(method, range(len(data.TARGET_NAMES)))]
        saved = {
            "test_mae": [float(error) for run in runs if run.test_mae is not None for error in run.test_mae],
            "seconds": sum(run.seconds for run in runs),
            "status": [run.status for run in runs],
        }
        if method != SINGLE:
            saved |= {"model": runs[0].model.state_dict(), "balancer": runs[0].balancer.state_dict()}
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(saved, file)

    def _trained(self, method: str, tasks: Sequence[int]) -> Run:
        run = new_run(method, self.args, self.steps, [data.TARGET_NAMES[k] for k in tasks])
        chosen = replace(self.graphs, targets=self.graphs.targets[:, list(tasks)])
        train(run, chosen, self.split, self.args.batch_size, self.args.seed, lambda steps, loss: None)
        test(run, chosen, self.split, self.std[list(tasks)])
        return run

    def step_times(self, saved: Mapping[str, Any], steps: int) -> dict[str, list[float]]:
        """ms of every step of every method, in blocks that take turns, from the end of its training."""
        runs = {}
        for method in saved:
            run = runs[method] = new_run(method, self.args, self.steps, data.TARGET_NAMES)
            run.model.load_state_dict(saved[method]["model"])
            run.balancer.load_state_dict(saved[method]["balancer"])
            for group in run.optimizer.param_groups:
                group["lr"] = 0.0  # does all its work, but leaves the model in place
        times: dict[str, list[float]] = {method: [] for method in runs}
        batches = self._batches()
        for _ in range(-(-steps // BLOCK)):
            for method, run in runs.items():
                block = [self._timed_step(run, next(batches)) for _ in range(WARM_UP + BLOCK)]
                times[method] += block[WARM_UP:]
                run.balancer.state_dict()  # waits for what runs in the background: it must not burden the next block
        return times

    def _batches(self) -> Iterator[torch.Tensor]:
        generator = torch.Generator().manual_seed(self.args.seed)
        molecules = torch.from_numpy(self.split.train).to(self.args.device)
        while True:
            yield from epoch_batches(molecules, self.args.batch_size, generator)

    def _timed_step(self, run: Run, chosen: torch.Tensor) -> float:
        start = time.perf_counter()
        run.optimizer.zero_grad()
        run.balancer.backward(run.model.losses(self.graphs.batch(chosen)))
        run.optimizer.step()
        if self.args.device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3


def summary(results: Mapping[str, Sequence[np.ndarray]], times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """For each method Δm of every seed, and of its steps' times in ms the mean and quantiles."""
    rows: dict[str, Any] = {}
    for method, errors in results.items():
        row: dict[str, Any] = {
            f"delta_m_against_{name.replace('-', '_')}": [
                delta_m(mine, its) for mine, its in zip(errors, results[name], strict=True)
            ]
            for name in (SINGLE, "equal")
            if name in results and name != method
        }
        if method in times:
            ms = np.array(times[method])
            row["step_ms"] = {"mean": ms.mean(), "median": np.median(ms), "p99": np.quantile(ms, 0.99), "max": ms.max()}
        rows[method] = row | {"test_mae": [dict(zip(data.TARGET_NAMES, e.tolist(), strict=True)) for e in errors]}
    return rows


def as_markdown(rows: Mapping[str, Any]) -> str:
    """The table: Δm in % as mean ± standard deviation over seeds."""
    lines = [
        "| method | Δm against single-task | Δm against equal | step, mean (median, worst) ms |",
        "|---|---|---|---|",
    ]
    for method, row in rows.items():
        cells = []
        for name in ("delta_m_against_single_task", "delta_m_against_equal"):
            values = row.get(name)
            spread = f" ± {np.std(values, ddof=1):.1f}" if values and len(values) > 1 else ""
            cells.append(f"{np.mean(values):+.1f}{spread}" if values else "–")
        ms = row.get("step_ms")
        cells.append(f"{ms['mean']:.1f} ({ms['median']:.1f}, {ms['max']:.0f})" if ms else "–")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, help="file for the figures behind the table")
    own, rest = parser.parse_known_args(argv)
    given = [*(["--methods", *METHODS] if "--methods" not in rest else []), *rest]
    args = cli.parse_arguments(given if "--out" in rest else [*given, "--out", str(OUT)])
    torch.set_num_threads(args.threads)
    trained: dict[str, list[dict[str, Any]]] = {method: [] for method in [SINGLE, *args.methods]}
    for seed in own.seeds:
        experiment = Experiment(args, seed)
        for method in trained:
            file = args.out / f"seed-{seed}" / f"{method}.pt"
            if not file.exists():
                print(f"seed {seed}: {method}", file=sys.stderr, flush=True)
                experiment.errors_of(method, file)
            trained[method].append(torch.load(file, weights_only=True))
    times = {}
    if args.timing_steps >= BLOCK:
        times = experiment.step_times({method: trained[method][-1] for method in args.methods}, args.timing_steps)
    rows = summary({m: [np.array(run["test_mae"]) for run in runs] for m, runs in trained.items()}, times)
    print(as_markdown(rows))
    if own.json is not None:
        about = {
            "command": " ".join(["python", "examples/qm9/compare.py", *(sys.argv[1:] if argv is None else argv)]),
            "device": device_name(args.device),
            "threads": args.threads,
            "backend": backend_used(args.backend, args.device),
            "torch": torch.__version__,
            "igb_kernels": igb.__version__,
        }
        own.json.write_text(json.dumps({**about, "methods": rows}, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
