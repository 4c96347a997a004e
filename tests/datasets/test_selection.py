"""Datasets from parts of others: split, subset and merge."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from omcda_deploy.cli import app
from omcda_deploy.datasets import Dataset
from omcda_deploy.datasets.selection import split, subset
from omcda_deploy.datasets.writer import DatasetWriter, write_dataset
from omcda_deploy.errors import ConfigError, DatasetError, OmcdaError
from omcda_deploy.registry import read_dataset
from tests.support.digests import as_version_1
from tests.support.episodes import SPECS, random_episode, require_equal

COUNT = 20


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twenty episodes with returns 0 to 19, played by two policies in turn."""
    path = tmp_path / "d.hdf5"
    with DatasetWriter(path, SPECS["discrete"], {"behavior": "both", "rig": "A"}) as writer:
        for number in range(COUNT):
            episode = random_episode(SPECS["discrete"], 2 + number % 3, number, timeout=number % 2 == 0)
            rewards = np.zeros(len(episode))
            rewards[0] = number
            writer.append(replace(episode, rewards=rewards), ("even", "odd")[number % 2])
    return path


def command(*words: str | Path) -> Any:
    """JSON that a command prints. Raises what it raises."""
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    if result.exception is not None:
        raise result.exception
    return json.loads(result.stdout)


def numbers(dataset: Dataset) -> list[int]:
    return [round(value) for value in dataset.episode_returns]


def require_same_episodes(part: Dataset, whole: Dataset) -> None:
    for index, number in enumerate(numbers(part)):
        require_equal(part.episode(index), whole.episode(number))
        assert part.episode_behaviors is not None
        assert part.behaviors[part.episode_behaviors[index]] == ("even", "odd")[number % 2]
    assert part.spec == whole.spec
    assert part.metadata == {**whole.metadata, "part_of": whole.digest}


def test_a_split_keeps_every_episode_once(data: Path, tmp_path: Path) -> None:
    parts = tmp_path / "train.hdf5", tmp_path / "test.hdf5"
    words = ("split", data, "--train", parts[0], "--held-out", parts[1], "--share", "0.25", "--seed", "3")
    summary = command(*words)
    whole = read_dataset(data)
    train, held_out = map(read_dataset, parts)
    assert (summary["train"]["episodes"], summary["held_out"]["episodes"]) == (15, 5)
    assert (summary["train"]["digest"], summary["held_out"]["digest"]) == (train.digest, held_out.digest)
    assert sorted(numbers(train) + numbers(held_out)) == list(range(COUNT))
    for part in (train, held_out):
        assert numbers(part) == sorted(numbers(part))
        require_same_episodes(part, whole)
    again = split(data, tmp_path / "a.hdf5", tmp_path / "b.hdf5", share=0.25, seed=3)
    assert again == summary
    other = split(data, tmp_path / "c.hdf5", tmp_path / "e.hdf5", share=0.25, seed=4)
    assert other["held_out"]["digest"] != held_out.digest


@pytest.mark.parametrize(("share", "expected"), [(0.001, 1), (0.999, COUNT - 1), (0.5, COUNT // 2)])
def test_no_part_is_empty(data: Path, tmp_path: Path, share: float, expected: int) -> None:
    summary = split(data, tmp_path / "a.hdf5", tmp_path / "b.hdf5", share=share)
    assert (summary["train"]["episodes"], summary["held_out"]["episodes"]) == (COUNT - expected, expected)


def test_both_parts_are_written_or_none(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complete = DatasetWriter.complete
    calls = itertools.count()

    def fail_second(self: DatasetWriter) -> None:
        if next(calls) == 1:
            raise DatasetError("the disk is full")
        complete(self)

    monkeypatch.setattr(DatasetWriter, "complete", fail_second)
    with pytest.raises(DatasetError, match="the disk is full"):
        split(data, tmp_path / "new" / "a.hdf5", tmp_path / "other" / "b.hdf5")
    assert [path.name for path in tmp_path.iterdir()] == ["d.hdf5"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], range(COUNT)),
        (["--episodes", "3,0,5-8,3"], [0, 3, 5, 6, 7, 8]),
        (["--returns", "15:"], range(15, COUNT)),
        (["--returns", ":2"], [0, 1, 2]),
        (["--returns", "4:6.5", "--episodes", "0-5"], [4, 5]),
        (["--count", "20"], range(COUNT)),
    ],
)
def test_a_subset_meets_every_condition(
    data: Path, tmp_path: Path, options: list[str], expected: Any
) -> None:
    summary = command("subset", data, "--out", tmp_path / "part.hdf5", *options)
    part, whole = read_dataset(tmp_path / "part.hdf5"), read_dataset(data)
    assert numbers(part) == list(expected)
    assert (summary["episodes"], summary["digest"]) == (len(expected), part.digest)
    require_same_episodes(part, whole)
    assert (part.digest == whole.digest) == (len(expected) == COUNT)


def test_a_count_is_drawn_by_its_seed(data: Path, tmp_path: Path) -> None:
    drawn = []
    for number, seed in enumerate((0, 0, 1)):
        subset(data, tmp_path / f"{number}.hdf5", least_return=10, count=4, seed=seed)
        drawn.append(numbers(read_dataset(tmp_path / f"{number}.hdf5")))
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(set(part)) == 4 and min(part) >= 10 and part == sorted(part) for part in drawn)


