"""Recording of a loop of one's own, in environments of PettingZoo's parallel shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from omcda_deploy import RecordDataset, from_parallel, make_environment, read_dataset
from omcda_deploy.errors import ConfigError, ContractError, DatasetError
from omcda_deploy.spec import ActionSpec, AgentSpec, TeamSpec


class Pair:
    """A parallel environment as its users write them: two agents, one continuous number each."""

    possible_agents = ("left", "right")

    def __init__(self, limit: int = 20, discrete: bool = False) -> None:
        self.agents: list[str] = []
        self.metadata: dict[str, Any] = {}
        self.closed = False
        self.limit = limit
        self._discrete = discrete
        self._steps = 0

    def observation_space(self, agent: str) -> Any:
        return spaces.Box(-np.inf, np.inf, (2 if agent == "left" else 3,))

    def action_space(self, agent: str) -> Any:
        return spaces.Discrete(3) if self._discrete else spaces.Box(-2, 2, (1,))

    def _observe(self) -> dict[str, Any]:
        return {"left": np.full(2, self._steps, np.float32), "right": np.full(3, -self._steps, np.float32)}

    def reset(self, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
        self.agents, self._steps = list(self.possible_agents), 0
        return self._observe(), {name: {} for name in self.agents}

    def step(self, actions: dict[str, Any]) -> tuple[Any, Any, Any, Any, Any]:
        self._steps += 1
        names = list(self.agents)
        over = self._steps >= self.limit
        if over:
            self.agents = []
        return (
            self._observe(),
            dict.fromkeys(names, 0.5),
            dict.fromkeys(names, False),
            dict.fromkeys(names, over),
            {name: {} for name in names},
        )

    def state(self) -> Any:
        raise NotImplementedError  # as PettingZoo's base class does

    def close(self) -> None:
        self.closed = True


def action(steps: int) -> dict[str, Any]:
    return {"left": np.array([steps / 10]), "right": np.array([-steps / 10])}


def play(recorded: Any, steps: int, seed: int | None = None) -> None:
    recorded.reset(seed=seed)
    for step in range(steps):
        recorded.step(action(step))


TASK: dict[str, Any] = {"task": "cell/pair", "control_rate": 10}


def test_a_loop_of_ones_own_is_recorded(tmp_path: Path) -> None:
    environment = Pair(limit=4)
    with RecordDataset(
        environment, tmp_path / "d.hdf5", **TASK, episode_limit=9, behavior="operator"
    ) as recorded:
        assert recorded.limit == 4  # everything else is the environment's
        for seed in (7, 8):
            observations, _ = recorded.reset(seed=seed)
            while recorded.agents:
                observations, *_ = recorded.step({name: np.array([0.25]) for name in recorded.agents})
                assert set(observations) == {"left", "right"}
    assert environment.closed
    dataset = read_dataset(tmp_path / "d.hdf5")
    agents = (
        AgentSpec("left", 2, ActionSpec("continuous", 1, -2.0, 2.0)),
        AgentSpec("right", 3, ActionSpec("continuous", 1, -2.0, 2.0)),
    )
    assert dataset.spec == TeamSpec("cell/pair", agents, 6, 10.0, episode_limit=9)
    assert (dataset.episode_length.tolist(), dataset.behaviors) == ([4, 4], ("operator",))
    assert dataset.episode_seeds is not None
    assert dataset.episode_seeds.tolist() == [7, 8]
    assert dataset.timeout.sum() == 2
    np.testing.assert_array_equal(dataset.observations[:5, 0, 0], np.arange(5))
    np.testing.assert_array_equal(dataset.observations[:5, 1, 2], -np.arange(5))
    assert dataset.actions[dataset.transitions].tolist() == [[[0.25], [0.25]]] * 8
    assert dataset.episode_returns.tolist() == [2.0, 2.0]


def test_what_is_recorded_fits_the_environment_as_a_simulator(tmp_path: Path) -> None:
    """A team that learned from a recording can be played in the environment itself."""
    environment = Pair(limit=4)
    environment.metadata = {"render_fps": 25}
    with RecordDataset(environment, tmp_path / "d.hdf5", task="cell/pair") as recorded:
        play(recorded, 4)
    spec = read_dataset(tmp_path / "d.hdf5").spec
    assert spec.control_rate == 25.0
    assert (
        spec.contract_hash == from_parallel(Pair(), task="module:Pair", control_rate=25.0).spec.contract_hash
    )


def test_what_the_loop_saw_is_what_is_recorded(tmp_path: Path) -> None:
    """In an environment of this package: it has a spec, masks in its infos, a state, and ends by itself."""
    environment = make_environment("toy/masked")
    generator = np.random.default_rng(0)
    seen: list[dict[str, list[Any]]] = []
    with RecordDataset(environment, tmp_path / "d.hdf5") as recorded:
        for seed in (1, 2, 3):
            observations, infos = recorded.reset(seed=seed)
            rows: dict[str, list[Any]] = {name: [] for name in ("o", "s", "m", "a", "r", "end")}
            seen.append(rows)
            over = False
            while True:
                rows["o"].append(list(observations.values()))
                rows["s"].append(environment.state())
                rows["m"].append([info["action_mask"] for info in infos.values()])
                if over:
                    break
                choices = [int(generator.choice(np.flatnonzero(mask))) for mask in rows["m"][-1]]
                actions = dict(zip(environment.spec.names, choices, strict=True))
                observations, rewards, terminated, truncated, infos = recorded.step(actions)
                rows["a"].append(choices)
                rows["r"].append(rewards["agent_0"])
                rows["end"] = [truncated["agent_0"]]
                over = terminated["agent_0"] or truncated["agent_0"]
    dataset = read_dataset(tmp_path / "d.hdf5")
    assert dataset.spec == environment.spec
    for number, rows in enumerate(seen):
        episode = dataset.episode(number)
        np.testing.assert_array_equal(episode.observations, rows["o"])
        np.testing.assert_array_equal(episode.states, rows["s"])
        np.testing.assert_array_equal(np.array(episode.action_masks), rows["m"])
        np.testing.assert_array_equal(episode.actions, rows["a"])
        np.testing.assert_array_equal(episode.rewards, np.array(rows["r"], np.float32))
        assert (episode.timeout, episode.seed) == (rows["end"][0], number + 1)


def test_episodes_that_the_loop_leaves_are_cut_by_a_time_limit(tmp_path: Path) -> None:
    recorded = RecordDataset(Pair(), tmp_path / "d.hdf5", **TASK)
    recorded.reset()  # left without a step: no episode
    play(recorded, 3)
    play(recorded, 2)
    recorded.close()
    recorded.close()
    dataset = read_dataset(tmp_path / "d.hdf5")
    assert (dataset.episode_length.tolist(), dataset.timeout.tolist()) == (
        [3, 2],
        [False, False, True, False, True],
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_finished_episodes_survive_a_loop_that_fails(tmp_path: Path, error: type[BaseException]) -> None:
    environment = Pair(limit=3)

    def loop() -> None:
        with RecordDataset(environment, tmp_path / "d.hdf5", **TASK) as recorded:
            play(recorded, 3)
            play(recorded, 2)
            raise error

    with pytest.raises(error):
        loop()
    assert environment.closed
    assert read_dataset(tmp_path / "d.hdf5").episode_length.tolist() == [3]
    assert [path.name for path in tmp_path.iterdir()] == ["d.hdf5"]


def test_a_loop_that_finishes_nothing_leaves_nothing(tmp_path: Path) -> None:
    def fail(steps: int, path: str) -> None:
        with RecordDataset(Pair(), tmp_path / path, **TASK) as recorded:
            play(recorded, steps)
            raise RuntimeError

    for steps in (0, 2):
        with pytest.raises(RuntimeError):
            fail(steps, "d.hdf5")
    recorded = RecordDataset(Pair(), tmp_path / "d.hdf5", **TASK)
    recorded.reset()
    with pytest.raises(DatasetError, match="expected at least one episode"):
        recorded.close()
    assert not list(tmp_path.iterdir())


class Broken(Pair):
    """Says something wrong in the third step."""

    wrong: Callable[[Any], None]

    def step(self, actions: dict[str, Any]) -> tuple[Any, Any, Any, Any, Any]:
        said = super().step(actions)
        if self._steps == 3:
            type(self).wrong(said)
        return said


def swapped(index: int, **changed: Any) -> Callable[[Any], None]:
    return lambda said: said[index].update(changed)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            swapped(1, right=1.5),
            "step 2: expected one reward for the whole team, got 0.5 for left and 1.5 for right",
        ),
        (swapped(2, right=True), "step 2: expected one termination .* got False for left and True for right"),
        (swapped(3, left=True), "step 2: expected one truncation .* got True for left and False for right"),
        (
            lambda said: said[0].pop("right"),
            "step 2: expected observations of left, right, those of right are missing",
        ),
        (
            lambda said: said[1].pop("left"),
            "step 2: expected rewards of left, right, those of left are missing",
        ),
        (lambda said: said[2].clear(), "step 2: expected terminations of left, right"),
        (
            swapped(0, left=np.zeros(3)),
            r"observation of left: expected 2 numbers, got float64 of shape \[3\]",
        ),
        (swapped(0, left="seen"), "observation of left: expected 2 numbers, got <U4"),
    ],
)
def test_an_environment_that_contradicts_itself_is_named_with_agent_and_step(
    tmp_path: Path, wrong: Callable[[Any], None], message: str
) -> None:
    environment = type("Wrong", (Broken,), {"wrong": staticmethod(wrong)})(limit=4)

    def loop() -> None:
        with RecordDataset(environment, tmp_path / "d.hdf5", **TASK) as recorded:
            play(recorded, 4)

    with pytest.raises(ContractError, match=f"cell/pair: .*{message}"):
        loop()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("rule", "expected"), [("sum", 2.0), ("mean", 1.0)])
def test_rewards_that_differ_are_joined_by_the_users_rule(tmp_path: Path, rule: Any, expected: float) -> None:
    environment = type("Wrong", (Broken,), {"wrong": staticmethod(swapped(1, right=1.5))})(limit=4)
    with RecordDataset(environment, tmp_path / "d.hdf5", **TASK, reward=rule) as recorded:
        play(recorded, 4)
    half = 0.5 if rule == "mean" else 1.0
    assert read_dataset(tmp_path / "d.hdf5").rewards[:4].tolist() == [half, half, expected, half]


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ({"left": np.zeros(1)}, "step 0: expected actions of left, right, those of right are missing"),
        (
            {"left": np.zeros(1), "right": np.zeros(2)},
            r"step 0: action of right: expected 1 numbers.* shape \[2\]",
        ),
        ({"left": np.zeros(1), "right": "up"}, "step 0: action of right: expected 1 numbers, got <U2"),
    ],
)
def test_wrong_actions_are_named(tmp_path: Path, actions: Any, message: str) -> None:
    recorded = RecordDataset(Pair(), tmp_path / "d.hdf5", **TASK)
    with pytest.raises(ContractError, match="no episode is running: call reset"):
        recorded.step(actions)
    recorded.reset()
    with pytest.raises(ContractError, match=message):
        recorded.step(actions)
    recorded.step(action(0))  # the loop may go on with a right one
    recorded.close()
    assert read_dataset(tmp_path / "d.hdf5").episode_length.tolist() == [1]


def test_a_step_that_fails_may_be_tried_again(tmp_path: Path) -> None:
    class Stuttering(Pair):
        stutters = 0

        def step(self, actions: dict[str, Any]) -> tuple[Any, Any, Any, Any, Any]:
            if self._steps == 1 and not self.stutters:
                self.stutters += 1
                raise TimeoutError
            return super().step(actions)

    with RecordDataset(Stuttering(limit=3), tmp_path / "d.hdf5", **TASK) as recorded:
        recorded.reset()
        recorded.step(action(1))
        with pytest.raises(TimeoutError):
            recorded.step(action(9))
        recorded.step(action(2))
        recorded.step(action(3))
    dataset = read_dataset(tmp_path / "d.hdf5")
    np.testing.assert_allclose(dataset.actions[dataset.transitions, 0, 0], [0.1, 0.2, 0.3], rtol=1e-6)
    np.testing.assert_array_equal(dataset.observations[:, 0, 0], range(4))


def test_values_that_cannot_be_trained_on_are_refused_when_the_episode_ends(tmp_path: Path) -> None:
    environment = type("Wrong", (Broken,), {"wrong": staticmethod(swapped(0, left=np.full(2, np.nan)))})(
        limit=4
    )
    recorded = RecordDataset(environment, tmp_path / "d.hdf5", **TASK)
    play(recorded, 2)
    with pytest.raises(DatasetError, match="array o holds NaN or infinity, first in row"):
        play(recorded, 4)
    recorded.close()
    assert read_dataset(tmp_path / "d.hdf5").episode_length.tolist() == [2]


def test_settings_that_cannot_work(tmp_path: Path) -> None:
    path = tmp_path / "d.hdf5"
    for settings in ({}, {"task": "a/b"}, {"control_rate": 10}):
        with pytest.raises(ConfigError, match="expected spec, or task and control_rate"):
            RecordDataset(Pair(), path, **settings)
    with pytest.raises(ConfigError, match="reward: expected shared, sum, mean, got 'first'"):
        RecordDataset(Pair(), path, **TASK, reward="first")  # type: ignore[arg-type]
    with pytest.raises(DatasetError, match=r"expected a name ending in \.hdf5"):
        RecordDataset(Pair(), tmp_path / "d.npz", **TASK)
    path.touch()
    with pytest.raises(DatasetError, match="exists already"):
        RecordDataset(Pair(), path, **TASK)
    with pytest.raises(DatasetError, match="metadata 'digest'"):
        RecordDataset(Pair(), tmp_path / "e.hdf5", **TASK, metadata={"digest": "x"}).reset()


def test_buffers_that_an_environment_fills_anew_are_copied(tmp_path: Path) -> None:
    class Reusing(Pair):
        def __init__(self) -> None:
            super().__init__(limit=3, discrete=True)
            self._buffers = {"left": np.zeros(2), "right": np.zeros(3), "state": np.zeros(4)}
            self._masks = {name: np.ones(3, np.int8) for name in self.possible_agents}

        def _observe(self) -> dict[str, Any]:
            for values in self._buffers.values():
                values[:] = self._steps
            for mask in self._masks.values():
                mask[:] = np.arange(3) <= self._steps
            return {
                name: {"observation": self._buffers[name], "action_mask": self._masks[name]}
                for name in self._masks
            }

        def state(self) -> Any:
            return self._buffers["state"]

    actions = {name: np.zeros((), np.int64) for name in Pair.possible_agents}
    with RecordDataset(Reusing(), tmp_path / "d.hdf5", **TASK) as recorded:
        recorded.reset()
        while recorded.agents:
            recorded.step(actions)
            for action in actions.values():
                action += 1
    dataset = read_dataset(tmp_path / "d.hdf5")
    assert dataset.states[:, 0].tolist() == dataset.observations[:, 1, 2].tolist() == [0, 1, 2, 3]
    assert dataset.actions[:3, 0].tolist() == [0, 1, 2]
    assert dataset.action_masks is not None
    assert dataset.action_masks[:, 0].sum(axis=1).tolist() == [1, 2, 3, 3]


def test_choices_and_states_are_recorded(tmp_path: Path) -> None:
    class Stateful(Pair):
        def state(self) -> Any:
            return np.array([[self._steps, 1.0], [2.0, 3.0]])

    with RecordDataset(Stateful(limit=3, discrete=True), tmp_path / "d.hdf5", **TASK) as recorded:
        recorded.reset()
        while recorded.agents:
            recorded.step({"left": 2, "right": np.int64(0)})
        recorded.reset()
        with pytest.raises(ContractError, match="action of left: expected an integer, got float64"):
            recorded.step({"left": 0.5, "right": 0})
    dataset = read_dataset(tmp_path / "d.hdf5")
    assert dataset.spec.state_size == 4
    np.testing.assert_array_equal(dataset.states, [[step, 1, 2, 3] for step in range(4)])
    assert dataset.actions[:3].tolist() == [[2, 0]] * 3
    assert dataset.action_masks is not None
    assert dataset.action_masks.all()
