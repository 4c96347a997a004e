"""Minari's datasets, written and read; with Minari's own classes on the other side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from gymnasium import spaces
from numpy.typing import NDArray

minari = pytest.importorskip("minari")

from minari.data_collector import EpisodeBuffer  # noqa: E402
from minari.dataset.minari_storage import MinariStorage  # noqa: E402

from omcda_deploy.datasets.convert import convert  # noqa: E402
from omcda_deploy.datasets.formats import minari_folder  # noqa: E402
from omcda_deploy.datasets.minari_export import write_minari  # noqa: E402
from omcda_deploy.datasets.writer import write_dataset  # noqa: E402
from omcda_deploy.errors import DatasetError, MissingExtraError  # noqa: E402
from omcda_deploy.registry import read_dataset  # noqa: E402
from omcda_deploy.spec import ActionSpec, AgentSpec, TeamSpec  # noqa: E402
from tests.support.episodes import SPECS, random_episode, require_equal  # noqa: E402

ELEVEN = TeamSpec(  # more than ten agents, which an alphabet orders otherwise
    "cell/many",
    tuple(AgentSpec(f"agent_{i}", 2 + i % 2, ActionSpec("continuous", 1, -2.0, 2.0)) for i in range(11)),
    state_size=7,
    control_rate=5.0,
    episode_limit=60,
)


@pytest.mark.parametrize("spec", [*SPECS.values(), ELEVEN], ids=lambda spec: spec.task)
def test_what_was_written_comes_back_with_one_digest(tmp_path: Path, spec: TeamSpec) -> None:
    episodes = [random_episode(spec, steps, steps, timeout=steps == 2) for steps in (3, 2, 5)]
    if spec.action_kind == "discrete":
        masks = np.array(episodes[0].action_masks)
        masks[-1, 0, 0] = 0
        episodes[0] = replace(episodes[0], action_masks=masks)
    write_dataset(tmp_path / "d.hdf5", spec, episodes, behavior="operator")
    before = read_dataset(tmp_path / "d.hdf5")
    summary = write_minari(before, tmp_path / "reach-v3")
    assert summary == {"id": "reach-v3", "path": str(tmp_path / "reach-v3"), "episodes": 3, "steps": 10}
    convert(tmp_path / "reach-v3", tmp_path / "again.hdf5")
    again = read_dataset(tmp_path / "again.hdf5")
    assert (again.spec, again.digest) == (spec, before.digest)
    for number, episode in enumerate(episodes):
        require_equal(again.episode(number), episode)
    convert(tmp_path / "reach-v3" / "data", tmp_path / "data.hdf5", format="minari_folder")


def test_minari_reads_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS["discrete"]
    episodes = [random_episode(spec, steps, steps, timeout=steps == 2) for steps in (3, 2)]
    write_dataset(tmp_path / "d.hdf5", spec, episodes, behavior="operator")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "root"))
    summary = write_minari(read_dataset(tmp_path / "d.hdf5"), tmp_path / "root" / "cell" / "sort-v0")
    assert summary["id"] == "cell/sort-v0"
    loaded = minari.load_dataset("cell/sort-v0")
    assert (loaded.total_episodes, loaded.total_steps) == (2, 5)
    first, second = loaded.iterate_episodes()
    assert list(loaded.action_space.spaces) == ["agent_0", "agent_1"]
    assert loaded.action_space["agent_1"].n == 3
    for data, episode in ((first, episodes[0]), (second, episodes[1])):
        for index, name in enumerate(spec.names):
            np.testing.assert_array_equal(data.actions[name], episode.actions[:, index])
            size = spec.agents[index].observation_size
            observation = data.observations[name]["observation"]
            np.testing.assert_array_equal(observation, episode.observations[:, index, :size])
        np.testing.assert_array_equal(data.rewards, episode.rewards)
        np.testing.assert_array_equal(data.infos["state"], episode.states)
    assert (first.terminations[-1], first.truncations[-1]) == (True, False)
    assert (second.terminations[-1], second.truncations[-1]) == (False, True)
    assert "cell/sort-v0" in minari.list_local_datasets()


def names_of(values: dict[str, Any]) -> spaces.Dict:
    return spaces.Dict(values)


Buffer = dict[str, Any]


def buffer(steps: int, seed: int = 0) -> Buffer:
    """An episode of two agents that see 2 and 3 numbers, as somebody else's collector fills it."""
    generator = np.random.default_rng(seed)

    def vectors(rows: int, size: int) -> NDArray[np.float64]:
        return generator.uniform(-1, 1, (rows, size))

    return {
        "seed": seed,
        "observations": {"left": vectors(steps + 1, 2), "right": vectors(steps + 1, 3)},
        "actions": {"left": vectors(steps, 1), "right": vectors(steps, 1)},
        "rewards": generator.normal(size=steps),
        "terminations": np.arange(steps) == steps - 1,
        "truncations": np.zeros(steps, np.bool_),
        "infos": {"speed": np.zeros(steps + 1)},
    }


