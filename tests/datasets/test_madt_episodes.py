"""Torch-pickled SMAC episodes: read as MADT wrote them, without running what they hold."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omcda_deploy import registry
from omcda_deploy.datasets import torch_episodes
from omcda_deploy.datasets.convert import convert
from omcda_deploy.datasets.formats import madt_episodes
from omcda_deploy.datasets.torch_episodes import MalformedError, arrays, load
from omcda_deploy.errors import DatasetError, MissingExtraError
from tests.support.smac_episodes import LIMIT, pickled, random_episode, require_episode, save_madt


class Payload:
    """Makes a file when it is unpickled the ordinary way."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._mark}",)


def test_a_folder_becomes_our_file_in_the_order_of_names(tmp_path: Path) -> None:
    long, short, one = (random_episode(steps, steps, mappo=True) for steps in (LIMIT, 3, 1))
    source = save_madt(tmp_path / "5m_vs_6m" / "good", c=one, a=long, b=short)
    (source / ".hidden").write_text("no episode")
    summary = convert(source, tmp_path / "out.hdf5")
    dataset = registry.read_dataset(tmp_path / "out.hdf5")
    for number, episode in enumerate((long, short, one)):
        require_episode(dataset, number, episode, final_recorded=False)
    assert dataset.spec.task == summary["task"] == "smac-mappo/5m_vs_6m"
    assert (dataset.spec.observation_size, dataset.spec.state_size) == (124, 780)
    ends = np.cumsum(dataset.episode_length) - 1
    assert np.flatnonzero(dataset.timeout).tolist() == [ends[0]]
    assert np.flatnonzero(dataset.terminal).tolist() == ends[1:].tolist()
    assert {key: dataset.metadata[key] for key in ("source", "source_format", "reward_mode", "behavior")} == {
        "source": "good",
        "source_format": "madt_episodes",
        "reward_mode": "reward",
        "behavior": "good",
    }


def test_a_malicious_file_is_named_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    source = save_madt(
        tmp_path / "5m_vs_6m", a=random_episode(2, 0, mappo=True), b=random_episode(3, 1, mappo=True)
    )
    torch.save([Payload(mark)], source / "c.pt")
    with madt_episodes.open_recording(source, None) as recording:
        intact = [next(recording.episodes) for _ in range(2)]  # one file at a time: these come through
        with pytest.raises(
            DatasetError, match=r"c\.pt: expected a pickle of .* refers to posix.system, .* not run"
        ):
            next(recording.episodes)
    assert [len(episode.actions) for episode in intact] == [2, 3]
    assert recording.episode_count == 3
    assert not mark.exists()
    torch.load(source / "c.pt", weights_only=False)
    assert mark.exists(), "the payload of this test does nothing"


def test_files_of_old_and_new_torch_and_numpy_load_alike(tmp_path: Path) -> None:
    expected = arrays(pickled(random_episode(2, 0, mappo=True)))
    torch.save(pickled(random_episode(2, 0, mappo=True)), tmp_path / "new.pt")
    torch.save(
        pickled(random_episode(2, 0, mappo=True)), tmp_path / "old.pt", _use_new_zipfile_serialization=False
    )
    content = (tmp_path / "old.pt").read_bytes()
    (tmp_path / "numpy1.pt").write_bytes(content.replace(b"cnumpy._core.", b"cnumpy.core."))
    (tmp_path / "numpy2.pt").write_bytes(content.replace(b"cnumpy.core.", b"cnumpy._core."))
    assert (tmp_path / "numpy1.pt").read_bytes() != (tmp_path / "numpy2.pt").read_bytes()
    for name in ("new", "old", "numpy1", "numpy2"):
        loaded = arrays(load(str(tmp_path / f"{name}.pt")))
        assert loaded.keys() == expected.keys()
        for field, values in expected.items():
            np.testing.assert_array_equal(loaded[field], values)
    assert expected["states"].shape == (2, 5, 156)


class Local:
    """A class that no other process has."""


