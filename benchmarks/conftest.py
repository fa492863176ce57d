"""What the suites share: the package's harness, its rounds as pytest-benchmark's statistics, and the results' file."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import igb_kernels as igb
from igb_kernels.bench.cases import Case
from igb_kernels.bench.command import sections
from igb_kernels.bench.machine import commit, machine, results
from igb_kernels.bench.measure import Contender, Harness
from igb_kernels.bench.results import Measurement
from igb_kernels.printing import plain

LEAST_ROUNDS = 3
"""Few, so that all suites take ten minutes on two cores."""
MEASUREMENTS = pytest.StashKey[list[Measurement]]()
REMARKS = pytest.StashKey[list[str]]()


def pytest_addoption(parser) -> None:
    group = parser.getgroup("igb_kernels")
    group.addoption("--gpu", action="store_true", help="run the benchmarks on the GPU, and time them by events")
    group.addoption("--results", metavar="PATH", help="where to save what was measured, for `igb_kernels report`")
    group.addoption("--seconds", type=float, default=0.3, help="of each benchmark's rounds (default: %(default)s)")


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


# ---- Measuring ----------------------------------------------------------------------------------------------------

_now = 0.0


def clock() -> float:
    """Of pytest-benchmark: goes on by what the harness has measured."""
    return _now


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=clock))


def _feed(benchmark, harness: Harness, measurement: Measurement) -> None:
    rounds = iter(harness.rounds)

    def one_round() -> None:
        global _now
        _now += next(rounds)

    benchmark.pedantic(one_round, rounds=len(harness.rounds))
    benchmark.extra_info.update(asdict(measurement))


@pytest.fixture
def measure(request, device) -> Callable[[Case], Measurement]:
    """Runs a case. Our results must be right."""
    torch.manual_seed(0)
    config = request.config
    benchmark = None if device.type == "cuda" else request.getfixturevalue("benchmark")
    if benchmark is not None and benchmark.disabled:
        pytest.skip("benchmarks run with --benchmark-enable (make bench) or --gpu (make gpu-check)")
    harness = Harness(device, seconds=config.getoption("--seconds"), least_rounds=LEAST_ROUNDS)

    def run(case: Case) -> Measurement:
        measurement = case.run(harness)
        remarks = config.stash.setdefault(REMARKS, [])
        remarks += [remark for remark in harness.remarks if remark not in remarks]
        if measurement is None:
            pytest.skip("; ".join(harness.remarks))
        config.stash.setdefault(MEASUREMENTS, []).append(measurement)
        if benchmark is not None:
            _feed(benchmark, harness, measurement)
        assert not measurement.note, "a speed is worth nothing where the results disagree"
        return measurement

    return run


@pytest.fixture
def compare(request, device, measure) -> Callable[..., Measurement]:
    """Times a function and its rivals on the same arguments; that they do the same is the test's to see."""
    given = request.node.callspec.params if hasattr(request.node, "callspec") else {}

    def run(
        ours: Callable[..., object],
        rivals: Mapping[str, Callable[..., object]],
        slow_rivals: Mapping[str, Callable[..., object]],
        *,
        rounds: int = 0,
        setup: Callable[[], tuple] | None = None,
        moved_bytes: int | None = None,
    ) -> Measurement:
        """At most so many rounds."""

        def case(harness: Harness) -> Measurement:
            harness.most_rounds = rounds or harness.most_rounds
            harness.least_rounds = min(harness.least_rounds, harness.most_rounds)
            return harness.measure(
                Contender(ours, setup=setup),
                {name: Contender(call) for name, call in {**rivals, **slow_rivals}.items()},
                suite=request.node.originalname.removeprefix("test_"),
                name=given.get("method", request.node.name),
                tasks=given.get("tasks", 0),
                params=0,
                dtype=torch.float32,
                backend=igb_backend(device),
                moved_bytes=moved_bytes,
                model=given.get("model"),
            )

        return measure(Case(request.node.name, case))

    return run


def igb_backend(device: torch.device) -> str:
    """What "auto" gives."""
    from igb_kernels.bench.cases import Options

    return Options(device=device).backend_name()


# ---- Reporting ----------------------------------------------------------------------------------------------------


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    machine_info.clear()
    machine_info.update(machine("cuda" if config.getoption("--gpu") else "cpu"))


def pytest_benchmark_update_commit_info(config, commit_info) -> None:
    commit_info.clear()
    commit_info.update(id=commit())


def pytest_terminal_summary(terminalreporter, config) -> None:
    measurements = config.stash.get(MEASUREMENTS, [])
    if not measurements:
        return
    line = shlex.join(["python", "-m", "pytest", *config.invocation_params.args])
    found = results(measurements, line, "cuda" if config.getoption("--gpu") else "cpu")
    terminalreporter.section("measured")
    terminalreporter.write_line(plain(sections(found, config.stash.get(REMARKS, []))))
    if path := config.getoption("--results"):
        found.save(Path(path))
