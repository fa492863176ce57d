"""When the gradients of a pass go into the store: after it, or, by hooks, while it still runs.

Either way the store gets the same buckets and sums over them in the same order, so that both give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from igb_kernels._log import warn_once
from igb_kernels.capture import take_grads
from igb_kernels.store import Grads, TaskGradients

CAUSES = "as with reentrant checkpoints of tied blocks, or hooks that write to other parameters' gradients"

Measure = Callable[[slice], Tensor]
Pass = Callable[[], None]


class Capture:
    """After each pass: its gradients are all taken, and those of the last one measured with the others'."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = params

    def __reduce__(self) -> tuple[type[Capture], tuple[Sequence[Tensor]]]:
        """For copies and pickles: what was learned of the passes is learned again."""
        return type(self), (self.params,)

    def fill(
        self, rows: TaskGradients, passes: Sequence[Pass], tasks: Sequence[int], measure: Measure | None
    ) -> Iterator[None]:
        """Runs the backward passes of these tasks, and yields after each when its gradients are in the store.

        `measure` is what the store will be asked for: `gram`, `sq_norms`, `excess`, or None of them.
        """
        for run in passes:
            rows.begin()
            run()
            self._take_all(rows, self.taken(take_grads(self.params)))
            yield

    def add(self, rows: TaskGradients, grads: Grads) -> None:
        """Puts a row into the store that is there without a pass."""
        rows.add(self.taken(grads))

    def taken(self, grads: Grads) -> Grads:
        """What goes into the store, from the gradients of a pass."""
        return grads

    def give_up(self, reason: str) -> None:
        """From now on, takes gradients after each pass, for this reason."""

    @staticmethod
    def _take_all(rows: TaskGradients, grads: Grads) -> None:
        for bucket in rows.buckets:
            rows.take(bucket, grads[bucket])
        rows.end()


@dataclass(frozen=True)
class Arrivals:
    """How the gradients of a task's pass came when it was watched."""

    last: Sequence[int]
    """Of each bucket with gradients, the parameter that got its own last."""
    of_bucket: dict[int, list[int]]
    """By bucket, the parameters that got one; the last first."""


