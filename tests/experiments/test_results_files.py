"""Files of results whose runs were changed since, several files at once, and names that are no plain words."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import unquote

import pytest
from typer.testing import CliRunner

from omcda_deploy.cli import app
from omcda_deploy.errors import ConfigError, OmcdaError, UnknownNameError
from omcda_deploy.experiments import engines
from omcda_deploy.experiments import train as training
from omcda_deploy.experiments.observer import Observer
from omcda_deploy.experiments.pages import plan_results, write_results
from omcda_deploy.experiments.records import Played, Record
from omcda_deploy.experiments.sweep import Job
from omcda_deploy.training.run_folder import RunConfig
from tests.experiments.test_pages import cells

HEAD = 'title = "Toy"\ntransitions = 200\nepisodes = 2\ntemperatures = [0, 1]\n'
SETTINGS = "settings = { hidden = 8, batch_size = 8 }\n"
CHAIN = 'task = "toy/chain"\ntier = "behavior"\n'
SEVERAL = '[[datasets]]\ntasks = ["toy/chain"]\ntiers = ["behavior"]\n'


def runs(algorithm: str, seeds: Sequence[int] = (0,), steps: int = 20, name: str = "") -> str:
    named = f'name = "{name}"\n' if name else ""
    return (
        f'[[runs]]\n{named}algorithms = ["{algorithm}"]\nseeds = {list(seeds)}\nsteps = {steps}\n{SETTINGS}'
    )


def train(jobs: Sequence[Job], at_once: int, observer: Observer) -> list[tuple[Job, str]]:
    """An engine that trains in this process."""
    for job in jobs:
        if not job.finished:
            request = replace(job.request, behavior={"steps": 10, "check_every": 10}, log_every=5)
            training.train_runs(job.dataset, [(request, job.run)])
    return []


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of pages, as in the source tree, where the command is called."""
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(engines, "run_locally", train)
    monkeypatch.chdir(tmp_path)
    path = Path("docs", "results")
    path.mkdir(parents=True)
    return path


def test_a_run_folder_of_other_settings_stops_only_what_would_train_its_run(folder: Path) -> None:
    file, page, out = folder / "toy.toml", folder / "toy.md", Path("out")
    file.write_text(HEAD + CHAIN + runs("bc") + runs("omiga"))
    write_results(file, out, 1, engine=train)
    file.write_text(HEAD + CHAIN + runs("bc", seeds=(0, 1)) + runs("omiga", steps=30))

    refused = (
        r"omiga\S*seed0: the folder is a run of 20 steps, expected 30: choose another --out, or remove it"
    )
    before = page.read_text()
    for ways in ({"train": "all"}, {"train": "new"}, {"train": "new", "rows": ["omi*"]}):
        with pytest.raises(ConfigError, match=refused):
            write_results(file, out, 1, engine=train, **cast(Any, ways))
    assert page.read_text() == before
    assert not list(out.glob("*/bc*/seed1"))

    write_results(file, out, 1, engine=train, train="new", rows=["bc"])
    assert cells(page, "bc")[2] == "0, 1"
    assert "(omiga, seeds 0): recorded with 20 steps, the file asks for 30\n" in page.read_text()
    (folder / "toy.json.gz").unlink()
    write_results(file, out, 1, train="none")
    assert cells(page, "bc")[2] == "0, 1"
    assert "(omiga, seeds 0): its folder holds a run of 20 steps, expected 30\n" in page.read_text()
    assert "| omiga |" not in page.read_text()

    # Where no other run is left, there is no page to write.
    file.write_text(HEAD + CHAIN + runs("omiga", steps=30))
    with pytest.raises(
        ConfigError, match=r"1 begun; .*omiga.*: its folder holds a run of 20 steps, expected"
    ):
        write_results(file, out, 1, train="none")


def test_a_record_takes_on_what_was_not_known_of_a_run() -> None:
    def played(policies: str, **values: Any) -> Record:
        config = cast(RunConfig, SimpleNamespace(dataset_digest="d"))
        score = {"snapshots": [{"sha256": policies}]}
        return Record({}, {"a": Played(config, {"score": score, "curves": None, **values})})

    old = played("p", diverged=None, seconds=3.0)
    filled = old.joined(played("p", diverged=False, seconds=4.0, curves={"steps": []})).runs["a"].values
    assert (filled["diverged"], filled["curves"], filled["seconds"]) == (False, {"steps": []}, 3.0)
    kept = played("p", diverged=True, seconds=3.0).joined(played("p", diverged=None, seconds=None))
    assert (kept.runs["a"].values["diverged"], kept.runs["a"].values["seconds"]) == (True, 3.0)
    newer = old.joined(played("q", diverged=None, seconds=4.0)).runs["a"].values
    assert newer["seconds"] == 4.0


