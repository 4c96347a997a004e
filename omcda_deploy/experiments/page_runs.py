"""The runs of a results page: those that its file asks for, those of its record, and how they compare."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Container, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omcda_deploy.errors import ConfigError, OmcdaError
from omcda_deploy.experiments.records import Record, read_record
from omcda_deploy.experiments.results import Page, Row
from omcda_deploy.experiments.sweep import Job, require_same_request

if TYPE_CHECKING:
    from omcda_deploy.report.comparison import Comparison, LeftOut

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

    def recorded(self, digests: Mapping[int, str] | None = None) -> Record | None:
        """Read the page's record, with the runs alone that the file of results asks for now, in the way it does.

        None where there is no record. Raises :class:`ConfigError` for one that is damaged, of runs that were played
        under other conditions, or of another dataset than that of ``digests``.
        """
        record = read_record(self.record, self.page.conditions)
        if record is None:
            return None
        fitting = {self.name(job) for job in self.jobs if self.name(job) in record.failed}
        for job in self.jobs:
            config = record.configs.get(self.name(job))
            with suppress(OmcdaError):
                if config is not None:
                    require_same_request(job, config, job.request.resolved(config.spec))
                    fitting.add(self.name(job))
        chosen = record.select(fitting)
        if digests is not None and not all(config.began_with(digests) for config in chosen.configs.values()):
            raise ConfigError(
                f"{self.record} is of another dataset than {self.dataset}: move one of them away, and run again"
            )
        return chosen


@dataclass(frozen=True)
class Made:
    """A page's comparison, None for the ``reason``, and the reasons of jobs that failed."""

    comparison: Comparison | None
    reason: str = ""
    failures: Mapping[Job, str] = dataclasses.field(default_factory=dict)


def compare_record(work: Work, record: Record) -> Made:
    """Compare recorded runs that fit a page under the names of its rows, and list all others."""
    from omcda_deploy.report.comparison import CLONE, Comparison, summarise

    order = {work.name(job): (index, row.name) for index, row in enumerate(work.rows) for job in row.jobs}
    failures = {job: record.failed[name] for job in work.jobs if (name := work.name(job)) in record.failed}
    summaries, repeated = summarise(record.results)
    cloned = any(s.variant.algorithm == "bc" for s in summaries)  # then no model stands in for its row
    clones = [s for s in summaries if s.variant.algorithm == CLONE and not cloned]
    trained = sorted(
        (s for s in summaries if s.variant.algorithm != CLONE), key=lambda s: order[s.results[0].run][0]
    )
    budgets = {
        f"Budget of {order[run][1]}": config.budget["advice"]
        for run, config in record.configs.items()
        if config.budget is not None
    }
    comparison = Comparison(
        [*trained, *clones],
        [*_left_out(work, record.configs, failures), *record.left_out, *repeated],
        {**budgets, "Evaluation": str(work.page.conditions), "Record": _RECORD.format(work.record.name)},
        {s.variant: order[s.results[0].run][1] for s in trained},
        record.card,
    )
    return Made(comparison, failures=failures)


def _left_out(work: Work, recorded: Container[str], failures: Mapping[Job, str]) -> list[LeftOut]:
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
