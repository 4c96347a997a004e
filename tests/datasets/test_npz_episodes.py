"""Folders of .npz episodes: what a user's own logs are imported from."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from omcda_deploy.datasets import Episode
from omcda_deploy.datasets.convert import convert
from omcda_deploy.datasets.formats import npz_episodes
from omcda_deploy.errors import ConfigError, DatasetError, OmcdaError, UnknownNameError
from omcda_deploy.registry import read_dataset, team_spec
from omcda_deploy.spec import ActionSpec, TeamSpec
from tests.support.episodes import SPECS, random_episode, require_equal

Arrays = dict[str, NDArray[Any]]


def arrays_of(episode: Episode, *, masks: bool = True, states: bool = True) -> Arrays:
    arrays: Arrays = {
        "observations": episode.observations,
        "actions": episode.actions,
        "rewards": np.asarray(episode.rewards),
        "timeout": np.array(episode.timeout),
        "seed": np.array(episode.seed),
    }
    if masks and episode.action_masks is not None:
        arrays["action_masks"] = episode.action_masks
    if states:
        arrays["states"] = episode.states
    return arrays


def save(folder: Path, *episodes: Arrays) -> Path:
    folder.mkdir(exist_ok=True)
    for number, arrays in enumerate(episodes):
        np.savez(folder / f"{number:03}.npz", **arrays)  # type: ignore[arg-type]
    return folder


@pytest.mark.parametrize("kind", SPECS)
def test_episodes_come_back_as_they_were_saved(tmp_path: Path, kind: str) -> None:
    spec = SPECS[kind]
    episodes = [random_episode(spec, steps, steps, timeout=steps == 2) for steps in (3, 2, 5)]
    logs = save(tmp_path / "logs", *map(arrays_of, episodes))
    (logs / "README.md").write_text("of the rig")
    assert npz_episodes.recognizes(logs)
    summary = convert(logs, tmp_path / "d.hdf5", team=spec)
    dataset = read_dataset(tmp_path / "d.hdf5")
    assert (summary["task"], summary["episodes"], dataset.spec) == (spec.task, 3, spec)
    for number, episode in enumerate(episodes):
        require_equal(dataset.episode(number), episode)
    assert dataset.metadata["source_format"] == "npz_episodes"


def test_a_new_task_is_named_and_its_sizes_are_the_arrays(tmp_path: Path) -> None:
    continuous, discrete = (random_episode(SPECS[kind], 4) for kind in SPECS)
    logs = save(tmp_path / "logs", arrays_of(continuous, states=False))
    convert(logs, tmp_path / "d.hdf5", task="cell/reach", control_rate=12.5, episode_limit=50)
    dataset = read_dataset(tmp_path / "d.hdf5")
    assert dataset.spec == TeamSpec(
        "cell/reach",
        tuple(replace(a, name=f"agent_{i}") for i, a in enumerate(SPECS["continuous"].agents)),
        state_size=15,
        control_rate=12.5,
        episode_limit=50,
    )
    np.testing.assert_array_equal(dataset.states, continuous.observations.reshape(5, 15))
    choices = save(tmp_path / "choices", arrays_of(discrete))
    convert(choices, tmp_path / "c.hdf5", task="cell/sort", control_rate=1)
    spec = read_dataset(tmp_path / "c.hdf5").spec
    assert [(agent.observation_size, agent.action) for agent in spec.agents] == [
        (5, ActionSpec("discrete", 4))
    ] * 2
    assert (spec.state_size, spec.episode_limit) == (6, 1000)


def test_choices_without_masks_are_all_available_to_a_team_that_is_described(tmp_path: Path) -> None:
    spec = SPECS["discrete"]
    episode = random_episode(spec, 4)
    logs = save(tmp_path / "logs", arrays_of(episode, masks=False))
    convert(logs, tmp_path / "d.hdf5", team=spec)
    require_equal(read_dataset(tmp_path / "d.hdf5").episode(0), episode)
    with pytest.raises(DatasetError, match=r"000\.npz: expected action_masks .* or --team FILE"):
        convert(logs, tmp_path / "n.hdf5", task="cell/sort", control_rate=1)


@pytest.mark.parametrize("kind", SPECS)
def test_rows_for_every_observation_are_padded_with_nan(tmp_path: Path, kind: str) -> None:
    spec = SPECS[kind]
    episode = random_episode(spec, 4)
    arrays = arrays_of(episode)
    for name in ("actions", "rewards"):
        values = arrays[name].astype(np.float64)
        arrays[name] = np.concatenate([values, np.full_like(values[:1], np.nan)])
    arrays["rewards"] = np.stack([arrays["rewards"]] * len(spec.agents), axis=1)
    convert(save(tmp_path / "logs", arrays), tmp_path / "d.hdf5", team=spec)
    require_equal(read_dataset(tmp_path / "d.hdf5").episode(0), episode)
    arrays["observations"][-1] = np.nan
    arrays["states"] = arrays["states"].copy()
    arrays["states"][-1] = np.nan
    convert(save(tmp_path / "logs", arrays), tmp_path / "unseen.hdf5", team=spec)
    again = read_dataset(tmp_path / "unseen.hdf5").episode(0)
    np.testing.assert_array_equal(again.observations[-1], episode.observations[-2])
    np.testing.assert_array_equal(again.states[-1], episode.states[-2])


def longer(name: str) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {**arrays, name: np.concatenate([arrays[name], arrays[name][-1:]])}


def with_value(name: str, where: Any, value: float) -> Callable[[Arrays], Arrays]:
    def apply(arrays: Arrays) -> Arrays:
        values = arrays[name].astype(np.float64)
        values[where] = value
        return {**arrays, name: values}

    return apply


def given(**changed: Any) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {**arrays, **{name: np.asarray(value) for name, value in changed.items()}}


def without(name: str) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {key: value for key, value in arrays.items() if key != name}


# In the second of two episodes of 4 steps; three agents with observations of 5 and actions of 2.
WRONG: dict[str, tuple[Callable[[Arrays], Arrays], str]] = {
    "T+1 actions": (
        lambda a: longer("rewards")(longer("actions")(a)),
        r"observations: expected shape \[6, 3, 5\] .* got \[5, 3, 5\]: an episode has one observation more than",
    ),
    "T+1 actions, T rewards": (longer("actions"), "an episode has one observation more than actions"),
    "T+1 rewards": (longer("rewards"), r"rewards: expected shape \[4\] .* got \[5\]"),
    "T states": (
        lambda a: {**a, "states": a["states"][:-1]},
        r"states: expected shape \[5, 7\] .* got \[4, 7\]",
    ),
    "no axis of agents": (
        lambda a: {**a, "observations": a["observations"].reshape(5, 15)},
        r"observations: expected shape \[T\+1, N, O\], got \[5, 15\]",
    ),
    "an axis too many": (
        lambda a: {**a, "actions": a["actions"][..., None]},
        r"actions: expected shape \[T, N, A\] of numbers, got \[4, 3, 2, 1\]",
    ),
    "flat actions": (
        lambda a: {**a, "actions": a["actions"][..., 0]},
        r"actions: expected shape \[T, N, A\] of numbers, got \[4, 3\]",
    ),
    "rewards of rank 3": (
        lambda a: {**a, "rewards": a["rewards"][:, None, None]},
        r"rewards: expected shape \[T\], or \[T, N\], got \[4, 1, 1\]",
    ),
    "two agents' actions": (
        lambda a: {**a, "actions": a["actions"][:, :2]},
        r"expected equally many agents in all arrays, got \{'observations': 3, 'actions': 2\}",
    ),
    "two agents": (
        lambda a: {**a, "actions": a["actions"][:, :2], "observations": a["observations"][:, :2]},
        r"observations: expected shape \[5, 3, 5\] .* got \[5, 2, 5\]",
    ),
    "unequal rewards": (
        lambda a: {**a, "rewards": np.arange(12.0).reshape(4, 3)},
        r"expected one reward for the whole team, got \[0\.0, 1\.0, 2\.0\] in step 0",
    ),
    "NaN observation": (
        with_value("observations", (2, 1, 0), np.nan),
        "array observations holds NaN or infinity, first in row 2",
    ),
    "NaN action": (
        with_value("actions", (1, 0, 0), np.nan),
        "array actions holds NaN or infinity, first in row 1",
    ),
    "NaN reward": (with_value("rewards", 3, np.nan), "array rewards holds NaN or infinity, first in row 3"),
    "infinite state": (
        with_value("states", (4, 1), np.inf),
        "array states holds NaN or infinity, first in row 4",
    ),
    "too large for float32": (
        with_value("observations", (3, 0, 0), 1e300),
        "array observations holds NaN or infinity, first in row 3",
    ),
    "no timeout": (without("timeout"), "missing is timeout: add it"),
    "a typing error": (
        lambda a: {**a, "reward": a["rewards"]},
        "expected the keys observations, .* got reward too: rename or drop it",
    ),
    "strings": (given(rewards=np.array(["1"] * 4)), "rewards: expected numbers, got <U1"),
    "complex": (given(rewards=np.ones(4) * 1j), "rewards: expected numbers, got complex128"),
    "half a timeout": (given(timeout=0.5), r"timeout: expected one whole number from 0 to 1, got 0\.5"),
    "NaN timeout": (given(timeout=np.nan), "timeout: expected one whole number from 0 to 1, got nan"),
    "a timeout per step": (given(timeout=[0, 0, 0, 1]), r"timeout: expected one whole number .* got \[0, 0"),
    "negative seed": (given(seed=-1), "seed: expected one whole number from 0 to .*, got -1"),
    "infinite seed": (given(seed=np.inf), "seed: expected one whole number from 0 to .*, got inf"),
    "empty": (
        given(observations=np.zeros((0, 3, 5))),
        r"observations: expected shape \[T\+1, N, O\], got \[0, 3, 5\]",
    ),
    "a single number": (given(actions=1.0), r"actions: expected shape \[T, N, A\] of numbers, got \[\]"),
    "masks": (given(action_masks=np.ones((5, 3, 2), np.uint8)), "expected action masks with discrete ones"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_named_and_nothing_is_left(tmp_path: Path, case: str) -> None:
    spec = SPECS["continuous"]
    change, message = WRONG[case]
    episode = random_episode(spec, 4)
    logs = save(tmp_path / "logs", arrays_of(episode), change(arrays_of(episode)))
    with pytest.raises(DatasetError, match=rf"001\.npz: .*{message}") as refused:
        convert(logs, tmp_path / "new" / "d.hdf5", team=spec)
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


DISCRETE: dict[str, tuple[Callable[[Arrays], Arrays], str]] = {
    "half a choice": (with_value("actions", (1, 0), 0.5), "actions: expected integers, got float64"),
    "a choice that is not there": (given(actions=np.full((4, 2), 4)), "row 0: expected one of the actions"),
    "an unavailable choice": (
        lambda a: {**a, "action_masks": a["action_masks"] * 0},
        r"row 0: expected one of the actions \[\] that are available",
    ),
    "masks of 2": (
        lambda a: {**a, "action_masks": a["action_masks"] * 2},
        "array avail: expected 0 or 1 .* got 2 for choice 0 in row 0",
    ),
    "T masks": (
        lambda a: {**a, "action_masks": a["action_masks"][:-1]},
        r"action masks: expected shape \[5, 2, 4\]",
    ),
    "masks of one agent": (
        lambda a: {**a, "action_masks": a["action_masks"][:, :1]},
        "expected equally many agents in all arrays",
    ),
}


@pytest.mark.parametrize("case", DISCRETE)
def test_a_wrong_file_of_choices_is_named(tmp_path: Path, case: str) -> None:
    change, message = DISCRETE[case]
    episode = random_episode(SPECS["discrete"], 4)
    logs = save(tmp_path / "logs", arrays_of(episode), change(arrays_of(episode)))
    with pytest.raises(DatasetError, match=rf"001\.npz: .*{message}"):
        convert(logs, tmp_path / "d.hdf5", team=SPECS["discrete"])
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


class Trap:
    """Unpickling it would run this."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("the trap has been opened",))


