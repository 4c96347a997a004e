"""Sweeps: the runs of a file, and the treatment of finished, killed and failing ones."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import IO, Any

import pytest
import typer

from omcda_deploy import cli
from omcda_deploy.cli import app
from omcda_deploy.datasets.formats.omiga_hdf5 import read
from omcda_deploy.errors import ConfigError, OmcdaError
from omcda_deploy.experiments.engines import run_locally
from omcda_deploy.experiments.fleets import fleets_of, run_fleet, train_jobs
from omcda_deploy.experiments.observer import Observer
from omcda_deploy.experiments.sweep import Job, Sweep, check_jobs, jobs_of, read_sweep
from omcda_deploy.processes import child_environment
from omcda_deploy.registry import team_spec
from omcda_deploy.training.checkpoint import load_state
from omcda_deploy.training.observer import TrainObserver
from omcda_deploy.training.run_folder import RunConfig, read_config, write_config
from tests.support.behavior_cache import cache_behavior
from tests.support.synthetic import differing, write_dataset

FILE = """
datasets = ["{data}/a.hdf5", "{data}/b.hdf5"]
algorithms = ["bc", "omcda"]
seeds = [0, 3]
steps = 20

[grid.omcda]
d_tot = [0.3, 1.2]
allocation = ["influence", "uniform"]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A sweep file with its datasets."""
    for seed, name in enumerate(("a.hdf5", "b.hdf5")):
        write_dataset(tmp_path / name, team_spec("mamujoco/hopper-3x1"), [40, 20], seed=seed)
    path = tmp_path / "sweep.toml"
    path.write_text(FILE.format(data=tmp_path))
    return path


def finish(job: Job) -> None:
    """Write the files of a finished run at which a sweep looks."""
    dataset = read(job.dataset)
    plan = job.request.resolved(dataset.spec)
    (job.run / "policies").mkdir(parents=True)
    (job.run / "policies" / f"step-{job.steps:08d}.pt").touch()
    write_config(
        job.run,
        RunConfig(
            algorithm=job.algorithm,
            settings=asdict(plan.config),
            steps=job.steps,
            seed=job.seed,
            device="cpu",
            threads=1,
            time_limit_is_terminal=False,
            log_every=100,
            checkpoint_every=1000,
            snapshot_every=job.request.kept_every,
            dataset=str(job.dataset),
            dataset_digest=dataset.digest,
            behavior={},
            team=dataset.spec.to_json(),
            versions={},
        ),
    )


# -- what a file stands for -----------------------------------------------------------------------------------


def test_a_file_is_every_combination_of_its_entries(file: Path, tmp_path: Path) -> None:
    jobs = jobs_of(read_sweep(file), tmp_path / "out")
    assert len(jobs) == len({job.run for job in jobs}) == 2 * 2 * (1 + 4)
    assert [job.seed for job in jobs] == [0] * 10 + [3] * 10  # each algorithm has its first seed early
    assert {(job.dataset.name, job.algorithm, job.settings, job.seed) for job in jobs} == {
        (dataset, algorithm, settings, seed)
        for dataset in ("a.hdf5", "b.hdf5")
        for seed in (0, 3)
        for algorithm, settings in [
            ("bc", ()),
            *(
                ("omcda", (("d_tot", d_tot), ("allocation", allocation)))
                for d_tot in (0.3, 1.2)
                for allocation in ("influence", "uniform")
            ),
        ]
    }
    assert {(job.steps, job.snapshot_every) for job in jobs} == {(20, None)}
    assert jobs[0].run == tmp_path / "out" / "a" / "bc" / "seed0"
    assert jobs[-1].run == tmp_path / "out" / "b" / "omcda-d_tot=1.2-allocation=uniform" / "seed3"


WRONG: list[tuple[str, str, str]] = [  # entry of the file, its replacement, the error
    ("seeds = [0, 3]", "seed = [0, 3]", r"unknown entry of .*sweep\.toml 'seed': did you mean 'seeds'"),
    ("seeds = [0, 3]", "", r"sweep\.toml: expected datasets, .* seeds is missing"),
    ("seeds = [0, 3]", "seeds = 5", r"sweep\.toml: seeds: expected a list such as \[0, 1, 2\], got 5"),
    ("seeds = [0, 3]", "seeds = []", "seeds: expected a list"),
    ("seeds = [0, 3]", "seeds = [true]", r"seeds: expected a list such as .*, got \[True\]"),
    ("seeds = [0, 3]", 'seeds = ["0"]', r"seeds: expected a list such as .*, got \['0'\]"),
    ("seeds = [0, 3]", "seeds = [0, 0]", r"share the folder .*seed0, .*: list nothing twice"),
    ('["bc", "omcda"]', '"bc"', "algorithms: expected a list such as .*, got 'bc'"),
    ('"bc", "omcda"', '"bc", "omcdaa", "omcda"', "unknown algorithm 'omcdaa': did you mean 'omcda'"),
    ("steps = 20", 'steps = "20"', "steps: expected a whole number from 1 on, got '20'"),
    ("steps = 20", "steps = 0", "steps: expected a whole number from 1 on, got 0"),
    ("steps = 20", "steps = 20\nsnapshot_every = 1.5", "snapshot_every: expected a whole number"),
    (
        "steps = 20",
        "steps = 20\nbehavior_steps = 0",
        "behavior_steps: expected a whole number from 1 on, got 0",
    ),
    ("steps = 20", "steps = 20\ndevice = 0", 'device: expected a name such as "cuda", got 0'),
    ("steps = 20", 'steps = 20\ndevice = "tpu"', "device: expected cpu, cuda or cuda:N, got 'tpu'"),
    ("[grid.omcda]", "[grid.omiga]", r"unknown algorithm of \[grid\] 'omiga'"),
    ("[grid.omcda]", "[grid]", r"grid|algorithm of \[grid\]"),
    ("d_tot = [0.3, 1.2]", "d_tot = 0.3", r"grid\.omcda\.d_tot: expected a list of values .*, got 0\.3"),
    ("d_tot = [0.3, 1.2]", "d_tott = [0.3]", "unknown setting of omcda 'd_tott': did you mean 'd_tot'"),
    ("d_tot = [0.3, 1.2]", "d_tot = [-1.0]", r"omcda\.d_tot: expected .*, got -1\.0"),
    ("d_tot = [0.3, 1.2]", 'd_tot = ["much"]', r"omcda\.d_tot: expected float, got 'much'"),
    ("d_tot = [0.3, 1.2]", "d_tot = [0.3, true]", r"omcda\.d_tot: expected float, got True"),
    ("steps = 20", "steps = 20\nsettings = { hidden = true }", r"bc\.hidden: expected int, got True"),
    (
        "d_tot = [0.3, 1.2]",
        'd_tot = ["auto"]\nprice = ["gradient"]',
        r"the choice of d_tot tries 0\.6 nats: omcda\.d_eval: expected at least d_tot .*: set price=solved",
    ),
    ("steps = 20", "steps = true", "steps: expected a whole number from 1 on, got True"),
    ("/a.hdf5", "/none.hdf5", r"none\.hdf5 does not exist: record it with"),
    ("/b.hdf5", "/deeper/a.hdf5", r"share the folder .*/a/bc/seed0, of .*/a\.hdf5 and .*/deeper/a\.hdf5"),
    ("steps = 20", "steps = ", "is not TOML"),
]


@pytest.mark.parametrize(("right", "wrong", "message"), WRONG)
def test_a_wrong_file_is_refused(file: Path, tmp_path: Path, right: str, wrong: str, message: str) -> None:
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "a.hdf5").touch()
    text = file.read_text()
    assert right in text
    file.write_text(text.replace(right, wrong))
    with pytest.raises(OmcdaError, match=message) as raised:
        check_jobs(jobs_of(read_sweep(file), tmp_path / "out"))
    assert "\n" not in str(raised.value).replace(text, "")
    assert not (tmp_path / "out").exists()


def test_a_dataset_that_an_algorithm_cannot_take_is_refused(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from omcda_deploy.training.algorithms import omcda

    jobs = jobs_of(read_sweep(file), tmp_path / "out")
    monkeypatch.setattr(omcda, "ACTIONS", frozenset({"discrete"}))
    first = next(job for job in jobs if job.algorithm == "omcda")
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(first.run))}: omcda handles discrete actions, "):
        check_jobs(jobs)
    (tmp_path / "b.hdf5").write_bytes(b"no HDF5")
    with pytest.raises(ConfigError, match=r"out/b/bc/seed0: .*b\.hdf5"):
        check_jobs([job for job in jobs if job.algorithm == "bc"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "bcq"}, "a run of algorithm bcq, expected omcda"),
        ({"steps": 30}, "a run of 30 steps, expected 20"),
        ({"seed": 7}, "a run of seed 7, expected 0"),
        ({"time_limit_is_terminal": True}, "a run of time_limit_is_terminal True, expected False"),
        ({"dataset_digest": "0" * 64}, "a run of dataset digest 000000000000…, expected [0-9a-f]{12}…"),
        ({"settings": {"d_tot": 0.7}}, r"a run of d_tot 0\.7, expected 0\.3"),
        ({"device": "cuda"}, "a run of device cuda, expected cpu"),
    ],
)
def test_a_folder_of_another_request_is_refused(
    file: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Finished or not; a run is not compared in what its results do not depend on."""
    jobs = jobs_of(read_sweep(file), tmp_path / "out")
    job = next(job for job in jobs if job.algorithm == "omcda")
    finish(job)
    config = read_config(job.run)
    write_config(job.run, replace(config, log_every=50, checkpoint_every=50, dataset="elsewhere.hdf5"))
    check_jobs(jobs)
    settings = {**config.settings, **changes.pop("settings", {})}
    write_config(job.run, replace(config, **changes, settings=settings))
    expected = rf"^{re.escape(str(job.run))}: the folder is {message}: choose another --out, or remove it"
    with pytest.raises(ConfigError, match=expected):
        check_jobs(jobs)


