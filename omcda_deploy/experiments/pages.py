"""Pages of results, made: datasets recorded, runs trained, exported and played, tables and figures written.

Finished parts are not repeated and a killed run is resumed: call it again to go on. A page lists the runs that are
not run, not finished or failed, and the overview the pages that could not be written; nothing stands for them.
Beside a page lies its record (:mod:`omcda_deploy.experiments.records`), by which later overviews cover it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omcda_deploy.errors import ConfigError, OmcdaError
from omcda_deploy.experiments.compare import play_runs
from omcda_deploy.experiments.engines import Engine, run_locally
from omcda_deploy.experiments.observer import Observer
from omcda_deploy.experiments.page_runs import Made, Plan, Training, Work, compare_record, first_of
from omcda_deploy.experiments.records import Failure, Played, Record, write_record
from omcda_deploy.experiments.results import Page, Results, read_results, require_match
from omcda_deploy.experiments.sweep import Job, check_jobs, naming
from omcda_deploy.experiments.tier_index import MISSING
from omcda_deploy.experiments.watching import watching
from omcda_deploy.files import require_writable, write_json

if TYPE_CHECKING:
    from omcda_deploy.report.comparison import LeftOut
    from omcda_deploy.report.overview import Entry


def plan_results(
    sources: Sequence[Path],
    out: Path,
    *,
    only: Sequence[str] = (),
    rows: Sequence[str] = (),
    train: Training = "all",
    pdf: bool = False,
) -> list[Plan]:
    """Read and check files of results, each as :func:`write_results` describes; create nothing.

    Each of ``rows`` is to match a row of some file. Raises :class:`OmcdaError` for what cannot be made, for two
    files with a page in common, and where all plans are empty.
    """
    from omcda_deploy.report.pdf import require_pdf

    if pdf:
        require_pdf()
    plans = []
    for source in sources:
        results = read_results(source)
        works = tuple(Work(page, out, tuple(page.rows(out)), _missing(page)) for page in results.pages)
        chosen = results.chosen(only)
        now = tuple(work for work in works if work.page in chosen)
        plans.append(Plan(results, works, now, rows, train, pdf))
    named = ", ".join(map(str, sources))
    for pattern in rows:
        require_match(f"row of {named}", pattern, [name for plan in plans for name in plan.methods])
    owners: dict[Path, Path] = {}
    for plan in plans:
        for file in plan.targets:
            if (other := owners.setdefault(file.resolve(), plan.source)) is not plan.source:
                raise ConfigError(
                    f"{other} and {plan.source} would both write {file}: rename one of them, or its overview"
                )
    if all(plan.empty for plan in plans):
        raise ConfigError(
            f"no run of {named} is finished in {out}, and no page of it has a record: leave --write-only out, or "
            "name the --out of its runs"
        )
    for plan in plans:
        if not plan.empty:
            _check_plan(plan)
    return plans


def _check_plan(plan: Plan) -> None:
    """Refuse what can be refused before anything is made."""
    overview = plan.results.overview
    for file in (*(work.page.file for work in plan.now), *filter(None, [overview])):
        require_writable(file)
    for work in plan.now:
        if not work.missing:
            _check(plan, work)
        elif overview is None:
            raise ConfigError(f"{work.page.label} cannot be had: {work.missing}")


def write_results(
    source: Path,
    out: Path,
    jobs: int,
    observer: Observer | None = None,
    engine: Engine = run_locally,
    *,
    only: Sequence[str] = (),
    rows: Sequence[str] = (),
    train: Training = "all",
    pdf: bool = False,
) -> list[Path]:
    """Make the page of a file of results, or the pages and the overview of a comparison; return those written.

    Datasets, runs and bundles lie in ``out``; ``engine`` trains ``jobs`` runs at once (0: one per core), everything
    else happens in this process. ``only``: patterns of datasets TASK/TIER; the overview covers the others by their
    records. ``train``: all runs, which make the record anew; the new ones, which the record does not hold; or none,
    and no dataset is collected. The last two add the finished runs in ``out`` to the record. ``rows``: patterns of
    the rows whose new runs are trained. With ``pdf``, figures are written as PDF, too.

    A folder that holds a run of other settings is refused where this call would train its run, and listed else.
    Raises :class:`OmcdaError`, before anything is made, where the file or one of its runs cannot be, and after the
    other pages are written for those that could not.
    """
    [plan] = plan_results([source], out, only=only, rows=rows, train=train, pdf=pdf)
    return write_plan(plan, jobs, observer, engine)


def write_plan(
    plan: Plan, jobs: int, observer: Observer | None = None, engine: Engine = run_locally
) -> list[Path]:
    """Make the pages of a plan, as :func:`write_results` describes; return the files.

    Raises :class:`OmcdaError` for pages that could not be written, after the others are.
    """
    observer = observer or Observer()
    results, now = plan.results, plan.now
    if results.overview is None:
        page = _make(plan, now[0], jobs, observer, engine)
        if page.comparison is None:
            raise ConfigError(f"{now[0].page.file} is not written: {page.reason}")
        return _with_pdf([now[0].page.file], plan.pdf)
    # The overview is written after every page, so that it is there when the command is killed.
    made: dict[str, Made] = {}
    errors: list[OmcdaError] = []
    written = []
    for work in now:
        try:
            page = _make(plan, work, jobs, observer, engine)
            made[work.page.label] = page
            written += [work.page.file] if page.comparison is not None else []
        except OmcdaError as error:
            errors.append(error)
            made[work.page.label] = Made(None, str(error), work.failures())
        # The others as they are by now: parts may be made at the same time.
        others = {w.page.label: _as_it_is(w) for w in plan.works if w.page.label not in made}
        _write_overview(results, plan.works, {**others, **made}, plan.command)
    if errors:
        raise OmcdaError(
            f"{len(errors)} of {len(now)} pages could not be written, as {results.overview} says. The first: "
            f"{errors[0]}"
        )
    return _with_pdf([*written, results.overview], plan.pdf)


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


def _check(plan: Plan, work: Work) -> None:
    """Refuse what can be refused before hours are spent; create nothing."""
    from omcda_deploy.play.shipped import sources
    from omcda_deploy.registry import team_spec

    unrecorded = {}
    if not work.dataset.exists():
        sources(work.page.task, work.page.tier)
        unrecorded = {work.dataset: team_spec(work.page.task)}
    else:
        _require_dataset(work)
    for job in work.jobs:
        with naming(job):
            job.request.check()
    try:
        asked = plan.asked(work)
    except ConfigError:  # its record is damaged, which keeps no other page from being made
        return
    check_jobs(asked, unrecorded)


def _make(plan: Plan, work: Work, jobs: int, observer: Observer, engine: Engine) -> Made:
    """Record, train, play and write a page."""
    from omcda_deploy.report.comparison_report import write_markdown

    if work.missing:
        return Made(None, work.missing)
    failures = work.failures()
    if new := plan.asked(work):
        _have_dataset(work, new, plan.known(work), observer)
        failures = _train(work, new, jobs, observer, engine)
    others = work.other_folders(new)
    failures = {
        job: why for job, why in failures.items() if job not in others
    }  # it failed with other settings
    finished = [job for job in work.jobs if job.finished and job not in failures and job not in others]
    record, left_out = _play(work, finished, failures, observer)
    if plan.train != "all":
        record = work.recorded().joined(record)  # read as late as this: parts may be made at the same time
    made = compare_record(work, record, left_out, others)
    if made.comparison is None:
        begun = sum(job.run.exists() for job in work.jobs)
        first = f"; the first failed: {next(iter(failures.values()))}" if failures else ""
        reason = f"none of {len(work.jobs)} runs is finished, {begun} begun"
        if not new:  # nothing was to be trained, and nothing is there
            return Made(None, f"{reason}{first_of(work, made.others)}", failures)
        raise ConfigError(f"{work.page.label}: {reason}{first}")
    work.page.file.parent.mkdir(parents=True, exist_ok=True)
    if record.runs:
        write_record(work.record, record)
    write_markdown(made.comparison, work.page.file, work.page.title, plan.command, work.page.note)
    return made


def _have_dataset(work: Work, new: Sequence[Job], known: Record, observer: Observer) -> None:
    """Collect the dataset where it is not there, and check the new jobs with it.

    Raises :class:`ConfigError` where the record is of another one.
    """
    from omcda_deploy.registry import read_dataset

    if not work.dataset.exists():
        _collect(work, observer)
        check_jobs(new)
    if known.digest and known.digest not in read_dataset(work.dataset).digests.values():
        raise ConfigError(
            f"{work.record} is of another dataset than {work.dataset}: copy its own there, or move the record away"
        )


def _train(work: Work, new: Sequence[Job], jobs: int, observer: Observer, engine: Engine) -> dict[Job, str]:
    """Train runs; return why some failed."""
    with watching(new, observer):
        failures = dict(engine(new, jobs, observer))
    if failures or work.failed.exists():
        work.failed.parent.mkdir(exist_ok=True)  # they may have failed before they had folders
        write_json(work.failed, {str(job.run): reason for job, reason in failures.items()})
    return failures


def _play(
    work: Work, finished: Sequence[Job], failures: Mapping[Job, str], observer: Observer
) -> tuple[Record, list[LeftOut]]:
    """Play a page's finished runs; return their record, and the runs that could not be played."""
    from omcda_deploy.datasets.summary import card, summarize
    from omcda_deploy.registry import read_dataset
    from omcda_deploy.report.comparison import CLONE
    from omcda_deploy.training.run_folder import read_config

    failed = {work.name(job): Failure(job.steps, work.without_out(why)) for job, why in failures.items()}
    record = Record(work.terms, failed=failed)
    if not finished:
        return record, []
    names = {str(job.run): work.name(job) for job in work.jobs}
    dataset = read_dataset(work.dataset) if work.dataset.exists() else None
    runs = [job.run for job in finished]
    results, left_out = play_runs(runs, work.page.conditions, observer=observer, dataset=dataset)
    played: dict[bool, dict[str, Played]] = {True: {}, False: {}}  # by whether it is the clone
    for result in results:
        one = Played.of(read_config(Path(result.run)), result)
        played[result.variant.algorithm == CLONE][names[result.run]] = one
    left_out = [
        dataclasses.replace(left, run=names[left.run], reason=work.without_out(left.reason))
        for left in left_out
    ]
    told = () if dataset is None else tuple(card(summarize(dataset)))
    return dataclasses.replace(record, runs=played[False], clone=played[True], card=told), left_out