def test_all_files_are_made_and_those_without_runs_skipped(folder: Path) -> None:
    (folder / "a.toml").write_text(HEAD + CHAIN + runs("bc"))
    (folder / "b.toml").write_text(HEAD + CHAIN.replace("chain", "masked") + runs("omiga"))
    words = ["results", "--all", "--out", "out"]
    nothing = CliRunner().invoke(app, [*words, "--write-only"])
    assert "no run of docs/results/a.toml, docs/results/b.toml is finished" in str(nothing.exception)
    unknown = CliRunner().invoke(app, [*words, "--add", "--row", "cql"])
    assert isinstance(unknown.exception, UnknownNameError)
    assert not Path("out").exists()
    for more in (["--add", "--row", "bc"], ["--write-only"]):
        (folder / "a.md").unlink(missing_ok=True)
        result = CliRunner().invoke(app, [*words, *more], catch_exceptions=False)
        assert result.stdout == f"wrote {folder}/a.md\n"
        assert result.stderr.endswith("docs/results/b.toml: skipped, it has no record, and no run in out\n")
        assert (folder / "a.md").is_file()


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (HEAD.partition("\n")[2] + CHAIN + runs("bc"), r"b\.toml: expected an entry title"),
        (
            HEAD + 'overview = "a.md"\n' + runs("bc") + SEVERAL,
            r"a\.toml and .*b\.toml would both write .*a\.md",
        ),
        (HEAD + CHAIN + runs("bcq").replace("hidden", "hiden"), r"unknown setting .*'hiden'"),
    ],
)
def test_all_files_are_checked_before_one_is_made(folder: Path, second: str, message: str) -> None:
    (folder / "a.toml").write_text(HEAD + CHAIN + runs("bc"))
    (folder / "b.toml").write_text(second)
    result = CliRunner().invoke(app, ["results", "--all", "--out", "out"])
    assert isinstance(result.exception, OmcdaError)
    assert re.search(message, str(result.exception))
    assert not Path("out").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["a.toml", "b.toml"]


def test_names_with_blanks_and_brackets_work(folder: Path) -> None:
    file, row = folder / "my comp [1].toml", "bc [x] & y"
    file.write_text(HEAD + runs("bc", name=row) + SEVERAL)
    page, overview = write_results(file, Path("out"), 1, engine=train, train="new", rows=[row])
    for written in (page, overview):
        text = written.read_text()
        [command] = re.findall("Written by `(.*)`; do not edit", text)
        assert shlex.split(command) == ["omcda-deploy", "results", str(file)]
        links = re.findall(r"\]\(([\w/.%-]+)\)", text)
        assert len(links) == text.count("](") >= 2
        for link in links:
            assert link.startswith("http") or (written.parent / unquote(link)).is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('title = "Toy"', 'title = "a\\nb"'), r"toml: title: expected one line of text, got 'a\\nb'"),
        (('name = "r"', 'name = "a\\nb"'), r"runs\[0\]: name: expected one line of text, got 'a\\nb'"),
        (('says = "s"', 'says = "a\\nb"'), r"claims\[0\]: says: expected one line of text, got 'a\\nb'"),
        (
            ('on = ["toy/*"]', "on = []"),
            r"claims\[0\]: on: expected one or more datasets, got \[\]: leave it",
        ),
    ],
)
def test_what_a_page_cannot_hold_is_refused_when_the_file_is_read(
    folder: Path, change: tuple[str, str], message: str
) -> None:
    claim = '[[claims]]\nsays = "s"\nrule = "converges"\nmethod = "r"\non = ["toy/*"]\n'
    text = HEAD + runs("bc", name="r") + SEVERAL + claim
    file = folder / "toy.toml"
    file.write_text(text)
    plan_results([file], Path("out"))
    assert change[0] in text
    file.write_text(text.replace(*change))
    with pytest.raises(ConfigError, match=message):
        plan_results([file], Path("out"))
