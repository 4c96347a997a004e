"""Shared policies of SMAX, trained with sb3-contrib's MaskablePPO as MAPPO, and the actor that is exported.

Each agent of each environment is one row of SB3's batch, so all agents share one policy, and the team's reward
reaches each of them. The policy sees the agent's observation and its one-hot id; the critic sees the centralised
state as well. Unavailable actions have probability zero.

A checkpoint is one ReLU MLP, from an observation and a one-hot id to the logits of all actions. ``progress.jsonl``
has the share of battles won beside the return; steps count environment steps, not agents' steps.

Shapes: B batch, E environments, N agents, O observation, A actions, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from omcda_deploy.envs.smax import MAP_SIZE, SmaxVector, state_positions
from omcda_deploy.envs.vector import VectorStep
from omcda_deploy.errors import ConfigError, UnknownNameError
from omcda_deploy.play.episodes import PlayedStep
from omcda_deploy.play.recording import EpisodeRecorder
from omcda_deploy.policy import Decision, Float, NoiseSource
from omcda_deploy.spec import TeamSpec
from omcda_deploy.training.behavior.checkpoint import (
    RECORDED,
    Checkpoints,
    PlayedPolicy,
    new_run,
    read_checkpoint,
    recording,
    write_checkpoint,
)
from omcda_deploy.training.networks import masked_log_softmax

PLAYED_BATTLES = 16  # environments that play_checkpoint steps together


@dataclass(frozen=True)
class MaskablePpoConfig:
    """PPO settings of one map; settings without a field keep sb3-contrib's defaults.

    Rollouts, learning rate and entropy are those of JaxMARL's (recurrent) baselines for SMAX. Their clip range of
    0.05 and 4 epochs were slower here: half the return after 131,000 steps, at 1.4 times the work.
    """

    steps: int = 10_000_000  # environment steps
    checkpoint_every: int = 250_000  # environment steps
    num_envs: int = 64
    n_steps: int = 128  # steps of each environment in a rollout
    batch_size: int = 20_480  # rows, one per agent and environment
    n_epochs: int = 2
    learning_rate: float = 4e-3  # at the start; it falls linearly to 0
    gamma: float = 0.99
    gae_lambda: float = 0.95
    ent_coef: float = 0.01
    hidden: int = 128


DEFAULTS = {
    "smax/5m_vs_6m": MaskablePpoConfig(),
    # Greedily this map is won nearly always after 200,000 steps, so the tiers lie close together.
    "smax/6h_vs_8z": MaskablePpoConfig(steps=800_000, checkpoint_every=20_000),
    "smax/corridor": MaskablePpoConfig(steps=4_000_000, checkpoint_every=100_000),
}


def default_config(task: str) -> MaskablePpoConfig:
    """Return the PPO configuration of ``task``. Raises :class:`UnknownNameError` for a task without one."""
    if task not in DEFAULTS:
        raise UnknownNameError("task", task, DEFAULTS)
    return DEFAULTS[task]


class PolicyArrays(NamedTuple):
    """Arrays of a checkpoint; the field names are the names in the file."""

    w1: NDArray[Any]  # [H, O + N]
    b1: NDArray[Any]
    w2: NDArray[Any]  # [H, H]
    b2: NDArray[Any]
    w3: NDArray[Any]  # [A, H]
    b3: NDArray[Any]


class AgentRows(VecEnv):
    """E battles of N agents as E * N rows of an SB3 environment; row ``e * N + i`` is agent i of battle e.

    A row is (observation, one-hot id, centralised state with positions scaled to [0, 1] and all other entries
    clipped to [-1, 1]). A battle that ends is reset in the same step. The info of its first agent carries the
    episode's return and ``is_success``, true for a victory, and with ``record`` the episode itself.
    """

    render_mode = None

    def __init__(self, task: str, num_envs: int, seed: int, record: bool = False) -> None:
        self._battles = SmaxVector(task, num_envs)
        self.spec = spec = self._battles.spec
        self._recorder = EpisodeRecorder(spec, num_envs) if record else None
        self._names, self.agents = spec.names, len(spec.agents)
        self.policy_inputs = spec.observation_size + self.agents
        self._episode_seeds = np.random.default_rng(seed)
        self._rows = np.zeros((num_envs, self.agents, self.policy_inputs + spec.state_size), np.float32)
        self._rows[..., spec.observation_size : self.policy_inputs] = np.eye(self.agents)
        self._scale = np.ones(spec.state_size, np.float32)
        for x, y in state_positions(spec):
            self._scale[[x, y]] = 1.0 / MAP_SIZE
        self._masks = np.zeros((num_envs, self.agents, spec.action_size), np.bool_)
        self._returns, self._lengths = np.zeros(num_envs), np.zeros(num_envs, np.int64)
        self._actions = np.zeros((num_envs, self.agents), np.int64)
        self._battle_seeds: dict[int, int] = {}
        self._latest: VectorStep
        super().__init__(
            num_envs * self.agents,
            gymnasium.spaces.Box(-np.inf, np.inf, self._rows.shape[-1:], np.float32),
            gymnasium.spaces.Discrete(spec.action_size),
        )

    def reset(self) -> NDArray[np.float32]:
        return self._restart(range(self._battles.num_envs))

    def step_async(self, actions: NDArray[Any]) -> None:
        self._actions = actions.reshape(self._actions.shape)

    def step_wait(self) -> tuple[NDArray[np.float32], NDArray[Any], NDArray[np.bool_], list[dict[str, Any]]]:
        previous, actions = self._latest, {name: self._actions[:, i] for i, name in enumerate(self._names)}
        step = self._battles.step(actions)
        self._returns += step.reward
        self._lengths += 1
        self._fill_rows(step)
        done = step.terminated | step.truncated
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        ended = np.flatnonzero(done).tolist()
        for battle in ended:
            first = battle * self.agents
            for agent in range(self.agents):
                infos[first + agent]["terminal_observation"] = self._rows[battle, agent].copy()
                infos[first + agent]["TimeLimit.truncated"] = bool(step.truncated[battle])
            infos[first]["episode"] = {"r": self._returns[battle], "l": self._lengths[battle], "t": 0.0}
            infos[first]["is_success"] = bool(step.info["won"][battle])
        if self._recorder is not None:
            played = PlayedStep(
                spec=self._battles.spec,
                previous=previous,
                decisions={
                    name: Decision(chosen, np.zeros(len(chosen), np.float32))
                    for name, chosen in actions.items()
                },
                result=step,
                active=np.ones_like(done),
                age=self._lengths,
                ended=done,
                discarded=np.zeros_like(done),
                seeds=self._battle_seeds,
                seconds=0.0,
            )
            for battle, episode in self._recorder.add(played).items():
                infos[battle * self.agents][RECORDED] = episode
        if ended:
            self._restart(ended)
        rewards = np.repeat(step.reward, self.agents).astype(np.float32)
        return self._flat_rows(), rewards, np.repeat(done, self.agents), infos

    def action_masks(self) -> NDArray[np.bool_]:
        """Return bool [E * N, A], True where an action is available."""
        return self._masks.reshape(self.num_envs, -1)

    def env_method(
        self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any
    ) -> list[NDArray[np.bool_]]:
        """Call a method without arguments; MaskablePPO calls only ``action_masks``, for all rows."""
        return list(getattr(self, method_name)())

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self, attr_name)] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise NotImplementedError(attr_name)

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs

    def close(self) -> None:
        self._battles.close()

    def _restart(self, battles: Sequence[int]) -> NDArray[np.float32]:
        rows = list(battles)
        self._returns[rows], self._lengths[rows] = 0.0, 0
        seeds = {row: int(self._episode_seeds.integers(2**32)) for row in rows}
        self._battle_seeds |= seeds
        self._fill_rows(self._battles.reset(seeds))
        return self._flat_rows()

    def _fill_rows(self, step: VectorStep) -> None:
        self._latest = step
        for i, name in enumerate(self._names):
            observation = step.observations[name]
            self._rows[:, i, : observation.shape[1]] = observation
            self._masks[:, i] = (step.action_masks or {})[name]
        # The cooldown of a weapon that does not fire falls without limit, hence the clipping.
        self._rows[..., self.policy_inputs :] = np.clip(step.state * self._scale, -1.0, 1.0)[:, None]

    def _flat_rows(self) -> NDArray[np.float32]:
        return self._rows.reshape(self.num_envs, -1).copy()


class _Networks(nn.Module):
    """Two hidden layers each, the policy's on the first ``policy_inputs`` entries of a row, the critic's on all."""

    def __init__(self, policy_inputs: int, width: int, hidden: int) -> None:
        super().__init__()
        self.policy_inputs = policy_inputs
        self.latent_dim_pi = self.latent_dim_vf = hidden
        self.policy, self.value = (
            nn.Sequential(nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
            for size in (policy_inputs, width)
        )

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward_actor(rows), self.forward_critic(rows)

    def forward_actor(self, rows: Tensor) -> Tensor:
        latent: Tensor = self.policy(rows[:, : self.policy_inputs])
        return latent

    def forward_critic(self, rows: Tensor) -> Tensor:
        latent: Tensor = self.value(rows)
        return latent


class _CentralisedCriticPolicy(MaskableActorCriticPolicy):
    def __init__(self, *args: Any, policy_inputs: int, hidden: int, **kwargs: Any) -> None:
        self._policy_inputs, self._hidden = policy_inputs, hidden
        super().__init__(*args, **kwargs)

    def _build_mlp_extractor(self) -> None:
        # SB3 types this attribute as its own class, but needs no more than the interface of _Networks.
        networks: Any = _Networks(self._policy_inputs, self.features_dim, self._hidden)
        self.mlp_extractor = networks


def policy_arrays(model: MaskablePPO) -> PolicyArrays:
    """Return the weights of the shared policy."""

    def arrays(layer: nn.Linear) -> tuple[NDArray[Any], NDArray[Any]]:
        return layer.weight.detach().cpu().numpy(), layer.bias.detach().cpu().numpy()

    policy: Any = model.policy
    first, _, second, _ = policy.mlp_extractor.policy
    return PolicyArrays(*arrays(first), *arrays(second), *arrays(policy.action_net))


def new_model(rows: AgentRows, config: MaskablePpoConfig, seed: int) -> MaskablePPO:
    """Create PPO on ``rows`` with fresh networks."""
    return MaskablePPO(
        _CentralisedCriticPolicy,
        rows,
        learning_rate=lambda remaining: config.learning_rate * remaining,
        n_steps=config.n_steps,
        batch_size=config.batch_size,
        n_epochs=config.n_epochs,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        ent_coef=config.ent_coef,
        policy_kwargs={"policy_inputs": rows.policy_inputs, "hidden": config.hidden},
        seed=seed,
        device="cpu",
    )


def train(
    task: str,
    out: Path,
    seed: int,
    config: MaskablePpoConfig,
    record: Path | None = None,
    until: int | None = None,
    progress: Callable[[float, float], None] | None = None,
) -> None:
    """Train on ``task`` (``smax/<map>``) and write checkpoints to the new folder ``out``.

    ``record``: the training episodes become this dataset (:func:`recording`). ``until``: stop at so many
    environment steps of the configured ones, of which ``progress`` is told. Raises :class:`ConfigError` when
    ``out`` exists.
    """
    rows = AgentRows(task, config.num_envs, seed, record is not None)
    model = new_model(rows, config, seed)

    def save(path: Path) -> None:
        write_checkpoint(path, policy_arrays(model)._asdict())

    checkpoints = Checkpoints(out, config.checkpoint_every, save, rows.agents, until, progress)
    with recording(record, rows.spec, seed, config.checkpoint_every, rows.agents) as callbacks:
        new_run(out, task, seed, config)
        model.learn(config.steps * rows.agents, callback=[checkpoints, *callbacks])


class SharedBehaviorActor(nn.Module):
    """The policy that all agents share. Fits ``export.graph.DiscreteActor``.

    Raises :class:`ConfigError` when the arrays do not fit ``spec``.
    """

    identity: Tensor  # [N, H], the first layer's weights of the one-hot id
    w1: Tensor  # [H, O]
    b1: Tensor
    w2: Tensor
    b2: Tensor
    w3: Tensor
    b3: Tensor

    def __init__(self, arrays: PolicyArrays, spec: TeamSpec) -> None:
        super().__init__()
        width, actions = arrays.w1.shape[1], len(arrays.w3)
        expected = spec.observation_size + len(spec.agents), spec.action_size
        if (width, actions) != expected:
            raise ConfigError(
                f"the checkpoint maps {width} inputs to {actions} actions: it does not fit {spec.task}, which has "
                f"{expected[0]} with the id, and {expected[1]} actions"
            )
        tensors = {
            name: torch.from_numpy(np.asarray(values, np.float32))
            for name, values in arrays._asdict().items()
        }
        self.register_buffer("identity", tensors["w1"][:, spec.observation_size :].T.contiguous())
        tensors["w1"] = tensors["w1"][:, : spec.observation_size].contiguous()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, observation: Tensor, mask: Tensor, agent: int | None = None) -> Tensor:
        """Map ``[B, N, O]``, or ``[B, O]`` of ``agent``, and masks ``[B, (N,) A]`` to log-probabilities."""
        if agent is None:
            hidden = F.relu(F.linear(observation, self.w1, self.b1) + self.identity)
        else:
            hidden = F.relu(F.linear(observation, self.w1, self.b1 + self.identity[agent]))
        hidden = F.relu(F.linear(hidden, self.w2, self.b2))
        return masked_log_softmax(F.linear(hidden, self.w3, self.b3), mask)


def play_checkpoint(checkpoint: Path, task: str, rows: int, seed: int) -> PlayedPolicy:
    """Let a checkpoint's policy act stochastically in ``task`` (``smax/<map>``) for at least ``rows`` rows.

    Raises :class:`ConfigError` for a file that is not a checkpoint or does not fit the task,
    :class:`UnknownNameError` for an unknown map.
    """
    with SmaxVector(task, PLAYED_BATTLES) as battles:
        arrays = PolicyArrays(**read_checkpoint(checkpoint, PolicyArrays._fields))
        actor = SharedBehaviorActor(arrays, battles.spec)
        return PlayedPolicy(battles.spec, actor, *_play(actor, battles, rows, seed))


def _play(
    actor: SharedBehaviorActor, battles: SmaxVector, rows: int, seed: int
) -> tuple[Float, NDArray[np.uint8]]:
    """Return observations [M, N, O] and masks [M, N, A] of all battles' steps, M >= ``rows``."""
    spec = battles.spec
    noise = NoiseSource(spec, seed)
    # Fewer than ``rows`` battles can begin in so many steps: calls with different seeds share no battle.
    seeds = iter(range(seed * rows, (seed + 1) * rows))
    step = battles.reset({battle: next(seeds) for battle in range(battles.num_envs)})
    observations: list[Float] = []
    masks: list[NDArray[np.uint8]] = []
    while len(observations) * battles.num_envs < rows:
        observations.append(np.stack(list(step.observations.values()), axis=1))
        masks.append(np.stack(list((step.action_masks or {}).values()), axis=1))
        with torch.no_grad():
            logits = actor(torch.from_numpy(observations[-1]), torch.from_numpy(masks[-1])).numpy()
        scores = logits + np.stack(list(noise.draw(battles.num_envs).values()), axis=1)
        step = battles.step({name: scores[:, i].argmax(-1) for i, name in enumerate(spec.names)})
        ended = np.flatnonzero(step.terminated | step.truncated).tolist()
        if ended:
            step = battles.reset({battle: next(seeds) for battle in ended})
    return np.concatenate(observations), np.concatenate(masks)
