"""Tiers: the bundles of checkpoints act as numpy says, and the right checkpoints become the right tiers."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
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
from omcda_deploy.experiments import behavior_returns
from omcda_deploy.experiments.behavior_returns import SIMULATORS, Moments, PolicyReturns, Returns, mixture
from omcda_deploy.experiments.tier_index import write_index
from omcda_deploy.experiments.tiers import (
    choose_tiers,
    export_checkpoint,
    measure_run,
    measure_shipped,
    replayed,
    ship_run,
    train_policies,
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
    settings = dataclasses.replace(behavior_returns.SIMULATORS[simulator], episodes=episodes)
    monkeypatch.setitem(behavior_returns.SIMULATORS, simulator, settings)


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
    with pytest.raises(UnknownNameError, match=r"'toy': known are mamujoco, mamujoco-khop1, smax"):
        train_policies("toy/chain", tmp_path / "run", seed=0)
    with pytest.raises(UnknownNameError, match="did you mean 'smax/5m_vs_6m'"):
        train_policies("smax/5m_vs_5m", tmp_path / "run", seed=0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("simulator", SIMULATORS)
def test_every_simulator_trains_as_the_protocol_says(simulator: str) -> None:
    from omcda_deploy.training.behavior.checkpoint import BehaviorModule

    module = importlib.import_module(SIMULATORS[simulator].module)
    expected = list(inspect.signature(BehaviorModule.train).parameters)[1:]
    assert list(inspect.signature(module.train).parameters) == expected


def test_the_steps_of_a_training_can_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from omcda_deploy.training.behavior import mujoco

    calls: list[tuple[str, int, int, int | None]] = []

    def train(
        task: str,
        out: Path,
        seed: int,
        config: mujoco.PpoConfig,
        record: Path | None,
        until: int | None,
        _: object,
    ) -> None:
        calls.append((task, seed, config.steps, until))

    monkeypatch.setattr(mujoco, "train", train)
    train_policies(HOPPER, tmp_path, seed=3)
    train_policies(HOPPER, tmp_path, seed=4, steps=500, until=300)
    assert calls == [(HOPPER, 3, 1_000_000, None), (HOPPER, 4, 500, 300)]
    with pytest.raises(ConfigError, match="--until: expected at least 1 environment step, got 0"):
        train_policies(HOPPER, tmp_path, seed=4, until=0)


def of(mean: float, std: float, length: float = 1000.0) -> Returns:
    return Returns(20, mean, std, length)


def test_the_distance_counts_mean_and_spread() -> None:
    assert Moments(3.0, 1.0).distance(Moments(3.0, 1.0)) == 0.0
    assert Moments(3.0, 1.0).distance(Moments(0.0, 5.0)) == 5.0


def test_a_mixture_has_the_moments_of_its_episodes() -> None:
    """Equally many transitions of each: 1,000 of four episodes, 1,000 of one."""
    episodes = [1.0, 3.0, 5.0, 7.0, 20.0]
    whole = mixture([of(4.0, np.std(episodes[:4]).item(), 250.0), of(20.0, 0.0)])
    assert whole.mean == pytest.approx(np.mean(episodes))
    assert whole.std == pytest.approx(np.std(episodes))


def test_tiers_are_the_checkpoints_nearest_to_the_published_returns(tmp_path: Path) -> None:
    """Hopper is published as 724 ± 212, 2452 ± 1098 and, medium-replay, 746 ± 672.

    Of two checkpoints with a mean of 720 the one with the better spread is medium. The mixture of eight of the
    first k checkpoints comes nearest to medium-replay for the k that numpy finds here on its own, among those that
    leave out the checkpoint that was not measured.
    """
    means = {10 * k: 45.0 * k for k in range(1, 17)} | {170: 720.0, 180: 2900.0, 190: 2400.0}
    stds = {170: 200.0, 180: 1000.0, 190: 1000.0}
    present = sorted([*means, 75])
    run = make_run(tmp_path / "run", HOPPER, {steps: {"w1": np.zeros(1)} for steps in present})
    lines = [
        json.dumps({"steps": steps, **PolicyReturns(of(mean, stds.get(steps, 9.0)), of(1.0, 1.0)).to_json()})
        for steps, mean in reversed(means.items())
    ]
    (run / "returns.jsonl").write_text("\n".join(lines) + "\n")
    chosen = choose_tiers(run, HOPPER)
    assert (chosen["medium"], chosen["expert"]) == (170, 190)

    def error(last: int) -> float:
        parts = [present[(i + 1) * last // 8 - 1] for i in range(8)]
        if 75 in parts:
            return np.inf
        centres, variances = (
            np.array([means[steps] for steps in parts]),
            np.array([stds.get(steps, 9.0) ** 2 for steps in parts]),
        )
        spread = np.sqrt(variances.mean() + centres.var())
        return float(np.hypot(centres.mean() - 746.42, spread - 671.89))

    assert 1 < sum(error(last) < np.inf for last in range(8, 21)) < 13
    assert chosen["medium-replay"] == present[min(range(8, 21), key=error) - 1]


def test_a_replay_is_evenly_spread() -> None:
    assert replayed(range(10, 200, 10), 160) == list(range(20, 170, 20))
    assert replayed([30, 10, 20], 25) == [10, 20]


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
    assert measured[100].sampled != measured[100].greedy
    text = (run / "returns.jsonl").read_text()
    assert dict(measure_run(run, 0, 200, workers=0)) == measured  # read, not played again
    assert (run / "returns.jsonl").read_text() == text
    shipped = list(ship_run(run, out, workers=0))
    names = [tier.folder.removeprefix(f"{HOPPER}/") for tier, _ in shipped]
    assert names[:3] == ["medium", "expert", "medium-replay/00"]
    for tier, returns in shipped:
        training = read_bundle(out / tier.folder).manifest["training"]
        assert returns == measured[tier.steps]
        assert training["returns"] == returns.to_json()
        assert (training["ppo_steps"], training["ppo"]["seed"]) == (tier.steps, 7)
    index = (out / "README.md").read_text()
    rows = [line for line in index.splitlines() if line.startswith("| `")]
    assert len(rows) == len(shipped) + (len(shipped) > 3) + 1  # of the replay, and of medium-expert
    both = mixture([shipped[0][1].sampled, shipped[1][1].sampled])
    assert rows[-1] == (
        f"| `{HOPPER}/medium-expert`, half of each |  |  | {both.mean:.0f} ± {both.std:.0f} |  |  |  "
        f"| 1191 ± 973 | {Moments(1190.61, 973.40).distance(both):.0f} |"
    )
    steps = shipped[0][0].steps
    sampled, greedy = measured[steps].sampled, measured[steps].greedy
    distance = np.hypot(sampled.return_mean - 723.57, sampled.return_std - 211.66)
    assert next(row for row in rows if "/medium`" in row).endswith(
        f"| {sampled.return_mean:.0f} ± {sampled.return_std:.0f} |  "
        f"| {greedy.return_mean:.0f} ± {greedy.return_std:.0f} |  | 724 ± 212 | {distance:.0f} |"
    )
    manifest = out / HOPPER / "medium" / "bundle.json"
    manifest.write_text(
        manifest.read_text().replace(f'"return_mean": {sampled.return_mean}', '"return_mean": 1.5')
    )
    assert list(measure_shipped(out, workers=0))[1] == (f"{HOPPER}/medium", measured[steps])
    assert read_bundle(manifest.parent).manifest["training"]["returns"] == measured[steps].to_json()
    assert (out / "README.md").read_text() == index


def test_measurements_of_another_version(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", HOPPER, {})
    (run / "returns.jsonl").write_text('{"steps": 100, "return_mean": 1.5}\n')
    with pytest.raises(
        ConfigError, match=r"sampled and of greedy play, got .*'return_mean': 1\.5.*: remove it"
    ):
        choose_tiers(run, HOPPER)


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
    assert training["returns"]["sampled"]["episodes"] == 16
    assert 0.0 < training["returns"]["sampled"]["return_mean"] < 1.0
    row = next(line for line in (out / "README.md").read_text().splitlines() if f"`{BATTLE}/poor`" in line)
    assert f"{training['returns']['greedy']['win_rate']:.1%}" in row
    assert f"`{BATTLE}/good`: no checkpoint" in (out / "README.md").read_text()


@pytest.mark.parametrize("command", ["measure", "ship"])
def test_a_folder_that_is_no_run(tmp_path: Path, command: str) -> None:
    result = CliRunner().invoke(app, ["behavior", command, str(tmp_path)])
    assert result.exit_code != 0
    assert "expected a folder of  omcda-deploy behavior train" in str(result.exception)


def test_returns_as_text() -> None:
    greedy = Returns(200, 0.19, 0.062, 30.0, 0.005)
    assert str(greedy) == "0.19 ± 0.062, 0.5% won"
    played = PolicyReturns(Returns(20, 38.45, 11.406, 30.0), greedy)
    assert str(played) == "return 38.45 ± 11.406; greedy 0.19 ± 0.062, 0.5% won"
    assert PolicyReturns.from_json(json.loads(json.dumps(played.to_json()))) == played


def test_the_index_of_the_shipped_policies_is_what_their_manifests_say(tmp_path: Path) -> None:
    for manifest in POLICIES.rglob("bundle.json"):
        copy = tmp_path / manifest.relative_to(POLICIES)
        copy.parent.mkdir(parents=True)
        shutil.copy(manifest, copy)
    write_index(tmp_path)
    assert (tmp_path / "README.md").read_text() == (POLICIES / "README.md").read_text()
