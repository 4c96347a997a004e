"""The oracle: an evaluation played against recording servers, and joined, is the one collected in process."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from typer.testing import CliRunner

from omcda_deploy import registry
from omcda_deploy.bundle import TEAM, Bundle
from omcda_deploy.cli import app
from omcda_deploy.client.remote import RemoteTeam
from omcda_deploy.datasets import Dataset, Episode
from omcda_deploy.datasets.recorded import join
from omcda_deploy.envs.vector import vectorize
from omcda_deploy.local import LocalTeam
from omcda_deploy.play.episodes import PlayedStep
from omcda_deploy.play.evaluate import evaluate
from omcda_deploy.play.recording import EpisodeRecorder
from omcda_deploy.play.rollout import rollout
from omcda_deploy.recordings.densities import Densities
from omcda_deploy.registry import read_dataset
from omcda_deploy.spec import TeamSpec
from omcda_deploy.training.losses import tanh_gaussian_log_prob
from tests.support.bundles import write_test_bundle
from tests.support.server_process import server_process

EPISODES, ENVIRONMENTS, SEED = 5, 2, 3
CONTINUOUS, DISCRETE = "mamujoco/hopper-3x1", "toy/masked"
ALONE = "toy/chain-single"  # one agent, whose joint graph is not its own


class Witness:
    """Collects episodes in process, with what the policies answered."""

    def __init__(self, spec: TeamSpec) -> None:
        self._spec = spec
        self._recorder = EpisodeRecorder(spec, ENVIRONMENTS)
        self._steps: list[PlayedStep] = []
        self.episodes: dict[tuple[int, int], tuple[Episode, list[Mapping[str, NDArray[Any]]]]] = {}
        self._round, self._playing = 0, set[int]()

    def __call__(self, step: PlayedStep) -> None:
        if not self._playing:
            self._round += 1
            self._steps = []
            self._playing = set(np.flatnonzero(step.active).tolist())
        self._steps.append(step)
        for index, episode in self._recorder.add(step).items():
            answers: list[Mapping[str, NDArray[Any]]] = [
                {
                    f"{agent}/{name}": values[index]
                    for agent in self._spec.names
                    for name, values in played.decisions[agent].parameters.items()
                }
                for played in self._steps[: len(episode)]
            ]
            self.episodes[self._round, index] = episode, answers
            self._playing.discard(index)


def collected(bundle: Bundle, task: str, temperature: float) -> list[tuple[Episode, Any]]:
    """Play in process; episodes in the order in which they began, with the answers' parameters."""
    with vectorize(task, ENVIRONMENTS) as environment:
        team, witness = LocalTeam(bundle), Witness(environment.spec)
        list(
            rollout(
                Whole(team),
                environment,
                episodes=EPISODES,
                seed=SEED,
                temperature=temperature,
                on_step=witness,
            )
        )
    return [witness.episodes[key] for key in sorted(witness.episodes)]


class Whole:
    """A team whose last answers can be asked for, as rollouts keep only actions and divergences of them."""

    def __init__(self, team: LocalTeam) -> None:
        self.spec, self._team = team.spec, team

    def reset(self) -> None:
        self._team.reset()

    def act(self, observations: Any, *, noise: Any = None, action_masks: Any = None) -> Any:
        return self._team.act(observations, noise=noise, action_masks=action_masks)


def parameters_of(dataset: Dataset, number: int) -> Mapping[str, NDArray[Any]]:
    behavior = dataset.episode(number).behavior
    assert behavior is not None
    return behavior


def assert_equal_episodes(dataset: Dataset, expected: Sequence[Episode]) -> None:
    assert len(dataset.episode_length) == len(expected) == EPISODES
    for number, theirs in enumerate(expected):
        ours = dataset.episode(number)
        for name in ("observations", "states", "actions", "action_masks"):
            a, b = getattr(ours, name), getattr(theirs, name)
            assert (a is None and b is None) or np.array_equal(a, b), name
        assert np.array_equal(ours.rewards, theirs.rewards.astype(np.float32))
        assert ours.timeout == theirs.timeout


