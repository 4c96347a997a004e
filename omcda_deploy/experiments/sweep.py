"""Sweeps: a resumable queue of training runs over datasets, algorithms, settings and seeds.

A sweep is a TOML file::

    datasets = ["data/halfcheetah-medium.hdf5"]
    algorithms = ["bc", "omiga", "omcda"]
    seeds = [0, 1, 2, 3, 4]
    steps = 100000

    [grid.omcda]                 # every combination of these, for this algorithm
    d_tot = [0.3, 1.2, 3.0]

Each run lies in ``OUT/<dataset>/<algorithm>-<settings>/seed<seed>``. A finished run is not repeated, a killed one
is resumed from its checkpoint, and a failed one is tried again by the next call.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omcda_deploy.errors import ConfigError, OmcdaError, UnknownNameError
from omcda_deploy.experiments.observer import Observer
from omcda_deploy.files import read_toml


@dataclass(frozen=True)
class Job:
    """One training run with everything that it depends on but the dataset itself."""

    dataset: Path
    algorithm: str
    settings: tuple[tuple[str, Any], ...]
    seed: int
    steps: int
    snapshot_every: int
    run: Path  # the run folder

    @property
    def finished(self) -> bool:
        """True when the last policy was written."""
        return (self.run / "policies" / f"step-{self.steps:08d}.pt").exists()


@dataclass(frozen=True)
class Sweep:
    """The contents of a sweep file. Raises :class:`ConfigError` for an entry of another type."""

    datasets: list[str]
    algorithms: list[str]
    seeds: list[int]
    steps: int
    snapshot_every: int = 5000
    grid: dict[str, dict[str, list[Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for entry, kind, example in (
            ("datasets", str, '["data/halfcheetah-medium.hdf5"]'),
            ("algorithms", str, '["bc", "omcda"]'),
            ("seeds", int, "[0, 1, 2]"),
        ):
            value = getattr(self, entry)
            if not _is_list(value, kind):
                raise ConfigError(f"{entry}: expected a list such as {example}, got {value!r}")
        for entry in ("steps", "snapshot_every"):
            value = getattr(self, entry)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{entry}: expected a whole number from 1 on, got {value!r}")
        if not isinstance(self.grid, dict):
            raise ConfigError(f"grid: expected tables such as [grid.omcda], got {self.grid!r}")
        for algorithm, settings in self.grid.items():
            if algorithm not in self.algorithms:
                raise UnknownNameError("algorithm of [grid]", algorithm, self.algorithms)
            if not isinstance(settings, dict):
                raise ConfigError(f"grid.{algorithm}: expected a table [grid.{algorithm}], got {settings!r}")
            for name, values in settings.items():
                if not _is_list(values, object):
                    raise ConfigError(
                        f"grid.{algorithm}.{name}: expected a list of values such as [0.3, 1.2], got {values!r}"
                    )


def _is_list(value: object, kind: type) -> bool:
    """Test if ``value`` is a list with entries, all of ``kind``; true and false are no numbers."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(entry, kind) and (kind is object or not isinstance(entry, bool)) for entry in value
        )
    )


def read_sweep(path: Path) -> Sweep:
    """Read a sweep file. Raises :class:`ConfigError` for a file that is missing, no TOML or no sweep."""
    return sweep_of(read_toml(path, "a sweep file"), str(path))


def sweep_of(values: Mapping[str, Any], where: str) -> Sweep:
    """Make a sweep from the entries of a table; ``where`` names the table in errors.

    Raises :class:`ConfigError` for entries that are missing or wrong, :class:`UnknownNameError` for unknown ones.
    """
    entries = set(Sweep.__dataclass_fields__)
    for name in values:
        if name not in entries:
            raise UnknownNameError(f"entry of {where}", name, entries)
    for name in ("datasets", "algorithms", "seeds", "steps"):
        if name not in values:
            raise ConfigError(f"{where}: expected datasets, algorithms, seeds and steps, {name} is missing")
    try:
        return Sweep(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def jobs_of(sweep: Sweep, out: Path) -> list[Job]:
    """List all runs of a sweep, seeds outermost, so that every algorithm has its first seed early.

    Raises :class:`UnknownNameError` and :class:`ConfigError` for algorithms, settings and datasets that cannot be
    trained, and where two runs would share a folder.
    """
    from omcda_deploy.registry import load_algorithm
    from omcda_deploy.training.settings import parse

    jobs = []
    for seed, dataset, algorithm in itertools.product(sweep.seeds, sweep.datasets, sweep.algorithms):
        grid: Mapping[str, Sequence[Any]] = sweep.grid.get(algorithm, {})
        for values in itertools.product(*grid.values()):
            settings = tuple(zip(grid, values, strict=True))
            parse(load_algorithm(algorithm).Config, dict(settings))
            name = "-".join((algorithm, *(f"{key}={value}" for key, value in settings)))
            run = out / Path(dataset).stem / name / f"seed{seed}"
            jobs.append(Job(Path(dataset), algorithm, settings, seed, sweep.steps, sweep.snapshot_every, run))
    for dataset in sweep.datasets:
        if not Path(dataset).is_file():
            raise ConfigError(f"{dataset} does not exist: record it with  omcda-deploy collect")
    runs: dict[Path, Job] = {}
    for job in jobs:
        if (other := runs.setdefault(job.run, job)) is not job:
            raise ConfigError(
                f"two runs of the sweep share the folder {job.run}, of {other.dataset} and {job.dataset}: "
                "list nothing twice, and give datasets file names of their own"
            )
    return jobs


def run_job(job: Job) -> None:
    """Start, resume or skip one job, so that it is finished. Another execution engine replaces this function alone.

    Raises :class:`OmcdaError` when training fails; its output is in ``<run>.log``.
    """
    from omcda_deploy.training.run_folder import read_config

    if job.finished:
        return
    if (job.run / "config.json").exists():
        if (steps := read_config(job.run).steps) != job.steps:
            raise ConfigError(
                f"{job.run} is a run of {steps} steps, expected {job.steps}: sweep into another --out, or remove it"
            )
        arguments: list[object] = ["train", "--resume", job.run]
    else:
        settings = [part for key, value in job.settings for part in ("--set", f"{key}={value}")]
        arguments = [
            *("train", job.dataset, "--algo", job.algorithm, "--seed", job.seed, "--steps", job.steps),
            *("--snapshot-every", job.snapshot_every, "--out", job.run, *settings),
        ]
    job.run.parent.mkdir(parents=True, exist_ok=True)
    log = job.run.with_name(job.run.name + ".log")
    command = [sys.executable, "-m", "omcda_deploy.cli", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("a") as output:
        process = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    if process.returncode:
        last = (log.read_text().splitlines() or ["no output"])[-1]
        raise OmcdaError(f"{job.run} stopped with status {process.returncode}: {last} (all of it in {log})")


def run_queue(
    jobs: Iterable[Job],
    at_once: int,
    run: Callable[[Job], None] = run_job,
    observer: Observer | None = None,
) -> list[tuple[Job, str]]:
    """Run all jobs, ``at_once`` (0: one per core) together; return those that failed, with the reason."""
    observer = observer or Observer()
    failures: list[tuple[Job, str]] = []

    def attempt(job: Job) -> None:
        failure = None
        try:
            run(job)
        except OmcdaError as error:
            failure = error
            failures.append((job, str(error)))
        observer.ended(job.run, failure)

    with ThreadPoolExecutor(at_once or os.cpu_count()) as pool:
        list(pool.map(attempt, jobs))
    return failures
