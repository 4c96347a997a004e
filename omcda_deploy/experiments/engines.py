"""Engines that run the jobs of a sweep: in processes of this machine, as a SLURM job array, or as Ray tasks.

All of them call :func:`omcda_deploy.experiments.fleets.run_fleet`, so a job's results are the same to the last bit
whichever engine runs it. Paths must mean the same on every machine. docs/sweeps.md says how each engine is used and
what remains after a kill.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from omcda_deploy.errors import ConfigError, MissingExtraError, OmcdaError, UnknownNameError
from omcda_deploy.experiments.fleets import fleets_of, run_fleet
from omcda_deploy.experiments.observer import Observer
from omcda_deploy.experiments.sweep import Job
from omcda_deploy.processes import is_ending

Failure: TypeAlias = tuple[Job, str]  # and the reason

OPTIONS: dict[str, dict[str, type]] = {  # engine -> its options
    "local": {},
    "slurm": {
        "cluster": str,  # slurm, or local: submitit's own processes on this machine, to try a sweep out
        "timeout_min": int,  # a run that needs longer is queued again, and resumes
        "mem_gb": float,
        "partition": str,
        "account": str,
        "qos": str,
        "constraint": str,
    },
    "ray": {"address": str},  # of a running cluster; without it Ray starts one on this machine
}
TIMEOUT_MIN = 24 * 60
REQUEUES = 100  # after time limits
RETRIES = 3  # of a Ray task whose worker or machine died
OBJECT_STORE_BYTES = 100 * 2**20  # jobs and reasons are a few kilobytes


class Engine(Protocol):
    """Runs jobs."""

    def __call__(self, jobs: Sequence[Job], at_once: int, observer: Observer) -> list[Failure]:
        """Run all jobs in ``at_once`` processes (0: as many as there are cores); return those that failed.

        ``observer`` is told of each job that ends. Raises :class:`ConfigError` where the engine cannot be reached.
        """
        ...


def make_engine(name: str, options: Mapping[str, str], out: Path) -> Engine:
    """Make an engine by name; ``out`` is the sweep's folder, which all machines share.

    Raises :class:`UnknownNameError` for engines and options, :class:`ConfigError` for values, and
    MissingExtraError where the engine's package is not installed.
    """
    if name not in OPTIONS:
        raise UnknownNameError("engine", name, OPTIONS)
    values = _parse(name, options)
    if name == "slurm":
        _import_submitit()
        cluster = values.pop("cluster", "slurm")
        if cluster not in ("slurm", "local"):
            raise ConfigError(f"cluster: expected slurm or local, got {cluster!r}")
        if cluster == "slurm" and shutil.which("srun") is None:
            raise ConfigError(
                "engine slurm: expected SLURM's commands on this machine, found no srun: run the sweep on a login "
                "node, or try it out with  --engine-option cluster=local"
            )
        return SlurmEngine(out.absolute() / "submitit", cluster, values)
    if name == "ray":
        _import_ray()
        return RayEngine(values.get("address"))
    return run_locally


def _parse(engine: str, options: Mapping[str, str]) -> dict[str, Any]:
    kinds = OPTIONS[engine]
    values: dict[str, Any] = {}
    for name, text in options.items():
        if name not in kinds:
            raise UnknownNameError(f"option of engine {engine}", name, kinds)
        try:
            values[name] = kinds[name](text)
        except ValueError:
            values[name] = 0
        if kinds[name] is not str and not values[name] > 0:
            raise ConfigError(f"{name}: expected a positive {kinds[name].__name__}, got {text!r}")
    return values


def run_locally(
    jobs: Sequence[Job],
    at_once: int,
    observer: Observer,
    run: Callable[[Sequence[Job]], list[str | None]] = run_fleet,
) -> list[Failure]:
    """Run jobs in processes of this machine, which end when this process does."""
    at_once = at_once or os.cpu_count() or 1
    failures: list[Failure] = []
    _report_finished(jobs, failures, observer)

    def attempt(fleet: Sequence[Job]) -> None:
        reasons = run(fleet)
        if not is_ending():  # else nothing failed: it was stopped
            _report(fleet, reasons, failures, observer)

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(attempt, fleets_of(jobs, at_once)))
    return failures


class ResumableAttempt:
    """:func:`run_fleet` as submitit calls it: stopped at its time limit, the jobs are queued again and resume."""

    def __call__(self, jobs: Sequence[Job]) -> list[str | None]:
        return run_fleet(jobs)

    def checkpoint(self, jobs: Sequence[Job]) -> Any:
        """Return the submission that is queued again."""
        return _import_submitit().helpers.DelayedSubmission(self, jobs)


@dataclass(frozen=True)
class SlurmEngine:
    """Runs jobs as one SLURM job array, through submitit. The array goes on when this process ends."""

    folder: Path  # submitit's scripts, pickles and logs
    cluster: str = "slurm"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, jobs: Sequence[Job], at_once: int, observer: Observer) -> list[Failure]:
        """Submit the unfinished jobs and wait for them; ``at_once`` 0 leaves their number to SLURM."""
        submitit = _import_submitit()
        failures: list[Failure] = []
        _report_finished(jobs, failures, observer)
        waiting = fleets_of(jobs, at_once or 1)
        if not waiting:
            return failures
        executor = submitit.AutoExecutor(
            folder=self.folder / "%j", cluster=self.cluster, slurm_max_num_timeout=REQUEUES
        )
        executor.update_parameters(**self.parameters(at_once))
        submissions = executor.map_array(ResumableAttempt(), [_absolute(fleet) for fleet in waiting])
        fleet_of = {submission.job_id: fleet for submission, fleet in zip(submissions, waiting, strict=True)}
        for submission in submitit.helpers.as_completed(submissions, poll_frequency=1):
            fleet = fleet_of[submission.job_id]
            try:
                reasons = submission.result()
            except submitit.core.utils.UncompletedJobError as error:
                end = f"job {submission.job_id} ended without a result: {_first_line(error)}"
                reasons = _lost(fleet, f"{end} (all of it in {self.folder})")
            _report(fleet, reasons, failures, observer)
        return failures

    def parameters(self, at_once: int) -> dict[str, Any]:
        """Return submitit's parameters."""
        general = ("timeout_min", "mem_gb")
        values = {k if k in general else f"slurm_{k}": v for k, v in self.options.items()}
        if at_once:
            values["slurm_array_parallelism"] = at_once
        return {
            "name": "omcda-deploy",
            "timeout_min": TIMEOUT_MIN,
            "tasks_per_node": 1,
            "cpus_per_task": 1,
            **values,
        }


