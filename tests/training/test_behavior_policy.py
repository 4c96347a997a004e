"""Joint behaviour policies as per-agent graphs, against the same network in numpy on the raw observation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from omcda_deploy.envs.mamujoco import MultiAgentMujoco, standardize
from omcda_deploy.errors import ConfigError, UnknownNameError
from omcda_deploy.export.behavior_policy import JointBehaviorActor, export_behavior_policy, read_checkpoint
from omcda_deploy.local import JointTeam, LocalTeam
from omcda_deploy.policy import NoiseSource

BODIES = {  # raw observation, padding zeros, agents, joints per agent
    "mamujoco/hopper-3x1": (11, 0, 3, 1),
    "mamujoco/ant-2x4": (27, 84, 2, 4),
    "mamujoco/halfcheetah-6x1": (17, 0, 6, 1),
}


def checkpoint(raw: int, joints: int, hidden: int = 8) -> dict[str, Any]:
    generator = np.random.default_rng(3)

    def weight(*shape: int) -> Any:
        return (generator.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    return {
        "w1": weight(hidden, raw),
        "b1": weight(hidden),
        "w2": weight(hidden, hidden),
        "b2": weight(hidden),
        "w_mean": weight(joints, hidden),
        "b_mean": weight(joints),
        "log_std": np.linspace(-6.0, 2.5, joints).astype(
            np.float32
        ),  # outside the learners' range on purpose
        "observation_mean": generator.standard_normal(raw),
        "observation_var": generator.uniform(0.1, 4.0, raw),
        "observation_clip": np.asarray(1.5),
    }


def joint_mean(arrays: dict[str, Any], raw: NDArray[np.float64]) -> NDArray[np.float64]:
    x = (raw - arrays["observation_mean"]) / np.sqrt(arrays["observation_var"])
    clip = float(arrays["observation_clip"])
    assert (np.abs(x) > clip).any()
    x = np.clip(x, -clip, clip)
    hidden = np.tanh(np.tanh(x @ arrays["w1"].T + arrays["b1"]) @ arrays["w2"].T + arrays["b2"])
    mean: NDArray[np.float64] = hidden @ arrays["w_mean"].T + arrays["b_mean"]
    return mean


@pytest.mark.parametrize("form", ["raw", "standardized"])
@pytest.mark.parametrize("task", BODIES)
def test_every_agent_has_its_share_of_the_joint_policy(task: str, form: str) -> None:
    raw_size, zeros, agents, joints = BODIES[task]
    spec = MultiAgentMujoco(task).spec
    arrays = checkpoint(raw_size, agents * joints)
    actor = JointBehaviorActor(arrays, spec)
    raw = 2 * np.random.default_rng(0).standard_normal((50, raw_size))
    vectors = np.concatenate(
        [
            np.repeat(np.pad(raw, ((0, 0), (0, zeros)))[:, None], agents, axis=1),
            np.broadcast_to(np.eye(agents), (50, agents, agents)),
        ],
        axis=-1,
    )
    seen = standardize(vectors) if form == "standardized" else vectors.astype(np.float32)
    observation = torch.from_numpy(seen)
    np.testing.assert_allclose(actor.raw(observation)[:, 0].numpy(), raw, atol=1e-5)
    mean, log_std = actor(observation)
    np.testing.assert_allclose(mean.reshape(50, -1).numpy(), joint_mean(arrays, raw), atol=1e-5)
    np.testing.assert_array_equal(log_std[7].reshape(-1).numpy(), arrays["log_std"])
    for agent in range(agents):
        own_mean, own_log_std = actor(observation[:, agent : agent + 1], agent)
        np.testing.assert_allclose(own_mean[:, 0].numpy(), mean[:, agent].numpy(), atol=1e-6)
        np.testing.assert_array_equal(own_log_std[:, 0].numpy(), log_std[:, agent].numpy())


@pytest.mark.parametrize("task", ["mamujoco/ant-2x4", "mamujoco/halfcheetah-6x1"])
def test_the_bundle_acts_as_the_joint_policy_does(tmp_path: Path, task: str) -> None:
    raw_size, _, agents, joints = BODIES[task]
    arrays = checkpoint(raw_size, agents * joints)
    file = tmp_path / "checkpoint-00000100.npz"
    np.savez(file, **arrays)
    bundle = export_behavior_policy(
        file, task, tmp_path / "bundle", tier="medium", provenance={"return_mean": 1.5}
    )
    assert bundle.manifest["training"].items() >= {"tier": "medium", "return_mean": 1.5}.items()
    assert bundle.manifest["training"]["checkpoint"] == file.name
    env = MultiAgentMujoco(task)
    noise = NoiseSource(bundle.spec, seed=1)
    teams = LocalTeam(bundle), JointTeam(bundle)
    observations, _ = env.reset(seed=4)
    for _ in range(20):
        body: Any = env._joint._env
        raw = body.unwrapped._get_obs()
        drawn = noise.draw(1)
        u = joint_mean(arrays, raw) + np.exp(arrays["log_std"]) * np.concatenate(list(drawn.values()), 1)[0]
        for team in teams:
            decisions = team.act({name: rows[None] for name, rows in observations.items()}, noise=drawn)
            action = np.concatenate([decisions[name].action[0] for name in bundle.spec.names])
            np.testing.assert_allclose(action, np.tanh(u), atol=2e-5)
            assert all(decision.divergence == 0 for decision in decisions.values())
        observations, *_ = env.step({name: decisions[name].action[0] for name in bundle.spec.names})


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_checkpoint(tmp_path / "nothing.npz")
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(ConfigError, match="is not a behaviour policy's checkpoint"):
        read_checkpoint(tmp_path / "text.npz")
    np.savez(tmp_path / "other.npz", w1=np.zeros(3))
    with pytest.raises(ConfigError, match="is not a behaviour policy's checkpoint"):
        read_checkpoint(tmp_path / "other.npz")


def test_a_checkpoint_of_another_body(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint-00000100.npz"
    np.savez(file, **checkpoint(17, 6))
    with pytest.raises(ConfigError, match=r"17 observations to 6 joints: .*hopper-3x1, which has 3 joints"):
        export_behavior_policy(file, "mamujoco/hopper-3x1", tmp_path / "b", tier="medium")
    with pytest.raises(UnknownNameError):
        export_behavior_policy(file, "mamujoco/hoper-3x1", tmp_path / "b", tier="medium")
    assert list(tmp_path.iterdir()) == [file]
