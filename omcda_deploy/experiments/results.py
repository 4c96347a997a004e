"""Files of results: a page of docs/results, or the pages of a whole comparison, each from one TOML file.

A page is written beside its file, with the extension ``.md``::

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

A comparison has tables ``[[datasets]]`` in place of task and tier, writes a page for each dataset into a folder of
its own name, and the page ``overview`` of all beside it. What several tables share is said once::

    overview = "README.md"       # the file's own name with .md when omitted
    method = "omcda"             # the row that the others are compared with
    seeds = [0, 1, 2, 3, 4]      # of all runs, as are steps, snapshot_every and settings
    settings = { hidden = 128 }

    [[datasets]]                 # every task with every tier; may change any number of the file's, such as episodes
    tasks = ["smax/5m_vs_6m", "smax/6h_vs_8z"]
    tiers = ["medium", "poor"]
    episodes = 200

    [[runs]]
    name = "w/o-CDA"             # of its one row; algorithm and settings when omitted
    algorithms = ["omcda"]
    grid.omcda.allocation = ["uniform"]
    only = ["smax/*"]            # datasets TASK/TIER that it is for; all when omitted

    [[claims]]                   # that the overview judges by the numbers: omcda_deploy.report.claims
    says = "Influence shares the budget better than equal parts"
    rule = "better"
    method = "omcda"
    than = ["w/o-CDA"]

What a table says wins over what the file says, and a table of runs over one of datasets.
:mod:`omcda_deploy.experiments.pages` records, trains, plays and writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omcda_deploy.errors import ConfigError, UnknownNameError
from omcda_deploy.experiments.scores import TEMPERATURES, Conditions
from omcda_deploy.experiments.sweep import Job, Sweep, jobs_of, sweep_of
from omcda_deploy.files import read_toml
from omcda_deploy.play.measurements import require_at_least
from omcda_deploy.report.claims import Claim, claim_of, fits

_PAGE: dict[str, type] = {
    **{"transitions": int, "seed": int, "episodes": int, "num_envs": int},
    **{"temperatures": list, "note": str},
}
_TRAINING: dict[str, type] = {"seeds": list, "steps": int, "snapshot_every": int, "settings": dict}
_RUNS: dict[str, type] = {"name": str, "only": list, "algorithms": list, "grid": dict, **_TRAINING}
_SHARED = {"title": str, "runs": list, **_PAGE, **_TRAINING}
_SINGLE = {**_SHARED, "task": str, "tier": str}
_SEVERAL = {**_SHARED, "datasets": list, "overview": str, "method": str, "claims": list}
_DATASETS: dict[str, type] = {"tasks": list, "tiers": list, **_PAGE, **_TRAINING}


@dataclass(frozen=True)
class Row:
    """A method on a page: its runs, one per seed."""

    name: str
    jobs: tuple[Job, ...]


@dataclass(frozen=True)
class Page:
    """A page to be written: its dataset, and its runs as tables of a sweep file with a ``name``."""

    file: Path
    where: str  # the TOML file, for messages
    title: str
    task: str
    tier: str
    transitions: int
    runs: Sequence[Mapping[str, Any]]
    seed: int = 0  # of the recording
    episodes: int = 20
    num_envs: int = 20  # episodes played side by side, per temperature
    temperatures: Sequence[float] = TEMPERATURES
    note: str = ""  # Markdown above the table, for its readers

    @property
    def label(self) -> str:
        """The dataset, as TASK/TIER."""
        return f"{self.task}/{self.tier}"

    @property
    def conditions(self) -> Conditions:
        """Conditions of play. Raises :class:`ConfigError` for numbers out of range."""
        return Conditions(self.episodes, num_envs=self.num_envs, temperatures=self.temperatures)

    def dataset(self, out: Path) -> Path:
        """File of its dataset in the folder ``out``."""
        return out / f"{self.task.replace('/', '-')}-{self.tier}.hdf5"

    def rows(self, out: Path) -> list[Row]:
        """List its methods in order, with the run folders in ``out``.

        Raises :class:`ConfigError` for a table of runs that is none, and for one run that is listed twice.
        """
        rows: list[Row] = []
        for table in self.runs:
            by_name: dict[str, list[Job]] = {}
            for job in jobs_of(_sweep(table, str(self.dataset(out))), out):
                by_name.setdefault(table.get("name") or _described(job, table), []).append(job)
            rows += [Row(name, tuple(jobs)) for name, jobs in by_name.items()]
            methods = {(job.algorithm, job.settings) for jobs in by_name.values() for job in jobs}
            if "name" in table and len(methods) > 1:
                raise ConfigError(
                    f"{table['where']}: name: expected it where there is one row, there are {len(methods)}"
                )
        folders = [job.run for row in rows for job in row.jobs]
        if twice := next((run for run in folders if folders.count(run) > 1), None):
            raise ConfigError(f"{self.where}: the run {twice} is listed twice: leave one of them out")
        return rows


@dataclass(frozen=True)
class Results:
    """The contents of a file of results."""

    source: Path
    title: str
    note: str
    pages: tuple[Page, ...]
    overview: Path | None = None  # of a comparison
    method: str = ""  # the row that others are compared with
    claims: tuple[Claim, ...] = ()

    def chosen(self, patterns: Sequence[str]) -> list[Page]:
        """Select pages whose dataset TASK/TIER fits one of ``patterns``; all without any.

        Raises :class:`UnknownNameError` for a pattern that fits none.
        """
        labels = [page.label for page in self.pages]
        for pattern in patterns:
            require_match(f"dataset of {self.source}", pattern, labels)
        return [page for page in self.pages if not patterns or fits(page.label, patterns)]


def read_results(path: Path) -> Results:
    """Read a file of results. Raises :class:`OmcdaError` where it is missing, no TOML or has a wrong entry."""
    values = read_toml(path, "a results page")
    if path.suffix == ".md":
        raise ConfigError(
            f"{path}: its page would take its place: name the file {path.with_suffix('.toml').name}"
        )
    several = "datasets" in values
    _require_entries(str(path), values, _SEVERAL if several else _SINGLE)
    required = ("title", "runs") if several else ("title", "task", "tier", "transitions", "runs")
    _require_present(str(path), values, required)
    _require_line(f"{path}: title", values["title"])
    tables = values["runs"]
    if not tables or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(f"{path}: expected one or more tables [[runs]], got {tables!r}")
    for index, table in enumerate(tables):
        if "datasets" in table:
            raise ConfigError(
                f"{path}: runs[{index}]: datasets: a page has the one that it records, leave it out"
            )
        _require_entries(f"{path}: runs[{index}]", table, _RUNS)
        _require_line(f"{path}: runs[{index}]: name", table.get("name", "none"))
    if not several:
        page = _page(path, values, {}, values["task"], values["tier"], path.with_suffix(".md"))
        return Results(path, values["title"], "", (page,))
    return _comparison(path, values)


def _comparison(path: Path, values: Mapping[str, Any]) -> Results:
    pages: dict[str, Page] = {}
    for index, table in enumerate(values["datasets"]):
        where = f"{path}: datasets[{index}]"
        if not isinstance(table, dict):
            raise ConfigError(f"{where}: expected a table [[datasets]], got {table!r}")
        _require_entries(where, table, _DATASETS)
        _require_present(where, table, ("tasks", "tiers"))
        for entry in ("tasks", "tiers"):
            if not table[entry] or not all(isinstance(name, str) for name in table[entry]):
                raise ConfigError(f"{where}: {entry}: expected one or more names, got {table[entry]!r}")
        for task in table["tasks"]:
            for tier in table["tiers"]:
                file = path.with_suffix("") / f"{task.replace('/', '-')}-{tier}.md"
                page = _page(path, values, table, task, tier, file)
                if pages.setdefault(page.label, page) is not page:
                    raise ConfigError(f"{where}: {page.label} is listed twice: leave one of them out")
    for index, table in enumerate(values["runs"]):
        for pattern in table.get("only", ()):
            require_match(f"dataset of {path}: runs[{index}]: only", pattern, pages)
    methods = _methods(path, pages.values())
    method = values.get("method", methods[0])
    if method not in methods:
        raise UnknownNameError(f"row of {path}: method", method, methods)
    claims = tuple(
        claim_of(table, f"{path}: claims[{index}]", methods)
        for index, table in enumerate(values.get("claims", ()))
    )
    for index, claim in enumerate(claims):
        _require_line(f"{path}: claims[{index}]: says", claim.says)
        if not claim.on:
            raise ConfigError(
                f"{path}: claims[{index}]: on: expected one or more datasets, got []: leave it out for all"
            )
        for pattern in claim.on:
            require_match(f"dataset of {path}: claims[{index}]: on", pattern, pages)
    overview = path.with_name(_overview_name(path, values))
    return Results(
        path, values["title"], values.get("note", ""), tuple(pages.values()), overview, method, claims
    )


def _overview_name(path: Path, values: Mapping[str, Any]) -> str:
    name: str = values.get("overview", f"{path.stem}.md")
    if not name.endswith(".md") or Path(name).name != name:
        raise ConfigError(
            f"{path}: overview: expected the name of a page beside this file, such as README.md, got {name!r}"
        )
    return name


def _methods(path: Path, pages: Iterable[Page]) -> list[str]:
    """Names of all rows, in the order of the file. Raises :class:`ConfigError` where a page has one twice."""
    methods: dict[str, None] = {}
    for page in pages:
        names = [row.name for row in page.rows(Path())]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ConfigError(f"{path}: two rows of {page.label} are called {twice!r}: give them a name each")
        methods |= dict.fromkeys(names)
    if not methods:
        raise ConfigError(f"{path}: expected one or more datasets, got none")
    return list(methods)


def _page(
    path: Path, values: Mapping[str, Any], datasets: Mapping[str, Any], task: str, tier: str, file: Path
) -> Page:
    """Make the page of a dataset: the file's entries, then those of its table of datasets."""
    single = not datasets
    merged = {**values, **datasets}
    settings = {**values.get("settings", {}), **datasets.get("settings", {})}
    runs = [
        {
            **{name: merged[name] for name in _TRAINING if name in merged},
            **table,
            "settings": {**settings, **table.get("settings", {})},
            "where": f"{path}: runs[{index}]",
        }
        for index, table in enumerate(values["runs"])
        if fits(f"{task}/{tier}", table.get("only", ("*",)))
    ]
    if "transitions" not in merged:
        raise ConfigError(f"{path}: expected an entry transitions, there is none")
    entries = {name: merged[name] for name in _PAGE if name in merged}
    if not single:  # the file's note is for the overview
        entries["note"] = datasets.get("note", "")
    title = values["title"] if single else f"{task}, {tier}"
    page = Page(file, str(path), title, task, tier, runs=runs, **entries)
    try:
        require_at_least(page.transitions, 1, "transitions")
        require_at_least(page.seed, 0, "seed")
        page.conditions  # noqa: B018 (checked, before hours are spent on runs)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return page


