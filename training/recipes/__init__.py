"""Published settings by task family: one TOML file per family, with differences from the algorithms' defaults.

The part of a task's name before the slash chooses the file whose ``families`` list holds it; a family without a
file trains with the defaults. A user's settings override a recipe.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib import resources
from typing import Any


def recipe(task: str, algorithm: str) -> dict[str, Any]:
    """Return the settings of ``algorithm`` on a task, such as ``smac/5m_vs_6m``, that differ from its defaults."""
    for values in recipes().values():
        if task.partition("/")[0] in values["families"]:
            return dict(values.get(algorithm, {}))
    return {}


@cache
def recipes() -> dict[str, dict[str, Any]]:
    """Read all recipe files, by name: ``families``, and a table per algorithm that has differences."""
    files = [file for file in resources.files(__package__).iterdir() if file.name.endswith(".toml")]
    return {
        file.name.removesuffix(".toml"): tomllib.loads(file.read_text())
        for file in sorted(files, key=lambda file: file.name)
    }