def test_a_subset_without_conditions_is_of_the_newest_version(data: Path, tmp_path: Path) -> None:
    newest = read_dataset(data).digest
    assert subset(as_version_1(data), tmp_path / "new.hdf5")["digest"] == newest
    assert read_dataset(tmp_path / "new.hdf5").digest_version == 2


WRONG: list[tuple[str, type[OmcdaError], str]] = [
    ("split d.hdf5 --train a.hdf5 --held-out a.hdf5", ConfigError, "expected two files for the two parts"),
    (
        "split d.hdf5 --train a.hdf5 --held-out ./x/../a.hdf5",
        ConfigError,
        "expected two files for the two parts",
    ),
    (
        "split d.hdf5 --train a.hdf5 --held-out d.hdf5",
        DatasetError,
        "d.hdf5 exists already: choose another --held-out",
    ),
    ("split d.hdf5 --train a.npz --held-out b.hdf5", DatasetError, r"expected a name ending in \.hdf5"),
    (
        "split d.hdf5 --train a.hdf5 --held-out b.hdf5 --share 0",
        ConfigError,
        "share: expected a number between",
    ),
    (
        "split d.hdf5 --train a.hdf5 --held-out b.hdf5 --share 1",
        ConfigError,
        "share: expected a number between",
    ),
    (
        "split d.hdf5 --train a.hdf5 --held-out b.hdf5 --share nan",
        ConfigError,
        "share: expected a number between",
    ),
    (
        "split d.hdf5 --train a.hdf5 --held-out b.hdf5 --seed -1",
        ConfigError,
        "seed: expected at least 0, got -1",
    ),
    ("split no.hdf5 --train a.hdf5 --held-out b.hdf5", DatasetError, "no.hdf5: no such file"),
    ("split one.hdf5 --train a.hdf5 --held-out b.hdf5", DatasetError, "one.hdf5 holds one closed episode"),
    ("split d.hdf5 --train a.hdf5 --held-out d.hdf5/b.hdf5", DatasetError, "b.hdf5 cannot be written"),
    ("subset d.hdf5 --out d.hdf5", DatasetError, "d.hdf5 exists already: choose another --out"),
    ("subset d.hdf5 --out a.hdf5 --episodes 20", DatasetError, "episode 20: expected numbers from 0 to 19"),
    ("subset d.hdf5 --out a.hdf5 --episodes 5-3", ConfigError, "--episodes: expected numbers and ranges"),
    ("subset d.hdf5 --out a.hdf5 --episodes one", ConfigError, "--episodes: expected numbers and ranges"),
    ("subset d.hdf5 --out a.hdf5 --episodes 1,,2", ConfigError, "--episodes: expected numbers and ranges"),
    ("subset d.hdf5 --out a.hdf5 --returns 5", ConfigError, "--returns: expected LOW:HIGH"),
    ("subset d.hdf5 --out a.hdf5 --returns a:b", ConfigError, "--returns: expected LOW:HIGH"),
    ("subset d.hdf5 --out a.hdf5 --returns nan:", ConfigError, "--returns: expected LOW:HIGH"),
    (
        "subset d.hdf5 --out a.hdf5 --returns 5:1",
        ConfigError,
        "expected the lower bound first, got 5.0 and 1.0",
    ),
    ("subset d.hdf5 --out a.hdf5 --returns 100:", DatasetError, "got 0 of 20, whose returns go from 0 to 19"),
    ("subset d.hdf5 --out a.hdf5 --count 21", DatasetError, "expected at least 21 episodes .* got 20 of 20"),
    ("subset d.hdf5 --out a.hdf5 --count 0", ConfigError, "count: expected at least 1"),
    ("subset d.hdf5 --out new/a.hdf5 --count 2 --seed -2", ConfigError, "seed: expected at least 0"),
    (
        "merge d.hdf5 --out d.hdf5",
        DatasetError,
        "d.hdf5 exists already: choose another --out, or remove it first",
    ),
]


@pytest.mark.parametrize(("line", "error", "message"), WRONG)
def test_wrong_words_are_one_line_and_leave_nothing(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    error: type[OmcdaError],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_dataset("one.hdf5", SPECS["discrete"], [random_episode(SPECS["discrete"], 3)])
    with pytest.raises(error, match=message) as refused:
        command(*line.split())
    assert "\n" not in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.hdf5", "one.hdf5"]
