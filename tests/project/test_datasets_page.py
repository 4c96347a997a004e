"""The blocks of docs/datasets.md run, but for the size of the training run; its tables hold what the code has."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from omcda_deploy.cli import app
from omcda_deploy.datasets.formats import npz_episodes
from omcda_deploy.datasets.teams import read_team
from omcda_deploy.envs.starcraft import MAPS
from omcda_deploy.registry import foreign_formats, read_dataset

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "datasets.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, flags=re.DOTALL)
SMALLER = "--steps 20 --behavior-steps 20 --set hidden=16 --set batch_size=16"


def test_the_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path / "cache"))
    variables: dict[str, object] = {}
    ran = []
    for language, text in BLOCKS:
        if language == "python":
            exec(text, variables)
        elif language == "bash":
            for line in text.replace("--steps 20000", SMALLER).splitlines():
                words = shlex.split(line.removeprefix("omcda-deploy "))
                if words[0] == "behavior":  # minutes of PPO: tests/training/behavior records a training
                    continue
                result = CliRunner().invoke(app, words)
                assert result.exit_code == 0, f"{line}: {result.output}{result.exception!r}"
                ran.append(words[0])
        else:
            (tmp_path / "team.json").write_text(text)
            assert read_team(tmp_path / "team.json").names == ("arm", "base")
            json.loads(text)
    assert {"import", "train", "to-minari", "split", "subset", "merge"} <= set(ran)
    reach, again = read_dataset("reach.hdf5"), read_dataset("again.hdf5")
    assert again.digest == reach.digest == read_dataset("own.hdf5").digest
    assert len(read_dataset("both.hdf5").episode_length) == len(reach.episode_length) == 20
    assert len(read_dataset("loop.hdf5").episode_length) == 3


def table(page: str, heading: str) -> list[list[str]]:
    """The cells of the rows below a heading of a page."""
    section = re.split(rf"\n#+ {re.escape(heading)}\n", (DOCS / page).read_text())[1].split("\n#")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]


def test_the_formats_and_their_keys_are_all_listed() -> None:
    listed = {row[0] for row in table("datasets.md", "Published SMAC datasets")}
    assert set(foreign_formats()) <= listed
    keys = {row[0] for row in table("datasets.md", "Your own logs")}
    assert keys - {"key"} == {*npz_episodes._REQUIRED, *npz_episodes._OPTIONAL}


def test_the_pages_list_every_map_with_its_sizes() -> None:
    smac = {row[0]: row[1:] for row in table("smac.md", "Tasks")}
    formulas = {row[0]: row[1:] for row in table("simulators.md", "Sizes by SMAC's formulas")}
    for name, smac_map in MAPS.items():
        spec = smac_map.spec(name)
        sizes = [spec.observation_size, spec.state_size, spec.action_size, smac_map.limit]
        assert smac[f"smac/{name}"] == [str(value) for value in (smac_map.agents, *sizes)]
        o, s, a, limit = map(str, sizes)
        assert formulas[name][4:] == [a, o, s, limit]
    assert len(smac) == len(formulas) == len(MAPS) + 1  # the heading
