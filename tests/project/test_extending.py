"""The blocks of docs/extending.md are run as they stand, but for the sizes of data and networks."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from omcda_deploy import registry
from omcda_deploy.bundle import read_bundle
from omcda_deploy.registry import read_dataset
from tests.support.pages import DOCS, blocks, run_blocks

TEXT = (DOCS / "extending.md").read_text()
SMALL = " --behavior-steps 20 --set hidden=16 --set batch_size=16"
SMALLER = [
    (r"--transitions \d+", "--transitions 300 --workers 0"),
    (r"--steps \d{4}", "--steps 20" + SMALL),
    (r"evaluate --env (\S+)", r"evaluate --env \1 --episodes 1"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder whose modules and installed packages are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "installed")])
    (tmp_path / "installed").mkdir()
    yield tmp_path
    for name in [Path(file).stem for _, file, _ in blocks(TEXT) if file.endswith(".py")]:
        sys.modules.pop(name, None)
    monkeypatch.undo()
    registry.rescan()


def install(text: str, folder: Path) -> None:
    """Write what pip writes for a package with these entry points."""
    project = tomllib.loads(text)["project"]
    info = folder / "installed" / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = [
        line
        for group, entries in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {module}" for name, module in entries.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    registry.rescan()


def test_every_block_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def before(words: list[str]) -> None:
        if words[0] == "import":
            write_log(folder / "random.hdf5", Path(words[1]))

    commands = run_blocks(TEXT, SMALLER, monkeypatch, toml=lambda text: install(text, folder), before=before)
    assert len(commands) == 9
    check(folder, capsys.readouterr().out)


def check(folder: Path, printed: str) -> None:
    """Compare what the commands left behind with what the page says."""
    random = read_dataset(folder / "random.hdf5")
    assert random.spec.task == "reach:Reach"
    assert [agent.action.size for agent in random.spec.agents] == [1, 2]
    assert (random.spec.control_rate, random.spec.episode_limit, random.spec.state_size) == (20.0, 50, 10)
    lab = read_dataset(folder / "lab.hdf5").spec
    assert (lab.task, lab.control_rate, lab.episode_limit) == ("lab:make", 10.0, 30)
    assert read_dataset(folder / "scripted.hdf5").behaviors == ("controller:toward_target",)
    assert read_dataset(folder / "warehouse.hdf5").metadata["version_numpy"]
    robot, source = read_dataset(folder / "robot.hdf5"), random
    assert robot.spec.task == "lab/reach"
    assert robot.digests[1] == source.digests[1]  # that of version 2 covers the states, which differ
    bundle = read_bundle(folder / "filtered-bundle")
    assert bundle.spec.contract_hash == random.spec.contract_hash
    assert bundle.manifest["training"]["settings"]["quantile"] == 0.8
    assert (folder / "filtered.html").stat().st_size > 10_000
    assert printed.count("reach:Reach: return") == 1


def write_log(recorded: Path, out: Path) -> None:
    """Write a dataset as the page's own format has it."""
    dataset = read_dataset(recorded)
    with out.open("w") as file:
        for number in range(len(dataset.episode_length)):
            episode = dataset.episode(number)
            log = {
                "state": episode.observations[:, 0].tolist(),
                "base": episode.actions[:, 0, :1].tolist(),
                "arm": episode.actions[:, 1].tolist(),
                "reward": episode.rewards.tolist(),
                "timeout": episode.timeout,
            }
            file.write(json.dumps(log) + "\n")


def test_blocks_of_python_have_a_file_and_none_is_left_out() -> None:
    assert len(blocks(TEXT)) == TEXT.count("\n```") // 2 + TEXT.startswith("```")
    assert {language for language, *_ in blocks(TEXT)} == {"python", "toml", "bash"}
    assert all(file for language, file, _ in blocks(TEXT) if language != "bash")