OBSERVATIONS = names_of({"left": spaces.Box(-1, 1, (2,)), "right": spaces.Box(-1, 1, (3,))})
ACTIONS = names_of({"left": spaces.Box(-1, 1, (1,)), "right": spaces.Box(-1, 1, (1,))})


def foreign(folder: Path, *buffers: Buffer, observations: Any = OBSERVATIONS, actions: Any = ACTIONS) -> Path:
    (folder / "data").mkdir(parents=True)
    storage = MinariStorage.new(folder / "data", observations, actions)
    storage.update_metadata({"dataset_id": folder.name, "minari_version": minari.__version__})
    storage.update_episodes(EpisodeBuffer(**values) for values in buffers)
    return folder


def test_a_foreign_dataset_needs_a_name_and_a_rate(tmp_path: Path) -> None:
    cut = {**buffer(3, 1), "terminations": np.zeros(3, np.bool_)}  # neither flag: the recording was cut
    source = foreign(tmp_path / "pair-v0", buffer(4), cut)
    assert minari_folder.recognizes(source)
    with pytest.raises(DatasetError, match=r"pair-v0 does not say of which team it is: name a known task"):
        convert(source, tmp_path / "d.hdf5")
    convert(source, tmp_path / "d.hdf5", task="cell/pair", control_rate=10, episode_limit=9)
    dataset = read_dataset(tmp_path / "d.hdf5")
    agents = (
        AgentSpec("left", 2, ActionSpec("continuous", 1)),
        AgentSpec("right", 3, ActionSpec("continuous", 1)),
    )
    assert dataset.spec == TeamSpec("cell/pair", agents, 6, 10.0, episode_limit=9)
    first = buffer(4)
    np.testing.assert_allclose(
        dataset.observations[:5, 0], np.pad(first["observations"]["left"], ((0, 0), (0, 1))), rtol=1e-6
    )
    np.testing.assert_allclose(dataset.observations[:5, 1], first["observations"]["right"], rtol=1e-6)
    np.testing.assert_array_equal(dataset.states, dataset.observations.reshape(-1, 6))
    last = np.cumsum(dataset.episode_length) - 1
    assert (dataset.timeout[last].tolist(), dataset.terminal[last].tolist()) == ([False, True], [True, False])
    assert dataset.episode_seeds is not None
    assert dataset.episode_seeds.tolist() == [0, 1]
    turned = replace(dataset.spec, agents=agents[::-1])
    convert(source, tmp_path / "turned.hdf5", team=turned)
    np.testing.assert_array_equal(
        read_dataset(tmp_path / "turned.hdf5").observations, dataset.observations[:, ::-1]
    )
    wrong = replace(dataset.spec, agents=(agents[0], replace(agents[1], name="other")))
    with pytest.raises(DatasetError, match=r"has agents of .*'other'.*, the data .*'right'"):
        convert(source, tmp_path / "wrong.hdf5", team=wrong)


