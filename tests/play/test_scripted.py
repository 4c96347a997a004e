"""Teams without networks: uniform draws by their distribution, and users' callables by what they are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omcda_deploy.datasets.formats.omiga_hdf5 import read
from omcda_deploy.errors import ConfigError, ContractError, OmcdaError, PluginError
from omcda_deploy.play.collect import collect
from omcda_deploy.play.scripted import CallableTeam, RandomTeam
from omcda_deploy.play.shipped import sources
from omcda_deploy.policy import NoiseSource
from omcda_deploy.registry import make_environment, tasks
from tests.support.own_simulators import CHOICES, LENGTH, SPEC, toward

OWN = "tests.support.own_simulators"


def zeros(spec: Any, rows: int) -> dict[str, Any]:
    return {agent.name: np.zeros((rows, agent.observation_size), np.float32) for agent in spec.agents}


def record(task: str, policy: str, folder: Path) -> None:
    team, out = CallableTeam(policy, make_environment(task).spec), folder / "a.hdf5"
    collect(task, team, out, transitions=20, seed=0, behavior="mine", num_envs=2, workers=0)


def test_random_actions_are_uniform_in_their_range() -> None:
    rows = 20_000
    decisions = RandomTeam(SPEC).act(zeros(SPEC, rows), noise=NoiseSource(SPEC, 0).draw(rows))
    for agent in SPEC.agents:
        action = decisions[agent.name].action
        assert action.shape == (rows, agent.action.size)
        assert action.dtype == np.float32
        assert agent.action.admits(action)
        counts = np.histogram(action, 10, (agent.action.low, agent.action.high))[0] / action.size
        np.testing.assert_allclose(counts, 0.1, atol=0.01)
        assert decisions[agent.name].divergence.tolist() == [0.0] * rows
    extreme = {name: np.full_like(values, 40.0) for name, values in NoiseSource(SPEC, 0).draw(2).items()}
    assert RandomTeam(SPEC).act(zeros(SPEC, 2), noise=extreme)["arm"].action.tolist() == [[2.0, 2.0]] * 2
    assert (
        RandomTeam(SPEC).act(zeros(SPEC, 2), noise={k: -v for k, v in extreme.items()})["base"].action.max()
        == -1
    )


def test_random_choices_are_uniform_among_the_available() -> None:
    rows = 20_000
    masks = {name: np.ones((rows, 2 + i), np.uint8) for i, name in enumerate(CHOICES.names)}
    masks["eye"][:, 1] = 0
    noise = NoiseSource(CHOICES, 0).draw(rows)
    decisions = RandomTeam(CHOICES).act(zeros(CHOICES, rows), noise=noise, action_masks=masks)
    shares = np.bincount(decisions["eye"].action, minlength=4) / rows
    np.testing.assert_allclose(shares, [1 / 3, 0, 1 / 3, 1 / 3], atol=0.015)
    assert set(RandomTeam(CHOICES).act(zeros(CHOICES, rows), noise=noise)["eye"].action.tolist()) == {
        0,
        1,
        2,
        3,
    }
    with pytest.raises(ConfigError, match="random actions have no mean: expected temperature 1"):
        RandomTeam(CHOICES).act(zeros(CHOICES, rows))


@pytest.mark.parametrize("task", [t for t in tasks() if not t.startswith("sma")] + [f"{OWN}:Choose"])
def test_every_task_can_be_recorded_at_random(task: str, tmp_path: Path) -> None:
    """The same episodes for every number of environments."""
    [source] = sources(task, "random")
    summaries = [
        collect(
            task,
            source.policy,
            tmp_path / f"{num_envs}.hdf5",
            transitions=30,
            seed=1,
            behavior=source.behavior,
            num_envs=num_envs,
            workers=0,
        )
        for num_envs in (1, 3)
    ]
    assert summaries[0]["digest"] == summaries[1]["digest"]
    dataset = read(tmp_path / "3.hdf5")
    assert dataset.behaviors == ("random",)
    assert len(np.unique(dataset.actions[dataset.transitions])) > 1


def test_a_callable_plays_as_it_would_in_its_own_loop(tmp_path: Path) -> None:
    task = f"{OWN}:Reach"
    team = CallableTeam(f"{OWN}:toward", make_environment(task).spec)
    collect(task, team, tmp_path / "a.hdf5", transitions=40, seed=3, behavior="mine", num_envs=3, workers=0)
    dataset = read(tmp_path / "a.hdf5")
    assert dataset.episode_seeds is not None
    for number, seed in enumerate(dataset.episode_seeds.tolist()):
        environment, episode = make_environment(task), dataset.episode(number)
        observations, _ = environment.reset(seed=seed)
        for step in range(LENGTH):
            actions = toward(observations)
            np.testing.assert_array_equal(episode.actions[step, 1], actions["arm"].astype(np.float32))
            observations, rewards, *_ = environment.step(actions)
            assert episode.rewards[step] == np.float32(rewards["base"])
    single = team.act({name: values[0] for name, values in zeros(SPEC, 1).items()})
    assert single["arm"].action.shape == (2,)
    assert single["arm"].divergence.shape == ()


def test_a_callable_that_asks_for_masks_gets_them(tmp_path: Path) -> None:
    record(f"{OWN}:Choose", f"{OWN}:last_available", tmp_path)
    dataset = read(tmp_path / "a.hdf5")
    assert np.unique(dataset.actions[dataset.transitions, 2]).tolist() == [3]


@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        (
            "too_far",
            ContractError,
            r"arm answered with the action \[0\.0, 2\.5\] in environment 0, step 1, expected ",
        ),
        (
            "not_finite",
            ContractError,
            r"base answered with the action \[nan\] in environment 0, step 1, expected num",
        ),
        ("too_short", ContractError, r"too_short: action of arm: expected numbers \[2\], got float64 \[1\]"),
        (
            "forgetful",
            ContractError,
            r"expected a dictionary with an action of each of base, arm, eye, got \['arm', ",
        ),
        (
            "silent",
            ContractError,
            "expected a dictionary with an action of each of base, arm, eye, got NoneType",
        ),
        (
            "failing",
            PluginError,
            r"failing: the policy raised KeyError: 'leg' \(.*own_simulators\.py, line \d+\)",
        ),
        (
            "of_two",
            PluginError,
            r"it is called as of_two\(…\), but is declared as \(observations.*: missing a requi",
        ),
        ("number", PluginError, "expected a callable, got 3"),
        ("towards", PluginError, "has no towards: did you mean 'toward'"),
    ],
)
def test_a_callable_that_does_not_fit_says_what_is_wrong(
    policy: str, error: type[OmcdaError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message) as refused:
        record(f"{OWN}:Reach", f"{OWN}:{policy}", tmp_path)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [1.5, np.array([1]), "one", None, True, -1, 4])
def test_choices_that_are_none_are_refused(
    value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.support import own_simulators

    monkeypatch.setattr(
        own_simulators, "chosen", lambda o: {"base": 0, "arm": 1, "eye": value}, raising=False
    )
    with pytest.raises(ContractError, match=r"eye.*expected (one|an) integer"):
        record(f"{OWN}:Choose", f"{OWN}:chosen", tmp_path)
