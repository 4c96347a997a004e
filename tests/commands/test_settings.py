"""``settings``: defaults, recipe, ranges and meanings of an algorithm."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
from typer.testing import CliRunner

from omcda_deploy import registry
from omcda_deploy.cli import app
from omcda_deploy.training.recipes import recipe
from omcda_deploy.training.settings import Choice, LearningRate, Range, check, describe


@dataclass(frozen=True)
class Config:
    lr: Annotated[LearningRate, "of the critic"] = 1e-3
    share: Annotated[float, Range(0.5), "a share"] = 0.75
    kind: Annotated[str, Choice("a", "b", refused={"c": "it is not"})] = "a"
    twin: Annotated[bool, "two of them"] = True

    def __post_init__(self) -> None:
        check(self)


def call(*words: str) -> str:
    result = CliRunner().invoke(app, ["settings", *words], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def test_a_setting_says_its_range_and_the_last_of_its_texts() -> None:
    rows = {setting.name: setting.to_json() for setting in describe(Config)}
    assert {name: (row["range"], row["meaning"]) for name, row in rows.items()} == {
        "lr": ("0 to 1", "of the critic"),
        "share": ("a finite number from 0.5 on", "a share"),
        "kind": ("a, b", ""),
        "twin": ("true, false", "two of them"),
    }
    assert rows["share"] == {
        "name": "share",
        "type": "float",
        "default": 0.75,
        "range": "a finite number from 0.5 on",
        "low": 0.5,
        "high": None,
        "choices": None,
        "meaning": "a share",
    }
    assert (rows["kind"]["choices"], rows["kind"]["low"]) == (["a", "b"], None)


@pytest.mark.parametrize("task", [None, "smac/5m_vs_6m", "smac-mappo/5m_vs_6m"])
def test_the_recipe_of_a_task_stands_beside_the_defaults(task: str | None) -> None:
    words = [] if task is None else [task]
    values: dict[str, Any] = json.loads(call("omcda", *words, "--json"))
    assert (values["algorithm"], values["task"]) == ("omcda", task)
    published = {} if task is None else recipe(task, "omcda")
    assert {
        row["name"]: row["recipe"] for row in values["settings"] if row["recipe"] is not None
    } == published
    kind = registry.load_algorithm("omcda").Config
    assert {row["name"]: row["default"] for row in values["settings"]} == vars(kind())
    header, *lines = call("omcda", *words).splitlines()
    assert ("recipe of" in header) == (task is not None)
    assert len(lines) == len(values["settings"])
    assert lines[0].split()[:2] == ["d_tot", f"{kind().d_tot:g}"]
    assert (lines[0].split()[2] == "1.8") == (task is not None)
