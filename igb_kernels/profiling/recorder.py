"""The steps of a balancer as they are taken, in spans."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from igb_kernels.backends import captures_graph
from igb_kernels.profiling.graph import meeting
from igb_kernels.profiling.memory import PeakOfAllocations
from igb_kernels.profiling.replay import NotReplayed, Replay, agree, results
from igb_kernels.profiling.spans import Clock, Moment, Phase, Span, Spans

ALL_TASKS = "backward pass of all tasks"
BEHIND = "backward pass behind the representation"
REPLAYS = 3
BETWEEN_REPLAYS = 4


@dataclass
class Step:
    """One step, from the end of the optimizer's last one to the end of its next."""

    kind: str
    """"warm-up", "memory", "reference" or "measured"; figures come from the last."""
    start: Moment
    spans: Spans
    end: Moment | None = None
    tasks: int = 0
    optimizer: bool = False
    """Whether one was seen."""
    peak: int | None = None
    """Bytes, beyond what there was at the start."""
    total_peak: int | None = None
    """Bytes, on a GPU."""
    reference: list[tuple[Phase, float]] = field(default_factory=list)
    """What the reference took for each operation, in ms."""


_NOWHERE = nullcontext()


class _Within:
    """A context that is a span."""

    __slots__ = ("_name", "_operation", "_phase", "_span", "_spans")

    def __init__(self, spans: Spans, phase: Phase, name: str, operation: bool) -> None:
        self._spans, self._phase, self._name, self._operation = spans, phase, name, operation

    def __enter__(self) -> None:
        self._span = self._spans.begin(self._phase, self._name)
        self._span.operation = self._operation

    def __exit__(self, *raised: object) -> None:
        self._spans.end(self._span)


