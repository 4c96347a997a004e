"""Pages of results, made: datasets recorded, runs trained, exported and played, tables and figures written.

Finished parts are not repeated and a killed run is resumed: call it again to go on. A page lists the runs that are
not run, not finished or failed, and the overview the pages that could not be written; nothing stands for them.
Beside a page lies its record (:mod:`omcda_deploy.experiments.records`), by which later overviews cover it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omcda_deploy.errors import ConfigError, OmcdaError
from omcda_deploy.experiments.compare import compare_runs
from omcda_deploy.experiments.engines import Engine, run_locally
from omcda_deploy.experiments.observer import Observer
from omcda_deploy.experiments.records import Record, read_record, write_record
from omcda_deploy.experiments.results import Page, Results, Row, read_results
from omcda_deploy.experiments.sweep import Job, check_jobs, require_same_request
from omcda_deploy.experiments.tier_index import MISSING
from omcda_deploy.experiments.watching import watching
from omcda_deploy.files import require_writable, write_json

if TYPE_CHECKING:
    from omcda_deploy.report.comparison import Comparison, LeftOut
    from omcda_deploy.report.overview import Entry
    from omcda_deploy.training.run_folder import RunConfig


_RECORD = "[{0}]({0}), with the configuration and the episodes of every run"


@dataclass(frozen=True)
class _Work:
    """A page with its rows and what is known of it before it is made."""

    page: Page
    out: Path
    rows: tuple[Row, ...]
    missing: str = ""  # why its dataset cannot be had

    @property
    def jobs(self) -> list[Job]:
        return [job for row in self.rows for job in row.jobs]

    @property
    def dataset(self) -> Path:
        return self.page.dataset(self.out)

    @property
    def record(self) -> Path:
        """File with the runs behind the page, beside it."""
        return self.page.file.with_suffix(".json.gz")

    def name(self, job: Job) -> str:
        """The run of a job as its record names it: where ``out`` is on the machine is nothing to readers."""
        return str(job.run.relative_to(self.out))

    @property
    def failed(self) -> Path:
        """File with the reasons of the runs that failed when they were trained last."""
        return self.dataset.with_suffix("") / "failed.json"

    def failures(self) -> dict[Job, str]:
        """Read these reasons, without runs that were finished since."""
        try:
            reasons = json.loads(self.failed.read_text())
        except (OSError, ValueError):  # none failed, or the file is damaged
            return {}
        return {
            job: reasons[key] for job in self.jobs if not job.finished and (key := str(job.run)) in reasons
        }


@dataclass(frozen=True)
class _Made:
    """A page's comparison, None for the ``reason``, and the reasons of jobs that failed."""

    comparison: Comparison | None
    reason: str = ""
    failures: Mapping[Job, str] = dataclasses.field(default_factory=dict)


def write_results(
    source: Path,
    out: Path,
    jobs: int,
    observer: Observer | None = None,
    engine: Engine = run_locally,
    *,
    only: Sequence[str] = (),
    train: bool = True,
    pdf: bool = False,
) -> list[Path]:
    """Make the page of a file of results, or the pages and the overview of a comparison; return those written.

    Datasets, runs and bundles lie in ``out``; ``engine`` trains ``jobs`` runs at once (0: one per core), everything
    else happens in this process. ``only``: patterns of datasets TASK/TIER; the overview covers the others by their
    records. Without ``train`` nothing is recorded or trained: pages are written of the runs that are finished, or
    of their records where these hold more. With ``pdf`` every figure of these pages is written as PDF, too.

    Raises :class:`OmcdaError`, before anything is made, where the file or one of its runs cannot be, and after the
    other pages are written for those that could not.
    """
    from omcda_deploy.report.pdf import require_pdf

    observer = observer or Observer()
    if pdf:
        require_pdf()
    results = read_results(source)
    command = f"omcda-deploy results {source}"
    works = [_Work(page, out, tuple(page.rows(out)), _missing(page)) for page in results.pages]
    chosen = results.chosen(only)
    now = [work for work in works if work.page in chosen]
    for file in (*(work.page.file for work in now), *filter(None, [results.overview])):
        require_writable(file)
    for work in now:
        if not work.missing:
            _check(work, train)
        elif results.overview is None:
            raise ConfigError(f"{work.page.label} cannot be had: {work.missing}")
    if not train and not any(work.record.exists() or any(job.finished for job in work.jobs) for work in now):
        raise ConfigError(
            f"no run of {source} is finished in {out}, and no page of it has a record: leave --write-only out, or "
            "name the --out of its runs"
        )
    if results.overview is None:
        _make(now[0], jobs, observer, engine, train=train, command=command)
        return _with_pdf([results.pages[0].file], pdf)
    # The overview is written after every page, so that it is there when the command is killed.
    made = {work.page.label: _as_it_is(work) for work in works}
    errors: list[OmcdaError] = []
    written = []
    for work in now:
        try:
            made[work.page.label] = page = _make(work, jobs, observer, engine, train=train, command=command)
            written += [work.page.file] if page.comparison is not None else []
        except OmcdaError as error:
            errors.append(error)
            made[work.page.label] = _Made(None, str(error), work.failures())
        _write_overview(results, works, made, command)
    if errors:
        raise OmcdaError(
            f"{len(errors)} of {len(now)} pages could not be written, as {results.overview} says. The first: "
            f"{errors[0]}"
        )
    return _with_pdf([*written, results.overview], pdf)


