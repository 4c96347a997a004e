"""Evaluation against an environment whose every return is known in advance."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import pytest
from numpy.typing import NDArray

from omcda_deploy import registry
from omcda_deploy.client.remote import RemoteTeam
from omcda_deploy.envs.vector import VectorStep, vectorize
from omcda_deploy.errors import ConfigError, ContractError, OmcdaError
from omcda_deploy.local import JointTeam, LocalTeam
from omcda_deploy.play import evaluate as module
from omcda_deploy.play.evaluate import Evaluation, evaluate, play_plans
from omcda_deploy.play.measurements import (
    CallLog,
    Described,
    HasFallback,
    TeamDescription,
    TimesAgents,
    describe,
)
from omcda_deploy.play.rollout import Plan, episode_seed
from omcda_deploy.policy import Decision, NoiseSource
from omcda_deploy.spec import ActionSpec, AgentSpec, TeamSpec
from tests.support.bundles import write_test_bundle

SPEC = TeamSpec(
    task="stub/counting",
    agents=(
        AgentSpec("left", 3, ActionSpec("continuous", 1)),
        AgentSpec("right", 2, ActionSpec("continuous", 2)),
    ),
    state_size=5,
    control_rate=20.0,
    episode_limit=12,
)


def length_of(seed: int) -> int:
    return seed % 7 + 3


def return_of(seed: int) -> float:
    """Step t of an episode pays seed + t."""
    return float(sum(seed % 1000 + t for t in range(length_of(seed))))


class CountingEnvironment:
    """Episodes whose lengths, rewards and ends follow from their seeds. Pays garbage for a step after the end."""

    instances: list[CountingEnvironment]

    def __init__(self, task: str, num_envs: int, *, workers: int = 0, **options: Any) -> None:
        self.spec, self.num_envs, self.options = SPEC, num_envs, options
        self._seeds = np.zeros(num_envs, np.int64)
        self._steps = np.zeros(num_envs, np.int64)
        self.closed = False
        self.stepped: list[NDArray[np.bool_]] = []
        self.resets: list[dict[int, int]] = []
        CountingEnvironment.instances.append(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True

    def _look(self, reward: NDArray[np.float64], ended: NDArray[np.bool_]) -> VectorStep:
        even = self._seeds % 2 == 0
        vectors = np.stack([self._seeds % 1000, self._steps, np.arange(self.num_envs)], axis=1).astype(
            np.float32
        )
        return VectorStep(
            observations={"left": vectors, "right": vectors[:, :2]},
            state=np.zeros((self.num_envs, 5), np.float32),
            action_masks=None,
            reward=reward,
            terminated=ended & even,
            truncated=ended & ~even,
            info={"won": ended & (self._seeds % 3 == 0), "fell": ~ended},  # an end alone tells an outcome
        )

    def reset(self, seeds: Mapping[int, int]) -> VectorStep:
        self.resets.append(dict(seeds))
        for index, seed in seeds.items():
            self._seeds[index], self._steps[index] = seed, 0
        return self._look(np.full(self.num_envs, 1e9), np.zeros(self.num_envs, np.bool_))

    def step(
        self, actions: Mapping[str, NDArray[Any]], active: NDArray[np.bool_] | None = None
    ) -> VectorStep:
        assert active is not None
        self.stepped.append(active.copy())
        lengths = np.array([length_of(int(seed)) for seed in self._seeds])
        reward = np.where(active, (self._seeds % 1000 + self._steps).astype(np.float64), 1e9)
        self._steps[active] += 1
        # The end is repeated for environments left alone: it must be counted once.
        return self._look(reward, self._steps == lengths)

    def render(self, index: int) -> NDArray[np.uint8]:
        raise RuntimeError("no GL here\nsecond line")


class StubTeam:
    """``left`` diverges by the step number, ``right`` by 0.5 with its first action entry at the bound."""

    def __init__(self, spec: TeamSpec = SPEC) -> None:
        self.spec = spec
        self.batches: list[int] = []
        self.noises: list[Any] = []
        self.resets = 0
        self.latencies = {"left": 0.002, "right": 0.004}
        self.budgets = {"left": 0.3, "right": None}
        self.divergence_kind = "kl"
        self.bundle_digest = "abc"

    def reset(self) -> None:
        self.resets += 1

    def act(
        self, observations: Mapping[str, Any], *, noise: Any = None, action_masks: Any = None
    ) -> dict[str, Decision]:
        batch = len(observations["left"])
        self.batches.append(batch)
        self.noises.append(noise)
        return {
            "left": Decision(np.full((batch, 1), -0.5, np.float32), observations["left"][:, 1]),
            "right": Decision(
                np.tile(np.array([1.0, 0.5], np.float32), (batch, 1)), np.full(batch, 0.5, np.float32)
            ),
        }


@pytest.fixture
def environments(monkeypatch: pytest.MonkeyPatch) -> list[CountingEnvironment]:
    CountingEnvironment.instances = []
    monkeypatch.setattr(module, "vectorize", CountingEnvironment)
    monkeypatch.setattr(
        module,
        "registry",
        SimpleNamespace(
            simulator_versions=lambda task, **options: {"counting": "7"},
            require_simulator=lambda task: None,
            takes_option=lambda task, name: True,
        ),
    )
    return CountingEnvironment.instances


def known(seed: int, episodes: int) -> tuple[list[int], list[float], list[int]]:
    seeds = [episode_seed(seed, k) for k in range(episodes)]
    return seeds, [return_of(s) for s in seeds], [length_of(s) for s in seeds]


@pytest.mark.parametrize("num_envs", [1, 3, 4, 7, 50])
def test_returns_are_those_of_the_seeds_for_any_number_of_environments(
    environments: list[CountingEnvironment], num_envs: int
) -> None:
    team = StubTeam()
    result = evaluate(team, "stub/counting", episodes=7, seed=5, num_envs=num_envs)
    seeds, returns, lengths = known(5, 7)
    assert len(set(lengths)) > 1  # or finished environments would never wait
    assert list(result.episode_seeds) == seeds
    assert result.returns.tolist() == returns
    assert result.lengths.tolist() == lengths
    assert result.terminated.tolist() == [s % 2 == 0 for s in seeds]
    assert result.won is not None
    assert result.won.tolist() == [s % 3 == 0 for s in seeds]
    assert result.fell is not None
    assert not result.fell.any()
    assert result.stalled is None
    # Constant batch, never more environments than episodes, every step of every episode exactly once.
    assert set(team.batches) == {min(num_envs, 7)}
    assert sum(int(active.sum()) for active in environments[0].stepped) == sum(lengths)
    assert team.resets == -(-7 // min(num_envs, 7)) == len(environments[0].resets)
    assert environments[0].closed


def test_finished_environments_keep_their_last_observation(environments: list[CountingEnvironment]) -> None:
    class Watcher(StubTeam):
        def act(self, observations: Mapping[str, Any], **rest: Any) -> dict[str, Decision]:
            observed.append(observations["left"].copy())
            return super().act(observations, **rest)

    observed: list[NDArray[np.float32]] = []
    result = evaluate(Watcher(), "stub/counting", episodes=4, seed=5)
    for index, length in enumerate(result.lengths):
        for t, observation in enumerate(observed):
            assert observation[index, 1] == min(t, length)


def test_divergence_saturation_and_latency(environments: list[CountingEnvironment]) -> None:
    result = evaluate(StubTeam(), "stub/counting", episodes=7, seed=5, num_envs=3)
    lengths = result.lengths
    steps = np.concatenate([np.arange(n) for n in lengths])
    left, right = result.divergence["left"], result.divergence["right"]
    assert left.mean == pytest.approx(steps.mean())
    assert left.p99 == pytest.approx(np.percentile(steps, 99))
    assert left.by_step.tolist() == list(range(lengths.max()))
    assert left.budget == 0.3
    assert right.by_step.tolist() == [0.5] * lengths.max()
    assert right.budget is None
    assert result.saturation == {"left": 0.0, "right": 0.5}
    calls = sum(lengths[k : k + 3].max() for k in (0, 3, 6))
    assert result.step_latency.seconds.size == calls
    assert result.agent_latency["right"].percentile(50) == pytest.approx(4.0)
    assert result.agent_latency["right"].seconds.size == calls


def test_json_is_plain_and_says_where_it_comes_from(environments: list[CountingEnvironment]) -> None:
    result = evaluate(StubTeam(), "stub/counting", episodes=5, seed=3)
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    _, returns, _ = known(3, 5)
    assert data["returns"] == returns
    assert data["return"]["mean"] == pytest.approx(np.mean(returns))
    assert data["return"]["std"] == pytest.approx(np.std(returns, ddof=1))
    assert data["return"]["standard_error"] == pytest.approx(np.std(returns, ddof=1) / np.sqrt(5))
    assert (data["return"]["min"], data["return"]["max"]) == (min(returns), max(returns))
    assert data["contract_hash"] == SPEC.contract_hash
    assert data["team"] == {
        "bundle_digest": "abc",
        "divergence_kind": "kl",
        "budgets": {"left": 0.3, "right": None},
    }
    assert data["versions"]["counting"] == "7"
    assert data["seed"] == 3
    assert data["divergence"]["left"]["budget"] == 0.3


def test_one_episode_has_no_standard_error(environments: list[CountingEnvironment]) -> None:
    result = evaluate(StubTeam(), "stub/counting", episodes=1)
    assert result.to_json()["return"]["standard_error"] is None


def test_noise_is_the_seeded_source_drawn_for_the_whole_batch(
    environments: list[CountingEnvironment],
) -> None:
    silent, noisy = StubTeam(), StubTeam()
    evaluate(silent, "stub/counting", episodes=4, seed=9)
    evaluate(noisy, "stub/counting", episodes=4, seed=9, temperature=1.0)
    assert set(silent.noises) == {None}
    source = NoiseSource(SPEC, 9)
    for noise in noisy.noises:
        for name, expected in source.draw(4).items():
            np.testing.assert_array_equal(noise[name], expected)


def test_progress_ends_at_its_total(environments: list[CountingEnvironment]) -> None:
    calls: list[tuple[float, float]] = []
    evaluate(StubTeam(), "stub/counting", episodes=5, num_envs=2, progress=lambda *c: calls.append(c))
    assert {total for _, total in calls} == {5}
    done = [d for d, _ in calls]
    assert done == sorted(done)
    assert done[-1] == 5


def test_another_contract_is_refused_before_the_first_step(environments: list[CountingEnvironment]) -> None:
    other = TeamSpec(SPEC.task, SPEC.agents, SPEC.state_size, control_rate=50.0)
    team = StubTeam(other)
    with pytest.raises(ContractError, match="control_rate"):
        evaluate(team, "stub/counting")
    assert not team.batches
    assert not environments[0].resets
    assert environments[0].closed


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (np.zeros((4, 3), np.float32), r"right answered .* \[4, 3\], expected \[4, 2\]"),
        (
            np.full((4, 2), np.nan, np.float32),
            r"right answered .*\[nan, nan\] in environment 0, step 1, expected n",
        ),
        (
            np.array([[0, 0], [0, 0], [0.5, -1.5], [0, 2]], np.float32),
            r"right answered .*\[0\.5, -1\.5\] in environment 2, step 1, expected numbers from -1 to 1",
        ),
    ],
)
def test_answers_that_cannot_be_played(
    environments: list[CountingEnvironment], answer: NDArray[np.float32], message: str
) -> None:
    class Broken(StubTeam):
        def act(self, observations: Mapping[str, Any], **rest: Any) -> dict[str, Decision]:
            decisions = super().act(observations, **rest)
            return {**decisions, "right": Decision(answer, decisions["right"].divergence)}

    with pytest.raises(ContractError, match=message):
        evaluate(Broken(), "stub/counting", episodes=4)


@pytest.mark.parametrize("setting", [{"episodes": 0}, {"seed": -1}, {"num_envs": 0}])
def test_settings_out_of_range(setting: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(setting))}: expected at least"):
        evaluate(StubTeam(), "stub/counting", **setting)  # type: ignore[arg-type]


def test_episode_seeds_differ_and_depend_on_both_numbers() -> None:
    seeds = {episode_seed(seed, k) for seed in range(20) for k in range(50)}
    assert len(seeds) == 1000


def without_gl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unset MUJOCO_GL; set first, so that what evaluate sets is undone after the test."""
    monkeypatch.setenv("MUJOCO_GL", "")
    monkeypatch.delenv("MUJOCO_GL")


