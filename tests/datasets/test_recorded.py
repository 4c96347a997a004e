"""Joining recordings: which episodes are complete, where numbers come from, and what is told of the others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omcda_deploy.bundle import TEAM, Bundle
from omcda_deploy.client import reports
from omcda_deploy.client.episode import EpisodeClock
from omcda_deploy.client.reports import Reports
from omcda_deploy.datasets import Dataset
from omcda_deploy.datasets.recorded import join
from omcda_deploy.errors import ConfigError, DatasetError
from omcda_deploy.inputs import batch_of
from omcda_deploy.policy import NoiseSource
from omcda_deploy.protos import policy_pb2
from omcda_deploy.recordings.segments import RecordingLimits
from omcda_deploy.registry import read_dataset
from omcda_deploy.serve.config import ServerConfig
from omcda_deploy.serve.policy_service import PolicyService
from omcda_deploy.serve.recording import FlightRecorder
from omcda_deploy.serve.releases import Releases
from tests.support.bundles import continuous_spec, discrete_spec, write_test_bundle


class Loop:
    """Servers of all agents in this process and their client, which all record into ``folder``."""

    def __init__(self, bundle: Bundle, folder: Path, models: tuple[str, ...] = ()) -> None:
        self.folder, self.spec = folder, bundle.spec
        releases = Releases(bundle.path, (), ServerConfig())
        self._recorder = releases.recorder = FlightRecorder(RecordingLimits())
        self._recorder.start(folder)
        self._service = PolicyService(releases)
        self._models = models or bundle.spec.names
        self._clock = EpisodeClock()
        self._reports = Reports(folder, bundle.spec, self._clock)
        self._noise = NoiseSource(bundle.spec, 1)
        self.draw = np.random.default_rng(0)

    def begin(self, name: str) -> None:
        self._clock.begin(name)

    def step(
        self,
        reward: float = 1.0,
        *,
        terminated: bool = False,
        truncated: bool = False,
        temperature: float | None = 1.0,
        without: str = "",
        twice: bool = False,
        fallback: bool = False,
        reported: bool = True,
        **unseen: Any,
    ) -> None:
        """One step of one row, with all that may go wrong in it."""
        self._clock.advance(None)
        noise = self._noise.draw(1)
        for model in self._models:
            agents = self.spec.agents if model == TEAM else (self.spec.agent(model),)
            if model == without:
                continue
            request = policy_pb2.ActRequest(
                model=model, batch=1, episode_id=self._clock.id, episode_step=self._clock.step
            )
            if temperature is not None:
                request.temperature = temperature
            for again in range(1 + twice):
                if again == 0 or twice:
                    width = sum(agent.observation_size for agent in agents)
                    request.observation = self.draw.standard_normal(width).astype(np.float32).tobytes()
                if temperature != 0.0:
                    request.noise = b"".join(noise[agent.name].tobytes() for agent in agents)
                if agents[0].action.kind == "discrete":
                    request.action_mask = bytes([1] * sum(agent.action.size for agent in agents))
                self._service.act(policy_pb2.ActRequest.FromString(request.SerializeToString()))
        self._reports.expect(1, fallback)
        if reported:
            self._reports.add(reward, terminated, truncated, unseen)

    def play(self, name: str, steps: int = 3, **last: Any) -> None:
        """An episode, whose last step is told ``last``."""
        self.begin(name)
        for _ in range(steps - 1):
            self.step(**{"temperature": last.get("temperature", 1.0)})
        self.step(**{"terminated": True} | last)

    def close(self) -> None:
        self._recorder.stop()
        self._reports.close()


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("bundles")
    return {
        kind: write_test_bundle(folder / kind, spec, seed=3)
        for kind, spec in (("continuous", continuous_spec(agents=2)), ("discrete", discrete_spec()))
    }


@pytest.fixture
def loop(bundles: dict[str, Bundle], tmp_path: Path) -> Iterator[Loop]:
    played = Loop(bundles["continuous"], tmp_path / "recording")
    yield played
    played.close()


def joined(loop: Loop, **options: Any) -> tuple[dict[str, Any], Dataset]:
    loop.close()
    out = loop.folder.parent / "joined.hdf5"
    summary = join([loop.folder], out, **options)
    return summary, read_dataset(out)


def test_incomplete_episodes_are_told_and_left_out(loop: Loop) -> None:
    loop.play("good")
    loop.begin("no end")
    loop.step()
    loop.begin("a step that nobody reported")
    loop.step(reported=False)
    loop.step(terminated=True)
    loop.begin("fallback")
    loop.step(fallback=True)
    loop.step(truncated=True)
    loop.begin("missing")
    loop.step(without="agent_1")
    loop.step(terminated=True)
    loop.begin("an agent without answers")
    loop.step(without="agent_1", terminated=True)
    loop.begin("two answers")
    loop.step(twice=True)
    loop.step(terminated=True)
    loop.begin("replayed")
    loop.step(reported=False)
    summary, dataset = joined(loop)
    assert summary["left_out"] == {
        "no end was reported": 1,
        "steps were not reported": 1,
        "a fallback acted for an agent whose answer was missed": 1,
        "answers of agent_1 are missing": 1,
        "no answer of agent_1 was recorded": 1,
        "agent_0 answered one step in two ways": 1,
        "no reward was reported": 1,
    }
    assert dataset.episode_length.tolist() == [3]
    assert summary["final_observations"] == "0 reported, 1 repeated"


def test_what_no_dataset_takes_is_left_out_and_keeps_no_other(
    bundles: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients that look at less than ours may report it."""
    monkeypatch.setattr(reports, "finite_rows", lambda rows, width, what, advice: batch_of(rows, width, what))
    monkeypatch.setattr(reports, "mask_rows", lambda mask, width, what: batch_of(mask, width, what))
    loop = Loop(bundles["continuous"], tmp_path / "recording")
    nan = {agent.name: [np.nan] * agent.observation_size for agent in loop.spec.agents}
    loop.play("good", steps=2)
    loop.play("final", next_observations=nan)
    loop.play("state", state=[np.nan] * 5, next_state=np.zeros(5))
    loop.play("next state", state=np.zeros(5), next_state=[np.inf] * 5)
    loop.play("reward", reward=1e300)  # too large for float32
    loop.play("long", steps=loop.spec.episode_limit + 1)
    loop.play("good too", steps=2)
    summary, dataset = joined(loop)
    assert summary["left_out"] == {
        "a next_observation that is not finite was reported": 1,
        "a state that is not finite was reported": 1,
        "a next_state that is not finite was reported": 1,
        "a reward that is not finite was reported": 1,
        "it has more than 50 steps, the limit of toy/continuous": 1,
    }
    assert dataset.episode_length.tolist() == [2, 2]
    choices = Loop(bundles["discrete"], tmp_path / "choices" / "recording")
    choices.play("good", steps=2)
    choices.play("mask", next_action_masks={a.name: [2] * a.action.size for a in choices.spec.agents})
    summary, dataset = joined(choices)
    assert summary["left_out"] == {"a next_action_mask of more than 0 and 1 was reported": 1}
    assert dataset.episode_length.tolist() == [2]


