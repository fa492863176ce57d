"""The kinds of backward passes that steps take, and how they come to `.grad`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from igb_kernels.backends import Backend, resolve
from igb_kernels.backends.several import SeveralDevices, several_devices
from igb_kernels.backends.sharded import Sharded
from igb_kernels.capture import (
    Backward,
    GradsSetAside,
    TaskLosses,
    backward_passes,
    edge_of,
    into,
    joint_pass,
    leaves,
    run_backward,
    take_grads,
    task_passes,
)
from igb_kernels.gradients.base import GradientBalancer, Needs
from igb_kernels.hooks import Capture, Measure
from igb_kernels.representation import Representation
from igb_kernels.status import Status
from igb_kernels.store import (
    AveragedGradients,
    Grads,
    KeptGradients,
    MovingAverages,
    RunningSum,
    SquaredGradients,
    TaskGradients,
    Units,
    rows_in_cache,
)


class Place(Protocol):
    """Where else than at the shared parameters gradients are compared and combined."""

    @property
    def params(self) -> Sequence[Tensor]:
        """Leaves in the place of the shared parameters."""

    def pass_on(self, retain_graph: bool) -> None:
        """Takes what has come to `.grad` of the leaves to that of the shared parameters."""


class Processes(Protocol):
    """Others that take part in a step, each with its own batch; all of them call this in the same order."""

    def total(self, part: Tensor) -> Tensor:
        """The sum of what each has."""

    def sum_grads(self, params: Sequence[Tensor]) -> None:
        """Makes `.grad` of the parameters the sum of what each has there."""


class Gathering(Place, Protocol):
    """A place to which the gradients of all processes come."""

    capture: Capture


@dataclass(slots=True)
class Step:
    """What the passes of a step share."""

    tasks: TaskLosses
    ids: Sequence[int]
    """The tasks that any of the micro-batches had."""
    losses: Tensor
    """Of all micro-batches, [K]."""
    scales: Tensor
    seeds: Tensor
    """The seeds of the passes [K]: the scales, times the GradScaler's factor."""
    units: Units
    rows: Sequence[Grads] | None
    """Gradients that were accumulated, of shared parameters and heads; else the passes make them."""
    retain_graph: bool
    shared: GradsSetAside
    heads: GradsSetAside


@dataclass(slots=True)
class Outcome:
    """What the passes of a step came to."""

    weights: Tensor
    status: Tensor
    measured: Tensor | None = None
    stored: TaskGradients | None = None
    """What may outlive the step."""