def damaged(archive: bytes, how: str) -> bytes:
    """An archive whose first entry is changed as bits that flip, or other programs, do."""
    if how == "header":
        return archive.replace(b"{'descr'", b"{('descr", 1)
    place, value = {"encrypted": (6, 1), "compression": (8, 99)}[how]
    changed = bytearray(archive)
    changed[place] = changed[archive.index(b"PK\x01\x02") + place + 2] = value
    return bytes(changed)


@pytest.mark.parametrize(
    "content", ["text", "cut", "array", "pickle", "encrypted", "compression", "header", "folder"]
)
def test_files_that_are_no_archives_of_numbers_are_named(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = save(tmp_path / "logs", arrays_of(random_episode(SPECS["continuous"], 4)))
    file = logs / "001.npz"
    if content == "text":
        file.write_text("not an archive")
    elif content == "cut":
        file.write_bytes((logs / "000.npz").read_bytes()[:300])
    elif content == "array":
        with file.open("wb") as stream:
            np.save(stream, np.zeros(3))
    elif content == "pickle":
        np.savez(file, observations=np.array([Trap()], dtype=object))
    elif content in ("encrypted", "compression", "header"):
        file.write_bytes(damaged((logs / "000.npz").read_bytes(), content))
    else:
        file.mkdir()
    with pytest.raises(
        DatasetError, match=r"001\.npz cannot be read as numpy's \.npz without pickles .*savez$"
    ):
        convert(logs, tmp_path / "d.hdf5", team=SPECS["continuous"])
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "d.hdf5").exists()


