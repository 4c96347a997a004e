from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from omcda_deploy import registry
from omcda_deploy.datasets.formats.omiga_hdf5 import read
from omcda_deploy.envs import Float, Observations, StepResult
from omcda_deploy.envs.mamujoco import MultiAgentMujoco
from omcda_deploy.errors import ConfigError, ContractError
from omcda_deploy.play.collect import Source, collect, collect_mixture
from omcda_deploy.policy import Decision, NoiseSource
from omcda_deploy.spec import ActionSpec, AgentSpec, TeamSpec

HOPPER = "mamujoco/hopper-3x1"


class Stub:
    """A tanh-Gaussian policy whose mean is a multiple of the observation's first entry."""

    def __init__(self, spec: TeamSpec, gain: float = 0.1) -> None:
        self.spec, self.gain = spec, gain
        self.noises: list[Mapping[str, Float] | None] = []

    def reset(self) -> None: ...

    def act(
        self,
        observations: Mapping[str, Float],
        *,
        noise: Mapping[str, Float] | None = None,
        action_masks: Mapping[str, NDArray[np.uint8]] | None = None,
    ) -> dict[str, Decision]:
        self.noises.append(noise)
        decisions = {}
        for agent in self.spec.agents:
            mean = self.gain * observations[agent.name][:, :1]
            action = np.tanh(mean + (noise[agent.name] if noise else 0)).astype(np.float32)
            decisions[agent.name] = Decision(action, np.zeros(len(action), np.float32))
        return decisions


class Walk:
    """Episodes of very unlike lengths, which follow from the seed: most are short, as in a task of falling."""

    spec = TeamSpec(
        task="test/walk",
        agents=(
            AgentSpec("a", 1, ActionSpec("continuous", 1)),
            AgentSpec("b", 2, ActionSpec("continuous", 1)),
        ),
        state_size=2,
        control_rate=1.0,
        episode_limit=50,
    )

    @staticmethod
    def length(seed: int) -> int:
        return 80 if seed % 4 == 0 else 1 + seed % 7  # 80 runs into the limit

    def __init__(self, task: str, **options: Any) -> None:
        self._seed, self._steps = 0, 0

    @property
    def possible_agents(self) -> list[str]:
        return list(self.spec.names)

    def reset(self, seed: int | None = None) -> tuple[Observations, dict[str, dict[str, Any]]]:
        self._seed, self._steps = seed or 0, 0
        return self._observe(), {}

    def step(self, actions: Mapping[str, Any]) -> StepResult:
        self._steps += 1
        names, done = self.spec.names, self._steps >= self.length(self._seed)
        return (
            self._observe(),
            dict.fromkeys(names, float(actions["a"][0])),
            dict.fromkeys(names, done),
            dict.fromkeys(names, not done and self._steps >= self.spec.episode_limit),
            {},
        )

    def state(self) -> Float:
        return np.array([self._seed % 1000, self._steps], np.float32)

    def render(self) -> NDArray[np.uint8]:
        return np.zeros((1, 1, 3), np.uint8)

    def close(self) -> None: ...

    def _observe(self) -> Observations:
        return {"a": np.array([self._steps], np.float32), "b": self.state()}


@pytest.fixture
def walk(monkeypatch: pytest.MonkeyPatch) -> Stub:
    monkeypatch.setattr(registry, "make_environment", Walk)
    monkeypatch.setattr(registry, "simulator_versions", lambda task, **options: {"walk": "1.0"})
    return Stub(Walk.spec)


def episode_seeds(seed: int, count: int) -> list[tuple[int, int]]:
    words = [np.random.SeedSequence([seed, k]).generate_state(2) for k in range(count)]
    return [(int(environment), int(noise)) for environment, noise in words]


