"""Sweeps: resumable training runs over datasets, algorithms, settings and seeds (docs/sweeps.md).

A sweep is a TOML file::

    datasets = ["data/halfcheetah-medium.hdf5"]
    algorithms = ["bc", "omiga", "omcda"]
    seeds = [0, 1, 2, 3, 4]
    steps = 100000
    settings = { hidden = 128 }  # of all algorithms; may be left out

    [grid.omcda]                 # every combination of these, for this algorithm
    d_tot = [0.3, 1.2, 3.0]

Each run lies in ``OUT/<dataset>/<algorithm>-<settings>/seed<seed>``. Runs that differ in their seed and in settings
that change no shape are trained side by side, several to a process, with the bits that they would have alone.
Finished runs are not repeated, killed ones resume from their checkpoints, and the next call tries failed ones.
:mod:`omcda_deploy.experiments.fleets` groups the jobs, :mod:`omcda_deploy.experiments.engines` runs them, here or
on a cluster.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omcda_deploy.errors import ConfigError, OmcdaError, UnknownNameError
from omcda_deploy.experiments.train import run_of
from omcda_deploy.files import read_toml

if TYPE_CHECKING:
    from omcda_deploy.spec import TeamSpec
    from omcda_deploy.training.request import ResolvedRun, TrainRequest
    from omcda_deploy.training.run_folder import RunConfig


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
    behavior_steps: int | None = None  # most steps for cloning; None: as training chooses
    device: str = "cpu"

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
            behavior={} if self.behavior_steps is None else {"steps": self.behavior_steps},
            device=self.device,
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
    behavior_steps: int | None = None
    device: str = "cpu"
    settings: dict[str, Any] = field(default_factory=dict)  # of every algorithm; the grid's come on top
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
        for entry in ("steps", "snapshot_every", "behavior_steps"):
            value = getattr(self, entry)
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{entry}: expected a whole number from 1 on, got {value!r}")
        if not isinstance(self.device, str):
            raise ConfigError(f'device: expected a name such as "cuda", got {self.device!r}')
        if not isinstance(self.settings, dict):
            raise ConfigError(f"settings: expected a table such as {{ hidden = 128 }}, got {self.settings!r}")
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
            settings = tuple({**sweep.settings, **dict(zip(grid, values, strict=True))}.items())
            name = "-".join((algorithm, *(f"{key}={value}" for key, value in settings)))
            run = run_of(out / Path(dataset).stem / name, seed)
            stated = (sweep.steps, sweep.snapshot_every, run, sweep.behavior_steps, sweep.device)
            jobs.append(Job(Path(dataset), algorithm, settings, seed, *stated))
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
        with naming(job):
            job.request.check()
            if job.dataset not in unrecorded and not job.dataset.is_file():
                raise ConfigError(f"{job.dataset} does not exist: record it with  omcda-deploy collect")
    for path, group in _by_dataset(jobs).items():
        spec, digests = unrecorded.get(path), None
        known: dict[str, Job] = {}
        for job in group:
            with naming(job):
                if spec is None:
                    dataset = read_dataset(path)
                    spec, digests = dataset.spec, dataset.digests
                    del dataset  # large
                plan = job.request.resolved(spec)
                first = known.setdefault(_identity(job, plan), job)
                if first is not job:
                    raise ConfigError(
                        f"{first.run} is the same run, as settings are stated that are the default's or the "
                        "recipe's: leave one of them out"
                    )
                if job.run.exists():
                    require_same_request(job, read_config(job.run), plan, digests)


def _identity(job: Job, plan: ResolvedRun) -> str:
    """Return what tells the runs on a dataset apart."""
    request = plan.request
    settings = [asdict(plan.config), plan.chooses_budget, request.recipe, asdict(plan.behavior)]
    return json.dumps([job.algorithm, job.steps, request.seed, *settings], sort_keys=True)


def _by_dataset(jobs: Iterable[Job]) -> dict[Path, list[Job]]:
    groups: dict[Path, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.dataset, []).append(job)
    return groups


@contextmanager
def naming(job: Job) -> Iterator[None]:
    """Put the run folder before the message of an error."""
    try:
        yield
    except OmcdaError as error:
        raise ConfigError(f"{job.run}: {error}") from error


def require_same_request(
    job: Job,
    config: RunConfig,
    plan: ResolvedRun | None = None,
    digests: Mapping[int, str] | None = None,
) -> None:
    """Raise :class:`ConfigError` where ``config`` is that of another run than the job's; None: not compared."""
    if (found := difference(job, config, plan, digests)) is not None:
        value, expected = found
        raise ConfigError(
            f"the folder is a run of {value}, expected {expected}: choose another --out, or remove it"
        )


def difference(
    job: Job,
    config: RunConfig,
    plan: ResolvedRun | None = None,
    digests: Mapping[int, str] | None = None,
) -> tuple[str, str] | None:
    """Return the first thing in which ``config`` is not the job's, as ``alpha 1.0``, and the job's value."""
    for name, begun, expected in _compared(job, config, plan, digests):
        if begun != expected:
            return f"{begun} steps" if name == "steps" else f"{name} {begun}", str(expected)
    return None


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
        if job.behavior_steps is not None:
            yield "behavior_steps", config.behavior.get("steps"), job.behavior_steps
        yield "device", config.device, request.device
        yield "recipe", config.recipe or "none", request.recipe or "none"
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
