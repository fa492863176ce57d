"""What is put into a balancer while it is profiled, and taken out again.

The balancer, its passes, rule and method get classes of their own, derived from theirs, so that nothing is left in the
objects; `torch.optim` has hooks for all optimizers. Of the package, one function is replaced while anything is
profiled: the one that calls autograd's engine. It looks whether this thread is in a profiled step.
"""

from __future__ import annotations

import copyreg
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from igb_kernels import capture, representation
from igb_kernels._compile import uncompiled
from igb_kernels.backends import captures_graph
from igb_kernels.profiling.recorder import Recorder
from igb_kernels.profiling.spans import Phase, Span

OPERATIONS = {
    "gram": Phase.MEASURE,
    "sq_norms": Phase.MEASURE,
    "ema_": Phase.AVERAGES,
    "accumulate_squares_": Phase.AVERAGES,
    "rollback_": Phase.AVERAGES,
    "combine_": Phase.COMBINE,
    "sign_drop_": Phase.COMBINE,
    "solve": Phase.SOLVER,
    "loss_scales": Phase.SCALES,
}


class TimedBackend:
    """A backend whose operations are recorded."""

    def __init__(self, backend: Any, recorder: Recorder) -> None:
        self._backend, self._recorder = backend, recorder
        recorder.backends.add(str(getattr(backend, "__name__", type(backend).__name__)).rpartition(".")[2])
        for name, phase in OPERATIONS.items():
            setattr(self, name, self._timed(name, phase, f"{phase.value}: {name}"))

    def _timed(self, name: str, phase: Phase, label: str) -> Callable[..., Any]:
        backend, operation = self._backend, self._recorder.operation
        return lambda *arguments: operation(getattr(backend, name), name, phase, label, arguments)

    def Table(self, *arguments: Any) -> Any:
        """Addresses of gradients."""
        with self._recorder.within(Phase.CAPTURE, "taking gradients: table"):
            return self._backend.Table(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)


