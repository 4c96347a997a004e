"""Sizes and teams of OMIGA's HDF5 files; the layout is in :mod:`omcda_deploy.datasets.formats.omiga_hdf5`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

from omcda_deploy import registry
from omcda_deploy.datasets.hdf5 import READABLE_VERSIONS
from omcda_deploy.errors import ContractError, DatasetError, OmcdaError, UnknownNameError
from omcda_deploy.spec import TeamSpec, require_same_contract

# Tasks of the published files, by the start of their names and by (N, O, A, discrete).
_BY_NAME = {
    "Hopper-v2-3x1-": "mamujoco/hopper-3x1",
    "Ant-v2-2x4-": "mamujoco/ant-2x4",
    "HalfCheetah-v2-6x1-": "mamujoco/halfcheetah-6x1",
}
_BY_SHAPE = {
    (3, 14, 1, False): "mamujoco/hopper-3x1",
    (2, 113, 4, False): "mamujoco/ant-2x4",
    (6, 23, 1, False): "mamujoco/halfcheetah-6x1",
}
_IMPORT = ". Data of a team of your own: first  omcda-deploy import FILE --team TEAM --out NEW"

logger = logging.getLogger(__name__)


class Shape(NamedTuple):
    """Sizes of a file's arrays."""

    agents: int
    observation_size: int
    action_size: int
    discrete: bool

    @property
    def observation(self) -> tuple[int, int]:
        """Shape of a row of `o`."""
        return self.agents, self.observation_size

    @property
    def action(self) -> tuple[int, int]:
        """Shape of a row of `a`."""
        return self.agents, 1 if self.discrete else self.action_size


def shape_of(file: Any, path: Path) -> Shape:
    """Sizes of the arrays. Raises :class:`DatasetError` for one that is missing or does not fit the others."""
    for name in "osard":
        if not hasattr(file.get(name), "dtype"):
            raise DatasetError(f"{path}: expected arrays o, s, a, r, d, found no {name} among {sorted(file)}")
        if file[name].dtype.kind not in "fiub":
            raise DatasetError(f"{path}: array {name}: expected numbers, got type {file[name].dtype}")
    observations = file["o"].shape
    if len(observations) != 3 or observations[0] < 2:
        raise DatasetError(
            f"{path}: array o: expected shape [R, N, O] of at least 2 rows, got {list(observations)}"
        )
    rows, agents, size = observations
    for name in "sa":
        shape = file[name].shape
        if len(shape) != 3 or shape[:2] != (rows, agents):
            raise DatasetError(
                f"{path}: array {name}: expected shape [{rows}, {agents}, …], got {list(shape)}"
            )
    for name in "rd":
        shape = file[name].shape
        if shape not in ((rows,), (rows, 1)):
            raise DatasetError(f"{path}: array {name}: expected shape [{rows}, 1], got {list(shape)}")
    if "avail" not in file:
        return Shape(agents, size, file["a"].shape[2], discrete=False)
    choices, masks = file["a"], file["avail"]
    if choices.dtype.kind not in "iu" or choices.shape[2] != 1:
        raise DatasetError(
            f"{path}: array a: expected integers of shape [{rows}, {agents}, 1] beside an array avail, got "
            f"{choices.dtype} of shape {list(choices.shape)}"
        )
    if not hasattr(masks, "dtype") or masks.dtype.kind not in "iub" or masks.shape[:-1] != (rows, agents):
        raise DatasetError(
            f"{path}: array avail: expected integers of shape [{rows}, {agents}, …], got "
            f"{getattr(masks, 'dtype', 'a group')} of shape {list(getattr(masks, 'shape', ()))}"
        )
    return Shape(agents, size, masks.shape[2], discrete=True)


def spec_of(group: Any, task: TeamSpec | str | None, path: Path, shape: Shape) -> TeamSpec:
    """The spec of ``task``, else the file's own, else that of a published file; it must fit ``shape``.

    A file's own spec is enough for the task that it names: the simulator need not be known here. Raises
    :class:`DatasetError`, also for a spec that is damaged, and what :func:`omcda_deploy.registry.team_spec` raises.
    """
    stored = _stored_spec(group, path)
    if isinstance(task, TeamSpec):
        spec = task
    elif stored is not None and task in (None, stored.task):
        spec = stored
    else:
        name = _guessed_task(path, shape) if task is None else task
        if stored is not None and name not in registry.tasks():
            raise UnknownNameError("task", name, [*registry.tasks(), stored.task])
        try:
            spec = registry.team_spec(name)
        except UnknownNameError as error:
            error.args = (f"{error}{_IMPORT}",)
            raise
    if stored is not None:
        try:
            require_same_contract(stored, spec, str(path), "the task asked for")
        except ContractError as error:
            raise DatasetError(str(error)) from error
    expected = Shape(
        len(spec.agents), spec.observation_size, spec.action_size, spec.action_kind == "discrete"
    )
    if expected != shape:
        raise DatasetError(
            f"{path}: {spec.task} has {expected.agents} agents with observations of {expected.observation_size} "
            f"and {_actions(expected)}, the file {shape.agents} with {shape.observation_size} and "
            f"{_actions(shape)}: name the data's own task"
        )
    return spec


def published_task(path: Path, shape: Shape) -> str | None:
    """Return the task of a file without a team, by its name or its sizes; None for one that is none of OMIGA's."""
    by_name = (_BY_NAME[start] for start in _BY_NAME if path.name.startswith(start))
    return next(by_name, None) or _BY_SHAPE.get(shape)


def _guessed_task(path: Path, shape: Shape) -> str:
    """Return the published task, with a warning where sizes alone tell. Raises :class:`DatasetError` for none."""
    task = published_task(path, shape)
    if task is None:
        raise DatasetError(
            f"{path} does not say of which task it is, and {shape.agents} agents with observations of "
            f"{shape.observation_size} and {_actions(shape)} fit none of OMIGA's: name the task{_IMPORT}"
        )
    if not path.name.startswith(tuple(_BY_NAME)):
        logger.warning(
            "%s does not say of which task it is, and is taken for %s by its sizes alone: name the task%s",
            path,
            task,
            _IMPORT,
        )
    return task


def _actions(shape: Shape) -> str:
    if shape.discrete:
        return f"{shape.action_size} choices (arrays a and avail)"
    return f"actions of {shape.action_size} numbers"


def _stored_spec(group: Any, path: Path) -> TeamSpec | None:
    if group is None or "spec" not in group.attrs:
        return None
    version_of(group, path)
    try:
        return TeamSpec.from_json(json.loads(group.attrs["spec"]))
    except (TypeError, ValueError, OmcdaError) as error:
        raise DatasetError(f"{path}: its team spec is damaged: {error}") from error


def version_of(group: Any, path: Path) -> int:
    """The format version of a file with a group. Raises :class:`DatasetError` for one that is not read here."""
    version = group.attrs.get("format_version")
    if version not in READABLE_VERSIONS:
        raise DatasetError(
            f"{path} has format version {version}, expected {' or '.join(map(str, READABLE_VERSIONS))}: update "
            "omcda-deploy, or collect again"
        )
    return int(version)
