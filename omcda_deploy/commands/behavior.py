"""``behavior``: train, measure and ship the policies that datasets are recorded with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from omcda_deploy.commands import print_text
from omcda_deploy.commands.completion import task_names
from omcda_deploy.commands.progress import TerminalObserver
from omcda_deploy.commands.stopping import command, nothing, this_command, when_stopped
from omcda_deploy.errors import ConfigError

app = typer.Typer(help="Make the behaviour policies that datasets are recorded with.", no_args_is_help=True)

SHIPPED = Path("omcda_deploy/policies")


@app.command("train")
def train(
    task: Annotated[
        str, typer.Argument(help="For instance mamujoco/halfcheetah-6x1.", autocompletion=task_names)
    ],
    out: Annotated[Path, typer.Option(help="Folder for checkpoints.")],
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Seed of the weights and of the episodes.")
    ] = 0,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Environment steps over which the learning rate falls; the task's default if omitted."
        ),
    ] = None,
    until: Annotated[int | None, typer.Option(help="Stop at so many of these steps.")] = None,
    record: Annotated[
        Path | None,
        typer.Option(help="HDF5 file to write: all episodes that end during training, as a dataset."),
    ] = None,
) -> None:
    """Train behaviour policies with PPO: one joint Gaussian policy for MuJoCo, one that agents share for SMAX.

    --record keeps the replay of the training itself, up to --until.
    """
    import logging

    import torch

    from omcda_deploy.datasets.writer import require_new_file
    from omcda_deploy.experiments.tiers import train_policies

    if record is not None:
        require_new_file(record, "--record")

    logging.getLogger("omcda_deploy.training.behavior").setLevel(logging.INFO)
    torch.set_num_threads(1)
    with when_stopped(lambda: _kept(out)):
        train_policies(task, out, seed, steps, record, until, TerminalObserver())


@app.command("measure")
@when_stopped(lambda: f"the measurements so far are kept, go on with  {this_command()}")
def measure(
    run: Annotated[Path, typer.Argument(help="Folder of  omcda-deploy behavior train.")],
    first: Annotated[int, typer.Option("--from", help="First checkpoint, in steps.")] = 0,
    last: Annotated[int, typer.Option("--to", help="Last checkpoint, in steps.")] = 10**12,
    workers: Annotated[int, typer.Option(min=0, help="Processes that play, a kept policy each.")] = 2,
) -> None:
    """Play each checkpoint for 20 episodes (SMAX: 200), sampled as in recording and greedily; note its returns.

    A checkpoint that was measured before is not played again.
    """
    from omcda_deploy.experiments.tiers import measure_run

    for steps, returns in measure_run(run, first, last, workers, TerminalObserver()):
        print_text(f"{steps:>9}  {returns}")


@app.command("ship")
def ship(
    run: Annotated[Path, typer.Argument(help="Folder of  omcda-deploy behavior train, measured.")],
    out: Annotated[Path, typer.Option(help="Folder of shipped policies.")] = SHIPPED,
    checkpoints: Annotated[
        list[str] | None,
        typer.Option(
            "--tier",
            help="TIER=STEPS: ship the checkpoint of that many steps (medium-replay: up to it); repeat for each.",
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that play, a kept policy each.")] = 2,
) -> None:
    """Export the measured checkpoints whose returns are nearest to the published ones, in mean and in spread.

    medium-replay gets checkpoints evenly spread up to the one at which their mixture is nearest. SMAX has no
    published returns: there, --tier names the checkpoints for good, medium and poor.
    """
    from omcda_deploy.experiments.tiers import ship_run

    steps_by_tier = _parse_tiers(checkpoints or ())
    for tier, returns in ship_run(run, out, steps_by_tier, workers, TerminalObserver()):
        published = ""
        if tier.published is not None:
            distance = tier.published.distance(returns.sampled.moments)
            published = (
                f"; published {tier.published.mean:g} ± {tier.published.std:g}, distance {distance:.0f}"
            )
        print_text(f"{tier.folder}: {tier.steps} steps, {returns}{published}")


@app.command("index")
@when_stopped(lambda: f"the measurements so far are kept, go on with  {this_command()}")
def index(
    out: Annotated[Path, typer.Argument(help="Folder of shipped policies.")] = SHIPPED,
    measure: Annotated[
        bool, typer.Option("--measure", help="Play the policies again first, and note their returns.")
    ] = False,
    workers: Annotated[int, typer.Option(min=0, help="Processes that play, a kept policy each.")] = 2,
) -> None:
    """Write README.md of a folder of shipped policies from their manifests."""
    from omcda_deploy.experiments.tier_index import write_index
    from omcda_deploy.experiments.tiers import measure_shipped

    if not measure:
        write_index(out)
        return
    for folder, returns in measure_shipped(out, workers, TerminalObserver()):
        print_text(f"{folder}: {returns}")


def _kept(run: Path) -> str:
    """Say what is kept of a training that was stopped; it cannot go on, as PPO's own state is not."""
    from omcda_deploy.training.behavior.checkpoint import find_checkpoints

    steps = max(find_checkpoints(run), default=0)
    if not steps:
        return nothing()
    return (
        f"the checkpoints up to step {steps} are kept, play them with  {command('behavior', 'measure', run)}"
    )


def _parse_tiers(options: Sequence[str]) -> dict[str, int]:
    """Parse ``TIER=STEPS`` options to steps by tier."""
    steps_by_tier: dict[str, int] = {}
    for option in options:
        name, _, steps = option.partition("=")
        if not name or not steps.isdecimal():
            raise ConfigError(f"--tier: expected TIER=STEPS, such as medium=2500000, got {option!r}")
        if name in steps_by_tier:
            raise ConfigError(
                f"--tier: expected {name} once, got {steps_by_tier[name]} and {steps}: leave one of them out"
            )
        steps_by_tier[name] = int(steps)
    return steps_by_tier