class Passes:
    """Runs the passes of a balancer's steps, and keeps what outlives them."""

    def __init__(
        self,
        method: GradientBalancer,
        shared: Sequence[Tensor],
        heads: str,
        task_parameters: Sequence[Tensor],
        backend: str,
        bank_dtype: torch.dtype | None,
        capture: Capture,
    ) -> None:
        """The arguments are those of `Balancer`."""
        self.method, self.shared, self.heads, self.task_parameters = method, shared, heads, task_parameters
        self.backend, self.bank_dtype, self.capture = backend, bank_dtype, capture
        self.averages = MovingAverages()
        self.several: SeveralDevices | None = None
        """The backend of a model that is on several devices; known from the first step on."""
        self._outgoing: list[Grads] | None = [] if all(p.device.type == "cpu" for p in shared) else None
        self._head_leaves: list[Tensor] = []
        self._given_heads = False
        self._unreached: set[int] | None = None  # the tasks whose heads are not among them; None: all tasks
        self._backward: Backward = run_backward
        self.processes: Processes | None = None
        """With whom the gradients are summed; None: this process is alone."""
        self._part: Sharded | None = None
        """The backend for a part of the gradients, of which other processes have the rest."""

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: all but what the next step finds or makes anew."""
        outgoing: list[Grads] | None = None if self._outgoing is None else []
        heads = self._head_leaves if self._given_heads else []
        return {**vars(self), "_head_leaves": heads, "_unreached": None, "_outgoing": outgoing}

    @property
    def _run(self) -> Backend:
        if self._part is not None:
            return cast(Backend, self._part)
        return self.several or resolve(self.backend, self.shared[0].device.type)

    @property
    def knows_heads(self) -> bool:
        """Whether a step has looked for them, and at the devices that everything is on."""
        return self._unreached is not None

    @property
    def home(self) -> torch.device:
        """Where losses and state are, as far as is known before the first step."""
        return self.shared[0].device if self.several is None else self.several.home

    def forget_heads(self) -> None:
        """Before the first step, whichever it is."""
        self._unreached = None

    def find_heads(self, tasks: TaskLosses) -> bool:
        """The task-specific parameters of tasks that have not been there before; whether `home` is another now."""
        if self._unreached is None:
            self._unreached = set(range(tasks.total))
        elif self._unreached.isdisjoint(tasks.ids):
            return False
        if self.heads == "scaled" and not self._given_heads:
            known = {id(p) for p in [*self.shared, *self._head_leaves]}
            found, _ = leaves(map(edge_of, tasks.roots))
            self._head_leaves += [p for p in found if isinstance(p, nn.Parameter) and id(p) not in known]
        self._unreached.difference_update(tasks.ids)
        before = self.home
        self.several = several_devices(self.backend, tasks.values.device, [*self.shared, *self.head_params()])
        if self.several is not None:
            self.capture.give_up(f"parameters and losses are on {len(self.several.devices)} devices")
        return self.home != before

    def head_params(self) -> Sequence[Tensor]:
        """The task-specific parameters, as far as they are known."""
        return self.task_parameters or self._head_leaves

    def give_heads(self, params: Sequence[Tensor]) -> None:
        """Tells the task-specific parameters of all tasks, which are then not looked for."""
        self._head_leaves, self._given_heads = list(params), True

    def _derived(self) -> Passes:
        """One that shares everything with this one; copies, as pickles, are without what the next step finds."""
        passes = Passes.__new__(Passes)
        vars(passes).update(vars(self))
        return passes

    def at(self, representation: Representation) -> Passes:
        """The same up to the representation, whose gradients take the place of the shared parameters'."""
        passes = self._derived()
        passes.shared, passes.capture, passes._outgoing = representation.params, Capture(representation.params), None
        if self.heads == "scaled" and not self._given_heads:
            passes._head_leaves = representation.heads
        passes._backward = representation.backward
        passes.several = self.several or several_devices(self.backend, self.home, representation.params)
        if self.processes is not None:  # each has the gradients of its own samples
            passes._part = Sharded(passes._run, self.processes.total)
        return passes

    def gathering(self, place: Gathering, *, whole: bool) -> Passes:
        """The same with the sums of all processes' gradients, of which this one gets its part or the whole."""
        assert self.processes is not None
        passes = self._derived()
        passes.shared, passes.capture, passes._outgoing = place.params, place.capture, None
        if not whole:
            passes._part = Sharded(passes._run, self.processes.total)
        return passes

    def run(self, step: Step, others: Sequence[TaskLosses]) -> Outcome:
        """The passes that the method's next step needs, and `.grad` from them; of `others`, the independent batches,
        that of the shared parameters' weights."""
        needs = self.method.needs()
        if others:
            return self._crossed_passes(step, others)
        if needs is Needs.ELEMENTS:
            return self._element_passes(step)
        if step.rows is None:
            if needs is Needs.NOTHING:
                return self._joint_pass(step)
            if needs is Needs.HELD and (self.heads == "weighted" or self._sends_once):
                return self._held_pass(step)
        return self._task_passes(step)

    def _task_passes(self, step: Step) -> Outcome:
        """One pass for each task; weights from what they show; their weighted sum into `.grad`."""
        self._make_previous_plain(step)
        rows, head_rows, needs = self._rows(step), self._head_rows(step), self.method.needs()
        measures = {Needs.EXCESS: rows.excess, Needs.GRAM: rows.gram, Needs.HELD: rows.gram}
        measure = measures.get(needs, rows.sq_norms)
        self._fill(step, rows, head_rows, measure)
        measured = measure()
        weights, status = self.method.solve(measured, step.losses, step.scales, self._run)
        rows.write(weights, step.shared.previous)
        self._write_heads(step, head_rows, weights)
        return Outcome(weights, status, None if needs is Needs.EXCESS else measured, rows)

    def _fill(
        self, step: Step, rows: TaskGradients, head_rows: KeptGradients | None, measure: Measure | None = None
    ) -> None:
        """Gradients of shared parameters and, where they are kept, of heads, task by task; `measure` comes next."""
        if step.rows is not None:
            params = len(self.capture.params)
            for row in step.rows:
                self.capture.add(rows, row[:params])
                if head_rows is not None:
                    head_rows.add(row[params:])
            return
        passes = backward_passes(step.tasks, step.seeds, step.retain_graph, self._backward)
        for _ in self.capture.fill(rows, passes, step.ids, measure):
            if head_rows is not None:
                head_rows.add(take_grads(self.task_parameters, "task_parameters"))

    def _head_rows(self, step: Step) -> KeptGradients | None:
        """Where heads' gradients are kept for their weights or scales; None: they add up in `.grad`."""
        if step.rows is None and self.heads == "scaled":
            return None
        return KeptGradients(self.head_params(), self._run, step.units)

    def _write_heads(self, step: Step, rows: KeptGradients | None, weights: Tensor) -> None:
        """Puts them into `.grad`; with other processes, those of this one alone, which are to be summed."""
        alone = self.processes is None
        if rows is not None:
            own = weights if self.heads == "weighted" else torch.ones_like(weights)
            rows.write(own, step.heads.previous if alone else [None] * len(rows.params))
        elif alone:
            step.heads.add_back()

    def _element_passes(self, step: Step) -> Outcome:
        """One pass for each task; then each element of `.grad` from some of the tasks, with weights 1."""
        self._make_previous_plain(step)
        # A factor that all rows share does not change which elements are taken.
        units = step.units if step.rows is not None else Units()
        rows = KeptGradients(self.shared, self._run, units, self._outgoing, self.bank_dtype)
        head_rows = self._head_rows(step)
        self._fill(step, rows, head_rows)
        sq_norm = rows.write_of_one_sign(self.method.counter(), self.method.leak(), step.shared.previous)
        _, status = self.method.solve(sq_norm, step.losses, step.scales, self._run)
        weights = torch.ones_like(step.scales, dtype=torch.float64)
        self._write_heads(step, head_rows, weights)
        return Outcome(weights, status, stored=rows)

    def _crossed_passes(self, step: Step, others: Sequence[TaskLosses]) -> Outcome:
        """Weights from the inner products of two batches' gradients, all scaled as the losses are."""
        self._make_previous_plain(step)
        tasks, K = step.tasks, len(step.tasks)
        pair = [KeptGradients(self.shared, self._run, step.units, dtype=self.bank_dtype) for _ in range(2)]
        head_rows = KeptGradients(self.task_parameters, self._run, step.units) if self.task_parameters else None
        for rows, batch in zip(pair, others if len(others) == 2 else (tasks, *others), strict=True):
            backward = run_backward if batch is tasks else into(self.shared)
            for grads in task_passes(batch, step.seeds, self.shared, step.retain_graph, backward=backward):
                rows.add(self.capture.taken(grads))
                del grads
                if batch is tasks and head_rows is not None:
                    head_rows.add(take_grads(self.task_parameters, "task_parameters"))
        both = self._run.Table([*pair[0].rows, *pair[1].rows], 2 * K)
        cross = step.units.gram(self._run.gram(both, 2 * K)[:K, K:])
        weights, status = self.method.solve(cross, step.losses, step.scales, self._run)
        if len(others) == 1:
            pair[0].write(weights, step.shared.previous)
            self._write_heads(step, head_rows, weights)
        else:
            self._weighted_pass(step, weights)
            if self.processes is not None:
                self.processes.sum_grads(self.shared)
            status = status | _bit_unless_finite(self._sq_norm_in_grad(self.shared))
            step.shared.add_back()
            self._write_heads(step, None, weights)
        return Outcome(weights, status)

    def _weighted_pass(self, step: Step, weights: Tensor) -> None:
        """The update by weights known before: one pass, and one for heads that take no weights."""
        weighted = step.seeds * weights.to(step.seeds.dtype)
        if self.heads == "weighted":
            joint_pass(step.tasks, weighted, step.retain_graph)
        else:
            self._two_passes(step, weighted)

    def _two_passes(self, step: Step, weighted: Tensor) -> None:
        """With weighted seeds for the shared parameters, and with the step's for the heads."""
        if not self._head_leaves:
            joint_pass(step.tasks, weighted, step.retain_graph)
            return
        joint_pass(step.tasks, weighted, True, into(self.capture.params))
        joint_pass(step.tasks, step.seeds, step.retain_graph, into(self._head_leaves))

    def _joint_pass(self, step: Step) -> Outcome:
        """One pass for all tasks, with weights 1; the gradients stay where autograd puts them."""
        if self._part is not None:
            return self._joint_part(step)
        joint_pass(step.tasks, step.seeds, step.retain_graph)
        _, status = self.method.solve(self._sq_norm_in_grad(self.shared), step.losses, step.scales, self._run)
        step.shared.add_back()
        step.heads.add_back()
        # Of the sum of the gradients it is only known whether it is finite.
        return Outcome(torch.ones_like(step.scales, dtype=torch.float64), status & int(Status.NON_FINITE))

    def _joint_part(self, step: Step) -> Outcome:
        """As `_joint_pass`, where this process has a part of the gradients."""
        rows = KeptGradients(self.shared, self._run, Units())
        one_pass = partial(joint_pass, step.tasks, step.seeds, step.retain_graph)
        for _ in self.capture.fill(rows, [one_pass], step.ids[:1], None):
            pass
        _, status = self.method.solve(rows.sq_norms(), step.losses, step.scales, self._run)
        rows.write(torch.ones(1, dtype=torch.float64, device=step.losses.device), step.shared.previous)
        self._write_heads(step, None, step.scales)
        weights = torch.ones_like(step.scales, dtype=torch.float64)
        return Outcome(weights, status & int(Status.NON_FINITE))

    @property
    def _sends_once(self) -> bool:
        """Whether a second pass, through the heads alone, is worth less than to send every task's gradients."""
        return self.processes is not None and self._backward is run_backward

    def _held_pass(self, step: Step) -> Outcome:
        """One pass for all tasks, with weights that were known before it; and one for heads that take no weights."""
        self._make_previous_plain(step)
        weights, units = self.method.held_weights(), step.units.part(slice(1))  # all rows share their unit
        seeds = step.seeds * weights.to(step.seeds.dtype)
        rows, head_rows = KeptGradients(self.shared, self._run, units), None
        if self.heads == "weighted":
            one_pass = partial(joint_pass, step.tasks, seeds, step.retain_graph, self._backward)
            head_rows = KeptGradients(self.task_parameters, self._run, units)
        else:
            one_pass = partial(self._two_passes, step, seeds)
        for _ in self.capture.fill(rows, [one_pass], step.ids[:1], None):
            if head_rows is not None:
                head_rows.add(take_grads(self.task_parameters, "task_parameters"))
        factor, status = self.method.solve_held(rows.sq_norms(), self._run)
        rows.write(factor, step.shared.previous)
        self._write_heads(step, head_rows, factor)
        return Outcome(weights * factor, status)

    def status_of(self, params: Sequence[Tensor], device: torch.device) -> Tensor:
        """NON_FINITE where a gradient of these is, on the losses' device; a GradScaler skips that step, too."""
        if not params:
            return torch.zeros((), dtype=torch.int32, device=device)
        return _bit_unless_finite(self._sq_norm_in_grad(params)).to(device)

    def _sq_norm_in_grad(self, params: Sequence[Tensor]) -> Tensor:
        """Of what is in `.grad` of the parameters, [1]; sparse ones as they are."""
        grads = [g if g is None or g.layout is torch.strided else g._values() for g in (p.grad for p in params)]
        return self._run.sq_norms(self._run.Table(grads, 1), 1)

    def _make_previous_plain(self, step: Step) -> None:
        """What is added to, as memory that can be written to."""
        step.shared.make_plain("shared")
        if self.task_parameters or step.rows is not None:
            step.heads.make_plain("task_parameters")

    def _rows(self, step: Step) -> TaskGradients:
        method, run, units = self.method, self._run, step.units
        decay = method.ema_decay()
        if decay is not None:
            scales = method.row_scales()
            return AveragedGradients(self.shared, run, self.averages, step.ids, decay, scales, step.losses, units)
        if method.needs() is Needs.EXCESS:
            return SquaredGradients(self.shared, run, self.averages, step.ids, units, self._outgoing, self.bank_dtype)
        streams = method.needs() is Needs.RUNNING_NORMS and step.rows is None
        if streams and rows_in_cache(self.shared) < len(step.tasks):
            return RunningSum(self.shared, run, method.running_weight, method.running_factor, units)
        return KeptGradients(self.shared, run, units, self._outgoing, self.bank_dtype)

    def of_one_batch(self) -> bool:
        """Whether nothing that is kept of gradients outlives a step."""
        return self.method.ema_decay() is None and self.method.needs() is not Needs.EXCESS

    def keeps_gradients(self) -> bool:
        """Whether steps keep K gradients, whatever the parameters' size."""
        return self.method.ema_decay() is None and self.method.needs() not in (Needs.NOTHING, Needs.RUNNING_NORMS)


def units_of(factor: Tensor | None, scales: Tensor, scaled_later: bool) -> Units:
    """What rows are measured in: with the factor, and before the scales where these come later."""
    rows = scales.double() if scaled_later else None
    if factor is None:
        return Units(rows)
    factor = factor.double()
    return Units((1 / factor).expand(len(scales)).contiguous() if rows is None else rows / factor, factor)


def _bit_unless_finite(sq_norm: Tensor) -> Tensor:
    """The status NON_FINITE or 0, int32 [], from a squared norm [1]."""
    return (~sq_norm.isfinite().reshape(())).int()  # NON_FINITE is bit 0
