"""``demo``: the whole pipeline on MuJoCo, with the commands a user would type.

Collect a dataset from shipped behaviour policies, train BC and OMCDA on it, export both, serve each with one
process per agent, and evaluate over gRPC at several temperatures of play. Task, data and settings are those of the
team that comes with the package (docs/results/demo.md); with ``--quick`` they are of a task that needs fewer steps.
"""

from __future__ import annotations

import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from omcda_deploy.commands import claimed_folder, print_table, print_text
from omcda_deploy.commands.progress import play_temperatures
from omcda_deploy.commands.stopping import when_stopped
from omcda_deploy.errors import ConfigError, EndpointError
from omcda_deploy.processes import child_environment, run_child

if TYPE_CHECKING:
    from omcda_deploy.client.remote import RemoteTeam
    from omcda_deploy.report.evaluation import Entry

EPISODES = 20


@dataclass(frozen=True)
class Scale:
    """A dataset, sizes and settings; the commands are the same for all."""

    task: str
    tier: str
    transitions: int
    behavior_steps: int
    steps: int
    temperatures: tuple[float, ...]  # of play
    settings: Mapping[str, Mapping[str, object]]  # by algorithm


FULL = Scale(
    "mamujoco/hopper-3x1",
    "medium-expert",
    transitions=200_000,
    behavior_steps=10_000,
    steps=20_000,
    temperatures=(0.0, 0.25, 0.5, 0.75, 1.0),
    settings={"bc": {"hidden": 64}, "omcda": {"hidden": 64, "d_tot": 0.1}},
)
# Here a thousand steps are enough for more than the recorded return; on the data above they are not.
QUICK = Scale(
    "mamujoco/halfcheetah-6x1",
    "medium",
    transitions=40_000,
    behavior_steps=1000,
    steps=1000,
    temperatures=(0.0, 1.0),
    settings={"bc": {"hidden": 64}, "omcda": {"hidden": 64, "d_tot": 0.03}},
)
WHAT_IS_SEEN = """\
The first rows are the recorded episodes and the policies that recorded them, with and without their noise. BC
imitates them. OMCDA may depart from them by {budget} nats per step, which its agents share by influence on the
return. T scales the noise of the actions: 1 samples, as was recorded, 0 has none."""


