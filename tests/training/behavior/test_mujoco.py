"""Joint behaviour policies: the actor against numpy and against SB3, and a training that leaves checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omcda_deploy.envs.mamujoco import MultiAgentMujoco, standardize
from omcda_deploy.errors import ConfigError, DatasetError, UnknownNameError
from omcda_deploy.registry import read_dataset
from tests.support.behavior_checkpoints import joint_arrays, joint_mean

pytest.importorskip("stable_baselines3")

from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from omcda_deploy.training.behavior import mujoco
from omcda_deploy.training.behavior.mujoco import (
    JointBehaviorActor,
    PolicyArrays,
    PpoConfig,
    RecordedBody,
    SquashedBody,
    play_checkpoint,
    policy_arrays,
)

BODIES = {  # raw observation, padding zeros, agents, joints per agent
    "mamujoco/hopper-3x1": (11, 0, 3, 1),
    "mamujoco/ant-2x4": (27, 84, 2, 4),
    "mamujoco/halfcheetah-6x1": (17, 0, 6, 1),
}
TASK = "mamujoco/hopper-3x1"


def team_vectors(raw: Any, zeros: int, agents: int) -> Any:
    """Return each agent's vector of a raw observation: padded, and followed by the agent's one-hot id."""
    rows = len(raw)
    padded = np.repeat(np.pad(raw, ((0, 0), (0, zeros)))[:, None], agents, axis=1)
    return np.concatenate([padded, np.broadcast_to(np.eye(agents), (rows, agents, agents))], axis=-1)


@pytest.mark.parametrize("form", ["raw", "standardized"])
@pytest.mark.parametrize("task", BODIES)
def test_every_agent_has_its_share_of_the_joint_policy(task: str, form: str) -> None:
    raw_size, zeros, agents, joints = BODIES[task]
    spec = MultiAgentMujoco(task).spec
    arrays = joint_arrays(raw_size, agents * joints)
    actor = JointBehaviorActor(PolicyArrays(**arrays), spec)
    raw = 2 * np.random.default_rng(0).standard_normal((50, raw_size))
    vectors = team_vectors(raw, zeros, agents)
    inputs = standardize(vectors) if form == "standardized" else vectors.astype(np.float32)
    observation = torch.from_numpy(inputs)
    np.testing.assert_allclose(actor.raw(observation)[:, 0].numpy(), raw, atol=1e-5)
    mean, log_std = actor(observation)
    np.testing.assert_allclose(mean.reshape(50, -1).numpy(), joint_mean(arrays, raw), atol=1e-5)
    np.testing.assert_array_equal(log_std[7].reshape(-1).numpy(), arrays["log_std"])
    for agent in range(agents):
        agent_mean, agent_log_std = actor(observation[:, agent : agent + 1], agent)
        np.testing.assert_allclose(agent_mean[:, 0].numpy(), mean[:, agent].numpy(), atol=1e-6)
        np.testing.assert_array_equal(agent_log_std[:, 0].numpy(), log_std[:, agent].numpy())


def test_the_actor_has_the_distribution_that_ppo_trained() -> None:
    """The names of a checkpoint's arrays join two halves that could agree with each other and be wrong."""
    statistics = VecNormalize(DummyVecEnv([lambda: SquashedBody("hopper-3x1")]))
    generator = np.random.default_rng(1)
    moments: Any = statistics.obs_rms
    moments.update(generator.normal(0.5, 2.0, (100, 11)))
    model = PPO("MlpPolicy", statistics, policy_kwargs={"log_std_init": -0.7}, seed=0, device="cpu")
    with torch.no_grad():
        model.policy.log_std.copy_(torch.tensor([-0.7, 0.1, 0.4]))
        for parameter in model.policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # PPO starts with zero biases and tiny means
    actor = JointBehaviorActor(policy_arrays(model, statistics), MultiAgentMujoco(TASK).spec)
    raw = generator.normal(0.5, 2.0, (50, 11))
    normalised: Any = statistics.normalize_obs(raw)
    with torch.no_grad():
        expected: Any = model.policy.get_distribution(torch.from_numpy(normalised.astype(np.float32)))
        mean, log_std = actor(torch.from_numpy(team_vectors(raw, 0, 3).astype(np.float32)))
    np.testing.assert_allclose(mean[..., 0], expected.distribution.mean, atol=1e-5)
    np.testing.assert_allclose(log_std[..., 0].exp(), expected.distribution.stddev, atol=1e-6)


