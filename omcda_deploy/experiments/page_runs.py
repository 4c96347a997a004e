"""The runs of a results page: those that its file asks for, those of its record, and how they compare."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omcda_deploy.errors import ConfigError
from omcda_deploy.experiments.records import Played, Record, damaged, read_record
from omcda_deploy.experiments.results import Page, Row
from omcda_deploy.experiments.sweep import Job, require_same_request

if TYPE_CHECKING:
    from omcda_deploy.report.comparison import Comparison, LeftOut, Result

_RECORD = "[{0}]({0}), with the configuration and the episodes of every run"


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

    def asked_for(self, record: Record) -> dict[Job, Played]:
        """Select the recorded runs that the file of results asks for now, in the way that it does.

        Raises :class:`ConfigError` for a damaged record.
        """
        found = {}
        for job in self.jobs:
            if (played := record.runs.get(self.name(job))) is None:
                continue
            try:
                require_same_request(job, played.config, job.request.resolved(played.config.spec))
            except ConfigError:  # a run of other settings
                continue
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise damaged(self.record, error) from error
            found[job] = played
        return found


@dataclass(frozen=True)
class Made:
    """A page's comparison, None for the ``reason``, and the reasons of jobs that failed."""

    comparison: Comparison | None
    reason: str = ""
    failures: Mapping[Job, str] = dataclasses.field(default_factory=dict)


def compare_record(work: Work, record: Record, left_out: Sequence[LeftOut] = ()) -> Made:
    """Compare the recorded runs that a page asks for under the names of its rows, and list all others.

    ``left_out``: runs that could not be played now. Raises :class:`ConfigError` for a damaged record.
    """
    from omcda_deploy.report.comparison import CLONE, Comparison, summarise

    runs = work.asked_for(record)
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
        [*_left_out(work, known, failures), *left_out, *repeated],
        {**budgets, "Evaluation": str(conditions), "Record": _RECORD.format(work.record.name)},
        {s.variant: order[s.results[0].run][1] for s in trained},
        record.card,
    )
    if not results and not left_out:
        return Made(None, "none of its runs is recorded", failures)
    return Made(comparison, failures=failures)


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


def _left_out(work: Work, known: Container[Job], failures: Mapping[Job, str]) -> list[LeftOut]:
    from omcda_deploy.report.comparison import LeftOut

    left = []
    for row in work.rows:
        left += [
            LeftOut(work.name(job), f"{row.name}, seed {job.seed}", f"failed: {failures[job]}")
            for job in row.jobs
            if job in failures
        ]
        unfinished = [job for job in row.jobs if job not in known and job not in failures]
        for begun, reason in ((False, "not run"), (True, "not run to its end")):
            jobs = [job for job in unfinished if job.run.exists() == begun]
            if jobs:
                seeds = ", ".join(str(job.seed) for job in jobs)
                folder = str(Path(work.name(jobs[0])).parent)
                left.append(LeftOut(folder, f"{row.name}, seeds {seeds}", reason))
    return left
