"""A comparison's pages and overview: made, killed, resumed, in parts, and with what is not run."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from omcda_deploy.cli import app
from omcda_deploy.errors import ConfigError, OmcdaError
from omcda_deploy.experiments import pages
from omcda_deploy.experiments import train as training
from omcda_deploy.experiments.observer import Observer
from omcda_deploy.experiments.page_runs import Work
from omcda_deploy.experiments.pages import write_results
from omcda_deploy.experiments.results import read_results
from omcda_deploy.experiments.sweep import Job
from omcda_deploy.registry import read_dataset

COMPARISON = """
title = "Toys"
note = "A note."
overview = "README.md"
transitions = 600
episodes = 3
seeds = [0, 1]
steps = 20
settings = { hidden = 8, batch_size = 8 }
temperatures = [0, 1]

[[datasets]]
tasks = ["toy/chain", "toy/masked"]
tiers = ["behavior"]

[[datasets]]
tasks = ["smax/corridor"]
tiers = ["good"]
episodes = 5

[[runs]]
algorithms = ["omcda", "bc"]

[[runs]]
name = "w/o-CDA"
algorithms = ["omcda"]
grid.omcda.allocation = ["uniform"]

[[runs]]
algorithms = ["omcda"]
grid.omcda.d_tot = [1.2]
only = ["toy/masked/*"]

[[runs]]
algorithms = ["cql"]
seeds = [0]
steps = 10

[[claims]]
says = "OMCDA earns more"
rule = "better"
method = "omcda"
than = ["bc", "cql"]

[[claims]]
says = "Influence follows reward"
rule = "correlated"
method = "omcda"

[[claims]]
says = "Values stay"
rule = "converges"
method = "cql"
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "pages" / "comparison.toml"
    path.parent.mkdir()
    path.write_text(COMPARISON)
    return path


class Here:
    """An engine that trains in this process, fails every CQL, and is killed at the first job that ``dies``."""

    def __init__(self, dies: str = "") -> None:
        self.dies = dies
        self.trained: list[Path] = []

    def __call__(self, jobs: Sequence[Job], at_once: int, observer: Observer) -> list[tuple[Job, str]]:
        for _, group in itertools.groupby(jobs, key=lambda job: (job.algorithm, job.settings)):
            waiting = [job for job in group if not job.finished and job.algorithm != "cql"]
            if self.dies and any(self.dies in str(job.run) for job in waiting):
                raise KeyboardInterrupt
            if waiting:
                runs = [
                    (replace(j.request, behavior={"steps": 10, "check_every": 10}, log_every=5), j.run)
                    for j in waiting
                ]
                training.train_runs(waiting[0].dataset, runs)
                self.trained += [job.run for job in waiting]
        return [(job, "training diverged at step 7") for job in jobs if job.algorithm == "cql"]


def cells(page: Path, start: str) -> list[str]:
    """The first row of a page's tables whose first cell is ``start``."""
    rows = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip(" |") for cell in rows[0]]


