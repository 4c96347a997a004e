"""Decentralised Gaussian policies of MA-MuJoCo k-hop, trained with Stable-Baselines3's PPO.

Each agent has a policy of its own on what it observes; the critic sees the centralised state. What an agent of
these tasks observes are entries of that state, so PPO acts on the state as one agent, with a policy network that is
divided among the agents: agent i's part reads its entries alone, and gives the means of its actions alone. As with
:mod:`omcda_deploy.training.behavior.mujoco`, PPO acts on u and the simulator receives tanh(u), so the recorded
policy is a product of per-agent tanh-Gaussians of each agent's observation.

A checkpoint is one tanh MLP per agent, on its normalised observation.

Shapes: B batch, E environments, N agents, W padded observation of an agent, H hidden, A actions of an agent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv, VecNormalize
from torch import Tensor, nn

from omcda_deploy.envs.mamujoco_khop import DecentralizedMujoco, make_vector
from omcda_deploy.errors import ConfigError, UnknownNameError
from omcda_deploy.policy import NoiseSource
from omcda_deploy.spec import TeamSpec
from omcda_deploy.training.behavior.checkpoint import (
    Checkpoints,
    PlayedPolicy,
    new_run,
    read_checkpoint,
    write_checkpoint,
)
from omcda_deploy.training.behavior.mujoco import U_LIMIT, PpoConfig

PLAYED_ENVIRONMENTS = 8  # that play_checkpoint steps together

DEFAULTS = {
    "mamujoco-khop1/halfcheetah-6x1": PpoConfig(steps=300_000, checkpoint_every=20_000),
    "mamujoco-khop1/hopper-3x1": PpoConfig(steps=700_000, checkpoint_every=25_000, log_std_init=-0.7),
    "mamujoco-khop1/ant-2x4": PpoConfig(steps=500_000, checkpoint_every=50_000),
}


def default_config(task: str) -> PpoConfig:
    """Return the PPO configuration of ``task``. Raises :class:`UnknownNameError` for a task without one."""
    if task not in DEFAULTS:
        raise UnknownNameError("task", task, DEFAULTS)
    return DEFAULTS[task]


class PolicyArrays(NamedTuple):
    """Arrays of a checkpoint; the field names are the names in the file."""

    w1: NDArray[Any]  # [N, H, W], zeros for padding
    b1: NDArray[Any]  # [N, H]
    w2: NDArray[Any]  # [N, H, H]
    b2: NDArray[Any]
    w3: NDArray[Any]  # [N, A, H]
    b3: NDArray[Any]  # [N, A]
    log_std: NDArray[Any]  # [N, A]
    observation_mean: NDArray[Any]  # [N, W]
    observation_var: NDArray[Any]  # [N, W], epsilon included; ones for padding
    observation_clip: NDArray[Any]  # [], limit of the normalised observation


class TeamStates(VecEnv):
    """E teams as E environments of SB3, which observe the centralised state and act for all agents at once, by u.

    An episode that ends is reset in the same step.
    """

    render_mode = None

    def __init__(self, task: str, num_envs: int, seed: int) -> None:
        self._teams = make_vector(task, num_envs)
        self.spec = self._teams.spec
        self._episode_seeds = np.random.default_rng(seed)
        self._returns, self._lengths = np.zeros(num_envs), np.zeros(num_envs, np.int64)
        size = self.spec.action_slices[-1].stop
        self._actions = np.zeros((num_envs, size), np.float32)
        super().__init__(
            num_envs,
            gymnasium.spaces.Box(-np.inf, np.inf, (self.spec.state_size,), np.float32),
            gymnasium.spaces.Box(-U_LIMIT, U_LIMIT, (size,), np.float32),
        )

    def reset(self) -> NDArray[np.float32]:
        return self._restart(range(self.num_envs))

    def step_async(self, actions: NDArray[Any]) -> None:
        self._actions = np.tanh(actions)

    def step_wait(self) -> tuple[NDArray[np.float32], NDArray[Any], NDArray[np.bool_], list[dict[str, Any]]]:
        slices = zip(self.spec.names, self.spec.action_slices, strict=True)
        step = self._teams.step({name: self._actions[:, columns] for name, columns in slices})
        self._returns += step.reward
        self._lengths += 1
        done, states = step.terminated | step.truncated, step.state
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        ended = np.flatnonzero(done).tolist()
        for row in ended:
            infos[row] = {
                "terminal_observation": states[row].copy(),
                "TimeLimit.truncated": bool(step.truncated[row]),
                "episode": {"r": self._returns[row], "l": self._lengths[row], "t": 0.0},
            }
        if ended:
            states = self._restart(ended)
        return states, step.reward.astype(np.float32), done, infos

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self, attr_name)] * self.num_envs

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise NotImplementedError(attr_name)

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        raise NotImplementedError(method_name)

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * self.num_envs

    def close(self) -> None:
        self._teams.close()

    def _restart(self, environments: Sequence[int]) -> NDArray[np.float32]:
        rows = list(environments)
        self._returns[rows], self._lengths[rows] = 0.0, 0
        return self._teams.reset({row: int(self._episode_seeds.integers(2**32)) for row in rows}).state


class _Networks(nn.Module):
    """Tanh networks of SB3's shape: a part per agent, which gives the means of its actions, and a critic."""

    def __init__(
        self, seen: Sequence[NDArray[np.int64]], sizes: Sequence[int], state: int, hidden: int
    ) -> None:
        super().__init__()
        self.seen = [torch.from_numpy(entries) for entries in seen]
        self.parts = nn.ModuleList(
            nn.Sequential(
                nn.Linear(len(entries), hidden),
                nn.Tanh(),
                nn.Linear(hidden, hidden),
                nn.Tanh(),
                nn.Linear(hidden, size),
            )
            for entries, size in zip(seen, sizes, strict=True)
        )
        for part in self.parts:
            last: Any = list(part.children())[-1]
            nn.init.orthogonal_(last.weight, 0.01)  # as SB3's own action layer
            nn.init.zeros_(last.bias)
        self.critic = nn.Sequential(nn.Linear(state, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh())
        self.latent_dim_pi, self.latent_dim_vf = sum(sizes), hidden

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward_actor(states), self.forward_critic(states)

    def forward_actor(self, states: Tensor) -> Tensor:
        means = [part(states[:, entries]) for part, entries in zip(self.parts, self.seen, strict=True)]
        return torch.cat(means, -1)

    def forward_critic(self, states: Tensor) -> Tensor:
        latent: Tensor = self.critic(states)
        return latent


class _DecentralizedPolicy(ActorCriticPolicy):
    def __init__(self, *args: Any, seen: Any, sizes: Sequence[int], hidden: int, **kwargs: Any) -> None:
        self._division = (seen, sizes)
        self._hidden = hidden
        super().__init__(*args, **{**kwargs, "ortho_init": False})

    def _build_mlp_extractor(self) -> None:
        # SB3 types this attribute as its own class, but needs no more than the interface of _Networks.
        networks: Any = _Networks(*self._division, self.features_dim, self._hidden)
        self.mlp_extractor = networks

    def _build(self, lr_schedule: Any) -> None:
        super()._build(lr_schedule)
        self.action_net = nn.Identity()  # the parts give means already
        options = {**self.optimizer_kwargs, "lr": lr_schedule(1)}
        self.optimizer = self.optimizer_class(self.parameters(), **options)


def policy_arrays(model: PPO, statistics: VecNormalize, spec: TeamSpec) -> PolicyArrays:
    """Return the weights of all agents' policies and the statistics of their observations."""
    policy: Any = model.policy
    moments: Any = statistics.obs_rms  # a dict only for dictionary observations
    networks, width = policy.mlp_extractor, spec.observation_size

    def stacked(layer: int, field: str) -> NDArray[Any]:
        return np.stack([getattr(part[layer], field).detach().cpu().numpy() for part in networks.parts])

    def padded(rows: list[NDArray[Any]], fill: float) -> NDArray[Any]:
        wide = [(0, 0)] * (rows[0].ndim - 1)
        return np.stack(
            [np.pad(row, [*wide, (0, width - row.shape[-1])], constant_values=fill) for row in rows]
        )

    variances = np.asarray(moments.var, np.float64) + statistics.epsilon
    means = np.asarray(moments.mean, np.float64)
    return PolicyArrays(
        w1=padded([part[0].weight.detach().cpu().numpy() for part in networks.parts], 0.0),
        b1=stacked(0, "bias"),
        w2=stacked(2, "weight"),
        b2=stacked(2, "bias"),
        w3=stacked(4, "weight"),
        b3=stacked(4, "bias"),
        log_std=policy.log_std.detach().cpu().numpy().reshape(len(spec.agents), -1),
        observation_mean=padded([means[entries.numpy()] for entries in networks.seen], 0.0),
        observation_var=padded([variances[entries.numpy()] for entries in networks.seen], 1.0),
        observation_clip=np.asarray(statistics.clip_obs, np.float64),
    )


def new_model(teams: VecNormalize, task: str, config: PpoConfig, seed: int) -> PPO:
    """Create PPO on ``teams`` of a task with fresh networks."""
    single = DecentralizedMujoco(task)
    seen, _ = single.factorization()
    sizes = [agent.action.size for agent in single.spec.agents]
    single.close()
    rate = config.learning_rate
    return PPO(
        _DecentralizedPolicy,
        teams,
        learning_rate=(lambda remaining: rate * remaining) if config.linear_decay else rate,
        n_steps=config.n_steps,
        batch_size=config.batch_size,
        n_epochs=config.n_epochs,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        policy_kwargs={
            "log_std_init": config.log_std_init,
            "seen": seen,
            "sizes": sizes,
            "hidden": config.hidden,
        },
        seed=seed,
        device="cpu",
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
    """Train on ``task`` (``mamujoco-khop1/<body>``) and write checkpoints to the new folder ``out``.

    ``until``: stop at so many environment steps of the configured ones, of which ``progress`` is told. Raises
    :class:`ConfigError` when ``out`` exists, and for ``record``, which this simulator's training does not do.
    """
    if record is not None:
        raise ConfigError(
            f"--record: the training on {task} is not recorded: leave it out, and record the policies with  "
            "omcda-deploy collect"
        )
    new_run(out, task, seed, config)
    teams = TeamStates(task, config.num_envs, seed)
    statistics = VecNormalize(teams, gamma=config.gamma)
    model = new_model(statistics, task, config, seed)

    def save(path: Path) -> None:
        write_checkpoint(path, policy_arrays(model, statistics, teams.spec)._asdict())

    model.learn(
        config.steps, callback=Checkpoints(out, config.checkpoint_every, save, until=until, progress=progress)
    )


class DecentralizedBehaviorActor(nn.Module):
    """The agents' own policies. Fits ``export.graph.ContinuousActor``.

    Raises :class:`ConfigError` when the arrays do not fit ``spec``.
    """

    w1: Tensor  # [N, W, H], as the weights below transposed
    b1: Tensor
    w2: Tensor
    b2: Tensor
    w3: Tensor
    b3: Tensor
    log_std: Tensor
    observation_mean: Tensor
    inverse_std: Tensor

    def __init__(self, arrays: PolicyArrays, spec: TeamSpec) -> None:
        super().__init__()
        expected = (len(spec.agents), spec.observation_size, spec.action_size)
        found = (len(arrays.w1), arrays.w1.shape[-1], arrays.w3.shape[1])
        if found != expected:
            raise ConfigError(
                f"the checkpoint has {found[0]} agents with {found[1]} observations and {found[2]} actions: it "
                f"does not fit {spec.task}, which has {expected[0]}, {expected[1]} and {expected[2]}"
            )
        for name in ("w1", "b1", "w2", "b2", "w3", "b3", "log_std", "observation_mean"):
            values = torch.from_numpy(np.asarray(getattr(arrays, name), np.float32))
            self.register_buffer(name, values.mT.contiguous() if name.startswith("w") else values)
        inverse_std = 1.0 / np.sqrt(arrays.observation_var)
        self.register_buffer("inverse_std", torch.from_numpy(inverse_std.astype(np.float32)))
        self.clip = float(arrays.observation_clip)

    def forward(self, observation: Tensor, agent: int | None = None) -> tuple[Tensor, Tensor]:
        """Map ``[B, N, W]``, or ``[B, W]`` of ``agent``, to mean and log_std, each ``[B, (N,) A]``."""
        rows: Any = slice(None) if agent is None else agent

        def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            if agent is not None:
                return x @ weight[agent] + bias[agent]
            return (x.unsqueeze(-2) @ weight).squeeze(-2) + bias

        x = (observation - self.observation_mean[rows]) * self.inverse_std[rows]
        hidden = torch.tanh(layer(x.clamp(-self.clip, self.clip), self.w1, self.b1))
        mean = layer(torch.tanh(layer(hidden, self.w2, self.b2)), self.w3, self.b3)
        return mean, self.log_std[rows].expand_as(mean)


def play_checkpoint(checkpoint: Path, task: str, rows: int, seed: int) -> PlayedPolicy:
    """Let a checkpoint's policies act stochastically in ``task`` for at least ``rows`` rows.

    Raises :class:`ConfigError` for a file that is not a checkpoint or does not fit the task,
    :class:`UnknownNameError` for an unknown body.
    """
    with make_vector(task, PLAYED_ENVIRONMENTS) as teams:
        spec = teams.spec
        actor = DecentralizedBehaviorActor(
            PolicyArrays(**read_checkpoint(checkpoint, PolicyArrays._fields)), spec
        )
        noise, episode_seeds = NoiseSource(spec, seed), np.random.default_rng(seed)
        running = np.zeros(PLAYED_ENVIRONMENTS, np.bool_)
        played: list[NDArray[np.float32]] = []
        while len(played) * PLAYED_ENVIRONMENTS < rows:
            waiting = np.flatnonzero(~running).tolist()
            if waiting:
                step = teams.reset({row: int(episode_seeds.integers(2**32)) for row in waiting})
            observations = np.zeros(
                (PLAYED_ENVIRONMENTS, len(spec.agents), spec.observation_size), np.float32
            )
            for index, agent in enumerate(spec.agents):
                observations[:, index, : agent.observation_size] = step.observations[agent.name]
            played.append(observations)
            with torch.no_grad():
                mean, log_std = actor(torch.from_numpy(observations))
            sample = torch.from_numpy(np.stack(list(noise.draw(PLAYED_ENVIRONMENTS).values()), axis=1))
            actions = torch.tanh(mean + log_std.exp() * sample).numpy()
            step = teams.step({name: actions[:, index] for index, name in enumerate(spec.names)})
            running = ~(step.terminated | step.truncated)
        return PlayedPolicy(spec, actor, np.concatenate(played))
