"""Train the joint Gaussian policies that datasets are recorded with (Stable-Baselines3 PPO).

PPO acts on u and the simulator receives tanh(u), so with a diagonal covariance the recorded behaviour policy is
exactly a product of per-agent tanh-Gaussians of the full state, the family that learners clone.

``train`` writes ``checkpoint-<steps>.npz`` files (weights and observation statistics, no pickles) and
``progress.jsonl`` with the mean return of the last 100 training episodes, which act stochastically as recording
does; while learning is fast that mean lags the policy, so tiers are chosen by ``behavior measure`` instead.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from omcda_deploy.envs.mamujoco import EPISODE_LIMIT, JointBody
from omcda_deploy.errors import ConfigError, UnknownNameError

log = logging.getLogger(__name__)

U_LIMIT = 10.0  # SB3 wants finite action bounds; tanh(10) is 1 - 4e-9, so clipping u there changes nothing


@dataclass(frozen=True)
class PpoConfig:
    """PPO settings of one body; unnamed ones are Stable-Baselines3's defaults."""

    steps: int
    checkpoint_every: int
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
    "mamujoco/hopper-3x1": PpoConfig(steps=3_000_000, checkpoint_every=25_000, log_std_init=-0.7),
    "mamujoco/ant-2x4": PpoConfig(steps=4_000_000, checkpoint_every=50_000),
}

# Mean returns of the published OMIGA datasets, which our tiers are chosen to come near (baselines.md).
PUBLISHED_RETURNS = {
    "mamujoco/halfcheetah-6x1": {"medium": 1425.66, "expert": 2785.10},
    "mamujoco/hopper-3x1": {"medium": 723.57, "expert": 2452.02},
    "mamujoco/ant-2x4": {"medium": 1418.70, "expert": 2055.07},
}


class SquashedBody(gymnasium.Env[Any, Any]):
    """The joint v2 environment with actions u, applied as tanh(u), and the 1,000-step limit."""

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


class Checkpoints(BaseCallback):
    """Every ``every`` environment steps, ``save`` a checkpoint and note the last episodes.

    ``rows_per_step``: how many of SB3's steps are one of an environment.
    """

    def __init__(self, out: Path, every: int, save: Callable[[Path], None], rows_per_step: int = 1) -> None:
        super().__init__()
        self._out, self._every, self._save, self._next = out, every, save, every
        self._rows_per_step = rows_per_step

    def _on_step(self) -> bool:
        steps = self.num_timesteps // self._rows_per_step
        if steps >= self._next:
            self._next += self._every
            episodes = [episode["r"] for episode in self.model.ep_info_buffer or []]
            wins = list(self.model.ep_success_buffer or [])  # of simulators that tell
            line = {
                "steps": steps,
                "return_mean": float(np.mean(episodes)) if episodes else None,
                "return_std": float(np.std(episodes)) if episodes else None,
                "episodes": len(episodes),
                **({"win_rate": float(np.mean(wins))} if wins else {}),
            }
            self._save(self._out / f"checkpoint-{steps:08d}.npz")
            with (self._out / "progress.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            log.info("%s", line)
        return True


def save_checkpoint(path: Path, model: Any, statistics: VecNormalize) -> None:
    """Write the actor and its observation statistics as plain arrays."""
    policy = model.policy
    first, _, second, _ = policy.mlp_extractor.policy_net
    parameters = {
        "w1": first.weight,
        "b1": first.bias,
        "w2": second.weight,
        "b2": second.bias,
        "w_mean": policy.action_net.weight,
        "b_mean": policy.action_net.bias,
        "log_std": policy.log_std,
    }
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in parameters.items()}
    moments: Any = statistics.obs_rms  # a dict only for dictionary observations
    arrays["observation_mean"] = np.asarray(moments.mean, np.float64)
    arrays["observation_var"] = np.asarray(moments.var, np.float64) + statistics.epsilon
    arrays["observation_clip"] = np.asarray(statistics.clip_obs, np.float64)
    write_checkpoint(path, arrays)


def write_checkpoint(path: Path, arrays: dict[str, Any]) -> None:
    """Write named arrays as a whole file or none."""
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, **arrays)
    temporary.replace(path)


def new_run(out: Path, task: str, seed: int, config: Any) -> None:
    """Make the folder ``out`` with its ``config.json``. Raises :class:`ConfigError` where it exists."""
    if out.exists():
        raise ConfigError(f"{out} exists already: choose another --out, or remove it first")
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps({"task": task, "seed": seed, **asdict(config)}, indent=1))


def default_config(task: str) -> PpoConfig:
    """Raises :class:`UnknownNameError` for a task without settings of its own."""
    if task not in DEFAULTS:
        raise UnknownNameError("task", task, DEFAULTS)
    return DEFAULTS[task]


def train(task: str, out: Path, seed: int, config: PpoConfig) -> None:
    """Train on ``task`` (``mamujoco/<body>``) and leave checkpoints in the new folder ``out``."""
    name = task.removeprefix("mamujoco/")
    new_run(out, task, seed, config)
    envs = DummyVecEnv([lambda: Monitor(SquashedBody(name)) for _ in range(config.num_envs)])
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
    checkpoints = Checkpoints(
        out, config.checkpoint_every, lambda path: save_checkpoint(path, model, statistics)
    )
    model.learn(config.steps, callback=checkpoints)
