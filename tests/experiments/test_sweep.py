"""Sweeps: the runs of a file, and the treatment of finished, killed and failing ones."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import IO, Any

import pytest

from omcda_deploy import cli
from omcda_deploy.datasets.formats.omiga_hdf5 import read
from omcda_deploy.errors import ConfigError, OmcdaError
from omcda_deploy.experiments.sweep import Job, Sweep, jobs_of, read_sweep, run_job, run_queue
from omcda_deploy.files import cache_folder
from omcda_deploy.registry import team_spec
from omcda_deploy.training.behavior_model import BehaviorConfig, fit
from omcda_deploy.training.checkpoint import save_state
from tests.support.synthetic import write_dataset

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
    """A sweep file with its datasets, which are only looked for and never read."""
    for name in ("a.hdf5", "b.hdf5"):
        (tmp_path / name).touch()
    path = tmp_path / "sweep.toml"
    path.write_text(FILE.format(data=tmp_path))
    return path


def finish(job: Job) -> None:
    (job.run / "policies").mkdir(parents=True)
    (job.run / "policies" / f"step-{job.steps:08d}.pt").touch()


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
    assert {(job.steps, job.snapshot_every) for job in jobs} == {(20, 5000)}
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
    ("[grid.omcda]", "[grid.omiga]", r"unknown algorithm of \[grid\] 'omiga'"),
    ("[grid.omcda]", "[grid]", r"grid|algorithm of \[grid\]"),
    ("d_tot = [0.3, 1.2]", "d_tot = 0.3", r"grid\.omcda\.d_tot: expected a list of values .*, got 0\.3"),
    ("d_tot = [0.3, 1.2]", "d_tott = [0.3]", "unknown setting of omcda 'd_tott': did you mean 'd_tot'"),
    ("d_tot = [0.3, 1.2]", "d_tot = [-1.0]", r"omcda\.d_tot: expected .*, got -1\.0"),
    ("d_tot = [0.3, 1.2]", 'd_tot = ["much"]', r"omcda\.d_tot: expected float, got 'much'"),
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
        jobs_of(read_sweep(file), tmp_path / "out")
    assert "\n" not in str(raised.value).replace(text, "")
    assert not (tmp_path / "out").exists()


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

    def run(job: Job) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1
            ended.append(job)

    assert run_queue(jobs, 2, run) == []
    assert most == 2
    assert len(ended) == len(set(ended)) == 20


Answer = Callable[[list[str]], int]


def answered(monkeypatch: pytest.MonkeyPatch, answer: Answer) -> list[list[str]]:
    """Let ``answer`` stand for the training processes; returns their commands."""
    commands: list[list[str]] = []

    def run(command: list[str], *, stdout: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        assert options["env"]["OMP_NUM_THREADS"] == "1"
        stdout.write("a line\nthe last line\n")
        return subprocess.CompletedProcess(command, answer(command))

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_a_failing_run_is_reported_while_others_go_on(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command ends with status 2, runs only what is left when called again, and then ends with 0."""
    broken = True

    def train(command: list[str]) -> int:
        out = Path(command[command.index("--out") + 1])
        if broken and out.name == "seed3" and "bc" in command and "/a/" in str(out):
            return 1
        finish(Job(Path(), "", (), 0, 20, 0, out))
        return 0

    commands = answered(monkeypatch, train)
    monkeypatch.setattr(
        sys, "argv", ["omcda-deploy", "sweep", str(file), "--out", str(tmp_path / "out"), "--jobs", "2"]
    )
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert len(commands) == 20
    jobs = jobs_of(read_sweep(file), tmp_path / "out")
    [unfinished] = [job for job in jobs if not job.finished]
    assert (unfinished.algorithm, unfinished.seed) == ("bc", 3)
    printed = capsys.readouterr().err
    assert "1 of 20 runs failed" in printed.splitlines()[-1]
    assert f"{unfinished.run} stopped with status 1: the last line" in printed.splitlines()[-1]
    assert unfinished.run.with_name("seed3.log").read_text() == "a line\nthe last line\n"

    broken = False
    commands.clear()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert len(commands) == 1
    assert all(job.finished for job in jobs)


def test_a_run_is_trained_with_what_its_job_says(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = answered(monkeypatch, lambda command: 0)
    job = jobs_of(read_sweep(file), tmp_path / "out")[-1]
    run_job(job)
    [command] = commands
    assert command[:3] == [sys.executable, "-m", "omcda_deploy.cli"]
    assert " ".join(command[3:]) == (
        f"train {tmp_path}/b.hdf5 --algo omcda --seed 3 --steps 20 --snapshot-every 5000 --out {job.run} "
        "--set d_tot=1.2 --set allocation=uniform"
    )


def test_results_hold_sweeps_to_the_same_rules(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="seeds: expected a list"):
        Sweep(["a.hdf5"], ["bc"], [], 100)


# -- killed -----------------------------------------------------------------------------------------------------


def run_command(words: list[str], environment: Mapping[str, str], log: Path) -> None:
    """Run the command line as ``python -m omcda_deploy.cli`` does; for a process of its own."""
    os.environ.update(environment)
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
    _clone(path)
    job = Job(path, "bc", (("hidden", 8), ("batch_size", 8)), 0, 300, 300, tmp_path / "out" / "seed0")
    commands: list[list[str]] = []
    kills = True

    def run(
        command: list[str], *, stdout: IO[str], env: Mapping[str, str], **options: Any
    ) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        assert command[:3] == [sys.executable, "-m", "omcda_deploy.cli"]
        process = forking.Process(target=run_command, args=(command[3:], dict(env), Path(stdout.name)))
        process.start()
        while kills and not job.run.exists():
            assert process.exitcode is None, Path(stdout.name).read_text()
            time.sleep(0.002)
        if kills:
            process.kill()
        process.join()
        assert process.exitcode is not None
        return subprocess.CompletedProcess(command, process.exitcode)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(OmcdaError, match="seed0 stopped with status -9"):
        run_job(job)
    assert not job.finished
    begun = (job.run / "config.json").stat().st_mtime_ns

    kills = False
    run_job(job)
    assert job.finished
    assert commands[1][3:] == ["train", "--resume", str(job.run)]
    assert (job.run / "config.json").stat().st_mtime_ns == begun

    run_job(job)
    assert len(commands) == 2

    with pytest.raises(ConfigError, match="is a run of 300 steps, expected 400: sweep into another --out"):
        run_job(replace(job, steps=400))
    assert len(commands) == 2


def _clone(path: Path) -> None:
    """Put a behaviour model of one step where training will look for that of its 10,000."""
    dataset = read(path)
    model, report = fit(dataset, BehaviorConfig(steps=1, hidden=8))
    place = cache_folder() / "behavior" / f"{BehaviorConfig(hidden=8).key(dataset)}.pt"
    place.parent.mkdir(parents=True)
    save_state(place, {"model": model.state_dict(), "report": report})
