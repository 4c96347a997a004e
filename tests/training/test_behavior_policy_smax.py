"""SMAX's behaviour policies: what PPO is shown, a training that leaves checkpoints, and their bundles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from omcda_deploy.bundle import read_bundle
from omcda_deploy.cli import app
from omcda_deploy.envs import smax
from omcda_deploy.envs.smax import SmaxVector
from omcda_deploy.errors import ConfigError, UnknownNameError
from omcda_deploy.export.behavior_policy_smax import export_behavior_policy
from omcda_deploy.local import JointTeam, LocalTeam
from omcda_deploy.policy import NoiseSource

pytest.importorskip("jaxmarl")
pytest.importorskip("sb3_contrib")

from omcda_deploy.training.behavior import smax as behavior_policies_smax
from omcda_deploy.training.behavior.smax import AgentRows, MaskablePpoConfig

TASK = "smax/5m_vs_6m"
SPEC = smax.SPECS[TASK]
AGENTS, WIDTH, ACTIONS = 5, 140, 11


def checkpoint(width: int = WIDTH + AGENTS, actions: int = ACTIONS, hidden: int = 8) -> dict[str, Any]:
    generator = np.random.default_rng(3)
    sizes = (width, hidden, hidden, actions)
    arrays = {}
    for layer in (1, 2, 3):
        shape = sizes[layer], sizes[layer - 1]
        arrays[f"w{layer}"] = (2 * generator.standard_normal(shape) / np.sqrt(shape[1])).astype(np.float32)
        arrays[f"b{layer}"] = generator.standard_normal(shape[0]).astype(np.float32)
    return arrays


def probabilities(
    arrays: dict[str, Any], observations: NDArray[Any], masks: NDArray[Any]
) -> NDArray[np.float64]:
    """[B, N, O], [B, N, A] -> [B, N, A], by concatenation of the id and a softmax over what is available."""
    identity = np.broadcast_to(np.eye(AGENTS), (len(observations), AGENTS, AGENTS))
    x = np.concatenate([observations, identity], axis=-1).astype(np.float64)
    for layer in (1, 2):
        x = np.maximum(x @ arrays[f"w{layer}"].T + arrays[f"b{layer}"], 0.0)
    weights = np.exp(x @ arrays["w3"].T + arrays["b3"]) * masks
    normalised: NDArray[np.float64] = weights / weights.sum(-1, keepdims=True)
    return normalised


def test_the_bundle_acts_as_the_shared_policy_does(tmp_path: Path) -> None:
    arrays = checkpoint()
    file = tmp_path / "checkpoint-00000100.npz"
    np.savez(file, **arrays)
    bundle = export_behavior_policy(file, TASK, tmp_path / "bundle", tier="poor", provenance={"won": 0.5})
    assert bundle.spec.contract_hash == SPEC.contract_hash
    assert bundle.manifest["training"].items() >= {"tier": "poor", "won": 0.5}.items()
    noise = NoiseSource(SPEC, seed=1)
    teams = LocalTeam(bundle), JointTeam(bundle)
    with SmaxVector(TASK, 3) as battles:
        shown = battles.reset({0: 1, 1: 2, 2: 3})
        for _ in range(10):
            assert shown.action_masks is not None
            observations = np.stack(list(shown.observations.values()), axis=1)
            masks = np.stack(list(shown.action_masks.values()), axis=1)
            expected = probabilities(arrays, observations, masks)
            drawn = noise.draw(3)
            with np.errstate(divide="ignore"):
                chosen = (np.log(expected) + np.stack(list(drawn.values()), axis=1)).argmax(-1)
            for team in teams:
                decisions = team.act(shown.observations, noise=drawn, action_masks=shown.action_masks)
                for i, name in enumerate(SPEC.names):
                    logits = decisions[name].parameters["logits"]
                    np.testing.assert_allclose(np.exp(logits), expected[:, i], atol=1e-5)
                    np.testing.assert_array_equal(decisions[name].action, chosen[:, i])
                    assert not decisions[name].divergence.any()
            shown = battles.step({name: chosen[:, i] for i, name in enumerate(SPEC.names)})
            assert not (shown.terminated | shown.truncated).any()


def test_a_checkpoint_of_another_map(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint-00000100.npz"
    np.savez(file, **checkpoint(width=185, actions=13))
    with pytest.raises(
        ConfigError, match=r"185 inputs to 13 actions: .*5m_vs_6m, which has 145 .*11 actions"
    ):
        export_behavior_policy(file, TASK, tmp_path / "b", tier="poor")
    np.savez(file, w1=np.zeros(3))
    with pytest.raises(ConfigError, match=r"expected a \.npz with w1, b1, w2, b2, w3, b3"):
        export_behavior_policy(file, TASK, tmp_path / "b", tier="poor")


def test_ppo_is_shown_what_the_battles_show() -> None:
    """The same battles beside it, stepped by hand; an end resets and keeps the observation that it ended with."""
    count = 4
    rows, battles = AgentRows(TASK, count, seed=5), SmaxVector(TASK, count)
    seeds = np.random.default_rng(5)
    shown = battles.reset({battle: int(seeds.integers(2**32)) for battle in range(count)})
    seen = rows.reset().reshape(count, AGENTS, -1)
    returns, ends = np.zeros(count), 0
    for t in range(60):
        assert shown.action_masks is not None
        observations = np.stack(list(shown.observations.values()), axis=1)
        masks = np.stack(list(shown.action_masks.values()), axis=1)
        np.testing.assert_array_equal(seen[..., :WIDTH], observations)
        np.testing.assert_array_equal(
            seen[..., WIDTH : WIDTH + AGENTS], [np.eye(AGENTS, dtype=np.float32)] * count
        )
        critics = seen[..., WIDTH + AGENTS :]
        assert np.abs(critics).max() <= 1.0
        np.testing.assert_array_equal(critics, np.repeat(critics[:, :1], AGENTS, axis=1))
        np.testing.assert_array_equal(np.sign(critics[:, 0]), np.sign(shown.state))
        np.testing.assert_allclose(32 * critics[:, 0, 1:110:10], shown.state[:, 1:110:10], rtol=1e-6)  # all x
        np.testing.assert_array_equal(np.stack(rows.env_method("action_masks")), masks.reshape(-1, ACTIONS))
        scores = np.where(masks, np.random.default_rng(t).random(masks.shape) + np.arange(ACTIONS), -1.0)
        actions = scores.argmax(-1)
        shown = battles.step({name: actions[:, i] for i, name in enumerate(SPEC.names)})
        stepped: Any = rows.step(actions.reshape(-1))
        seen_flat, rewards, dones, infos = stepped
        returns += shown.reward
        np.testing.assert_array_equal(rewards, np.repeat(shown.reward, AGENTS).astype(np.float32))
        ended = shown.terminated | shown.truncated
        np.testing.assert_array_equal(dones, np.repeat(ended, AGENTS))
        for battle in np.flatnonzero(ended):
            ends += 1
            first = infos[battle * AGENTS]
            assert first["episode"]["r"] == pytest.approx(returns[battle])
            assert first["is_success"] == shown.info["won"][battle]
            for agent, name in enumerate(SPEC.names):
                info = infos[battle * AGENTS + agent]
                np.testing.assert_array_equal(
                    info["terminal_observation"][:WIDTH], shown.observations[name][battle]
                )
                assert info["TimeLimit.truncated"] == shown.truncated[battle]
        assert [bool(info) for info in infos] == dones.tolist()
        if ended.any():
            fresh = {int(battle): int(seeds.integers(2**32)) for battle in np.flatnonzero(ended)}
            shown, returns[ended] = battles.reset(fresh), 0.0
        seen = seen_flat.reshape(count, AGENTS, -1)
    assert ends >= count
    rows.close()


def test_training_leaves_checkpoints_that_become_bundles(tmp_path: Path) -> None:
    config = MaskablePpoConfig(
        steps=256, checkpoint_every=128, num_envs=8, n_steps=16, batch_size=320, n_epochs=1, hidden=16
    )
    run = tmp_path / "run"
    behavior_policies_smax.train(TASK, run, 0, config)
    assert json.loads((run / "config.json").read_text())["task"] == TASK
    lines = [json.loads(line) for line in (run / "progress.jsonl").read_text().splitlines()]
    assert [line["steps"] for line in lines] == [128, 256]
    assert lines[-1]["episodes"] > 0
    assert lines[-1]["win_rate"] == 0.0
    assert 0.0 < lines[-1]["return_mean"] < 1.0
    first, last = (np.load(run / f"checkpoint-{steps:08d}.npz") for steps in (128, 256))
    assert last["w1"].shape == (16, WIDTH + AGENTS)
    assert not np.array_equal(first["w1"], last["w1"])
    bundle = export_behavior_policy(run / "checkpoint-00000256.npz", TASK, tmp_path / "b", tier="poor")
    assert bundle.manifest["parity"]
    with pytest.raises(ConfigError, match="exists already"):
        behavior_policies_smax.train(TASK, run, 0, config)
    with pytest.raises(UnknownNameError, match="did you mean 'smax/5m_vs_6m'"):
        behavior_policies_smax.default_config("smax/5m_vs_5m")


def test_a_checkpoint_is_shipped_as_a_tier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omcda_deploy.commands.behavior.BATTLES", 16)
    run, out = tmp_path / "run", tmp_path / "policies"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"task": TASK, "seed": 7}))
    np.savez(run / "checkpoint-00000100.npz", **checkpoint())

    def ship(*options: str) -> str:
        result = CliRunner().invoke(app, ["behavior", "ship", str(run), "--out", str(out), *options])
        return f"{result.exit_code} {result.output} {result.exception or ''}"

    for options, words in (
        (("--tier", "poor=99"), "known are 100"),
        (("--tier", "poor"), "expected TIER=STEPS"),
        ((), "has no published returns"),
    ):
        said = " ".join(ship(*options).split())
        assert said[0] != "0"
        assert words in said
    assert not out.exists()
    assert ship("--tier", "poor=100").startswith("0 ")
    training = read_bundle(out / TASK / "poor").manifest["training"]
    assert training["ppo"]["seed"] == 7
    assert training["returns"]["episodes"] == 16
    assert 0.0 < training["returns"]["return_mean"] < 1.0
    row = next(line for line in (out / "README.md").read_text().splitlines() if f"`{TASK}/poor`" in line)
    assert f"{training['returns']['win_rate']:.1%}" in row
