"""Learning beside training: an agent that acts while it learns, on a thread of its own."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from igb_kernels.agents.simplex import Actor

Transition = tuple[Tensor, Tensor, float, Tensor]
"""State [K], weights [K], reward, next state [K]; float32 on the CPU."""


@dataclass(frozen=True)
class Settings:
    """What an agent is made with."""

    logprob: str = "exact"
    """A key of `simplex.LOG_DENSITIES`."""
    hidden: tuple[int, ...] = (128, 128)
    learning_rate: float = 3e-4
    gamma: float = 0.99
    tau: float = 0.005
    entropy_coefficient: float = 0.2
    """At the start; it is learned."""
    buffer_size: int = 10_000
    device: str = "cpu"
    """Where the agent trains; it acts on the CPU."""


class Agent(Protocol):
    """What `Learner` asks of an agent: see `sac.SACAgent`."""

    def __len__(self) -> int: ...
    def store(self, state: Tensor, action: Tensor, reward: float, next_state: Tensor) -> None: ...
    def train(self, batch_size: int, seed: int) -> None: ...
    def actor(self) -> Actor: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Learner:
    """An agent in two parts: the policy that acts, and what learns from the transitions.

    A burst of updates works on the transitions that were there when it began, and what it learned is acted on from the
    next burst on: so on a thread, too, every result is the same from run to run, whichever of the two is faster. In the
    foreground the burst is waited for at once, and acted on at once.

    Args:
        agent: the agent; during a burst in the background it belongs to that.
        background: learn on a thread.
        capacity: transitions that the agent can hold.
        seed: of the updates' random numbers.
    """

    def __init__(self, agent: Agent, background: bool, capacity: int, seed: int) -> None:
        self.agent, self.background, self.capacity, self.seed = agent, background, capacity, seed
        self.actor = agent.actor()
        self.updates = 0
        self._burst: Burst | None = None
        self._waiting: list[Transition] = []  # for the end of the burst

    @property
    def failure(self) -> Exception | None:
        """What ended a burst before its time; nothing is learned any more after that."""
        return None if self._burst is None else self._burst.failure

    def __len__(self) -> int:
        """Transitions held."""
        size = len(self.agent) if self._burst is None else self._burst.size
        return min(size + len(self._waiting), self.capacity)

    def store(self, *transition: Any) -> None:
        """Takes in a transition: state, weights, reward, next state."""
        if self._burst is None:
            self.agent.store(*transition)
        elif self.failure is None:
            self._waiting.append(transition)

    def train(self, updates: int, batch_size: int) -> None:
        """Learns, after the end of the last burst, whose policy acts from now on."""
        self._end_burst()
        if self.failure is not None:
            return
        first, self.updates = self.updates, self.updates + updates
        agent, seed = self.agent, self.seed

        def update(i: int) -> None:
            agent.train(batch_size, mixed(seed, first + i))

        self._burst = Burst(update, updates, size=len(agent), owner=self if self.background else None)
        if not self.background:
            self._end_burst()

    def wait(self) -> None:
        """Until nothing runs in the background."""
        if self._burst is not None:
            self._burst.join()

    def _end_burst(self) -> None:
        self.wait()
        if self._burst is not None and self.failure is None:
            self._burst = None
            self.actor = self.agent.actor()
            waiting, self._waiting = self._waiting, []
            for transition in waiting:
                self.agent.store(*transition)

    def state_dict(self) -> dict[str, Any]:
        """Everything; waits for the end of the burst."""
        self.wait()
        return {
            "agent": self.agent.state_dict(),
            "actor": self.actor.layers,
            "updates": self.updates,
            "learned_ahead": self._burst is not None,
            "waiting": [list(transition) for transition in self._waiting],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.wait()
        self._burst, self._waiting = None, []
        self.agent.load_state_dict(state["agent"])
        self.actor = Actor(state["actor"])
        self.updates = state["updates"]
        if state["learned_ahead"]:
            self._burst = Burst(lambda i: None, 0, size=len(self.agent))
            self._waiting = [(s, a, r, n) for s, a, r, n in state["waiting"]]
            if not self.background:
                self._end_burst()


class Burst:
    """`count` calls of `update`: at once, or on a thread for as long as its owner and the main thread live.

    The thread is no daemon and waits for nothing, so the interpreter's exit waits for the update it is at. A fork waits
    for all bursts: in the child there is no thread that could end them.
    """

    def __init__(self, update: Callable[[int], None], count: int, *, size: int, owner: object | None = None) -> None:
        self.failure: Exception | None = None
        self.size = size
        """Transitions at its beginning."""
        self._update, self._count = update, count
        self._owner = None if owner is None else weakref.ref(owner)
        self._thread: threading.Thread | None = None
        if owner is None:
            self._run()
        else:
            self._thread = threading.Thread(target=self._run_beside, name="igb_kernels agent")
            _running.add(self)
            self._thread.start()

    def join(self) -> None:
        """Waits for the end."""
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            for i in range(self._count):
                if (self._owner is not None and self._owner() is None) or not threading.main_thread().is_alive():
                    break
                self._update(i)
        except Exception as error:
            self.failure = error

    def _run_beside(self) -> None:
        for thread in list(_os_threads):  # a copy: other bursts begin meanwhile
            if not _is_alive(thread):
                _os_threads.discard(thread)
        _os_threads.add(threading.get_native_id())
        try:
            self._run()
        finally:
            _running.discard(self)


_running: set[Burst] = set()


_os_threads: set[int] = set()
"""Those of bursts, some of them ended. After Python has let go of a thread, its libraries tidy up behind it, and take
locks: a child that is forked meanwhile would find MKL's held for ever."""

MOST_SECONDS = 1.0
"""For a thread's end; another may have got its number since."""


def _is_alive(os_thread: int) -> bool:
    return os.path.exists(f"/proc/self/task/{os_thread}")  # where there is no /proc, none is


def _wait_for_all() -> None:
    for burst in list(_running):
        burst.join()
    last = time.monotonic() + MOST_SECONDS
    while any(map(_is_alive, list(_os_threads))) and time.monotonic() < last:
        time.sleep(1e-4)
    _os_threads.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_wait_for_all)


def mixed(seed: int, count: int) -> int:
    """A seed for the `count`-th draw: neighbours have nothing in common."""
    word = (seed + 0x9E3779B97F4A7C15 * (count + 1)) & (1 << 64) - 1
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        word = ((word ^ word >> shift) * factor) & (1 << 64) - 1
    return (word ^ word >> 31) >> 1  # below 2^63, as torch's generators want it


def normals(seed: int, count: int, tasks: int) -> Tensor:
    """[tasks] standard normals, float32: always the same ones for a seed and a count."""
    generator = torch.Generator("cpu").manual_seed(mixed(seed, count))
    return torch.randn(tasks, generator=generator, device="cpu", dtype=torch.float32)
