"""Records of pages: every run behind a page, with its configuration and the episodes that it was played.

A page's record lies beside it, with the ending ``.json.gz``, and holds what tables and figures are made of. By it
overviews cover the page, the page is written anew, and readers count for themselves, where no run is at hand.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from omcda_deploy.errors import ConfigError
from omcda_deploy.experiments.compare import clone_result, result_of
from omcda_deploy.files import write_bytes

if TYPE_CHECKING:
    from omcda_deploy.experiments.scores import Conditions
    from omcda_deploy.report.comparison import Curves, Result
    from omcda_deploy.report.scores import Score
    from omcda_deploy.training.run_folder import RunConfig

VERSION = 1


@dataclass(frozen=True)
class Played:
    """A run that was played, or the clone that it began with: its configuration, and the rest as JSON holds it."""

    config: RunConfig
    values: Mapping[str, Any]

    @classmethod
    def of(cls, config: RunConfig, result: Result) -> Played:
        """Take what a result was made of."""
        values = {
            "score": result.score.to_json(),
            "curves": None if result.curves is None else _curves(result.curves),
            "seconds": result.seconds,
            "diverged": result.diverged,
        }
        # Where its dataset lay is nothing to a record's readers.
        return cls(replace(config, dataset=Path(config.dataset).name), values)

    def result(self, run: str, conditions: Conditions) -> Result:
        """Make the result again, by the run's name.

        Raises ValueError, KeyError, TypeError or AttributeError for what :meth:`of` did not make, or not from
        episodes of these conditions.
        """
        curves = self.values["curves"]
        return result_of(
            run,
            self.config,
            self._score(conditions),
            None if curves is None else _read_curves(curves, self.config),
            self.values["seconds"],
            diverged=self.values["diverged"],
        )

    def clone(self, run: str, conditions: Conditions) -> Result:
        """Make the result of the clone again, as :meth:`result` does."""
        return clone_result(run, self.config, self._score(conditions))

    def _score(self, conditions: Conditions) -> Score:
        from omcda_deploy.report.scores import Score

        own = conditions.of(self.config.seed)
        score = Score.read(self.values["score"], own.to_json())
        if score.conditions != own.to_json() or score.temperatures != tuple(own.temperatures):
            raise ValueError(f"played under {score.conditions}, expected {own.to_json()}")
        return score


@dataclass(frozen=True)
class Failure:
    """The end of a run that failed, and the steps that it was to take."""

    steps: int
    reason: str


@dataclass(frozen=True)
class Record:
    """The runs behind a page. They go by their folders below the ``--out`` that they lay in.

    ``terms``: what all of them have in common beside their dataset: its tier and size, and the conditions of play.
    """

    terms: Mapping[str, Any]
    runs: Mapping[str, Played] = field(default_factory=dict)
    clone: Mapping[str, Played] = field(default_factory=dict)  # at most one, by the run that began with it
    failed: Mapping[str, Failure] = field(default_factory=dict)
    card: tuple[tuple[str, str], ...] = ()  # of the dataset

    def __post_init__(self) -> None:
        """Raise :class:`ConfigError` for runs of several datasets."""
        digests = {played.config.dataset_digest: run for run, played in self.runs.items()}
        if len(digests) > 1:
            (first, one), (second, other) = [*digests.items()][:2]
            raise ConfigError(
                f"a page is on one dataset: {one} was trained on one of digest {first[:12]}…, {other} on one of "
                f"{second[:12]}…: move those of the other away"
            )

    @property
    def digest(self) -> str:
        """Digest of the dataset, empty without runs."""
        return next((run.config.dataset_digest for run in self.runs.values()), "")

    def joined(self, later: Record) -> Record:
        """Add the runs of a ``later`` record. Of a run in both that one stays whose policies are newer.

        Where they are the same, the run takes on what the later record alone knows of it: where its dataset was not
        at hand before, whether its critic diverged.

        Raises :class:`ConfigError` for one of another dataset.
        """
        if self.digest and later.digest and self.digest != later.digest:
            raise ConfigError(
                f"the record is of a dataset of digest {self.digest[:12]}…, the runs are of {later.digest[:12]}…: "
                "move the record away, or train on its dataset"
            )
        runs = {**self.runs}
        for run, played in later.runs.items():
            same = run in runs and _policies(runs[run]) == _policies(played)
            runs[run] = _filled(runs[run], played) if same else played
        failed = {run: end for run, end in {**self.failed, **later.failed}.items() if run not in runs}
        return Record(later.terms, runs, self.clone or later.clone, failed, self.card or later.card)


def _policies(played: Played) -> list[str]:
    return [snapshot["sha256"] for snapshot in played.values["score"]["snapshots"]]


def _filled(old: Played, later: Played) -> Played:
    """Return the ``old`` run with the ``later`` one's values where it has none."""
    known = {name: value for name, value in old.values.items() if value is not None}
    return replace(old, values={**later.values, **known})


