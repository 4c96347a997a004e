"""Results pages: a page of docs/results, from nothing.

A page is a TOML file beside which its table is written, with the extension ``.md``::

    title = "HalfCheetah-6x1, medium"
    note = "One paragraph or more."   # may be left out
    task = "mamujoco/halfcheetah-6x1"
    tier = "medium"              # behaviour policies that record the dataset
    transitions = 200000
    episodes = 20                # per run, deterministic

    [[runs]]                     # like a sweep file; several where algorithms train for different lengths
    algorithms = ["bc", "omiga", "omcda"]
    seeds = [0, 1, 2]
    steps = 20000

The dataset is recorded, every run is trained, exported and played, and the table is written with everything that
its numbers depend on. Finished parts are not repeated and a killed run is resumed: run the command again to go on.
A run that fails stands in the table as failed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omcda_deploy.errors import ConfigError, UnknownNameError
from omcda_deploy.experiments.compare import compare_runs
from omcda_deploy.experiments.observer import Observer
from omcda_deploy.experiments.sweep import Job, Sweep, jobs_of, run_queue, sweep_of
from omcda_deploy.files import read_toml
from omcda_deploy.formatting import digits_of

if TYPE_CHECKING:
    from omcda_deploy.datasets import Dataset


@dataclass(frozen=True)
class Page:
    """The contents of a page's file."""

    title: str
    task: str
    tier: str
    transitions: int
    runs: list[dict[str, Any]]
    seed: int = 0  # the dataset's
    episodes: int = 20
    num_envs: int = 20  # episodes played side by side
    note: str = ""  # Markdown, above the table, for readers of the numbers


def write_page(page: Path, out: Path, jobs: int, observer: Observer | None = None) -> Path:
    """Record, train, export and play everything of a page, and write its table; return the table's path.

    Datasets, runs and bundles lie in ``out``; ``jobs`` runs are trained at once (0: one per core). Raises
    :class:`ConfigError` where the page is none or nothing can be compared.
    """
    from omcda_deploy.files import write_text
    from omcda_deploy.registry import read_dataset
    from omcda_deploy.report.comparison import LeftOut
    from omcda_deploy.report.comparison_report import markdown

    observer = observer or Observer()
    contents = read_page(page)
    dataset = out / f"{contents.task.replace('/', '-')}-{contents.tier}.hdf5"
    sweeps = _sweeps(contents, dataset, page)  # refuses before minutes are spent on recording
    _record(contents, dataset, observer)
    queue = [job for sweep in sweeps for job in jobs_of(sweep, out)]
    failures = run_queue(queue, jobs, observer=observer)
    ended_early = {job.run for job, _ in failures}
    comparison = compare_runs(
        [job.run for job in queue if job.run not in ended_early],
        contents.episodes,
        0,
        contents.num_envs,
        observer=observer,
    )
    left_out = [LeftOut(str(job.run), _label(job), f"failed: {why}") for job, why in failures]
    comparison = dataclasses.replace(
        comparison,
        left_out=[*left_out, *comparison.left_out],
        conditions={"Data": _description(contents, read_dataset(dataset)), **comparison.conditions},
    )
    table = page.with_suffix(".md")
    write_text(table, markdown(comparison, contents.title, f"omcda-deploy results {page}", contents.note))
    return table


def read_page(path: Path) -> Page:
    """Read a page's file. Raises :class:`ConfigError` for a file that is missing, no TOML or no page."""
    values = read_toml(path, "a results page")
    fields = dataclasses.fields(Page)
    for name in values:
        if name not in {field.name for field in fields}:
            raise UnknownNameError(f"entry of {path}", name, [field.name for field in fields])
    kinds: Mapping[str, type] = {"title": str, "task": str, "tier": str, "runs": list, "note": str}
    for field in fields:
        kind = kinds.get(field.name, int)
        if field.name not in values:
            if field.default is dataclasses.MISSING:
                raise ConfigError(f"{path}: expected an entry {field.name}, there is none")
        elif type(values[field.name]) is not kind:
            raise ConfigError(f"{path}: {field.name}: expected {kind.__name__}, got {values[field.name]!r}")
    page = Page(**values)
    if not page.runs or not all(isinstance(table, dict) for table in page.runs):
        raise ConfigError(f"{path}: expected one or more tables [[runs]], got {page.runs!r}")
    return page


def _record(page: Page, dataset: Path, observer: Observer) -> None:
    from omcda_deploy.play.collect import collect_mixture
    from omcda_deploy.play.shipped import sources

    if not dataset.exists():
        dataset.parent.mkdir(parents=True, exist_ok=True)
        with observer.progress(f"recording {page.task}") as report:
            collect_mixture(
                page.task,
                sources(page.task, page.tier),
                dataset,
                transitions=page.transitions,
                seed=page.seed,
                behavior=page.tier,
                progress=report,
            )
        observer.recorded(dataset)


def _sweeps(page: Page, dataset: Path, path: Path) -> list[Sweep]:
    tables = []
    for index, table in enumerate(page.runs):
        if "datasets" in table:
            raise ConfigError(
                f"{path}: runs[{index}]: datasets: a page has the one that it records, leave it out"
            )
        tables.append(sweep_of({"datasets": [str(dataset)], **table}, f"{path}: runs[{index}]"))
    return tables


def _description(page: Page, dataset: Dataset) -> str:
    returns = dataset.episode_returns
    digits = digits_of(returns)
    return (
        f"{returns.size:,} episodes, {dataset.transitions.size:,} transitions of the {page.tier} policies (seed "
        f"{page.seed}), return {returns.mean():.{digits}f} ± {returns.std():.{digits}f}, "
        f"best {returns.max():.{digits}f}"
    )


def _label(job: Job) -> str:
    return ", ".join([job.algorithm, *(f"{key} {value}" for key, value in job.settings), f"seed {job.seed}"])