def attribute(**changed: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "data" / "metadata.json"
        metadata = {**json.loads(file.read_text()), **changed}
        file.write_text(json.dumps({k: v for k, v in metadata.items() if v is not None}))

    return apply


def content(name: str, values: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
            del file[f"episode_1/{name}"]
            if values is not None:
                file[f"episode_1/{name}"] = values

    return apply


def cut(folder: Path) -> None:
    file = folder / "data" / "main_data.hdf5"
    file.write_bytes(file.read_bytes()[:400])


ENVIRONMENT = {"id": "x/Trap-v0", "entry_point": "tests.datasets.test_minari:opened", "kwargs": {}}


def opened(**_: Any) -> None:
    raise AssertionError("a dataset must not run code")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "cannot be read as a Minari dataset"),
        (lambda folder: (folder / "data" / "main_data.hdf5").unlink(), "cannot be read as a Minari dataset"),
        (
            attribute(observation_space=None, env_spec=json.dumps(ENVIRONMENT)),
            "expected observation_space, found none",
        ),
        (attribute(observation_space="{"), "cannot be read as a Minari dataset"),
        (attribute(data_format="csv"), "cannot be read as a Minari dataset"),
        (attribute(data_format=3), "cannot be read as a Minari dataset"),
        (attribute(total_episodes=0), "expected at least one episode, got none"),
        (attribute(total_episodes=9), "cannot be read as a Minari dataset"),
        (attribute(total_episodes="many"), "cannot be read as a Minari dataset"),
        (attribute(omcda_spec="{}"), "does not say|its team spec is damaged"),
        (content("actions/left", None), r"actions: expected those of left, right, got \['right'\]"),
        (
            content("actions/left", np.zeros((4, 1))),
            r"actions: expected vectors of \[1, 1\] numbers.*\[4, 1\]",
        ),
        (content("actions/left", np.zeros((3, 2))), r"actions: expected vectors of \[1, 1\] numbers"),
        (
            content("observations/right", np.zeros((4, 2))),
            r"observations: expected vectors of \[2, 3\] numbers",
        ),
        (content("observations/right", np.full((4, 3), np.nan)), "episode 1: array observations holds NaN"),
        (content("rewards", np.zeros((3, 2))), "expected as many terminations and truncations as rewards"),
        (
            content("rewards", np.full(3, np.inf)),
            "episode 1: array rewards holds NaN or infinity, first in row 0",
        ),
        (content("rewards", None), "cannot be read as a Minari dataset"),
        (
            content("truncations", np.array([True, False, False])),
            "episode 1: expected its end in the last of 3",
        ),
        (
            content("infos/state", np.zeros(4)),
            r"episode 1: infos: state: expected shape \[T\+1, S\], got \[4\]",
        ),
        (
            content("infos/state", np.zeros((4, 7))),
            r"episode 1: states: expected shape \[4, 6\].* got \[4, 7\]",
        ),
    ],
)
def test_a_damaged_dataset_is_named_and_nothing_is_left(
    tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    both = [{**buffer(steps, steps), "infos": {"state": np.zeros((steps + 1, 6))}} for steps in (4, 3)]
    source = foreign(tmp_path / "pair-v0", *both)
    damage(source)
    claim: dict[str, Any] = {"task": "cell/pair", "control_rate": 10}
    if "does not say" in message:
        claim = {}
    with pytest.raises(DatasetError, match=message) as refused:
        convert(source, tmp_path / "d.hdf5", format="minari_folder", **claim)
    assert "\n" not in str(refused.value)
    assert [path.name for path in tmp_path.iterdir()] == ["pair-v0"]


def test_single_agents_are_told_how_to_become_a_team(tmp_path: Path) -> None:
    values = {**buffer(3), "observations": np.zeros((4, 2)), "actions": np.zeros((3, 1))}
    source = foreign(tmp_path / "one-v0", values, observations=OBSERVATIONS["left"], actions=ACTIONS["left"])
    with pytest.raises(DatasetError, match="expected Dict spaces with an entry for each agent"):
        convert(source, tmp_path / "d.hdf5", task="a/b", control_rate=1)


def test_a_folder_must_be_new_and_have_a_version(tmp_path: Path) -> None:
    spec = SPECS["continuous"]
    write_dataset(tmp_path / "d.hdf5", spec, [random_episode(spec, 2)])
    dataset = read_dataset(tmp_path / "d.hdf5")
    for name in ("reach", "reach-v", "a b-v0", "-v1"):
        with pytest.raises(DatasetError, match="expected a name and a version, such as reach-v0"):
            write_minari(dataset, tmp_path / name)
    (tmp_path / "reach-v0").mkdir()
    with pytest.raises(DatasetError, match="reach-v0 exists already"):
        write_minari(dataset, tmp_path / "reach-v0")
    with pytest.raises(DatasetError, match="cannot be written"):
        write_minari(dataset, tmp_path / "d.hdf5" / "reach-v0")
    assert {path.name for path in tmp_path.iterdir()} == {"d.hdf5", "reach-v0"}


def test_a_limit_on_the_size_of_files_is_told_before_anything_is_written(tmp_path: Path) -> None:
    """HDF5, which Minari writes, would end the process."""
    spec = SPECS["continuous"]
    write_dataset(tmp_path / "d.hdf5", spec, [random_episode(spec, 20)] * 20)
    program = (
        "import resource, signal, sys\n"
        "from omcda_deploy.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "main()\n"
    )
    words = ["to-minari", "d.hdf5", "--out", "reach-v0"]
    done = subprocess.run(
        [sys.executable, "-c", program, *words], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: reach-v0 cannot be written (File too large): raise  ulimit -f")
    assert [path.name for path in tmp_path.iterdir()] == ["d.hdf5"]


def test_without_the_package_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    source = foreign(tmp_path / "pair-v0", buffer(4))
    monkeypatch.setitem(sys.modules, "minari.dataset.minari_storage", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'omcda-deploy\[minari\]'"):
        convert(source, tmp_path / "d.hdf5", task="a/b", control_rate=1)