class Instruments:
    """All that is in place while a balancer is profiled."""

    def __init__(self, balancer: Any, recorder: Recorder) -> None:
        self._recorder = recorder
        self._backends: dict[int, TimedBackend] = {}
        self._undo = ExitStack()
        with ExitStack() as undo:  # where one cannot be put in, none is left
            self._put_into_balancer(undo, balancer)
            self._put_into_passes(undo, balancer._passes)
            self._put_into(undo, balancer.losses, Phase.SCALES, "scales", "commit")
            self._put_into(undo, balancer.gradients, Phase.SOLVER, "solve", "solve_held", "commit")
            self._put_into_optimizers(undo)
            undo.enter_context(_Engine())
            self._undo = undo.pop_all()

    def remove(self) -> None:
        """Everything is as it was."""
        self._undo.close()

    def _timed(self, backend: Any) -> TimedBackend:
        key = id(backend)
        if key not in self._backends:
            self._backends[key] = TimedBackend(backend, self._recorder)
        return self._backends[key]

    def _put_into_balancer(self, undo: ExitStack, balancer: Any) -> None:
        recorder, cls = self._recorder, type(balancer)

        def backward(self: Any, losses: Any, *rest: Any, **options: Any) -> Any:
            if captures_graph(self.shared[0].device):
                return cls.backward(self, losses, *rest, **options)
            recorder.at_representation = options.get("representation") is not None
            with (
                recorder.backward(losses, options.get("independent", ()), ends_step=True) as tell,
                _recorded_here(recorder),
            ):
                result = cls.backward(self, losses, *rest, **options)
                tell(result)
            return result

        def accumulate(self: Any, losses: Any, *rest: Any, **options: Any) -> None:
            with recorder.backward(losses, (), ends_step=False), _recorded_here(recorder):
                cls.accumulate(self, losses, *rest, **options)

        def after_step(self: Any, losses: Any) -> None:
            with recorder.around():
                cls.after_step(self, losses)

        own = {function.__name__: uncompiled(function) for function in (backward, accumulate, after_step)}
        _reclass(undo, balancer, {**own, "_profiled": True, "_run": property(lambda b: self._timed(cls._run.fget(b)))})

    def _put_into_passes(self, undo: ExitStack, passes: Any) -> None:
        recorder, cls = self._recorder, type(passes)

        def fill(self: Any, *arguments: Any) -> None:
            if recorder.row_bytes == 0:
                recorder.row_bytes = sum([p.nbytes for p in self.shared])
            with recorder.within(Phase.CAPTURE):
                cls._fill(self, *arguments)

        def at(self: Any, representation: Any) -> Any:
            copied = cls.at(self, representation)
            copied.__class__ = type(self)
            return copied

        run = property(lambda p: self._timed(cls._run.fget(p)))
        _reclass(undo, passes, {"_fill": fill, "at": at, "_run": run})

    def _put_into(self, undo: ExitStack, part: Any, phase: Phase, *methods: str) -> None:
        def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
            label = f"{phase.value}: {name}"

            def call(*arguments: Any) -> Any:
                with self._recorder.within(phase, label):
                    return method(*arguments)

            return call

        _reclass(undo, part, {name: timed(name, getattr(type(part), name)) for name in methods})

    def _put_into_optimizers(self, undo: ExitStack) -> None:
        recorder, running = self._recorder, dict[int, Span]()

        def begins(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if (span := recorder.optimizer_begins()) is not None:
                running[id(optimizer)] = span
            if "zero_grad" not in vars(optimizer):
                zero_grad = optimizer.zero_grad

                def timed(*arguments: Any, **options: Any) -> None:
                    span = recorder.optimizer_begins()
                    try:
                        zero_grad(*arguments, **options)
                    finally:
                        if span is not None:
                            recorder.optimizer_ends(span)

                vars(optimizer)["zero_grad"] = timed
                undo_zero_grad.append(optimizer)

        def ends(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if (span := running.pop(id(optimizer), None)) is not None:
                recorder.optimizer_ends(span, optimizer)

        undo_zero_grad: list[torch.optim.Optimizer] = []
        undo.callback(lambda: [vars(optimizer).pop("zero_grad", None) for optimizer in undo_zero_grad])
        undo.callback(register_optimizer_step_pre_hook(begins).remove)
        undo.callback(register_optimizer_step_post_hook(ends).remove)


def _reclass(undo: ExitStack, instance: Any, own: dict[str, Any]) -> None:
    """Gives the instance a class derived from its own; copies and pickles of it are of the class it had."""
    cls: Any = type(instance)

    def reduce(self: Any, protocol: Any) -> Any:
        function, arguments, *rest = cls.__reduce_ex__(self, protocol)
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]
            function = _new  # that one would look whether the class is the object's
        return (function, tuple([cls if argument is derived else argument for argument in arguments]), *rest)

    named = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    derived = type(cls.__name__, (cls,), {**named, "__reduce_ex__": reduce, **own})
    instance.__class__ = derived
    undo.callback(setattr, instance, "__class__", cls)


def _new(cls: Any, *arguments: Any) -> Any:
    return cls.__new__(cls, *arguments)


# ---- Autograd's engine --------------------------------------------------------------------------------------------

_here = threading.local()


class _recorded_here:
    """Passes on this thread are the recorder's."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __enter__(self) -> None:
        self._before = getattr(_here, "recorder", None)
        _here.recorder = self._recorder

    def __exit__(self, *raised: Any) -> None:
        _here.recorder = self._before


class _Engine:
    """Within the context, the calls of autograd's engine are recorded; the last to leave puts the function back."""

    _users = 0
    _lock = threading.Lock()
    _modules = (capture, representation)

    def __enter__(self) -> None:
        with _Engine._lock:
            _Engine._users += 1
            self._set(_recorded_engine)

    def __exit__(self, *raised: Any) -> None:
        with _Engine._lock:
            _Engine._users -= 1
            if not _Engine._users:
                self._set(_explained)

    def _set(self, function: Callable[..., Any]) -> None:
        for module in self._modules:
            vars(module)["explained"] = function


_explained = capture.explained


def _recorded_engine(engine: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    recorder: Recorder | None = getattr(_here, "recorder", None)
    if recorder is None:
        return _explained(engine, *arguments, **options)
    with recorder.backward_pass(arguments[0]):
        return _explained(engine, *arguments, **options)
