"""The runs of a results page: those that its file asks for, those of its record, and how they compare."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from omcda_deploy.errors import ConfigError, OmcdaError
from omcda_deploy.experiments.records import Played, Record, damaged, read_record
from omcda_deploy.experiments.results import Page, Results, Row
from omcda_deploy.experiments.sweep import Job, difference
from omcda_deploy.report.claims import fits

if TYPE_CHECKING:
    from omcda_deploy.report.comparison import Comparison, LeftOut, Result

Training = Literal["all", "new", "none"]
_RECORD = "[{0}]({1}), with the configuration and the episodes of every run"


@dataclass(frozen=True)
class Work:
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

    @property
    def terms(self) -> dict[str, Any]:
        """Terms that its runs have in common: how their dataset is collected, and the conditions of play."""
        page, play = self.page, self.page.conditions
        return {
            "tier": page.tier,
            "transitions": page.transitions,
            "recording_seed": page.seed,
            **play.to_json(),
            "temperatures": list(play.temperatures),
        }

    def recorded(self) -> Record:
        """Read the page's record, with nothing in it where there is none.

        Raises :class:`ConfigError` for one that is damaged, or of runs that were played under other conditions.
        """
        return read_record(self.record, self.terms) or Record(self.terms)

    def asked_for(self, record: Record) -> tuple[dict[Job, Played], dict[Job, str]]:
        """Select the recorded runs that the file of results asks for now, in the way that it does.

        Of jobs in whose place another run is recorded, the second part says what that is. Raises
        :class:`ConfigError` for a damaged record.
        """
        found, others = {}, {}
        for job in self.jobs:
            if (played := record.runs.get(self.name(job))) is None:
                continue
            try:
                other = difference(job, played.config, job.request.resolved(played.config.spec))
            except OmcdaError as error:  # its settings do not fit the recorded team
                others[job] = f"recorded as another run: {error}"
                continue
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise damaged(self.record, error) from error
            if other is None:
                found[job] = played
            else:
                others[job] = f"recorded with {other[0]}, the file asks for {other[1]}"
        return found, others

    def other_folders(self, trained: Collection[Job]) -> dict[Job, str]:
        """Say of run folders that hold another run than their jobs' what it is; those ``trained`` now are checked.

        Raises :class:`DatasetError` for a dataset that is damaged.
        """
        from omcda_deploy.registry import read_dataset
        from omcda_deploy.training.run_folder import read_config

        jobs = [job for job in self.jobs if job not in trained and job.run.exists()]
        digests = read_dataset(self.dataset).digests if jobs and self.dataset.exists() else None
        others = {}
        for job in jobs:
            try:
                config = read_config(job.run)
                other = difference(job, config, job.request.resolved(config.spec), digests)
            except OmcdaError as error:
                others[job] = self.without_out(str(error))
                continue
            if other is not None:
                others[job] = f"its folder holds a run of {other[0]}, expected {other[1]}"
        return others

    def without_out(self, text: str) -> str:
        """Name files as they lie in ``out``: where that is on the machine is nothing to a page's readers."""
        return text.replace(f"{self.out}/", "")


@dataclass(frozen=True)
class Plan:
    """A file of results with what a call makes of it: :func:`omcda_deploy.experiments.pages.plan_results`."""

    results: Results
    works: tuple[Work, ...]
    now: tuple[Work, ...]  # the pages that are made, the others are covered by their records
    rows: Sequence[str]
    train: Training
    pdf: bool

    @property
    def source(self) -> Path:
        """The file."""
        return self.results.source

    @property
    def command(self) -> str:
        """The command that makes the whole of it again, as it is typed."""
        return shlex.join(["omcda-deploy", "results", str(self.source)])

    @property
    def targets(self) -> list[Path]:
        """Files that it may write: its pages and its overview."""
        return [*(work.page.file for work in self.works), *filter(None, [self.results.overview])]

    @property
    def methods(self) -> list[str]:
        """Names of the rows of the pages that are made."""
        return list(dict.fromkeys(row.name for work in self.now for row in work.rows))

    @property
    def empty(self) -> bool:
        """True where nothing is recorded or finished, and nothing is to be trained."""
        trained = self.train != "none" and (
            not self.rows or any(fits(name, self.rows) for name in self.methods)
        )
        return not trained and not any(
            work.record.exists() or any(job.finished for job in work.jobs) for work in self.now
        )

    def asked(self, work: Work) -> list[Job]:
        """List the runs of a page that are trained, or taken as they are where they are finished.

        Raises :class:`ConfigError` for a damaged record.
        """
        if self.train == "none":
            return []
        held, _ = work.asked_for(self.known(work))
        jobs = (job for row in work.rows if not self.rows or fits(row.name, self.rows) for job in row.jobs)
        return [job for job in jobs if job not in held]

    def known(self, work: Work) -> Record:
        """Read the record that a page's runs are added to. Raises :class:`ConfigError` for a damaged one."""
        return Record(work.terms) if self.train == "all" else work.recorded()