@pytest.mark.parametrize(
    ("task", "temperature", "stream", "joint"),
    [
        (CONTINUOUS, 1.0, True, False),
        (CONTINUOUS, 1.0, False, True),  # hopper's agents have one action number each, as choices would be
        (DISCRETE, 0.5, False, True),
        (ALONE, 0.5, False, True),
    ],
)
def test_a_joined_evaluation_is_the_one_that_was_collected(
    tmp_path: Path, task: str, temperature: float, stream: bool, joint: bool
) -> None:
    spec = registry.team_spec(task)
    bundle = write_test_bundle(tmp_path / "bundle", spec, seed=4)
    groups: list[tuple[str, ...]] = [(TEAM,)] if joint else [(spec.names[0],), spec.names[1:]]
    with ExitStack() as stack:
        endpoints = [
            stack.enter_context(
                server_process(bundle, *group, options=("--record", str(tmp_path / f"server {index}")))
            ).endpoint
            for index, group in enumerate(groups)
        ]
        with RemoteTeam(endpoints, stream=stream, record=tmp_path / "client") as team:
            evaluation = evaluate(
                team, task, episodes=EPISODES, seed=SEED, num_envs=ENVIRONMENTS, temperature=temperature
            )
    folders = [tmp_path / f"server {index}" for index in range(len(groups))]
    out = tmp_path / "joined.hdf5"
    summary = join([*folders, tmp_path / "client"], out)
    dataset = read_dataset(out)
    assert dataset.spec == spec
    assert summary["behavior"] == "exact", summary
    assert (summary["left_out"], summary["torn_segments"], summary["lost_rows"]) == ({}, 0, 0)
    assert summary["digest"] == dataset.digest

    theirs = collected(bundle, task, temperature)
    assert_equal_episodes(dataset, [episode for episode, _ in theirs])
    assert dataset.episode_returns == pytest.approx(evaluation.returns, rel=1e-12)  # summed in another order
    assert_exact_behavior(bundle, dataset, [episode for episode, _ in theirs], temperature)
    assert sum(len(episode) for episode, _ in theirs) > 20


def assert_exact_behavior(
    bundle: Bundle, dataset: Dataset, expected: Sequence[Episode], temperature: float
) -> None:
    """Compare distributions and log-probabilities with those of answers in process, and with torch's."""
    team, spec = LocalTeam(bundle), bundle.spec
    for number, episode in enumerate(expected):
        behavior = parameters_of(dataset, number)
        steps = len(episode)
        for index, agent in enumerate(spec.agents):
            size = agent.action.size
            # Rows of the evaluation's batch size, as another one may be rounded otherwise.
            answers = [
                team.act(
                    {
                        name: np.repeat(episode.observations[t : t + 1, i, :o], ENVIRONMENTS, axis=0)
                        for i, (name, o) in enumerate((a.name, a.observation_size) for a in spec.agents)
                    },
                    action_masks=None
                    if episode.action_masks is None
                    else {
                        a.name: np.repeat(
                            episode.action_masks[t : t + 1, i, : a.action.size], ENVIRONMENTS, axis=0
                        )
                        for i, a in enumerate(spec.agents)
                    },
                )[agent.name].parameters
                for t in range(steps)
            ]
            if agent.action.kind == "continuous":
                mean, log_std = (np.stack([a[name][0] for a in answers]) for name in ("mean", "log_std"))
                assert np.array_equal(behavior["mean"][:, index, :size], mean)
                assert np.array_equal(behavior["log_std"][:, index, :size], log_std)
                theirs = tanh_gaussian_log_prob(
                    torch.from_numpy(episode.actions[:, index, :size]).double(),
                    torch.from_numpy(mean).double(),
                    torch.from_numpy(log_std).double(),
                )
                inside = np.abs(episode.actions[:, index, :size]).max(axis=1) < 0.99
                assert inside.any()
                assert behavior["log_prob"][inside, index] == pytest.approx(theirs.numpy()[inside], abs=2e-3)
            else:
                logits = np.stack([a["logits"][0] for a in answers]).astype(np.float64) / temperature
                logits = np.maximum(logits, np.finfo(np.float32).min)
                normalized = torch.from_numpy(logits).log_softmax(-1).numpy()
                chosen = normalized[np.arange(steps), episode.actions[:, index]]
                assert behavior["log_prob"][:, index] == pytest.approx(chosen, abs=1e-9)
                likely = normalized > -1e6
                assert behavior["logits"][:, index, :size][likely] == pytest.approx(
                    normalized[likely], abs=1e-5
                )