def test_other_globals_and_damaged_files_are_told_apart(tmp_path: Path) -> None:
    torch.save([Local()], tmp_path / "local.pt")
    with pytest.raises(
        MalformedError, match=r"refers to tests\.datasets\.test_madt_episodes\.Local, which was not run"
    ):
        load(str(tmp_path / "local.pt"))
    torch.save([np.array([Local()], object)], tmp_path / "objects.pt")
    with pytest.raises(MalformedError, match="damaged, or no episode of arrays and numbers") as raised:
        load(str(tmp_path / "objects.pt"))
    assert "weights_only" not in str(raised.value)  # torch's own advice would run the file
    torch.save(pickled(random_episode(9, 0, mappo=True)), tmp_path / "cut.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "cut.pt").read_bytes()[:5000])
    with pytest.raises(MalformedError, match=r"damaged, .* download it again"):
        load(str(tmp_path / "cut.pt"))


def test_episodes_of_another_layout_are_refused() -> None:
    episode = pickled(random_episode(3, 0, mappo=True))
    with pytest.raises(
        MalformedError, match=r"invalid data: expected equally many steps .* got \[3, 3, 3, 3, 2\]"
    ):
        arrays([*episode[:-1], episode[-1][:-1]])
    with pytest.raises(MalformedError, match=r"got \[0\]"):
        arrays([[]])
    with pytest.raises(MalformedError, match="another layout"):
        arrays({"observations": 3})
    with pytest.raises(MalformedError, match="steps of another kind"):
        arrays([[step[:5] for step in agent] for agent in episode])
    episode[1][2][1] = np.zeros(7, np.float32)
    with pytest.raises(MalformedError, match="observations of unequal shapes"):
        arrays(episode)
    episode[1][2][1] = "no numbers"
    with pytest.raises(MalformedError, match="observations"):
        arrays([[episode[1][2]]])


def one_file(**fields: Any) -> dict[str, Any]:
    return {**arrays(pickled(random_episode(4, 0, mappo=True))), **fields}


@pytest.mark.parametrize(
    ("field", "where", "value", "message"),
    [
        ("rewards", (2, 3), 9.5, r"a\.pt: expected one reward for the whole team, got .* in step 2"),
        ("observations", (1, 2, 3), np.nan, r"a\.pt: array obs holds NaN or infinity, first in row 1"),
        ("states", (3, 2, 3), np.inf, r"a\.pt: array state holds NaN or infinity, first in row 3"),
        ("action_masks", (2, 1), 0, r"a\.pt: row 2: expected one of the actions \[\] .* agent number 1"),
        ("action_masks", (2, 1), 2, r"a\.pt: availability of actions: expected 0 or 1"),
        ("actions", (2, 1, 0), 0.5, r"a\.pt: actions: expected whole numbers"),
    ],
)
def test_values_that_cannot_be_trained_on_name_the_file(
    field: str, where: Any, value: float, message: str
) -> None:
    content = one_file()
    content[field] = content[field].astype(np.float64)
    content[field][where] = value
    with pytest.raises(DatasetError, match=message):
        madt_episodes._episode(Path("a.pt"), content, LIMIT)
    with pytest.raises(DatasetError, match=r"a\.pt: expected one action and one reward per agent and step"):
        madt_episodes._episode(Path("a.pt"), one_file(actions=np.zeros((4, 5, 2))), LIMIT)


def test_only_folders_of_torch_files_are_recognized(tmp_path: Path) -> None:
    source = save_madt(tmp_path / "zip", a=random_episode(1, 0, mappo=True))
    assert madt_episodes.recognizes(source)
    assert not madt_episodes.recognizes(source / "a.pt")
    assert not madt_episodes.recognizes(tmp_path)  # folders in it, no files
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a").write_text("x")
    assert not madt_episodes.recognizes(tmp_path / "text")
    (tmp_path / "old").mkdir()
    torch.save([1], tmp_path / "old" / "a", _use_new_zipfile_serialization=False)
    assert madt_episodes.recognizes(tmp_path / "old")
    (tmp_path / "old" / "config.json").write_text("{}")  # as run folders have
    assert not madt_episodes.recognizes(tmp_path / "old")


def test_a_loader_that_dies_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_madt(tmp_path / "5m_vs_6m", a=random_episode(1, 0, mappo=True))
    (tmp_path / "dies.py").write_text(
        "import sys\nsys.stdin.read()\nprint('no space', file=sys.stderr)\nsys.exit(7)"
    )
    monkeypatch.setattr(madt_episodes, "_LOADER", tmp_path / "dies.py")

    def open_it() -> None:
        with madt_episodes.open_recording(source, None):
            pass

    with pytest.raises(DatasetError, match=r"a\.pt: the process .* ended with status 7 \(no space\)"):
        open_it()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"omcda-deploy\[train\]"):
        open_it()


def test_the_loader_knows_nothing_of_this_package() -> None:
    text = Path(torch_episodes.__file__).read_text()
    assert "omcda_deploy" not in text
    assert torch_episodes.FRAME.format == madt_episodes._FRAME.format
