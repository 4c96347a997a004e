"""Results pages: the pages of docs/results, each from its TOML file alone.

The table is written beside the file, with the extension ``.md``::

    title = "HalfCheetah-6x1, medium"
    note = "One paragraph or more."   # may be left out
    task = "mamujoco/halfcheetah-6x1"
    tier = "medium"              # behaviour policies that record the dataset
    transitions = 200000
    episodes = 20                # per policy and temperature
    temperatures = [0, 0.25, 0.5, 0.75, 1]   # of play; these when omitted

    [[runs]]                     # like a sweep file; several where algorithms train for different lengths
    algorithms = ["bc", "omiga", "omcda"]
    seeds = [0, 1, 2]
    steps = 20000

The dataset is recorded, every run is trained, exported and played (docs/evaluation.md), and the table is written
with everything on which its numbers depend, and its figure beside it as ``.svg``. Finished parts are not repeated
and a killed run is resumed: run the command again to go on. The table lists runs that failed, with the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omcda_deploy.errors import ConfigError, UnknownNameError
from omcda_deploy.experiments.compare import compare_runs
from omcda_deploy.experiments.engines import Engine, run_locally
from omcda_deploy.experiments.observer import Observer
from omcda_deploy.experiments.scores import TEMPERATURES, Conditions
from omcda_deploy.experiments.sweep import Job, Sweep, check_jobs, jobs_of, sweep_of
from omcda_deploy.files import read_toml
from omcda_deploy.formatting import digits_of
from omcda_deploy.play.measurements import require_at_least

if TYPE_CHECKING:
    from omcda_deploy.datasets import Dataset
    from omcda_deploy.play.collect import Source


@dataclass(frozen=True)
class Page:
    """The contents of a page's file. Numbers are checked by :func:`read_page`."""

    title: str
    task: str
    tier: str
    transitions: int
    runs: list[dict[str, Any]]
    seed: int = 0  # of the recording
    episodes: int = 20
    num_envs: int = 20  # episodes played side by side, per temperature
    temperatures: Sequence[float] = TEMPERATURES
    note: str = ""  # Markdown above the table, for its readers

    @property
    def conditions(self) -> Conditions:
        """Conditions of play. Raises :class:`ConfigError` for numbers out of range."""
        return Conditions(self.episodes, num_envs=self.num_envs, temperatures=self.temperatures)


def write_page(
    page: Path, out: Path, jobs: int, observer: Observer | None = None, engine: Engine = run_locally
) -> Path:
    """Record, train, export and play everything of a page, and write its table; return the table's path.

    Datasets, runs and bundles lie in ``out``; ``engine`` trains ``jobs`` runs at once (0: one per core), everything
    else happens in this process. Raises :class:`ConfigError`, before anything is made, where the page or one of its
    runs cannot be, and later where nothing can be compared.
    """
    from omcda_deploy.files import require_writable
    from omcda_deploy.play.shipped import sources
    from omcda_deploy.registry import read_dataset, team_spec
    from omcda_deploy.report.comparison import LeftOut
    from omcda_deploy.report.comparison_report import write_markdown

    observer = observer or Observer()
    contents = read_page(page)
    table = page.with_suffix(".md")
    require_writable(table)
    dataset = out / f"{contents.task.replace('/', '-')}-{contents.tier}.hdf5"
    queue = [job for sweep in _sweeps(contents, dataset, page) for job in jobs_of(sweep, out)]
    if not dataset.exists():
        policies = sources(contents.task, contents.tier)
        check_jobs(queue, {dataset: team_spec(contents.task)})
        _record(contents, policies, dataset, observer)
    check_jobs(queue)
    failures = engine(queue, jobs, observer)
    ended_early = {job.run for job, _ in failures}
    comparison = compare_runs(
        [job.run for job in queue if job.run not in ended_early], contents.conditions, observer=observer
    )
    left_out = [LeftOut(str(job.run), _label(job), f"failed: {why}") for job, why in failures]
    comparison = dataclasses.replace(
        comparison,
        left_out=[*left_out, *comparison.left_out],
        conditions={"Data": _description(contents, read_dataset(dataset)), **comparison.conditions},
    )
    write_markdown(comparison, table, contents.title, f"omcda-deploy results {page}", contents.note)
    return table


def read_page(path: Path) -> Page:
    """Read a page's file. Raises :class:`ConfigError` where it is missing, is not TOML or has a wrong entry."""
    values = read_toml(path, "a results page")
    fields = dataclasses.fields(Page)
    for name in values:
        if name not in {field.name for field in fields}:
            raise UnknownNameError(f"entry of {path}", name, [field.name for field in fields])
    texts, lists = dict.fromkeys(("title", "task", "tier", "note"), str), ("runs", "temperatures")
    kinds: Mapping[str, type] = {**texts, **dict.fromkeys(lists, list)}
    for field in fields:
        kind = kinds.get(field.name, int)
        if field.name not in values:
            if field.default is dataclasses.MISSING:
                raise ConfigError(f"{path}: expected an entry {field.name}, there is none")
        elif type(values[field.name]) is not kind:
            raise ConfigError(f"{path}: {field.name}: expected {kind.__name__}, got {values[field.name]!r}")
    page = Page(**values)
    try:
        require_at_least(page.transitions, 1, "transitions")
        require_at_least(page.seed, 0, "seed")
        page.conditions  # noqa: B018 (checked, before hours are spent on runs)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not page.runs or not all(isinstance(table, dict) for table in page.runs):
        raise ConfigError(f"{path}: expected one or more tables [[runs]], got {page.runs!r}")
    return page


def _record(page: Page, policies: Sequence[Source], dataset: Path, observer: Observer) -> None:
    from omcda_deploy.play.collect import collect_mixture

    dataset.parent.mkdir(parents=True, exist_ok=True)
    with observer.progress(f"recording {page.task}") as report:
        collect_mixture(
            page.task,
            policies,
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
