"""Records of pages: overviews, pages that grow on several machines, and what is no part of a page."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import pytest

from omcda_deploy.errors import ConfigError, NoSimulatorError, OmcdaError
from omcda_deploy.experiments import compare
from omcda_deploy.experiments.observer import Observer
from omcda_deploy.experiments.pages import write_results
from omcda_deploy.experiments.sweep import Job
from tests.experiments.test_pages import COMPARISON, Here, cells

SHORT = COMPARISON.partition('[[runs]]\nalgorithms = ["cql"]')[0]  # without the row that fails
CHAIN = ["toy/chain/*"]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "pages" / "comparison.toml"
    path.parent.mkdir()
    path.write_text(SHORT)
    return path


@pytest.fixture
def page(file: Path) -> Path:
    return file.with_suffix("") / "toy-chain-behavior.md"


@pytest.fixture
def record(page: Path) -> Path:
    return page.with_suffix(".json.gz")


def of(record: Path) -> dict[str, Any]:
    """A record's content."""
    values: dict[str, Any] = json.loads(gzip.decompress(record.read_bytes()))
    return values


def lasting(folder: Path) -> dict[str, str]:
    """The contents of a folder's pages and figures, without the time of writing."""
    return {
        file.name: "".join(
            line for line in file.read_text().splitlines(keepends=True) if not line.startswith("* Written: ")
        )
        for file in folder.iterdir()
        if file.suffix in (".md", ".svg")
    }


def row(name: str) -> str:
    """A file of results whose one row is OMCDA with an allocation; nothing on it is a clone."""
    head = SHORT.partition("[[runs]]")[0]
    rows = [
        f'[[runs]]\nname = "{n}"\nalgorithms = ["omcda"]\ngrid.omcda.allocation = ["{n}"]\n'
        for n in name.split()
    ]
    return "\n".join([head, *rows])


def test_an_overview_covers_pages_that_were_made_elsewhere(file: Path, tmp_path: Path) -> None:
    file.write_text(COMPARISON)
    folder, overview = file.with_suffix(""), file.with_name("README.md")
    for index, task in enumerate(("chain", "masked")):  # each with folders of its own, as on two machines
        write_results(file, tmp_path / f"out{index}", 1, engine=Here(), only=[f"toy/{task}/*"])
    assert cells(overview, "bc")[1] == "2 of 2"
    before, overall = lasting(folder), lasting(file.parent)
    records = {name: name.read_bytes() for name in folder.glob("*.json.gz")}
    assert sorted(name.name for name in records) == [
        "toy-chain-behavior.json.gz",
        "toy-masked-behavior.json.gz",
    ]
    for name in records:
        assert str(tmp_path) not in json.dumps(of(name))
        assert len(of(name)["runs"]) >= 6

    # Without any run, all is written of the records, and is the same.
    for page in (*folder.iterdir(), overview):
        if page.suffix in (".md", ".svg"):
            page.unlink()
    write_results(file, tmp_path / "out2", 1, train="none")
    assert lasting(folder) == before
    assert lasting(file.parent) == overall
    assert {name: name.read_bytes() for name in records} == records
    assert not (tmp_path / "out2").exists()


def test_pages_without_the_row_that_is_asked_for_are_not_run(file: Path, page: Path, tmp_path: Path) -> None:
    engine, overview = Here(), file.with_name("README.md")
    written = write_results(file, tmp_path, 1, engine=engine, train="new", rows=["omcda, d_tot 1.2"])
    assert written == [page.with_name("toy-masked-behavior.md"), overview]
    assert {run.parent.name for run in engine.trained} == {"omcda-hidden=8-batch_size=8-d_tot=1.2"}
    assert not (tmp_path / "toy-chain-behavior.hdf5").exists()
    assert "toy/chain/behavior: not run: none of 6 runs is finished, 0 begun." in overview.read_text()


