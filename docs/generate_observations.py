"""Write docs/observations.md from the simulators: ``python docs/generate_observations.py`` (``make docs``).

One table per task: what each number of an agent's observation and action is, in order, with its unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from omcda_deploy import registry
from omcda_deploy.entries import AgentEntries, entry_rows

PAGE = Path(__file__).with_name("observations.md")
HEADER = """\
<!-- Written by docs/generate_observations.py; do not edit. -->
# Observations and actions

The numbers of each agent's vectors, in order from 0, with their units. A line that has several owners has all
of its quantities for the first, then all of them for the next. `omcda-deploy describe TASK` prints the same,
and `--json` every number by itself. How a simulator of your own names its numbers: [the
contract](simulators.md#the-contract).
"""
FAMILIES = {  # family -> what holds for all of its tasks
    "mamujoco": """\
Owners are joints and bodies by their names in MuJoCo's model. Numbers are listed as they are **before** each
vector is standardised over its own entries ([how](simulators.md#observations)); exported policies take raw
vectors and standardised ones. An action of 1 is the torque given; actions end at ±1, and the humanoid's at
±0.4. Inertias, offsets and velocities of bodies are MuJoCo's `cinert` and `cvel`, about the centre of mass of
the whole.""",
    "mamujoco-khop1": """\
Agents observe their own joints, the positions of the joints next to them, and the torso. Nothing is normalised.""",
    "smac": """\
As `agent_0` has it; the others have the same, with the remaining allies in order. A unit that is dead or out of
sight is all zeros, and so is everything that a dead agent observes. Types are SMAC's numbers of the kinds of
units of a side. In `MMM` and `MMM2` a medivac's attack of enemy k heals ally k.""",
    "smax": """\
As `agent_0` has it; the others have the same, with the remaining allies in order. A unit that is dead or out of
sight is all zeros.""",
    "toy": """\
Agents observe their own local state, one-hot.""",
}
ALIKE = {"smac", "smax"}  # whose agents differ in the names of the others alone


def page() -> str:
    """The whole page."""
    tasks = {task: task.split("/")[0] for task in registry.tasks() if registry.entries(task)}
    if untold := set(tasks.values()) - FAMILIES.keys():
        raise SystemExit(f"no words for tasks of {', '.join(sorted(untold))}: add them to FAMILIES")
    lines = [HEADER]
    for family, words in FAMILIES.items():
        lines += [f"## {family}", "", words, ""]
        for task in (task for task, of in tasks.items() if of == family):
            entries = registry.entries(task)
            agents = dict(list(entries.items())[:1]) if family in ALIKE else entries
            lines += [
                f"### {task}",
                "",
                "| entry | of | quantity (unit) |",
                "|---|---|---|",
                *rows(agents),
                "",
            ]
    return "\n".join(lines).rstrip() + "\n"


def rows(agents: Mapping[str, AgentEntries]) -> Iterator[str]:
    """The rows of one task; what several agents observe or do alike is told once."""
    for vector in ("observation", "action"):
        owners: dict[str, list[str]] = {}
        for name, entries in agents.items():
            lines = [
                f"| {row.index} | {row.owners} | {row.description} |"
                for row in entry_rows(getattr(entries, vector))
            ]
            owners.setdefault("\n".join(lines), []).append(name)
        for told, names in owners.items():
            who = "all agents" if len(names) == len(agents) > 1 else ", ".join(names)
            yield f"| **{vector}** | **{who}** | |"
            yield told


if __name__ == "__main__":
    PAGE.write_text(page())