@pytest.mark.parametrize("num_envs", [1, 7, 32])
def test_the_first_episodes_are_taken_not_the_first_to_finish(
    tmp_path: Path, walk: Stub, num_envs: int
) -> None:
    summary = collect(
        "test/walk",
        walk,
        tmp_path / "d.hdf5",
        transitions=400,
        seed=5,
        behavior="x",
        num_envs=num_envs,
        workers=0,
    )
    dataset = read(tmp_path / "d.hdf5")
    expected: list[int] = []
    for environment, _ in episode_seeds(5, 500):
        if sum(expected) >= 400:
            break
        expected.append(min(Walk.length(environment), 50))
    assert dataset.episode_length.tolist() == expected
    assert max(expected) == 50
    assert min(expected) < 8
    assert dataset.episode_seeds is not None
    assert dataset.episode_seeds.tolist() == [e for e, _ in episode_seeds(5, len(expected))]
    assert summary["transitions"] == sum(expected) == dataset.transitions.size
    assert summary["digest"] == dataset.digest
    ends = np.cumsum(expected) - 1
    np.testing.assert_array_equal(dataset.timeout[ends], np.array(expected) == 50)
    np.testing.assert_array_equal(dataset.terminal[ends], np.array(expected) < 50)


def test_rows_are_what_happened(tmp_path: Path, walk: Stub) -> None:
    collect(
        "test/walk", walk, tmp_path / "d.hdf5", transitions=300, seed=5, behavior="x", num_envs=4, workers=0
    )
    dataset = read(tmp_path / "d.hdf5")
    for k, (environment, noise) in enumerate(episode_seeds(5, dataset.episode_start.size)):
        start, length = int(dataset.episode_start[k]), int(dataset.episode_length[k])
        steps = np.arange(length + 1)
        rows = slice(start, start + length + 1)
        np.testing.assert_array_equal(dataset.observations[rows, 0], np.stack([steps, 0 * steps], axis=1))
        np.testing.assert_array_equal(dataset.observations[rows, 1, 1], steps)
        np.testing.assert_array_equal(dataset.states[rows], dataset.observations[rows, 1])
        assert (dataset.states[rows, 0] == environment % 1000).all()
        noises = NoiseSource(Walk.spec, noise).draw(50)["a"][:length, 0]
        expected = np.tanh(np.float32(0.1) * steps[:-1].astype(np.float32) + noises)
        np.testing.assert_allclose(dataset.actions[start : start + length, 0, 0], expected, rtol=1e-6)
        np.testing.assert_array_equal(
            dataset.rewards[start : start + length], dataset.actions[start : start + length, 0, 0]
        )
    assert dataset.metadata["version_walk"] == "1.0"


def test_a_mixture_shares_out_transitions_and_marks_episodes(tmp_path: Path, walk: Stub) -> None:
    sources = [Source("early", walk, 1), Source("late", Stub(Walk.spec, gain=-3.0), 3)]
    reported: list[tuple[int, int]] = []
    collect_mixture(
        "test/walk",
        sources,
        tmp_path / "d.hdf5",
        transitions=1000,
        seed=1,
        behavior="medium-replay",
        num_envs=8,
        workers=0,
        progress=lambda done, total: reported.append((done, total)),
    )
    dataset = read(tmp_path / "d.hdf5")
    assert dataset.behaviors == ("early", "late")
    assert dataset.metadata["behavior"] == "medium-replay"
    behaviors = dataset.episode_behaviors
    assert behaviors is not None
    assert (np.diff(behaviors) >= 0).all()
    assert 250 <= dataset.episode_length[behaviors == 0].sum() < 300
    assert 1000 <= dataset.transitions.size < 1050
    assert dataset.episode_seeds is not None
    assert len(set(dataset.episode_seeds.tolist())) == behaviors.size
    late = dataset.episode_start[(behaviors == 1) & (dataset.episode_length == 50)][0]
    assert dataset.actions[late + 49, 0, 0] < -0.99  # gain -3 at step 49
    done = [count for count, _ in reported]
    assert done == sorted(done)
    assert reported[-1] == (1000, 1000)