def _with_pdf(pages: list[Path], pdf: bool) -> list[Path]:
    """Write the figures of ``pages`` as PDF where that is asked for; return the pages."""
    from omcda_deploy.report.pdf import write_pdf

    folders = {page.parent for page in pages if pdf}
    figures = {svg for folder in folders for page in pages for svg in folder.glob(f"{page.stem}-*.svg")}
    for figure in sorted(figures):
        write_pdf(figure)
    return pages


def _missing(page: Page) -> str:
    return MISSING.get(page.task, {}).get(page.tier, "")


def _check(work: _Work, train: bool) -> None:
    """Refuse what can be refused before hours are spent; create nothing."""
    from omcda_deploy.play.shipped import sources
    from omcda_deploy.registry import team_spec

    unrecorded = {}
    if not work.dataset.exists():
        if train:
            sources(work.page.task, work.page.tier)
        unrecorded = {work.dataset: team_spec(work.page.task)}
    else:
        _require_dataset(work)
    check_jobs(work.jobs, unrecorded)


def _make(work: _Work, jobs: int, observer: Observer, engine: Engine, *, train: bool, command: str) -> _Made:
    """Record, train, play and write a page."""
    from omcda_deploy.report.comparison_report import write_markdown

    if work.missing:
        return _Made(None, work.missing)
    failures = work.failures()
    if train:
        if not work.dataset.exists():
            _record(work, observer)
            check_jobs(work.jobs)
        with watching(work.jobs, observer):
            failures = dict(engine(work.jobs, jobs, observer))
        if failures or work.failed.exists():
            write_json(work.failed, {str(job.run): reason for job, reason in failures.items()})
    finished = [job for job in work.jobs if job.finished and job not in failures]
    record = None if train else read_record(work.record, work.page.conditions)
    if record is None or len(_fitting(work, record)) <= len(finished):
        if not finished:
            begun = sum(job.run.exists() for job in work.jobs)
            reason = f"none of {len(work.jobs)} runs is finished, {begun} begun"
            if not train:
                return _Made(None, reason, failures)
            first = f"; the first failed: {next(iter(failures.values()))}" if failures else ""
            raise ConfigError(f"{work.page.label}: {reason}{first}")
        record = _play(work, finished, failures, observer)
    made = _of_record(work, record)
    assert made.comparison is not None  # a record has runs
    work.page.file.parent.mkdir(parents=True, exist_ok=True)
    write_markdown(made.comparison, work.page.file, work.page.title, command, work.page.note)
    write_record(work.record, record, work.page.conditions)
    return made


def _play(work: _Work, finished: Sequence[Job], failures: Mapping[Job, str], observer: Observer) -> Record:
    """Play a page's finished runs, and record them."""
    from omcda_deploy.datasets.summary import card, summarize
    from omcda_deploy.registry import read_dataset
    from omcda_deploy.training.run_folder import read_config

    names = {str(job.run): work.name(job) for job in work.jobs}
    dataset = read_dataset(work.dataset) if work.dataset.exists() else None
    runs = [job.run for job in finished]
    comparison = compare_runs(runs, work.page.conditions, observer=observer, dataset=dataset)
    results = [result for summary in comparison.summaries for result in summary.results]
    return Record(
        {names[str(run)]: read_config(run) for run in runs},
        tuple(dataclasses.replace(result, run=names[result.run]) for result in results),
        tuple(_below(work.out, left) for left in comparison.left_out),
        {work.name(job): _without(work.out, reason) for job, reason in failures.items()},
        () if dataset is None else tuple(card(summarize(dataset))),
    )


def _of_record(work: _Work, record: Record) -> _Made:
    """Compare the runs of a record under the names of a page's rows, and list all others."""
    from omcda_deploy.report.comparison import CLONE, Comparison, summarise

    order = {work.name(job): (index, row.name) for index, row in enumerate(work.rows) for job in row.jobs}
    jobs = {work.name(job): job for job in work.jobs}
    configs = _fitting(work, record)
    failures = {jobs[run]: reason for run, reason in record.failed.items() if run in jobs}
    summaries, repeated = summarise(result for result in record.results if result.run in configs)
    clones = [s for s in summaries if s.variant.algorithm == CLONE]
    trained = sorted(
        (s for s in summaries if s.variant.algorithm != CLONE), key=lambda s: order[s.results[0].run][0]
    )
    budgets = {
        f"Budget of {order[run][1]}": config.budget["advice"]
        for run, config in configs.items()
        if config.budget is not None
    }
    comparison = Comparison(
        [*trained, *clones],
        [*_left_out(work, configs, failures), *record.left_out, *repeated],
        {**budgets, "Evaluation": str(work.page.conditions), "Record": _RECORD.format(work.record.name)},
        {s.variant: order[s.results[0].run][1] for s in trained},
        record.card,
    )
    return _Made(comparison, failures=failures)