@dataclass(frozen=True)
class RayEngine:
    """Runs jobs as Ray tasks of one CPU each, on the cluster at ``address`` or one that it starts here."""

    address: str | None = None

    def __call__(self, jobs: Sequence[Job], at_once: int, observer: Observer) -> list[Failure]:
        """Run all jobs; one whose worker or machine dies is tried again, elsewhere if need be, and resumes."""
        failures: list[Failure] = []
        _report_finished(jobs, failures, observer)
        waiting, running = deque(fleets_of(jobs, at_once or 1)), dict[Any, list[Job]]()
        with _ray_cluster(self.address, at_once) as ray:
            # An error of training is a result like any other: only what Ray itself lost is tried again.
            task = ray.remote(num_cpus=1, max_retries=RETRIES)(run_fleet)
            while waiting or running:
                while waiting and not (at_once and len(running) >= at_once):
                    fleet = waiting.popleft()
                    running[task.options(name=str(fleet[0].run)).remote(_absolute(fleet))] = fleet
                (ended, *_), _ = ray.wait(list(running), num_returns=1)
                fleet = running.pop(ended)
                try:
                    reasons = ray.get(ended)
                except ray.exceptions.RayError as error:
                    reasons = _lost(fleet, f"Ray lost the task: {_first_line(error)}")
                _report(fleet, reasons, failures, observer)
        return failures


@contextmanager
def _ray_cluster(address: str | None, at_once: int) -> Iterator[Any]:
    """Connect to a cluster, or start one; yield the package."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray = _import_ray()
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address is None:
        # Not None, with which Ray would connect to the cluster that RAY_ADDRESS names.
        options |= {"address": "local", "num_cpus": at_once or None, "include_dashboard": False}
        options["object_store_memory"] = OBJECT_STORE_BYTES
    else:
        options["address"] = address
    try:
        ray.init(**options)
    except (ConnectionError, ValueError) as error:
        raise ConfigError(
            f"cannot use the Ray cluster at {address}: {_first_line(error)} Start one with  ray start --head, or "
            "leave the address out"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _absolute(jobs: Sequence[Job]) -> list[Job]:
    return [job.absolute() for job in jobs]


def _lost(jobs: Sequence[Job], end: str) -> list[str | None]:
    """Return the reasons of jobs whose process ended without telling any."""
    return [None if job.finished else f"{job.run}: {end}" for job in jobs]


def _report_finished(jobs: Sequence[Job], failures: list[Failure], observer: Observer) -> None:
    finished = [job for job in jobs if job.finished]
    _report(finished, [None] * len(finished), failures, observer)


def _report(
    jobs: Sequence[Job], reasons: Sequence[str | None], failures: list[Failure], observer: Observer
) -> None:
    for job, reason in zip(jobs, reasons, strict=True):
        if reason is not None:
            failures.append((job, reason))
        observer.ended(job.run, None if reason is None else OmcdaError(reason))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _import_submitit() -> Any:
    try:
        return import_module("submitit")
    except ImportError as error:
        raise MissingExtraError("submitit", "slurm") from error


def _import_ray() -> Any:
    try:
        return import_module("ray")
    except ImportError as error:
        raise MissingExtraError("ray", "ray") from error