def test_without_noise_the_policy_is_deterministic(tmp_path: Path, walk: Stub) -> None:
    collect(
        "test/walk",
        walk,
        tmp_path / "d.hdf5",
        transitions=50,
        seed=0,
        behavior="x",
        workers=0,
        temperature=0.0,
    )
    assert walk.noises
    assert all(noise is None for noise in walk.noises)
    assert read(tmp_path / "d.hdf5").metadata["temperature"] == 0.0


def test_an_interrupt_leaves_nothing(tmp_path: Path, walk: Stub) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > 500:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(
            "test/walk",
            walk,
            tmp_path / "d.hdf5",
            transitions=1000,
            seed=0,
            behavior="x",
            workers=0,
            progress=interrupt,
        )
    assert not list(tmp_path.iterdir())


def test_bad_input_is_named(tmp_path: Path, walk: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    def attempt(policy: Stub, transitions: int = 10, share: float = 1.0) -> None:
        collect_mixture(
            "test/walk",
            [Source("x", policy, share)],
            tmp_path / "d.hdf5",
            transitions=transitions,
            seed=0,
            behavior="x",
            workers=0,
        )

    with pytest.raises(ConfigError, match="transitions of at least 1"):
        attempt(walk, transitions=0)
    with pytest.raises(ConfigError, match=r"transitions of at least 1 .* got True and 0"):
        attempt(walk, transitions=True)
    with pytest.raises(ConfigError, match="share above 0"):
        attempt(walk, share=0)
    with pytest.raises(ContractError, match="policy x"):
        attempt(Stub(TeamSpec("other", Walk.spec.agents[:1], 2, 1.0)))
    monkeypatch.setattr(Walk, "length", staticmethod(lambda seed: 10**6))
    monkeypatch.setattr(Walk, "spec", TeamSpec("test/walk", Walk.spec.agents, 2, 1.0, episode_limit=5))
    step = Walk.step
    monkeypatch.setattr(
        Walk, "step", lambda self, actions: (*step(self, actions)[:3], {"a": False, "b": False}, {})
    )
    with pytest.raises(ContractError, match="did not end within 5 steps"):
        attempt(walk)
    assert not list(tmp_path.iterdir())


def test_hopper_is_recorded_alike_with_and_without_workers_and_can_be_stepped_again(tmp_path: Path) -> None:
    environment = MultiAgentMujoco(HOPPER)
    digests = [
        collect(
            HOPPER,
            Stub(environment.spec),
            tmp_path / f"{workers}.hdf5",
            transitions=400,
            seed=3,
            behavior="stub",
            num_envs=5,
            workers=workers,
        )["digest"]
        for workers in (0, 2)
    ]
    assert digests[0] == digests[1]
    dataset = read(tmp_path / "0.hdf5", HOPPER)
    assert dataset.transitions.size >= 400
    assert np.shares_memory(dataset.states, dataset.observations)
    assert "version_mujoco" in dataset.metadata
    assert dataset.episode_seeds is not None
    for k in range(dataset.episode_start.size):
        row = int(dataset.episode_start[k])
        observations, _ = environment.reset(int(dataset.episode_seeds[k]))
        total, terminated = 0.0, False
        for step in range(int(dataset.episode_length[k])):
            for i, name in enumerate(environment.possible_agents):
                np.testing.assert_array_equal(dataset.observations[row + step, i], observations[name])
            actions = dict(zip(environment.possible_agents, dataset.actions[row + step], strict=True))
            observations, rewards, terminations, _, _ = environment.step(actions)
            assert dataset.rewards[row + step] == np.float32(rewards["agent_0"])
            total, terminated = total + rewards["agent_0"], terminations["agent_0"]
        np.testing.assert_array_equal(
            dataset.observations[row + int(dataset.episode_length[k]), 2], observations["agent_2"]
        )
        assert terminated
        assert dataset.episode_returns[k] == pytest.approx(total, rel=1e-12)
