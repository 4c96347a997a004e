"""Exact distributions of the policy that acted, in datasets that know them (:mod:`omcda_deploy.datasets.recorded`).

By name, each with a row per row of the data: ``mean`` and ``log_std`` [R, N, A] of the Gaussian under the tanh, or
``logits`` [R, N, A], normalised and lowest where an action was not available; and ``log_prob`` [R, N], float64, of
the recorded action. Rows in which nobody acts hold zeros. In a file they are `omcda/behavior_mean` and so on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.errors import DatasetError
from omcda_deploy.spec import TeamSpec

BehaviorRows: TypeAlias = Mapping[str, NDArray[Any]]

PREFIX = "behavior_"


def row_shapes(spec: TeamSpec) -> dict[str, tuple[int, ...]]:
    """Return the shape of a row of each array."""
    agents, actions = len(spec.agents), spec.action_size
    names = ("mean", "log_std") if spec.action_kind == "continuous" else ("logits",)
    return {**dict.fromkeys(names, (agents, actions)), "log_prob": (agents,)}


def type_of(name: str) -> str:
    """Return the type of an array."""
    return "<f8" if name == "log_prob" else "<f4"


def require_rows(rows: BehaviorRows, steps: int, spec: TeamSpec, label: str) -> None:
    """Raise :class:`DatasetError` unless ``rows`` are those of ``steps`` steps, and finite."""
    shapes = row_shapes(spec)
    if rows.keys() != shapes.keys():
        raise DatasetError(
            f"{label}: behavior: expected {', '.join(shapes)}, got {', '.join(rows) or 'nothing'}"
        )
    for name, shape in shapes.items():
        if np.shape(rows[name]) != (steps, *shape):
            raise DatasetError(
                f"{label}: {PREFIX}{name}: expected shape {[steps, *shape]}, got {list(np.shape(rows[name]))}"
            )
        if not np.isfinite(rows[name]).all():
            raise DatasetError(
                f"{label}: {PREFIX}{name}: expected finite numbers, got others: leave behavior out"
            )


def read_rows(group: Any, count: int, spec: TeamSpec, path: Path) -> dict[str, NDArray[Any]] | None:
    """Read the arrays of a file's group; None where it has none. Raises :class:`DatasetError`."""
    if group is None or not any(name.startswith(PREFIX) for name in group):
        return None
    rows = {
        name: np.asarray(group[PREFIX + name], type_of(name))
        for name in row_shapes(spec)
        if PREFIX + name in group
    }
    require_rows(rows, count, spec, str(path))
    return rows
