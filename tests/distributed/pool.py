"""Processes that run functions together, as ranks of a process group."""

from __future__ import annotations

import datetime
import multiprocessing
import multiprocessing.connection
import os
import socket
import traceback
from collections.abc import Callable, Sequence
from typing import Any

LIMIT = 60
"""Seconds that a function may take."""

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch.distributed.tensor", "torch.nn.parallel", "torch._dynamo", "stable_baselines3", "igb_kernels.balancer"]
)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


class Pool:
    """N processes that are ranks 0 to N - 1; functions must be importable, and get the rank first."""

    def __init__(self, size: int, timeout: float = LIMIT / 2, backend: str = "gloo") -> None:
        self.size, self._timeout = size, timeout
        port = free_port()
        self._pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = _context.Pipe()
            process = _context.Process(target=_serve, args=(rank, size, port, theirs, timeout, backend), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the function returns on each rank; the first error of a rank is raised here."""
        return self.run_each(function, [arguments] * self.size)

    def run_each(self, function: Callable[..., Any], arguments: Sequence[Sequence[Any]]) -> list[Any]:
        """As `run`, with arguments of each rank's own."""
        for pipe, own in zip(self._pipes, arguments, strict=True):
            pipe.send((function, own))
        found: list[Any] = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(LIMIT):
                self.close()
                raise TimeoutError(f"rank {rank} has not answered after {LIMIT} s")
            found.append(pipe.recv())
        if errors := [f"rank {rank} failed:\n{value}" for rank, (right, value) in enumerate(found) if not right]:
            raise AssertionError("\n".join(errors))
        return [value for _, value in found]

    def answers(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """As `run`, with None for ranks that have died."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        found: list[Any] = []
        for pipe in self._pipes:
            try:
                found.append(pipe.recv()[1] if pipe.poll(LIMIT) else None)
            except EOFError:
                found.append(None)
        for process, answer in zip(self.processes, found, strict=True):
            if answer is None:
                process.join(LIMIT)
        return found

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(
    rank: int, size: int, port: int, pipe: multiprocessing.connection.Connection, timeout: float, backend: str
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=timeout))
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(rank, *arguments)))
        except BaseException:  # as torch's CheckpointException
            pipe.send((False, traceback.format_exc()))