def test_an_interval_of_policies_counts_where_the_file_states_it(file: Path, tmp_path: Path) -> None:
    """Runs of an earlier version kept policies at another interval: they are finished all the same."""
    job = jobs_of(read_sweep(file), tmp_path / "out")[0]
    finish(job)
    write_config(job.run, replace(read_config(job.run), snapshot_every=300))
    check_jobs([job])
    with pytest.raises(ConfigError, match="a run of snapshot_every 300, expected 500"):
        check_jobs([replace(job, snapshot_every=500)])


def test_steps_of_cloning_count_where_the_file_states_them(file: Path, tmp_path: Path) -> None:
    job = jobs_of(read_sweep(file), tmp_path / "out")[0]
    finish(job)
    write_config(job.run, replace(read_config(job.run), behavior={"steps": 5}))
    check_jobs([job])
    check_jobs([replace(job, behavior_steps=5)])
    with pytest.raises(ConfigError, match="a run of behavior_steps 5, expected 50"):
        check_jobs([replace(job, behavior_steps=50)])


def test_two_runs_that_differ_in_words_alone_are_refused(file: Path, tmp_path: Path) -> None:
    job = next(job for job in jobs_of(read_sweep(file), tmp_path / "out") if job.algorithm == "omcda")
    same = replace(job, settings=(*job.settings, ("lr", 5e-4)), run=tmp_path / "same")
    with pytest.raises(
        ConfigError, match=rf"^{same.run}: {re.escape(str(job.run))} is the same run, as settings"
    ):
        check_jobs([job, same])
    check_jobs([job, replace(same, settings=(*job.settings, ("lr", 4e-4)))])


