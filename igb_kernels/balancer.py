"""The balanced step: from K losses to `.grad`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from igb_kernels._compile import keep_saved_tensors, uncompiled
from igb_kernels.backends import Backend, captures_graph, resolve
from igb_kernels.capture import (
    GradsSetAside,
    Losses,
    TaskLosses,
    joint_pass,
    leaves,
    take_grads,
    task_passes,
)
from igb_kernels.gradients import METHODS, Equal, GradientBalancer
from igb_kernels.gradients.base import Needs
from igb_kernels.losses import RULES, LearnedLossBalancer, LossBalancer
from igb_kernels.ops import COMPLEX_DTYPES, DTYPES, accumulator_dtype
from igb_kernels.result import BalanceResult
from igb_kernels.status import Status
from igb_kernels.store import (
    AveragedGradients,
    Grads,
    KeptGradients,
    MovingAverages,
    RunningSum,
    SquaredGradients,
    TaskGradients,
    rows_in_cache,
)

HEADS = ("scaled", "weighted")


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
    capturing it raises: with NashMTL's `update_every` above 1, and with IGBv1 until its base losses are known; so does
    DB-MTL where a parameter gets its first gradient. The other backends solve the K×K problem on the host, and wait.

    Models, heads and losses may be compiled, and so may be the function that calls `backward`, which breaks its graph.
    Since K passes go through one graph, a new balancer sets `torch._functorch.config.donated_buffer = False`, unless
    something has been compiled before.

    All steps run on one stream, or on streams that wait for each other, as for any tensors that outlive a step.

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
        backend: "auto", or a name from `igb_kernels.backends()`.

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
        backend: str = "auto",
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
        self.backend = backend
        keep_saved_tensors()  # whatever the method: compiled code outlives the balancer
        resolve(backend, self.shared[0].device.type)  # says now what cannot be had
        self._tasks: int | None = None
        self._names: tuple[str, ...] | None = None
        self._averages = MovingAverages()
        self._outgoing: list[Grads] | None = [] if self.shared[0].device.type == "cpu" else None
        self._head_leaves: list[Tensor] | None = None

    @uncompiled
    def backward(
        self, losses: Losses, *, independent: Sequence[Losses] = (), retain_graph: bool = False
    ) -> BalanceResult:
        """Computes the balanced gradients and adds them to `.grad`; replaces `sum(losses).backward()`.

        Args:
            losses: K scalar tensors in a list, or a dict by task name, or one 1-D tensor (best made by torch.stack);
                on the device of the shared parameters.
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
            balancer's state stay as they were.
        """
        tasks = self._read(losses, self._names, "losses")
        names = self._names or tasks.names
        others = [self._read(batch, names, f"independent[{i}]", len(tasks)) for i, batch in enumerate(independent)]
        if others and (not self.gradients.crosses or len(others) > 2):
            rule = (
                "hold at most two batches"
                if self.gradients.crosses
                else f"stay empty: {self.gradients.name} needs none"
            )
            raise ValueError(f"independent must {rule}; found {len(others)}")
        if captures_graph(self.shared[0].device):
            self._check_capture()
        before = self.state_dict() if self._tasks is None else None
        try:
            self._start(tasks)
            result = self._step(tasks, others, retain_graph)
        except BaseException:
            if before is not None:
                self.load_state_dict(before)
            raise
        self._names = self._names or tasks.names
        return result

    @uncompiled
    def after_step(self, losses: Losses) -> None:
        """Tells the losses after the optimizer's step, on the same batch: FAMO learns from them, other rules do not.

        Args:
            losses: as for `backward`, but without need for a graph.

        Raises:
            ValueError, TypeError: for losses that do not fit those of `backward`.
            RuntimeError: before the first step.
        """
        tasks = self._read(losses, self._names, "losses", need_graph=False)
        if self._tasks is None:
            raise RuntimeError("after_step comes after backward, which has not been called")
        self._check_number(tasks)
        self.losses.after_step(tasks.values)

    def _read(
        self,
        losses: Losses,
        names: tuple[str, ...] | None,
        argument: str,
        expected: int | None = None,
        *,
        need_graph: bool = True,
    ) -> TaskLosses:
        """The losses of one batch, checked."""
        tasks = TaskLosses(losses, names, argument, need_graph=need_graph)
        if tasks.values.device != self.shared[0].device:
            raise ValueError(
                f"{argument} must be on {self.shared[0].device} like the shared parameters, found {tasks.values.device}"
            )
        if expected is not None and len(tasks) != expected:
            raise ValueError(f"{argument} must hold {expected} tasks as losses does, found {len(tasks)}")
        return tasks

    def _check_number(self, tasks: TaskLosses) -> None:
        if len(tasks) != self._tasks:
            raise ValueError(f"losses must hold {self._tasks} tasks as in earlier steps, found {len(tasks)}")

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
            self._tasks, self._names = len(tasks), tasks.names
            self.losses.start(len(tasks), tasks.values.device)
            self.gradients.start(len(tasks), self.shared[0].device)
        self._check_number(tasks)
        if self._head_leaves is None and self.heads == "scaled":
            shared = {id(p) for p in self.shared}
            self._head_leaves = [p for p in leaves(tasks) if isinstance(p, nn.Parameter) and id(p) not in shared]

    def _step(self, tasks: TaskLosses, others: Sequence[TaskLosses], retain_graph: bool) -> BalanceResult:
        scales, loss_status = self.losses.scales(tasks.values, self._run)
        head_params = self.task_parameters or self._head_leaves or []
        with GradsSetAside(self.shared) as shared, GradsSetAside(head_params) as heads:
            needs = self.gradients.needs()
            if others:
                weights, status, measured = self._crossed_passes(tasks, scales, others, retain_graph, shared, heads)
            elif needs is Needs.NOTHING:
                weights, status, measured = self._joint_pass(tasks, scales, retain_graph, shared, heads)
            elif needs is Needs.ELEMENTS:
                weights, status, measured = self._element_passes(tasks, scales, retain_graph, shared, heads)
            elif needs is Needs.HELD and self.heads == "weighted":
                weights, status, measured = self._held_pass(tasks, scales, retain_graph, shared, heads)
            else:
                weights, status, measured = self._task_passes(tasks, scales, retain_graph, shared, heads)
                if self.heads == "scaled":
                    heads.add_back()
        status = status | loss_status
        self.losses.commit(tasks.values, scales, status)
        self.gradients.commit(status)
        return BalanceResult(tasks.names, tasks.values, scales, weights, status, measured)

    def _task_passes(
        self, tasks: TaskLosses, scales: Tensor, retain_graph: bool, shared: GradsSetAside, heads: GradsSetAside
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One pass for each task; weights from what they show; their weighted sum into `.grad`."""
        self._make_previous_plain(shared, heads)
        rows, head_rows = self._rows(tasks.values), KeptGradients(self.task_parameters, self._run)
        for grads in task_passes(tasks, scales, self.shared, retain_graph):
            rows.add(grads)
            del grads  # a store that does not keep them frees their memory for the next pass
            if self.task_parameters:
                head_rows.add(take_grads(self.task_parameters, "task_parameters"))
        needs = self.gradients.needs()
        if needs is Needs.EXCESS:
            measured = rows.excess()
        else:
            measured = rows.gram() if needs in (Needs.GRAM, Needs.HELD) else rows.sq_norms()
        weights, status = self.gradients.solve(measured, tasks.values, scales, self._run)
        rows.write(weights, shared.previous)
        if self.task_parameters:
            head_rows.write(weights, heads.previous)
        rows.commit(status)
        return weights, status, None if needs is Needs.EXCESS else measured

    def _element_passes(
        self, tasks: TaskLosses, scales: Tensor, retain_graph: bool, shared: GradsSetAside, heads: GradsSetAside
    ) -> tuple[Tensor, Tensor, None]:
        """One pass for each task; then each element of `.grad` from some of the tasks, with weights 1."""
        shared.make_plain("shared")
        rows = KeptGradients(self.shared, self._run, self._outgoing)
        for grads in task_passes(tasks, scales, self.shared, retain_graph):
            rows.add(grads)
        sq_norm = rows.write_of_one_sign(self.gradients.counter(), self.gradients.leak(), shared.previous)
        _, status = self.gradients.solve(sq_norm, tasks.values, scales, self._run)
        heads.add_back()
        rows.commit(status)
        return torch.ones_like(scales, dtype=torch.float64), status, None

    def _crossed_passes(
        self,
        tasks: TaskLosses,
        scales: Tensor,
        others: Sequence[TaskLosses],
        retain_graph: bool,
        shared: GradsSetAside,
        heads: GradsSetAside,
    ) -> tuple[Tensor, Tensor, None]:
        """Weights from the inner products of two batches' gradients, all scaled as `tasks` are."""
        self._make_previous_plain(shared, heads)
        K = len(tasks)
        pair = [KeptGradients(self.shared, self._run) for _ in range(2)]
        head_rows = KeptGradients(self.task_parameters, self._run)
        for rows, batch in zip(pair, others if len(others) == 2 else (tasks, *others), strict=True):
            for grads in task_passes(batch, scales, self.shared, retain_graph, into_params_only=batch is not tasks):
                rows.add(grads)
                if batch is tasks and self.task_parameters:
                    head_rows.add(take_grads(self.task_parameters, "task_parameters"))
        both = self._run.Table([*pair[0].rows, *pair[1].rows], 2 * K)
        weights, status = self.gradients.solve(self._run.gram(both, 2 * K)[:K, K:], tasks.values, scales, self._run)
        if len(others) == 1:
            pair[0].write(weights, shared.previous)
            if self.task_parameters:
                head_rows.write(weights, heads.previous)
            else:
                heads.add_back()
        else:
            self._weighted_pass(tasks, scales, weights, retain_graph)
            status = status | (~self._sq_norm_of_sum().isfinite().reshape(())).int()  # the bit NON_FINITE
            shared.add_back()
            heads.add_back()
        return weights, status, None

    def _weighted_pass(self, tasks: TaskLosses, scales: Tensor, weights: Tensor, retain_graph: bool) -> None:
        """The update by weights known before: one pass, and one for heads that take no weights."""
        weighted, leaves_of_heads = scales * weights.to(scales.dtype), self._head_leaves or []
        if self.heads == "weighted" or not leaves_of_heads:
            joint_pass(tasks, weighted, retain_graph)
            return
        joint_pass(tasks, weighted, True, [p for p in self.shared if p.requires_grad])
        joint_pass(tasks, scales, retain_graph, [p for p in leaves_of_heads if p.requires_grad])

    def _joint_pass(
        self, tasks: TaskLosses, scales: Tensor, retain_graph: bool, shared: GradsSetAside, heads: GradsSetAside
    ) -> tuple[Tensor, Tensor, None]:
        """One pass for all tasks, with weights 1; the gradients stay where autograd puts them."""
        joint_pass(tasks, scales, retain_graph)
        _, status = self.gradients.solve(self._sq_norm_of_sum(), tasks.values, scales, self._run)
        shared.add_back()
        heads.add_back()
        # Of the sum of the gradients it is only known whether it is finite.
        return torch.ones_like(scales, dtype=torch.float64), status & int(Status.NON_FINITE), None

    def _sq_norm_of_sum(self) -> Tensor:
        """Of what a joint pass left in `.grad` of the shared parameters, [1]."""
        total = [g if g is None or g.layout is torch.strided else g._values() for g in (p.grad for p in self.shared)]
        return self._run.sq_norms(self._run.Table(total, 1), 1)

    def _held_pass(
        self, tasks: TaskLosses, scales: Tensor, retain_graph: bool, shared: GradsSetAside, heads: GradsSetAside
    ) -> tuple[Tensor, Tensor, None]:
        """One pass for all tasks, with weights that were known before it."""
        self._make_previous_plain(shared, heads)
        weights = self.gradients.held_weights()
        joint_pass(tasks, scales * weights.to(scales.dtype), retain_graph)
        rows, head_rows = (KeptGradients(params, self._run) for params in (self.shared, self.task_parameters))
        rows.add(take_grads(self.shared))
        head_rows.add(take_grads(self.task_parameters, "task_parameters"))
        factor, status = self.gradients.solve_held(rows.sq_norms(), self._run)
        rows.write(factor, shared.previous)
        head_rows.write(factor, heads.previous)
        return weights * factor, status, None

    def _make_previous_plain(self, shared: GradsSetAside, heads: GradsSetAside) -> None:
        """What is added to, as memory that can be written to."""
        shared.make_plain("shared")
        if self.task_parameters:
            heads.make_plain("task_parameters")

    def _rows(self, losses: Tensor) -> TaskGradients:
        decay = self.gradients.ema_decay()
        if decay is not None:
            scales = self.gradients.row_scales()
            return AveragedGradients(self.shared, self._run, self._averages, decay, scales, losses)
        if self.gradients.needs() is Needs.EXCESS:
            return SquaredGradients(self.shared, self._run, self._averages, self._outgoing)
        if self.gradients.needs() is Needs.RUNNING_NORMS and rows_in_cache(self.shared) < len(losses):
            method = self.gradients
            return RunningSum(self.shared, self._run, method.running_weight, method.running_factor)
        return KeptGradients(self.shared, self._run, self._outgoing)

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
            "losses": self.losses.state_dict(),
            "gradients": self.gradients.state_dict(),
            "averages": [list(row) for row in self._averages.current.rows],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`'s result, from any device; the next step then has the same bits as after the step that
        was saved.

        Raises:
            ValueError: where the state is of other methods, or of other shared parameters. Nothing is changed then.
        """
        if list(state["method"]) != [self.losses.name, self.gradients.name]:
            raise ValueError(
                f"the state is of {'+'.join(state['method'])}, "
                f"this balancer is {self.losses.name}+{self.gradients.name}"
            )
        expected = [(tuple(p.shape), accumulator_dtype(p.dtype)) for p in self.shared]
        for row in state["averages"]:
            found = [None if average is None else (tuple(average.shape), average.dtype) for average in row]
            if len(found) != len(expected) or any(f not in (None, e) for f, e in zip(found, expected, strict=True)):
                raise ValueError(f"the state's moving averages do not fit the shared parameters: {found}")
        state = _copied(state, self.shared[0].device)  # the caller's tensors are not ours to write to
        self.losses.load_state_dict(state["losses"])
        self.gradients.load_state_dict(state["gradients"])
        self._tasks = state["tasks"]
        self._names = None if state["names"] is None else tuple(state["names"])
        self._averages = MovingAverages(state["averages"])

    def __repr__(self) -> str:
        return (
            f"Balancer({self.gradients!r}, losses={self.losses!r}, shared={len(self.shared)} tensors, "
            f"heads={self.heads!r}, backend={self.backend!r})"
        )


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
