"""The monitor: a buffer on the device that steps are copied to, and what becomes of a full one."""

from __future__ import annotations

import atexit
import time
import weakref
from collections import deque
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import combinations
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from igb_kernels._compile import uncompiled
from igb_kernels._log import warn_once
from igb_kernels.backends import captures_graph
from igb_kernels.monitor.block import Block, Mark
from igb_kernels.monitor.watch import Thresholds, Watch
from igb_kernels.monitor.writers import Destination, writers_of
from igb_kernels.result import BalanceResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Monitor:
    """Records what balanced steps do, writes it, draws it, and warns where it should not go on.

    ::

        with igb_kernels.Monitor("runs/mine") as monitor:
            for batch in loader:
                optimizer.zero_grad()
                monitor.record(balancer.backward(model.losses(batch)))
                optimizer.step()

    Recording copies a step's numbers to a buffer on their device, and waits for nothing. Every `every` steps the buffer
    goes to the host, from a GPU to pinned memory; it is written in the first `record` after it has arrived, in
    `flush`, or in `close`, which comes with the end of the `with` block, of the monitor, or of the process. The copies
    are put on the current stream; as a balancer's, all steps run on one stream, or on streams that wait for each other.

    In a CUDA graph a step cannot be recorded, but its replays can: record the captured step's result after each.

    With several processes, each has its own losses: record in one of them, or to a folder or file for each.

    Args:
        to: one or several of: a folder (for TensorBoard), a file that ends in .csv or .parquet, "wandb", or writers
            from `igb_kernels.monitor`, which have options. What was recorded last can be had without any.
        every: steps in a block.
        tasks: the tasks' names, where losses come as lists; otherwise they are numbers.
        keep: of how many steps, at least, `history` and `figure` know; None: of all. A step takes 8 (K² + 3K) bytes,
            less where no Gramian is measured.
        warn: from when on the monitor logs a warning, once each: of a starved task, a pair in steady conflict, a
            training at Pareto-stationary points, steps without an update. None: never.

    Raises:
        ValueError, TypeError: naming the argument, the rule, and what was found.
        ImportError: where a writer's library is not installed.
    """

    def __init__(
        self,
        to: Destination | Iterable[Destination] = (),
        *,
        every: int = 100,
        tasks: Iterable[str] | None = None,
        keep: int | None = 10_000,
        warn: Thresholds | None = Thresholds(),  # noqa: B008 - frozen
    ) -> None:
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a number of steps, at least 1; found {every!r}")
        if keep is not None and (not isinstance(keep, int) or keep < 0):
            raise ValueError(f"keep must be a number of steps or None, found {keep!r}")
        if warn is not None and not isinstance(warn, Thresholds):
            raise TypeError(f"warn must be Thresholds or None, found {type(warn).__name__}")
        self._given = _checked_names(tasks)
        self._every, self._keep = every, keep
        self._watch = None if warn is None else Watch(warn)
        self._room: _Room | None = None
        self._next = 0
        self._blocks: deque[Block] = deque()
        self._kept = 0
        self._writers = writers_of(to)
        self._closed = False
        # After the writers' libraries have registered what they do at the end: the last comes first.
        self._at_exit = partial(_close, weakref.ref(self))
        atexit.register(self._at_exit)

    @uncompiled
    def record(self, result: BalanceResult, step: int | None = None) -> BalanceResult:
        """Takes note of a step.

        Args:
            result: what `Balancer.backward` returned; all of one monitor have the same tasks.
            step: its number; None: one more than the last one's, from 0 on.

        Returns:
            The result, as it is.

        Raises:
            ValueError, TypeError: for a result of other tasks, on another device, or with another kind of measurements
                than the first. It is not recorded.
            RuntimeError: while a CUDA graph is captured, or after `close`.
            What a writer raises, where a block comes to be written.
        """
        if self._closed:
            raise RuntimeError("the monitor is closed")
        if step is None:
            step = self._next
        elif not isinstance(step, int):
            raise TypeError(f"step must be an int, found {type(step).__name__}")
        if captures_graph(result.weights.device):
            raise RuntimeError("record cannot be captured in a CUDA graph: record the result after each replay")
        if self._room is None:
            self._room = _Room(result, self._given, self._every)
        self._room.put(result, step)
        self._next = step + 1
        if self._room.full:
            self._room.send()
        if self._room.sent:
            self._write(wait=False)
        return result

    def flush(self) -> None:
        """Writes all that has been recorded; waits for the device."""
        if self._room is not None:
            self._room.send()
            self._write(wait=True)

    def close(self) -> None:
        """Writes all that has been recorded, and closes the writers; `history` and `figure` still know it."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._at_exit)
        with ExitStack() as stack:  # each, whatever the others raise
            for writer in self._writers:
                stack.callback(writer.close)
            self.flush()
        self._room = None

    def history(self) -> dict[str, Tensor]:
        """What was recorded last, as named columns (see `Block.columns`); waits for the device.

        `pandas.DataFrame(monitor.history())` makes a table of it. Before the first step it is empty.
        """
        self.flush()
        return Block.cat(self._blocks).columns() if self._blocks else {}

    def figure(self) -> Figure:
        """A Matplotlib figure of what was recorded last: weights and loss scales over steps, and for each pair of tasks
        the mean cosine and how often it is negative, where Gramians are measured. Waits for the device.

        Raises:
            ImportError: without Matplotlib.
            RuntimeError: before the first step.
        """
        from igb_kernels.monitor.figure import draw

        self.flush()
        if not self._blocks:
            raise RuntimeError("there is nothing to draw: no step was recorded, or none is kept")
        return draw(Block.cat(self._blocks))

    def state_dict(self) -> dict[str, Any]:
        """The number of the next step; what was recorded is not part of it."""
        return {"step": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with the number that `state_dict` returned."""
        self._next = int(state["step"])

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            self.close()

    def _write(self, wait: bool) -> None:
        """Blocks that have arrived on the host, or all."""
        assert self._room is not None
        while (block := self._room.arrived(wait)) is not None:
            self._blocks.append(replace(block))  # without what is worked out of it below
            self._kept += len(block)
            while self._blocks and self._keep is not None and self._kept - len(self._blocks[0]) >= self._keep:
                self._kept -= len(self._blocks.popleft())
            with ExitStack() as stack:
                if self._watch is not None:
                    stack.callback(self._watch.see, block)
                for writer in reversed(self._writers):
                    stack.callback(writer.write, block)


