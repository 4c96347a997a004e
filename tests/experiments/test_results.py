"""Results pages: their files, and the table of a real run beside one that fails."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from omcda_deploy.cli import app
from omcda_deploy.errors import ConfigError, OmcdaError
from omcda_deploy.experiments import engines
from omcda_deploy.experiments import train as training
from omcda_deploy.experiments.pages import write_results
from omcda_deploy.experiments.results import read_results
from omcda_deploy.experiments.sweep import Job
from omcda_deploy.registry import read_dataset

PAGE = """
title = "Toy"
task = "toy/masked"
tier = "behavior"
transitions = 1200
episodes = 3

[[runs]]
algorithms = ["bc"]
seeds = [0, 1]
steps = 20
[runs.grid.bc]
hidden = [8]

[[runs]]
algorithms = ["cql"]
seeds = [0]
steps = 10
"""


def train(jobs: Iterable[Job], at_once: int, observer: object = None) -> list[tuple[Job, str]]:
    """BC in this process; everything else fails."""
    failed = []
    for job in jobs:
        if job.algorithm != "bc":
            failed.append((job, "training diverged"))
        elif not job.finished:
            training.train(
                job.dataset,
                job.algorithm,
                job.run,
                steps=job.steps,
                seed=job.seed,
                settings=dict(job.settings),
                behavior={"steps": 20, "check_every": 10},
            )
    return failed


def test_a_page_shows_runs_and_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(engines, "run_locally", train)
    page = tmp_path / "toy.toml"
    page.write_text(PAGE)
    words = ["results", str(page), "--out", str(tmp_path / "results")]
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    text = (tmp_path / "toy.md").read_text()
    dataset = read_dataset(tmp_path / "results" / "toy-masked-behavior.hdf5")
    assert dataset.digest in text
    returns = dataset.episode_returns
    assert f"| return | {returns.mean():.3f} ± {returns.std():.3f} (sd), " in text
    row, *by_temperature = [line for line in text.splitlines() if line.startswith("| bc, hidden 8")]
    assert "| 20 | 0, 1 | 1 |" in row
    assert [line.split("|")[2].split()[0] for line in by_temperature] == ["0", "0.25", "0.5", "0.75", "1"]
    assert "3 episodes of seed 0 plus the run's at every temperature of 0, 0.25, 0.5, 0.75, 1;" in text
    assert "selected by 1 other episodes per policy, of seed 1000000 plus the run's" in text
    assert "![Return over the temperature of play](toy-temperatures.svg)" in text
    figure = ElementTree.parse(tmp_path / "toy-temperatures.svg").getroot()
    assert "temperature of play" in figure.get("aria-label", "")
    assert figure.find("{http://www.w3.org/2000/svg}style") is not None  # it brings its colours along
    assert "(cql, seed 0): failed: training diverged" in text
    # Again: nothing is recorded or trained anew, and the table has the same row.
    before = (tmp_path / "results" / "toy-masked-behavior.hdf5").stat().st_mtime_ns
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    assert (tmp_path / "results" / "toy-masked-behavior.hdf5").stat().st_mtime_ns == before
    assert row in (tmp_path / "toy.md").read_text().splitlines()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('title = "Toy"', ""), "title"),
        (("transitions = 1200", 'transitions = "many"'), "transitions: expected int, got 'many'"),
        (("episodes = 3", "epsiodes = 3"), "did you mean 'episodes'"),
        (("episodes = 3", "episodes = true"), "episodes: expected int, got True"),
        (("episodes = 3", "episodes = 0"), r"page\.toml: episodes: expected at least 1, got 0"),
        (
            ("episodes = 3", "temperatures = [0.5]"),
            r"page\.toml: temperatures: expected 0 and 1 .*, got 0\.5",
        ),
        (("episodes = 3", "temperatures = []"), r"page\.toml: temperatures: expected one or more numbers"),
        (("episodes = 3", "temperatures = [0, 1, 1]"), r"page\.toml: temperatures: expected each once"),
        (("episodes = 3", 'temperatures = [0, 1, "a"]'), r"page\.toml: temperature: expected a number .*'a'"),
        (
            ("episodes = 3", "temperatures = [0, 1, nan]"),
            r"page\.toml: temperature: expected a number .* nan",
        ),
        (("episodes = 3", "temperatures = [0, 1, true]"), r"page\.toml: temperature: expected .* True"),
        (("episodes = 3", "temperatures = 1"), r"page\.toml: temperatures: expected list, got 1"),
        (("[[runs]]", "[runs]"), "TOML"),
    ],
)
def test_a_wrong_page_is_refused(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    page = tmp_path / "page.toml"
    page.write_text(PAGE.replace(*change))
    with pytest.raises(OmcdaError, match=message):
        read_results(page)


@pytest.mark.parametrize("name", ["several.toml", "", "pages/README.md", "README", "../README.md"])
def test_an_overview_is_a_page_beside_its_file(tmp_path: Path, name: str) -> None:
    file = tmp_path / "several.toml"
    text = PAGE.replace('task = "toy/masked"\ntier = "behavior"', f'overview = "{name}"')
    assert text != PAGE
    file.write_text(text + '\n[[datasets]]\ntasks = ["toy/chain"]\ntiers = ["behavior"]\n')
    with pytest.raises(
        ConfigError, match=r"several\.toml: overview: expected the name of a page beside this file"
    ):
        read_results(file)


def test_a_page_does_not_take_its_files_place(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(PAGE)
    with pytest.raises(
        ConfigError, match=r"page\.md: its page would take its place: name the file page\.toml"
    ):
        read_results(tmp_path / "page.md")


def test_a_page_records_its_own_dataset(tmp_path: Path) -> None:
    page = tmp_path / "page.toml"
    page.write_text(PAGE.replace("steps = 10", 'steps = 10\ndatasets = ["a.hdf5"]'))
    with pytest.raises(ConfigError, match=r"runs\[1\]: datasets"):
        write_results(page, tmp_path / "results", 1)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("[runs.grid.bc]\nhidden", "[runs.grid.bc]\nhiden"),
            r"bc-hiden=8.seed0: unknown setting .*'hidden'",
        ),
        (('["cql"]', '["cqll"]'), r"cqll.seed0: unknown algorithm 'cqll': did you mean 'cql'"),
        (("seeds = [0, 1]", "seeds = [0, -1]"), r"seed-1: seed: expected 0 to"),
        (('tier = "behavior"', 'tier = "expert"'), "unknown tier of toy/masked 'expert'"),
        (('"toy/masked"', '"toy/maskd"'), "unknown task 'toy/maskd': did you mean 'toy/masked'"),
    ],
)
def test_a_page_is_checked_whole_before_anything_is_recorded(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    page = tmp_path / "page.toml"
    assert change[0] in PAGE
    page.write_text(PAGE.replace(*change))
    with pytest.raises(OmcdaError, match=message):
        write_results(page, tmp_path / "results", 1)
    assert not (tmp_path / "results").exists()