def _fitting(work: _Work, record: Record) -> dict[str, RunConfig]:
    """Select the recorded runs that the file of results asks for now, in the way that it does."""
    fitting = {}
    for job in work.jobs:
        config = record.configs.get(work.name(job))
        with suppress(OmcdaError):
            if config is not None:
                require_same_request(job, config, job.request.resolved(config.spec))
                fitting[work.name(job)] = config
    return fitting


def _left_out(work: _Work, recorded: Container[str], failures: Mapping[Job, str]) -> list[LeftOut]:
    from omcda_deploy.report.comparison import LeftOut

    left = []
    for row in work.rows:
        left += [
            LeftOut(work.name(job), f"{row.name}, seed {job.seed}", f"failed: {failures[job]}")
            for job in row.jobs
            if job in failures
        ]
        unfinished = [job for job in row.jobs if work.name(job) not in recorded and job not in failures]
        for begun, reason in ((False, "not run"), (True, "not run to its end")):
            jobs = [job for job in unfinished if job.run.exists() == begun]
            if jobs:
                seeds = ", ".join(str(job.seed) for job in jobs)
                folder = str(Path(work.name(jobs[0])).parent)
                left.append(LeftOut(folder, f"{row.name}, seeds {seeds}", reason))
    return left


def _below(out: Path, left: LeftOut) -> LeftOut:
    return dataclasses.replace(left, run=_without(out, left.run), reason=_without(out, left.reason))


def _without(out: Path, text: str) -> str:
    """Name files as they lie in ``out``: where that is on the machine is nothing to a page's readers."""
    return text.replace(f"{out}/", "")


def _write_overview(
    results: Results, works: Sequence[_Work], made: Mapping[str, _Made], command: str
) -> None:
    from omcda_deploy.report.overview import Overview
    from omcda_deploy.report.overview_report import write_overview

    assert results.overview is not None  # by the caller
    entries = [_entry(work, made[work.page.label], results.overview.parent) for work in works]
    methods = list(dict.fromkeys(row.name for work in works for row in work.rows))
    overview = Overview(results.title, results.method, methods, entries, results.claims, results.note)
    write_overview(overview, results.overview, command)


def _as_it_is(work: _Work) -> _Made:
    """Compare the runs of a page that is not made now, by its record."""
    if work.missing:
        return _Made(None, work.missing)
    try:
        record = read_record(work.record, work.page.conditions)
    except OmcdaError as error:
        return _Made(None, str(error))
    made = _Made(None) if record is None else _of_record(work, record)
    if made.comparison is None or not made.comparison.summaries:
        return _Made(None, "none of its runs is recorded")
    return made


def _entry(work: _Work, made: _Made, folder: Path) -> Entry:
    from omcda_deploy.report.overview import Entry

    failed = {row.name: sum(job in made.failures for job in row.jobs) for row in work.rows}
    planned = {row.name: len(row.jobs) for row in work.rows}
    return Entry(
        work.page.label,
        str(work.page.file.relative_to(folder)),
        made.comparison,
        made.reason,
        planned,
        failed,
        bool(work.missing),
    )


def _record(work: _Work, observer: Observer) -> None:
    from omcda_deploy.play.collect import collect_mixture
    from omcda_deploy.play.shipped import sources

    page = work.page
    policies = sources(page.task, page.tier)
    work.dataset.parent.mkdir(parents=True, exist_ok=True)
    with observer.progress(f"recording {page.task}", "transitions") as report:
        collect_mixture(
            page.task,
            policies,
            work.dataset,
            transitions=page.transitions,
            seed=page.seed,
            behavior=page.tier,
            progress=report,
        )
    observer.recorded(work.dataset)


def _require_dataset(work: _Work) -> None:
    """Raise :class:`ConfigError` for a dataset that was recorded for another page."""
    from omcda_deploy.registry import read_dataset

    page, dataset = work.page, read_dataset(work.dataset)
    recorded = {name: dataset.metadata.get(name) for name in ("behavior", "seed")}
    count = int(dataset.transitions.size)
    limit = dataset.spec.episode_limit  # whole episodes are recorded, so a last one may exceed the number
    fits = page.transitions <= count < page.transitions + limit
    if recorded != {"behavior": page.tier, "seed": page.seed} or not fits:
        raise ConfigError(
            f"{work.dataset} holds {count:,} transitions of {recorded['behavior']} (seed {recorded['seed']}), "
            f"expected {page.transitions:,} of {page.tier} (seed {page.seed}): choose another --out, or remove it"
        )