@dataclass(frozen=True)
class Made:
    """A page's comparison, None for the ``reason``, and the reasons of jobs that failed.

    ``others``: jobs in whose place another run is recorded, or lies in the folder, with what it is.
    """

    comparison: Comparison | None
    reason: str = ""
    failures: Mapping[Job, str] = dataclasses.field(default_factory=dict)
    others: Mapping[Job, str] = dataclasses.field(default_factory=dict)


def compare_record(
    work: Work,
    record: Record,
    left_out: Sequence[LeftOut] = (),
    folders: Mapping[Job, str] | None = None,
) -> Made:
    """Compare the recorded runs that a page asks for under the names of its rows, and list all others.

    ``left_out``: runs that could not be played now; ``folders``: what other runs :meth:`Work.other_folders` found.
    Raises :class:`ConfigError` for a damaged record.
    """
    from omcda_deploy.report.comparison import CLONE, Comparison, summarise
    from omcda_deploy.report.comparison_report import link_to

    runs, recorded = work.asked_for(record)
    others = {**(folders or {}), **recorded}
    failures = {
        job: end.reason
        for job in work.jobs
        if job not in runs and (end := record.failed.get(work.name(job))) and end.steps == job.steps
    }
    conditions = work.page.conditions
    order = {work.name(job): (index, row.name) for index, row in enumerate(work.rows) for job in row.jobs}
    try:
        results = [played.result(work.name(job), conditions) for job, played in runs.items()]
        if results and not any(result.variant.algorithm == "bc" for result in results):
            results += [played.clone(run, conditions) for run, played in record.clone.items()]
        budgets = {
            f"Budget of {order[work.name(job)][1]}": str(played.config.budget["advice"])
            for job, played in runs.items()
            if played.config.budget is not None
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(work.record, error) from error
    summaries, repeated = summarise(results)
    _require_one_variant([result for result in results if result.variant.algorithm != CLONE], order)
    clones = [s for s in summaries if s.variant.algorithm == CLONE]
    trained = sorted(
        (s for s in summaries if s.variant.algorithm != CLONE), key=lambda s: order[s.results[0].run][0]
    )
    told = {left.run for left in left_out}
    known = {*runs, *(job for job in work.jobs if work.name(job) in told)}
    comparison = Comparison(
        [*trained, *clones],
        [*_left_out(work, known, failures, others), *left_out, *repeated],
        {
            **budgets,
            "Evaluation": str(conditions),
            "Record": _RECORD.format(work.record.name, link_to(work.record.name)),
        },
        {s.variant: order[s.results[0].run][1] for s in trained},
        record.card,
    )
    if not results and not left_out:
        ways = " as the file asks for it" if others else ""
        return Made(None, f"none of its runs is recorded{ways}{first_of(work, others)}", failures, others)
    return Made(comparison, failures=failures, others=others)


def first_of(work: Work, others: Mapping[Job, str]) -> str:
    """Say what the first of ``others`` is, behind the reason why a page has no run; empty without any."""
    return next((f"; {work.name(job)}: {why}" for job, why in others.items()), "")


def _require_one_variant(results: Sequence[Result], order: Mapping[str, tuple[int, str]]) -> None:
    """Raise :class:`ConfigError` for a row whose runs cannot be averaged, such as those of other clones."""
    first: dict[str, Result] = {}
    for result in results:
        other = first.setdefault(order[result.run][1], result)
        if other.variant != result.variant:
            ways = [other.variant.settings_label or "defaults", result.variant.settings_label or "defaults"]
            raise ConfigError(
                f"{other.run} and {result.run} are of one row, and were trained in two ways: {ways[0]}; {ways[1]}. "
                "Move the one that is not meant away, and run the page again"
            )


def _left_out(
    work: Work, known: Container[Job], failures: Mapping[Job, str], others: Mapping[Job, str]
) -> list[LeftOut]:
    from omcda_deploy.report.comparison import LeftOut

    left = []
    for row in work.rows:
        left += [
            LeftOut(work.name(job), f"{row.name}, seed {job.seed}", f"failed: {failures[job]}")
            for job in row.jobs
            if job in failures
        ]
        unfinished = [job for job in row.jobs if job not in known and job not in failures]
        reasons: dict[str, list[Job]] = {}
        for job in unfinished:
            reason = others.get(job) or ("not run to its end" if job.run.exists() else "not run")
            reasons.setdefault(reason, []).append(job)
        for reason, jobs in reasons.items():
            seeds = ", ".join(str(job.seed) for job in jobs)
            folder = str(Path(work.name(jobs[0])).parent)
            left.append(LeftOut(folder, f"{row.name}, seeds {seeds}", reason))
    return left
