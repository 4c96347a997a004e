"""The maps of SMAC: their units and time limits, and the sizes that follow from SMAC's own formulas.

With n agents, e enemies, shield bits s_a and s_e (1 where the side has shields) and u unit types that observations
tell apart (docs/simulators.md#sizes-by-smacs-formulas):

    O = 4 + e (5 + s_e + u) + (n - 1) (5 + s_a + u) + 1 + s_a + u        A = 6 + e
    S = n (4 + s_a + u) + e (3 + s_e + u) + n A
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from omcda_deploy.entries import AgentEntries, Entry
from omcda_deploy.envs.programs.smac_host import STEP_MUL
from omcda_deploy.spec import ActionSpec, AgentSpec, TeamSpec

Race = Literal["Protoss", "Terran", "Zerg"]

GAME_LOOPS_PER_SECOND = 22.4


@dataclass(frozen=True)
class Map:
    """Numbers from which a map's spec follows."""

    agents: int
    enemies: int
    limit: int  # steps
    race: Race
    enemy_race: Race
    unit_types: int = 0  # that observations tell apart; 0 where all units of a side are alike

    def spec(self, task: str) -> TeamSpec:
        """Return the spec of SMAC with its default settings."""
        n, e, u = self.agents, self.enemies, self.unit_types
        s_a, s_e = self.race == "Protoss", self.enemy_race == "Protoss"  # only Protoss have shields
        choices = 6 + e
        observation = 4 + e * (5 + s_e + u) + (n - 1) * (5 + s_a + u) + 1 + s_a + u
        return TeamSpec(
            task=task,
            agents=tuple(
                AgentSpec(f"agent_{i}", observation, ActionSpec("discrete", choices)) for i in range(n)
            ),
            state_size=n * (4 + s_a + u) + e * (3 + s_e + u) + n * choices,
            control_rate=GAME_LOOPS_PER_SECOND / STEP_MUL,
            episode_limit=self.limit,
        )

    def entries(self, names: Sequence[str]) -> dict[str, AgentEntries]:
        """Name what each agent observes and may choose; a unit that is dead or out of sight is all zeros."""
        directions = ("north", "south", "east", "west")
        enemies = [f"enemy {k}" for k in range(self.enemies)]
        ours, theirs = self.race == "Protoss", self.enemy_race == "Protoss"
        moves = [Entry("", f"can move {direction}", "0 or 1") for direction in directions]
        seen_enemies = [
            entry
            for enemy in enemies
            for entry in (
                Entry(enemy, "can be attacked", "0 or 1"),
                *_place(enemy),
                *self._condition(enemy, theirs),
            )
        ]

        def seen_by(agent: str) -> tuple[Entry, ...]:
            allies = [
                entry
                for ally in names
                if ally != agent
                for entry in (Entry(ally, "is seen", "0 or 1"), *_place(ally), *self._condition(ally, ours))
            ]
            return (*moves, *seen_enemies, *allies, *self._condition(agent, ours))

        actions = (
            Entry("", "no-op (the dead alone)"),
            Entry("", "stop"),
            *(Entry("", f"move {direction}") for direction in directions),
            *(Entry(enemy, "attack") for enemy in enemies),
        )
        return {name: AgentEntries(seen_by(name), actions) for name in names}

    def _condition(self, unit: str, shields: bool) -> list[Entry]:
        quantities = ("health", "shield") if shields else ("health",)
        return [
            *(Entry(unit, quantity, "0 to 1, of its full one") for quantity in quantities),
            *(Entry(unit, f"is of type {kind}", "0 or 1") for kind in range(self.unit_types)),
        ]


def _place(unit: str) -> list[Entry]:
    return [
        Entry(unit, quantity, "1 is the range of sight")
        for quantity in ("distance", "relative x", "relative y")
    ]


MAPS = {
    "3m": Map(3, 3, 60, "Terran", "Terran"),
    "8m": Map(8, 8, 120, "Terran", "Terran"),
    "25m": Map(25, 25, 150, "Terran", "Terran"),
    "5m_vs_6m": Map(5, 6, 70, "Terran", "Terran"),
    "8m_vs_9m": Map(8, 9, 120, "Terran", "Terran"),
    "10m_vs_11m": Map(10, 11, 150, "Terran", "Terran"),
    "27m_vs_30m": Map(27, 30, 180, "Terran", "Terran"),
    "MMM": Map(10, 10, 150, "Terran", "Terran", unit_types=3),
    "MMM2": Map(10, 12, 180, "Terran", "Terran", unit_types=3),
    "2s3z": Map(5, 5, 120, "Protoss", "Protoss", unit_types=2),
    "3s5z": Map(8, 8, 150, "Protoss", "Protoss", unit_types=2),
    "3s5z_vs_3s6z": Map(8, 9, 170, "Protoss", "Protoss", unit_types=2),
    "1c3s5z": Map(9, 9, 180, "Protoss", "Protoss", unit_types=3),
    "3s_vs_3z": Map(3, 3, 150, "Protoss", "Protoss"),
    "3s_vs_4z": Map(3, 4, 200, "Protoss", "Protoss"),
    "3s_vs_5z": Map(3, 5, 250, "Protoss", "Protoss"),
    "2m_vs_1z": Map(2, 1, 150, "Terran", "Protoss"),
    "corridor": Map(6, 24, 400, "Protoss", "Zerg"),
    "6h_vs_8z": Map(6, 8, 150, "Zerg", "Protoss"),
    "2s_vs_1sc": Map(2, 1, 300, "Protoss", "Zerg"),
    "so_many_baneling": Map(7, 32, 100, "Protoss", "Zerg"),
    "bane_vs_bane": Map(24, 24, 200, "Zerg", "Zerg", unit_types=2),
    "2c_vs_64zg": Map(2, 64, 400, "Protoss", "Zerg"),
}
