"""A training job for every balancer, which dies and is started again: what `test_resume` runs in a process of its own.

Each attempt is a fork of a process that has only imported, so it starts afresh, as after `python train.py`.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import igb_kernels as igb
from igb_kernels import losses
from igb_kernels.gradients import METHODS

from .models import TASKS
from .test_state import STATES, Run, igb_v2

ROUNDS = 8
DIES_IN = 5
"""The round in which the first two attempts die; the rounds before are in the checkpoint."""
DIES_IN_STEP_OF = "moco"
"""Somewhere within a round, so that some balancers are a step ahead of the checkpoint."""

UNSEEDED = {
    "unseeded pcgrad": lambda: {"gradients": "pcgrad"},
    "unseeded gradvac": lambda: {"gradients": "gradvac"},
    "unseeded grad_drop": lambda: {"gradients": "grad_drop"},
    "unseeded rlw": lambda: {"gradients": losses.RLW()},
    "unseeded igb_v2": lambda: igb_v2(background=True, seed=None),
}
JOBS: dict[str, Callable[[], dict[str, Any]]] = {
    **{name: partial(dict, gradients=name) for name in METHODS if name not in {"grad_norm"}},
    **STATES,
    **UNSEEDED,
    "moco after uw": lambda: {"gradients": igb.MoCo(gamma=0.1), "losses": losses.UW(TASKS)},
}

Curves = dict[str, list[Any]]
"""Of each balancer and round: the losses, and a digest of everything else that the step shows."""


def train(folder: Path | None = None, die: str = "") -> Curves:
    """Trains all in rotation, from the checkpoint in the folder if there is one; with a folder, saves after a round.

    `die` says where the process is to be killed: in a "step", or while it makes a "save"."""
    torch.set_num_threads(1)
    torch.manual_seed(os.getpid())  # what a job draws from the global generator differs from attempt to attempt
    runs, first, curves = {name: Run(make) for name, make in JOBS.items()}, 0, {name: [] for name in JOBS}
    if folder is not None and (path := folder / "checkpoint.pt").exists():
        saved = torch.load(path, weights_only=True)
        first, curves = saved["round"], saved["curves"]
        for name, run in runs.items():
            run.load(saved["runs"][name])
    for step in range(first, ROUNDS):
        for name, run in runs.items():
            if die == "step" and step == DIES_IN and name == DIES_IN_STEP_OF:
                run.net.heads[1].weight.register_hook(lambda _: os.kill(os.getpid(), signal.SIGKILL))
            curves[name].append(seen(run.steps(step, step + 1)))
        if folder is not None:
            save(folder, {"round": step + 1, "curves": curves, "runs": runs}, die == "save" and step == DIES_IN)
    return curves


def save(folder: Path, checkpoint: dict[str, Any], die: bool) -> None:
    """So that the file is there as a whole or not at all."""
    temporary = folder / "checkpoint.tmp"
    states = {name: run.states() for name, run in checkpoint["runs"].items()}
    with open(temporary, "wb") as file:
        torch.save({**checkpoint, "runs": states}, file)
        if die:
            file.truncate(file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    os.replace(temporary, folder / "checkpoint.pt")


def seen(trace: list[Any]) -> list[Any]:
    """The losses of a step's first half, to be read; and a digest of the whole trace."""
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            digest.update(str((part.dtype, tuple(part.shape))).encode())
            digest.update(part.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(part, list):
            for one in part:
                add(one)

    add(trace)
    return [trace[0][0].tolist(), digest.hexdigest()]


def attempt(folder: Path, die: str) -> int:
    """The exit status of an attempt in a forked process: minus the signal that killed it."""
    child = os.fork()
    if not child:
        train(folder, die)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    Run(STATES["igb_v2 in the background"])  # imports what is imported late, once for all attempts
    statuses = [attempt(folder, die) for die in ("step", "save", "")]
    curves = torch.load(folder / "checkpoint.pt", weights_only=True)["curves"]
    (folder / "result.pkl").write_bytes(pickle.dumps((statuses, curves)))
