"""Joint Gaussian policies of MA-MuJoCo, trained with Stable-Baselines3's PPO, and the actor that is exported.

PPO acts on u and the simulator receives tanh(u), so with a diagonal covariance the recorded behaviour policy is
exactly a product of per-agent tanh-Gaussians of the full state, the family that learners clone.

A checkpoint is one tanh MLP on the raw observation of the whole body, but the agents of a bundle see OMIGA's
standardised vectors. Those end in a one-hot id whose 1 and 0 became ``z1 = (1 - mean) / std`` and
``z0 = -mean / std``, so the raw vector is ``(z - z0) / (z1 - z0)``, exactly, and every agent can evaluate the joint
policy and keep its share (docs/simulators.md#observations).

Shapes: B batch, M rows, N agents, W a team's observation, R the raw observation, H hidden, J joints of the body,
A joints of one agent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from torch import Tensor, nn

from omcda_deploy.datasets import Episode
from omcda_deploy.envs.mamujoco import EPISODE_LIMIT, JointBody, MultiAgentMujoco, team_spec, team_vectors
from omcda_deploy.errors import ConfigError, UnknownNameError
from omcda_deploy.policy import Float, NoiseSource
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

U_LIMIT = 10.0  # SB3 requires finite action bounds; tanh(10) is 1 - 4e-9, so clipping u there changes nothing


@dataclass(frozen=True)
class PpoConfig:
    """PPO settings of one body; settings without a field keep Stable-Baselines3's defaults."""

    steps: int
    checkpoint_every: int  # environment steps
    num_envs: int = 8
    n_steps: int = 256
    batch_size: int = 128
    n_epochs: int = 10
    learning_rate: float = 3e-4
    linear_decay: bool = True
    gamma: float = 0.99
    gae_lambda: float = 0.95
    log_std_init: float = -1.0
    hidden: int = 64


DEFAULTS = {
    "mamujoco/halfcheetah-6x1": PpoConfig(steps=400_000, checkpoint_every=10_000),
    "mamujoco/hopper-3x1": PpoConfig(steps=1_000_000, checkpoint_every=25_000, log_std_init=-0.7),
    # At a return of 2,000 this body falls in 5 to 8 of 20 episodes with a standard deviation of exp(-1) or exp(-2)
    # in u, and in none with exp(-3). The published returns hardly vary.
    "mamujoco/ant-2x4": PpoConfig(steps=400_000, checkpoint_every=10_000, log_std_init=-3.0),
}


def default_config(task: str) -> PpoConfig:
    """Return the PPO configuration of ``task``. Raises :class:`UnknownNameError` for a task without one."""
    if task not in DEFAULTS:
        raise UnknownNameError("task", task, DEFAULTS)
    return DEFAULTS[task]


class PolicyArrays(NamedTuple):
    """Arrays of a checkpoint; the field names are the names in the file."""

    w1: NDArray[Any]  # [H, R], applied to the normalised raw observation
    b1: NDArray[Any]
    w2: NDArray[Any]  # [H, H]
    b2: NDArray[Any]
    w_mean: NDArray[Any]  # [J, H]
    b_mean: NDArray[Any]
    log_std: NDArray[Any]  # [J]
    observation_mean: NDArray[Any]  # [R]
    observation_var: NDArray[Any]  # [R], epsilon included
    observation_clip: NDArray[Any]  # [], limit of the normalised observation


class SquashedBody(gymnasium.Env[Any, Any]):
    """Single-agent v2 environment with actions u, applied as tanh(u), and the 1,000-step limit."""

    def __init__(self, name: str) -> None:
        self._joint = JointBody(name)
        size = self._joint.observation_size
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.action_space = gymnasium.spaces.Box(-U_LIMIT, U_LIMIT, (self._joint.action_size,), np.float32)
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self._steps = 0
        return self._joint.reset(seed).astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated = self._joint.step(np.tanh(action))
        self._steps += 1
        truncated = not terminated and self._steps >= EPISODE_LIMIT
        return observation.astype(np.float32), reward, terminated, truncated, {}

    def close(self) -> None:
        self._joint.close()


