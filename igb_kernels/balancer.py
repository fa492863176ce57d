"""The balanced step: from K losses to `.grad`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from igb_kernels._compile import keep_saved_tensors, uncompiled
from igb_kernels._log import warn_once
from igb_kernels.active import ActiveTasks
from igb_kernels.backends import Backend, captures_graph, resolve
from igb_kernels.capture import (
    GradsSetAside,
    Losses,
    TaskLosses,
    backward_passes,
    joint_pass,
    leaves,
    take_grads,
    task_passes,
)
from igb_kernels.gradients import METHODS, Equal, GradientBalancer
from igb_kernels.gradients.base import Needs
from igb_kernels.hooks import CAPTURES, Capture, Measure
from igb_kernels.losses import RULES, LearnedLossBalancer, LossBalancer
from igb_kernels.ops import COMPLEX_DTYPES, DTYPES, accumulator_dtype
from igb_kernels.result import BalanceResult
from igb_kernels.status import Status
from igb_kernels.store import (
    Accumulated,
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

HEADS = ("scaled", "weighted")
MOST_SETS = 1024
"""Of tasks that take part in a step; more are not kept."""


@dataclass(frozen=True)
class _Step:
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


@dataclass(frozen=True)
class _Outcome:
    """What the passes of a step came to."""

    weights: Tensor
    status: Tensor
    measured: Tensor | None = None
    stored: TaskGradients | None = None
    """What may outlive the step."""


class Balancer:
    """Balances K task losses over shared parameters: use `backward` in place of `sum(losses).backward()`.

    ::

        balancer = igb_kernels.Balancer("igb_v1+db_mtl", shared=encoder.parameters())
        for batch in loader:
            optimizer.zero_grad()
            result = balancer.backward(model.losses(batch))
            optimizer.step()
        balancer.end_epoch()

    On the CPU, methods that keep all K gradients hold on to K - 1 of them until the next step's come, since memory that
    goes back to the system in between is slow to get again. They end with the balancer.

    With the backend "cuda", a step waits for nothing, and can be part of a CUDA graph, together with the passes before
    and after it. Take a few steps before the capture: the first one makes the state. Replays advance the state as steps
    do, and both may follow each other; after `load_state_dict`, capture anew. Where the host decides what a step does,
    capturing it raises: with NashMTL's `update_every` above 1, and with IGBv1(steps=n) before n steps; so does
    DB-MTL where a parameter gets its first gradient. The other backends solve the K×K problem on the host, and wait.

    Models, heads and losses may be compiled, and so may be the function that calls `backward`, which breaks its graph.
    Since K passes go through one graph, a new balancer sets `torch._functorch.config.donated_buffer = False`, unless
    something has been compiled before.

    All steps run on one stream, or on streams that wait for each other, as for any tensors that outlive a step.

    Like an optimizer, a balancer is copied and pickled together with the model whose parameters it holds:
    `copy.deepcopy((model, balancer))`.

    Args:
        gradients: a gradient-balancing method, or names: "db_mtl", "igb_v1+db_mtl" (loss balancing + gradient
            balancing), or a loss-balancing rule alone ("igb_v1": equal weights on its scaled losses).
        losses: a loss-balancing rule or its name; by default the one that is part of the method (DB-MTL: log), else
            none. "none" turns it off.
        shared: the shared parameters: an iterable of leaf tensors that require grad, or a module. A parameter that is
            frozen gets nothing until it is thawed. Complex ones count as their real and imaginary parts, so inner
            products are Re <g_i, g_j>. Sparse gradients are made dense, except with Equal, which compares none.
        heads: what task-specific parameters get. "scaled": the gradient of their own scaled loss s_k L_k, as the
            papers do. "weighted": that of w_k s_k L_k, as the shared parameters do; needs `task_parameters`.
        task_parameters: the task-specific parameters, for `heads="weighted"`; an iterable or a module.
        tasks: the tasks' names, or their number K, where the first step does not have them all; else it says so.
        backend: "auto", or a name from `igb_kernels.backends()`.
        bank_dtype: torch.bfloat16 halves the memory of methods that keep K gradients: each that is float32 is rounded
            after its pass (to 2^-8 of every element), and the rounded ones are measured and combined, in float32.
            Gradients in other dtypes are kept as they come; accumulated squares stay as they are.
        capture: when the shared parameters' gradients are taken and worked on; both ways give the same bits. "passes":
            after each task's backward pass. "hooks": while it runs, in buckets of neighbouring parameters, by
            post-accumulate hooks that are there during `backward` only. A complete bucket is taken, and averaged or
            measured at once; Gramians in the last pass; on a GPU on a stream of its own, beside the pass. Loss scales
            are known before, being the seeds of the passes; solving and the weighted sum come right after the last
            one. Meanwhile other hooks find `.grad` of parameters whose bucket was taken empty. Models of one bucket
            (2 MB; on a GPU 25 MB), methods that need one pass or single elements, `independent` and `accumulate` work
            as with "passes". So does, with a word in the log, a model whose gradients come in several pieces
            (reentrant checkpoints of tied blocks) or on several streams.

    Raises:
        ValueError, TypeError: naming the argument, the rule, and what was found.
    """

    def __init__(
        self,
        gradients: str | GradientBalancer | LossBalancer,
        losses: str | LossBalancer | None = None,
        *,
        shared: Iterable[Tensor] | nn.Module,
        heads: str = "scaled",
        task_parameters: Iterable[Tensor] | nn.Module | None = None,
        tasks: Iterable[str] | int | None = None,
        backend: str = "auto",
        bank_dtype: torch.dtype | None = None,
        capture: str = "passes",
    ) -> None:
        self.gradients, self.losses = _methods(gradients, losses)
        self.shared = _parameters("shared", shared)
        if heads not in HEADS:
            raise ValueError(f"heads must be one of {HEADS}, found {heads!r}")
        if (heads == "weighted") != (task_parameters is not None):
            given = "none were given" if task_parameters is None else f"heads is {heads!r}"
            raise ValueError(f'task_parameters go with heads="weighted", and with it alone; {given}')
        self.heads = heads
        self.task_parameters = [] if task_parameters is None else _parameters("task_parameters", task_parameters)
        if self.task_parameters and self.task_parameters[0].device != self.shared[0].device:
            devices = self.shared[0].device, self.task_parameters[0].device
            raise ValueError(f"task_parameters must be on {devices[0]} like shared, found them on {devices[1]}")
        if both := {id(p) for p in self.shared} & {id(p) for p in self.task_parameters}:
            raise ValueError(f"shared and task_parameters must be disjoint, found {len(both)} tensors in both")
        if bank_dtype not in (None, torch.bfloat16):
            raise ValueError(f"bank_dtype must be None or torch.bfloat16, found {bank_dtype!r}")
        self.bank_dtype = bank_dtype
        self.backend = backend
        keep_saved_tensors()  # whatever the method: compiled code outlives the balancer
        resolve(backend, self.shared[0].device.type)  # says now what cannot be had
        if capture not in CAPTURES:
            raise ValueError(f"capture must be one of {tuple(CAPTURES)}, found {capture!r}")
        self.capture = capture
        self._capture: Capture = CAPTURES[capture](self.shared)
        self._given_tasks, self._given_names = _known_tasks(tasks)
        self._tasks: int | None = None  # from the first step on
        self._names = self._given_names
        self._last: tuple[int, ...] | None = None  # the tasks of the last step, None: all
        self._sets: dict[tuple[int, ...], ActiveTasks] = {}
        self._averages = MovingAverages()
        self._accumulated: Accumulated | None = None
        self._outgoing: list[Grads] | None = [] if self.shared[0].device.type == "cpu" else None
        self._head_leaves: list[Tensor] = []
        self._unreached: set[int] | None = None  # the tasks whose heads are not among them; None: all tasks

    @uncompiled
    def backward(
        self,
        losses: Losses,
        *,
        scaler: torch.amp.GradScaler | None = None,
        independent: Sequence[Losses] = (),
        retain_graph: bool = False,
    ) -> BalanceResult:
        """Computes the balanced gradients and adds them to `.grad`; replaces `sum(losses).backward()`.

        Args:
            losses: K scalar tensors in a list, or a dict by task name, or one 1-D tensor (best made by torch.stack);
                on the device of the shared parameters, not scaled by the scaler. None in a list, a name that a dict
                does not have, or a loss that does not require grad is a missing task: the step is one of the others
                alone, and the state of the missing ones stays as it is.
            scaler: the GradScaler of a training with float16 autocast. The passes are run with its factor, and `.grad`
                holds it, as after `scaler.scale(loss).backward()`; losses, norms and state are what they are without.
                A step that overflows reaches `.grad` as NaN or infinity, so that the scaler skips it, and leaves the
                balancer's state as it was. Gradients of learned weights get the factor, too.
            independent: for SDMGrad and MoDo, the same losses on one or two further batches. With two, the weights
                come from these alone, and `losses` take two passes in all; with one, from it and `losses`. These passes
                leave task-specific parameters alone.
            retain_graph: keep the graphs for further backward passes, as in `torch.Tensor.backward`.

        Returns:
            What was done, as tensors on the losses' device; nothing is synchronised.

        Raises:
            ValueError, TypeError: for losses that cannot be balanced.
            RuntimeError: for a step that cannot be captured in a CUDA graph, while one is.
            Whatever raises, `.grad` of the shared parameters (and of the heads that the first step reached) and the
            balancer's state stay as they were; only what `accumulate` has gathered is dropped where a pass raises.
        """
        tasks = self._read(losses, "losses")
        names = self._names or tasks.names
        others = [self._read_other(batch, names, f"independent[{i}]", tasks) for i, batch in enumerate(independent)]
        if others and (not self.gradients.crosses or len(others) > 2 or self._accumulated is not None):
            rule = f"stay empty: {self.gradients.name} needs none"
            if self.gradients.crosses:
                rule = "hold at most two batches" if self._accumulated is None else "stay empty after accumulate()"
            raise ValueError(f"independent must {rule}; found {len(others)}")
        captured = captures_graph(self.shared[0].device)
        if self._accumulated is None:
            self._set_active(tasks.active, tasks, captured)
        if captured:
            self._check_capture()
        factor = _loss_factor(scaler, tasks.values.device)
        with self._undone_if_it_raises():
            self._start(tasks)
            if self._accumulated is not None:
                self._accumulate(tasks, factor, retain_graph)
                ids = tuple(self._accumulated.ids)
                self._set_active(ids if len(ids) < tasks.total else None, tasks, captured)
            result = self._step(tasks, others, factor, retain_graph)
        self._names = self._names or tasks.names
        self._accumulated, self._last = None, result.active
        return result

    @uncompiled
    def accumulate(
        self, losses: Losses, *, scaler: torch.amp.GradScaler | None = None, retain_graph: bool = False
    ) -> None:
        """Adds a micro-batch to the next `backward`, which then balances the sums: of each task's gradients, and of its
        losses. So one decision is made for all micro-batches, as for one big batch::

            for batch in micro_batches[:-1]:
                balancer.accumulate([loss / len(micro_batches) for loss in model.losses(batch)])
            balancer.backward([loss / len(micro_batches) for loss in model.losses(micro_batches[-1])])
            optimizer.step()

        (`backward` for each micro-batch makes a decision for each, and adds up the balanced gradients.)

        K gradients of the shared parameters, and those of the heads, are kept until then, apart from `.grad`; they are
        not part of `state_dict`. Losses are scaled at the end, when they are known.

        Args:
            losses, scaler, retain_graph: as for `backward`; the scaler must be the same until then, without an update.
                A task may be missing in some of the micro-batches; the step has those that were in any.

        Raises:
            ValueError, TypeError: as `backward`. Where a pass raises, what has been accumulated is dropped.
        """
        tasks = self._read(losses, "losses")
        if captures_graph(self.shared[0].device):
            raise RuntimeError("accumulate cannot be captured in a CUDA graph: gradients are kept on the host's side")
        with self._undone_if_it_raises():
            self._start(tasks)
            self._accumulate(tasks, _loss_factor(scaler, tasks.values.device), retain_graph)
        self._names = self._names or tasks.names

    def _accumulate(self, tasks: TaskLosses, factor: Tensor | None, retain_graph: bool) -> None:
        self._accumulated, so_far = None, self._accumulated
        params = [*self.shared, *self._head_params()]
        seeds = torch.ones_like(tasks.values) if factor is None else factor.expand(len(tasks))
        onto = () if so_far is None else so_far.rows_of(tasks.ids, len(params))
        with GradsSetAside(params) as before:
            rows = list(task_passes(tasks, seeds, params, retain_graph, onto=onto))
            before.put_back()
        batch = Accumulated(tasks.ids, rows, tasks.values)
        self._accumulated = batch if so_far is None else so_far.followed_by(batch)

    @contextmanager
    def _undone_if_it_raises(self) -> Iterator[None]:
        """The first step makes the state; if it raises, there is none."""
        before = self.state_dict() if self._tasks is None else None
        try:
            yield
        except BaseException:
            if before is not None:
                self.load_state_dict(before)
            raise

    @uncompiled
    def after_step(self, losses: Losses) -> None:
        """Tells the losses after the optimizer's step, on the same batch: FAMO learns from them, other rules do not.

        Args:
            losses: as for `backward`, but without need for a graph. What tasks had none there is not read.

        Raises:
            ValueError, TypeError: for losses that do not fit those of `backward`.
            RuntimeError: before the first step.
        """
        if self._tasks is None:
            self._read(losses, "losses", need_graph=False)
            raise RuntimeError("after_step comes after backward, which has not been called")
        only = range(self._tasks) if self._last is None else self._last
        tasks = self._read(losses, "losses", need_graph=False, only=only)
        self.losses.after_step(tasks.values, self._run)

    def _read(
        self,
        losses: Losses,
        argument: str,
        *,
        need_graph: bool = True,
        only: Sequence[int] | None = None,
    ) -> TaskLosses:
        """The losses of one batch, checked."""
        known = None
        if self._tasks is not None:
            known = self._tasks, "as in earlier steps"
        elif self._given_tasks is not None:
            known = self._given_tasks, "as Balancer(tasks=...) says"
        tasks = TaskLosses(losses, self._names, argument, need_graph=need_graph, only=only, tasks=known)
        self._check_device(tasks, argument)
        return tasks

    def _read_other(self, batch: Losses, names: tuple[str, ...] | None, argument: str, first: TaskLosses) -> TaskLosses:
        """The losses of an independent batch, checked."""
        tasks = TaskLosses(batch, names, argument, tasks=(first.total, "as losses does"))
        self._check_device(tasks, argument)
        if tasks.active != first.active:
            expected, found = (range(first.total) if t.active is None else t.active for t in (first, tasks))
            raise ValueError(f"{argument} must have the tasks {[*expected]} as losses does, found {[*found]}")
        return tasks

    def _check_device(self, tasks: TaskLosses, argument: str) -> None:
        if tasks.values.device != self.shared[0].device:
            raise ValueError(
                f"{argument} must be on {self.shared[0].device} like the shared parameters, found {tasks.values.device}"
            )

    def _set_active(self, ids: tuple[int, ...] | None, tasks: TaskLosses, captured: bool) -> None:
        """Tells rule and method which tasks the step has."""
        active = None
        if ids is not None:
            if ids not in self._sets:
                if captured:
                    raise RuntimeError(
                        f"a step of the tasks {[*ids]} alone cannot be captured in a CUDA graph before an ordinary one "
                        "of the same tasks"
                    )
                if len(self._sets) == MOST_SETS:
                    self._sets.clear()
                self._sets[ids] = ActiveTasks.of(ids, tasks.total, tasks.values.device)
            active = self._sets[ids]
        self.losses.active = self.gradients.active = active

    @property
    def _run(self) -> Backend:
        return resolve(self.backend, self.shared[0].device.type)

    def _check_capture(self) -> None:
        if self._tasks is None:
            raise RuntimeError("the first step cannot be captured in a CUDA graph: take one before, it makes the state")
        for part in (self.losses, self.gradients):
            if reason := part.host_decision():
                raise RuntimeError(f"this step cannot be captured in a CUDA graph: {reason} on the host")

    def _start(self, tasks: TaskLosses) -> None:
        if self._tasks is None:
            self._tasks, self._names, self._unreached = tasks.total, self._names or tasks.names, None
            self.losses.start(self._tasks, tasks.values.device)
            self.gradients.start(self._tasks, self.shared[0].device)
            if self.bank_dtype is not None and not self._keeps_gradients():
                raise ValueError(f"bank_dtype must be None for {self.gradients!r}, which keeps no gradients")
        if self._unreached is None or not self._unreached.isdisjoint(tasks.ids):
            self._find_heads(tasks)

    def _find_heads(self, tasks: TaskLosses) -> None:
        """The task-specific parameters of tasks that have not been there before."""
        if self._unreached is None:
            self._unreached = set(range(tasks.total))
        if self.heads == "scaled":
            known = {id(p) for p in [*self.shared, *self._head_leaves]}
            self._head_leaves += [p for p in leaves(tasks) if isinstance(p, nn.Parameter) and id(p) not in known]
        self._unreached.difference_update(tasks.ids)

    def _head_params(self) -> list[Tensor]:
        return self.task_parameters or self._head_leaves

    def _step(
        self, tasks: TaskLosses, others: Sequence[TaskLosses], factor: Tensor | None, retain_graph: bool
    ) -> BalanceResult:
        ids, rows, losses = tasks.ids, None, tasks.values
        if self._accumulated is not None:
            ids, rows, losses = self._accumulated.ids, self._accumulated.rows, self._accumulated.losses
        scales, loss_status = self.losses.scales(losses, self._run)
        seeds = scales if factor is None else scales * factor.to(scales.dtype)
        units = _units(factor, scales, rows is not None)
        learned = self.parameters() if factor is not None else []
        with (
            GradsSetAside(self.shared) as shared,
            GradsSetAside(self._head_params()) as heads,
            GradsSetAside(learned) as learned_grads,
        ):
            step = _Step(tasks, ids, losses, scales, seeds, units, rows, retain_graph, shared, heads)
            done = self._passes(step, others)
            status = done.status | loss_status
            if factor is not None:
                of_heads = self._status_of_heads()
                self.gradients.withdraw(of_heads != 0)
                status = status | of_heads
            if done.stored is not None:
                done.stored.commit(status)
            self.losses.commit(losses, scales, status)
            self.gradients.commit(status)
            for p in learned:
                if p.grad is not None and factor is not None:
                    p.grad.mul_(factor)
            learned_grads.add_back()
        active = self.losses.active
        if active is None:
            return BalanceResult(tasks.names, losses, scales, done.weights, status, done.measured)
        return BalanceResult(
            names=tasks.names,
            losses=active.spread(losses, torch.nan),
            scales=active.spread(scales),
            weights=active.spread(done.weights),
            status=status,
            measured=None if done.measured is None else active.spread(done.measured),
            active=active.ids,
        )

    def _passes(self, step: _Step, others: Sequence[TaskLosses]) -> _Outcome:
        """The passes that the method's next step needs, and `.grad` from them."""
        needs = self.gradients.needs()
        if others:
            return self._crossed_passes(step, others)
        if needs is Needs.ELEMENTS:
            return self._element_passes(step)
        if step.rows is None:
            if needs is Needs.NOTHING:
                return self._joint_pass(step)
            if needs is Needs.HELD and self.heads == "weighted":
                return self._held_pass(step)
        return self._task_passes(step)

    def _task_passes(self, step: _Step) -> _Outcome:
        """One pass for each task; weights from what they show; their weighted sum into `.grad`."""
        self._make_previous_plain(step)
        rows, head_rows, needs = self._rows(step), self._head_rows(step), self.gradients.needs()
        measures = {Needs.EXCESS: rows.excess, Needs.GRAM: rows.gram, Needs.HELD: rows.gram}
        measure = measures.get(needs, rows.sq_norms)
        self._fill(step, rows, head_rows, measure)
        measured = measure()
        weights, status = self.gradients.solve(measured, step.losses, step.scales, self._run)
        rows.write(weights, step.shared.previous)
        self._write_heads(step, head_rows, weights)
        return _Outcome(weights, status, None if needs is Needs.EXCESS else measured, rows)

    def _fill(
        self, step: _Step, rows: TaskGradients, head_rows: KeptGradients | None, measure: Measure | None = None
    ) -> None:
        """Gradients of shared parameters and, where they are kept, of heads, task by task; `measure` comes next."""
        if step.rows is not None:
            params = len(self.shared)
            for row in step.rows:
                rows.add(row[:params])
                if head_rows is not None:
                    head_rows.add(row[params:])
            return
        passes = backward_passes(step.tasks, step.seeds, step.retain_graph)
        for _ in self._capture.fill(rows, passes, step.ids, measure):
            if head_rows is not None:
                head_rows.add(take_grads(self.task_parameters, "task_parameters"))

    def _head_rows(self, step: _Step) -> KeptGradients | None:
        """Where heads' gradients are kept for their weights or scales; None: they add up in `.grad`."""
        if step.rows is None and self.heads == "scaled":
            return None
        return KeptGradients(self._head_params(), self._run, step.units)

    def _write_heads(self, step: _Step, rows: KeptGradients | None, weights: Tensor) -> None:
        if rows is None:
            step.heads.add_back()
        else:
            own = weights if self.heads == "weighted" else torch.ones_like(weights)
            rows.write(own, step.heads.previous)

    def _element_passes(self, step: _Step) -> _Outcome:
        """One pass for each task; then each element of `.grad` from some of the tasks, with weights 1."""
        self._make_previous_plain(step)
        # A factor that all rows share does not change which elements are taken.
        units = step.units if step.rows is not None else Units()
        rows = KeptGradients(self.shared, self._run, units, self._outgoing, self.bank_dtype)
        head_rows = self._head_rows(step)
        self._fill(step, rows, head_rows)
        sq_norm = rows.write_of_one_sign(self.gradients.counter(), self.gradients.leak(), step.shared.previous)
        _, status = self.gradients.solve(sq_norm, step.losses, step.scales, self._run)
        weights = torch.ones_like(step.scales, dtype=torch.float64)
        self._write_heads(step, head_rows, weights)
        return _Outcome(weights, status, stored=rows)

    def _crossed_passes(self, step: _Step, others: Sequence[TaskLosses]) -> _Outcome:
        """Weights from the inner products of two batches' gradients, all scaled as the losses are."""
        self._make_previous_plain(step)
        tasks, K = step.tasks, len(step.tasks)
        pair = [KeptGradients(self.shared, self._run, step.units, dtype=self.bank_dtype) for _ in range(2)]
        head_rows = KeptGradients(self.task_parameters, self._run, step.units) if self.task_parameters else None
        for rows, batch in zip(pair, others if len(others) == 2 else (tasks, *others), strict=True):
            into_params_only = batch is not tasks
            for grads in task_passes(
                batch, step.seeds, self.shared, step.retain_graph, into_params_only=into_params_only
            ):
                rows.add(grads)
                del grads
                if batch is tasks and head_rows is not None:
                    head_rows.add(take_grads(self.task_parameters, "task_parameters"))
        both = self._run.Table([*pair[0].rows, *pair[1].rows], 2 * K)
        cross = step.units.gram(self._run.gram(both, 2 * K)[:K, K:])
        weights, status = self.gradients.solve(cross, step.losses, step.scales, self._run)
        if len(others) == 1:
            pair[0].write(weights, step.shared.previous)
            self._write_heads(step, head_rows, weights)
        else:
            self._weighted_pass(step, weights)
            status = status | _bit_unless_finite(self._sq_norm_of_sum())
            step.shared.add_back()
            step.heads.add_back()
        return _Outcome(weights, status)

    def _weighted_pass(self, step: _Step, weights: Tensor) -> None:
        """The update by weights known before: one pass, and one for heads that take no weights."""
        weighted, leaves_of_heads = step.seeds * weights.to(step.seeds.dtype), self._head_leaves
        if self.heads == "weighted" or not leaves_of_heads:
            joint_pass(step.tasks, weighted, step.retain_graph)
            return
        joint_pass(step.tasks, weighted, True, [p for p in self.shared if p.requires_grad])
        joint_pass(step.tasks, step.seeds, step.retain_graph, [p for p in leaves_of_heads if p.requires_grad])

    def _joint_pass(self, step: _Step) -> _Outcome:
        """One pass for all tasks, with weights 1; the gradients stay where autograd puts them."""
        joint_pass(step.tasks, step.seeds, step.retain_graph)
        _, status = self.gradients.solve(self._sq_norm_of_sum(), step.losses, step.scales, self._run)
        step.shared.add_back()
        step.heads.add_back()
        # Of the sum of the gradients it is only known whether it is finite.
        return _Outcome(torch.ones_like(step.scales, dtype=torch.float64), status & int(Status.NON_FINITE))

    def _held_pass(self, step: _Step) -> _Outcome:
        """One pass for all tasks, with weights that were known before it."""
        self._make_previous_plain(step)
        weights, units = self.gradients.held_weights(), step.units.of_sum()
        joint_pass(step.tasks, step.seeds * weights.to(step.seeds.dtype), step.retain_graph)
        rows, head_rows = (KeptGradients(params, self._run, units) for params in (self.shared, self.task_parameters))
        rows.add(take_grads(self.shared))
        head_rows.add(take_grads(self.task_parameters, "task_parameters"))
        factor, status = self.gradients.solve_held(rows.sq_norms(), self._run)
        rows.write(factor, step.shared.previous)
        head_rows.write(factor, step.heads.previous)
        return _Outcome(weights * factor, status)

    def _status_of_heads(self) -> Tensor:
        """NON_FINITE where a head's gradient is; a GradScaler skips that step, too."""
        grads = [p.grad for p in self._head_params()]
        dense = [grad for grad in grads if grad is not None and grad.layout is torch.strided]
        if not dense:
            return torch.zeros((), dtype=torch.int32, device=self.shared[0].device)
        return _bit_unless_finite(self._run.sq_norms(self._run.Table(dense, 1), 1))

    def _sq_norm_of_sum(self) -> Tensor:
        """Of what a joint pass left in `.grad` of the shared parameters, [1]."""
        total = [g if g is None or g.layout is torch.strided else g._values() for g in (p.grad for p in self.shared)]
        return self._run.sq_norms(self._run.Table(total, 1), 1)

    def _make_previous_plain(self, step: _Step) -> None:
        """What is added to, as memory that can be written to."""
        step.shared.make_plain("shared")
        if self.task_parameters:
            step.heads.make_plain("task_parameters")

    def _rows(self, step: _Step) -> TaskGradients:
        method, run, units = self.gradients, self._run, step.units
        decay = method.ema_decay()
        if decay is not None:
            scales = method.row_scales()
            return AveragedGradients(self.shared, run, self._averages, step.ids, decay, scales, step.losses, units)
        if method.needs() is Needs.EXCESS:
            return SquaredGradients(self.shared, run, self._averages, step.ids, units, self._outgoing, self.bank_dtype)
        streams = method.needs() is Needs.RUNNING_NORMS and step.rows is None
        if streams and rows_in_cache(self.shared) < len(step.tasks):
            return RunningSum(self.shared, run, method.running_weight, method.running_factor, units)
        return KeptGradients(self.shared, run, units, self._outgoing, self.bank_dtype)

    def _keeps_gradients(self) -> bool:
        """Whether steps keep K gradients, whatever the parameters' size."""
        return self.gradients.ema_decay() is None and self.gradients.needs() not in (Needs.NOTHING, Needs.RUNNING_NORMS)

    def end_epoch(self) -> None:
        """Tells what counts epochs that one has ended (IGBv1 measures its base losses over one)."""
        self.losses.end_epoch()
        self.gradients.end_epoch()

    def parameters(self) -> list[nn.Parameter]:
        """The balancer's own learned parameters (IMTL-L's log scales), for an optimizer."""
        return [*self.losses.parameters(), *self.gradients.parameters()]

    def param_groups(self) -> list[dict[str, Any]]:
        """The learned parameters as groups for an optimizer, with the learning rates that their methods recommend.

        ::

            optimizer = torch.optim.Adam([{"params": model.parameters()}, *balancer.param_groups()], lr=1e-3)
        """
        groups = []
        for part in (self.losses, self.gradients):
            if params := part.parameters():
                rate = {} if part.learning_rate is None else {"lr": part.learning_rate}
                groups.append({"params": params, **rate})
        return groups

    def state_dict(self) -> dict[str, Any]:
        """Everything that influences the next step: plain containers, numbers and tensors (not copies)."""
        return {
            "tasks": self._tasks,
            "names": self._names,
            "method": [self.losses.name, self.gradients.name],
            "options": self._options(),
            "losses": self.losses.state_dict(),
            "gradients": self.gradients.state_dict(),
            "averages": self._averages.rows(),
            "last": self._last,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`'s result, from any device; the next step then has the same bits as after the step that
        was saved. Options stay this balancer's; where the state was of others, that is logged.

        Raises:
            ValueError: where the state is of other methods, or of other shared parameters. Nothing is changed then.
        """
        if list(state["method"]) != [self.losses.name, self.gradients.name]:
            raise ValueError(
                f"the state is of {'+'.join(state['method'])}, "
                f"this balancer is {self.losses.name}+{self.gradients.name}"
            )
        if state["tasks"] is not None and self._given_tasks not in (None, state["tasks"]):
            raise ValueError(f"the state has {state['tasks']} tasks, Balancer(tasks=...) says {self._given_tasks}")
        names = None if state["names"] is None else tuple(state["names"])
        if names is not None and self._given_names not in (None, names):
            raise ValueError(f"the state has the tasks {names}, Balancer(tasks=...) says {self._given_names}")
        expected = [(tuple(p.shape), accumulator_dtype(p.dtype)) for p in self.shared]
        for row in state["averages"]:
            found = [None if average is None else (tuple(average.shape), average.dtype) for average in row]
            if len(found) != len(expected) or any(f not in (None, e) for f, e in zip(found, expected, strict=True)):
                raise ValueError(f"the state's moving averages do not fit the shared parameters: {found}")
        if (saved := state.get("options", self._options())) != self._options():
            warn_once(f"a state of {'+'.join(saved)} was loaded into {'+'.join(self._options())}")
        state = _copied(state, self.shared[0].device)  # the caller's tensors are not ours to write to
        self.losses.load_state_dict(state["losses"])
        self.gradients.load_state_dict(state["gradients"])
        self._tasks = state["tasks"]
        self._names = names or self._given_names
        self._last = None if state.get("last") is None else tuple(state["last"])
        self._averages = MovingAverages(state["averages"])

    def _options(self) -> list[str]:
        return [repr(self.losses), repr(self.gradients)]

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: all but what the next step finds or makes anew."""
        return {
            **vars(self),
            "_head_leaves": [],
            "_unreached": None,
            "_outgoing": None if self._outgoing is None else [],
        }

    def __repr__(self) -> str:
        return (
            f"Balancer({self.gradients!r}, losses={self.losses!r}, shared={len(self.shared)} tensors, "
            f"heads={self.heads!r}, backend={self.backend!r})"
        )


def _loss_factor(scaler: torch.amp.GradScaler | None, device: torch.device) -> Tensor | None:
    """The factor of a GradScaler, float32 []; None where there is none. Nothing waits for it."""
    if scaler is None or not scaler.is_enabled():
        return None
    return scaler.scale(torch.ones((), device=device))


def _units(factor: Tensor | None, scales: Tensor, scaled_later: bool) -> Units:
    """What rows are measured in: with the factor, and before the scales where these come later."""
    rows = scales.double() if scaled_later else None
    if factor is None:
        return Units(rows)
    factor = factor.double()
    return Units((1 / factor).expand(len(scales)).contiguous() if rows is None else rows / factor, factor)


def _bit_unless_finite(sq_norm: Tensor) -> Tensor:
    """The status NON_FINITE or 0, int32 [], from a squared norm [1]."""
    return (~sq_norm.isfinite().reshape(())).int()  # NON_FINITE is bit 0


def _copied(state: Any, device: torch.device) -> Any:
    """Nested containers with copies of their tensors on the device."""
    if isinstance(state, Tensor):
        return state.detach().to(device, copy=True)
    if isinstance(state, Mapping):
        return {key: _copied(value, device) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [_copied(value, device) for value in state]
    return state


def _methods(
    gradients: str | GradientBalancer | LossBalancer, losses: str | LossBalancer | None
) -> tuple[GradientBalancer, LossBalancer]:
    if isinstance(gradients, str):
        parts = gradients.split("+")
        if len(parts) > 2 or (len(parts) == 2 and losses is not None):
            raise ValueError(
                f'gradients must name "method" or "rule+method" (then losses stays None), found {gradients!r}'
            )
        if len(parts) == 2:
            losses = parts[0]
        gradients = _rule(parts[0]) if parts[-1] in RULES and len(parts) == 1 else _method(parts[-1])
    if isinstance(gradients, LossBalancer):
        if losses is not None:
            raise ValueError(f"losses must stay None where gradients is a loss-balancing rule, found {losses!r}")
        return Equal(), gradients
    if not isinstance(gradients, GradientBalancer):
        raise TypeError(f"gradients must be a method or its name, found {type(gradients).__name__}")
    if losses is None:
        losses = gradients.default_losses()
    elif isinstance(losses, str):
        losses = _rule(losses)
    if not isinstance(losses, LossBalancer):
        raise TypeError(f"losses must be a loss-balancing rule or its name, found {type(losses).__name__}")
    return gradients, losses


def _method(name: str) -> GradientBalancer:
    if name not in METHODS:
        raise ValueError(f"gradient balancing must be one of {sorted(METHODS)}, found {name!r}")
    if name == "grad_norm":
        raise ValueError("grad_norm has a parameter for each task: pass GradNorm(num_tasks=...) instead of its name")
    return METHODS[name]()


def _rule(name: str) -> LossBalancer:
    if name not in RULES:
        raise ValueError(f"loss balancing must be one of {sorted(RULES)}, found {name!r}")
    rule = RULES[name]
    if issubclass(rule, LearnedLossBalancer):
        example = f"losses={rule.__name__}(num_tasks=...)"
        raise ValueError(f"{name} has a parameter for each task: pass {example} instead of its name")
    return rule()


def _known_tasks(given: Iterable[str] | int | None) -> tuple[int | None, tuple[str, ...] | None]:
    """The number of tasks and their names, as far as they are known before the first step."""
    if given is None or (isinstance(given, int) and not isinstance(given, bool)):
        if given is not None and given < 1:
            raise ValueError(f"tasks must be at least 1, found {given}")
        return given, None
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"tasks must be the tasks' names or their number, found {given!r}")
    names = tuple(given)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"tasks must name at least one task, and each once, found {list(names)}")
    return len(names), names


def _parameters(argument: str, given: Iterable[Tensor] | nn.Module) -> list[Tensor]:
    """The tensors to balance, checked. Frozen parameters are among them, since they may be thawed later."""
    known = DTYPES + COMPLEX_DTYPES
    if isinstance(given, nn.Module):  # what is frozen for good may have a quantised dtype
        given = [p for p in given.parameters() if p.requires_grad or p.dtype in known]
    if not isinstance(given, Iterable):
        raise TypeError(f"{argument} must be an iterable of tensors or a module, found {type(given).__name__}")
    params = list(given)
    if not params:
        raise ValueError(f"{argument} must hold at least one parameter, found none (was a generator used up?)")
    first: dict[int, int] = {}
    for i, p in enumerate(params):
        if not isinstance(p, Tensor):
            raise TypeError(f"{argument}[{i}] must be a tensor, found {type(p).__name__}")
        if not p.is_leaf:
            raise ValueError(f"{argument}[{i}] must be a leaf tensor, found the result of {p.grad_fn}")
        if not (p.requires_grad or isinstance(p, nn.Parameter)):
            raise ValueError(f"{argument}[{i}], of shape {tuple(p.shape)}, must require grad")
        if p.dtype not in known:
            raise TypeError(f"{argument}[{i}] must have one of the dtypes {known}, found {p.dtype}")
        if p.device != params[0].device:
            raise ValueError(f"{argument}[{i}] must be on {params[0].device} like {argument}[0], found {p.device}")
        if id(p) in first:
            raise ValueError(f"{argument}[{i}] is the same tensor as {argument}[{first[id(p)]}]")
        first[id(p)] = i
    if not any(p.requires_grad for p in params):
        raise ValueError(f"{argument} must hold at least one parameter that requires grad, found {len(params)} frozen")
    return params