def _sweep(table: Mapping[str, Any], dataset: str) -> Sweep:
    entries = {name: value for name, value in table.items() if name not in ("name", "only", "where")}
    return sweep_of({"datasets": [dataset], **entries}, table["where"])


def _described(job: Job, table: Mapping[str, Any]) -> str:
    """Name a row by its algorithm and the settings of its grid; those that all runs share tell nothing apart."""
    own = [
        f"{name} {value}"
        for name, value in job.settings
        if name in table.get("grid", {}).get(job.algorithm, {})
    ]
    return ", ".join([job.algorithm, *own])


def _require_entries(where: str, values: Mapping[str, Any], kinds: Mapping[str, type]) -> None:
    for name, value in values.items():
        if name not in kinds:
            raise UnknownNameError(f"entry of {where}", name, kinds)
        if type(value) is not kinds[name]:
            raise ConfigError(f"{where}: {name}: expected {kinds[name].__name__}, got {value!r}")


def _require_present(where: str, values: Mapping[str, Any], names: Iterable[str]) -> None:
    for name in names:
        if name not in values:
            raise ConfigError(f"{where}: expected an entry {name}, there is none")


def _require_line(where: str, text: str) -> None:
    """Raise :class:`ConfigError` for a text that a heading or the cell of a table cannot hold."""
    if text.splitlines() != [text]:
        raise ConfigError(f"{where}: expected one line of text, got {text!r}")


def require_match(kind: str, pattern: object, labels: Iterable[str]) -> None:
    """Raise :class:`UnknownNameError` for a pattern that fits none of ``labels``."""
    if not isinstance(pattern, str) or not any(fits(label, [pattern]) for label in labels):
        raise UnknownNameError(kind, str(pattern), labels)