class RecordedBody(gymnasium.Wrapper[Any, Any, Any, Any]):
    """:class:`SquashedBody` that hands over each episode, as the team of ``spec`` sees it, when it ends."""

    def __init__(self, body: SquashedBody, spec: TeamSpec) -> None:
        super().__init__(body)
        self._spec = spec
        self._observations: list[NDArray[Any]] = []
        self._actions: list[NDArray[Any]] = []
        self._rewards: list[float] = []

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        self._observations, self._actions, self._rewards = [observation], [], []
        return observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._observations.append(observation)
        self._actions.append(np.tanh(action))
        self._rewards.append(float(reward))
        if terminated or truncated:
            info = {**info, RECORDED: self._episode(truncated)}
        return observation, reward, terminated, truncated, info

    def _episode(self, timeout: bool) -> Episode:
        agents, steps = len(self._spec.agents), len(self._actions)
        vectors = team_vectors(self._spec, np.stack(self._observations))
        return Episode(
            vectors,
            vectors.reshape(steps + 1, -1),
            np.stack(self._actions).reshape(steps, agents, -1).astype(np.float32),
            np.array(self._rewards),
            timeout=timeout,
        )


def policy_arrays(model: PPO, statistics: VecNormalize) -> PolicyArrays:
    """Return the actor's weights and its observation statistics."""

    def array(tensor: Tensor) -> NDArray[Any]:
        values: NDArray[Any] = tensor.detach().cpu().numpy()
        return values

    policy: Any = model.policy
    first, _, second, _ = policy.mlp_extractor.policy_net
    moments: Any = statistics.obs_rms  # a dict only for dictionary observations
    return PolicyArrays(
        w1=array(first.weight),
        b1=array(first.bias),
        w2=array(second.weight),
        b2=array(second.bias),
        w_mean=array(policy.action_net.weight),
        b_mean=array(policy.action_net.bias),
        log_std=array(policy.log_std),
        observation_mean=np.asarray(moments.mean, np.float64),
        observation_var=np.asarray(moments.var, np.float64) + statistics.epsilon,
        observation_clip=np.asarray(statistics.clip_obs, np.float64),
    )


def train(
    task: str,
    out: Path,
    seed: int,
    config: PpoConfig,
    record: Path | None = None,
    until: int | None = None,
    progress: Callable[[float, float], None] | None = None,
) -> None:
    """Train on ``task`` (``mamujoco/<body>``) and write checkpoints to the new folder ``out``.

    ``record``: the training episodes become this dataset (:func:`recording`). ``until``: stop at so many
    environment steps of the configured ones, of which ``progress`` is told. Raises :class:`ConfigError` when
    ``out`` exists.
    """
    name, spec = task.removeprefix("mamujoco/"), team_spec(task)

    def body() -> Any:
        return Monitor(SquashedBody(name) if record is None else RecordedBody(SquashedBody(name), spec))

    envs = DummyVecEnv([body] * config.num_envs)
    statistics = VecNormalize(envs, gamma=config.gamma)
    rate = config.learning_rate
    model = PPO(
        "MlpPolicy",
        statistics,
        learning_rate=(lambda remaining: rate * remaining) if config.linear_decay else rate,
        n_steps=config.n_steps,
        batch_size=config.batch_size,
        n_epochs=config.n_epochs,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        policy_kwargs={
            "log_std_init": config.log_std_init,
            "net_arch": {"pi": [config.hidden] * 2, "vf": [config.hidden] * 2},
        },
        seed=seed,
        device="cpu",
    )

    def save(path: Path) -> None:
        write_checkpoint(path, policy_arrays(model, statistics)._asdict())

    checkpoints = Checkpoints(out, config.checkpoint_every, save, until=until, progress=progress)
    with recording(record, spec, seed, config.checkpoint_every) as callbacks:
        new_run(out, task, seed, config)
        model.learn(config.steps, callback=[checkpoints, *callbacks])
    envs.close()