class HookedCapture(Capture):
    """While each pass runs: as soon as a bucket's gradients are complete, they are taken, and what the method needs of
    them is computed; in the last pass that is the bucket's part of the Gramian of all tasks. On a GPU this goes to a
    stream of its own, beside the backward pass.

    The first pass of each task is watched, and nothing is taken before its end. It shows which parameter of a bucket
    is last to get its gradient; in later passes, a hook on that one does for the bucket. What comes otherwise than
    expected is taken at the end of the pass, and the next one is watched again. Hooks are there during a pass only.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        super().__init__(params)
        self._arrivals: dict[int, Arrivals] = {}
        """By task."""
        self._unsafe = False
        self._side: torch.cuda.Stream | None = None

    def fill(
        self, rows: TaskGradients, passes: Sequence[Pass], tasks: Sequence[int], measure: Measure | None
    ) -> Iterator[None]:
        """As in the base class."""
        if len(rows.buckets) == 1 or measure is None:  # nothing to be done before the end
            yield from super().fill(rows, passes, tasks, measure)
            return
        for task, run in zip(tasks, passes, strict=True):
            rows.begin()
            if self._unsafe:
                run()
                self._take_all(rows, take_grads(self.params))
            elif task not in self._arrivals:
                self._watch(task, run, rows)
            else:
                self._run_with_hooks(task, run, rows, measure if run is passes[-1] else None)
            yield

    # ---- A pass that is watched ----------------------------------------------------------------------------------

    def _watch(self, task: int, run: Pass, rows: TaskGradients) -> None:
        """Takes the gradients after the pass, and learns in which order they came."""
        came: list[tuple[int, Tensor, int]] = []
        streams: set[int] = set()

        def note(i: int, p: Tensor) -> None:
            if p.grad is not None:
                came.append((i, p.grad, p.grad._version))
            if p.is_cuda:
                streams.add(torch.cuda.current_stream(p.device).cuda_stream)

        with ExitStack() as hooks:
            for i, p in enumerate(self.params):
                if p.requires_grad:
                    hooks.callback(_hooked(p, partial(note, i)))
            run()
        for i, grad, version in came:
            if self.params[i].grad is not grad or grad._version != version:
                self.give_up(f"the gradient of shared[{i}] changes after it has come, {CAUSES}")
        if len(streams) > 1:
            self.give_up(f"the gradients of a pass come on {len(streams)} streams")
        order = [i for i, _, _ in came]
        of_bucket = {b.start: [i for i in reversed(order) if b.start <= i < b.stop] for b in rows.buckets}
        last = [members[0] for members in of_bucket.values() if members]
        self._arrivals[task] = Arrivals(last, of_bucket)
        came.clear()
        self._take_all(rows, take_grads(self.params))

    def give_up(self, reason: str) -> None:
        self._unsafe = True
        warn_once(f'capture="hooks" falls back to "passes": {reason}')

    # ---- A pass with hooks ---------------------------------------------------------------------------------------

    def _run_with_hooks(self, task: int, run: Pass, rows: TaskGradients, measure: Measure | None) -> None:
        expected = self._arrivals[task]
        pending = [bucket for bucket in rows.buckets if expected.of_bucket[bucket.start]]
        streams: set[int] = set()
        taken: dict[int, Grads] = {}  # held to the end: the side stream may still be reading

        def take_complete(_: Tensor) -> None:
            stream = torch.cuda.current_stream(self.params[0].device) if self.params[0].is_cuda else None
            if stream is not None:
                streams.add(stream.cuda_stream)
                if len(streams) > 1:  # what the side stream is to wait for is not clear any more
                    return
            for bucket in list(pending):
                members = expected.of_bucket[bucket.start]
                if all(self.params[i].grad is not None for i in members):
                    pending.remove(bucket)
                    taken[bucket.start] = take_grads(self.params[bucket], first=bucket.start)
                    self._work_on(bucket, taken[bucket.start], rows, measure, stream)

        with ExitStack() as hooks:
            for i in expected.last:
                if self.params[i].requires_grad:
                    hooks.callback(_hooked(self.params[i], take_complete))
            hooks.callback(lambda: self._join() if taken else None)
            run()
        self._take_the_rest(task, rows, taken)
        rows.end()

    def _work_on(
        self,
        bucket: slice,
        grads: Grads,
        rows: TaskGradients,
        measure: Measure | None,
        stream: torch.cuda.Stream | None,
    ) -> None:
        if stream is None:
            if rows.take(bucket, grads) and measure is not None:
                measure(bucket)
            return
        if self._side is None:
            self._side = torch.cuda.Stream(self.params[0].device)  # type: ignore[no-untyped-call]
        self._side.wait_stream(stream)
        with torch.cuda.stream(self._side):
            if rows.take(bucket, grads) and measure is not None:
                measure(bucket)

    def _join(self) -> None:
        """What comes next on the current stream waits for the side stream."""
        if self._side is not None:
            torch.cuda.current_stream(self._side.device).wait_stream(self._side)

    def _take_the_rest(self, task: int, rows: TaskGradients, taken: dict[int, Grads]) -> None:
        """After the pass: buckets that were not complete as expected, and what came after its bucket was taken."""
        grads = take_grads(self.params)
        for bucket in rows.buckets:
            late = grads[bucket]
            if any(grad is not None for grad in late):
                self._arrivals.pop(task, None)
            elif bucket.start in taken:
                continue
            if bucket.start in taken:
                pieces = zip(self.params[bucket], taken[bucket.start], late, strict=True)
                late = [self._whole(*piece) for piece in pieces]
            rows.take(bucket, late)

    def _whole(self, p: Tensor, early: Tensor | None, late: Tensor | None) -> Tensor | None:
        """A gradient of which a second piece may have come late."""
        if early is None or late is None:
            return late if early is None else early
        self.give_up(
            f"the gradient of a shared parameter of shape {tuple(p.shape)} changes after it has come, {CAUSES}"
        )
        return early + late  # not in place: other parameters' gradients may be views of the same memory


def _hooked(p: Tensor, hook: Callable[[Tensor], None]) -> Callable[[], None]:
    """Registers a post-accumulate hook, and returns what removes it."""
    handle = p.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    remove: Callable[[], None] = handle.remove
    return remove


CAPTURES: dict[str, type[Capture]] = {"passes": Capture, "hooks": HookedCapture}
