"""Interleaved comparison on top of pytest-benchmark, and the table at the end."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

import igb_kernels as igb

Contender = Callable[..., object]


class Comparison:
    """Times a function of ours with pytest-benchmark and, between its rounds, its rivals.

    Close rivals run once in every round, so that whatever else the machine does hits all alike. Those that are slower
    by far, and leave memory in disorder, run a few times before. Figures are medians; the ratio to a close rival is
    the median of the rounds' ratios.
    """

    SLOW_ROUNDS = 3

    def __init__(self, benchmark) -> None:
        self._benchmark = benchmark

    def __call__(
        self,
        ours: Contender,
        rivals: Mapping[str, Contender],
        slow_rivals: Mapping[str, Contender],
        *,
        rounds: int,
        setup: Callable[[], tuple] = tuple,
        moved_bytes: int = 0,
    ) -> None:
        def timed(function: Contender) -> float:
            arguments = setup()
            start = time.perf_counter()
            function(*arguments)
            return time.perf_counter() - start

        slow = {name: statistics.median(timed(f) for _ in range(self.SLOW_ROUNDS)) for name, f in slow_rivals.items()}
        seconds: dict[str, list[float]] = {name: [] for name in rivals}

        def between_rounds() -> tuple[tuple, dict]:
            for name, rival in rivals.items():
                seconds[name].append(timed(rival))
            return setup(), {}

        self._benchmark.pedantic(ours, setup=between_rounds, rounds=rounds, warmup_rounds=3, iterations=1)
        own = self._benchmark.stats.stats.data
        median = statistics.median(own)
        info = self._benchmark.extra_info
        info["ms"] = 1e3 * median
        if moved_bytes:
            info["GB/s"] = moved_bytes / median / 1e9
        for name, times in seconds.items():
            info[f"{name} ms"] = 1e3 * statistics.median(times[-len(own) :])
            info[f"ours / {name}"] = statistics.median(a / b for a, b in zip(own, times[-len(own) :], strict=True))
        for name, time_ in slow.items():
            info[f"{name} ms"], info[f"ours / {name}"] = 1e3 * time_, median / time_


@pytest.fixture
def compare(benchmark) -> Comparison:
    if benchmark.disabled:
        pytest.skip("benchmarks run with --benchmark-enable (make bench)")
    torch.manual_seed(0)
    return Comparison(benchmark)


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    kept = {key: machine_info[key] for key in ("system", "machine", "python_version")}
    machine_info.clear()
    machine_info.update(
        kept,
        cpu=_cpu_name(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        igb_kernels=igb.__version__,
        backends={name: str(availability) for name, availability in igb.backends().items()},
    )


def pytest_benchmark_update_commit_info(config, commit_info) -> None:
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    commit_info.clear()
    commit_info.update(id=head.stdout.strip())


def pytest_terminal_summary(terminalreporter, config) -> None:
    benchmarks = getattr(config, "_benchmarksession", None)
    if benchmarks is None or not benchmarks.benchmarks:
        return
    terminalreporter.section("ratios (below 1: ours is faster)")
    terminalreporter.write_line(
        f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for bench in benchmarks.benchmarks:
        info = bench.extra_info
        ratios = ", ".join(
            f"{key.removeprefix('ours / ')} {info[key.removeprefix('ours / ') + ' ms']:.3g} ms → {value:.3f}"
            for key, value in info.items()
            if key.startswith("ours / ")
        )
        rate = f" ({info['GB/s']:.0f} GB/s)" if "GB/s" in info else ""
        terminalreporter.write_line(f"{bench.name}: {info['ms']:.4g} ms{rate}; {ratios}")