class JointBehaviorActor(nn.Module):
    """Each agent's share of a joint Gaussian policy, on the team's observations.

    Fits ``export.graph.ContinuousActor``. Agent k of a ``mamujoco/*`` team drives the k-th of N equal runs of
    joints. Raises :class:`ConfigError` when the arrays do not fit ``spec``.
    """

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    w_mean: Tensor  # [N, A, H]
    b_mean: Tensor  # [N, A]
    log_std: Tensor  # [N, A]
    observation_mean: Tensor
    inverse_std: Tensor

    def __init__(self, arrays: PolicyArrays, spec: TeamSpec) -> None:
        super().__init__()
        self.agents = len(spec.agents)
        self.joints = spec.action_size
        self.raw_size = arrays.w1.shape[1]
        total = self.agents * self.joints
        if len(arrays.w_mean) != total or self.raw_size + self.agents > spec.observation_size:
            raise ConfigError(
                f"the checkpoint maps {self.raw_size} observations to {len(arrays.w_mean)} joints: it does not "
                f"fit {spec.task}, which has {total} joints and observations of {spec.observation_size} with the id"
            )

        shapes = {
            "w_mean": (self.agents, self.joints, -1),
            "b_mean": (self.agents, self.joints),
            "log_std": (self.agents, self.joints),
        }
        # The order of the buffers is the order of the weights in the exported file.
        for name in ("w1", "b1", "w2", "b2", "w_mean", "b_mean", "log_std", "observation_mean"):
            values = np.asarray(getattr(arrays, name), np.float32)
            self.register_buffer(name, torch.from_numpy(values.reshape(shapes.get(name, values.shape))))
        inverse_std = 1.0 / np.sqrt(arrays.observation_var)
        self.register_buffer("inverse_std", torch.from_numpy(inverse_std.astype(np.float32)))
        self.clip = float(arrays.observation_clip)

    def forward(self, observation: Tensor, agent: int | None = None) -> tuple[Tensor, Tensor]:
        """Map ``[B, N, W]``, or ``[B, W]`` of ``agent``, to mean and log_std, each ``[B, (N,) A]``.

        Raw and standardised observations give the same distribution.
        """
        raw = self.raw(observation)
        x = ((raw - self.observation_mean) * self.inverse_std).clamp(-self.clip, self.clip)
        hidden = torch.tanh(F.linear(x, self.w1, self.b1))
        hidden = torch.tanh(F.linear(hidden, self.w2, self.b2))  # [B, (N,) H]
        if agent is not None:
            mean = F.linear(hidden, self.w_mean[agent], self.b_mean[agent])
            return mean, self.log_std[agent].expand_as(mean)
        weights = self.w_mean.transpose(-1, -2)  # [N, H, A]
        mean = (hidden.unsqueeze(-2) @ weights).squeeze(-2) + self.b_mean
        return mean, self.log_std.expand_as(mean)

    def raw(self, observation: Tensor) -> Tensor:
        """Recover the raw observation ``[B, (N,) R]`` from a raw or standardised vector ``[B, (N,) W]``."""
        identity = observation[..., -self.agents :]
        zero, one = identity.amin(-1, keepdim=True), identity.amax(-1, keepdim=True)
        return (observation[..., : self.raw_size] - zero) / (one - zero)


def play_checkpoint(checkpoint: Path, task: str, rows: int, seed: int) -> PlayedPolicy:
    """Let a checkpoint's policy act stochastically in ``task`` (``mamujoco/<body>``) for ``rows`` steps.

    Raises :class:`ConfigError` for a file that is not a checkpoint or does not fit the task,
    :class:`UnknownNameError` for an unknown body.
    """
    env = MultiAgentMujoco(task)
    try:
        arrays = PolicyArrays(**read_checkpoint(checkpoint, PolicyArrays._fields))
        actor = JointBehaviorActor(arrays, env.spec)
        return PlayedPolicy(env.spec, actor, _play(actor, env, rows, seed))
    finally:
        env.close()


def _play(actor: JointBehaviorActor, env: MultiAgentMujoco, rows: int, seed: int) -> Float:
    """Return the observations [rows, N, W] of consecutive steps, one episode after another."""
    names = env.spec.names
    noise = NoiseSource(env.spec, seed)
    observations, _ = env.reset(seed=seed)
    joined = np.empty((rows, len(names), env.spec.observation_size), np.float32)
    for row in joined:
        row[:] = [observations[name] for name in names]
        with torch.no_grad():
            mean, log_std = actor(torch.from_numpy(row).unsqueeze(0))
        sample = torch.from_numpy(np.concatenate(list(noise.draw(1).values()))).unsqueeze(0)
        actions = torch.tanh(mean + log_std.exp() * sample)[0].numpy()
        observations, _, terminated, truncated, _ = env.step(dict(zip(names, actions, strict=True)))
        if any(terminated.values()) or any(truncated.values()):
            observations, _ = env.reset()
    return joined