def test_a_page_grows_by_runs_that_its_record_does_not_hold(
    file: Path, page: Path, record: Path, tmp_path: Path
) -> None:
    write_results(file, tmp_path / "whole", 1, engine=Here(), only=CHAIN)
    whole = lasting(page.parent)
    record.unlink()
    with pytest.raises(KeyboardInterrupt):
        write_results(file, tmp_path / "out0", 1, engine=Here(dies="/bc-hidden"), only=CHAIN)
    write_results(file, tmp_path / "out0", 1, only=CHAIN, train="none")
    assert "(bc, seeds 0, 1): not run" in page.read_text()
    assert cells(page, "omcda")[2] == "0, 1"

    engine = Here()
    write_results(file, tmp_path / "out1", 1, engine=engine, only=CHAIN, train="new", rows=["b?"])
    assert {run.parent.name for run in engine.trained} == {"bc-hidden=8-batch_size=8"}
    assert cells(page, "bc")[2] == "0, 1"
    assert "(w/o-CDA, seeds 0, 1): not run" in page.read_text()
    result = write_results(file, tmp_path / "out1", 1, engine=engine, only=CHAIN, train="new")
    assert result == [page, file.with_name("README.md")]
    trained = sorted({run.parent.name for run in engine.trained})
    assert trained == ["bc-hidden=8-batch_size=8", "omcda-hidden=8-batch_size=8-allocation=uniform"]
    assert lasting(page.parent) == whole

    # Nothing is new now, so that no dataset is needed, and no engine.
    def never(jobs: Sequence[Job], at_once: int, observer: Observer) -> list[tuple[Job, str]]:
        raise AssertionError("nothing is to be trained")

    write_results(file, tmp_path / "out2", 1, engine=never, only=CHAIN, train="new")
    assert lasting(page.parent) == whole
    assert not (tmp_path / "out2" / "toy-chain-behavior.hdf5").exists()

    # A row that the file no longer names stays in the record.
    file.write_text(SHORT.replace('["omcda", "bc"]', '["omcda"]'))
    write_results(file, tmp_path / "out2", 1, only=CHAIN, train="none")
    assert "| bc |" not in page.read_text()
    file.write_text(SHORT)
    write_results(file, tmp_path / "out2", 1, only=CHAIN, train="none")
    assert lasting(page.parent) == whole


def test_runs_on_other_data_are_no_part_of_a_page(file: Path, record: Path, tmp_path: Path) -> None:
    write_results(file, tmp_path / "out", 1, engine=Here(), only=CHAIN)
    (tmp_path / "other").mkdir()
    data = tmp_path / "other" / "toy-chain-behavior.hdf5"
    shutil.copy(tmp_path / "out" / data.name, data)
    with h5py.File(data, "r+") as hdf5:
        hdf5["r"][0] += 1.0
        del hdf5["omcda"].attrs["digest"]
    before = record.read_bytes()
    file.write_text(SHORT + '\n[[runs]]\nalgorithms = ["omiga"]\n')
    engine = Here()
    with pytest.raises(
        OmcdaError, match=r"json.gz is of another dataset than .*other/toy-chain.*: copy its own"
    ):
        write_results(file, tmp_path / "other", 1, engine=engine, only=CHAIN, train="new")
    assert engine.trained == []
    aside = record.rename(tmp_path / "aside")
    write_results(file, tmp_path / "other", 1, engine=engine, only=CHAIN)
    aside.rename(record)
    data.unlink()
    with pytest.raises(OmcdaError, match=r"the record is of a dataset of digest \w+…, the runs are of \w+…"):
        write_results(file, tmp_path / "other", 1, only=CHAIN, train="none")
    assert record.read_bytes() == before
    # Nor where they lie among its own, and the dataset is not there to tell.
    folders = [tmp_path / name / "toy-chain-behavior" for name in ("other", "out")]
    [method] = [folder.name for folder in folders[0].iterdir() if folder.name.startswith("bc")]
    shutil.rmtree(folders[1] / method / "seed1")
    shutil.copytree(folders[0] / method / "seed1", folders[1] / method / "seed1")
    (tmp_path / "out" / data.name).unlink()
    with pytest.raises(
        OmcdaError, match=r"a page is on one dataset: .*seed. was trained on one of digest \w+…, "
    ):
        write_results(file, tmp_path / "out", 1, only=CHAIN, train="none")
    assert record.read_bytes() == before