def test_log_probabilities_are_those_of_answers_in_process_to_the_bit(tmp_path: Path) -> None:
    """Recorded by a server, and computed from the same rows in process, in another batch."""
    spec = registry.team_spec(CONTINUOUS)
    bundle = write_test_bundle(tmp_path / "bundle", spec, seed=4)
    generator = np.random.default_rng(0)
    rows = [
        {a.name: generator.normal(size=(1, a.observation_size)).astype(np.float32) for a in spec.agents}
        for _ in range(7)
    ]
    local = LocalTeam(bundle, temperature=1.0, seed=9)
    from omcda_deploy.recordings.reader import find_segments, read_segment

    with (
        server_process(bundle, *spec.names, options=("--record", str(tmp_path / "server"))) as server,
        RemoteTeam([server.endpoint], temperature=1.0, seed=9) as team,
    ):
        decisions = [(team.act(row), local.act(row)) for row in rows]
    for path in find_segments([tmp_path / "server"]):
        segment = read_segment(path)
        assert segment is not None
        assert segment.closed
        agent = spec.agent(segment.metadata["model"])
        answers = [ours[agent.name] for _, ours in decisions]
        step = {
            **{name: np.concatenate([d.parameters[name] for d in answers]) for name in answers[0].parameters},
            "policy_weight": np.ones((len(rows), 1), np.float32),
            "noise": segment.columns["noise"],
        }
        assert np.array_equal(segment.columns["action"], np.concatenate([d.action for d in answers]))
        log_prob = Densities([agent]).log_prob(step, step)[:, 0]
        assert np.array_equal(segment.columns["log_prob"], log_prob)


def test_the_commands_make_a_dataset_that_train_replay_and_inspect_take(tmp_path: Path) -> None:
    task = "toy/chain"
    bundle = write_test_bundle(tmp_path / "bundle", registry.team_spec(task), seed=4)
    recording, out = tmp_path / "recording", tmp_path / "joined.hdf5"
    runner = CliRunner()

    def run(*arguments: object) -> str:
        result = runner.invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    with server_process(bundle, *bundle.spec.names, options=("--record", str(recording))) as server:
        play = ("evaluate", task, "--endpoints", server.endpoint, "--temperature", "1", "--episodes", 8)
        run(*play, "--num-envs", 4, "--record", recording)
    assert "reports" in run("recordings", "list", recording)
    summary = json.loads(run("recordings", "join", recording, "--out", out))
    assert (summary["episodes"], summary["behavior"]) == (8, "exact")
    assert "log_prob" in run("inspect", "dataset", out)
    run("replay", out, "--bundle", bundle.path, "--episodes", 2)
    settings = ("--steps", 2, "--behavior-steps", 2, "--set", "hidden=8", "--set", "mixer_hidden=4")
    run("train", out, "--algo", "omcda", *settings, "--out", tmp_path / "run")
    part = tmp_path / "part.hdf5"
    run("subset", out, "--episodes", "0-2", "--out", part)
    assert np.array_equal(
        parameters_of(read_dataset(part), 1)["logits"], parameters_of(read_dataset(out), 1)["logits"]
    )