class Recorder:
    """Follows the steps: is told when things begin and end, and never waits for the device in a measured step."""

    def __init__(
        self, device: torch.device, shared: Sequence[Tensor], *, warmup: int, measured: int, reference: bool
    ) -> None:
        self.clock = Clock(device)
        self.shared, self.warmup, self.most, self.reference = shared, warmup, measured, reference
        self.steps: list[Step] = []
        self._measured = 0
        self.notes: set[str] = set()
        self.wrong: set[Phase] = set()
        """Where the reference came to something else."""
        self.backends: set[str] = set()
        self.row_bytes = 0
        """Of one task's gradients, where they are compared."""
        self.fusible: str | None = None
        """An optimizer that could be fused and is not."""
        self._shared_ids = {id(p) for p in shared}
        self.at_representation = self.stacked_otherwise = False
        self.balancing = False
        """Whether a step's passes are run now."""
        self._replay = Replay(self.clock)
        self._thread = threading.get_ident()
        self._allocations: PeakOfAllocations | None = None
        self._labels: dict[Any, list[str]] = {}
        self._whole: Tensor | None = None
        self._roots: list[Node] = []
        self._after: Span | None = None
        self._step = self._new_step(self.clock.now())
        self._forward: Span | None = self._step.spans.begin(Phase.FORWARD, at=self._step.start)

    # ---- Steps ----------------------------------------------------------------------------------------------------

    @property
    def finished(self) -> bool:
        """Whether all steps that were asked for have been measured."""
        return self._measured >= self.most

    def _kind(self, number: int) -> str:
        after = number - self.warmup
        if after < 0:
            return "warm-up"
        if after == 0 and not self.clock.on_gpu:
            return "memory"
        first = 0 if self.clock.on_gpu else 1
        turn, rest = divmod(after - first, BETWEEN_REPLAYS)
        return "reference" if self.reference and rest == 0 and turn < REPLAYS else "measured"

    def _new_step(self, start: Moment) -> Step:
        if self.finished:
            return Step("over", start, Spans(self.clock))
        step = Step(self._kind(len(self.steps)), start, Spans(self.clock))
        if step.kind == "memory":
            if PeakOfAllocations.possible():
                self._allocations = PeakOfAllocations()
            else:
                self.notes.add("Memory was not measured: another profiler is running.")
        if self.clock.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.clock.device)
            self._held = torch.cuda.memory_allocated(self.clock.device)
        return step

    def _finish(self, at: Moment) -> None:
        step = self._step
        step.end = at
        if step.kind == "over":
            return
        step.peak = self._stop_counting()
        if self.clock.on_gpu:
            step.total_peak = torch.cuda.max_memory_allocated(self.clock.device)
            step.peak = step.total_peak - self._held
        self.steps.append(step)
        self._measured += step.kind == "measured"

    def _next_step(self, at: Moment, forward: Span | None = None) -> None:
        """Ends the step, and begins the next; `forward` is what has been seen of it."""
        self._finish(at)
        last, self._after = self._step, None
        self._step = self._new_step(at)
        if forward is not None:
            forward.phase, forward.name = Phase.FORWARD, Phase.FORWARD.value
            self._step.spans.outer.append(forward)
            return
        if "memory" in (last.kind, self._step.kind):  # the counting begins or ends here
            self._step.start = self.clock.now()
        self._forward = self._step.spans.begin(Phase.FORWARD, at=self._step.start)

    def close(self) -> None:
        """No more steps."""
        if self._after is not None:  # no optimizer has come since the last backward
            self._step.spans.end(self._after)
            self._step.spans.outer.remove(self._after)
            self._finish(self._after.start)
            self._after = None
        self._stop_counting()
        if self._step.spans.open:
            self._step.spans.end(self._step.spans.open[0])

    def _stop_counting(self) -> int | None:
        counted, self._allocations = self._allocations, None
        return None if counted is None else counted.stop()

    # ---- What the balancer is called for --------------------------------------------------------------------------

    @contextmanager
    def backward(self, losses: Any, independent: Sequence[Any], *, ends_step: bool) -> Iterator[Callable[[Any], None]]:
        """Around `Balancer.backward` or `accumulate`; yields what is to be told its result."""
        if self._after is not None:  # no optimizer has been seen since the last one: what ran is the forward pass
            between = self._after
            self._step.spans.end(between)
            self._step.spans.outer.remove(between)
            self._next_step(between.start, between)
        if self._forward is not None:
            self._step.spans.end(self._forward)
            self._forward = None
        self._labels, self._whole, self._roots = {}, None, []
        for batch in (losses, *independent):
            self._read(batch)
        self._thread = threading.get_ident()
        self.balancing = self._step.kind != "over"
        span = self._step.spans.begin(Phase.BALANCER)
        names: tuple[str, ...] | None = None
        tasks = 0

        def tell(result: Any) -> None:
            nonlocal names, tasks
            names, tasks = result.names, len(result.losses)

        hooks = self._watch_arrivals() if self._step.kind == "reference" else []
        done = False
        try:
            yield tell
            done = True
        finally:
            for hook in hooks:
                hook.remove()
            self.balancing = False
            end = self._step.spans.end(span)
            if not done:  # a step that raised is none
                self._stop_counting()
                self._step = self._new_step(end)
                self._forward = self._step.spans.begin(Phase.FORWARD, at=end)
        if done:
            self._name_passes(span, names)
            if ends_step:
                self._step.tasks = tasks
                self._after = self._step.spans.begin(Phase.AFTER, at=end)
            else:
                self._forward = self._step.spans.begin(Phase.FORWARD, at=end)

    def _watch_arrivals(self) -> list[Any]:
        """Hooks that note when a pass comes to what all tasks share."""

        def note(_: Any) -> None:
            for span in reversed(self._step.spans.open):
                if span.phase is Phase.PASS:
                    span.shared_from = span.shared_from or self.clock.now()
                    return

        nodes = [] if self._whole is not None or len(self._roots) < 2 else meeting(self._roots, self._shared_ids)
        return [node.register_prehook(note) for node in nodes]

    def _read(self, losses: Any) -> None:
        """Which task the root of a pass belongs to."""
        if isinstance(losses, Mapping):
            for name, loss in losses.items():
                self._add_root(loss, str(name))
        elif isinstance(losses, Tensor) and losses.dim() == 1:
            function = losses.grad_fn
            edges = function.next_functions if function is not None and function.name() == "StackBackward0" else ()
            if len(edges) == len(losses):
                for k, edge in enumerate(edges):
                    self._labels.setdefault(edge, []).append(f"#{k}")
                self._roots += [node for node, _ in edges if node is not None]
            else:
                self._whole, self.stacked_otherwise = losses, len(losses) > 1
                self._labels.setdefault(id(losses), []).extend(f"#{k}" for k in range(len(losses)))
        elif isinstance(losses, Sequence):
            for k, loss in enumerate(losses):
                self._add_root(loss, f"#{k}")

    def _add_root(self, loss: Any, label: str) -> None:
        self._labels.setdefault(id(loss), []).append(label)
        if isinstance(loss, Tensor) and loss.grad_fn is not None:
            self._roots.append(loss.grad_fn)

    def _name(self, roots: Any) -> str:
        """Of the pass that starts at these."""
        if isinstance(roots, GradientEdge):
            labels = self._labels.get((roots.node, roots.output_nr))
        elif isinstance(roots, Tensor):
            labels = self._labels.get(id(roots))
        else:
            of_losses = any(
                (root.node, root.output_nr) in self._labels
                if isinstance(root, GradientEdge)
                else id(root) in self._labels
                for root in roots
            )
            return ALL_TASKS if of_losses else BEHIND
        if not labels:
            return BEHIND
        labels.append(labels.pop(0))  # of tasks with the same root, the next
        return labels[-1]

    def _name_passes(self, whole: Span, names: tuple[str, ...] | None) -> None:
        passes = [span for span in whole.all() if span.phase is Phase.PASS]
        if self._whole is not None and len(passes) == 1 and len(self._whole) > 1:
            passes[0].name = ALL_TASKS
        for span in passes:
            if span.name in (ALL_TASKS, BEHIND):
                continue
            task = span.name
            if task.startswith("#") and task[1:].isdigit():
                k = int(task[1:])
                task = names[k] if names is not None else f"task {k}"
            span.name = f"backward pass of {task}"

    # ---- What runs in it ------------------------------------------------------------------------------------------

    def within(self, phase: Phase, name: str = "", operation: bool = False) -> AbstractContextManager[object]:
        """A span, while a step is balanced."""
        return _Within(self._step.spans, phase, name, operation) if self.balancing else _NOWHERE

    def backward_pass(self, roots: Any) -> AbstractContextManager[object]:
        """Around autograd's engine, started at `roots`."""
        return self.within(Phase.PASS, self._name(roots) if self.balancing else "")

    def operation(self, run: Callable[..., Any], name: str, phase: Phase, label: str, arguments: Sequence[Any]) -> Any:
        """Runs an operation of a backend; in some steps also by the reference, on copies."""
        if not self.balancing:
            return run(*arguments)
        if self._step.kind == "reference":
            return self._beside_reference(run, name, phase, label, arguments)
        with _Within(self._step.spans, phase, label, True):
            return run(*arguments)

    def _beside_reference(
        self, run: Callable[..., Any], name: str, phase: Phase, label: str, arguments: Sequence[Any]
    ) -> Any:
        expected = None
        with self.within(Phase.REFERENCE):
            try:
                ms, expected = self._replay.run(name, arguments)
                self._step.reference.append((phase, ms))
            except NotReplayed as reason:
                self.notes.add(f"Not compared with the reference: {reason}.")
                self.reference = False
        with self.within(phase, label, operation=True):
            returned = run(*arguments)
        if expected is not None:
            with self.within(Phase.REFERENCE):
                if not agree(name, results(name, arguments, returned), expected):
                    self.wrong.add(phase)
        return returned

    # ---- What runs around it --------------------------------------------------------------------------------------

    def optimizer_begins(self) -> Span | None:
        """An optimizer's step, or its `zero_grad`."""
        if threading.get_ident() != self._thread or self.balancing or captures_graph(self.clock.device):
            return None
        return self._step.spans.begin(Phase.OPTIMIZER)

    def optimizer_ends(self, span: Span, optimizer: torch.optim.Optimizer | None = None) -> None:
        """It has ended; with an optimizer of shared parameters, after a backward, so has the step."""
        end = self._step.spans.end(span)
        if optimizer is None:
            return
        if optimizer.defaults.get("fused", True) is None and not optimizer.defaults.get("foreach"):
            self.fusible = type(optimizer).__name__
        if self._after is not None and any(id(p) in self._shared_ids for p in leaf_parameters(optimizer)):
            self._step.spans.end(self._after, at=end)
            self._step.optimizer = True
            self._next_step(end)

    @contextmanager
    def around(self) -> Iterator[None]:
        """`Balancer.after_step`, which comes behind the optimizer's step."""
        if not self._step.spans.open or captures_graph(self.clock.device):
            yield
            return
        span = self._step.spans.begin(Phase.SCALES, "loss scales: after_step")
        try:
            yield
        finally:
            self._step.spans.end(span)


def median(values: Sequence[float]) -> float:
    """0 of none."""
    return statistics.median(values) if values else 0.0


def leaf_parameters(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter | Tensor]:
    """All that an optimizer updates."""
    for group in optimizer.param_groups:
        yield from group["params"]
