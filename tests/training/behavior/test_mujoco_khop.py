"""Decentralised behaviour policies: the actor against SB3's policy, and what each agent's actions depend on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omcda_deploy.errors import ConfigError, UnknownNameError

pytest.importorskip("stable_baselines3")

from stable_baselines3.common.vec_env import VecNormalize

from omcda_deploy.envs.mamujoco_khop import make_vector
from omcda_deploy.experiments import behavior_returns, tiers
from omcda_deploy.training.behavior import mujoco_khop
from omcda_deploy.training.behavior.mujoco import PpoConfig
from omcda_deploy.training.behavior.mujoco_khop import (
    DecentralizedBehaviorActor,
    TeamStates,
    new_model,
    play_checkpoint,
    policy_arrays,
)

TASK = "mamujoco-khop1/hopper-3x1"
SMALL = PpoConfig(steps=64, checkpoint_every=32, num_envs=2, n_steps=16, batch_size=16, n_epochs=1, hidden=8)


@pytest.mark.parametrize("task", mujoco_khop.DEFAULTS)
def test_the_actor_has_the_distribution_that_ppo_trained(task: str) -> None:
    teams = TeamStates(task, 2, seed=0)
    statistics = VecNormalize(teams)
    generator = np.random.default_rng(1)
    moments: Any = statistics.obs_rms
    moments.update(generator.normal(0.5, 2.0, (100, teams.spec.state_size)))
    model: Any = new_model(statistics, task, SMALL, seed=0)
    with torch.no_grad():
        model.policy.log_std.copy_(torch.linspace(-1.0, 0.5, len(model.policy.log_std)))
        for parameter in model.policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # PPO starts with zero biases and tiny means
    spec = teams.spec
    actor = DecentralizedBehaviorActor(policy_arrays(model, statistics, spec), spec)
    with make_vector(task, 5) as vector:
        step = vector.reset({row: row for row in range(5)})
        for _ in range(3):
            actions = {a.name: generator.uniform(-1, 1, (5, a.action.size)) for a in spec.agents}
            step = vector.step(actions)
    normalised: Any = statistics.normalize_obs(step.state)
    with torch.no_grad():
        expected = model.policy.get_distribution(torch.from_numpy(normalised.astype(np.float32))).distribution
        observation = torch.zeros(5, len(spec.agents), spec.observation_size)
        for index, agent in enumerate(spec.agents):
            observation[:, index, : agent.observation_size] = torch.from_numpy(step.observations[agent.name])
        mean, log_std = actor(observation)
        np.testing.assert_allclose(mean.reshape(5, -1), expected.mean, atol=1e-5)
        np.testing.assert_allclose(log_std.exp().reshape(5, -1), expected.stddev, atol=1e-6)
        for index in range(len(spec.agents)):
            own_mean, own_log_std = actor(observation[:, index], index)
            np.testing.assert_allclose(own_mean, mean[:, index], atol=1e-6)
            np.testing.assert_array_equal(own_log_std, log_std[:, index])
            # What the others see, and what pads the agent's own observation, has no part in its action.
            other = observation + torch.randn_like(observation)
            size = spec.agents[index].observation_size
            other[:, index, :size] = observation[:, index, :size]
            np.testing.assert_array_equal(actor(other)[0][:, index], mean[:, index])
    teams.close()


def test_episodes_are_those_of_the_simulator() -> None:
    """Returns, ends and last observations of episodes, which are reset in the same step."""
    teams = TeamStates(TASK, 3, seed=4)
    seeds = np.random.default_rng(4)
    with make_vector(TASK, 3) as vector:
        expected = vector.reset({row: int(seeds.integers(2**32)) for row in range(3)})
        states = teams.reset()
        np.testing.assert_array_equal(states, expected.state)
        returns, ends = np.zeros(3), 0
        generator = np.random.default_rng(0)
        for _ in range(120):
            u = generator.normal(size=(3, 3)).astype(np.float32)
            teams.step_async(u)
            states, rewards, done, infos = teams.step_wait()
            expected = vector.step({name: np.tanh(u[:, [i]]) for i, name in enumerate(vector.spec.names)})
            np.testing.assert_array_equal(rewards, expected.reward.astype(np.float32))
            np.testing.assert_array_equal(done, expected.terminated | expected.truncated)
            returns += expected.reward
            for row in np.flatnonzero(done).tolist():
                ends += 1
                np.testing.assert_array_equal(infos[row]["terminal_observation"], expected.state[row])
                assert infos[row]["episode"]["r"] == returns[row]
                assert infos[row]["TimeLimit.truncated"] is False
                returns[row] = 0.0
                expected = vector.reset({row: int(seeds.integers(2**32))})
            np.testing.assert_array_equal(states, expected.state)
    assert ends > 3
    teams.close()


def test_training_leaves_checkpoints_that_play_and_export(tmp_path: Path) -> None:
    run = tmp_path / "run"
    mujoco_khop.train(TASK, run, 0, SMALL)
    assert json.loads((run / "config.json").read_text())["task"] == TASK
    lines = [json.loads(line) for line in (run / "progress.jsonl").read_text().splitlines()]
    assert [line["steps"] for line in lines] == [32, 64]
    first, last = (np.load(run / f"checkpoint-{steps:08d}.npz") for steps in (32, 64))
    assert not np.array_equal(first["w1"], last["w1"])
    assert not first["w1"][0, :, 8:].any()  # agent_0 of three sees 8 numbers, agent_1 sees 9
    played = play_checkpoint(run / "checkpoint-00000064.npz", TASK, 20, seed=0)
    assert played.observations.shape == (24, 3, 9)
    assert not np.array_equal(played.observations[0], played.observations[8])
    bundle = tiers.export_checkpoint(
        run / "checkpoint-00000064.npz", TASK, tmp_path / "bundle", tier="medium"
    )
    assert bundle.manifest["training"]["tier"] == "medium"
    with pytest.raises(ConfigError, match="exists already"):
        mujoco_khop.train(TASK, run, 0, SMALL)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    mujoco_khop.train(TASK, run, 0, SMALL)
    with pytest.raises(
        ConfigError, match=r"3 agents with 9 observations and 1 actions: it does not fit .*ant-2x4"
    ):
        play_checkpoint(run / "checkpoint-00000032.npz", "mamujoco-khop1/ant-2x4", 8, seed=0)
    with pytest.raises(UnknownNameError, match="did you mean 'mamujoco-khop1/hopper-3x1'"):
        mujoco_khop.default_config("mamujoco-khop1/hoper-3x1")
    for task in mujoco_khop.DEFAULTS:
        assert behavior_returns.simulator_of(task).module == mujoco_khop.__name__
