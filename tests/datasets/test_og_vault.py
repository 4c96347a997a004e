"""OG-MARL's vaults, written by flashbax itself and read without it."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omcda_deploy import registry
from omcda_deploy.datasets.convert import convert
from omcda_deploy.datasets.formats import og_vault
from omcda_deploy.errors import DatasetError
from tests.support.smac_episodes import LIMIT, SmacEpisode, random_episode, require_episode

ENDS = [(3, "terminals"), (LIMIT, "terminals"), (4, "truncations"), (5, "terminals")]
TAIL = 2  # rows of an episode that the vault does not finish


def rows_of(episodes: Sequence[SmacEpisode], ends: Sequence[str]) -> dict[str, Any]:
    """One row per transition, as OG-MARL's recorder writes them."""

    def joined(parts: list[Any]) -> Any:
        return np.concatenate(parts)

    steps = [len(episode.actions) for episode in episodes]
    flags = {name: np.zeros((sum(steps), 5), np.bool_) for name in ("terminals", "truncations")}
    for end, name in zip(np.cumsum(steps), ends, strict=False):
        flags[name][end - 1] = True
    flags["terminals"][1, 4] = True  # a flag of one agent alone ends nothing
    return {
        "observations": joined([episode.observations[:-1] for episode in episodes]),
        "actions": joined([episode.actions for episode in episodes]).astype(np.int32),
        "rewards": np.repeat(joined([e.rewards for e in episodes])[:, None], 5, axis=1).astype(np.float32),
        **flags,
        "infos": {
            "state": joined([e.states[:-1].reshape(len(e.actions), -1) for e in episodes]),
            "legals": joined([episode.masks[:-1] for episode in episodes]).astype(np.float32),
        },
    }


def write_vault(folder: Path, uid: str, rows: dict[str, Any]) -> Path:
    flashbax, vault, jax = map(import_module, ("flashbax", "flashbax.vault", "jax"))
    count = len(rows["actions"])
    buffer = flashbax.make_flat_buffer(
        max_length=count + 1, min_length=1, sample_batch_size=1, add_sequences=True, add_batch_size=None
    )
    state = buffer.init(jax.tree_util.tree_map(lambda values: values[0], rows))
    written = vault.Vault("5m_vs_6m.vlt", state.experience, str(folder), uid)
    assert written.write(buffer.add(state, rows)) == count
    return folder / "5m_vs_6m.vlt" / uid


def recorded(mappo: bool) -> list[SmacEpisode]:
    lengths = [*(steps for steps, _ in ENDS), TAIL]
    return [random_episode(steps, seed, mappo=mappo) for seed, steps in enumerate(lengths)]


@pytest.fixture(scope="module", params=[True, False], ids=["mappo", "stock"])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[bool, Path]:
    rows = rows_of(recorded(request.param), [name for _, name in ENDS])
    return request.param, write_vault(tmp_path_factory.mktemp("vaults"), "Good", rows)


def test_a_vault_becomes_our_file(
    written: tuple[bool, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mappo, vault = written
    with caplog.at_level(logging.WARNING):
        convert(vault, tmp_path / "out.hdf5")
    assert f"the last {TAIL} rows are no whole episode" in caplog.text
    dataset = registry.read_dataset(tmp_path / "out.hdf5")
    assert dataset.episode_length.tolist() == [steps for steps, _ in ENDS]
    for number, episode in enumerate(recorded(mappo)[:-1]):
        require_episode(dataset, number, episode, final_recorded=False)
    ends = np.cumsum(dataset.episode_length) - 1
    # SMAC's terminated is true at the limit too, so the second ended by it whatever its flag says.
    assert dataset.timeout[ends].tolist() == [False, True, True, False]
    assert dataset.terminal[ends].tolist() == [True, False, False, True]
    assert dataset.spec.task == ("smac-mappo/5m_vs_6m" if mappo else "smac/5m_vs_6m")
    assert dataset.spec.state_size == (780 if mappo else 98)
    assert dataset.metadata["source_format"] == "og_vault"


def test_reading_needs_no_jax(written: tuple[bool, Path], tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['jax', 'flashbax', 'orbax', 'torch']))\n"
        "from pathlib import Path; from omcda_deploy.datasets.convert import convert\n"
        "print(convert(Path(sys.argv[1]), Path(sys.argv[2]))['episodes'])"
    )
    command = [sys.executable, "-c", code, str(written[1]), str(tmp_path / "out.hdf5")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(ENDS))]


def test_bad_vaults_are_named(written: tuple[bool, Path], tmp_path: Path) -> None:
    _, vault = written

    def attempt(change: dict[str, Any], *remove: str) -> None:
        copy = tmp_path / "5m_vs_6m.vlt" / "Copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(vault, copy)
        metadata = json.loads((copy / "metadata.json").read_text())
        structure = metadata["structure_shape"]
        structure.update(change)
        for name in remove:
            del structure[name]
        (copy / "metadata.json").write_text(json.dumps(metadata))
        convert(copy, tmp_path / "out.hdf5")

    with pytest.raises(
        DatasetError, match=r"expected discrete actions with infos\.legals, got a vault of actions"
    ):
        attempt({"infos": {"state": "(1, 5, 14)"}})
    with pytest.raises(DatasetError, match=r"array truncations: .* got no such array"):
        attempt({}, "truncations")
    with pytest.raises(
        DatasetError, match=r"array rewards: expected 3 dimensions, the first of length 1.*\[5, 9, 5\]"
    ):
        attempt({"rewards": "(5, 9, 5)"})
    with pytest.raises(DatasetError, match=r"metadata\.json: expected a vault's structure, got ValueError"):
        attempt({"rewards": "(os.system)"})
    with pytest.raises(DatasetError, match="metadata"):
        convert(tmp_path, tmp_path / "out.hdf5", format="og_vault")
    for file in (vault / "d").iterdir():
        (tmp_path / "5m_vs_6m.vlt" / "Copy" / "d" / file.name).unlink()
    shutil.copy(vault / "metadata.json", tmp_path / "5m_vs_6m.vlt" / "Copy")
    with pytest.raises(DatasetError, match="download the vault again"):
        convert(tmp_path / "5m_vs_6m.vlt" / "Copy", tmp_path / "out.hdf5")
    assert not list(tmp_path.glob("*.hdf5"))
    assert not list(tmp_path.glob(".*"))


def test_only_a_vaults_own_folder_is_recognized(written: tuple[bool, Path]) -> None:
    _, vault = written
    assert og_vault.recognizes(vault)
    assert not og_vault.recognizes(vault.parent)
    with pytest.raises(
        DatasetError, match=r"og_vault: folder of an OG-MARL vault, such as 5m_vs_6m\.vlt/Good"
    ):
        convert(vault.parent, vault.parent / "out.hdf5")
    with pytest.raises(
        DatasetError, match=r"Good is a folder of an OG-MARL vault.* convert it first, with  omcda"
    ):
        registry.read_dataset(vault)
