"""Interleaved comparison, on the CPU by pytest-benchmark and on a GPU by events, and the table at the end."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

import igb_kernels as igb
from igb_kernels.bench.machine import commit
from igb_kernels.doctor.installation import processor

Contender = Callable[..., object]


def pytest_addoption(parser) -> None:
    group = parser.getgroup("igb_kernels")
    group.addoption("--gpu", action="store_true", help="run the benchmarks on the GPU, and time them by events")
    group.addoption("--gpu-json", metavar="PATH", help="where to save what was measured on the GPU")


@pytest.fixture
def device(request) -> torch.device:
    """Where the gradients and models are."""
    return torch.device("cuda" if request.config.getoption("--gpu") else "cpu")


@pytest.fixture
def backends(device) -> list[str]:
    """The backends to compare, ours first."""
    if device.type == "cpu":
        return ["auto"]
    names = [name for name in ("cuda", "triton") if igb.backends()[name]]
    assert names, igb.backends()
    return names


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


class DeviceComparison:
    """Times functions on the GPU: the device's time between two events, and the host's until the call returns.

    The host's time is that of a call to an idle GPU. For the device's, the GPU is first given work for as long as the
    host needs to put the whole call on it, so that it never waits for the host, except where the call waits for it.
    Contenders take turns, and figures are medians.
    """

    SLOW_ROUNDS = 3
    MOST_ROUNDS = 30
    CYCLES_PER_SECOND = 2e9
    LONGEST_LEAD = 0.03

    def __init__(self, name: str, results: list[dict[str, object]]) -> None:
        self._name, self._results = name, results

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
        contenders = {"ours": ours, **rivals, **slow_rivals}
        host: dict[str, list[float]] = {name: [] for name in contenders}
        device: dict[str, list[float]] = {name: [] for name in contenders}

        def run(name: str, lead: float) -> tuple[float, float]:
            """Seconds of the host and milliseconds of the device."""
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            arguments = setup()
            torch.cuda.synchronize()
            torch.cuda._sleep(int(self.CYCLES_PER_SECOND * lead))
            start.record()
            began = time.perf_counter()
            contenders[name](*arguments)
            took = time.perf_counter() - began
            end.record()
            torch.cuda.synchronize()
            return took, start.elapsed_time(end)

        leads = {}
        for name in contenders:
            run(name, 0)
            leads[name] = min(1.5 * run(name, 0)[0] + 1e-4, self.LONGEST_LEAD)
        for i in range(min(rounds, self.MOST_ROUNDS)):
            for name in contenders:
                if name not in slow_rivals or i < self.SLOW_ROUNDS:
                    host[name].append(run(name, 0)[0])
                    device[name].append(run(name, leads[name])[1])
        info: dict[str, object] = {"name": self._name}
        for name in contenders:
            prefix = "" if name == "ours" else f"{name} "
            info[f"{prefix}ms"] = statistics.median(device[name])
            info[f"{prefix}host ms"] = 1e3 * statistics.median(host[name])
            if prefix:
                info[f"ours / {name}"] = info["ms"] / info[f"{name} ms"]
        if moved_bytes:
            info["GB/s"] = moved_bytes / info["ms"] / 1e6
        self._results.append(info)


GPU_RESULTS = pytest.StashKey[list[dict[str, object]]]()


@pytest.fixture
def compare(request, device) -> Comparison | DeviceComparison:
    torch.manual_seed(0)
    if device.type == "cuda":
        results = request.config.stash.setdefault(GPU_RESULTS, [])
        return DeviceComparison(request.node.name, results)
    benchmark = request.getfixturevalue("benchmark")
    if benchmark.disabled:
        pytest.skip("benchmarks run with --benchmark-enable (make bench) or --gpu (make gpu-check)")
    return Comparison(benchmark)


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    kept = {key: machine_info[key] for key in ("system", "machine", "python_version")}
    machine_info.clear()
    machine_info.update(
        kept,
        cpu=processor(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        igb_kernels=igb.__version__,
        backends={name: str(availability) for name, availability in igb.backends().items()},
    )


def pytest_benchmark_update_commit_info(config, commit_info) -> None:
    commit_info.clear()
    commit_info.update(id=commit())


def _table_line(info: Mapping[str, object]) -> str:
    ratios = ", ".join(
        f"{key.removeprefix('ours / ')} {info[key.removeprefix('ours / ') + ' ms']:.3g} ms → {value:.3f}"
        for key, value in info.items()
        if key.startswith("ours / ")
    )
    rate = f" ({info['GB/s']:.0f} GB/s)" if "GB/s" in info else ""
    host = f" (host {info['host ms']:.3g} ms)" if "host ms" in info else ""
    return f"{info['ms']:.4g} ms{rate}{host}; {ratios}"


def _report_gpu(terminalreporter, config, results: list[dict[str, object]]) -> None:
    machine = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "igb_kernels": igb.__version__,
        "backends": {name: str(availability) for name, availability in igb.backends().items()},
    }
    terminalreporter.section("ratios of device time (below 1: ours is faster)")
    terminalreporter.write_line(f"{machine['device']}, torch {torch.__version__}; ours: {machine['backends']}")
    for info in results:
        terminalreporter.write_line(f"{info['name']}: {_table_line(info)}")
    if path := config.getoption("--gpu-json"):
        saved = {"machine": machine, "commit": commit(), "benchmarks": results}
        Path(path).write_text(json.dumps(saved, indent=1) + "\n")


def pytest_terminal_summary(terminalreporter, config) -> None:
    if results := config.stash.get(GPU_RESULTS, None):
        _report_gpu(terminalreporter, config, results)
    benchmarks = getattr(config, "_benchmarksession", None)
    if benchmarks is None or not benchmarks.benchmarks:
        return
    terminalreporter.section("ratios (below 1: ours is faster)")
    terminalreporter.write_line(
        f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for bench in benchmarks.benchmarks:
        terminalreporter.write_line(f"{bench.name}: {_table_line(bench.extra_info)}")