def test_runs_of_one_row_are_trained_in_one_way(file: Path, record: Path, tmp_path: Path) -> None:
    write_results(file, tmp_path / "out", 1, engine=Here(), only=CHAIN)
    [config] = (tmp_path / "out" / "toy-chain-behavior").glob("bc*/seed1/config.json")
    values = json.loads(config.read_text())
    values["behavior"]["lr"] = 1e-4
    config.write_text(json.dumps(values))
    record.unlink()
    message = (
        r"seed0 and \S*bc\S*/seed1 are of one row, and were trained in two ways: .*; .*behavior\.lr 0\.0001"
    )
    with pytest.raises(OmcdaError, match=message):
        write_results(file, tmp_path / "out", 1, only=CHAIN, train="none")
    assert not record.exists()


def test_a_record_counts_where_it_is_of_the_runs_that_are_asked_for(
    file: Path, record: Path, tmp_path: Path
) -> None:
    overview = file.with_name("README.md")

    def said() -> str:
        with suppress(OmcdaError):  # the page of the other dataset may have the same fault
            write_results(file, tmp_path / "none", 1, only=["toy/masked/*"], train="none")
        lines = overview.read_text().splitlines()
        return next((line for line in lines if line.startswith("* toy/chain/behavior: ")), "")

    write_results(file, tmp_path / "out", 1, engine=Here())
    assert said() == ""
    assert cells(overview, "w/o-CDA")[1] == "2 of 2"
    # A row that asks for something else now is not run; the others stand.
    file.write_text(SHORT.replace('allocation = ["uniform"]', 'allocation = ["random"]'))
    assert said() == ""
    assert cells(overview, "w/o-CDA")[1] == "0 of 2"
    assert cells(overview, "bc")[1] == "2 of 2"
    for change, named in (
        (("temperatures = [0, 1]", "temperatures = [0, 0.5, 1]"), "temperatures"),
        (("transitions = 600", "transitions = 601"), "transitions"),
    ):
        file.write_text(SHORT.replace(*change))
        assert f"toy-chain-behavior.json.gz is of runs with other {named}: move it away" in said()
    file.write_text(SHORT)
    content, values = record.read_bytes(), of(record)

    def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
        copy = json.loads(json.dumps(values))
        change(copy)
        return gzip.compress(json.dumps(copy).encode())

    def every(**entries: Any) -> bytes:
        return changed(lambda copy: [run.update(entries) for run in copy["runs"].values()])

    for damage in (
        *(content[:100], b"{}", gzip.compress(b"[1]"), gzip.compress(b'{"version": 1}')),
        changed(lambda copy: copy.update(runs=[])),
        *(every(config=None), every(config={}), every(score={}), every(curves=3)),
        changed(lambda copy: [run["config"].update(settings=None) for run in copy["runs"].values()]),
        # Episodes of another seed than the run's, as an older version played them.
        changed(lambda copy: [run["score"].update(seed=7) for run in copy["runs"].values()]),
    ):
        record.write_bytes(damage)
        assert "toy-chain-behavior.json.gz is damaged" in said()
    record.write_bytes(changed(lambda copy: copy.update(version=2)))
    assert "is a record of version 2, expected 1: install a newer omcda-deploy" in said()
    record.unlink()
    assert said() == "* toy/chain/behavior: not run: none of its runs is recorded."