def test_a_comparison_is_killed_resumed_and_written_in_parts(file: Path, tmp_path: Path) -> None:
    out, overview = tmp_path / "out", file.with_name("README.md")
    chain, masked = (file.with_suffix("") / f"toy-{name}-behavior.md" for name in ("chain", "masked"))
    with pytest.raises(KeyboardInterrupt):
        write_results(file, out, 1, engine=Here(dies="masked-behavior/bc"))
    # The first page is whole and the overview there; the second dataset has runs, but no page.
    assert chain.is_file()
    assert not masked.exists()
    assert cells(overview, "bc")[1] == "1 of 2"
    assert "toy/masked/behavior: not run: none of its runs is recorded." in overview.read_text()

    engine = Here()
    written = write_results(file, out, 1, engine=engine, only=["toy/masked/*"])
    assert written == [masked, overview]
    assert [run.parent.name for run in engine.trained].count("bc-hidden=8-batch_size=8") == 2
    assert not any("omcda-hidden=8-batch_size=8/" in f"{run}/" for run in engine.trained)  # not repeated
    text = masked.read_text()
    assert "Written by `omcda-deploy results" in text
    names = [line.split(" | ")[0].strip("| ") for line in text.splitlines() if " | 20 | 0, 1 | " in line]
    assert names == ["omcda", "bc", "w/o-CDA", "omcda, d_tot 1.2"]  # in the order of the file
    assert "(cql, seed 0): failed: training diverged at step 7" in text
    assert str(tmp_path) not in text.partition("\n## ")[2]  # the command names it as it was called
    dataset = read_dataset(out / "toy-masked-behavior.hdf5")
    assert cells(masked, "digest")[1] == dataset.digest
    assert cells(masked, "transitions")[1] == f"{dataset.transitions.size:,}"
    played = [line.split(" | ") for line in text.splitlines() if line.startswith("| bc | 0 ")]
    assert cells(masked, "return of the clone, T 0")[1].startswith(played[0][2])
    for kind in ("temperatures", "influence", "d_tot"):
        assert f"(toy-masked-behavior-{kind}.svg)" in text
        assert masked.with_name(f"toy-masked-behavior-{kind}.svg").is_file()
    assert not list(masked.parent.glob("smax*"))

    text = overview.read_text()
    assert "[behavior](comparison/toy-masked-behavior.md)" in text
    assert "(comparison/toy-masked-behavior-influence.svg)" in text
    assert "smax/corridor/good: not run: no checkpoint of 4 million steps wins a battle." in text
    assert [cells(overview, name)[1:3] for name in ("omcda", "bc", "cql", "omcda, d_tot 1.2")] == [
        *(["2 of 2", "4"], ["2 of 2", "4"], ["0 of 2", "0"], ["1 of 1", "2"]),
    ]
    assert cells(overview, "cql")[-1] == "2"  # failed, one on each page
    assert "**Cannot be told** (the paper): OMCDA earns more" in text
    assert "not run: cql" in text
    assert "**Not run** (the paper): Values stay" in text
    for name in ("README-toy-chain.svg", "README-toy-masked.svg"):
        assert f"(comparison/{name})" in text
        assert masked.with_name(name).is_file()
    assert "A note." in text
    assert "A note." not in masked.read_text()


def test_what_is_finished_is_written_without_training(file: Path, tmp_path: Path) -> None:
    out, overview = tmp_path / "out", file.with_name("README.md")
    words = ["results", str(file), "--out", str(out), "--write-only"]
    with pytest.raises(
        ConfigError,
        match=r"no run of .*comparison.toml is finished in .*, and no page of it has a record: leave",
    ):
        CliRunner().invoke(app, words, catch_exceptions=False)
    assert not out.exists()  # nothing was recorded
    assert [path.name for path in file.parent.iterdir()] == ["comparison.toml"]
    with pytest.raises(KeyboardInterrupt):
        write_results(file, out, 1, engine=Here(dies="allocation=uniform"), only=["toy/chain/*"])
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0
    assert "toy-chain-behavior.md" in result.stdout
    page = file.with_suffix("") / "toy-chain-behavior.md"
    assert "(w/o-CDA, seeds 0, 1): not run\n" in page.read_text()
    assert cells(page, "bc")[2] == "0, 1"
    assert [line for line in overview.read_text().splitlines() if line.startswith("| w/o-CDA | not run |")]

    # A page is never of other runs than its file says.
    file.write_text(COMPARISON.replace("transitions = 600", "transitions = 900"))
    with pytest.raises(
        OmcdaError, match=r"holds 6.. transitions of behavior \(seed 0\), expected 900 of behavior"
    ):
        write_results(file, out, 1, engine=Here(), only=["toy/chain/*"])
    file.write_text(COMPARISON.replace("steps = 20\n", "steps = 30\n"))
    with pytest.raises(ConfigError, match="is a run of 20 steps, expected 30"):
        write_results(file, out, 1, train="new", only=["toy/chain/*"])
    write_results(file, out, 1, train="none", only=["toy/chain/*"])
    reason = (
        r"toy/chain/behavior: not run: none of .*; .*seed0: recorded with 20 steps, the file asks for 30\."
    )
    assert re.search(reason, overview.read_text())


