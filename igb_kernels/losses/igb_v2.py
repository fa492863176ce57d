"""Improvable gap balancing, version 2: an agent chooses the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from igb_kernels import ops
from igb_kernels._seed import check_seed, drawn_seed
from igb_kernels.active import ActiveTasks
from igb_kernels.agents.learner import Agent, Learner, Settings, normals
from igb_kernels.agents.simplex import LOG_DENSITIES, weights_of
from igb_kernels.backends import Backend
from igb_kernels.backends.reference import LossProblem
from igb_kernels.card import Card
from igb_kernels.losses._means import BaseLosses
from igb_kernels.losses._readback import Readback
from igb_kernels.losses.base import LossBalancer
from igb_kernels.losses.log import TINY, unless_negative
from igb_kernels.status import UNUSABLE, Status

STATES = ("ratio", "raw")
LARGEST = 1e6
"""What the agent sees and is rewarded with is cut here: one exploding loss must not overflow its networks for good."""
MUST_MATCH = ("hidden", "buffer_size", "logprob", "state")
"""Options without which a state is another agent's."""


@dataclass(frozen=True)
class _Step:
    """What the agent learns from, of a step that could be used."""

    losses: Tensor
    """[K], float64 on the CPU; those of missing tasks are from earlier steps, NaN where there are none."""
    weights: Tensor
    """[K], float32 on the CPU."""
    ids: list[int] | None
    """The tasks that it had, None: all."""

    def common(self, other: _Step) -> list[int]:
        """The tasks of both."""
        theirs = range(len(self.losses)) if other.ids is None else other.ids
        return [k for k in theirs if self.ids is None or k in self.ids]