class _Room:
    """A buffer for `every` steps on the device of the first result, and the blocks that are under way to the host."""

    def __init__(self, first: BalanceResult, given: tuple[str, ...] | None, every: int) -> None:
        K = len(first.weights)
        self.tasks = given or first.names or tuple(map(str, range(K)))
        if len(self.tasks) != K:
            raise ValueError(f"tasks must name the {K} tasks of the result, found {list(self.tasks)}")
        pairs = [f"{a}/{b}" for a, b in combinations(self.tasks, 2)]
        if len(set(pairs)) < len(pairs):
            raise ValueError(f"tasks must have names whose pairs a/b differ, found {list(self.tasks)}")
        self._shape, self._device = first.weights.shape, first.weights.device
        self._measured: torch.Size | None = None
        self._sent_any = False
        measured_size = K * K if first.measured is None else first.measured.numel()
        with torch.inference_mode(False):
            # float64 holds every loss, scale and status exactly.
            self._values = torch.empty(every, 3 * K + 1 + measured_size, dtype=torch.float64, device=self._device)
            self._rows = [_places(row, K) for row in self._values]
        self._marks: list[Mark] = []
        self.sent: deque[tuple[Tensor, list[Mark], torch.cuda.Event | None]] = deque()
        """Values, marks, and what tells whether the values are there."""

    @property
    def full(self) -> bool:
        return len(self._marks) == len(self._rows)

    def put(self, result: BalanceResult, step: int) -> None:
        """Copies a step's numbers; nothing waits for them."""
        if result.names is not None and result.names != self.tasks:
            raise ValueError(f"result must be of the tasks {list(self.tasks)}, found {list(result.names)}")
        if result.weights.shape != self._shape:
            raise ValueError(f"result must be of {len(self.tasks)} tasks, found {len(result.weights)}")
        if result.weights.device != self._device:
            raise ValueError(f"result must be on {self._device} like the first, found {result.weights.device}")
        parts = [result.losses, result.scales, result.weights, result.status]
        if measured := result.measured is not None and self._has_place_for(result.measured.shape):
            parts.append(result.measured)
        with torch.no_grad():
            for place, part in zip(self._rows[len(self._marks)], parts, strict=False):
                place.copy_(part)
        self._marks.append(Mark(step, time.time(), result.active, measured))

    def _has_place_for(self, measured: torch.Size) -> bool:
        """Whether a step's measurements can be kept: the first ones say what all are."""
        if measured == self._measured:
            return True
        if self._measured is not None:
            raise ValueError(
                f"result.measured must have the shape {tuple(self._measured)} like the first or be None, found "
                f"{tuple(measured)}"
            )
        if self._sent_any:
            warn_once(
                "a monitor's first block of steps measured no gradients, so its columns have no place for norms and "
                "cosines of later steps: they are not recorded"
            )
            return False
        self._measured = measured
        for places in self._rows:
            places[-1] = places[-1][: measured.numel()].view(measured)
        return True

    def send(self) -> None:
        """What is in the buffer starts for the host, and the buffer is free again."""
        if not self._marks:
            return
        values, event = self._values[: len(self._marks)], None
        if self._device.type == "cuda":
            # Later steps write to the buffer after this copy, since they are behind it on the stream.
            host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
            with torch.cuda.device(self._device):
                values = host.copy_(values, non_blocking=True)
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record()
        else:
            values = values.to("cpu")
        self.sent.append((values, self._marks, event))
        self._marks, self._sent_any = [], True

    def arrived(self, wait: bool) -> Block | None:
        """The next block that is on the host; `wait` for it, or None."""
        if not self.sent:
            return None
        values, marks, event = self.sent[0]
        if event is not None:
            if wait:
                event.synchronize()
            elif not event.query():  # type: ignore[no-untyped-call]
                return None
        self.sent.popleft()
        return Block.of(self.tasks, marks, values, 0 if self._measured is None else len(self._measured))


def _places(row: Tensor, K: int) -> list[Tensor]:
    """Where losses, scales, weights [K], status [] and measurements [...] of a step go."""
    losses, scales, weights, status, measured = row.split_with_sizes([K, K, K, 1, len(row) - 3 * K - 1])
    return [losses, scales, weights, status[0], measured]


def _checked_names(given: Iterable[str] | None) -> tuple[str, ...] | None:
    if given is None:
        return None
    names = () if isinstance(given, str) else tuple(given)
    if not names or len(set(names)) < len(names) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"tasks must name at least one task, and each once, found {given!r}")
    return names


def _close(reference: weakref.ref[Monitor]) -> None:
    """At the end of the process."""
    if (monitor := reference()) is not None:
        monitor.close()
