"""Records of pages: every run behind a page, with its configuration and the episodes that it was played.

A page's record lies beside it, with the ending ``.json.gz``, and holds what tables and figures are made of. By it
overviews cover the page, the page is written anew, and readers count for themselves, where no run is at hand.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from omcda_deploy.errors import ConfigError
from omcda_deploy.experiments.compare import clone_result, result_of
from omcda_deploy.files import write_bytes

if TYPE_CHECKING:
    from omcda_deploy.experiments.scores import Conditions
    from omcda_deploy.report.comparison import Curves, LeftOut, Result
    from omcda_deploy.training.run_folder import RunConfig

VERSION = 1


@dataclass(frozen=True)
class Record:
    """The runs behind a page. Runs go by their folders below the ``--out`` that they lay in."""

    configs: Mapping[str, RunConfig]  # of finished runs, by run
    results: tuple[Result, ...]  # of those that were played, and of the clone where one was
    left_out: tuple[LeftOut, ...]  # runs that could not be played
    failed: Mapping[str, str]  # reason of its failure, by run
    card: tuple[tuple[str, str], ...]  # of the dataset

    def select(self, runs: Container[str]) -> Record:
        """Leave out all but some runs."""
        return replace(
            self,
            configs={run: config for run, config in self.configs.items() if run in runs},
            results=tuple(result for result in self.results if result.run in runs),
            left_out=tuple(left for left in self.left_out if left.run in runs),
            failed={run: reason for run, reason in self.failed.items() if run in runs},
        )

    def joined(self, later: Record) -> Record:
        """Add the runs of a ``later`` record of the same dataset; for a run of both its word is taken."""
        earlier = self.select(self.configs.keys() - later.configs.keys() - later.failed.keys())
        return Record(
            {**earlier.configs, **later.configs},
            (*earlier.results, *later.results),
            (*earlier.left_out, *later.left_out),
            {**{run: why for run, why in self.failed.items() if run not in later.configs}, **later.failed},
            later.card or earlier.card,
        )


def write_record(file: Path, record: Record, conditions: Conditions) -> None:
    """Write a page's record, whole. Raises :class:`ConfigError` where it cannot be written."""
    values = {
        "kind": "record of a results page",
        "version": VERSION,
        "conditions": _conditions(conditions),
        "card": record.card,
        "failed": record.failed,
        "left_out": [asdict(left) for left in record.left_out],
        "runs": {run: _config(config) for run, config in record.configs.items()},
        "results": [_result(result) for result in record.results],
    }
    text = json.dumps(values, allow_nan=False)
    write_bytes(file, gzip.compress(text.encode(), mtime=0))  # no time: equal records are equal files


def read_record(file: Path, conditions: Conditions) -> Record | None:
    """Read a page's record, or None where there is none.

    Raises :class:`ConfigError` for a file that is damaged, of a version to come, or of runs that were played under
    other ``conditions``.
    """
    try:
        values = json.loads(gzip.decompress(file.read_bytes()))
        if (version := values["version"]) != VERSION:
            raise ConfigError(
                f"{file} is a record of version {version}, expected {VERSION}: install a newer omcda-deploy"
            )
        if values["conditions"] != _conditions(conditions):
            raise ConfigError(
                f"{file} is of runs that were played under other conditions: run its page again"
            )
        return _read(values, conditions)
    except FileNotFoundError:
        return None
    except (OSError, EOFError, zlib.error, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{file} is damaged ({error!r}): run its page again") from error


def _read(values: Mapping[str, Any], conditions: Conditions) -> Record:
    from omcda_deploy.report.comparison import LeftOut
    from omcda_deploy.training.run_folder import RunConfig

    configs = {run: RunConfig(**config) for run, config in values["runs"].items()}
    return Record(
        configs,
        tuple(_read_result(result, configs[result["run"]], conditions) for result in values["results"]),
        tuple(LeftOut(**left) for left in values["left_out"]),
        dict(values["failed"]),
        tuple((name, words) for name, words in values["card"]),
    )


def _conditions(conditions: Conditions) -> dict[str, Any]:
    return {**conditions.to_json(), "temperatures": list(conditions.temperatures)}


def _config(config: RunConfig) -> dict[str, Any]:
    # Where a dataset lay is nothing to a record's readers.
    return asdict(replace(config, dataset=Path(config.dataset).name))


def _result(result: Result) -> dict[str, Any]:
    from omcda_deploy.report.comparison import CLONE

    return {
        "run": result.run,
        "clone": result.variant.algorithm == CLONE,
        "score": result.score.to_json(),
        "curves": None if result.curves is None else _curves(result.curves),
        "seconds": result.seconds,
        "diverged": result.diverged,
    }


def _read_result(values: Mapping[str, Any], config: RunConfig, conditions: Conditions) -> Result:
    from omcda_deploy.report.scores import Score

    score = Score.read(values["score"], conditions.to_json())
    if values["clone"]:
        return clone_result(values["run"], config, score)
    curves = None if values["curves"] is None else _read_curves(values["curves"], config)
    return result_of(values["run"], config, score, curves, values["seconds"], diverged=values["diverged"])


def _curves(curves: Curves) -> dict[str, Any]:
    return {
        "steps": curves.steps.tolist(),
        "values": {name: value.tolist() for name, value in curves.values.items()},
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
