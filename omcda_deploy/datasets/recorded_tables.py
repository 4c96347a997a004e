"""Tables of recordings: the steps of each model, and the reports of clients or of a CSV file.

The first line of a CSV file names its columns, in any order: ``episode``, ``step`` (from 1 on), ``reward``,
``terminated`` and ``truncated`` (0 or 1), and ``row`` where requests had several rows; further columns are ignored.
Its episodes begin in the order of its lines.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.bundle import TEAM
from omcda_deploy.errors import ContractError, DatasetError, OmcdaError
from omcda_deploy.recordings.columns import REPORT_COLUMNS
from omcda_deploy.recordings.densities import Densities
from omcda_deploy.recordings.reader import SegmentContents, find_segments, read_segment
from omcda_deploy.spec import TeamSpec, require_same_contract

CSV_COLUMNS = ("episode", "step", "reward", "terminated", "truncated")
# What only clients may have reported.
_UNSEEN = ("next_observation", "next_action_mask", "state", "next_state")


class Key(NamedTuple):
    """One of the episodes that were played side by side."""

    episode: str
    row: int


class Table:
    """Rows of recordings, found by their episode. ``columns``: arrays by name, of one length."""

    def __init__(self, columns: Mapping[str, Any]) -> None:
        self.columns = columns
        names, codes = np.unique(columns["episode_id"].astype(str), return_inverse=True)
        rows = np.asarray(columns["row"], np.int64)
        order = np.lexsort((columns["time"], columns["episode_step"], rows, codes))
        self.without_episode = int((names[codes] == "").sum())
        sorted_keys = np.stack([codes[order], rows[order]], axis=1)
        starts = np.flatnonzero(np.append(True, (sorted_keys[1:] != sorted_keys[:-1]).any(axis=1)))
        groups = np.split(order, starts[1:]) if len(order) else []
        keys = (
            [Key(str(names[code]), int(row)) for code, row in sorted_keys[starts].tolist()] if groups else []
        )
        found = {key: group for key, group in zip(keys, groups, strict=True) if key.episode}
        began = {key: (columns["time"][group].min(), key.row) for key, group in found.items()}
        self._rows = {key: found[key] for key in sorted(found, key=lambda key: began[key])}

    def episodes(self) -> Iterable[Key]:
        """The episodes, in the order in which they began."""
        return self._rows.keys()

    def rows(self, key: Key) -> NDArray[np.int64]:
        """The rows of an episode, ordered by step and time."""
        return self._rows.get(key, np.zeros(0, np.int64))


class Reports(Table):
    """Rewards and ends."""


class Steps(Table):
    """The answers of one model. ``labels`` and ``has_density`` [R]: of the bundle that answered."""

    def __init__(self, spec: TeamSpec, model: str, segments: Sequence[SegmentContents]) -> None:
        super().__init__(_joined(segments))
        self.densities = Densities(spec.agents if model == TEAM else (spec.agent(model),))
        sizes = [segment.rows for segment in segments]
        self.labels = np.repeat(
            [f"version {s.metadata['version']} ({s.metadata['bundle_digest'][:12]})" for s in segments], sizes
        )
        self.has_density = np.repeat([s.metadata["divergence_kind"] == "kl" for s in segments], sizes)

    def repeats(self, rows: NDArray[np.int64], first: NDArray[np.bool_]) -> bool:
        """Test if the ``rows`` that are not the ``first`` of their step repeat it: a call that was made again."""
        before = rows[np.maximum.accumulate(np.where(first, np.arange(len(rows)), 0))]
        return all(
            np.array_equal(self.columns[name][rows], self.columns[name][before])
            for name in ("observation", "noise", "action")
        )


@dataclass(frozen=True)
class Recordings:
    """Everything that was read. ``torn``: segments whose end is not whole; ``lost``: rows that writers lost."""

    spec: TeamSpec
    steps: Mapping[str, Steps]
    reports: Reports
    torn: int
    lost: int


def read_recordings(folders: Sequence[Path], rewards: Path | None) -> Recordings:
    """Read the segments of all folders, and rewards and ends from a file in place of those that clients reported.

    Raises :class:`DatasetError` for folders that are no recordings, or not of one team.
    """
    by_model: dict[str, list[SegmentContents]] = {}
    reported: list[SegmentContents] = []
    specs: list[tuple[TeamSpec, Path]] = []
    torn, lost = 0, dict[str, int]()
    for path in find_segments(folders):
        segment = read_segment(path)
        torn += segment is None or segment.torn
        if segment is None:
            continue
        writer = segment.metadata["writer"]
        lost[writer] = max(lost.get(writer, 0), segment.lost)
        specs.append((_spec_of(segment), path))
        if segment.metadata["kind"] == "steps":
            by_model.setdefault(segment.metadata["model"], []).append(segment)
        else:
            reported.append(segment)
    if not by_model:
        raise DatasetError(
            f"{', '.join(map(str, folders))}: expected steps that servers recorded, found none: give the folder of "
            "serve --record  too"
        )
    for spec, path in specs[1:]:
        try:
            require_same_contract(specs[0][0], spec, str(specs[0][1]), str(path))
        except ContractError as error:
            raise DatasetError(str(error)) from error
    spec = specs[0][0]
    steps = {model: Steps(spec, model, segments) for model, segments in by_model.items()}
    columns = _joined(reported)
    if rewards is not None:
        columns = _with_reported(read_rewards(rewards), columns)
    return Recordings(spec, steps, Reports(columns), torn, sum(lost.values()))


def read_rewards(path: Path) -> dict[str, Any]:
    """Read a CSV file of rewards as the columns of reports. Raises :class:`DatasetError`, naming the line."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # Excel begins a file with a mark
            reader = csv.DictReader(file)
            missing = [name for name in CSV_COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise DatasetError(
                    f"{path}: expected a first line with {', '.join(CSV_COLUMNS)}, {missing[0]} is missing"
                )
            lines = [_line(path, reader.line_num, values) for values in reader]
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror})") from error
    except UnicodeDecodeError:
        raise DatasetError(f"{path}: expected a CSV file, got bytes that are no text") from None
    except csv.Error as error:
        raise DatasetError(
            f"{path}: behind line {reader.line_num}: expected a CSV file, got something else ({error})"
        ) from None
    columns = _empty_reports()
    episodes, rows, steps, rewards, terminated, truncated = zip(*lines, strict=True) if lines else ((),) * 6
    columns |= {
        "time": np.arange(len(lines)),
        "episode_id": np.array(episodes, object),
        "row": np.array(rows, np.int64),
        "episode_step": np.array(steps, np.int64),
        "reward": np.array(rewards, np.float64),
        "terminated": np.array(terminated, np.uint8),
        "truncated": np.array(truncated, np.uint8),
        "fallback": np.zeros(len(lines), np.uint8),
    }
    for name in _UNSEEN:
        columns[name] = [np.zeros(0, np.float32)] * len(lines)
    return columns


