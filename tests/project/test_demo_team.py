"""The team that comes with the package is what its page, its README and the picture say."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from omcda_deploy.bundle import DEMO_TEAM, Bundle, read_bundle
from omcda_deploy.commands.demo import FULL
from omcda_deploy.envs import mamujoco
from omcda_deploy.experiments.results import read_results
from omcda_deploy.serve import supervisor
from omcda_deploy.serve.options import ServeOptions
from tests.support.pages import DOCS, run_command

PAGE = DOCS / "results" / "demo.md"


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return read_bundle(DEMO_TEAM)


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    module = importlib.util.spec_from_file_location("generate_team", DOCS / "generate_team.py")
    assert module is not None
    assert module.loader is not None
    loaded = importlib.util.module_from_spec(module)
    module.loader.exec_module(loaded)
    return loaded


def test_it_is_small(bundle: Bundle) -> None:
    assert sum(file.stat().st_size for file in bundle.path.rglob("*") if file.is_file()) < 2_000_000


def test_readme_and_picture_are_drawn_from_its_manifest(bundle: Bundle, generator: ModuleType) -> None:
    assert (DEMO_TEAM / "README.md").read_text() == generator.card(bundle)
    picture = (DOCS / "team.svg").read_text()
    assert picture == generator.picture(bundle)
    assert "prefers-color-scheme:dark" in picture
    for name in bundle.spec.names:
        assert f">{name} · " in picture


def test_page_demo_and_team_have_the_same_settings(bundle: Bundle) -> None:
    [page] = read_results(PAGE.with_suffix(".toml")).pages
    training = bundle.manifest["training"]
    assert (page.task, page.tier, page.transitions) == (FULL.task, FULL.tier, FULL.transitions)
    assert bundle.spec.task == FULL.task
    assert {
        name: {key: value for key, [value] in grid.items()} for name, grid in page.runs[0]["grid"].items()
    } == FULL.settings
    assert page.runs[0]["steps"] == FULL.steps == training["step"] == training["steps"]
    assert (training["algorithm"], training["seed"]) == ("omcda", 0)
    for name, value in FULL.settings["omcda"].items():
        assert training["settings"][name] == value
    assert training["dataset_digest"] in PAGE.read_text()


def test_its_returns_are_those_of_the_page(bundle: Bundle) -> None:
    """A row of the page has mean and std over seeds at T 0 and 1."""
    measured = bundle.manifest["training"]["measured"]
    page = PAGE.read_text().replace("\u202f", "").replace("\u2212", "-").replace(" ", "")
    for name, runs in measured["runs"].items():
        [row] = re.findall(rf"(?m)^\|{name}[^|]*\|20000.*$", page)
        for temperature in (0.0, 1.0):
            values = np.array(runs)[:, measured["temperatures"].index(temperature)]
            assert f"|{values.mean():.1f}±{values.std():.1f}|" in row
    means = {name: np.mean(runs, axis=0) for name, runs in measured["runs"].items()}
    readme = " ".join((DOCS.parent / "README.md").read_text().split())
    assert (
        f"OMCDA returns {means['omcda'][0]:,.0f} and falls in {fell(page, 'omcda')} of the episodes" in readme
    )
    assert f"the clone returns {means['bc'][0]:,.0f} and falls in {fell(page, 'bc')}" in readme
    assert "At every T, every seed of OMCDA is above every seed of the clone." in readme
    ours, theirs = (np.array(measured["runs"][name]) for name in ("omcda", "bc"))
    assert (ours.min(0) > theirs.max(0)).all()


def fell(page: str, name: str) -> str:
    """The share of episodes without noise that fell, of a row of the page, rounded."""
    found = re.search(rf"(?m)^\|{name}[^|]*\|0\(selected\)\|.*\|(\d+\.\d)±[^|]*%\|$", page)
    assert found is not None
    return f"{float(found[1]):.0f} %"


def test_evaluate_demo_needs_no_other_option(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle: Bundle
) -> None:
    monkeypatch.setattr(mamujoco, "EPISODE_LIMIT", 5)
    file = tmp_path / "out.json"
    run_command(["evaluate", "--demo", "--episodes", "1", "--json", str(file)], monkeypatch)
    played = json.loads(file.read_text())
    assert played["task"] == FULL.task
    assert played["team"]["bundle_digest"] == bundle.digest


def test_serve_demo_needs_no_other_option(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[ServeOptions] = []
    monkeypatch.setattr(supervisor, "serve_team", started.append)
    run_command(["serve", "--demo"], monkeypatch)
    assert [options.source for options in started] == [DEMO_TEAM]
