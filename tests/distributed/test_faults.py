"""A rank that dies ends the others with a clear error; a restarted run goes on with the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from balancer.models import same

from .elastic import STEPS
from .pool import Pool
from .runs import Training


def dies_in_mid_step(rank: int) -> str:
    training = Training("db_mtl", 3, rank)
    training.run(0, 2)
    losses = training.losses(2)
    grads = [p.grad for p in training.params]
    if rank == 2:
        losses[1].register_hook(lambda grad: os.kill(os.getpid(), signal.SIGKILL))
    try:
        training.balancer.backward(losses)
    except RuntimeError as error:
        assert all(p.grad is g for p, g in zip(training.params, grads, strict=True))
        return str(error)
    return "no error"


def test_the_others_end_with_an_error_in_time():
    pool = Pool(3, timeout=10)
    try:
        start = time.monotonic()
        said = pool.answers(dies_in_mid_step)
        assert time.monotonic() - start < 30
        for rank in (0, 1):
            assert said[rank].startswith(f"rank {rank} of 3 waits in vain for another one, which has ended, hangs, or")
        assert said[2] is None
        assert pool.processes[2].exitcode == -signal.SIGKILL
    finally:
        pool.close()


def whole(rank: int, name: str) -> list[torch.Tensor]:
    return Training(name, 2, rank).run(0, STEPS)["params"]


def test_torchrun_restarts_and_the_run_goes_on_with_the_same_bits(two, tmp_path):
    script = Path(__file__).with_name("elastic.py")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1",
        "--monitor-interval=0.2", str(script), str(tmp_path), "igb_v1+db_mtl",
    ]  # fmt: skip
    # Its store would hold the addresses of the first start, and ranks of the second try to reach them.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "starts").read_text() == "01"  # as often
    assert same(torch.load(tmp_path / "params.pt"), two.run(whole, "igb_v1+db_mtl")[0])
