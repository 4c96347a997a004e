"""Episodes written from memory, read back, and refused where they do not fit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from omcda_deploy.datasets import Dataset, Episode, merging
from omcda_deploy.datasets.formats import omiga_hdf5
from omcda_deploy.datasets.merging import concatenate
from omcda_deploy.datasets.writer import DatasetWriter, write_dataset
from omcda_deploy.errors import DatasetError
from omcda_deploy.registry import read_dataset
from tests.support.episodes import SPECS, random_episode, require_equal
from tests.support.synthetic import unequal_spec
from tests.support.synthetic import write_dataset as synthetic_dataset


@pytest.mark.parametrize("kind", SPECS)
def test_episodes_come_back_one_by_one(tmp_path: Path, kind: str) -> None:
    spec = SPECS[kind]
    episodes = [random_episode(spec, steps, steps, timeout=steps == 2) for steps in (3, 2, 5)]
    summary = write_dataset(
        tmp_path / "d.hdf5", spec, iter(episodes), metadata={"rig": "A", "trial": 7}, behavior="operator"
    )
    dataset = read_dataset(tmp_path / "d.hdf5")
    assert dataset.spec == spec
    for number, episode in enumerate(episodes):
        require_equal(dataset.episode(number), episode)
    returns = [episode.undiscounted_return for episode in episodes]
    assert summary == {
        "path": str(tmp_path / "d.hdf5"),
        "task": spec.task,
        "behavior": "operator",
        "episodes": 3,
        "transitions": 10,
        "return_mean": np.mean(returns),
        "return_std": np.std(returns),
        "digest": dataset.digest,
    }
    assert dataset.behaviors == ("operator",)
    assert dataset.metadata == {"behavior": "operator", "rig": "A", "trial": 7, "task": spec.task}
    assert np.flatnonzero(dataset.timeout).tolist() == [4]


@pytest.mark.parametrize("number", [-1, 2, 10**9])
def test_an_episode_that_is_not_there_is_named(tmp_path: Path, number: int) -> None:
    spec = SPECS["continuous"]
    write_dataset(tmp_path / "d.hdf5", spec, [random_episode(spec, 2), random_episode(spec, 1)])
    with pytest.raises(
        DatasetError, match=f"episode {number}: expected a number from 0 to 1, as .* 2 closed"
    ):
        read_dataset(tmp_path / "d.hdf5").episode(number)


def test_other_number_types_are_converted(tmp_path: Path) -> None:
    spec = SPECS["discrete"]
    episode = random_episode(spec, 4)
    wide = replace(
        episode,
        observations=episode.observations.astype(np.float64),
        states=episode.states.astype(np.float64),
        actions=episode.actions.astype(np.uint8),
        rewards=episode.rewards.astype(np.float64),
        action_masks=np.asarray(episode.action_masks, np.bool_),
    )
    digests = [write_dataset(tmp_path / "d.hdf5", spec, [e])["digest"] for e in (episode, wide)]
    assert digests[0] == digests[1] == read_dataset(tmp_path / "d.hdf5").digest


CONTINUOUS, DISCRETE = (random_episode(SPECS[kind], 4) for kind in ("continuous", "discrete"))


@pytest.mark.parametrize(
    ("episode", "message"),
    [
        (
            replace(CONTINUOUS, observations=CONTINUOUS.observations[:4]),
            r"d\.hdf5: episode 1: observations: expected shape \[5, 3, 5\] .* got \[4, 3, 5\]",
        ),
        (
            replace(CONTINUOUS, states=CONTINUOUS.states[..., 1:]),
            r"states: expected shape \[5, 7\] .* got \[5, 6\]",
        ),
        (
            replace(CONTINUOUS, actions=CONTINUOUS.actions[:, :2]),
            r"actions: expected shape \[4, 3, 2\] .* got \[4, 2, 2\]",
        ),
        (
            replace(CONTINUOUS, rewards=CONTINUOUS.rewards[:, None]),
            r"rewards: expected shape \[4\] .* got \[4, 1\]",
        ),
        (
            replace(CONTINUOUS, observations=np.full((5, 3, 5), "x"), label="trial 9"),
            "trial 9: observations: expected numbers, got <U1",
        ),
        (
            replace(CONTINUOUS, actions=np.full((4, 3, 2), np.inf)),
            "array a holds NaN or infinity, first in row 5",
        ),
        (
            replace(CONTINUOUS, action_masks=DISCRETE.action_masks),
            "action masks with discrete ones, and with no",
        ),
        (replace(CONTINUOUS, actions=CONTINUOUS.actions[:0]), "expected 1 to 1000 steps, .* got 0"),
        (
            random_episode(SPECS["continuous"], 1001),
            r"d\.hdf5: episode 1: expected 1 to 1000 steps, .* got 1001",
        ),
        (replace(DISCRETE, action_masks=None), "expected action masks with discrete ones"),
        (
            replace(DISCRETE, action_masks=np.ones((4, 2, 4), np.uint8)),
            r"action masks: expected shape \[5, 2, 4\] .* got \[4, 2, 4\]",
        ),
        (
            replace(DISCRETE, actions=DISCRETE.actions.astype(np.float32)),
            "actions: expected integers, got float32",
        ),
        (replace(DISCRETE, actions=DISCRETE.actions + 4), "row 5: expected one of the actions .* got"),
        (
            replace(CONTINUOUS, actions=np.where(np.arange(2) == 1, [[[0], [-7], [2]]] * 4, 0.0)),
            "episode 1: actions: expected numbers from -1 to 1 of agent_1, got -7 in row 0, column 1: give",
        ),
        (
            replace(DISCRETE, observations=np.ones((5, 2, 5), np.float32), label="trial 9"),
            "trial 9: observations: expected 0 behind the 4 numbers of agent_0, got 1 in row 0, column 4: clear",
        ),
    ],
)
def test_an_episode_that_does_not_fit_leaves_nothing_behind(
    tmp_path: Path, episode: Episode, message: str
) -> None:
    spec = SPECS["continuous" if episode.actions.ndim == 3 else "discrete"]
    (tmp_path / "d.hdf5").write_text("an older file")
    with pytest.raises(DatasetError, match=message):
        write_dataset(tmp_path / "d.hdf5", spec, [random_episode(spec, 4), episode])
    assert [path.name for path in tmp_path.iterdir()] == ["d.hdf5"]
    assert (tmp_path / "d.hdf5").read_text() == "an older file"


@pytest.mark.parametrize("array", ["o", "a"])
def test_numbers_that_no_served_policy_would_see_are_refused(tmp_path: Path, array: str) -> None:
    """The base observes 3 numbers of 4 and does 1 of 2: training would see the others."""
    spec = unequal_spec()
    path = synthetic_dataset(tmp_path / "d.hdf5", spec, [3, 2])
    episode = read_dataset(path).episode(1)
    changed = replace(episode, observations=episode.observations.copy(), actions=episode.actions.copy())
    (changed.observations if array == "o" else changed.actions)[1, 0, -1] = 0.5
    message = r"expected 0 behind the [31] numbers of base, got 0\.5 in row 1, column [31]: clear it"
    with pytest.raises(DatasetError, match=message):
        write_dataset(tmp_path / "no.hdf5", spec, [changed])
    with h5py.File(path, "r+") as file:
        file[array][5, 0, -1] = 0.5
    with pytest.raises(DatasetError, match=rf"d\.hdf5: {array}: .* base, got 0\.5 in row 5, column"):
        read_dataset(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        *(
            ({"timeout": value}, "timeout: expected True or False, got ")
            for value in (None, np.nan, "False", np.array([0, 1]), 2)
        ),
        *(
            ({"seed": value}, "seed: expected a whole number of 64 bits, or None, got ")
            for value in (2**70, 0.5, "1")
        ),
        *(
            ({"episode_return": value}, "episode_return: expected a finite number, or None, got ")
            for value in (np.nan, "1", [1.0])
        ),
    ],
)
def test_single_values_that_say_nothing_are_refused(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(DatasetError, match=rf"d\.hdf5: episode 0: {message}"):
        write_dataset(tmp_path / "d.hdf5", SPECS["continuous"], [replace(CONTINUOUS, **values)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("timeout", [1, np.True_, np.float64(1), np.array(1)])
def test_a_time_limit_may_be_said_by_a_number(tmp_path: Path, timeout: Any) -> None:
    write_dataset(tmp_path / "d.hdf5", SPECS["continuous"], [replace(CONTINUOUS, timeout=timeout, seed=3)])
    episode = read_dataset(tmp_path / "d.hdf5").episode(0)
    assert (episode.timeout, episode.seed) == (True, 3)


@pytest.mark.parametrize("metadata", [{"rig": None}, {"rig": [1, 2]}, {"digest": "x"}, {"spec": "x"}])
def test_metadata_that_no_file_can_hold_are_named(tmp_path: Path, metadata: dict[str, Any]) -> None:
    (name,) = metadata
    with pytest.raises(
        DatasetError, match=f"metadata '{name}': expected a string or a number under a name other"
    ):
        write_dataset(tmp_path / "d.hdf5", SPECS["continuous"], [CONTINUOUS], metadata=metadata)
    assert not list(tmp_path.iterdir())


def test_a_name_that_could_not_be_read_again_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError, match=r"d\.npz: expected a name ending in \.hdf5 or \.h5: choose another"
    ):
        write_dataset(tmp_path / "d.npz", SPECS["continuous"], [CONTINUOUS])
    assert not list(tmp_path.iterdir())


def test_a_source_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted() -> Iterator[Episode]:
        yield CONTINUOUS
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "d.hdf5", SPECS["continuous"], interrupted())
    assert not list(tmp_path.iterdir())


def test_all_states_of_a_file_are_laid_out_alike(tmp_path: Path) -> None:
    spec = replace(SPECS["continuous"], state_size=15)
    episode = random_episode(spec, 4)
    joined = replace(episode, states=episode.observations.reshape(5, 15))
    per_agent = replace(episode, states=episode.observations + 1)
    with pytest.raises(DatasetError, match="all observations joined before row 5, and no longer is"):
        write_dataset(tmp_path / "d.hdf5", spec, [joined, episode])
    with pytest.raises(DatasetError, match=r"states: expected shape \[T\+1, S\].* got \[5, 3, 5\]"):
        write_dataset(tmp_path / "d.hdf5", spec, [episode, per_agent])
    with pytest.raises(DatasetError, match=r"states: expected shape \[T\+1, N, S / N\].* got \[5, 15\]"):
        write_dataset(tmp_path / "d.hdf5", spec, [per_agent, episode])
    write_dataset(tmp_path / "d.hdf5", spec, [per_agent])
    np.testing.assert_array_equal(read_dataset(tmp_path / "d.hdf5").states, per_agent.states.reshape(5, 15))


def test_declared_behaviors_keep_their_order(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "d.hdf5", SPECS["continuous"], {}) as writer:
        writer.declare_behaviors(["first", "idle"])
        for behavior in ("later", "first"):
            writer.append(CONTINUOUS, behavior)
    dataset = read_dataset(tmp_path / "d.hdf5")
    assert dataset.behaviors == ("first", "idle", "later")
    assert dataset.episode_behaviors is not None
    assert dataset.episode_behaviors.tolist() == [2, 0]


def test_joined_files_keep_the_metadata_that_all_of_them_state_alike(tmp_path: Path) -> None:
    spec = SPECS["continuous"]
    metadata_of: dict[str, dict[str, Any]] = {
        "one": {"rig": "A", "trial": 1, "site": "x"},
        "two": {"rig": "A", "trial": 2},
    }
    for seed, (name, metadata) in enumerate(metadata_of.items()):
        episode = random_episode(spec, 4, seed)
        write_dataset(tmp_path / f"{name}.hdf5", spec, [episode], metadata=metadata, behavior=name)
    concatenate([tmp_path / "one.hdf5", tmp_path / "two.hdf5"], tmp_path / "both.hdf5")
    assert read_dataset(tmp_path / "both.hdf5").metadata == {
        "behavior": "one+two",
        "rig": "A",
        "task": spec.task,
    }


def test_each_joined_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []

    def reading(path: Path) -> Dataset:
        seen.append(path)
        return omiga_hdf5.read(path)

    monkeypatch.setattr(merging, "read", reading)
    paths = [tmp_path / f"{name}.hdf5" for name in ("one", "two")]
    for seed, path in enumerate(paths):
        write_dataset(path, SPECS["continuous"], [random_episode(SPECS["continuous"], 4, seed)])
    concatenate(paths, tmp_path / "both.hdf5")
    assert seen == paths


def test_files_of_the_same_episodes_are_not_joined(tmp_path: Path) -> None:
    """Under whatever names and labels."""
    paths = [tmp_path / f"{name}.hdf5" for name in ("one", "two", "three")]
    for path, seed in zip(paths, (0, 1, 0), strict=True):
        episode = random_episode(SPECS["continuous"], 4, seed)
        write_dataset(path, SPECS["continuous"], [episode], behavior=path.stem)
    with pytest.raises(
        DatasetError, match=rf"^{paths[0]} and {paths[2]} hold the same episodes: record each with"
    ):
        concatenate(paths, tmp_path / "both.hdf5")
    with pytest.raises(DatasetError, match="hold the same episodes"):
        concatenate([paths[1], paths[1]], tmp_path / "both.hdf5")
    assert sorted(tmp_path.iterdir()) == sorted(paths)


@pytest.mark.parametrize(("shared", "refused"), [(1, False), (2, True)])
def test_files_that_overlap_are_not_joined(
    tmp_path: Path, shared: int, refused: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever their episodes are said to earn; a single one of many may be chance."""
    spec = SPECS["continuous"]
    one, two = (
        [random_episode(spec, 2, seed) for seed in range(first, first + 21)] for first in (0, 21 - shared)
    )
    write_dataset(tmp_path / "one.hdf5", spec, one)
    write_dataset(tmp_path / "two.hdf5", spec, [replace(e, rewards=e.rewards + 1) for e in two])
    files, found = (
        [tmp_path / "one.hdf5", tmp_path / "two.hdf5"],
        f"{shared} of the 21 episodes of .*two.hdf5 are in",
    )
    if refused:
        with pytest.raises(
            DatasetError, match=f"^{found} .*one.hdf5 too: merge the files that they come from"
        ):
            concatenate(files, tmp_path / "both.hdf5")
        assert not (tmp_path / "both.hdf5").exists()
    else:
        concatenate(files, tmp_path / "both.hdf5")
        assert re.match(found, caplog.messages[0])


def test_games_that_repeat_themselves_are_joined(tmp_path: Path) -> None:
    spec = SPECS["discrete"]
    for name, seeds in (("one", [0, 1, 0]), ("two", [0, 1, 1])):
        write_dataset(tmp_path / f"{name}.hdf5", spec, [random_episode(spec, 2, seed) for seed in seeds])
    concatenate([tmp_path / "one.hdf5", tmp_path / "two.hdf5"], tmp_path / "both.hdf5")