TEAM = SPECS["continuous"].to_json()


@pytest.mark.parametrize(
    ("claim", "error", "message"),
    [
        ({}, DatasetError, "does not say of which team it is: name a known task with --task, or describe"),
        (
            {"task": "cell/reach"},
            UnknownNameError,
            "unknown task 'cell/reach'.* A new one needs --control-rate",
        ),
        ({"control_rate": 10}, DatasetError, "does not say of which team it is"),
        ({"task": "", "control_rate": 10}, DatasetError, "does not say of which team it is"),
        (
            {"task": "a/b", "control_rate": 0},
            ConfigError,
            "control_rate: expected a number of Hz above 0, got 0",
        ),
        ({"task": "a/b", "control_rate": float("nan")}, ConfigError, "control_rate: expected .* got nan"),
        ({"task": "a/b", "control_rate": 1, "episode_limit": 0}, ConfigError, "episode_limit of at least 1"),
        (
            {"task": "a/b", "control_rate": 1, "episode_limit": 3},
            DatasetError,
            "000.npz: expected 1 to 3 steps, the episode limit of a/b, got 4",
        ),
        (
            {"task": "toy/chain", "control_rate": 10},
            ConfigError,
            "toy/chain is a known task: leave --control-rate",
        ),
        (
            {"task": "mamujoco/hopper-3x1"},
            DatasetError,
            r"hopper-3x1 has \(agents, .*\) \(3, 14, 'continuous', 1\), the data \(3, 5, 'continuous', 2\)",
        ),
        (
            {"team": SPECS["continuous"], "task": "a/b"},
            ConfigError,
            "--team states the whole team: leave --task",
        ),
        (
            {"team": replace(SPECS["continuous"], state_size=9)},
            DatasetError,
            "has a state of 9 numbers, the data one of 7",
        ),
    ],
)
def test_the_team_must_be_said_once_and_fit(
    tmp_path: Path, claim: dict[str, Any], error: type[OmcdaError], message: str
) -> None:
    logs = save(tmp_path / "logs", arrays_of(random_episode(SPECS["continuous"], 4)))
    with pytest.raises(error, match=message):
        convert(logs, tmp_path / "d.hdf5", **claim)
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


def test_a_known_task_needs_no_more(tmp_path: Path) -> None:
    spec = team_spec("toy/masked")
    logs = save(tmp_path / "logs", arrays_of(random_episode(spec, 4)))
    convert(logs, tmp_path / "d.hdf5", task="toy/masked")
    assert read_dataset(tmp_path / "d.hdf5").spec == spec
    json.dumps(spec.to_json())
