"""Command ``describe``: a task's team, with the meaning and unit of every number of its vectors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from omcda_deploy.commands import (
    AsJson,
    SimulatorFactory,
    SimulatorPython,
    print_json,
    print_text,
    simulator_options,
)
from omcda_deploy.commands.completion import task_names
from omcda_deploy.entries import Entry, entry_rows
from omcda_deploy.formatting import count

if TYPE_CHECKING:
    from omcda_deploy.entries import AgentEntries
    from omcda_deploy.spec import TeamSpec


def describe(
    task: Annotated[
        str,
        typer.Argument(
            help="A task, or MODULE:CALLABLE of an environment of your own.", autocompletion=task_names
        ),
    ],
    as_json: AsJson = False,
    simulator_python: SimulatorPython = None,
    simulator_factory: SimulatorFactory = None,
) -> None:
    """Print a task's team, and what each number that its agents observe and do is, in order, with its unit."""
    from omcda_deploy import registry

    spec = registry.team_spec(task, **simulator_options(simulator_python, simulator_factory))
    entries = registry.entries(task)
    if as_json:
        named = {name: dataclasses.asdict(agent) for name, agent in entries.items()}
        print_json({"team": spec.to_json(), "entries": named})
        return
    for line in _lines(spec, entries):
        print_text(line)


def _lines(spec: TeamSpec, entries: Mapping[str, AgentEntries]) -> Iterator[str]:
    yield (
        f"{spec.task}: {count(len(spec.agents), 'agent')}, {spec.control_rate:.4g} Hz, "
        f"at most {spec.episode_limit} steps, state of {spec.state_size}"
    )
    if spec.normalizer.kind != "none":
        yield f"observations are normalised ({spec.normalizer.kind}); here they are as they are before that"
    for agent in spec.agents:
        named = entries.get(agent.name)
        yield f"\n{agent.name} observes {count(agent.observation_size, 'number')}"
        yield from _rows(named.observation if named else ())
        if agent.action.kind == "discrete":
            yield f"{agent.name} chooses one of {agent.action.size}"
        else:
            bounds = f"from {agent.action.low:g} to {agent.action.high:g}"
            yield f"{agent.name} does {count(agent.action.size, 'number')} {bounds}"
        yield from _rows(named.action if named else ())
    if not entries:
        yield "\nits simulator does not say what they are (docs/simulators.md)"


def _rows(entries: tuple[Entry, ...]) -> Iterator[str]:
    for row in entry_rows(entries):
        yield f"  {row.index:<12}{row.owners + ': ' if row.owners else ''}{row.description}"