def test_a_run_that_is_older_than_a_setting_has_its_default(file: Path, tmp_path: Path) -> None:
    job = jobs_of(read_sweep(file), tmp_path / "out")[1]
    finish(job)
    config = read_config(job.run)
    fewer = {name: value for name, value in config.settings.items() if name != "alpha0"}
    assert len(fewer) == len(config.settings) - 1
    write_config(job.run, replace(config, settings=fewer))
    check_jobs([job])


def test_a_folder_that_is_no_run_is_refused(file: Path, tmp_path: Path) -> None:
    job = jobs_of(read_sweep(file), tmp_path / "out")[0]
    job.run.mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"seed0: .*seed0 is not a run folder: it has no config\.json"):
        check_jobs([job])


def test_datasets_that_are_yet_to_be_recorded_are_checked_with_their_team(tmp_path: Path) -> None:
    sweep = Sweep([str(tmp_path / "new.hdf5")], ["omar"], [0], 10, grid={"omar": {"elites": [30]}})
    jobs = jobs_of(sweep, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"new\.hdf5 does not exist: record it"):
        check_jobs(jobs)
    with pytest.raises(ConfigError, match=r"omar-elites=30/seed0: omar\.elites: expected 2 to 20, got 30"):
        check_jobs(jobs, {tmp_path / "new.hdf5": team_spec("mamujoco/hopper-3x1")})


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist: expected a sweep file"):
        read_sweep(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not TOML"):
        read_sweep(tmp_path / "bytes.toml")


# -- the queue ------------------------------------------------------------------------------------------------


def test_every_job_runs_once_and_no_more_together_than_asked(file: Path, tmp_path: Path) -> None:
    jobs = jobs_of(read_sweep(file), tmp_path / "out")
    lock, running, most = threading.Lock(), 0, 0
    ended: list[Job] = []

    def run(fleet: Sequence[Job]) -> list[str | None]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
            ended.extend(fleet)
        return [None] * len(fleet)

    assert run_locally(jobs, 2, Observer(), run) == []
    assert most == 2
    assert len(ended) == len(set(ended)) == 20


def test_runs_that_fit_share_a_process_and_no_process_is_idle(tmp_path: Path) -> None:
    """Those that differ in their seed and in settings that change no shape."""
    for name in ("a.hdf5", "b.hdf5"):
        write_dataset(tmp_path / name, team_spec("mamujoco/hopper-3x1"), [40, 20])
    grid: dict[str, dict[str, list[Any]]] = {
        "omcda": {"d_tot": [0.3, 1.2], "hidden": [8, 16], "allocation": ["uniform", "random"]}
    }
    datasets = [str(tmp_path / name) for name in ("a.hdf5", "b.hdf5")]
    jobs = jobs_of(Sweep(datasets, ["bc", "omcda"], list(range(7)), 20, grid=grid), tmp_path)
    assert len(jobs) == 2 * 7 * (1 + 8)

    def sizes(at_once: int) -> list[int]:
        return sorted(map(len, fleets_of(jobs, at_once)), reverse=True)

    # Of 7 runs of bc and two times 28 of omcda on each dataset.
    assert sizes(1) == [5] * 16 + [4] * 10 + [3] * 2
    assert max(sizes(60)) == 3
    assert sizes(1000) == [1] * len(jobs)
    for at_once in (1, 60):
        fleets = fleets_of(jobs, at_once)
        assert sorted(job.run for fleet in fleets for job in fleet) == sorted(job.run for job in jobs)
        for fleet in fleets:
            fixed = {(j.dataset, j.algorithm, j.steps, dict(j.settings).get("hidden")) for j in fleet}
            assert len(fixed) == 1
    assert len({job.settings for fleet in fleets_of(jobs, 1) if len(fleet) == 5 for job in fleet}) > 1
    finish(jobs[0])
    assert jobs[0] not in [job for fleet in fleets_of(jobs, 1) for job in fleet]


Answer = Callable[[list[str]], int]


def answered(monkeypatch: pytest.MonkeyPatch, answer: Answer) -> list[list[str]]:
    """Let ``answer`` stand for the training processes; returns their commands."""
    commands: list[list[str]] = []

    def run(command: list[str], output: Any, **changes: str) -> int:
        commands.append(command)
        assert changes == {"OMP_NUM_THREADS": "1"}
        output.write("a line\nthe last line\n")
        return answer(command)

    monkeypatch.setattr("omcda_deploy.experiments.fleets.run_child", run)
    return commands


def jobs_in(command: list[str]) -> list[Job]:
    """The jobs of a training process."""
    assert command[:4] == [sys.executable, "-m", "omcda_deploy.cli", "train-jobs"]
    return [Job.from_json(values) for values in json.loads(command[4])]


def test_a_failing_run_is_reported_while_others_go_on(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command ends with status 2, runs only what is left when called again, and then ends with 0."""
    broken = True
    jobs = jobs_of(read_sweep(file), tmp_path / "out")

    def train(command: list[str]) -> int:
        status = 0
        for job in jobs_in(command):
            assert job in jobs
            if broken and job.seed == 3 and job.algorithm == "bc" and "/a/" in str(job.run):
                status = 1
            else:
                finish(job)
        return status

    commands = answered(monkeypatch, train)
    monkeypatch.setattr(
        sys, "argv", ["omcda-deploy", "sweep", str(file), "--out", str(tmp_path / "out"), "--jobs", "2"]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert sorted(len(jobs_in(command)) for command in commands) == [2, 2, 4, 4, 4, 4]
    [unfinished] = [job for job in jobs if not job.finished]
    assert (unfinished.algorithm, unfinished.seed) == ("bc", 3)
    printed = capsys.readouterr().err
    assert "1 of 20 runs failed" in printed.splitlines()[-1]
    assert f"{unfinished.run} stopped with status 1: the last line" in printed.splitlines()[-1]
    assert unfinished.run.with_name("seed0-3.log").read_text() == "a line\nthe last line\n"

    broken = False
    commands.clear()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert len(commands) == 1
    assert all(job.finished for job in jobs)


def test_a_process_is_told_its_jobs(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = answered(monkeypatch, lambda command: 0)
    every = jobs_of(read_sweep(file), tmp_path / "out")
    one_row, rows = [every[k] for k in (9, 19)], [every[k] for k in (6, 7, 16)]
    for jobs, log in (
        (one_row, "omcda-d_tot=1.2-allocation=uniform/seed0-3"),
        (rows, f"{rows[0].run.parent.name}/seed0+2"),
    ):
        assert run_fleet(jobs) == [None] * len(jobs)
        assert jobs_in(commands[-1]) == jobs
        assert (tmp_path / "out" / "b" / f"{log}.log").read_text() == "a line\nthe last line\n"


def test_what_a_file_states_is_trained_with(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = answered(monkeypatch, lambda command: 0)
    more = 'snapshot_every = 10\nbehavior_steps = 7\ndevice = "cuda:1"'
    file.write_text(file.read_text().replace("steps = 20", f"steps = 20\n{more}"))
    run_fleet(jobs_of(read_sweep(file), tmp_path / "out")[:1])
    [job] = jobs_in(commands[0])
    request = job.request
    assert (request.kept_every, request.behavior, request.device) == (10, {"steps": 7}, "cuda:1")


def test_every_entry_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs/sweeps.md").read_text()
    help_text = " ".join((typer.main.get_command(app).commands["sweep"].help or "").split())  # type: ignore[attr-defined]
    for entry in (field.name for field in fields(Sweep)):
        assert ("`[grid.ALGORITHM]`" if entry == "grid" else f"`{entry}`") in page, entry
        assert re.search(rf"\b{entry}\b", help_text), entry


def test_settings_of_all_algorithms_stand_below_a_grids(tmp_path: Path) -> None:
    grid: dict[str, dict[str, list[Any]]] = {"omcda": {"d_tot": [1.2], "hidden": [16]}}
    sweep = Sweep(["a.hdf5"], ["bc", "omcda"], [0], 100, settings={"hidden": 8, "lr": 1e-3}, grid=grid)
    assert [(job.run.parent.name, dict(job.settings)) for job in jobs_of(sweep, tmp_path)] == [
        ("bc-hidden=8-lr=0.001", {"hidden": 8, "lr": 1e-3}),
        ("omcda-hidden=16-lr=0.001-d_tot=1.2", {"hidden": 16, "lr": 1e-3, "d_tot": 1.2}),
    ]


def test_a_run_of_a_recipe_is_not_one_of_its_settings(file: Path, tmp_path: Path) -> None:
    """Only the name tells the runs apart where the paper's settings are today's defaults."""
    file.write_text(file.read_text().split("[grid")[0] + '[grid.omcda]\nrecipe = ["paper"]\n')
    job = next(job for job in jobs_of(read_sweep(file), tmp_path / "out") if job.algorithm == "omcda")
    assert job.run.parent.name == "omcda-recipe=paper"
    check_jobs([job])
    finish(job)
    with pytest.raises(ConfigError, match=r"the folder is a run of recipe none, expected paper"):
        check_jobs([job])


def test_results_hold_sweeps_to_the_same_rules(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="seeds: expected a list"):
        Sweep(["a.hdf5"], ["bc"], [], 100)


# -- rows side by side ------------------------------------------------------------------------------------------

SMALL = {"hidden": [8], "batch_size": [8], "mixer_hidden": [4], "reallocate_every": [5]}


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[Job]]:
    """The jobs of two rows and two seeds, in a folder of the given name."""
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path / "cache"))
    path = write_dataset(tmp_path / "hopper.hdf5", team_spec("mamujoco/hopper-3x1"), [40, 20] * 2)
    cache_behavior(path)
    grid: dict[str, dict[str, list[Any]]] = {"omcda": {**SMALL, "d_tot": [0.01, 0.3]}}
    sweep = Sweep([str(path)], ["omcda"], [0, 1], 200, 100, grid=grid)
    return lambda out: jobs_of(sweep, tmp_path / out)


def require_same_runs(ours: Sequence[Job], theirs: Sequence[Job]) -> None:
    """Every run has the same metrics, policies and training state, to the last bit."""
    for one, other in zip(ours, theirs, strict=True):
        assert one.finished
        assert (one.run / "metrics.jsonl").read_bytes() == (other.run / "metrics.jsonl").read_bytes()
        for name in ("resume.pt", "policies/step-00000100.pt", "policies/step-00000200.pt"):
            assert differing(load_state(one.run / name), load_state(other.run / name)) == set()
    states = [load_state(job.run / "resume.pt") for job in ours]
    assert all(differing(states[0], state) for state in states[1:])


def test_runs_of_several_rows_have_the_bits_of_each_alone(
    forking: ForkServerContext, rows: Callable[[str], list[Job]], monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], output: IO[str], **changes: str) -> int:
        commands.append(command)
        environment = child_environment(**changes)
        process = forking.Process(target=run_command, args=(command[3:], environment, Path(output.name)))
        process.start()
        process.join()
        return process.exitcode or 0

    together, alone = rows("together"), rows("alone")
    with monkeypatch.context() as patch:
        patch.setattr("omcda_deploy.experiments.fleets.run_child", run)
        assert run_locally(together, 1, Observer()) == []
    assert [jobs_in(command) for command in commands] == [together]
    for job in alone:
        train_jobs([job])
    require_same_runs(together, alone)


class StoppedError(Exception):
    pass


class Stopper(TrainObserver):
    def logged(self, step: int, metrics: Mapping[str, float]) -> None:
        raise StoppedError


def test_begun_and_new_runs_are_trained_in_one_call(rows: Callable[[str], list[Job]]) -> None:
    """One of those that were begun is of a version without one of the settings."""
    jobs, alone = rows("out"), rows("alone")
    with pytest.raises(StoppedError):
        train_jobs(jobs[:2], Stopper())
    config = read_config(jobs[0].run)
    fewer = {name: value for name, value in config.settings.items() if name != "alpha0"}
    write_config(jobs[0].run, replace(config, settings=fewer))
    begun = [(job.run / "config.json").stat().st_mtime_ns for job in jobs[:2]]
    train_jobs(jobs)
    assert [(job.run / "config.json").stat().st_mtime_ns for job in jobs[:2]] == begun
    train_jobs(alone)
    require_same_runs(jobs, alone)


def test_a_run_that_cannot_go_on_spares_the_new_ones(rows: Callable[[str], list[Job]]) -> None:
    jobs = rows("out")
    with pytest.raises(StoppedError):
        train_jobs(jobs[:1], Stopper())
    write_config(jobs[0].run, replace(read_config(jobs[0].run), dataset_digest="0" * 64))
    with pytest.raises(OmcdaError, match=rf"^{jobs[0].run} was trained on a dataset of digest 000000000000…"):
        train_jobs(jobs)
    assert [job.finished for job in jobs] == [False, True, True, True]


# -- killed -----------------------------------------------------------------------------------------------------


def run_command(words: list[str], environment: Mapping[str, str], log: Path) -> None:
    """Run the command line as ``python -m omcda_deploy.cli`` does; for a process of its own."""
    os.environ.update(environment)
    os.environ["OMCDA_PARENT"] = str(os.getppid())  # the fork server, not the process that asked it
    with log.open("a") as output:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(output.fileno(), stream.fileno())
    sys.argv = ["omcda-deploy", *words]
    cli.main()


def test_a_killed_run_is_taken_up_again(
    forking: ForkServerContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real run, SIGKILLed once it has a folder, goes on in that folder; finished, it is left alone."""
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path / "cache"))
    path = write_dataset(tmp_path / "hopper.hdf5", team_spec("mamujoco/hopper-3x1"), [40, 20] * 2)
    cache_behavior(path)
    job = Job(path, "bc", (("hidden", 8), ("batch_size", 8)), 0, 300, 300, tmp_path / "out" / "seed0")
    commands: list[list[str]] = []
    kills = True

    def run(command: list[str], output: IO[str], **changes: str) -> int:
        commands.append(command)
        assert command[:3] == [sys.executable, "-m", "omcda_deploy.cli"]
        log, environment = Path(output.name), child_environment(**changes)
        process = forking.Process(target=run_command, args=(command[3:], environment, log))
        process.start()
        while kills and not job.run.exists():
            assert process.exitcode is None, log.read_text()
            time.sleep(0.002)
        if kills:
            process.kill()
        process.join()
        assert process.exitcode is not None
        return process.exitcode

    monkeypatch.setattr("omcda_deploy.experiments.fleets.run_child", run)
    [reason] = run_fleet([job])
    assert re.search("seed0 stopped with status -9", str(reason))
    assert not job.finished
    begun = (job.run / "config.json").stat().st_mtime_ns

    kills = False
    assert run_fleet([job]) == [None]
    assert job.finished
    assert (job.run / "config.json").stat().st_mtime_ns == begun

    assert run_fleet([job]) == [None]
    assert len(commands) == 2

    other = replace(job, seed=1, run=job.run.with_name("seed1"))
    reasons = run_fleet([replace(job, steps=400), other])  # its neighbour is trained
    assert re.search("is a run of 300 steps, expected 400: choose another --out", str(reasons[0]))
    assert reasons[1] is None
    assert other.finished
    assert len(commands) == 3