def test_a_page_that_cannot_be_made_does_not_stop_the_others(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect = pages._collect

    def fail_on_chain(work: Work, observer: Observer) -> None:
        if work.page.task == "toy/chain":
            raise OmcdaError("no simulator")
        collect(work, observer)

    monkeypatch.setattr(pages, "_collect", fail_on_chain)
    file.write_text(COMPARISON.replace('["omcda", "bc"]', '["bc"]').split("[[claims]]")[0])
    with pytest.raises(
        OmcdaError, match=r"1 of 3 pages could not be written, as .*README.md says.* no simulator"
    ):
        write_results(file, tmp_path / "out", 1, engine=Here())
    assert (file.with_suffix("") / "toy-masked-behavior.md").is_file()
    assert "toy/chain/behavior: not run: no simulator." in file.with_name("README.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('"bc", "cql"]', '"bcq", "cql"]'), r"unknown row of .*claims\[0\] 'bcq': did you mean 'bc'"),
        (
            ('rule = "better"', 'rule = "best"'),
            r"unknown rule of .*claims\[0\] 'best': did you mean 'better'",
        ),
        (('than = ["bc", "cql"]', ""), r"claims\[0\]: than: expected one or more rows with the rule better"),
        (('than = ["bc", "cql"]', 'than = "bc"'), r"claims\[0\]: than: expected a list of texts, got 'bc'"),
        (('says = "OMCDA earns more"', ""), r"claims\[0\]: expected an entry says"),
        (('only = ["toy/masked/*"]', 'only = ["toy/maskd/*"]'), r"only 'toy/maskd/\*': did you mean"),
        (('tiers = ["good"]', 'tiers = ["good", "good"]'), r"smax/corridor/good is listed twice"),
        (('tiers = ["good"]', "tiers = [1]"), r"datasets\[1\]: tiers: expected one or more names, got \[1\]"),
        (('tiers = ["good"]', ""), r"datasets\[1\]: expected an entry tiers"),
        (("episodes = 5", "epsiodes = 5"), r"datasets\[1\] 'epsiodes': did you mean 'episodes'"),
        (("episodes = 5", "episodes = 0"), r"episodes: expected at least 1, got 0"),
        (('["uniform"]', '["uniform", "random"]'), r"name: expected it where there is one row, there are 2"),
        (('name = "w/o-CDA"', 'name = "bc"'), r"two rows of toy/chain/behavior are called 'bc'"),
        (('grid.omcda.allocation = ["uniform"]', ""), r"the run .*omcda.*seed0 is listed twice"),
        (('title = "Toys"', 'title = "Toys"\nmethod = "omcdb"'), r"unknown row of .*method 'omcdb'"),
        (('title = "Toys"', 'title = "Toys"\ntask = "toy/chain"'), r"unknown entry of .* 'task'"),
        (("settings = {", 'settings = "a" # {'), r"settings: expected dict, got 'a'"),
        (("transitions = 600", ""), r"expected an entry transitions"),
    ],
)
def test_a_wrong_comparison_is_refused(file: Path, change: tuple[str, str], message: str) -> None:
    assert change[0] in COMPARISON
    file.write_text(COMPARISON.replace(*change))
    with pytest.raises(OmcdaError, match=message):
        read_results(file)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected a results file or --all, got neither"),
        (["FILE", "--all"], "got both"),
        (["--all"], "expected files docs/results/*.toml here, there are none"),
        (["FILE", "--only", "toy/chian/*"], "unknown dataset of"),
        (["FILE", "--add", "--write-only"], "expected --add or --write-only, got both"),
        (["FILE", "--row", "bc"], "expected --add with --row"),
        (["FILE", "--add", "--row", "bcc"], "unknown row of"),
    ],
)
def test_wrong_words_are_refused_in_one_line(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["results", *[str(file) if word == "FILE" else word for word in words]])
    assert isinstance(result.exception, OmcdaError)
    assert message in str(result.exception)
    assert not (tmp_path / "results").exists()


def test_the_papers_comparison_reads_and_covers_its_tasks() -> None:
    folder = Path(__file__).parents[2] / "docs" / "results"
    every = {file.stem: read_results(file) for file in sorted(folder.glob("*.toml"))}
    results = every.pop("comparison")
    written = [page.file for others in (results, *every.values()) for page in others.pages]
    assert len(set(written)) == len(written)  # no file writes over another's page
    assert [page.task.partition("/")[0] for page in results.pages] == ["mamujoco"] * 12 + ["smax"] * 9
    assert sorted(page.label for page in results.pages if pages._missing(page)) == [
        *("smax/5m_vs_6m/good", "smax/corridor/good"),
    ]
    for page in results.pages:
        rows = [row.name for row in page.rows(Path("out"))]
        own = ["omcda", "omcda auto", "omcda paper", "w/o-CDA", "w/o-dq", "rd"]
        assert rows[: len(own)] == own
        rivals = {"bc", "bcq", "cql", "icq", "omar", "cfcql", "omiga", "comadice"}
        assert set(rows[len(own) : len(own) + len(rivals)]) == rivals
