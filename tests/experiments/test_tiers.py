"""Tiers: the bundles of checkpoints act as numpy says, and the right checkpoints become the right tiers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from omcda_deploy.bundle import read_bundle
from omcda_deploy.cli import app
from omcda_deploy.envs import smax
from omcda_deploy.envs.mamujoco import MultiAgentMujoco
from omcda_deploy.envs.smax import SmaxVector
from omcda_deploy.errors import ConfigError, UnknownNameError
from omcda_deploy.experiments import tiers
from omcda_deploy.experiments.tiers import (
    Returns,
    choose_tiers,
    export_checkpoint,
    measure_run,
    ship_run,
    train_policies,
    write_index,
)
from omcda_deploy.export import parity
from omcda_deploy.local import JointTeam, LocalTeam
from omcda_deploy.play.shipped import POLICIES
from omcda_deploy.policy import NoiseSource
from tests.support.behavior_checkpoints import (
    Arrays,
    joint_arrays,
    joint_mean,
    shared_arrays,
    shared_probabilities,
)

pytest.importorskip("jaxmarl")
pytest.importorskip("sb3_contrib")

HOPPER = "mamujoco/hopper-3x1"
BATTLE = "smax/5m_vs_6m"


def make_run(run: Path, task: str, checkpoints: dict[int, Arrays]) -> Path:
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"task": task, "seed": 7}))
    for steps, arrays in checkpoints.items():
        np.savez(run / f"checkpoint-{steps:08d}.npz", **arrays)  # type: ignore[arg-type]
    return run


def set_episodes(monkeypatch: pytest.MonkeyPatch, simulator: str, episodes: int) -> None:
    settings = dataclasses.replace(tiers.SIMULATORS[simulator], episodes=episodes)
    monkeypatch.setitem(tiers.SIMULATORS, simulator, settings)


@pytest.mark.parametrize(
    ("task", "raw_size", "joints"), [("mamujoco/ant-2x4", 27, 8), ("mamujoco/halfcheetah-6x1", 17, 6)]
)
def test_a_mujoco_bundle_acts_as_the_joint_policy_does(
    tmp_path: Path, task: str, raw_size: int, joints: int
) -> None:
    arrays = joint_arrays(raw_size, joints)
    run = make_run(tmp_path / "run", task, {100: arrays})
    file = run / "checkpoint-00000100.npz"
    bundle = export_checkpoint(
        file, task, tmp_path / "bundle", tier="medium", provenance={"return_mean": 1.5}
    )
    assert bundle.manifest["training"].items() >= {"tier": "medium", "return_mean": 1.5}.items()
    assert bundle.manifest["training"]["checkpoint"] == file.name
    env = MultiAgentMujoco(task)
    noise_source = NoiseSource(bundle.spec, seed=1)
    teams = LocalTeam(bundle), JointTeam(bundle)
    observations, _ = env.reset(seed=4)
    for _ in range(20):
        body: Any = env._joint._env
        raw = body.unwrapped._get_obs()
        noise = noise_source.draw(1)
        u = joint_mean(arrays, raw) + np.exp(arrays["log_std"]) * np.concatenate(list(noise.values()), 1)[0]
        for team in teams:
            decisions = team.act({name: rows[None] for name, rows in observations.items()}, noise=noise)
            action = np.concatenate([decisions[name].action[0] for name in bundle.spec.names])
            np.testing.assert_allclose(action, np.tanh(u), atol=2e-5)
            assert all(decision.divergence == 0 for decision in decisions.values())
        observations, *_ = env.step({name: decisions[name].action[0] for name in bundle.spec.names})


def test_a_smax_bundle_acts_as_the_shared_policy_does(tmp_path: Path) -> None:
    spec = smax.SPECS[BATTLE]
    arrays = shared_arrays(width=145, actions=11)
    file = make_run(tmp_path / "run", BATTLE, {100: arrays}) / "checkpoint-00000100.npz"
    bundle = export_checkpoint(file, BATTLE, tmp_path / "bundle", tier="poor", provenance={"won": 0.5})
    assert bundle.spec.contract_hash == spec.contract_hash
    assert bundle.manifest["training"].items() >= {"tier": "poor", "won": 0.5}.items()
    noise_source = NoiseSource(spec, seed=1)
    teams = LocalTeam(bundle), JointTeam(bundle)
    with SmaxVector(BATTLE, 3) as battles:
        step = battles.reset({0: 1, 1: 2, 2: 3})
        for _ in range(10):
            assert step.action_masks is not None
            observations = np.stack(list(step.observations.values()), axis=1)
            masks = np.stack(list(step.action_masks.values()), axis=1)
            expected = shared_probabilities(arrays, observations, masks)
            noise = noise_source.draw(3)
            with np.errstate(divide="ignore"):
                actions = (np.log(expected) + np.stack(list(noise.values()), axis=1)).argmax(-1)
            for team in teams:
                decisions = team.act(step.observations, noise=noise, action_masks=step.action_masks)
                for i, name in enumerate(spec.names):
                    logits = decisions[name].parameters["logits"]
                    np.testing.assert_allclose(np.exp(logits), expected[:, i], atol=1e-5)
                    np.testing.assert_array_equal(decisions[name].action, actions[:, i])
                    assert not decisions[name].divergence.any()
            step = battles.step({name: actions[:, i] for i, name in enumerate(spec.names)})
            assert not (step.terminated | step.truncated).any()


def test_a_checkpoint_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    file = make_run(tmp_path / "run", HOPPER, {100: joint_arrays(17, 6)}) / "checkpoint-00000100.npz"
    with pytest.raises(ConfigError, match=r"17 observations to 6 joints: .*hopper-3x1, which has 3 joints"):
        export_checkpoint(file, HOPPER, tmp_path / "bundle", tier="medium")
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]


def test_tasks_without_behavior_policies(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"'toy': known are mamujoco, smax"):
        train_policies("toy/chain", tmp_path / "run", seed=0)
    with pytest.raises(UnknownNameError, match="did you mean 'smax/5m_vs_6m'"):
        train_policies("smax/5m_vs_5m", tmp_path / "run", seed=0)
    assert not list(tmp_path.iterdir())


def test_the_steps_of_a_training_can_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from omcda_deploy.training.behavior import mujoco

    calls: list[tuple[str, int, int]] = []
    monkeypatch.setattr(
        mujoco, "train", lambda task, out, seed, config: calls.append((task, seed, config.steps))
    )
    train_policies(HOPPER, tmp_path, seed=3)
    train_policies(HOPPER, tmp_path, seed=4, steps=500)
    assert calls == [(HOPPER, 3, 3_000_000), (HOPPER, 4, 500)]


def test_tiers_are_the_checkpoints_nearest_to_the_published_returns(tmp_path: Path) -> None:
    """723.57 is nearest to 720 and 2452.02 to 2400; medium-replay is every other of the 16 up to medium."""
    returns = {10 * k: 45.0 * k for k in range(1, 17)} | {170: 2900.0, 180: 2400.0}
    run = make_run(tmp_path / "run", HOPPER, {steps: {"w1": np.zeros(1)} for steps in returns})
    lines = [json.dumps({"steps": steps, "return_mean": mean}) for steps, mean in returns.items()]
    (run / "returns.jsonl").write_text("\n".join(lines) + "\n")
    medium, expert, *replay = choose_tiers(run, HOPPER)
    assert (medium.name, medium.folder, medium.steps) == ("medium", f"{HOPPER}/medium", 160)
    assert (expert.name, expert.steps, expert.published) == ("expert", 180, 2452.02)
    assert [tier.steps for tier in replay] == list(range(20, 170, 20))
    assert [tier.folder for tier in replay] == [f"{HOPPER}/medium-replay/0{i}" for i in range(8)]
    assert replay[-1].checkpoint == medium.checkpoint == run / "checkpoint-00000160.npz"


def test_a_run_is_measured_and_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_episodes(monkeypatch, "mamujoco", 3)
    monkeypatch.setattr(parity, "PARITY_ROWS", 50)
    checkpoints = {steps: joint_arrays(11, 3) for steps in (100, 200, 300)}
    checkpoints[200]["b_mean"] = checkpoints[200]["b_mean"] + 1.0
    run, out = make_run(tmp_path / "run", HOPPER, checkpoints), tmp_path / "policies"
    with pytest.raises(ConfigError, match="has not been measured"):
        next(ship_run(run, out))
    measured = dict(measure_run(run, 100, 200, workers=0))
    lines = [json.loads(line) for line in (run / "returns.jsonl").read_text().splitlines()]
    assert lines == [{"steps": steps, **returns.to_json()} for steps, returns in measured.items()]
    assert list(measured) == [100, 200]
    assert measured[100] != measured[200]
    best = max(measured, key=lambda steps: measured[steps].return_mean)
    shipped = list(ship_run(run, out, workers=0))
    assert [tier.folder.removeprefix(f"{HOPPER}/") for tier, _ in shipped] == [
        "medium",
        "expert",
        *(f"medium-replay/0{i}" for i in range(best // 100)),
    ]
    for tier, returns in shipped:
        training = read_bundle(out / tier.folder).manifest["training"]
        assert returns == measured[tier.steps]
        assert training["returns"] == returns.to_json()
        assert (training["ppo_steps"], training["ppo"]["seed"]) == (tier.steps, 7)
    rows = [line for line in (out / "README.md").read_text().splitlines() if line.startswith("| `")]
    assert len(rows) == len(shipped)
    assert f"± {measured[best].return_std:.0f} |  | 724 |" in next(row for row in rows if "/medium`" in row)


def test_a_checkpoint_is_shipped_as_a_tier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_episodes(monkeypatch, "smax", 16)
    run = make_run(tmp_path / "run", BATTLE, {100: shared_arrays(width=145, actions=11)})
    out = tmp_path / "policies"

    def ship(*options: str) -> str:
        result = CliRunner().invoke(app, ["behavior", "ship", str(run), "--out", str(out), *options])
        return f"{result.exit_code} {result.output} {result.exception or ''}"

    for options, words in (
        (("--tier", "poor=99"), "known are 100"),
        (("--tier", "poor"), "expected TIER=STEPS"),
        (("--tier", "poor=many"), "expected TIER=STEPS"),
        ((), "has no published returns"),
    ):
        answer = " ".join(ship(*options).split())
        assert answer[0] != "0"
        assert words in answer
    assert not out.exists()
    assert ship("--tier", "poor=100").startswith(f"0 {BATTLE}/poor: 100 steps, return 0.")
    training = read_bundle(out / BATTLE / "poor").manifest["training"]
    assert training["ppo"]["seed"] == 7
    assert training["returns"]["episodes"] == 16
    assert 0.0 < training["returns"]["return_mean"] < 1.0
    row = next(line for line in (out / "README.md").read_text().splitlines() if f"`{BATTLE}/poor`" in line)
    assert f"{training['returns']['win_rate']:.1%}" in row


@pytest.mark.parametrize("command", ["measure", "ship"])
def test_a_folder_that_is_no_run(tmp_path: Path, command: str) -> None:
    result = CliRunner().invoke(app, ["behavior", command, str(tmp_path)])
    assert result.exit_code != 0
    assert "expected a folder of  omcda-deploy behavior train" in str(result.exception)


def test_returns_as_text() -> None:
    assert str(Returns(20, 38.45, 11.406)) == "return 38.45 ± 11.406"
    assert str(Returns(200, 0.19, 0.062, 0.005)) == "return 0.19 ± 0.062, 0.5% won"
    assert Returns(20, 1.0, 0.0).to_json() == {"episodes": 20, "return_mean": 1.0, "return_std": 0.0}


def test_the_index_of_the_shipped_policies_is_what_their_manifests_say(tmp_path: Path) -> None:
    for manifest in POLICIES.rglob("bundle.json"):
        copy = tmp_path / manifest.relative_to(POLICIES)
        copy.parent.mkdir(parents=True)
        shutil.copy(manifest, copy)
    write_index(tmp_path)
    assert (tmp_path / "README.md").read_text() == (POLICIES / "README.md").read_text()