def write_record(file: Path, record: Record) -> None:
    """Write a page's record, whole. Raises :class:`ConfigError` where it cannot be written."""
    values = {
        "kind": "record of a results page",
        "version": VERSION,
        "terms": record.terms,
        "card": record.card,
        "failed": {run: asdict(end) for run, end in record.failed.items()},
        **{
            name: {run: {"config": asdict(p.config), **p.values} for run, p in played.items()}
            for name, played in (("runs", record.runs), ("clone", record.clone))
        },
    }
    text = json.dumps(values, allow_nan=False)
    write_bytes(file, gzip.compress(text.encode(), mtime=0))  # no time: equal records are equal files


def read_record(file: Path, terms: Mapping[str, Any]) -> Record | None:
    """Read a page's record, or None where there is none.

    Raises :class:`ConfigError` for a file that is damaged, of a version to come, or on other ``terms``.
    """
    try:
        values = json.loads(gzip.decompress(file.read_bytes()))
        if (version := values["version"]) != VERSION:
            raise ConfigError(
                f"{file} is a record of version {version}, expected {VERSION}: install a newer omcda-deploy"
            )
        if values["terms"] != terms:
            changed = [name for name, value in terms.items() if values["terms"].get(name) != value]
            raise ConfigError(
                f"{file} is of runs with other {', '.join(changed)}: move it away, or change the page's file back"
            )
        return Record(
            terms,
            {run: _read(played) for run, played in values["runs"].items()},
            {run: _read(played) for run, played in values["clone"].items()},
            {run: Failure(**end) for run, end in values["failed"].items()},
            tuple((name, words) for name, words in values["card"]),
        )
    except FileNotFoundError:
        return None
    except PermissionError as error:
        raise ConfigError(f"{file} cannot be read: change its permissions") from error
    except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError, AttributeError) as error:
        raise damaged(file, error) from error


def damaged(file: Path, error: Exception) -> ConfigError:
    """Make the error for a record whose content is none."""
    return ConfigError(f"{file} is damaged ({error!r}): move it away, and run its page again")


def _read(values: Mapping[str, Any]) -> Played:
    from omcda_deploy.training.run_folder import RunConfig

    own = dict(values)
    return Played(RunConfig(**own.pop("config")), own)


def _curves(curves: Curves) -> dict[str, Any]:
    def numbers(values: Any) -> Any:  # JSON has no nan, as the share of a sum of 0 is
        if isinstance(values, list):
            return [numbers(value) for value in values]
        return values if math.isfinite(values) else None

    return {
        "steps": curves.steps.tolist(),
        "values": {name: numbers(value.tolist()) for name, value in curves.values.items()},
        "estimated": sorted(curves.estimated),
    }


def _read_curves(values: Mapping[str, Any], config: RunConfig) -> Curves | None:
    from omcda_deploy.plugins import curves_of
    from omcda_deploy.registry import load_algorithm
    from omcda_deploy.report.comparison import Curves

    section = curves_of(load_algorithm(config.algorithm))
    if section is None:
        return None
    return Curves(
        section,
        tuple(config.spec.names),
        np.array(values["steps"], np.int64),
        {name: np.array(value, np.float64) for name, value in values["values"].items()},
        frozenset(values["estimated"]),
    )
