"""What a profile of balanced steps says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from igb_kernels.balancer import Balancer
from igb_kernels.printing import Section, plain
from igb_kernels.profiling.advice import Figures, advice
from igb_kernels.profiling.instrument import Instruments
from igb_kernels.profiling.recorder import Recorder, Step, median
from igb_kernels.profiling.replay import copy_ms
from igb_kernels.profiling.spans import BALANCING, Phase, Span
from igb_kernels.profiling.trace import chrome_trace

MOST_PASSES = 16
"""Listed one by one."""


@dataclass(frozen=True)
class Part:
    """A part of the step, medians over the measured steps."""

    name: str
    host_ms: float
    device_ms: float | None
    """From event to event on the GPU, so with what it waited; None on the CPU."""
    share: float
    """Of the step, on the GPU where there is one."""


@dataclass(frozen=True)
class Compared:
    """The same work by this backend and by the reference."""

    name: str
    ms: float
    reference_ms: float
    agree: bool
    """Whether both came to the same."""

    @property
    def ratio(self) -> float | None:
        """How many times as long the reference takes; None where the results differ."""
        return self.reference_ms / self.ms if self.agree and self.ms > 0 else None


class profile:
    """Shows where balanced steps go::

        with igb_kernels.profile(balancer) as profile:
            for batch in batches:  # some ten steps
                ...
        print(profile)

    Each step is split into parts, by the host's clock and, on a GPU, by events; nothing waits in a measured step:

    - *forward*: from the end of the optimizer's step (or of the last `backward`, where no `torch.optim` optimizer is
      seen) to `backward`; loading the batch is in it,
    - *backward pass of* each task, by name, or of all of them,
    - *taking gradients*, *loss scales*, *Gramian and norms*, *averages*, *solver*, *combine*, *rest of the balancer*,
    - *between backward and optimizer*: clipping, logging,
    - *optimizer*: `step` and `zero_grad`.

    After `warmup` steps, one is taken with every allocation counted (on the CPU, which slows it down), and up to three
    in which each operation on gradients runs also on the reference backend, with copies of the same gradients: they
    need memory for those. These are not measured. Training goes on as without: gradients, state and random numbers are
    the same bits. On a GPU, PyTorch's statistics of peak memory are reset at each step, and phases are NVTX ranges.

    On exit everything is put back, and the copy floor is measured: copying the K gradients once. A profile costs
    about 0.2 ms of the host's time a step (for K = 3 to 8); without one, balancers have nothing of it in them.

    Args:
        balancer: the balancer whose steps are profiled. One profile at a time.
        warmup: steps before the first that counts.
        steps: the most that are measured; later ones are not looked at.
        reference: whether to run the reference beside.

    Raises:
        TypeError, ValueError: for arguments of the wrong kind.
        RuntimeError: for a balancer that is being profiled.
    """

    def __init__(self, balancer: Balancer, *, warmup: int = 3, steps: int = 100, reference: bool = True) -> None:
        if not isinstance(balancer, Balancer):
            raise TypeError(f"balancer must be an igb_kernels.Balancer, found {type(balancer).__name__}")
        if warmup < 0 or steps < 1:
            raise ValueError(f"warmup must be at least 0, and steps at least 1, found {warmup} and {steps}")
        self._balancer = balancer
        self._options: dict[str, Any] = {"warmup": warmup, "measured": steps, "reference": reference}
        self._recorder: Recorder | None = None
        self._instruments: Instruments | None = None
        self._copy_ms: float | None = None

    def __enter__(self) -> profile:
        if self._recorder is not None:
            raise RuntimeError("a profile is used once: make another")
        if hasattr(self._balancer, "_profiled"):
            raise RuntimeError("the balancer is being profiled: end that first")
        device = self._balancer.shared[0].device
        self._recorder = Recorder(device, self._balancer.shared, **self._options)
        self._instruments = Instruments(self._balancer, self._recorder)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._instruments is not None
        self._instruments.remove()
        self._recorded.close()
        if kind is None:
            self._measure_floor()

    def _measure_floor(self) -> None:
        if self.tasks and self._recorded.row_bytes:
            self._copy_ms = copy_ms(self.tasks * self._recorded.row_bytes, self._recorded.clock)

    # ---- Figures --------------------------------------------------------------------------------------------------

    @property
    def _recorded(self) -> Recorder:
        if self._recorder is None:
            raise RuntimeError("nothing has been profiled: use `with profile:` around training steps")
        return self._recorder

    @property
    def _measured(self) -> list[Step]:
        """The steps that count."""
        found = [step for step in self._recorded.steps if step.kind == "measured"]
        if found and self._recorded.clock.on_gpu:
            torch.cuda.synchronize(self._recorded.clock.device)
        return found

    @property
    def steps(self) -> int:
        """How many steps were measured."""
        return len([step for step in self._recorded.steps if step.kind == "measured"])

    @property
    def begun(self) -> bool:
        """Whether there was a step at all."""
        return bool(self._recorded.steps)

    @property
    def finished(self) -> bool:
        """Whether the steps that were asked for have all been measured."""
        return self._recorded.finished

    @property
    def tasks(self) -> int:
        """K."""
        return max([step.tasks for step in self._recorded.steps], default=0)

    @property
    def step_ms(self) -> float:
        """Milliseconds that a step takes from end to end, on the host's clock."""
        return median([step.start.ms_to(step.end) for step in self._measured if step.end is not None])

    def parts(self) -> list[Part]:
        """The step's parts in order, each backward pass by itself."""
        steps = self._measured
        on_gpu = self._recorded.clock.on_gpu
        names: dict[tuple[Phase, str], None] = {}
        tables = [_by_part(step, on_gpu) for step in steps]
        for phase in Phase:
            names.update(dict.fromkeys(key for table in tables for key in table if key[0] is phase))
        none = (0.0, 0.0)
        rows = []
        for key in names:
            host = median([table.get(key, none)[0] for table in tables])
            device = median([table.get(key, none)[1] for table in tables]) if on_gpu else None
            rows.append((key[1], host, device))
        total = sum([host if device is None else device for _, host, device in rows]) or 1.0
        return [Part(name, host, dev, (host if dev is None else dev) / total) for name, host, dev in rows]

    def compared(self) -> list[Compared]:
        """The operations of a step, by phase, beside the reference backend's."""
        replayed = [step for step in self._recorded.steps if step.kind == "reference" and step.reference]
        if not replayed or not self.steps:
            return []
        ours = [_of_operations(step, self._recorded.clock.on_gpu) for step in self._measured]
        rows = []
        for phase in BALANCING:
            theirs = [sum([ms for p, ms in step.reference if p is phase]) for step in replayed]
            if any(theirs):
                own = median([table.get(phase, 0.0) for table in ours])
                rows.append(Compared(phase.value, own, median(theirs), phase not in self._recorded.wrong))
        total = Compared("all", sum(r.ms for r in rows), sum(r.reference_ms for r in rows), all(r.agree for r in rows))
        return [*rows, total]

    @property
    def copy_ms(self) -> float | None:
        """Milliseconds to copy the K gradients once, measured when the profile ended; None after an error, and where
        there were none."""
        return self._copy_ms

    @property
    def peak_bytes(self) -> int | None:
        """The most memory that a step held beyond what was held when it began. On the CPU, torch's allocations in one
        step after the warm-up; on a GPU, the largest peak of its caching allocator in the measured steps."""
        peaks = [s.peak for s in self._recorded.steps if s.peak is not None and s.kind in ("measured", "memory")]
        return max(peaks, default=None)

    def advice(self) -> list[str]:
        """What to change, or that there is nothing to gain."""
        parts, passes = {part.name: part for part in self.parts()}, self._passes()
        shares = {phase: sum(parts[name].share for name in self._names_of(phase)) for phase in Phase}
        figures = Figures(
            balancer=self._balancer,
            step_ms=self.step_ms,
            device_ms=sum(part.device_ms or 0.0 for part in parts.values()) if self._recorded.clock.on_gpu else None,
            tasks=self.tasks,
            shares=shares,
            copy_ms=self._copy_ms,
            compared=self.compared()[-1].ms if self.compared() else None,
            passes_ms=[part.device_ms if part.device_ms is not None else part.host_ms for part in passes],
            head_ms=self._head_ms(),
            at_representation=self._recorded.at_representation,
            stacked_otherwise=self._recorded.stacked_otherwise,
            backends=self._recorded.backends,
            optimizer=self._recorded.fusible,
        )
        return advice(figures) if self.steps else []

    def _names_of(self, phase: Phase) -> list[str]:
        found = {s.name for step in self._measured for outer in step.spans.outer for s in outer.all()
                 if s.phase is phase}  # fmt: skip
        return sorted(found) if phase is Phase.PASS else ([phase.value] if found else [])

    def _passes(self) -> list[Part]:
        names = set(self._names_of(Phase.PASS))
        return [part for part in self.parts() if part.name in names]

    def _head_ms(self) -> list[float]:
        """Of each watched pass, the time until it came to what all tasks share: medians."""
        on_gpu = self._recorded.clock.on_gpu
        times: dict[str, list[float]] = {}
        for step in self._recorded.steps:
            for span in _spans(step):
                if span.shared_from is not None:
                    to = span.start.device_ms_to if on_gpu else span.start.ms_to
                    times.setdefault(span.name, []).append(to(span.shared_from))
        return [median(values) for values in times.values()]

    # ---- What it shows --------------------------------------------------------------------------------------------

    def sections(self) -> list[Section]:
        """For a terminal."""
        title = f"{self._balancer.losses!r} + {self._balancer.gradients!r}, {self._recorded.clock.device}"
        if not self.steps:
            needed = self._options["warmup"] + 1 + (not self._recorded.clock.on_gpu) + self._options["reference"]
            taken = len(self._recorded.steps)
            return [Section(title, notes=[f"Nothing was measured: {taken} steps were taken, it needs {needed}."])]
        sections = [self._step_section(title), *self._compared_section()]
        notes = [*sorted(self._recorded.notes), *self.advice()]
        return [*sections, Section("What to change", notes=notes)]

    def _step_section(self, title: str) -> Section:
        on_gpu, parts, passes = self._recorded.clock.on_gpu, self.parts(), self._passes()
        shown = [part for part in parts if len(passes) <= MOST_PASSES or part not in passes]
        if len(passes) > 1:
            first = next((i for i, part in enumerate(shown) if part in passes), 1)
            device = sum(part.device_ms or 0.0 for part in passes) if on_gpu else None
            shown.insert(first, Part(f"{len(passes)} backward passes", sum(p.host_ms for p in passes), device,
                                     sum(p.share for p in passes)))  # fmt: skip
        rows = []
        for part in shown:
            times = [part.host_ms] + ([part.device_ms or 0.0] if on_gpu else [])
            indent = "  " if part in passes and len(passes) > 1 else ""
            rows.append((indent + part.name, *[f"{ms:.3f}" for ms in times], f"{100 * part.share:.1f} %"))
        total = [sum(p.host_ms for p in parts)] + ([sum(p.device_ms or 0.0 for p in parts)] if on_gpu else [])
        rows.append(("sum", *[f"{ms:.3f}" for ms in total], "100 %"))
        columns = ("part of the step", ">host ms", *([">device ms"] if on_gpu else []), ">share")
        notes = [
            f"Medians of {self.steps} steps with {self.tasks} tasks; from end to end, the median step takes "
            f"{self.step_ms:.3f} ms."
        ]
        if (peak := self.peak_bytes) is not None:
            row = self._recorded.row_bytes
            notes.append(
                f"Peak memory of a step, beyond what is held before: {peak / 1e6:.3g} MB"
                + (f", {peak / row:.1f} times one task's gradients." if row else ".")
            )
        return Section(title, columns, rows, notes)

    def _compared_section(self) -> list[Section]:
        compared = self.compared()
        if not compared:
            return []
        rows = []
        for c in compared:
            ratio = f"{c.ratio:.1f}" if c.ratio is not None else "results differ" if not c.agree else "–"
            rows.append((c.name, f"{c.ms:.3f}", f"{c.reference_ms:.3f}", ratio))
        backend = " and ".join(sorted(self._recorded.backends))
        notes = [] if self._copy_ms is None else [f"Copying the K gradients once: {self._copy_ms:.3f} ms."]
        columns = ("the same work", f">{backend} ms", ">reference ms", ">ratio")
        return [Section("igb_kernels and the reference backend (PyTorch in float64)", columns, rows, notes)]

    def __str__(self) -> str:
        """All of it, in plain text."""
        return plain(self.sections())

    def to_dict(self) -> dict[str, Any]:
        """For JSON: times in ms, memory in bytes."""
        return {
            "balancer": repr(self._balancer),
            "device": str(self._recorded.clock.device),
            "torch": torch.__version__,
            "tasks": self.tasks,
            "steps": self.steps,
            "step_ms": self.step_ms,
            "parts": [asdict(part) for part in self.parts()],
            "compared": [{**asdict(c), "ratio": c.ratio} for c in self.compared()],
            "backends": sorted(self._recorded.backends),
            "copy_ms": self._copy_ms,
            "gradient_bytes": self._recorded.row_bytes,
            "peak_bytes": self.peak_bytes,
            "advice": self.advice(),
            "notes": sorted(self._recorded.notes),
        }

    def export_chrome_trace(self, path: str | Path) -> None:
        """Writes all steps for chrome://tracing or ui.perfetto.dev, the warm-up ones included."""
        Path(path).write_text(json.dumps(chrome_trace(self._recorded)))


def _spans(step: Step) -> list[Span]:
    return [span for outer in step.spans.outer for span in outer.all() if span.end is not None]


def _sums(step: Step, key: Callable[[Span], Any], on_gpu: bool) -> dict[Any, tuple[float, float]]:
    """Host and device ms of spans, added up by key."""
    sums: dict[Any, tuple[float, float]] = {}
    for span in _spans(step):
        host, device = sums.get(key(span), (0.0, 0.0))
        sums[key(span)] = host + span.host_ms(), device + (span.device_ms() if on_gpu else 0.0)
    return sums


def _by_part(step: Step, on_gpu: bool) -> dict[tuple[Phase, str], tuple[float, float]]:
    def part(span: Span) -> tuple[Phase, str]:
        return span.phase, span.name if span.phase is Phase.PASS else span.phase.value

    return _sums(step, part, on_gpu)


def _of_operations(step: Step, on_gpu: bool) -> dict[Phase, float]:
    """What the backend's operations took, by phase."""
    operations = [s for s in _spans(step) if s.operation]
    sums: dict[Phase, float] = {}
    for span in operations:
        sums[span.phase] = sums.get(span.phase, 0.0) + (span.device_ms() if on_gpu else span.host_ms())
    return sums
