"""Progress on stderr: bars on a terminal, plain lines now and then elsewhere, and nothing cut or broken."""

from __future__ import annotations

import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from omcda_deploy.commands import progress
from omcda_deploy.experiments.observer import Observer
from omcda_deploy.experiments.sweep import Job
from omcda_deploy.experiments.watching import steps_taken, watching
from omcda_deploy.registry import team_spec
from tests.support.bundles import write_test_bundle

HURRIED = """
import sys
from omcda_deploy.commands import progress
progress.Pace.LEAST_S = 0
progress.Pace.SHARE = 0
from omcda_deploy import cli
sys.argv = ["omcda-deploy", *sys.argv[1:]]
cli.main()
"""


class Clock:
    """A clock that stands still unless it is set."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress, "PACE", progress.Pace())
    return clock


def test_lines_come_every_ten_seconds_and_later_less_often(clock: Clock) -> None:
    due = []
    for second in range(101, 3701):
        clock.now = float(second)
        if progress.PACE.due():
            due.append(second - 100)
    assert due[:10] == [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]
    assert 20 < len(due) < 60, "an hour"
    assert all(later - earlier <= 1 + max(10, later / 10) for earlier, later in itertools.pairwise(due))


def test_a_line_says_how_far_it_is(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for part in (1, 2):
        with progress.progress_bar(f"part {part} of 2", "episodes") as report:
            report(0, 2000)
            clock.now += 6
            report(499.96, 2000)
            clock.now += 6
            report(1500.25, 2000)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "part 1 of 2: 1,500.2 of 2,000 episodes (75%, 0:00:04 left)",
        "part 2 of 2: 1,500.2 of 2,000 episodes (75%, 0:00:04 left)",
    ]


def test_work_that_was_done_before_says_nothing_of_the_time_left(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """As when most runs of a sweep are finished and the last ones go on."""
    with progress.progress_bar("training", "steps") as report:
        for done in (900, 900, 910):
            report(done, 1000)
            clock.now += 10
        report(920, 1000)
    assert capsys.readouterr().err.splitlines() == [
        "training: 900 of 1,000 steps (90%)",
        "training: 910 of 1,000 steps (91%, 0:03:00 left)",
        "training: 920 of 1,000 steps (92%, 0:02:00 left)",
    ]


def test_a_terminal_shows_a_bar_that_counts_its_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(progress, "stderr", Console(file=screen, force_terminal=True, width=100))
    monkeypatch.setattr(sys, "stderr", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    with progress.progress_bar("playing [x]", "episodes") as report:
        report(7.5, 20)
    assert "playing [x]" in screen.getvalue()
    assert "7.5 of 20 episodes" in screen.getvalue()


def test_steps_of_a_run_are_read_from_its_metrics(tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = Job(tmp_path / "d.hdf5", "bc", (), 0, 1000, None, run)
    assert steps_taken(job) == 0
    run.mkdir()
    metrics = run / "metrics.jsonl"
    long = json.dumps({"step": 300, **{f"metric/{i}": i / 7 for i in range(4000)}})
    metrics.write_text(json.dumps({"step": 200, "loss": 1.0}) + f'\n{long}\n{{"step": 400, "los')
    assert steps_taken(job) == 400
    metrics.write_text("")
    assert steps_taken(job) == 0
    (run / "policies").mkdir()
    (run / "policies" / "step-00001000.pt").touch()
    assert steps_taken(job) == 1000


def test_nothing_is_read_for_an_observer_that_does_not_want_it(tmp_path: Path) -> None:
    with watching([Job(tmp_path, "bc", (), 0, 10, None, tmp_path)], Observer()):
        pass


def test_pipes_get_lines_of_text_and_whole_output(tmp_path: Path) -> None:
    """With real processes in a narrow terminal's environment."""
    environment = {
        **os.environ,
        "COLUMNS": "40",
        "TERM": "dumb",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }

    def call(*words: object) -> tuple[str, list[str]]:
        done = subprocess.run(
            [sys.executable, "-c", HURRIED, *map(str, words)],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr.splitlines()

    task = "toy/masked"
    out, err = call(
        "collect", task, "--tier", "random", "--workers", 0, "--transitions", 3000, "--out", "d.hdf5"
    )
    assert json.loads(out)["transitions"] >= 3000
    assert len(err) > 2
    assert all(line.startswith(f"recording {task}: ") and " of 3,000 transitions (" in line for line in err)

    bundle = write_test_bundle(tmp_path / "bundle", team_spec(task)).path
    out, err = call("evaluate", task, "--bundle", bundle, "--episodes", 2, "--json", "result.json")
    assert json.loads((tmp_path / "result.json").read_text())["episodes"] == 2
    assert "…" not in out
    assert err[-1].startswith(f"playing {task}, temperature 0: 2 of 2 episodes (100%")


def test_an_encoding_that_lacks_a_sign_and_a_closed_stdout_are_no_errors(tmp_path: Path) -> None:
    bundle = write_test_bundle(tmp_path / "bundle", team_spec("toy/masked")).path
    command = [sys.executable, "-m", "omcda_deploy.cli", "evaluate", "toy/masked", "--bundle", str(bundle)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "? " in done.stdout, "plus or minus"
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, env=environment)
    assert done.stderr == ""
