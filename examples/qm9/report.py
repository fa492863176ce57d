"""What the run leaves behind: metrics.json, history.npz and report.png."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import TARGET_NAMES, TARGETS, Molecules, Split
from figure import draw
from loop import Run, delta_m
from numpy.typing import NDArray
from tables import backend_used, baseline_of, device_name, test_errors
from timing import StepTime

import igb_kernels as igb


def write(
    args: argparse.Namespace,
    molecules: Molecules,
    split: Split,
    runs: Sequence[Run],
    mean_mae: NDArray[np.float64],
    times: Mapping[str, StepTime],
    seconds: float,
) -> list[Path]:
    """The files written, absolute."""
    folder: Path = args.out.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / name for name in ("metrics.json", "history.npz", "report.png")]
    document = {
        "arguments": {name: _plain(value) for name, value in vars(args).items()},
        "environment": {
            "device": device_name(args.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "igb_kernels": igb.__version__,
            "backend": backend_used(args.backend, args.device),
            "python": platform.python_version(),
            "ranks": runs[0].ranks.size,
        },
        "molecules": {"all": len(molecules), "train": len(split.train), "val": len(split.val), "test": len(split.test)},
        "units": {target.name: target.unit for target in TARGETS},
        "predict_the_mean_mae": _by_target(mean_mae),
        "baseline": baseline_of(runs).method,
        "methods": {run.method: _method(run, baseline_of(runs), times.get(run.method)) for run in runs},
        "seconds": seconds,
    }
    files[0].write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    history: dict[str, Any] = {"targets": np.array(TARGET_NAMES)}
    for run in runs:
        history[f"{run.method}/losses"] = run.losses.numpy()
        history[f"{run.method}/weights"] = run.weights.numpy()
    np.savez_compressed(files[1], **history)
    draw(files[2], runs, mean_mae, times, f"QM9, {len(split.train)} training molecules, {args.encoder}, "
         f"batch {args.batch_size}, {device_name(args.device)}")  # fmt: skip
    return files


def _method(run: Run, baseline: Run, step_time: StepTime | None) -> dict[str, Any]:
    times = None
    if step_time is not None:
        times = dataclasses.asdict(step_time) | {"step": step_time.step, "reference_step": step_time.reference_step}
    return {
        "test_mae": _by_target(test_errors(run)),
        "delta_m_percent": delta_m(test_errors(run), test_errors(baseline)),
        "validation": run.val_errors,
        "final_losses": _by_target(run.losses[-1].double().numpy()),
        "steps": run.steps,
        "complete": run.complete,
        "status": igb.Status(run.status).name or "ordinary",
        "training_seconds": run.seconds,
        "step_time_ms": times,
    }


def _by_target(values: NDArray[np.float64]) -> dict[str, float]:
    return dict(zip(TARGET_NAMES, map(float, values), strict=True))


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, (Path, torch.device)) else value