def test_training_leaves_checkpoints_that_play(tmp_path: Path) -> None:
    config = PpoConfig(
        steps=64, checkpoint_every=32, num_envs=2, n_steps=16, batch_size=16, n_epochs=1, hidden=8
    )
    run = tmp_path / "run"
    mujoco.train(TASK, run, 0, config)
    assert json.loads((run / "config.json").read_text())["task"] == TASK
    lines = [json.loads(line) for line in (run / "progress.jsonl").read_text().splitlines()]
    assert [line["steps"] for line in lines] == [32, 64]
    assert all("win_rate" not in line for line in lines)
    first, last = (np.load(run / f"checkpoint-{steps:08d}.npz") for steps in (32, 64))
    assert not np.array_equal(first["w1"], last["w1"])
    played = play_checkpoint(run / "checkpoint-00000064.npz", TASK, 20, seed=0)
    assert played.observations.shape == (20, 3, 14)
    assert played.action_masks is None
    assert not np.array_equal(played.observations[0], played.observations[1])
    with pytest.raises(ConfigError, match="exists already"):
        mujoco.train(TASK, run, 0, config)
    with pytest.raises(UnknownNameError, match="did you mean 'mamujoco/hopper-3x1'"):
        mujoco.default_config("mamujoco/hoper-3x1")


def test_a_checkpoint_of_another_body(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint-00000100.npz"
    np.savez(file, **joint_arrays(17, 6))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"17 observations to 6 joints: .*hopper-3x1, which has 3 joints"):
        play_checkpoint(file, TASK, 20, seed=0)
    with pytest.raises(UnknownNameError):
        play_checkpoint(file, "mamujoco/hoper-3x1", 20, seed=0)


def test_the_training_itself_is_recorded(tmp_path: Path) -> None:
    """The file holds the episodes of the training that would have run without it, with their own rewards."""
    config = PpoConfig(
        steps=192, checkpoint_every=96, num_envs=2, n_steps=48, batch_size=32, n_epochs=1, hidden=8
    )
    runs = tmp_path / "plain", tmp_path / "recorded"
    file = tmp_path / "replay.hdf5"
    mujoco.train(TASK, runs[0], 3, config)
    mujoco.train(TASK, runs[1], 3, config, record=file)
    for steps in (96, 192):
        name = f"checkpoint-{steps:08d}.npz"
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes()
    with pytest.raises(DatasetError, match="cannot be written"):
        mujoco.train(TASK, tmp_path / "third", 3, config, record=file / "replay.hdf5")
    with pytest.raises(ConfigError, match="exists already"):
        mujoco.train(TASK, runs[0], 3, config, record=tmp_path / "other.hdf5")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "recorded", "replay.hdf5"]
    mujoco.train(TASK, tmp_path / "stopped", 3, config, until=96)
    names = [path.name for path in (tmp_path / "stopped").glob("*.npz")]
    assert names == ["checkpoint-00000096.npz"]
    assert (tmp_path / "stopped" / names[0]).read_bytes() == (runs[0] / names[0]).read_bytes()
    lines = [json.loads(line) for line in (runs[1] / "progress.jsonl").read_text().splitlines()]
    dataset = read_dataset(file)
    ended = lines[-1]["episodes"]
    assert dataset.episode_returns.size == ended > 1
    assert dataset.episode_returns.mean() == pytest.approx(lines[-1]["return_mean"], abs=1e-5)
    assert dataset.metadata["behavior"] == "replay"
    assert dataset.behaviors == ("replay/00000096", "replay/00000192")
    assert dataset.episode_behaviors is not None
    assert (dataset.episode_behaviors == 0).sum() == lines[0]["episodes"]


def test_a_recorded_episode_is_what_the_team_sees_and_does() -> None:
    """Its actions, played by the team from the same start, give the same observations, rewards and end."""
    env, body = MultiAgentMujoco(TASK), RecordedBody(SquashedBody("hopper-3x1"), MultiAgentMujoco(TASK).spec)
    generator = np.random.default_rng(0)
    info: dict[str, Any] = {}
    body.reset(seed=5)
    while "recorded" not in info:
        *_, info = body.step(generator.normal(size=3).astype(np.float32))
    episode = info["recorded"]
    observations, _ = env.reset(seed=5)
    for t in range(len(episode)):
        np.testing.assert_allclose(np.stack(list(observations.values())), episode.observations[t], atol=1e-6)
        actions = dict(zip(env.spec.names, episode.actions[t], strict=True))
        observations, rewards, terminated, _, _ = env.step(actions)
        assert rewards["agent_0"] == pytest.approx(episode.rewards[t])
        assert terminated["agent_0"] == (t == len(episode) - 1)
    np.testing.assert_allclose(np.stack(list(observations.values())), episode.observations[-1], atol=1e-6)
    np.testing.assert_array_equal(episode.states, episode.observations.reshape(len(episode) + 1, -1))
    assert not episode.timeout
