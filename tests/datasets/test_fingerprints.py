"""Episodes that are known again in other files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from omcda_deploy.datasets import Dataset, Episode
from omcda_deploy.datasets.fingerprints import TrainingEpisodes, fingerprints
from omcda_deploy.datasets.writer import write_dataset
from omcda_deploy.errors import DatasetError
from omcda_deploy.registry import read_dataset
from tests.support.episodes import SPECS, random_episode

KINDS = ("continuous", "discrete")


def episodes(kind: str, numbers: Iterable[int]) -> list[Episode]:
    return [random_episode(SPECS[kind], 2 + number % 3, number, timeout=False) for number in numbers]


def written(folder: Path, name: str, kind: str, numbers: Iterable[int]) -> Dataset:
    path = folder / f"{name}.hdf5"
    write_dataset(path, SPECS[kind], episodes(kind, numbers))
    return read_dataset(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_contains_them_in_another_order_is_found_out(tmp_path: Path, kind: str) -> None:
    trained = TrainingEpisodes.of(written(tmp_path, "trained", kind, range(20)))
    assert trained.share_of(written(tmp_path, "others", kind, range(20, 40))) == 0.0
    mixed = [*range(35, 15, -1), 3]
    assert trained.share_of(written(tmp_path, "mixed", kind, mixed)) == 5 / 21
    read = TrainingEpisodes.from_text(trained.to_text())
    assert read.prints.tolist() == trained.prints.tolist()
    assert read.limit == trained.limit == 2**64 - 1


def test_an_episode_is_what_was_seen_and_done_whatever_it_earned(tmp_path: Path) -> None:
    (episode,) = episodes("continuous", [0])
    datasets = []
    for index in range(4):
        arrays = [np.array(a) for a in (episode.rewards, episode.observations, episode.actions)]
        if index:
            arrays[index - 1].flat[0] += 0.125
        rewards, observations, actions = arrays
        changed = Episode(observations, episode.states, actions, rewards, timeout=index == 1)
        write_dataset(tmp_path / f"{index}.hdf5", SPECS["continuous"], [changed])
        datasets.append(read_dataset(tmp_path / f"{index}.hdf5"))
    first, otherwise_paid, other_seen, other_done = (fingerprints(dataset).item() for dataset in datasets)
    assert first == otherwise_paid
    assert len({first, other_seen, other_done}) == 3
    trained = TrainingEpisodes(fingerprints(datasets[0], 1), 2**64 - 1, 1).to_text().removeprefix("1:")
    older = TrainingEpisodes.from_text(trained)  # as bundles of older versions have them
    assert [older.share_of(dataset) for dataset in datasets[:2]] == [1.0, 0.0]


def test_a_sample_of_many_episodes_tells_the_share_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("omcda_deploy.datasets.fingerprints.KEPT", 100)
    trained = TrainingEpisodes.of(written(tmp_path, "trained", "discrete", range(400)))
    assert len(trained.prints) == 100
    assert trained.share_of(written(tmp_path, "half", "discrete", range(200, 600))) == pytest.approx(
        0.5, abs=0.1
    )
    assert trained.share_of(written(tmp_path, "others", "discrete", range(400, 800))) == 0.0


def test_episodes_that_repeat_each_other_name_nothing(tmp_path: Path) -> None:
    dataset = written(tmp_path, "d", "discrete", [*range(49), 0])
    trained = TrainingEpisodes.of(dataset)
    assert trained.share_of(dataset) is None
    assert TrainingEpisodes.from_text(trained.to_text()).share_of(dataset) is None


@pytest.mark.parametrize("text", ["", "?", "abc", "AAAA", "x:AAAAAAAAAAA=", "3:AAAAAAAAAAA="])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(DatasetError, match="fingerprints of episodes: expected"):
        TrainingEpisodes.from_text(text)
