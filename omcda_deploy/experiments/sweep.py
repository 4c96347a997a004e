"""Sweeps: resumable training runs over datasets, algorithms, settings and seeds (docs/sweeps.md).

A sweep is a TOML file::

    datasets = ["data/halfcheetah-medium.hdf5"]
    algorithms = ["bc", "omiga", "omcda"]
    seeds = [0, 1, 2, 3, 4]
    steps = 100000

    [grid.omcda]                 # every combination of these, for this algorithm
    d_tot = [0.3, 1.2, 3.0]

Each run lies in ``OUT/<dataset>/<algorithm>-<settings>/seed<seed>``. Runs that differ in their seed and in settings
that change no shape are trained side by side, several to a process, with the bits that they would have alone.
Finished runs are not repeated, killed ones resume from their checkpoints, and the next call tries failed ones.
:mod:`omcda_deploy.experiments.engines` runs the jobs, here or on a cluster.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omcda_deploy.errors import ConfigError, OmcdaError, UnknownNameError
from omcda_deploy.experiments.train import run_of
from omcda_deploy.files import read_toml
from omcda_deploy.processes import run_child

if TYPE_CHECKING:
    from omcda_deploy.spec import TeamSpec
    from omcda_deploy.training.observer import TrainObserver
    from omcda_deploy.training.request import ResolvedRun, TrainRequest
    from omcda_deploy.training.run_folder import RunConfig


FLEET = 5  # most runs to a process: more gain little, and their metrics come late


@dataclass(frozen=True)
class Job:
    """One training run: everything that it depends on, except the contents of the dataset."""

    dataset: Path
    algorithm: str
    settings: tuple[tuple[str, Any], ...]
    seed: int
    steps: int
    snapshot_every: int | None  # None: as training chooses
    run: Path  # the run folder

    @property
    def finished(self) -> bool:
        """True when the last policy was written."""
        return (self.run / "policies" / f"step-{self.steps:08d}.pt").exists()

    @property
    def request(self) -> TrainRequest:
        """The request for the run, as ``omcda-deploy train`` makes it."""
        from omcda_deploy.training.request import TrainRequest

        return TrainRequest(
            self.algorithm,
            self.steps,
            self.seed,
            settings=dict(self.settings),
            snapshot_every=self.snapshot_every,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the job as JSON holds it."""
        return asdict(self) | {"dataset": str(self.dataset), "run": str(self.run)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Job:
        """Return the job of :meth:`to_json`."""
        paths = {name: Path(values[name]) for name in ("dataset", "run")}
        return cls(
            **{**values, **paths, "settings": tuple((name, value) for name, value in values["settings"])}
        )

    def absolute(self) -> Job:
        """Return the job with absolute paths, for a process in another working directory."""
        return replace(self, dataset=self.dataset.absolute(), run=self.run.absolute())


@dataclass(frozen=True)
class Sweep:
    """The contents of a sweep file. Raises :class:`ConfigError` for an entry of another type."""

    datasets: list[str]
    algorithms: list[str]
    seeds: list[int]
    steps: int
    snapshot_every: int | None = None  # None: as training chooses
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
            if value is not None and (type(value) is not int or value < 1):
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
    """List all runs of a sweep.

    Raises :class:`ConfigError` where two runs would share a folder. :func:`check_jobs` checks everything else.
    """
    jobs = []
    for seed, dataset, algorithm in itertools.product(sweep.seeds, sweep.datasets, sweep.algorithms):
        grid: Mapping[str, Sequence[Any]] = sweep.grid.get(algorithm, {})
        for values in itertools.product(*grid.values()):
            settings = tuple(zip(grid, values, strict=True))
            name = "-".join((algorithm, *(f"{key}={value}" for key, value in settings)))
            run = run_of(out / Path(dataset).stem / name, seed)
            jobs.append(Job(Path(dataset), algorithm, settings, seed, sweep.steps, sweep.snapshot_every, run))
    runs: dict[Path, Job] = {}
    for job in jobs:
        if (other := runs.setdefault(job.run, job)) is not job:
            raise ConfigError(
                f"two runs of the sweep share the folder {job.run}, of {other.dataset} and {job.dataset}: "
                "list nothing twice, and give datasets file names of their own"
            )
    return jobs


def check_jobs(jobs: Sequence[Job], unrecorded: Mapping[Path, TeamSpec] | None = None) -> None:
    """Check everything that can stop a job before its training begins; create nothing.

    ``unrecorded`` holds the teams of datasets that do not exist yet. Raises :class:`ConfigError`, which names the
    run folder, for the first job whose algorithm, settings, dataset or team do not fit, or whose run folder belongs
    to another request.
    """
    from omcda_deploy.registry import read_dataset
    from omcda_deploy.training.run_folder import read_config

    unrecorded = unrecorded or {}
    for job in jobs:
        with _naming(job):
            job.request.check()
            if job.dataset not in unrecorded and not job.dataset.is_file():
                raise ConfigError(f"{job.dataset} does not exist: record it with  omcda-deploy collect")
    for path, group in _by_dataset(jobs).items():
        spec, digests = unrecorded.get(path), None
        for job in group:
            with _naming(job):
                if spec is None:
                    dataset = read_dataset(path)
                    spec, digests = dataset.spec, dataset.digests
                    del dataset  # large
                plan = job.request.resolved(spec)
                if job.run.exists():
                    _require_same_request(job, read_config(job.run), plan, digests)


def _by_dataset(jobs: Iterable[Job]) -> dict[Path, list[Job]]:
    groups: dict[Path, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.dataset, []).append(job)
    return groups


@contextmanager
def _naming(job: Job) -> Iterator[None]:
    """Put the run folder before the message of an error."""
    try:
        yield
    except OmcdaError as error:
        raise ConfigError(f"{job.run}: {error}") from error


def _require_same_request(
    job: Job,
    config: RunConfig,
    plan: ResolvedRun | None = None,
    digests: Mapping[int, str] | None = None,
) -> None:
    """Raise :class:`ConfigError` where ``config`` is that of another run than the job's; None: not compared."""
    for name, begun, expected in _compared(job, config, plan, digests):
        if begun != expected:
            value = f"{begun} steps" if name == "steps" else f"{name} {begun}"
            raise ConfigError(
                f"the folder is a run of {value}, expected {expected}: sweep into another --out, or remove it"
            )


def _compared(
    job: Job, config: RunConfig, plan: ResolvedRun | None, digests: Mapping[int, str] | None
) -> Iterator[tuple[str, Any, Any]]:
    """Yield what a run's results depend on: its name, the run's value and the job's."""
    from omcda_deploy.datasets import DIGEST_VERSION
    from omcda_deploy.registry import load_algorithm
    from omcda_deploy.training.settings import build

    yield "algorithm", config.algorithm, job.algorithm
    yield "steps", config.steps, job.steps
    yield "seed", config.seed, job.seed
    if digests is not None and not config.began_with(digests):
        begun = config.dataset_digest
        if begun in digests.values():  # of version 1, which does not cover what differs
            begun = config.dataset_content
        yield "dataset digest", f"{begun[:12]}…", f"{digests[DIGEST_VERSION][:12]}…"
    if plan is not None:
        request = plan.request
        if request.snapshot_every is not None:
            yield "snapshot_every", config.snapshot_every, request.kept_every
        yield "time_limit_is_terminal", config.time_limit_is_terminal, request.time_limit_is_terminal
        # Runs of an older version have the default of a setting that was added since.
        settings = asdict(build(load_algorithm(job.algorithm).Config, config.settings))
        for name, expected in asdict(plan.config).items():
            if name == "d_tot" and plan.chooses_budget:
                yield (
                    name,
                    "chosen from the data" if config.budget else settings[name],
                    "chosen from the data",
                )
            else:
                yield name, settings[name], expected


def fleets_of(jobs: Sequence[Job], at_once: int) -> list[list[Job]]:
    """Group the unfinished jobs whose runs can be trained side by side.

    They differ in their seed and the algorithm's ``PER_RUN`` settings alone. A group is for one process. It has at
    most five jobs, and fewer where ``at_once`` processes would be left idle.
    """
    alike: dict[str, list[Job]] = {}
    for job in jobs:
        if not job.finished:
            alike.setdefault(_common(job), []).append(job)
    most = min(FLEET, -(-sum(map(len, alike.values())) // at_once))
    fleets = []
    for group in alike.values():
        number = -(-len(group) // most)  # of processes, among which the jobs are divided evenly
        fleets += [group[len(group) * k // number : len(group) * (k + 1) // number] for k in range(number)]
    return fleets


def _common(job: Job) -> str:
    """Return what a job has in common with those whose runs can be trained beside its own."""
    from omcda_deploy.plugins import per_run_settings
    from omcda_deploy.registry import load_algorithm

    per_run = per_run_settings(load_algorithm(job.algorithm))
    shared = tuple(pair for pair in job.settings if pair[0] not in per_run)
    return repr(replace(job, settings=shared, seed=0, run=Path()))


def run_fleet(jobs: Sequence[Job]) -> list[str | None]:
    """Start, resume or skip a group of :func:`fleets_of`; return per job the reason of its failure, None without.

    Every engine calls this function, on some machine. Training runs in a process of its own, which ends when this
    one does; its output is in ``seed<seeds>.log`` beside the run folders.
    """
    from omcda_deploy.training.run_folder import read_config

    reasons: dict[Job, str] = {}
    waiting = []
    for job in jobs:
        if job.finished:
            continue
        try:
            with _naming(job):
                if (job.run / "config.json").exists():
                    _require_same_request(job, read_config(job.run))
        except OmcdaError as error:
            reasons[job] = str(error)
        else:
            waiting.append(job)
    if waiting:
        reasons |= _train_apart(waiting)
    return [reasons.get(job) for job in jobs]


def _train_apart(jobs: Sequence[Job]) -> dict[Job, str]:
    """Call :func:`train_jobs` in a process of its own; return the reasons of the jobs that failed."""
    log = _log(jobs)
    log.parent.mkdir(parents=True, exist_ok=True)
    words = ["train-jobs", json.dumps([job.to_json() for job in jobs])]
    with log.open("a") as output:
        status = run_child([sys.executable, "-m", "omcda_deploy.cli", *words], output, OMP_NUM_THREADS="1")
    if not status:
        return {}
    last = (log.read_text().splitlines() or ["no output"])[-1]
    end = f"stopped with status {status}: {last} (all of it in {log})"
    return {job: f"{job.run} {end}" for job in jobs if not job.finished}


def _log(jobs: Sequence[Job]) -> Path:
    """Return the file for the output of a process, beside its first run; its name tells of the others."""
    first = jobs[0].run
    if all(job.run.parent == first.parent for job in jobs):
        return first.with_name(f"seed{'-'.join(str(job.seed) for job in jobs)}.log")
    return first.with_name(f"{first.name}+{len(jobs) - 1}.log")


def train_jobs(jobs: Sequence[Job], observer: TrainObserver | None = None) -> None:
    """Train the unfinished jobs of one group of :func:`fleets_of` in this process, from wherever they stand.

    Raises :class:`OmcdaError` for those that failed, after the others are finished.
    """
    from omcda_deploy.experiments.train import resume_runs, train_runs
    from omcda_deploy.training.loop import fleet_key
    from omcda_deploy.training.run_folder import read_config

    dataset = jobs[0].dataset
    begun: dict[str, list[Path]] = {}  # runs of older versions may not fit to newer ones
    new = []
    for job in jobs:
        if (job.run / "config.json").exists():
            begun.setdefault(fleet_key(read_config(job.run)), []).append(job.run)
        else:
            new.append((job.request, job.run))
    trainings = [partial(resume_runs, runs, dataset, observer=observer) for runs in begun.values()]
    if new:
        trainings.append(partial(train_runs, dataset, new, observer=observer))
    failures = []
    for training in trainings:
        try:
            training()
        except OmcdaError as error:
            failures.append(str(error))
    if failures:
        raise OmcdaError("; ".join(failures))
