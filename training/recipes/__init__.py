"""Settings by task family, published or chosen here: one TOML file per family, with what differs from defaults.

The part of a task's name before the slash chooses the file whose ``families`` list holds it; a family without a
file trains with the defaults. A user's settings override a recipe.

A folder is a recipe that a run asks for by name, ``train --recipe paper``: its files have the same form, ``*``
stands for every family, and their settings override those of the family. They are stated in full, whether they
differ from the defaults or not, so that the name means the same when defaults change.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from omcda_deploy.errors import ConfigError, UnknownNameError

EVERY = "*"  # in place of a family


def recipe(task: str, algorithm: str, name: str | None = None) -> dict[str, Any]:
    """Return the settings of ``algorithm`` on a task, such as ``smac/5m_vs_6m``, that differ from its defaults.

    With ``name``, the settings of that recipe come on top. Raises as :func:`require_recipe` does.
    """
    files = list(recipes().values())
    if name is not None:
        require_recipe(name, algorithm)
        files += named_recipes()[name]
    family, settings = task.partition("/")[0], dict[str, Any]()
    for values in files:
        if {family, EVERY} & set(values["families"]):
            settings |= values.get(algorithm, {})
    return settings


def require_recipe(name: str, algorithm: str) -> None:
    """Raise :class:`UnknownNameError` unless there is a recipe of that name, and :class:`ConfigError` unless it
    has settings of ``algorithm``.
    """
    if name not in named_recipes():
        raise UnknownNameError("recipe", str(name), named_recipes())
    known = {key for values in named_recipes()[name] for key in values} - {"families"}
    if algorithm not in known:
        raise ConfigError(
            f"recipe {name}: expected an algorithm of {', '.join(sorted(known))}, got {algorithm}: leave it out"
        )


def families() -> frozenset[str]:
    """Return the families of tasks that have a recipe."""
    return frozenset(family for values in recipes().values() for family in values["families"])


@cache
def recipes() -> dict[str, dict[str, Any]]:
    """Read the recipe files of families, by name: ``families``, and a table per algorithm that has differences."""
    return _files_in(resources.files(__package__))


@cache
def named_recipes() -> dict[str, list[dict[str, Any]]]:
    """Read the recipes with a name: what their files hold, those of single families last."""
    folders = {
        folder.name: _files_in(folder) for folder in resources.files(__package__).iterdir() if folder.is_dir()
    }
    return {
        name: sorted(files.values(), key=lambda values: values["families"] != [EVERY])
        for name, files in sorted(folders.items())
        if files
    }


def _files_in(folder: Traversable) -> dict[str, dict[str, Any]]:
    files = [file for file in folder.iterdir() if file.name.endswith(".toml")]
    return {
        file.name.removesuffix(".toml"): tomllib.loads(file.read_text())
        for file in sorted(files, key=lambda file: file.name)
    }
