"""Recipes name settings that exist, differ from the defaults, and are trained with unless a user says otherwise."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from omcda_deploy import registry
from omcda_deploy.cli import app
from omcda_deploy.datasets.formats.omiga_hdf5 import read
from omcda_deploy.errors import ConfigError, OmcdaError
from omcda_deploy.experiments.compare import _changed
from omcda_deploy.experiments.train import train
from omcda_deploy.spec import ActionSpec, AgentSpec, TeamSpec
from omcda_deploy.training import recipes as recipe_files
from omcda_deploy.training.recipes import named_recipes, recipe, recipes
from omcda_deploy.training.request import TrainRequest
from omcda_deploy.training.run_folder import read_config
from omcda_deploy.training.settings import build
from tests.support.synthetic import write_dataset

ENTRIES = [
    (name, algorithm, setting)
    for name, values in recipes().items()
    for algorithm, table in values.items()
    if algorithm != "families"
    for setting in table
]


@pytest.mark.parametrize(("name", "algorithm", "setting"), ENTRIES)
def test_an_entry_is_a_setting_and_differs_from_its_default(name: str, algorithm: str, setting: str) -> None:
    values = recipes()[name][algorithm]
    kind = registry.load_algorithm(algorithm).Config
    assert asdict(build(kind, values))[setting] != asdict(kind())[setting]


def test_a_family_has_one_recipe() -> None:
    families = [family for values in recipes().values() for family in values["families"]]
    assert len(families) == len(set(families))
    assert recipe("mamujoco/hopper-3x1", "bc") == recipe("toy/masked", "omcda") == {}
    assert recipe("smac/corridor", "omar") == {"alpha": 5.0}


@pytest.mark.parametrize("name", named_recipes())
def test_a_named_recipe_holds_settings_of_every_family_and_no_file_repeats_another(name: str) -> None:
    every, *families = named_recipes()[name]
    assert every["families"] == ["*"]
    assert sorted(family for values in families for family in values["families"]) == sorted(
        family for values in recipes().values() for family in values["families"]
    )
    for values in families:
        for algorithm, settings in values.items():
            if algorithm != "families":
                build(registry.load_algorithm(algorithm).Config, every[algorithm] | settings)
                assert not set(settings) & set(every[algorithm])


def test_the_paper_is_reached_whatever_the_family_and_the_defaults_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agents = (
        AgentSpec("agent_0", 3, ActionSpec("discrete", 2)),
        AgentSpec("agent_1", 3, ActionSpec("discrete", 2)),
    )
    spec = TeamSpec("smax/5m_vs_6m", agents, state_size=6, control_rate=1.0, episode_limit=10)
    kind = registry.load_algorithm("omcda").Config
    monkeypatch.setattr(kind.__init__, "__defaults__", _with(kind, price="solved", clip_targets=True))
    assert TrainRequest("omcda", 10).resolved(spec).config.price == "solved"
    plan = TrainRequest("omcda", 10, settings={"recipe": "paper", "alpha0": "0.5"}).resolved(spec)
    settings = asdict(plan.config)
    assert settings["price"] == "gradient"
    assert settings["clip_targets"] is False
    assert (settings["divergence_mixer"], settings["d_tot"], settings["alpha0"]) == ("learned", 0.2, 0.5)
    assert plan.recipe["allocation"] == "influence"
    assert "alpha0" not in plan.recipe
    auto = TrainRequest("omcda", 10, settings={"recipe": "paper", "d_tot": "auto"}).resolved(spec)
    assert auto.chooses_budget
    assert auto.config.price == "gradient"


def _with(kind: Any, **changed: object) -> tuple[object, ...]:
    """The defaults of a Config's fields in order, some of them ``changed``."""
    return tuple(changed.get(field.name, field.default) for field in fields(kind))


@pytest.mark.parametrize(
    ("algorithm", "name", "message"),
    [
        ("omcda", "papr", "unknown recipe 'papr': did you mean 'paper'"),
        ("omcda", 3, "unknown recipe '3'"),
        ("bc", "paper", "recipe paper: expected an algorithm of omcda, got bc"),
    ],
)
def test_a_recipe_that_is_not_there_is_refused(algorithm: str, name: object, message: str) -> None:
    with pytest.raises(OmcdaError, match=message):
        TrainRequest(algorithm, 10, settings={"recipe": name}).check()


def test_a_run_of_a_recipe_is_told_from_the_default_of_equal_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path / "cache"))
    agents = tuple(AgentSpec(f"agent_{i}", 3, ActionSpec("continuous", 2)) for i in range(2))
    spec = TeamSpec("mamujoco/hopper-3x1", agents, state_size=6, control_rate=1.0, episode_limit=10)
    path = write_dataset(tmp_path / "data.hdf5", spec, [6] * 5)
    words = [
        "train",
        str(path),
        "--recipe",
        "paper",
        "--steps",
        "10",
        "--behavior-steps",
        "10",
        "--set",
        "hidden=8",
    ]
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "run")], catch_exceptions=False)
    assert result.exit_code == 0
    config = read_config(tmp_path / "run")
    assert config.recipe == "paper"
    short = {"hidden": 8, "behavior.steps": 10}
    assert _changed(config) == {"recipe": "paper", **short}
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "other"), "--algo", "bc"])
    assert isinstance(result.exception, ConfigError)
    assert not (tmp_path / "other").exists()
    chosen = replace(config, budget={"d_tot": config.settings["d_tot"]}, recipe="")
    changed = _changed(chosen)
    assert changed.pop("d_tot") == "auto"  # though it is the recipe's own
    assert short.items() <= changed.items() <= {**config.settings, **short}.items()


def test_a_run_uses_its_recipe_below_what_the_user_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path / "cache"))
    agents = tuple(AgentSpec(f"agent_{i}", 3, ActionSpec("continuous", 2)) for i in range(2))
    spec = TeamSpec("smac/5m_vs_6m", agents, state_size=6, control_rate=1.0, episode_limit=10)
    dataset = read(write_dataset(tmp_path / "data.hdf5", spec, [6] * 5))
    train(
        dataset,
        "omcda",
        tmp_path / "run",
        steps=10,
        settings={"hidden": 8, "batch_size": 8, "alpha0": 2.5},
        behavior={"steps": 10, "check_every": 10},
    )
    settings = read_config(tmp_path / "run").settings
    assert (settings["d_tot"], settings["alpha0"], settings["lr"]) == (1.8, 2.5, 5e-4)


def test_a_recipe_may_set_the_networks_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The behaviour model follows, and the command announces what the recipe sets and the user does not."""
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path / "cache"))
    small = {"small": {"families": ["smac"], "bc": {"hidden": 16, "batch_size": 8, "lr": 1e-3}}}
    monkeypatch.setattr(recipe_files, "recipes", lambda: small)
    agents = tuple(AgentSpec(f"agent_{i}", 3, ActionSpec("continuous", 2)) for i in range(2))
    spec = TeamSpec("smac/5m_vs_6m", agents, state_size=6, control_rate=1.0, episode_limit=10)
    path = write_dataset(tmp_path / "data.hdf5", spec, [6] * 5)
    words = [
        "train",
        str(path),
        "--algo",
        "bc",
        "--steps",
        "10",
        "--behavior-steps",
        "10",
        "--set",
        "lr=0.002",
    ]
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "run")], catch_exceptions=False)
    assert result.exit_code == 0
    config = read_config(tmp_path / "run")
    assert (config.settings["hidden"], config.settings["lr"], config.behavior["hidden"]) == (16, 0.002, 16)
    assert "recipe of smac: hidden=16 batch_size=8\n" in result.stderr
