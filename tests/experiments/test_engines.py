"""Engines: their options, and the same runs out of each of them, through kills of workers and drivers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from omcda_deploy.errors import ConfigError, MissingExtraError, OmcdaError, UnknownNameError
from omcda_deploy.experiments import engines
from omcda_deploy.experiments.compare import compare_runs
from omcda_deploy.experiments.engines import RayEngine, SlurmEngine, make_engine, run_locally
from omcda_deploy.experiments.observer import Observer
from omcda_deploy.experiments.scores import Conditions
from omcda_deploy.experiments.sweep import Job, check_jobs, jobs_of, read_sweep
from omcda_deploy.registry import team_spec
from omcda_deploy.report.comparison_report import write_markdown
from omcda_deploy.training.checkpoint import load_state
from omcda_deploy.training.run_folder import snapshot_steps
from tests.support.behavior_cache import cache_behavior
from tests.support.processes import running, wait_for
from tests.support.synthetic import differing, write_dataset

ROOT = Path(__file__).parents[2]
TASK = "mamujoco/hopper-3x1"
needs_submitit = pytest.mark.skipif(find_spec("submitit") is None, reason="submitit is not installed")
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
REMOTE = [
    pytest.param("slurm", ("--engine-option", "cluster=local"), marks=needs_submitit, id="slurm"),
    pytest.param("ray", (), marks=needs_ray, id="ray"),
]

FILE = """
datasets = ["hopper.hdf5"]
algorithms = ["bc"]
seeds = {seeds}
steps = {steps}
snapshot_every = 100
[grid.bc]
hidden = [8]
batch_size = [8]
"""


class Witness(Observer):
    """Notes which runs ended, and how."""

    def __init__(self) -> None:
        self.ends: dict[Path, str | None] = {}

    def ended(self, run: Path, error: OmcdaError | None) -> None:
        self.ends[run] = None if error is None else str(error)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with the dataset of the sweep."""
    monkeypatch.setenv("OMCDA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    cache_behavior(write_dataset(tmp_path / "hopper.hdf5", team_spec(TASK), [40, 20] * 2))
    yield tmp_path
    for pid in running(tmp_path):  # of a test that failed
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def sweep(out: str, steps: int, runs: int = 2) -> list[Job]:
    """The jobs of the file, which is written, with relative paths."""
    Path("sweep.toml").write_text(FILE.format(steps=steps, seeds=list(range(runs))))
    return jobs_of(read_sweep(Path("sweep.toml")), Path(out))


@contextmanager
def command(out: str, *words: object) -> Iterator[subprocess.Popen[bytes]]:
    """``omcda-deploy sweep`` with the file of :func:`sweep`, in a process of its own."""
    arguments = ("sweep", Path("sweep.toml").absolute(), "--out", out, "--jobs", "2", *words)
    with subprocess.Popen([sys.executable, "-m", "omcda_deploy.cli", *map(str, arguments)]) as process:
        try:
            yield process
        finally:
            process.kill()


def table(jobs: Sequence[Job]) -> str:
    """The comparison of the runs as a page shows it, from exported bundles that were played, without the times."""
    comparison = compare_runs([job.run for job in jobs], Conditions(2, num_envs=2, temperatures=(0, 1)))
    write_markdown(comparison, Path("page.md"), "Title", "command")
    lines = Path("page.md").read_text().splitlines()
    rows = [line.rsplit("|", 2)[0] for line in lines if line.startswith("|")]
    assert len(rows) == 3 + 4  # the variant, and both its temperatures
    assert "| 200 | 0, 1, 2 |" in rows[2]
    return "\n".join(rows)


def require_same_runs(ours: Sequence[Job], theirs: Sequence[Job]) -> None:
    """Every run has the same metrics, policies and training state, to the last bit."""
    for one, other in zip(ours, theirs, strict=True):
        assert (one.run / "metrics.jsonl").read_bytes() == (other.run / "metrics.jsonl").read_bytes()
        assert snapshot_steps(one.run) == snapshot_steps(other.run) == list(range(100, one.steps + 1, 100))
        files = ["resume.pt", *(f"policies/step-{step:08d}.pt" for step in snapshot_steps(one.run))]
        for name in files:
            assert differing(load_state(one.run / name), load_state(other.run / name)) == set()


# -- by name ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "kind", "message"),
    [
        ("slrum", {}, UnknownNameError, "unknown engine 'slrum': did you mean 'slurm'"),
        (
            "local",
            {"address": "auto"},
            UnknownNameError,
            "unknown option of engine local 'address'",
        ),
        ("slurm", {"partiton": "a"}, UnknownNameError, "did you mean 'partition'"),
        ("slurm", {"timeout_min": "long"}, ConfigError, "timeout_min: expected a positive int, got 'long'"),
        ("slurm", {"mem_gb": "-1"}, ConfigError, "mem_gb: expected a positive float, got '-1'"),
        ("slurm", {"mem_gb": "nan"}, ConfigError, "mem_gb: expected a positive float, got 'nan'"),
    ],
)
def test_wrong_engines_are_refused(
    name: str, options: dict[str, str], kind: type[OmcdaError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        make_engine(name, options, Path("out"))
    assert not Path("out").exists()


@pytest.mark.parametrize(("name", "package"), [("slurm", "submitit"), ("ray", "ray")])
def test_an_engine_whose_package_is_absent_names_its_extra(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"{package} is not installed: .*omcda-deploy\[{name}\]"):
        make_engine(name, {}, Path("out"))


@needs_submitit
def test_slurm_is_refused_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"found no srun: run the sweep on a login node, or try it out with"
    ):
        make_engine("slurm", {}, Path("out"))
    with pytest.raises(ConfigError, match="cluster: expected slurm or local, got 'pbs'"):
        make_engine("slurm", {"cluster": "pbs"}, Path("out"))
    assert not Path("out").exists()


def test_the_local_engine_is_the_default_of_both_commands() -> None:
    assert make_engine("local", {}, Path("out")) is run_locally


# -- SLURM's side, without SLURM ---------------------------------------------------------------------------------

SBATCH = """#!/bin/sh
cp "$1" {folder}/script.sh
echo "Submitted batch job 7"
"""


@needs_submitit
def test_the_array_asks_slurm_for_what_the_options_say(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script of a submission, read by a stand-in for ``sbatch``; the jobs are then run by hand."""
    (folder / "bin").mkdir()
    for name, text in (
        ("sbatch", SBATCH.format(folder=folder)),
        ("srun", "#!/bin/sh\n"),
        ("sacct", "#!/bin/sh\n"),
    ):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    options = {
        "timeout_min": "90",
        "mem_gb": "2.5",
        "partition": "cpu",
        "account": "lab",
        "constraint": "avx2",
    }
    engine = make_engine("slurm", options, Path("out"))
    jobs = sweep("out", 100, 4)
    submitit: Any = engines._import_submitit()
    answers = {"7_0": None, "7_1": "diverged", "7_2": None, "7_3": None}

    def result(submission: Any) -> list[str | None]:
        if submission.job_id == "7_3":
            raise submitit.core.utils.UncompletedJobError("Job 7_3 (task: 0) died\nwith much output")
        return [answers[submission.job_id]]

    monkeypatch.setattr(submitit.slurm.slurm.SlurmJob, "done", lambda *_: True)
    monkeypatch.setattr(submitit.slurm.slurm.SlurmJob, "result", result)
    witness = Witness()
    failures = engine(jobs, 4, witness)  # so that each has a process
    lines = (folder / "script.sh").read_text().splitlines()
    for wanted in (
        *("--job-name=omcda-deploy", "--time=90", "--mem=2560MB", "--partition=cpu", "--account=lab"),
        *("--constraint=avx2", "--cpus-per-task=1", "--ntasks-per-node=1", "--array=0-3%4"),
    ):
        assert f"#SBATCH {wanted}" in lines
    assert failures[0] == (jobs[1], "diverged")
    assert failures[1][0] == jobs[3]
    assert failures[1][1].startswith(
        f"{jobs[3].run}: job 7_3 ended without a result: Job 7_3 (task: 0) died (all"
    )
    reasons = {job.run: reason for job, reason in failures}
    assert witness.ends == {job.run: reasons.get(job.run) for job in jobs}
    pickles = sorted((folder / "out" / "submitit").rglob("*_submitted.pkl"))
    assert len(pickles) == 4
    submission = submitit.core.utils.DelayedSubmission.load(pickles[0])
    (again,) = submission.args
    assert again == [jobs[0].absolute()]
    assert submission.function.checkpoint(again).args == (again,)  # what a time limit queues again


# -- the same runs ------------------------------------------------------------------------------------------------


@needs_submitit
@needs_ray
def test_all_engines_give_the_same_table(folder: Path) -> None:
    """Metrics, policies and training states are equal to the last bit, and so is the table of played bundles."""
    jobs = {name: sweep(name, 200, 3) for name in ("local", "slurm", "ray")}  # two side by side, and one
    options = {"slurm": {"cluster": "local"}}
    for name, queue in jobs.items():
        check_jobs(queue)
        witness = Witness()
        assert make_engine(name, options.get(name, {}), Path(name))(queue, 2, witness) == []
        assert witness.ends == {job.run: None for job in queue}
    for name in ("slurm", "ray"):
        require_same_runs(jobs["local"], jobs[name])
        assert table(jobs[name]) == table(jobs["local"])


@pytest.mark.parametrize(("name", "words"), REMOTE)
def test_failing_jobs_are_told_while_others_go_on(name: str, words: Sequence[str], folder: Path) -> None:
    jobs = sweep("out", 100, 3)
    broken = replace(jobs[1], settings=(("hidden", 8), ("lr", -1.0)))
    queue = [jobs[0], broken, jobs[2]]
    witness = Witness()
    engine: Any = SlurmEngine(folder / "submitit", "local") if name == "slurm" else RayEngine()
    failures = engine(queue, 2, witness)
    ((failed, reason),) = failures
    assert failed == broken
    assert "bc.lr: expected 0 to 1, got -1.0" in reason
    assert witness.ends == {jobs[0].run: None, broken.run: reason, jobs[2].run: None}
    assert [job.finished for job in queue] == [True, False, True]


@needs_ray
@pytest.mark.slow  # starts a cluster of its own: ten seconds
def test_a_running_cluster_is_used_and_left_running(folder: Path) -> None:
    """The command connects to it and ends; at another address there is none."""
    jobs = sweep("out", 100, 1)
    ray: Any = engines._import_ray()
    options = {"include_dashboard": False, "log_to_driver": False, "object_store_memory": 100 * 2**20}
    ray.init(address="local", num_cpus=1, **options)
    try:
        address = ray.get_runtime_context().gcs_address
        with command("out", "--engine", "ray", "--address", address) as process:
            wait_for(lambda: trainings(folder), 60, "no training")
            ((pid, _),) = trainings(folder).items()
            workers = [worker for worker in running(Path("ray::"), "seed0") if worker == parent_of(pid)]
            assert len(workers) == 1
            assert process.wait(60) == 0
        assert jobs[0].finished
        assert ray.cluster_resources()["CPU"] == 1
    finally:
        ray.shutdown()


# -- kills --------------------------------------------------------------------------------------------------------

ENDLESS = 10**9


def trainings(folder: Path) -> dict[int, str]:
    return running(folder, "omcda_deploy.cli train-jobs ")


def begun(jobs: Sequence[Job]) -> Callable[[], bool]:
    """Return the condition that every run has a checkpoint."""
    return lambda: all((job.run / "resume.pt").exists() for job in jobs)


def kill(pids: Sequence[int] | dict[int, str]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def parent_of(pid: int) -> int:
    listed = subprocess.run(["ps", "-o", "ppid=", "-p", str(pid)], capture_output=True, text=True, check=True)
    return int(listed.stdout)


@needs_ray
@pytest.mark.slow  # starts Ray and waits for a retry: twenty seconds
def test_ray_resumes_the_run_of_a_killed_worker(folder: Path) -> None:
    """SIGKILL of a worker: its training ends, and the task goes on elsewhere from the run's checkpoint."""
    reference, jobs = sweep("reference", 4000, 1), sweep("out", 4000, 1)
    assert run_locally(reference, 1, Observer()) == []
    with command("out", "--engine", "ray") as process:
        wait_for(begun(jobs), 120, "no checkpoint")
        ((pid, _),) = trainings(folder).items()
        kill([parent_of(pid)])
        wait_for(lambda: pid not in trainings(folder), 2, "a training without its worker")
        assert process.wait(120) == 0
    assert jobs[0].run.with_name("seed0.log").read_text().count("step 100 of") == 1  # not from the beginning
    require_same_runs(reference, jobs)


@pytest.mark.slow  # starts Ray, kills its driver and waits for its processes: twenty seconds each
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["TERM", "KILL"])
@needs_ray
def test_ray_leaves_nothing_behind_a_killed_driver(number: signal.Signals, folder: Path) -> None:
    """Called again, the sweep goes on."""
    jobs = sweep("out", ENDLESS)
    with command("out", "--engine", "ray") as process:
        wait_for(begun(jobs), 180, "no checkpoint")
        process.send_signal(number)
        process.wait(20)
        wait_for(lambda: not trainings(folder), 5, "trainings without a driver")
    begun_at = [(job.run / "config.json").stat().st_mtime_ns for job in jobs]
    with command("out", "--engine", "ray") as process:
        wait_for(lambda: len(trainings(folder)) == 2, 120, "not resumed")
        assert process.poll() is None
        process.kill()
    assert [(job.run / "config.json").stat().st_mtime_ns for job in jobs] == begun_at
    wait_for(lambda: not trainings(folder), 5, "trainings without a driver")


@needs_submitit
@pytest.mark.slow  # waits for trainings that outlive their driver
def test_jobs_of_slurm_outlive_the_driver_and_end_with_their_own_process(folder: Path) -> None:
    """A second sweep meanwhile is refused run by run; killed workers leave no training and resume later."""
    jobs = sweep("out", ENDLESS)
    words = ("--engine", "slurm", "--engine-option", "cluster=local")
    with command("out", *words) as process:
        wait_for(begun(jobs), 180, "no checkpoint")
        process.kill()
    pids = trainings(folder)
    assert len(pids) == 2
    failures = run_locally(jobs[:1], 1, Observer())
    ((_, reason),) = failures
    assert "seed0 is being trained by process" in reason
    kill([parent_of(pid) for pid in pids])
    wait_for(lambda: not trainings(folder), 2, "trainings without their submitit processes")
