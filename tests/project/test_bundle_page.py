"""docs/bundle.md has every tensor and every key, and its block runs; docs/observations.md is what is generated."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from omcda_deploy.bundle import CONTINUOUS_PARAMETERS, DISCRETE_PARAMETERS
from omcda_deploy.spec import TeamSpec
from tests.support.exported import RAGGED, Exported, team_spec

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "bundle.md").read_text()


def names(heading: str) -> set[str]:
    """Names in the first column of the first table below a heading."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0].split("\nDivergences")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_the_tables_are_those_of_graphs_and_manifest_and_the_block_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exported = Exported(tmp_path / "bundle", team_spec(**RAGGED))
    assert names("Inputs") == {"observation", "noise", "action_mask"}
    parameters = {*CONTINUOUS_PARAMETERS, *DISCRETE_PARAMETERS}
    assert names("Outputs") == {"action", "divergence", "behavior_action", *parameters}
    manifest = exported.bundle.manifest
    assert names("The manifest") == set(manifest)
    [row] = [line for line in PAGE.splitlines() if line.startswith("| `team` | the team:")]
    told = set(re.findall(r"`(\w+)`", row)) - {"team", "continuous", "discrete", "name"}
    agent = set(manifest["team"]["agents"][0]) - {"name"}
    assert told == set(manifest["team"]) | agent
    present = {str(file.relative_to(exported.bundle.path)) for file in exported.bundle.path.rglob("*.*")}
    assert present - set(manifest["files"]) == {"bundle.json", "README.md"}
    monkeypatch.chdir(tmp_path)
    [python] = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(python, {})
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()] == list(exported.spec.names)


def test_what_the_contract_leaves_out() -> None:
    [sentence] = re.findall(r"\*\*The contract\*\*.*?\.\n?", PAGE, flags=re.DOTALL)
    spec: TeamSpec = team_spec()
    left_out = set(spec.to_json()) - set(spec.contract())
    assert left_out == {"task", *re.findall(r"`(\w+)`", sentence)} - {"team"}


def test_the_page_of_observations_is_what_the_simulators_say() -> None:
    for package in ("gymnasium_robotics", "mujoco"):
        pytest.importorskip(package)
    module = importlib.util.spec_from_file_location("generator", DOCS / "generate_observations.py")
    assert module
    assert module.loader
    generator = importlib.util.module_from_spec(module)
    module.loader.exec_module(generator)
    assert (DOCS / "observations.md").read_text() == generator.page(), "run  make docs"