def test_steps_behind_an_end_count_nowhere(loop: Loop) -> None:
    """As in a batch, in which an episode that has ended waits for the others."""
    loop.play("good", steps=2)
    loop.step(5.0)
    loop.step(7.0, terminated=True)
    summary, dataset = joined(loop)
    assert (summary["transitions"], dataset.episode_returns.tolist()) == (2, [2.0])


def test_the_row_behind_the_last_step_and_states_are_those_that_were_reported(loop: Loop) -> None:
    sizes = {agent.name: agent.observation_size for agent in loop.spec.agents}
    final = {name: np.full(size, 9.0, np.float32) for name, size in sizes.items()}
    states = np.arange(15, dtype=np.float32).reshape(3, 5)
    loop.begin("e")
    loop.step(state=states[0])
    loop.step(truncated=True, state=states[1], next_state=states[2], next_observations=final)
    summary, dataset = joined(loop)
    assert dataset.spec == loop.spec
    assert np.array_equal(dataset.states, states)
    assert dataset.observations[-1].tolist() == [[9.0] * 4 + [0.0], [9.0] * 5]
    assert dataset.timeout.tolist() == [False, True]
    assert summary["states"] == "reported"
    assert summary["final_observations"] == "1 reported, 0 repeated"


def test_without_states_all_observations_joined_stand_for_them(loop: Loop) -> None:
    loop.play("e")
    summary, dataset = joined(loop)
    assert summary["states"] == "all observations joined"
    assert np.array_equal(dataset.states, dataset.observations.reshape(4, -1))
    assert dataset.spec.contract_hash == loop.spec.contract_hash


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
@pytest.mark.parametrize("joint", [False, True])
def test_agents_of_unequal_sizes_are_padded(
    bundles: dict[str, Bundle], tmp_path: Path, kind: str, joint: bool
) -> None:
    loop = Loop(bundles[kind], tmp_path / "recording", (TEAM,) if joint else ())
    loop.play("e")
    summary, dataset = joined(loop)
    assert summary["behavior"] == "exact"
    behavior, spec = dataset.behavior, dataset.spec
    assert behavior is not None
    for index, agent in enumerate(spec.agents):
        size = agent.action.size
        assert not dataset.observations[:, index, agent.observation_size :].any()
        if kind == "discrete":
            assert (behavior["logits"][:3, index, size:] == np.finfo(np.float32).min).all()
            logits = behavior["logits"][:3, index, :size].astype(np.float64)
            assert np.exp(logits).sum(-1) == pytest.approx(1.0)
            chosen = logits[np.arange(3), dataset.actions[:3, index]]
            assert behavior["log_prob"][:3, index] == pytest.approx(chosen, abs=1e-6)
        else:
            assert not dataset.actions[:3, index, size:].any()
            assert not behavior["mean"][:3, index, size:].any()
            assert behavior["mean"][:3, index, :size].all()


