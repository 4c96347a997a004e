"""SMAX's behaviour policies: the rows that PPO sees, the actor against SB3, a training that leaves checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omcda_deploy.envs import smax
from omcda_deploy.envs.smax import SmaxVector
from omcda_deploy.errors import ConfigError, UnknownNameError
from omcda_deploy.registry import read_dataset
from tests.support.behavior_checkpoints import shared_arrays

pytest.importorskip("jaxmarl")
pytest.importorskip("sb3_contrib")

from omcda_deploy.training.behavior import smax as behavior
from omcda_deploy.training.behavior.smax import (
    AgentRows,
    MaskablePpoConfig,
    SharedBehaviorActor,
    play_checkpoint,
    policy_arrays,
)

TASK = "smax/5m_vs_6m"
SPEC = smax.SPECS[TASK]
AGENTS, WIDTH, ACTIONS = 5, 140, 11


def test_ppo_sees_what_the_battles_show() -> None:
    """Step the same battles by hand beside it; an end resets and keeps the observation that it ended with.

    The recorded episode is all that was seen by hand.
    """
    count = 4
    rows, battles = AgentRows(TASK, count, seed=5, record=True), SmaxVector(TASK, count)
    seen: list[list[tuple[Any, ...]]] = [[] for _ in range(count)]
    seeds = np.random.default_rng(5)
    step = battles.reset({battle: int(seeds.integers(2**32)) for battle in range(count)})
    inputs = rows.reset().reshape(count, AGENTS, -1)
    returns, ends = np.zeros(count), 0
    for t in range(60):
        assert step.action_masks is not None
        observations = np.stack(list(step.observations.values()), axis=1)
        masks = np.stack(list(step.action_masks.values()), axis=1)
        np.testing.assert_array_equal(inputs[..., :WIDTH], observations)
        np.testing.assert_array_equal(
            inputs[..., WIDTH : WIDTH + AGENTS], [np.eye(AGENTS, dtype=np.float32)] * count
        )
        critics = inputs[..., WIDTH + AGENTS :]
        assert np.abs(critics).max() <= 1.0
        np.testing.assert_array_equal(critics, np.repeat(critics[:, :1], AGENTS, axis=1))
        np.testing.assert_array_equal(np.sign(critics[:, 0]), np.sign(step.state))
        np.testing.assert_allclose(32 * critics[:, 0, 1:110:10], step.state[:, 1:110:10], rtol=1e-6)  # all x
        np.testing.assert_array_equal(np.stack(rows.env_method("action_masks")), masks.reshape(-1, ACTIONS))
        scores = np.where(masks, np.random.default_rng(t).random(masks.shape) + np.arange(ACTIONS), -1.0)
        actions = scores.argmax(-1)
        for battle in range(count):
            seen[battle].append(
                (observations[battle], step.state[battle].copy(), masks[battle], actions[battle])
            )
        step = battles.step({name: actions[:, i] for i, name in enumerate(SPEC.names)})
        outcome: Any = rows.step(actions.reshape(-1))
        flat_rows, rewards, dones, infos = outcome
        returns += step.reward
        np.testing.assert_array_equal(rewards, np.repeat(step.reward, AGENTS).astype(np.float32))
        ended = step.terminated | step.truncated
        np.testing.assert_array_equal(dones, np.repeat(ended, AGENTS))
        for battle in np.flatnonzero(ended).tolist():
            ends += 1
            first = infos[battle * AGENTS]
            assert first["episode"]["r"] == pytest.approx(returns[battle])
            assert first["is_success"] == step.info["won"][battle]
            for agent, name in enumerate(SPEC.names):
                info = infos[battle * AGENTS + agent]
                np.testing.assert_array_equal(
                    info["terminal_observation"][:WIDTH], step.observations[name][battle]
                )
                assert info["TimeLimit.truncated"] == step.truncated[battle]
            episode, parts = first["recorded"], [np.stack(part) for part in zip(*seen[battle], strict=True)]
            kept = episode.observations[:-1], episode.states[:-1], episode.action_masks[:-1], episode.actions
            for values, expected in zip(kept, parts, strict=True):
                np.testing.assert_array_equal(values, expected)
            np.testing.assert_array_equal(episode.states[-1], step.state[battle])
            assert episode.undiscounted_return == pytest.approx(returns[battle])
            seen[battle].clear()
        assert [bool(info) for info in infos] == dones.tolist()
        if ended.any():
            fresh = {int(battle): int(seeds.integers(2**32)) for battle in np.flatnonzero(ended)}
            step, returns[ended] = battles.reset(fresh), 0.0
        inputs = flat_rows.reshape(count, AGENTS, -1)
    assert ends >= count
    rows.close()


def test_the_actor_has_the_distribution_that_ppo_trained() -> None:
    """The names of a checkpoint's arrays join two halves that could agree with each other and be wrong."""
    rows = AgentRows(TASK, 2, seed=5)
    model = behavior.new_model(
        rows, MaskablePpoConfig(num_envs=2, n_steps=16, batch_size=32, hidden=8), seed=0
    )
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))  # PPO starts with zero biases and tiny logits
    inputs, masks = rows.reset(), rows.action_masks()
    assert not masks.all()
    actor = SharedBehaviorActor(policy_arrays(model), SPEC)
    observation = torch.from_numpy(inputs[:, :WIDTH]).reshape(2, AGENTS, WIDTH)
    with torch.no_grad():
        expected: Any = model.policy.get_distribution(torch.from_numpy(inputs), action_masks=masks)
        log_probs = actor(observation, torch.from_numpy(masks).reshape(2, AGENTS, ACTIONS))
    np.testing.assert_allclose(log_probs.exp().reshape(-1, ACTIONS), expected.distribution.probs, atol=1e-6)
    rows.close()