def test_what_goes_wrong_on_one_machine_takes_nothing_from_a_record(
    file: Path, page: Path, record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure that another machine has made good, and runs that cannot be played here."""

    def failing(jobs: Sequence[Job], at_once: int, observer: Observer) -> list[tuple[Job, str]]:
        return [(job, "no memory") for job in jobs]

    file.write_text(row("random"))
    write_results(file, tmp_path / "a", 1, engine=Here(), only=CHAIN)
    file.write_text(row("random uniform"))
    write_results(file, tmp_path / "b", 1, engine=failing, only=CHAIN, train="new")
    assert "(uniform, seed 0): failed: no memory" in page.read_text()
    assert cells(file.with_name("README.md"), "uniform")[-1] == "2"  # failed
    assert len(of(record)["failed"]) == 2
    # What is to take other steps now has not failed.
    file.write_text(row("random uniform").replace("steps = 20", "steps = 30"))
    write_results(file, tmp_path / "d", 1, engine=Here(), only=["toy/masked/*"])
    assert cells(file.with_name("README.md"), "uniform")[-1] == "0"
    file.write_text(row("random uniform"))
    write_results(file, tmp_path / "c", 1, engine=Here(), only=CHAIN, train="new")
    assert of(record)["failed"] == {}
    whole = lasting(page.parent)
    for out in ("a", "b"):  # the failures of b are on its disk still
        write_results(file, tmp_path / out, 1, only=CHAIN, train="none")
        assert lasting(page.parent) == whole

    # One clone stands for all parts, whose page has no row of BC.
    assert len(of(record)["clone"]) == 1
    assert "repeats" not in page.read_text()
    assert cells(page, "clone")

    def unplayable(*_: Any, **__: Any) -> Any:
        raise NoSimulatorError("no simulator")

    monkeypatch.setattr(compare, "score_run", unplayable)
    monkeypatch.setattr(compare, "recorded_score", lambda *_: None)
    write_results(file, tmp_path / "c", 1, only=CHAIN, train="none")
    assert len(of(record)["runs"]) == 4
    # Without a record there is a page that says so, and an overview that counts none.
    record.unlink()
    write_results(file, tmp_path / "c", 1, only=CHAIN, train="none")
    assert "(omcda, seed 0): no simulator" in page.read_text()
    assert not record.exists()


def test_parts_that_are_made_at_the_same_time_keep_each_others_runs(
    file: Path, page: Path, record: Path, tmp_path: Path
) -> None:
    file.write_text(row("random"))
    write_results(file, tmp_path / "a", 1, engine=Here(), only=CHAIN)

    def meanwhile(jobs: Sequence[Job], at_once: int, observer: Observer) -> list[tuple[Job, str]]:
        file.write_text(row("influence"))
        write_results(file, tmp_path / "c", 1, engine=Here(), only=CHAIN, train="new")
        file.write_text(row("uniform"))
        write_results(file, tmp_path / "c", 1, engine=Here(), only=["toy/masked/*"])
        return Here()(jobs, at_once, observer)

    file.write_text(row("uniform"))
    write_results(file, tmp_path / "b", 1, engine=meanwhile, only=CHAIN, train="new")
    rows = {run.split("allocation=")[1].split("/")[0] for run in of(record)["runs"]}
    assert rows == {"random", "influence", "uniform"}
    assert (
        "toy/masked/behavior: " not in file.with_name("README.md").read_text().partition("## toy/masked")[2]
    )


def test_a_single_page_whose_record_is_of_other_runs_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "one.toml"
    single = (
        'title = "One"\ntask = "toy/chain"\ntier = "behavior"\ntransitions = 200\nepisodes = 2\n'
        'seeds = [0]\nsteps = 10\nsettings = { hidden = 8, batch_size = 8 }\n[[runs]]\nalgorithms = ["bc"]\n'
    )
    file.write_text(single)
    write_results(file, tmp_path / "out", 1, engine=Here())
    file.write_text(single.replace("steps = 10", "steps = 15"))
    with pytest.raises(ConfigError, match=r"one.md is not written: none of 1 runs is finished, 0 begun"):
        write_results(file, tmp_path / "elsewhere", 1, train="none")