def _with_reported(rewards: dict[str, Any], reported: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of ``rewards`` with what clients ``reported`` of its steps besides rewards and ends."""
    places: dict[tuple[Any, ...], int] = {}
    for place, key in enumerate(_keys(reported)):
        known = places.setdefault(key, place)
        if not reported["fallback"][known]:  # of two reports that of a fallback counts
            places[key] = place
    found = [(row, places[key]) for row, key in enumerate(_keys(rewards)) if key in places]
    for name in ("fallback", *_UNSEEN):
        for row, place in found:
            rewards[name][row] = reported[name][place]
    return rewards


def _keys(columns: Mapping[str, Any]) -> Iterable[tuple[Any, ...]]:
    """Name the step of each row: its episode, row and number."""
    return zip(*(columns[name].tolist() for name in ("episode_id", "row", "episode_step")), strict=True)


def _line(
    path: Path, number: int, values: Mapping[str, str | None]
) -> tuple[str, int, int, float, bool, bool]:
    flags = {"0": False, "1": True, "false": False, "true": True}
    try:
        reward = float(values["reward"] or "")
        row, step = int(values.get("row") or 0), int(values["step"] or "")
        if not np.isfinite(reward) or not 0 <= row < 2**63 or not 0 <= step < 2**63:
            raise ValueError
        return (
            values["episode"] or "",
            row,
            step,
            reward,
            flags[(values["terminated"] or "").strip().lower()],
            flags[(values["truncated"] or "").strip().lower()],
        )
    except (ValueError, KeyError):
        raise DatasetError(
            f"{path}: line {number}: expected an episode, a whole step, a finite reward, and 0 or 1 for terminated "
            f"and truncated, got {dict(values)}"
        ) from None


def _joined(segments: Sequence[SegmentContents]) -> dict[str, Any]:
    """Join the columns of segments."""
    if not segments:
        return _empty_reports()
    joined: dict[str, Any] = {}
    for name, values in segments[0].columns.items():
        parts = [segment.columns[name] for segment in segments]
        joined[name] = (
            np.concatenate(parts)
            if isinstance(values, np.ndarray)
            else [row for part in parts for row in part]
        )
    return joined


def _empty_reports() -> dict[str, Any]:
    return {
        column.name: np.zeros(0, object if column.name == "episode_id" else np.int64)
        for column in REPORT_COLUMNS
    }


def _spec_of(segment: SegmentContents) -> TeamSpec:
    try:
        return TeamSpec.from_json(json.loads(segment.metadata["team"]))
    except (KeyError, ValueError, TypeError, OmcdaError) as error:
        raise DatasetError(f"{segment.path}: its team spec is damaged: {error}") from error
