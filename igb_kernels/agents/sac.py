"""Soft actor-critic on the simplex: stable-baselines3's algorithm, networks, buffer and optimizers, with a policy whose
actions are weights of sum K."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.sac.policies import Actor as SACActor
from stable_baselines3.sac.policies import SACPolicy
from torch import Tensor

from igb_kernels.agents.learner import Settings
from igb_kernels.agents.simplex import LOG_DENSITIES, Actor, weights_of


class SimplexDistribution(DiagGaussianDistribution):
    """K · softmax of normals, in place of their tanh."""

    def __init__(self, tasks: int, logprob: str, generator: torch.Generator) -> None:
        super().__init__(tasks)
        self.log_density, self.generator = LOG_DENSITIES[logprob], generator

    def log_prob_from_params(self, mean_actions: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [B, K] and their log densities [B], differentiable in the normals' parameters."""
        mean, noise = mean_actions, torch.empty_like(mean_actions).normal_(generator=self.generator)
        u = mean + log_std.exp() * noise
        return weights_of(u), self.log_density(u, mean, log_std)


class SimplexPolicy(SACPolicy):
    """The actor and critics, where the actor's distribution is on the simplex."""

    def __init__(self, *args: Any, logprob: str, generator: torch.Generator, **kwargs: Any) -> None:
        self._distribution = logprob, generator
        super().__init__(*args, **kwargs)

    def make_actor(self, features_extractor: Any = None) -> SACActor:
        """Called by the base class."""
        actor = super().make_actor(features_extractor)
        actor.action_dist = SimplexDistribution(actor.action_space.shape[0], *self._distribution)
        return actor


class Transitions(ReplayBuffer):
    """A ring of transitions, sampled with random numbers of its own: NumPy's global ones stay the user's."""

    random: np.random.Generator

    def sample(self, batch_size: int, env: Any = None) -> ReplayBufferSamples:
        """With replacement."""
        chosen = self.random.integers(self.size(), size=batch_size)
        vectors = (self.observations, self.actions, self.next_observations)
        numbers = (self.dones, self.rewards)
        return ReplayBufferSamples(
            *(self.to_torch(field[chosen, 0]) for field in vectors),
            *(self.to_torch(field[chosen]) for field in numbers),
        )

    def _columns(self) -> dict[str, Any]:
        """What distinguishes transitions [capacity, K], and their rewards [capacity]."""
        columns = {"state": self.observations, "action": self.actions, "next_state": self.next_observations}
        return {name: column[:, 0] for name, column in {**columns, "reward": self.rewards}.items()}

    def state_dict(self) -> dict[str, Any]:
        """What is filled, where it is in the ring; not copies."""
        return {name: torch.from_numpy(rows[: self.size()]) for name, rows in self._columns().items()} | {
            "position": self.pos
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned, of a ring of this size."""
        for name, rows in self._columns().items():
            rows[: len(state[name])] = state[name].numpy()
        self.pos, self.full = state["position"], len(state["reward"]) == self.buffer_size


class SACAgent:
    """An agent for K tasks: what it has seen, and what it has learned from that.

    Everything random follows from seeds: the networks' start from the agent's, an update from its own.

    Args:
        tasks: K, at least 2.
        settings: see there.
        seed: of the networks' start.
    """

    def __init__(self, tasks: int, settings: Settings, seed: int) -> None:
        self._generator = torch.Generator(settings.device)
        with _ordinary_torch(seed):
            self._sac = SAC(
                SimplexPolicy,
                None,
                learning_rate=settings.learning_rate,
                buffer_size=settings.buffer_size,
                tau=settings.tau,
                gamma=settings.gamma,
                replay_buffer_class=Transitions,
                replay_buffer_kwargs={"handle_timeout_termination": False},
                ent_coef=f"auto_{settings.entropy_coefficient}",
                # What is to be had on the simplex has K − 1 dimensions.
                target_entropy=-float(tasks if settings.logprob == "official" else tasks - 1),
                policy_kwargs={
                    "net_arch": list(settings.hidden),
                    "logprob": settings.logprob,
                    "generator": self._generator,
                },
                device=settings.device,
                _init_setup_model=False,
            )
            self._sac.observation_space = Box(-np.inf, np.inf, (tasks,), np.float32)
            self._sac.action_space = Box(0.0, float(tasks), (tasks,), np.float32)
            self._sac.n_envs = 1
            self._sac._setup_model()
        self._sac.set_logger(Logger(None, []))
        self._buffer.random = np.random.default_rng(seed)

    @property
    def _buffer(self) -> Transitions:
        assert isinstance(self._sac.replay_buffer, Transitions)
        return self._sac.replay_buffer

    def __len__(self) -> int:
        """Transitions held."""
        return int(self._buffer.size())

    def store(self, state: Tensor, action: Tensor, reward: float, next_state: Tensor) -> None:
        """Takes a transition in, in place of the oldest where there is no room."""
        fields = (state[None].numpy(), next_state[None].numpy(), action[None].numpy())
        self._buffer.add(*fields, np.array([reward]), np.zeros(1), [{}])

    def train(self, batch_size: int, seed: int) -> None:
        """One update of critics, policy and entropy coefficient, on `batch_size` transitions chosen at random."""
        self._generator.manual_seed(seed)
        self._buffer.random = np.random.default_rng(seed)
        with torch.enable_grad(), torch.autocast(self._generator.device.type, enabled=False):
            self._sac.train(1, batch_size)

    def actor(self) -> Actor:
        """A copy of the policy as it is now."""
        actor = self._sac.actor
        linears = [layer for layer in actor.latent_pi if isinstance(layer, torch.nn.Linear)]
        layers = [p for layer in (*linears, actor.mu, actor.log_std) for p in (layer.weight, layer.bias)]
        return Actor([p.detach().to("cpu", copy=True) for p in layers])

    def _parts(self) -> dict[str, Any]:
        sac = self._sac
        return {
            "networks": sac.policy,
            "actor_optimizer": sac.actor.optimizer,
            "critic_optimizer": sac.critic.optimizer,
            "entropy_optimizer": sac.ent_coef_optimizer,
        }

    def state_dict(self) -> dict[str, Any]:
        """Networks, optimizers and transitions: containers, numbers and tensors (not copies)."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        return {
            **parts,
            "log_entropy_coefficient": self._sac.log_ent_coef.detach(),
            "transitions": self._buffer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        for name, part in self._parts().items():
            part.load_state_dict(_numbered(state[name]) if isinstance(part, torch.optim.Optimizer) else state[name])
        with torch.no_grad():
            self._sac.log_ent_coef.copy_(state["log_entropy_coefficient"])
        self._buffer.load_state_dict(state["transitions"])


def _numbered(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state, also as `torch.distributed.checkpoint` gives it back: without what is empty, and with
    strings for the numbers of parameters."""
    return {**state, "state": {int(i): of_parameter for i, of_parameter in state.get("state", {}).items()}}


@contextmanager
def _ordinary_torch(seed: int) -> Iterator[None]:
    """float32 on the CPU by default, and random numbers from the seed; all of it as before afterwards."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach GPUs, too
            yield
    finally:
        torch.set_default_dtype(dtype)
