"""Commands ``tasks`` and ``collect``: list tasks, record datasets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from omcda_deploy.commands import (
    AsJson,
    OptionalTask,
    OwnEnvironment,
    RewardRule,
    SimulatorFactory,
    SimulatorPython,
    Temperature,
    print_json,
    print_text,
    simulator_options,
    task_of,
    temperature_of,
)
from omcda_deploy.commands.completion import tier_names
from omcda_deploy.commands.progress import progress_bar
from omcda_deploy.commands.stopping import when_stopped
from omcda_deploy.errors import ConfigError

if TYPE_CHECKING:
    from omcda_deploy.play.collect import Source


def tasks(as_json: AsJson = False) -> None:
    """List the tasks, and the tiers of behaviour policies that datasets can be recorded with."""
    from omcda_deploy import registry
    from omcda_deploy.play.shipped import RANDOM, tiers

    if as_json:
        print_json([{"name": task, "tiers": [*tiers(task), RANDOM]} for task in registry.tasks()])
        return
    for task in registry.tasks():
        names = ", ".join(tiers(task))
        line = f"{task}  (behaviour policies: {names})" if names else task
        print_text(line)


@when_stopped()
def collect(
    out: Annotated[Path, typer.Option(help="HDF5 file to write.")],
    task: OptionalTask = None,
    env: OwnEnvironment = None,
    tier: Annotated[
        str | None,
        typer.Option(
            help="medium (default), expert, medium-replay or medium-expert; smax/…: good, medium, poor; "
            "toy/…: behavior; every task: random.",
            autocompletion=tier_names,
        ),
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Record this bundle's policy instead of a tier.")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:CALLABLE",
            help="Record a callable of your own instead, from observations by agent to actions by agent.",
        ),
    ] = None,
    transitions: Annotated[int, typer.Option(help="At least so many, in whole episodes.")] = 1_000_000,
    seed: Annotated[int, typer.Option(help="Seed of the episodes and of the actions.")] = 0,
    num_envs: Annotated[int, typer.Option(help="Environments stepped together.")] = 32,
    workers: Annotated[
        int, typer.Option(help="Processes that step simulators that have no batched form; 0 for none.")
    ] = 2,
    temperature: Temperature = "1",
    simulator_python: SimulatorPython = None,
    simulator_factory: SimulatorFactory = None,
    reward: RewardRule = None,
) -> None:
    """Record a dataset in OMIGA's HDF5 format with the task's behaviour policies."""
    from omcda_deploy.datasets.writer import require_new_file
    from omcda_deploy.play.collect import collect_mixture
    from omcda_deploy.play.shipped import RANDOM
    from omcda_deploy.registry import require_task

    factor = temperature_of(temperature)
    require_new_file(out)
    if tier == RANDOM and factor != 1.0:
        raise ConfigError(f"tier random: its actions are uniform, expected --temperature 1, got {factor:g}")
    task = task_of(task, env)
    require_task(task)
    options = simulator_options(simulator_python, simulator_factory, reward)
    policies = _policies(task, tier, bundle, policy, options)
    with progress_bar(f"recording {task}", "transitions") as report:
        summary = collect_mixture(
            task,
            policies,
            out,
            transitions=transitions,
            seed=seed,
            behavior=policies[0].behavior if bundle or policy else tier or "medium",
            num_envs=num_envs,
            workers=workers,
            temperature=factor,
            progress=report,
            options=options,
        )
    print_json(summary)


def _policies(
    task: str, tier: str | None, bundle: Path | None, policy: str | None, options: Mapping[str, str]
) -> list[Source]:
    """Return the policies to record: those of a tier, or one of the user's own."""
    from omcda_deploy import registry
    from omcda_deploy.local import JointTeam
    from omcda_deploy.play.collect import Source
    from omcda_deploy.play.scripted import CallableTeam
    from omcda_deploy.play.shipped import sources

    given = {"--tier": tier, "--bundle": bundle, "--policy": policy}
    if len(several := [option for option, value in given.items() if value is not None]) > 1:
        raise ConfigError(f"expected one of {', '.join(given)}, got {' and '.join(several)}: leave one out")
    if bundle is not None:
        return [Source(bundle.absolute().name, JointTeam(bundle), 1.0)]
    if policy is not None:
        return [Source(policy, CallableTeam(policy, registry.team_spec(task, **options)), 1.0)]
    return sources(task, tier or "medium", options)
