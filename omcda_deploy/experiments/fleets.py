"""Groups of a sweep's jobs, and the processes in which they are trained side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from omcda_deploy.errors import OmcdaError
from omcda_deploy.experiments.sweep import Job, naming, require_same_request
from omcda_deploy.processes import run_child

if TYPE_CHECKING:
    from omcda_deploy.training.observer import TrainObserver

FLEET = 5  # most runs to a process: more gain little, and their metrics come late


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
            with naming(job):
                if (job.run / "config.json").exists():
                    require_same_request(job, read_config(job.run))
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