def test_behavior_is_exact_only_where_every_step_has_a_density(loop: Loop) -> None:
    loop.play("sampled")
    loop.play("quiet", temperature=0.0)
    summary, dataset = joined(loop)
    assert dataset.behavior is None
    assert summary["behavior"] == "not exact in 1 episodes: actions at temperature 0 have no density"
    assert summary["episodes"] == 2


def test_an_unknown_temperature_can_be_told(loop: Loop, tmp_path: Path) -> None:
    loop.play("unknown", temperature=None)
    summary = joined(loop)[0]
    assert summary["behavior"].endswith("is not known: give --temperature")
    half = join([loop.folder], tmp_path / "half.hdf5", temperature=0.5)
    whole = join([loop.folder], tmp_path / "whole.hdf5", temperature=1.0)
    assert half["behavior"] == whole["behavior"] == "exact"
    narrow, wide = (read_dataset(tmp_path / f"{name}.hdf5") for name in ("half", "whole"))
    assert narrow.behavior is not None
    assert wide.behavior is not None
    gap = (wide.behavior["log_std"] - narrow.behavior["log_std"])[:3]
    assert gap[gap != 0.0] == pytest.approx(np.log(2), rel=1e-5)
    assert np.array_equal(narrow.actions, wide.actions)
    assert narrow.digest != wide.digest, "what acted decides training too"
    for temperature in (0.0, -1.0, 11.0, float("nan")):
        with pytest.raises(ConfigError, match="temperature: expected a number above 0"):
            join([loop.folder], tmp_path / "never.hdf5", temperature=temperature)


def test_a_policy_without_a_density_is_told(tmp_path: Path) -> None:
    bundle = write_test_bundle(
        tmp_path / "bundle", continuous_spec(agents=2), divergence_kind="neg_log_behavior"
    )
    loop = Loop(bundle, tmp_path / "recording")
    loop.play("e")
    assert joined(loop)[0]["behavior"] == "not exact in 1 episodes: the policy has no density"