def test_training_leaves_checkpoints_that_play(tmp_path: Path) -> None:
    config = MaskablePpoConfig(
        steps=256, checkpoint_every=128, num_envs=8, n_steps=16, batch_size=320, n_epochs=1, hidden=16
    )
    run, file = tmp_path / "run", tmp_path / "replay.hdf5"
    behavior.train(TASK, run, 0, config, record=file)
    assert json.loads((run / "config.json").read_text())["task"] == TASK
    lines = [json.loads(line) for line in (run / "progress.jsonl").read_text().splitlines()]
    assert [line["steps"] for line in lines] == [128, 256]
    assert lines[-1]["episodes"] > 0
    assert lines[-1]["win_rate"] == 0.0
    assert 0.0 < lines[-1]["return_mean"] < 1.0
    dataset = read_dataset(file)
    assert dataset.episode_returns.size == lines[-1]["episodes"]
    assert dataset.episode_returns.mean() == pytest.approx(lines[-1]["return_mean"], abs=1e-6)
    assert set(dataset.behaviors) <= {"replay/00000128", "replay/00000256"}
    first, last = (np.load(run / f"checkpoint-{steps:08d}.npz") for steps in (128, 256))
    assert last["w1"].shape == (16, WIDTH + AGENTS)
    assert not np.array_equal(first["w1"], last["w1"])
    played = play_checkpoint(run / "checkpoint-00000256.npz", TASK, 20, seed=0)
    assert played.observations.shape == (32, AGENTS, WIDTH)
    assert played.action_masks is not None
    assert played.action_masks.shape == (32, AGENTS, ACTIONS)
    with pytest.raises(ConfigError, match="exists already"):
        behavior.train(TASK, run, 0, config)
    with pytest.raises(UnknownNameError, match="did you mean 'smax/5m_vs_6m'"):
        behavior.default_config("smax/5m_vs_5m")


def test_a_checkpoint_of_another_map(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint-00000100.npz"
    np.savez(file, **shared_arrays(width=185, actions=13))  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"185 inputs to 13 actions: .*5m_vs_6m, which has 145 .*11 actions"
    ):
        play_checkpoint(file, TASK, 20, seed=0)
    np.savez(file, w1=np.zeros(3))
    with pytest.raises(ConfigError, match=r"expected a \.npz with w1, b1, w2, b2, w3, b3"):
        play_checkpoint(file, TASK, 20, seed=0)