def _write_overview(results: Results, works: Sequence[Work], made: Mapping[str, Made], command: str) -> None:
    from omcda_deploy.report.overview import Overview
    from omcda_deploy.report.overview_report import write_overview

    assert results.overview is not None  # by the caller
    entries = [_entry(work, made[work.page.label], results.overview.parent) for work in works]
    methods = list(dict.fromkeys(row.name for work in works for row in work.rows))
    overview = Overview(results.title, results.method, methods, entries, results.claims, results.note)
    write_overview(overview, results.overview, command)


def _as_it_is(work: Work) -> Made:
    """Compare the runs of a page that is not made now, by its record."""
    if work.missing:
        return Made(None, work.missing)
    try:
        return compare_record(work, work.recorded())
    except OmcdaError as error:
        return Made(None, str(error))


def _entry(work: Work, made: Made, folder: Path) -> Entry:
    from omcda_deploy.report.overview import Entry

    failed = {row.name: sum(job in made.failures for job in row.jobs) for row in work.rows}
    planned = {row.name: len(row.jobs) for row in work.rows}
    found = made.comparison is not None and bool(made.comparison.summaries)
    return Entry(
        work.page.label,
        str(work.page.file.relative_to(folder)),
        made.comparison if found else None,
        "" if found else made.reason or "none of its runs could be played",
        planned,
        failed,
        bool(work.missing),
    )


def _collect(work: Work, observer: Observer) -> None:
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


def _require_dataset(work: Work) -> None:
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
