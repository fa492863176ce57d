"""The balanced step: from K losses to `.grad`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from igb_kernels._compile import keep_saved_tensors, uncompiled
from igb_kernels._log import warn_once
from igb_kernels.active import ActiveTasks
from igb_kernels.arguments import known_tasks, methods_of, parameters_of
from igb_kernels.backends import Backend, captures_graph, resolve
from igb_kernels.capture import GradsSetAside, Losses, TaskLosses, task_passes
from igb_kernels.gradients import GradientBalancer
from igb_kernels.gradients.base import Needs
from igb_kernels.hooks import CAPTURES
from igb_kernels.losses import LossBalancer
from igb_kernels.ops import accumulator_dtype
from igb_kernels.passes import Passes, Place, Step, units_of
from igb_kernels.representation import Representation
from igb_kernels.result import BalanceResult
from igb_kernels.store import Accumulated, Grads, MovingAverages

if TYPE_CHECKING:
    from igb_kernels.distributed.data_parallel import DataParallel

HEADS = ("scaled", "weighted")
MOST_SETS = 1024
"""Of tasks that take part in a step; more are not kept."""


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
            They may be on several devices, as layers are in model parallelism, and heads on others: gradients are
            worked on where they are, by a backend of each device, and K×K numbers go to the device of the losses, on
            which the state is. Between GPUs nothing is waited for. Such steps cannot be captured in CUDA graphs.
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
            as with "passes". So does, with a word in the log, a model on several devices, or whose gradients come in
            several pieces (reentrant checkpoints of tied blocks) or on several streams.
        process_group: a `torch.distributed.ProcessGroup` (as `torch.distributed.group.WORLD`) whose ranks train the
            same model, each on its own part of the batch. All ranks then call `backward`, `after_step`, `end_epoch`,
            `state_dict` and `load_state_dict` together. Weights are those of the whole batch: losses are means over
            the ranks that have the task, and gradients are averaged before anything is measured; `.grad` becomes that
            of the whole batch, with the same bits on all ranks. A task may be missing on some ranks, and a rank may
            have none (`[None] * K`). In a DistributedDataParallel, made before the balancer, communication is taken
            over for good. Parameters may be DTensors of `fully_shard`. See DISTRIBUTED.md.

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
        process_group: Any = None,
    ) -> None:
        self.gradients, self.losses = methods_of(gradients, losses)
        self.shared = parameters_of("shared", shared)
        if heads not in HEADS:
            raise ValueError(f"heads must be one of {HEADS}, found {heads!r}")
        if (heads == "weighted") != (task_parameters is not None):
            given = "none were given" if task_parameters is None else f"heads is {heads!r}"
            raise ValueError(f'task_parameters go with heads="weighted", and with it alone; {given}')
        self.heads = heads
        self.task_parameters = [] if task_parameters is None else parameters_of("task_parameters", task_parameters)
        if both := {id(p) for p in self.shared} & {id(p) for p in self.task_parameters}:
            raise ValueError(f"shared and task_parameters must be disjoint, found {len(both)} tensors in both")
        if bank_dtype not in (None, torch.bfloat16):
            raise ValueError(f"bank_dtype must be None or torch.bfloat16, found {bank_dtype!r}")
        self.bank_dtype = bank_dtype
        self.backend = backend
        keep_saved_tensors()  # whatever the method: compiled code outlives the balancer
        for kind in sorted({p.device.type for p in [*self.shared, *self.task_parameters]}):
            resolve(backend, kind)  # says now what cannot be had
        if capture not in CAPTURES:
            raise ValueError(f"capture must be one of {tuple(CAPTURES)}, found {capture!r}")
        self.capture = capture
        self._passes = Passes(
            self.gradients,
            self.shared,
            heads,
            self.task_parameters,
            backend,
            bank_dtype,
            CAPTURES[capture](self.shared),
        )
        self._parallel: DataParallel | None = None
        if process_group is not None:
            self._join(process_group)
        self._given_tasks, self._given_names = known_tasks(tasks)
        self._tasks: int | None = None  # from the first step on
        self._names = self._given_names
        self._last: tuple[int, ...] | None = None  # the tasks of the last step, None: all
        self._sets: dict[tuple[int, ...], ActiveTasks] = {}
        self._accumulated: Accumulated | None = None

    def _join(self, process_group: Any) -> None:
        """Takes part in the steps of the group's processes."""
        from igb_kernels.distributed.data_parallel import DataParallel

        if self.capture != "passes":
            raise ValueError(f'capture must be "passes" with a process_group, found {self.capture!r}')
        self._parallel = DataParallel(process_group, self.shared)
        self._passes.processes = self._parallel.ranks
        if self._parallel.wrapped is not None:
            self._passes.give_heads(self._parallel.wrapped.heads)

    @uncompiled
    def backward(
        self,
        losses: Losses,
        *,
        scaler: torch.amp.GradScaler | None = None,
        independent: Sequence[Losses] = (),
        representation: Tensor | Sequence[Tensor] | None = None,
        retain_graph: bool = False,
    ) -> BalanceResult:
        """Computes the balanced gradients and adds them to `.grad`; replaces `sum(losses).backward()`.

        Args:
            losses: K scalar tensors in a list, or a dict by task name, or one 1-D tensor made by torch.stack,
                torch.cat or `losses[k] = loss` (else each pass runs all heads); on one device, that of the first step,
                not scaled by the scaler. None in a list, a name that a dict does not have, or a loss that does not
                require grad is a missing task: the step is one of the others alone, and the state of the missing ones
                stays as it is.
            scaler: the GradScaler of a training with float16 autocast. The passes are run with its factor, and `.grad`
                holds it, as after `scaler.scale(loss).backward()`; losses, norms and state are what they are without.
                A step that overflows reaches `.grad` as NaN or infinity, so that the scaler skips it, and leaves the
                balancer's state as it was. Gradients of learned weights get the factor, too.
            independent: for SDMGrad and MoDo, the same losses on one or two further batches. With two, the weights
                come from these alone, and `losses` take two passes in all; with one, from it and `losses`. These passes
                leave task-specific parameters alone.
            representation: tensors through which the shared parameters reach the losses, as the encoder's output that
                all heads take. Tasks are then compared by their gradients there, not on `shared`: K passes through
                the heads, and one through the encoder with the weighted sum (MGDA-UB: Sener and Koltun 2018, eq. 4;
                IMTL: Liu et al. 2021, section 3.2). Cheaper, and another algorithm. Nothing of the shared
                parameters may reach the losses around it. Methods with moving averages of gradients refuse it: the
                samples differ from step to step.
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
        captured = self._captures_graph()
        if self._accumulated is None and self._parallel is None:
            self._set_active(tasks.active, tasks, captured)
        if captured:
            self._check_capture()
        factor = _loss_factor(scaler, tasks.values.device)
        before = self.state_dict() if self._tasks is None else None
        try:
            self._start(tasks)
            if self._accumulated is not None:
                self._accumulate(tasks, factor, retain_graph)
                if self._parallel is None:
                    ids = tuple(self._accumulated.ids)
                    self._set_active(ids if len(ids) < tasks.total else None, tasks, captured)
            at = None if representation is None else self._at(representation, tasks, others)
            if at is None:
                result = self._step(self._passes, tasks, others, factor, retain_graph)
            else:
                with at:
                    result = self._step(self._passes.at(at), tasks, others, factor, retain_graph, at)
        except BaseException:
            self._forget(before)
            raise
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
        if self._captures_graph():
            raise RuntimeError("accumulate cannot be captured in a CUDA graph: gradients are kept on the host's side")
        before = self.state_dict() if self._tasks is None else None
        try:
            self._start(tasks)
            self._accumulate(tasks, _loss_factor(scaler, tasks.values.device), retain_graph)
        except BaseException:
            self._forget(before)
            raise
        self._names = self._names or tasks.names

    def _accumulate(self, tasks: TaskLosses, factor: Tensor | None, retain_graph: bool) -> None:
        self._accumulated, so_far = None, self._accumulated
        params = [*self.shared, *self._passes.head_params()]
        seeds = torch.ones_like(tasks.values) if factor is None else factor.expand(len(tasks))
        onto = () if so_far is None else so_far.rows_of(tasks.ids, len(params))
        with GradsSetAside(params) as before:
            rows = list(task_passes(tasks, seeds, params, retain_graph, onto=onto))
            before.put_back()
        batch = Accumulated(tasks.ids, rows, tasks.values)
        self._accumulated = batch if so_far is None else so_far.followed_by(batch)

    def _forget(self, before: dict[str, Any] | None) -> None:
        """After a step that raised: the first one had made the state."""
        if before is not None:
            self.load_state_dict(before)

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
        if self._parallel is None:
            values = self._read(losses, "losses", need_graph=False, only=only).values
        else:
            tasks = self._read(losses, "losses", need_graph=False)
            ids = [k for k in tasks.ids if k in only]
            own = tasks.values[[k in only for k in tasks.ids]]
            together = self._parallel.losses(own, ids, self._tasks)
            if [*together.ids] != [*only]:
                raise ValueError(
                    f"losses must hold those of the tasks {[*only]} as the last step's did, found {[*together.ids]}"
                )
            values = together.values
        self.losses.after_step(values, self._run)

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
        tasks = TaskLosses(
            losses,
            self._names,
            argument,
            need_graph=need_graph,
            only=only,
            tasks=known,
            elsewhere=self._elsewhere,
        )
        self._check_device(tasks, argument)
        return tasks

    @property
    def _elsewhere(self) -> torch.device | None:
        """Where this process's losses would be if only others had some; None where there are no others."""
        return None if self._parallel is None else self._passes.home

    def _read_other(self, batch: Losses, names: tuple[str, ...] | None, argument: str, first: TaskLosses) -> TaskLosses:
        """The losses of an independent batch, checked."""
        known = first.total, "as losses does"
        tasks = TaskLosses(batch, names, argument, tasks=known, elsewhere=self._elsewhere)
        if tasks.values.device != first.values.device:
            raise ValueError(f"{argument} must be on {first.values.device} like losses, found {tasks.values.device}")
        if tasks.active != first.active:
            expected, found = (range(first.total) if t.active is None else t.active for t in (first, tasks))
            raise ValueError(f"{argument} must have the tasks {[*expected]} as losses does, found {[*found]}")
        return tasks

    def _check_device(self, tasks: TaskLosses, argument: str) -> None:
        found, home = tasks.values.device, self._passes.home
        if found == home:
            return
        known = self._tasks is not None and self._passes.knows_heads
        if known or found.type == "meta":
            like = "as in earlier steps" if known else "like the shared parameters"
            raise ValueError(f"{argument} must be on {home} {like}, found {found}")

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
        return self._passes.several or resolve(self.backend, self.shared[0].device.type)

    def _captures_graph(self) -> bool:
        several = self._passes.several
        return captures_graph(self.shared[0].device) if several is None else several.captured()

    def _check_capture(self) -> None:
        if self._parallel is not None:
            raise RuntimeError("a step of several processes cannot be captured in a CUDA graph")
        if self._passes.several is not None:
            devices = ", ".join(map(str, self._passes.several.devices))
            raise RuntimeError(f"a step on several devices cannot be captured in a CUDA graph: it is on {devices}")
        if self._tasks is None:
            raise RuntimeError("the first step cannot be captured in a CUDA graph: take one before, it makes the state")
        for part in (self.losses, self.gradients):
            if reason := part.host_decision():
                raise RuntimeError(f"this step cannot be captured in a CUDA graph: {reason} on the host")

    def _start(self, tasks: TaskLosses) -> None:
        known = self._tasks is not None
        if not known:
            self._tasks, self._names = tasks.total, self._names or tasks.names
            self.losses.start(self._tasks, tasks.values.device)
            self._passes.forget_heads()
        if not self._passes.knows_heads:  # also with a state that was loaded: numbers for each task go where it is
            self.gradients.start(tasks.total, tasks.values.device)
        if not known and self.bank_dtype is not None and not self._passes.keeps_gradients():
            raise ValueError(f"bank_dtype must be None for {self.gradients!r}, which keeps no gradients")
        if self._passes.find_heads(tasks) and known:
            self.load_state_dict(self.state_dict())  # it was loaded before it was known where losses are
        if self._parallel is not None:
            self._agree(self._parallel)
        elif not known:
            _check_alone(self.shared)

    def _agree(self, parallel: DataParallel) -> None:
        """Before the first step: all ranks balance the same, and begin with the same numbers."""
        if self._passes.several is not None:
            raise ValueError(f"shared must be on one device with a process_group, found {self._passes.several.devices}")
        found = {
            "the number of tasks": self._tasks,
            "the tasks' names": self._names,
            "the balancer": self._options(),
            "heads": self.heads,
            "the shapes of shared": [(tuple(p.shape), str(p.dtype)) for p in self.shared],
            "the shapes of task-specific parameters (a DistributedDataParallel knows those of all tasks)": [
                (tuple(p.shape), str(p.dtype)) for p in self._passes.head_params()
            ],
        }
        if parallel.agree(found):
            parallel.check_wrapper()
            state = {"losses": self.losses.state_dict(), "gradients": self.gradients.state_dict()}
            state = _copied(parallel.ranks.from_first(_copied(state, torch.device("cpu"))), self._passes.home)
            self.losses.load_state_dict(state["losses"])
            self.gradients.load_state_dict(state["gradients"])

    def _at(
        self, representation: Tensor | Sequence[Tensor], tasks: TaskLosses, others: Sequence[TaskLosses]
    ) -> Representation | None:
        """Where the step compares gradients, if not on the shared parameters."""
        if others or self._accumulated is not None:
            found = "independent batches" if others else "micro-batches from accumulate()"
            raise ValueError(f"representation must be None with {found}: it is of one batch")
        if not self._passes.of_one_batch():
            raise ValueError(
                f"representation must be None for {self.gradients!r}: what it keeps of gradients outlives the batch"
            )
        at = Representation(representation, tasks, self.shared)
        return None if self.gradients.needs() is Needs.NOTHING else at  # weights 1: the same from one pass for all

    def _step(
        self,
        passes: Passes,
        tasks: TaskLosses,
        others: Sequence[TaskLosses],
        factor: Tensor | None,
        retain_graph: bool,
        at: Representation | None = None,
    ) -> BalanceResult:
        ids, rows, losses = tasks.ids, None, tasks.values
        if self._accumulated is not None:
            ids, rows, losses = self._accumulated.ids, self._accumulated.rows, self._accumulated.losses
        place: Place | None = at
        behind: Sequence[Tensor] = ()
        share = None
        if self._parallel is not None:
            together = self._parallel.losses(losses, ids, tasks.total)
            ids, losses, share = together.ids, together.values, together.share
            self._set_active(tuple(ids) if len(ids) < tasks.total else None, tasks, False)
            tasks, others = tasks.among(ids), [batch.among(ids) for batch in others]
            if self._accumulated is not None:
                rows = self._accumulated.rows_of(ids, len(self.shared) + len(passes.head_params()))
            if at is None:
                passes, place = self._parallel.passes(passes, self.gradients.needs(), bool(others))
            behind = self.shared
        scales, loss_status = self.losses.scales(losses, self._run)
        own = scales if share is None else scales * share.to(scales.dtype)
        seeds = own if factor is None else own * factor.to(own.dtype)
        units = units_of(factor, own, rows is not None)
        learned = self.parameters() if factor is not None else []
        with (
            GradsSetAside(behind) as of_replicas,
            GradsSetAside(passes.shared) as shared,
            GradsSetAside(passes.head_params()) as heads,
            GradsSetAside(learned) as learned_grads,
        ):
            step = Step(tasks, ids, losses, scales, seeds, units, rows, retain_graph, shared, heads)
            done = passes.run(step, others)
            status = done.status | loss_status
            if place is not None:
                place.pass_on(retain_graph)
            if self._parallel is not None:
                self._parallel.end_step([*passes.head_params(), *(self.shared if at is not None else ())])
                heads.add_back()
                of_replicas.add_back()
            if factor is not None:
                of_rest = passes.status_of(
                    [*passes.head_params(), *(self.shared if at is not None else ())], losses.device
                )
                self.gradients.withdraw(of_rest != 0)
                status = status | of_rest
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
            "averages": self._averages(),
            "last": self._last,
        }

    def _averages(self) -> list[Grads]:
        rows = self._passes.averages.rows()
        return rows if self._parallel is None else self._parallel.gathered(rows)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`'s result, from any device; the next step then has the same bits as after the step that
        was saved. Options stay this balancer's; where the state was of others, that is logged. What `accumulate` has
        gathered is dropped.

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
        rows = [
            [None if a is None else _copied(a, p.device) for a, p in zip(row, self.shared, strict=True)]
            for row in state["averages"]
        ]
        if self._parallel is not None:
            rows = self._parallel.own(rows)
        state = _copied({**state, "averages": []}, self._passes.home)  # the caller's tensors are not ours to write to
        self.losses.load_state_dict(state["losses"])
        self.gradients.load_state_dict(state["gradients"])
        self._tasks = state["tasks"]
        self._names = names or self._given_names
        self._last = None if state.get("last") is None else tuple(state["last"])
        self._accumulated = None
        self._passes.averages = MovingAverages(rows)
        if self._parallel is not None:
            self._parallel.agreed = False

    def _options(self) -> list[str]:
        return [repr(self.losses), repr(self.gradients)]

    def __repr__(self) -> str:
        return (
            f"Balancer({self.gradients!r}, losses={self.losses!r}, shared={len(self.shared)} tensors, "
            f"heads={self.heads!r}, backend={self.backend!r})"
        )


def _check_alone(shared: Sequence[Tensor]) -> None:
    """See `igb_kernels.distributed.modules.check_alone`."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from igb_kernels.distributed.modules import check_alone

        check_alone(shared)


def _loss_factor(scaler: torch.amp.GradScaler | None, device: torch.device) -> Tensor | None:
    """The factor of a GradScaler, float32 []; None where there is none. Nothing waits for it."""
    if scaler is None or not scaler.is_enabled():
        return None
    return scaler.scale(torch.ones((), device=device))


def _copied(state: Any, device: torch.device) -> Any:
    """Nested containers with copies of their tensors on the device."""
    if isinstance(state, Tensor):
        return state.detach().to(device, copy=True)
    if isinstance(state, Mapping):
        return {key: _copied(value, device) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [_copied(value, device) for value in state]
    return state