def test_where_nothing_can_be_rendered(
    environments: list[CountingEnvironment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_gl(monkeypatch)
    with pytest.raises(ConfigError, match=r"MUJOCO_GL=egl \(RuntimeError: no GL here\)\. Install EGL"):
        evaluate(StubTeam(), "stub/counting", episodes=1, video=tmp_path / "run.mp4")
    assert not list(tmp_path.iterdir())
    assert environments[0].options == {"render_mode": "rgb_array"}
    with pytest.raises(ConfigError, match=r"expected an \.mp4 file"):
        evaluate(StubTeam(), "stub/counting", episodes=1, video=tmp_path / "run.gif")


@pytest.mark.parametrize(
    ("task", "advice"),
    [
        ("tests.support.own_simulators:Choose", "add one, or leave the video out"),
        ("toy/chain", None),  # has the argument
    ],
)
def test_a_simulator_that_takes_no_render_mode_is_named(
    task: str, advice: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_gl(monkeypatch)
    said = (
        f"^--video: {task} takes no argument render_mode: {advice}$" if advice else "^the team .* do not fit"
    )
    with pytest.raises(OmcdaError, match=said):
        evaluate(StubTeam(), task, episodes=1, video=tmp_path / "v.mp4")
    assert list(tmp_path.iterdir()) == []


def test_without_video_nothing_is_rendered(
    environments: list[CountingEnvironment], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_gl(monkeypatch)
    evaluate(StubTeam(), "stub/counting", episodes=1)
    assert environments[0].options == {}
    assert "MUJOCO_GL" not in os.environ


def test_video_holds_the_first_episode_in_real_time(
    environments: list[CountingEnvironment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imageio = pytest.importorskip("imageio.v2")
    pytest.importorskip("imageio_ffmpeg")

    def draw(self: CountingEnvironment, index: int) -> NDArray[np.uint8]:
        assert index == 0
        return np.full((32, 48, 3), 20 * self._steps[0], np.uint8)

    monkeypatch.setattr(CountingEnvironment, "render", draw)
    without_gl(monkeypatch)
    result = evaluate(StubTeam(), "stub/counting", episodes=4, num_envs=2, seed=1, video=tmp_path / "run.mp4")
    assert [file.name for file in tmp_path.iterdir()] == ["run.mp4"]
    with imageio.get_reader(tmp_path / "run.mp4") as reader:
        assert reader.get_meta_data()["fps"] == SPEC.control_rate
        frames = [frame.mean() for frame in reader]
    np.testing.assert_allclose(frames, 20 * np.arange(result.lengths[0] + 1), atol=4)


@pytest.mark.parametrize("failure", ["a frame", "the end", "silence"])
def test_a_video_that_fails_costs_the_video_alone(
    environments: list[CountingEnvironment],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    failure: str,
) -> None:
    imageio = pytest.importorskip("imageio")
    pytest.importorskip("imageio_ffmpeg")

    class Encoder:
        def append_data(self, frame: NDArray[np.uint8]) -> None:
            if failure == "a frame":
                raise OSError("the pipe\nis broken")

        def close(self) -> None:
            if failure == "the end":
                raise OSError("the pipe\nis broken")

    monkeypatch.setattr(imageio, "get_writer", lambda *_, **__: Encoder())
    monkeypatch.setattr(CountingEnvironment, "render", lambda *_: np.zeros((32, 48, 3), np.uint8))
    without_gl(monkeypatch)
    plain = evaluate(StubTeam(), "stub/counting", episodes=4, num_envs=2, seed=1)
    filmed = evaluate(StubTeam(), "stub/counting", episodes=4, num_envs=2, seed=1, video=tmp_path / "run.mp4")
    assert filmed.returns.tolist() == plain.returns.tolist()
    assert list(tmp_path.iterdir()) == []
    (record,) = caplog.records
    assert "run.mp4 was not written, as its encoder failed: " in record.message
    assert "\n" not in record.message
    assert failure == "silence" or record.message.endswith(": the pipe")


class BundleTeam:
    """A team that asks a local one on the far side of a copy, as a server would."""

    def __init__(self, team: LocalTeam) -> None:
        self.team, self.spec = team, team.spec

    def reset(self) -> None:
        self.team.reset()

    def act(self, observations: Mapping[str, Any], **rest: Any) -> dict[str, Decision]:
        return self.team.act({name: np.array(rows) for name, rows in observations.items()}, **rest)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_real_game_real_bundle(tmp_path: Path, temperature: float) -> None:
    pytest.importorskip("onnx")
    task = "toy/chain-mixed"
    bundle = write_test_bundle(tmp_path / "bundle", registry.team_spec(task))
    team = LocalTeam(bundle)

    def play(team: Any, **settings: Any) -> Evaluation:
        return evaluate(team, task, episodes=6, seed=2, temperature=temperature, **settings)

    first = play(team, num_envs=3)
    again = play(BundleTeam(team), num_envs=3)
    assert first.returns.tolist() == again.returns.tolist()
    assert first.divergence["agent_0"].by_step.tolist() == again.divergence["agent_0"].by_step.tolist()
    if not temperature:
        assert play(team, num_envs=6).returns.tolist() == first.returns.tolist()
    assert first.team.bundle_digest == bundle.digest
    assert first.team.budgets == bundle.budgets
    assert first.saturation == dict.fromkeys(bundle.spec.names)  # discrete actions have no bound to touch
    assert len(set(first.returns.tolist())) > 1
    json.dumps(first.to_json(), allow_nan=False)


class MissingTeam(StubTeam):
    """``left`` is answered by a fallback at every other step of the team, ``right`` always."""

    fallback = "hold"

    def act(self, observations: Mapping[str, Any], **rest: Any) -> dict[str, Decision]:
        decisions = super().act(observations, **rest)
        unknown = np.full(len(observations["left"]), np.nan, np.float32)
        missed = ["right"] if len(self.batches) % 2 else ["left", "right"]
        return decisions | {
            name: Decision(decisions[name].action, unknown, fallback=True, awaited=name == "left")
            for name in missed
        }


def test_steps_of_a_fallback_are_counted_and_their_divergence_is_not(
    environments: list[CountingEnvironment],
) -> None:
    team = MissingTeam()
    result = evaluate(team, "stub/counting", episodes=7, seed=5, num_envs=3)
    calls = len(team.batches)
    assert result.fallback_steps == {"left": calls // 2, "right": calls}
    rounds = [result.lengths[k : k + 3] for k in (0, 3, 6)]
    call, times = 0, []
    for lengths in rounds:
        for t in range(lengths.max()):
            call += 1
            times += [t] * int((lengths > t).sum() if call % 2 else 0)
    assert result.divergence["left"].mean == pytest.approx(np.mean(times))
    assert result.divergence["left"].p99 == pytest.approx(np.percentile(times, 99))
    for t, value in enumerate(result.divergence["left"].by_step):
        assert value == t if t in times else np.isnan(value)
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert data["fallback"] == {"by": "hold", "steps": {"left": calls // 2, "right": calls}}
    assert data["not_awaited"] == {"left": 0, "right": calls}
    assert (data["divergence"]["right"]["mean"], data["divergence"]["right"]["p99"]) == (None, None)
    assert set(data["divergence"]["right"]["by_step"]) == {None}


def test_a_team_without_servers_has_no_fallback(environments: list[CountingEnvironment]) -> None:
    data = evaluate(StubTeam(), "stub/counting", episodes=1).to_json()
    assert data["fallback"] == {"by": None, "steps": {"left": 0, "right": 0}}


def test_a_team_that_is_no_bundle_says_so() -> None:
    team = SimpleNamespace(spec=SPEC)
    assert describe(team).to_json() == {"bundle_digest": None, "divergence_kind": None, "budgets": {}}
    log = CallLog(team)
    log.add(0.1, dict.fromkeys(SPEC.names, Decision(np.zeros(1), np.zeros(1, np.float32))))
    assert log.agent_latency == {}
    assert log.step_latency.seconds.tolist() == [0.1]


def described(team: LocalTeam | JointTeam | RemoteTeam) -> Described:
    """Fail the type checker, and so a report before it is empty, where a team's attribute is misnamed."""
    return team


def served(team: RemoteTeam) -> tuple[HasFallback, TimesAgents]:
    """Fail the type checker in the same way, for attributes that only a served team has."""
    return team, team


@pytest.mark.parametrize("kind", [LocalTeam, JointTeam])
def test_teams_of_a_bundle_describe_it(tmp_path: Path, kind: type[LocalTeam | JointTeam]) -> None:
    pytest.importorskip("onnx")
    bundle = write_test_bundle(tmp_path / "bundle", SPEC)
    team = kind(bundle)
    assert isinstance(described(team), Described)
    assert describe(team) == TeamDescription(bundle.digest, bundle.divergence_kind, bundle.budgets)
    assert not isinstance(team, HasFallback | TimesAgents)


def test_a_teams_own_temperature_is_played_unless_another_is_asked_for(
    environments: list[CountingEnvironment],
) -> None:
    def played(team: StubTeam, **settings: Any) -> Evaluation:
        return evaluate(team, "stub/counting", episodes=4, seed=9, **settings)

    class Sampling(StubTeam):
        temperature = 0.5

    for team, settings, expected in (
        (Sampling(), {}, 0.5),
        (Sampling(), {"temperature": 2}, 2.0),
        (StubTeam(), {"temperature": 0.25}, 0.25),
        (Sampling(), {"temperature": 0}, 0.0),  # zeros, as it would draw its own for None
    ):
        result = played(team, **settings)
        assert result.temperature == result.to_json()["temperature"] == expected
        source = NoiseSource(SPEC, 9)
        for noise in team.noises:
            for name, whole in source.draw(4).items():
                assert noise[name].tolist() == (np.float32(expected) * whole).tolist()
    silent = StubTeam()
    assert played(silent).temperature == 0.0
    assert set(silent.noises) == {None}
    with pytest.raises(ConfigError, match="temperature: expected a number from 0"):
        played(StubTeam(), temperature=-1)


@pytest.mark.parametrize(("task", "at_once"), [("mamujoco/hopper-3x1", [8]), ("toy/masked", [2, 3])])
def test_plans_are_evaluations_of_their_temperatures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, at_once: list[int]
) -> None:
    """At once where the simulator has batches; a game per environment is never started for all plans at once."""
    pytest.importorskip("onnx")
    team = LocalTeam(write_test_bundle(tmp_path / "bundle", registry.team_spec(task)))
    plans = [Plan(5, 3, 4, 0.0), Plan(5, 3, 4, 0.5), Plan(2, 2, 9, 0.5)]
    sizes, calls = [], []

    def made(name: str, num_envs: int, **options: Any) -> Any:
        sizes.append(num_envs)
        return vectorize(name, num_envs, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, "vectorize", made)
        tables = play_plans(team, task, plans, progress=lambda done, total: calls.append((done, total)))
    assert sizes == at_once
    for plan, table in zip(plans, tables, strict=True):
        alone = evaluate(
            team,
            task,
            episodes=plan.episodes,
            seed=plan.seed,
            num_envs=plan.num_envs,
            temperature=plan.temperature,
        )
        assert table.columns() == alone.columns()
    assert len({tuple(table.returns.tolist()) for table in tables}) == 3
    assert {total for _, total in calls} == {sum(plan.episodes for plan in plans)}
    shares = [done / total for done, total in calls]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    other = LocalTeam(write_test_bundle(tmp_path / "other", SPEC))
    with pytest.raises(ContractError, match="do not fit together"):
        play_plans(other, task, plans)