class IGBv2(LossBalancer):
    """Weights log losses by what a soft actor-critic agent has learned to make all of them fall (Dai et al. 2023,
    arXiv:2307.15429, section 4.2). Needs stable-baselines3: `pip install "igb-kernels[igbv2]"`.

    s_k = a_k / L_k with the agent's action a = K · softmax(u), u ~ N(mean(state), std(state)²), always sampled. Its
    state is the losses, by default over their base losses; its reward for a step is that of the task that fell least,
    reward_scale · min_k (L_k − next L_k) / L_base,k. Base losses are those of `IGBv1`. With one task, a = 1.

    - Until the base losses are known and `start_epoch` epochs are over, the weights are random, K · softmax(normals).
    - From the base losses on, transitions (state, a, reward, next state) go into a ring of `buffer_size`.
    - After `update_after` epochs, every `update_every`-th step ends with updates of the agent: with a share f of the
      ring filled, (1 + f) update_every / 2 of them, on (1 + f) batch_size / 2 transitions each.

    Steps that cannot be used (a negative or non-finite loss, a non-finite gradient) are as if they had not been. Epochs
    are told by `Balancer.end_epoch`: the first one's length counts as that of all, unless `steps_per_epoch` is given.

    In the background, updates run on a thread beside the next `update_every` steps, and are waited for before the next
    ones begin; the policy acts on what they learned from there on. So the weights never depend on which was faster, and
    `state_dict` continues bit for bit. What an update raises, the next `backward` raises. The thread ends with the
    balancer or the program, at the latest with the update it is at; a fork waits for it. An update takes about 6 ms
    (10 ms with 100 tasks): beside steps of a few milliseconds, where two threads mostly wait for each other's Python,
    `background=False` is faster.

    Where tasks are missing, the agent sees their last known losses (while one has none, weights are random), and the
    others' weights are rescaled to their number. A reward is of the tasks that both of its steps have; without any,
    there is no transition.

    Where losses are on a GPU, the agent sees those of the step before, so that nothing has to be waited for but the end
    of that step; on the CPU it sees those of its step. Transitions are the same.

    Args:
        base_epoch, steps, base_losses: where base losses come from, as for `IGBv1`.
        steps_per_epoch: the length of an epoch, instead of the first one's.
        state: "ratio", L / L_base; or "raw", L, as in IGB4MTL.
        logprob: "exact", the density of a; or "official", IGB4MTL's formula, which is that of another squashing
            (`agents.simplex`). The target entropy goes with it: 1 − K, or −K.
        background: whether updates run on a thread; or within the step.
        reward_scale: also an attribute, to be set as training goes on. IGB4MTL has the first learning rate over the
            current one, set every epoch.
        update_after, start_epoch: in epochs.
        update_every, batch_size, buffer_size: see above.
        learning_rate, gamma, tau, hidden, entropy_coefficient: the agent's: of its Adam optimizers, discount, moving
            average of target critics, widths of its networks, start of the learned coefficient.
        device: where the agent trains. It acts on the CPU.
        seed: an integer of at least 0, below 2^53; by default drawn from torch's CPU generator at the first step.

    Raises:
        ImportError: without stable-baselines3.
        ValueError: naming the argument, the rule, and what was found.
    """

    name = "igb_v2"
    card = Card(
        title="IGBv2",
        paper="Dai et al., UAI 2023, arXiv:2307.15429",
        formula="a_k / L_k, a = K softmax(normals of an agent)",
        inputs="losses",
        memory="nothing",
        passes="1",
        invariance="update",
        degree=0.0,
        hazards="random weights for five epochs; needs end_epoch(), or steps= and steps_per_epoch=",
        parity='state="raw", logprob="official", background=False: IGB4MTL',
    )

    def __init__(
        self,
        base_epoch: int = 1,
        *,
        steps: int | None = None,
        base_losses: Sequence[float] | Tensor | None = None,
        steps_per_epoch: int | None = None,
        state: str = "ratio",
        logprob: str = "exact",
        background: bool = True,
        reward_scale: float = 1.0,
        update_after: int = 3,
        start_epoch: int = 5,
        update_every: int = 50,
        batch_size: int = 256,
        buffer_size: int = 10_000,
        learning_rate: float = 3e-4,
        gamma: float = 0.99,
        tau: float = 0.005,
        hidden: Sequence[int] = (128, 128),
        entropy_coefficient: float = 0.2,
        device: torch.device | str = "cpu",
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.base = BaseLosses(base_epoch, steps, base_losses)
        for name, choice, known in (("state", state, STATES), ("logprob", logprob, tuple(LOG_DENSITIES))):
            if choice not in known:
                raise ValueError(f"{name} must be one of {known}, found {choice!r}")
        least_one = {"update_every": update_every, "batch_size": batch_size, "buffer_size": buffer_size}
        least_one |= {f"hidden[{i}]": width for i, width in enumerate(hidden)}
        if steps_per_epoch is not None:
            least_one["steps_per_epoch"] = steps_per_epoch
        for least, counts in ((1, least_one), (0, {"update_after": update_after, "start_epoch": start_epoch})):
            for name, count in counts.items():
                if not isinstance(count, int) or count < least:
                    raise ValueError(f"{name} must be an integer of at least {least}, found {count!r}")
        positive = {"learning_rate": learning_rate, "entropy_coefficient": entropy_coefficient}
        for name, number in positive.items():
            if not 0 < number < math.inf:
                raise ValueError(f"{name} must be a finite number above 0, found {number!r}")
        for name, number in (("gamma", gamma), ("tau", tau)):
            if not 0 <= number <= 1:
                raise ValueError(f"{name} must be a number from 0 to 1, found {number!r}")
        self.state_kind, self.background, self.reward_scale = state, background, reward_scale
        self.steps_per_epoch, self.update_after, self.start_epoch = steps_per_epoch, update_after, start_epoch
        self.update_every, self.batch_size, self.seed = update_every, batch_size, check_seed(seed)
        self.settings = Settings(
            logprob, tuple(hidden), learning_rate, gamma, tau, entropy_coefficient, buffer_size, str(device)
        )
        self._make_agent = _agent_class()
        self._step = 0  # usable steps so far
        self._tasks = 0
        self._seed: int | None = None
        self._learner: Learner | None = None
        self._weights: Tensor | None = None  # of all tasks in the current step [K], float32 on the CPU
        self._present: ActiveTasks | None = None  # the tasks of the step that weights were last chosen for; on the CPU
        self._base: Tensor | None = None  # the base losses, once they are known
        self._last: _Step | None = None  # the last usable one
        self._ended = Readback()  # the losses and status of a step whose end has not been taken into account

    @property
    def reward_scale(self) -> float:
        """What rewards are multiplied with; positive."""
        return self._reward_scale

    @reward_scale.setter
    def reward_scale(self, value: float) -> None:
        if not 0 < value < math.inf:
            raise ValueError(f"reward_scale must be a finite number above 0, found {value!r}")
        self._reward_scale = float(value)

    @property
    def base_losses(self) -> Tensor | None:
        """The base losses [K], float64 on the CPU; NaN until they are known, None before the first step. May be set, to
        K positive numbers."""
        self._settle()
        return self.base.value()

    @base_losses.setter
    def base_losses(self, values: Sequence[float] | Tensor) -> None:
        self._settle()
        self.base.give(values)
        self._base = None

    def start(self, tasks: int, device: torch.device) -> None:
        self.base.start(tasks, torch.device("cpu"))
        self._base = None
        self._tasks = tasks
        self._seed = drawn_seed(self.seed)
        self._learner = self._new_learner()

    def _new_learner(self) -> Learner | None:
        if self._tasks <= 1 or self._seed is None:
            return None
        agent = self._make_agent(self._tasks, self.settings, self._seed)
        return Learner(agent, self.background, self.settings.buffer_size, self._seed)

    # ---- A step ---------------------------------------------------------------------------------------------------

    def per_task(self) -> Tensor | None:
        if self._weights is None or self._present is None:
            return self._weights
        weights = self._present.part(self._weights)
        total = weights.sum()
        return (len(weights) * weights / total).where(total > 0, 1.0)

    def scales(self, losses: Tensor, backend: Backend) -> tuple[Tensor, Tensor]:
        self._settle()
        if self._learner is not None and self._learner.failure is not None:
            raise RuntimeError(
                "IGBv2's agent failed to train, and needs a state to be loaded"
            ) from self._learner.failure
        self._present = None
        if self.active is not None:
            self._present = ActiveTasks.of(self.active.ids, self.active.tasks, torch.device("cpu"))
        self._weights = self._choose(losses)
        weights = self.per_task()
        assert weights is not None
        if losses.device.type == "cuda":
            weights = weights.pin_memory()  # from the caching allocator, which keeps it until the copy is done
        weights = weights.to(losses.device, non_blocking=True)
        return backend.loss_scales(self.name, losses, weights, [], None)

    def _choose(self, losses: Tensor) -> Tensor:
        """The weights of all tasks [K] in this step, float32 on the CPU."""
        if self._learner is None or self._seed is None:
            return torch.ones(1, device="cpu")
        noise = normals(self._seed, self._step, self._tasks)
        base = self._known_base()
        if not self._after(self.start_epoch) or base is None or self._last is None:
            return weights_of(noise)
        seen = self._last.losses if _read_later(losses) else self._known_losses(losses.double())
        if bool(seen.isnan().any()):
            return weights_of(noise)
        return self._learner.actor(self._observed(seen, base), noise)

    def _known_losses(self, losses: Tensor) -> Tensor:
        """The losses [K], float64 on the CPU: of missing tasks the last known, or NaN."""
        if self._present is None:
            return losses
        known = torch.full((self._tasks,), torch.nan, dtype=torch.float64, device="cpu")
        if self._last is not None:
            known.copy_(self._last.losses)
        return self._present.put_(known, losses)

    def _known_base(self) -> Tensor | None:
        """The base losses [K] once they are known, at least TINY."""
        if self._base is None:
            base = self.base.value()
            if base is not None and not bool(base.isnan().any()):
                self._base = base.clamp_min(TINY)
        return self._base

    def _after(self, epochs: int) -> bool:
        return self.steps_per_epoch is not None and self._step >= epochs * self.steps_per_epoch

    def _observed(self, losses: Tensor, base: Tensor) -> Tensor:
        """What the agent sees of losses [K]; float32."""
        values = losses / base if self.state_kind == "ratio" else losses
        return values.clamp(-LARGEST, LARGEST).float()

    def commit(self, losses: Tensor, scales: Tensor, status: Tensor) -> None:
        if _read_later(losses):
            self._ended.put(torch.cat([losses.double(), status.to(losses.device, torch.float64).reshape(1)]))
        else:
            self._end_step(losses.to(torch.float64, copy=True), int(status))

    def _settle(self) -> None:
        """Takes the end of the last step into account, if that is still to be done."""
        numbers = self._ended.take()
        if numbers is not None:
            self._end_step(numbers[:-1], int(numbers[-1]))

    def _end_step(self, losses: Tensor, status: int) -> None:
        """A step has ended with these losses of its tasks [A], float64 on the CPU."""
        assert self._weights is not None
        if status & UNUSABLE:
            return
        ids = None if self._present is None else list(self._present.ids)
        step = _Step(self._known_losses(losses), self._weights, ids)
        if self._learner is not None:
            self._record(step, self._learner)
        self.base.add(losses, torch.tensor(0, device="cpu"), self._present)
        self._last = step
        self._step += 1

    def _record(self, step: _Step, learner: Learner) -> None:
        base, last = self._known_base(), self._last
        if base is not None and last is not None and not bool((last.losses + step.losses).isnan().any()):
            falls = (last.losses - step.losses) / base
            if last.ids is not None or step.ids is not None:
                falls = falls[last.common(step)]
            if len(falls):
                reward = min(LARGEST, max(-LARGEST, self.reward_scale * float(falls.min())))
                learner.store(
                    self._observed(last.losses, base), last.weights, reward, self._observed(step.losses, base)
                )
        if self._after(self.update_after) and self._step % self.update_every == 0 and len(learner):
            twice = 1 + len(learner) / self.settings.buffer_size
            learner.train(int(self.update_every * twice / 2), int(self.batch_size * twice / 2))

    def host_decision(self) -> str | None:
        return f"{self!r} lets its agent choose the weights"

    def end_epoch(self) -> None:
        self._settle()
        self.base.end_epoch()
        if self.steps_per_epoch is None and self._step:
            self.steps_per_epoch = self._step

    # ---- State ----------------------------------------------------------------------------------------------------

    def _must_match(self) -> dict[str, Any]:
        options = {"state": self.state_kind, **vars(self.settings)}
        return {name: list(value) if isinstance(value := options[name], tuple) else value for name in MUST_MATCH}

    def state_dict(self) -> dict[str, Any]:
        """See the base class. Waits for the updates that run."""
        self._settle()
        return {
            "options": self._must_match(),
            "base": self.base.state_dict(),
            "tasks": self._tasks,
            "seed": self._seed,
            "step": self._step,
            "steps_per_epoch": self.steps_per_epoch,
            "reward_scale": self.reward_scale,
            "last": None if self._last is None else [self._last.losses, self._last.weights, self._last.ids],
            "learner": None if self._learner is None else self._learner.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See the base class."""
        state = _on_cpu(state)
        for name, value in self._must_match().items():
            if state["options"][name] != value:
                raise ValueError(f"{name} is {value!r}, but the state's is {state['options'][name]!r}")
        self.base.load_state_dict(state["base"])
        self._base = None
        self._ended.take()  # a step before the state
        self._tasks, self._seed, self._step = state["tasks"], state["seed"], state["step"]
        self.steps_per_epoch, self.reward_scale = state["steps_per_epoch"], state["reward_scale"]
        self._last = None if state["last"] is None else _Step(*state["last"])
        self._learner = None
        if state["learner"] is not None:
            self._learner = self._new_learner()
            assert self._learner is not None
            self._learner.load_state_dict(state["learner"])

    def __getstate__(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """For copies and pickles, in which the agent is made anew and its state loaded."""
        state = self.state_dict()
        return {**vars(self), "_learner": None, "_ended": Readback()}, state

    def __setstate__(self, saved: tuple[dict[str, Any], dict[str, Any]]) -> None:
        attributes, state = saved
        vars(self).update(attributes)
        self.load_state_dict(state)

    def __repr__(self) -> str:
        return (
            f"IGBv2({self.base.arguments()}, state={self.state_kind!r}, logprob={self.settings.logprob!r}, "
            f"background={self.background})"
        )


def _read_later(losses: Tensor) -> bool:
    """Whether the host reads them during the next step, so as not to wait for them in this one."""
    return losses.device.type != "cpu"


def _agent_class() -> Callable[[int, Settings, int], Agent]:
    try:
        from igb_kernels.agents.sac import SACAgent
    except ImportError as error:
        raise ImportError('IGBv2 needs stable-baselines3: pip install "igb-kernels[igbv2]"') from error
    return SACAgent


def _on_cpu(state: Any) -> Any:
    """Nested containers with their tensors on the CPU."""
    if isinstance(state, Tensor):
        return state.cpu()
    if isinstance(state, Mapping):
        return {key: _on_cpu(value) for key, value in state.items()}
    return [_on_cpu(value) for value in state] if isinstance(state, list | tuple) else state


@ops.register_rule("igb_v2", per_task=lambda tasks: (tasks,), needs_per_task=True)
def _reference(problem: LossProblem) -> tuple[Tensor, Status]:
    losses, weights = problem.losses, problem.per_task
    assert weights is not None  # checked by the op
    if not weights.isfinite().all():
        return torch.full_like(losses, torch.nan), Status.NON_FINITE
    return unless_negative(losses, weights / losses.clamp_min(TINY))
