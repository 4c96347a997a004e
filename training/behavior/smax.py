"""Train the policies that SMAX datasets are recorded with: MAPPO by sb3-contrib's MaskablePPO.

Each agent of each environment is one row of SB3's batch, so all agents share one policy, and the team's reward
reaches each of them. The policy sees the agent's observation and its one-hot id; the critic sees the centralised
state as well. What SMAX forbids has probability zero.

Checkpoints and ``progress.jsonl`` are as in :mod:`omcda_deploy.training.behavior.mujoco`, with the share of
battles won beside the return; steps are those of environments, not of agents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from omcda_deploy.envs.smax import MAP_SIZE, SmaxVector, state_positions
from omcda_deploy.envs.vector import VectorStep
from omcda_deploy.errors import UnknownNameError
from omcda_deploy.training.behavior.mujoco import Checkpoints, new_run, write_checkpoint


@dataclass(frozen=True)
class MaskablePpoConfig:
    """PPO settings of one map, in environment steps; unnamed ones are sb3-contrib's defaults.

    Rollouts, learning rate and entropy are those of JaxMARL's (recurrent) baselines for SMAX. Their clip range of
    0.05 and 4 epochs were slower here: half the return after 131,000 steps, at 1.4 times the work.
    """

    steps: int = 10_000_000
    checkpoint_every: int = 250_000
    num_envs: int = 64
    n_steps: int = 128
    batch_size: int = 20_480  # rows, one per agent
    n_epochs: int = 2
    learning_rate: float = 4e-3  # at the start; it falls linearly to 0
    gamma: float = 0.99
    gae_lambda: float = 0.95
    ent_coef: float = 0.01
    hidden: int = 128


DEFAULTS = {
    "smax/5m_vs_6m": MaskablePpoConfig(),
    # Won nearly always after 500,000 steps: tiers between are close together.
    "smax/6h_vs_8z": MaskablePpoConfig(checkpoint_every=50_000),
    "smax/corridor": MaskablePpoConfig(steps=4_000_000, checkpoint_every=100_000),
}


def default_config(task: str) -> MaskablePpoConfig:
    """Raises :class:`UnknownNameError` for a task without settings of its own."""
    if task not in DEFAULTS:
        raise UnknownNameError("task", task, DEFAULTS)
    return DEFAULTS[task]


class AgentRows(VecEnv):
    """E battles of N agents as E x N rows of SB3's, row ``e * N + i`` being agent i of battle e.

    A row is (observation, one-hot id, centralised state with positions from 0 to 1 and all else cut off at 1). A
    battle that ends is reset in the same step. The first agent's info carries the episode's return and whether it
    was won.
    """

    render_mode = None

    def __init__(self, task: str, num_envs: int, seed: int) -> None:
        self._battles = SmaxVector(task, num_envs)
        spec = self._battles.spec
        self._names, self.agents = spec.names, len(spec.agents)
        self.seen = spec.observation_size + self.agents
        self._episode_seeds = np.random.default_rng(seed)
        self._rows = np.zeros((num_envs, self.agents, self.seen + spec.state_size), np.float32)
        self._rows[..., spec.observation_size : self.seen] = np.eye(self.agents)
        self._scale = np.ones(spec.state_size, np.float32)
        for x, y in state_positions(spec):
            self._scale[[x, y]] = 1.0 / MAP_SIZE
        self._masks = np.zeros((num_envs, self.agents, spec.action_size), np.bool_)
        self._returns, self._lengths = np.zeros(num_envs), np.zeros(num_envs, np.int64)
        self._actions = np.zeros((num_envs, self.agents), np.int64)
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
        step = self._battles.step({name: self._actions[:, i] for i, name in enumerate(self._names)})
        self._returns += step.reward
        self._lengths += 1
        self._show(step)
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
        if ended:
            self._restart(ended)
        rewards = np.repeat(step.reward, self.agents).astype(np.float32)
        return self._observed(), rewards, np.repeat(done, self.agents), infos

    def action_masks(self) -> NDArray[np.bool_]:
        """[rows, A], True where available."""
        return self._masks.reshape(self.num_envs, -1)

    def env_method(
        self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any
    ) -> list[NDArray[np.bool_]]:
        """MaskablePPO asks for ``action_masks`` alone, of all rows."""
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
        self._show(self._battles.reset({row: int(self._episode_seeds.integers(2**32)) for row in rows}))
        return self._observed()

    def _show(self, step: VectorStep) -> None:
        for i, name in enumerate(self._names):
            observation = step.observations[name]
            self._rows[:, i, : observation.shape[1]] = observation
            self._masks[:, i] = (step.action_masks or {})[name]
        # A weapon that is not fired cools down without end.
        self._rows[..., self.seen :] = np.clip(step.state * self._scale, -1.0, 1.0)[:, None]

    def _observed(self) -> NDArray[np.float32]:
        return self._rows.reshape(self.num_envs, -1).copy()


class _Networks(nn.Module):
    """Two hidden layers each: the policy's on the first ``seen`` entries of a row, the critic's on all."""

    def __init__(self, seen: int, width: int, hidden: int) -> None:
        super().__init__()
        self.seen = seen
        self.latent_dim_pi = self.latent_dim_vf = hidden
        self.policy, self.value = (
            nn.Sequential(nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
            for size in (seen, width)
        )

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward_actor(rows), self.forward_critic(rows)

    def forward_actor(self, rows: Tensor) -> Tensor:
        latent: Tensor = self.policy(rows[:, : self.seen])
        return latent

    def forward_critic(self, rows: Tensor) -> Tensor:
        latent: Tensor = self.value(rows)
        return latent


class _CentralisedCriticPolicy(MaskableActorCriticPolicy):
    def __init__(self, *args: Any, seen: int, hidden: int, **kwargs: Any) -> None:
        self._seen, self._hidden = seen, hidden
        super().__init__(*args, **kwargs)

    def _build_mlp_extractor(self) -> None:
        networks: Any = _Networks(
            self._seen, self.features_dim, self._hidden
        )  # of SB3's interface, not its class
        self.mlp_extractor = networks


def save_checkpoint(path: Path, model: Any) -> None:
    """Write the shared policy as plain arrays: w1, b1, w2, b2 before a ReLU each, w3, b3 to the logits."""
    first, _, second, _ = model.policy.mlp_extractor.policy
    layers = (first, second, model.policy.action_net)
    write_checkpoint(
        path,
        {
            f"{kind}{number}": tensor.detach().cpu().numpy()
            for number, layer in enumerate(layers, start=1)
            for kind, tensor in (("w", layer.weight), ("b", layer.bias))
        },
    )


def train(task: str, out: Path, seed: int, config: MaskablePpoConfig) -> None:
    """Train on ``task`` (``smax/<map>``) and leave checkpoints in the new folder ``out``."""
    new_run(out, task, seed, config)
    rows = AgentRows(task, config.num_envs, seed)
    model = MaskablePPO(
        _CentralisedCriticPolicy,
        rows,
        learning_rate=lambda remaining: config.learning_rate * remaining,
        n_steps=config.n_steps,
        batch_size=config.batch_size,
        n_epochs=config.n_epochs,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        ent_coef=config.ent_coef,
        policy_kwargs={"seen": rows.seen, "hidden": config.hidden},
        seed=seed,
        device="cpu",
    )
    checkpoints = Checkpoints(
        out, config.checkpoint_every, lambda path: save_checkpoint(path, model), rows.agents
    )
    model.learn(config.steps * rows.agents, callback=checkpoints)