@when_stopped()
def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for all of the demo's files; an earlier demo's is replaced.")
    ] = Path("demo"),
    quick: Annotated[
        bool,
        typer.Option("--quick", help="The same commands on another task, in about a minute of CPU time."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of recording, training and playing.")] = 0,
) -> None:
    """Collect, train BC and OMCDA, export, serve every agent, evaluate over gRPC, and report."""
    with claimed_folder(out):
        _demo(out, QUICK if quick else FULL, seed)


def _demo(out: Path, scale: Scale, seed: int) -> None:
    from omcda_deploy.local import LocalTeam
    from omcda_deploy.play.shipped import behavior_policies
    from omcda_deploy.registry import read_dataset
    from omcda_deploy.report.evaluation import comparison_section, comparison_table, evaluation_section
    from omcda_deploy.report.html import write_report
    from omcda_deploy.report.verdict import verdict

    started = time.monotonic()
    _make_empty(out)
    task, tier, dataset = scale.task, scale.tier, out / "dataset.hdf5"
    _command(
        *("collect", task, "--tier", tier, "--transitions", scale.transitions, "--seed", seed),
        *("--out", dataset),
    )
    for name, settings in scale.settings.items():
        run, bundle = out / f"{name}-run", out / f"{name}-bundle"
        _command(
            *("train", dataset, "--algo", name, "--steps", scale.steps, "--seed", seed),
            *("--behavior-steps", scale.behavior_steps, "--out", run),
            *(word for setting, value in settings.items() for word in ("--set", f"{setting}={value}")),
        )
        _command("export", run, "--out", bundle)

    recording = read_dataset(dataset)
    episodes = {"episodes": EPISODES, "num_envs": EPISODES, "seed": seed}
    rows = {}
    for recorded in behavior_policies(task, tier):
        team = LocalTeam(recorded.bundle)
        label = f"{recorded.label} policy, {team.bundle.manifest['training']['ppo_steps']:,} steps of PPO"
        rows[label] = play_temperatures(team, task, (0.0, 1.0), label, **episodes)
    for name in scale.settings:
        label = f"{name.upper()}, served"
        with _served(out / f"{name}-bundle") as served:
            rows[label] = play_temperatures(served, task, scale.temperatures, label, **episodes)
    comparison: dict[str, Entry] = {f"recorded data, {tier}": recording.episode_returns, **rows}
    title = f"{task}, {EPISODES} episodes at temperature T, {scale.steps} training steps"
    print_table(comparison_table(comparison, title))
    words = verdict(rows["OMCDA, served"], rows["BC, served"], names=("OMCDA", "BC"))
    seen = WHAT_IS_SEEN.format(budget=scale.settings["omcda"]["d_tot"])
    print_text(
        "\n".join((seen, *words, "This is one seed. docs/results/demo.md has three of the full demo."))
    )
    report = out / "report.html"
    details = [(f"{name}, temperature {e.temperature:g}", e) for name, row in rows.items() for e in row]
    sections = [comparison_section(comparison), *(evaluation_section(e, heading) for heading, e in details)]
    headline = f"{task}, dataset {tier}, digest {recording.digest[:12]}. {' '.join(words)}"
    write_report(report, "omcda-deploy demo", sections, headline)
    print_text(f"report: {report}\ndone in {time.monotonic() - started:.0f} s")
    mean = float(recording.episode_returns.mean())
    deterministic = rows["OMCDA, served"][0]
    if deterministic.mean <= mean:
        raise ConfigError(
            f"the demo failed: OMCDA returned {deterministic.mean:.1f} on average, expected more than the "
            f"dataset's {mean:.1f}"
        )


def _make_empty(out: Path) -> None:
    """Make an empty folder at ``out``.

    Replaces the folder of an earlier demo; raises :class:`ConfigError` for any other file or folder.
    """
    marker = out / ".omcda-deploy-demo"
    if out.exists():
        if not marker.exists():
            raise ConfigError(f"{out} exists and was not made by the demo: choose another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    marker.touch()


def _command(*words: object) -> None:
    """Print an omcda-deploy command and run it as a user would."""
    arguments = [str(word) for word in words]
    print_text(f"$ omcda-deploy {shlex.join(arguments)}", style="bold")
    status = run_child([sys.executable, "-m", "omcda_deploy.cli", *arguments])
    if status:
        raise SystemExit(status)  # the command has printed its error


@contextmanager
def _served(bundle: Path) -> Iterator[RemoteTeam]:
    """Serve a bundle with one process per agent, and yield a connected team."""
    from omcda_deploy.bundle import read_bundle
    from omcda_deploy.client.remote import RemoteTeam

    names = read_bundle(bundle).spec.names
    base = _free_port_range(len(names))
    words = ["serve", str(bundle), "--base-port", str(base)]
    print_text(f"$ omcda-deploy {shlex.join(words)}", style="bold")
    server = subprocess.Popen(
        [sys.executable, "-m", "omcda_deploy.cli", *words],
        stdout=subprocess.PIPE,
        text=True,
        env=child_environment(),
    )
    try:
        assert server.stdout is not None
        for _ in names:
            line = server.stdout.readline()
            if not line:
                raise EndpointError(f"the servers of {bundle} did not start: the lines above say why")
            print_text(line.rstrip())
        endpoints = [f"127.0.0.1:{base + index}" for index in range(len(names))]
        with RemoteTeam(endpoints, stream=True) as team:
            yield team
    finally:
        server.send_signal(signal.SIGTERM)
        status = server.wait(timeout=30)
    if status:
        raise EndpointError(f"the servers of {bundle} stopped with status {status}, expected 0 after SIGTERM")


def _free_port_range(count: int) -> int:
    """The first of ``count`` consecutive ports on which nothing listens."""
    from omcda_deploy.serve.options import LOOPBACK
    from omcda_deploy.serve.server import require_free

    for base in range(8500, 9500, count):
        try:
            for port in range(base, base + count):
                require_free(LOOPBACK, port)
        except EndpointError:
            continue
        return base
    raise EndpointError("no free ports between 8500 and 9500: stop what listens there")
