"""``inspect``: a path is told by what lies there; the keys of JSON that programs read."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table
from typer.testing import CliRunner

from omcda_deploy import registry
from omcda_deploy.bundle import read_bundle
from omcda_deploy.cli import app
from omcda_deploy.commands import print_note, print_table, print_text
from omcda_deploy.commands.inspection import kind_of
from omcda_deploy.errors import ConfigError
from omcda_deploy.experiments.train import train
from omcda_deploy.registry import team_spec
from tests.support.bundles import with_references, write_test_bundle
from tests.support.synthetic import write_dataset

TASK = "toy/masked"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset, a bundle and runs of two seeds."""
    folder = tmp_path_factory.mktemp("place")
    data = write_dataset(folder / "data.hdf5", team_spec("mamujoco/hopper-3x1"), [30, 20])
    with_references(write_test_bundle(folder / "bundle", team_spec(TASK)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMCDA_CACHE", str(folder / "cache"))
        small = {"hidden": 8, "batch_size": 8}
        train(data, "omcda", folder / "runs", steps=10, seed=[0, 3], settings=small, behavior={"steps": 5})
    return folder


def call(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_path_is_told_by_what_lies_there(place: Path) -> None:
    assert [kind_of(place / name) for name in ("data.hdf5", "bundle", "runs/seed3")] == [
        "dataset",
        "bundle",
        "run",
    ]
    with pytest.raises(
        ConfigError, match=r"runs: .* found a folder of none: look at .* such as .*runs/seed0"
    ):
        kind_of(place / "runs")
    assert kind_of(place / "none.hdf5") == "dataset"
    with pytest.raises(ConfigError, match="nowhere: no such file or folder"):
        kind_of(place / "nowhere")


@pytest.mark.parametrize(
    ("name", "kind"), [("data.hdf5", "dataset"), ("bundle", "bundle"), ("runs/seed3", "run")]
)
def test_a_guess_prints_what_the_explicit_form_prints(place: Path, name: str, kind: str) -> None:
    assert call("inspect", place / name) == call("inspect", kind, place / name)
    values = json.loads(call("inspect", "--json", place / name))
    assert values == json.loads(call("inspect", kind, place / name, "--json"))


def test_a_guess_takes_names_of_commands_and_options_before_the_path(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """README's own names for them are run and bundle."""
    monkeypatch.chdir(place)
    (place / "run").symlink_to("runs/seed3")
    try:
        assert call("inspect", "run") == call("inspect", "./run") == call("inspect", "run", "run")
        assert json.loads(call("inspect", "run", "--json")) == json.loads(call("inspect", "--json", "./run"))
    finally:
        (place / "run").unlink()
    assert call("inspect", "bundle") == call("inspect", "./bundle")
    hopper = ("--task", "mamujoco/hopper-3x1")
    assert call("inspect", *hopper, "data.hdf5") == call("inspect", "data.hdf5", *hopper)
    assert "A run folder." in call("inspect", "run", "--help")
    assert "a bundle or a run folder" in call("inspect", "--help")


def test_what_is_printed_of_the_users_is_no_markup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("b [old]", "mix [/v2]", "fleet:Robot: here", "r2:car:x", "[bold]b[/bold]")
    table = Table(title="title [/v2] :car:")
    for name in names:
        table.add_column(name)
    table.add_row(*names)
    print_table(table)
    for name in names:
        print_text(name)
        print_note(name)
    printed = capsys.readouterr()
    assert all(printed.out.count(name) == 3 and name in printed.err for name in names)
    assert "title [/v2] :car:" in printed.out


def test_a_bundles_table_says_what_to_send_and_where_it_came_from(place: Path) -> None:
    bundle = read_bundle(place / "bundle")
    table = call("inspect", place / "bundle")
    assert table.startswith(f"{TASK}\n")
    for text in (
        "observation, noise, action_mask",
        "raw, as the simulator gives them",
        "Gumbel",
        "kl, in nats",
        bundle.digest,
        bundle.spec.contract_hash,
        "an integer from 0 to 3",
        "3 numbers",
    ):
        assert text in table, text
    assert "standardised in the graph" in call("inspect", registry_bundle())
    assert json.loads(call("inspect", "bundle", place / "bundle", "--json")) == dict(bundle.manifest)


def registry_bundle() -> Path:
    from omcda_deploy.play.shipped import behavior_policies

    return behavior_policies("mamujoco/hopper-3x1", "medium")[0].bundle


def test_a_runs_table_says_how_far_it_is(place: Path, tmp_path: Path) -> None:
    table = call("inspect", place / "runs" / "seed3")
    for text in ("omcda on mamujoco/hopper-3x1", "10 of 10", "1, of steps 10 to 10", "batch_size=8 hidden=8"):
        assert text in table, text
    # Only what the run has of today's recipe, which begins with d_tot 0.03 and tau 0.03, is the recipe's.
    config = json.loads((place / "runs" / "seed3" / "config.json").read_text())
    assert config["settings"]["d_tot"] == 0.03
    assert re.search(r"recipe's *(│ )?d_tot=0.03 tau=0.03", table)
    shutil.copytree(place / "runs" / "seed3", tmp_path / "older")
    config["settings"]["tau"] = 0.07
    (tmp_path / "older" / "config.json").write_text(json.dumps(config))
    older = call("inspect", tmp_path / "older")
    assert "tau=0.07" in older
    assert re.search(r"recipe's *(│ )?d_tot=0.03 *(│|\n)", older)
    shutil.copytree(place / "runs" / "seed3", tmp_path / "begun")
    for file in ("timing.json", "policies/step-00000010.pt"):
        (tmp_path / "begun" / file).unlink()
    begun = call("inspect", tmp_path / "begun")
    assert "0 of 10" in begun
    assert "none yet" in begun


def keys(values: Any) -> set[str]:
    return set(values[0])


def test_lists_for_programs_have_the_documented_keys() -> None:
    tasks = json.loads(call("tasks", "--json"))
    assert keys(tasks) == {"name", "tiers"}
    assert [task["name"] for task in tasks] == list(registry.tasks())
    assert {task["name"]: task["tiers"] for task in tasks}[TASK] == ["behavior", "random"]
    algorithms = json.loads(call("algorithms", "--json"))
    assert keys(algorithms) == {"name", "actions", "summary", "paper", "divergence"}
    assert [entry["name"] for entry in algorithms] == list(registry.algorithms())
    page = (Path(__file__).parents[2] / "docs/command-line.md").read_text()
    for name in (*keys(tasks), *keys(algorithms)):
        assert f"`{name}`" in page