def test_rewards_come_from_a_file(loop: Loop, tmp_path: Path) -> None:
    loop.begin("logged elsewhere")
    for _ in range(3):
        loop.step(reported=False)
    rewards = tmp_path / "rewards.csv"
    rewards.write_text(  # as Excel writes "CSV UTF-8"
        "\ufeffstep,episode,reward,terminated,truncated,note\n"
        "1,logged elsewhere,0.5,0,0,a\n2,logged elsewhere,1e1,0,0,b\n3,logged elsewhere,-1,0,1,c\n"
    )
    summary, dataset = joined(loop, rewards=rewards)
    assert dataset.rewards[:3].tolist() == [0.5, 10.0, -1.0]
    assert dataset.timeout.tolist() == [False, False, True]
    assert (summary["behavior"], summary["left_out"]) == ("exact", {})
    for text, message in (
        ("episode,step,reward,terminated\n", "truncated is missing"),
        ("", "episode is missing"),
        ("episode,step,reward,terminated,truncated\ne,1,one,0,0\n", "line 2: expected an episode"),
        ("episode,step,reward,terminated,truncated\ne,1,nan,0,0\n", "line 2: expected an episode"),
        ("episode,step,reward,terminated,truncated\ne,1,1,0\n", "line 2: expected an episode"),
        ("episode,step,reward,terminated,truncated\ne,1.5,1,0,0\n", "line 2: expected an episode"),
        ("episode,step,reward,terminated,truncated\ne,1,1,maybe,0\n", "line 2: expected an episode"),
        (f"episode,step,reward,terminated,truncated\ne,1{'0' * 20},1,0,0\n", "line 2: expected an episode"),
        (
            f"episode,step,reward,terminated,truncated\ne{'e' * 200000},1,1,0,0\n",
            "behind line 1: expected a CSV file",
        ),
        ("episode,step,reward,terminated,truncated\n", "expected a complete episode"),
        ("episode,step,reward,terminated,truncated\nother,1,1,1,0\n", "no answer of agent_0 was recorded"),
    ):
        rewards.write_text(text)
        with pytest.raises(DatasetError, match=message):
            join([loop.folder], tmp_path / "never.hdf5", rewards=rewards)
    rewards.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DatasetError, match="no text"):
        join([loop.folder], tmp_path / "never.hdf5", rewards=rewards)
    with pytest.raises(DatasetError, match="cannot be read"):
        join([loop.folder], tmp_path / "never.hdf5", rewards=tmp_path / "missing.csv")
    assert not (tmp_path / "never.hdf5").exists()


def test_rewards_of_a_file_leave_the_rest_of_the_reports(loop: Loop, tmp_path: Path) -> None:
    sizes = {agent.name: agent.observation_size for agent in loop.spec.agents}
    final = {name: np.full(size, 9.0, np.float32) for name, size in sizes.items()}
    for name, fallback in (("good", False), ("a fallback acted", True)):
        loop.begin(name)
        loop.step(fallback=fallback)
        loop.step(next_observations=final)
    rewards = tmp_path / "rewards.csv"
    lines = [f"{name},{step},2,{step - 1},0" for name in ("good", "a fallback acted") for step in (1, 2)]
    rewards.write_text("\n".join(["episode,step,reward,terminated,truncated", *lines]))
    summary, dataset = joined(loop, rewards=rewards)
    assert summary["left_out"] == {"a fallback acted for an agent whose answer was missed": 1}
    assert summary["final_observations"] == "1 reported, 0 repeated"
    assert dataset.observations[-1].tolist() == [[9.0] * 4 + [0.0], [9.0] * 5]
    assert (dataset.rewards[:2].tolist(), dataset.terminal.tolist()) == ([2.0, 2.0], [False, True])


def test_what_is_no_recording_is_refused(loop: Loop, bundles: dict[str, Bundle], tmp_path: Path) -> None:
    loop.play("e")
    loop.close()
    out = tmp_path / "never.hdf5"
    (tmp_path / "empty").mkdir()
    for folder, message in ((tmp_path / "empty", "holds no segment"), (tmp_path / "none", "is no folder")):
        with pytest.raises(DatasetError, match=message):
            join([loop.folder, folder], out)
    with pytest.raises(DatasetError, match="expected steps that servers recorded"):
        join([loop.folder / "reports"], out)
    other = Loop(bundles["discrete"], tmp_path / "other")
    other.play("e")
    other.close()
    with pytest.raises(DatasetError, match="agents"):
        join([loop.folder, other.folder], out)
    assert not out.exists()


def test_a_torn_segment_costs_its_last_steps_alone(loop: Loop, tmp_path: Path) -> None:
    loop.play("e")
    loop.close()
    (path,) = (loop.folder / "reports").iterdir()
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    (torn,) = (loop.folder / "agent_0").iterdir()
    (loop.folder / "agent_0" / ("0" + torn.name)).write_bytes(torn.read_bytes()[:40])  # hardly begun
    with pytest.raises(DatasetError, match=r"none \(1: no reward was reported\)"):
        join([loop.folder], tmp_path / "never.hdf5")
    path.write_bytes(data)
    assert join([loop.folder], tmp_path / "whole.hdf5")["torn_segments"] == 1
