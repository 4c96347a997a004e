"""A stand-in for oxwhirl's SMAC with its signatures, sizes and quirks; no StarCraft II. Runs in the host.

Written for the host's interpreter: Python 3.8, standard library and numpy. The battle is a small one of its own;
what callers of ``smac.env.StarCraft2Env`` meet is as there: three values from ``step``, lists from the getters,
no-op for the dead alone, AssertionError for an illegal action, an end without a flag at the time limit, no info
after a crash, units that exist only after the first reset, and a ``max_reward`` that grows with each reset before
the first episode has ended. The game's random numbers go on from episode to episode; its seed is the constructor's.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np

# As SMAC lists them: agents, enemies, time limit, races, types of units that observations tell apart.
MAPS = {
    "3m": (3, 3, 60, "T", "T", 0),
    "8m": (8, 8, 120, "T", "T", 0),
    "25m": (25, 25, 150, "T", "T", 0),
    "5m_vs_6m": (5, 6, 70, "T", "T", 0),
    "8m_vs_9m": (8, 9, 120, "T", "T", 0),
    "10m_vs_11m": (10, 11, 150, "T", "T", 0),
    "27m_vs_30m": (27, 30, 180, "T", "T", 0),
    "MMM": (10, 10, 150, "T", "T", 3),
    "MMM2": (10, 12, 180, "T", "T", 3),
    "2s3z": (5, 5, 120, "P", "P", 2),
    "3s5z": (8, 8, 150, "P", "P", 2),
    "3s5z_vs_3s6z": (8, 9, 170, "P", "P", 2),
    "3s_vs_3z": (3, 3, 150, "P", "P", 0),
    "3s_vs_4z": (3, 4, 200, "P", "P", 0),
    "3s_vs_5z": (3, 5, 250, "P", "P", 0),
    "1c3s5z": (9, 9, 180, "P", "P", 3),
    "2m_vs_1z": (2, 1, 150, "T", "P", 0),
    "corridor": (6, 24, 400, "P", "Z", 0),
    "6h_vs_8z": (6, 8, 150, "Z", "P", 0),
    "2s_vs_1sc": (2, 1, 300, "P", "Z", 0),
    "so_many_baneling": (7, 32, 100, "P", "Z", 0),
    "bane_vs_bane": (24, 24, 200, "Z", "Z", 2),
    "2c_vs_64zg": (2, 64, 400, "P", "Z", 0),
}
SIZE = 32.0  # of the map
MOVES = ((0.0, 2.0), (0.0, -2.0), (2.0, 0.0), (-2.0, 0.0))


class Unit:
    def __init__(self, x: float, y: float, health: float, shield: float) -> None:
        self.x, self.y = x, y
        self.health = self.health_max = health
        self.shield = self.shield_max = shield

    def distance(self, other: Unit) -> float:
        return float(np.hypot(self.x - other.x, self.y - other.y))

    def hurt(self, damage: float) -> float:
        """Damage that was really dealt."""
        dealt = min(damage, self.health + self.shield)
        absorbed = min(self.shield, dealt)
        self.shield -= absorbed
        self.health -= dealt - absorbed
        return dealt


class StarCraft2Env:
    enemy_damage = 4.0
    enemy_health = 30.0
    shoot_range = 6.0

    def __init__(
        self, map_name: str = "8m", step_mul: int = 8, difficulty: str = "7", seed: int | None = None
    ) -> None:
        assert (step_mul, difficulty) == (8, "7")
        agents, enemies, limit, race, enemy_race, types = MAPS[map_name]
        self.n_agents: int = agents
        self.n_enemies: int = enemies
        self.episode_limit: int = limit
        self.unit_type_bits: int = types
        self.n_actions: int = 6 + self.n_enemies
        self.shield_bits_ally = int(race == "P")
        self.shield_bits_enemy = int(enemy_race == "P")
        self.max_reward = float(self.n_enemies * 10 + 200)
        self.agents: dict[int, Unit] = {}
        self.enemies: dict[int, Unit] = {}
        self._seed = seed
        self._episode_count = 0
        self._episode_steps = 0
        self.force_restarts = 0
        self.last_action = np.zeros((self.n_agents, self.n_actions))

    def _launch(self) -> None:
        print("Version: B75689 (SC2.4.10)")  # on standard output, as StarCraft II does
        sys.stdout.flush()
        self._random = np.random.RandomState(self._seed)

    def full_restart(self) -> None:
        self._launch()
        self.force_restarts += 1

    def reset(self) -> tuple[list[Any], Any]:
        self._episode_steps = 0
        if self._episode_count == 0:
            self._launch()
        self.last_action = np.zeros((self.n_agents, self.n_actions))
        middle, jitter = SIZE / 2, self._random.uniform(-1, 1, size=(self.n_agents + self.n_enemies, 2))
        self.agents = {
            i: Unit(
                middle - 6 + jitter[i, 0],
                middle + 2 * i - 5 + jitter[i, 1],
                45.0,
                50.0 * self.shield_bits_ally,
            )
            for i in range(self.n_agents)
        }
        self.enemies = {
            i: Unit(
                middle + 4 + jitter[self.n_agents + i, 0],
                middle + i % 8 - 4 + jitter[self.n_agents + i, 1],
                self.enemy_health,
                10.0 * self.shield_bits_enemy,
            )
            for i in range(self.n_enemies)
        }
        if self._episode_count == 0:
            self.max_reward += sum(unit.health_max + unit.shield_max for unit in self.enemies.values())
        return self.get_obs(), self.get_state()

    def step(self, actions: list[int]) -> tuple[float, bool, dict[str, Any]]:
        actions = [int(a) for a in actions]
        self.last_action = np.eye(self.n_actions)[np.array(actions)]
        for a_id, action in enumerate(actions):
            self.get_agent_action(a_id, action)
        reward = 0.0
        for a_id, action in enumerate(actions):
            unit = self.agents[a_id]
            if 2 <= action < 6:
                unit.x += MOVES[action - 2][0]
                unit.y += MOVES[action - 2][1]
            elif action >= 6 and self.enemies[action - 6].health > 0:
                enemy = self.enemies[action - 6]
                reward += enemy.hurt(float(self._random.uniform(4, 8)))
                reward += 10 * (enemy.health <= 0)
        for enemy in self.enemies.values():
            near = [unit for unit in self.agents.values() if unit.health > 0]
            if enemy.health > 0 and near:
                target = min(near, key=enemy.distance)
                if enemy.distance(target) <= 6:
                    target.hurt(self.enemy_damage * float(self._random.uniform(0, 1)))
                else:
                    enemy.x += float(np.sign(target.x - enemy.x))
                    enemy.y += float(np.sign(target.y - enemy.y))
        self._episode_steps += 1
        allies_alive = any(unit.health > 0 for unit in self.agents.values())
        enemies_alive = any(unit.health > 0 for unit in self.enemies.values())
        terminated = not (allies_alive and enemies_alive)
        info = {"battle_won": False}
        if terminated and allies_alive:
            info["battle_won"] = True
            reward += 200
        elif self._episode_steps >= self.episode_limit:
            terminated = True
        if terminated:
            self._episode_count += 1
        return reward / (self.max_reward / 20), terminated, info

    def get_agent_action(self, a_id: int, action: int) -> None:
        available = self.get_avail_agent_actions(a_id)
        assert available[action] == 1, f"Agent {a_id} cannot perform action {action}"

    def get_avail_agent_actions(self, agent_id: int) -> list[int]:
        unit = self.agents[agent_id]
        if unit.health <= 0:
            return [1] + [0] * (self.n_actions - 1)
        moves = [int(0 <= unit.x + x < SIZE and 0 <= unit.y + y < SIZE) for x, y in MOVES]
        attacks = [
            int(enemy.health > 0 and unit.distance(enemy) <= self.shoot_range)
            for enemy in self.enemies.values()
        ]
        return [0, 1, *moves, *attacks]

    def get_avail_actions(self) -> list[list[int]]:
        return [self.get_avail_agent_actions(i) for i in range(self.n_agents)]

    def _type(self, index: int) -> list[float]:
        """One-hot of a unit's type; empty where all are alike."""
        return [float(index % self.unit_type_bits == kind) for kind in range(self.unit_type_bits)]

    def _seen(self, unit: Unit, other: Unit, index: int, shield: int) -> list[float]:
        distance = unit.distance(other)
        kind = self._type(index)
        if distance >= 9 or other.health <= 0:
            return [0.0] * (5 + shield + len(kind))
        position = [distance / 9, (other.x - unit.x) / 9, (other.y - unit.y) / 9]
        return [1.0, *position, other.health / other.health_max, *[other.shield / 50] * shield, *kind]

    def get_obs_agent(self, agent_id: int) -> Any:
        unit = self.agents[agent_id]
        if unit.health <= 0:
            return np.zeros(self.get_obs_size(), np.float32)
        parts = [float(a) for a in self.get_avail_agent_actions(agent_id)[2:6]]
        for i, enemy in self.enemies.items():
            parts += self._seen(unit, enemy, i, self.shield_bits_enemy)
        for i, ally in self.agents.items():
            parts += self._seen(unit, ally, i, self.shield_bits_ally) if i != agent_id else []
        parts += [unit.health / unit.health_max, *[unit.shield / 50] * self.shield_bits_ally]
        return np.array([*parts, *self._type(agent_id)], np.float32)

    def get_obs(self) -> list[Any]:
        return [self.get_obs_agent(i) for i in range(self.n_agents)]

    def get_state(self) -> Any:
        parts: list[float] = []
        for units, cooldown, shield in (
            (self.agents, [0.5], self.shield_bits_ally),
            (self.enemies, [], self.shield_bits_enemy),
        ):
            for index, unit in units.items():
                alive = unit.health > 0
                row = [unit.health / unit.health_max, *cooldown, unit.x / SIZE - 0.5, unit.y / SIZE - 0.5]
                row += [unit.shield / 50] * shield + self._type(index)
                parts += row if alive else [0.0] * len(row)
        return np.append(parts, self.last_action.flatten()).astype(np.float32)

    def get_obs_size(self) -> int:
        move, enemy, ally, own = 4, 4 + self.unit_type_bits, 4 + self.unit_type_bits, self.unit_type_bits
        enemy += 1 + self.shield_bits_enemy
        ally += 1 + self.shield_bits_ally
        own += 1 + self.shield_bits_ally
        return move + self.n_enemies * enemy + (self.n_agents - 1) * ally + own

    def get_state_size(self) -> int:
        ally = 4 + self.shield_bits_ally + self.unit_type_bits
        enemy = 3 + self.shield_bits_enemy + self.unit_type_bits
        return self.n_agents * ally + self.n_enemies * enemy + self.n_agents * self.n_actions

    def get_env_info(self) -> dict[str, Any]:
        return {
            "state_shape": self.get_state_size(),
            "obs_shape": self.get_obs_size(),
            "n_actions": self.n_actions,
            "n_agents": self.n_agents,
            "episode_limit": self.episode_limit,
            "agent_features": [],
            "enemy_features": [],
        }

    def seed(self) -> int | None:
        return self._seed

    def close(self) -> None:
        print("closed")


class Winnable(StarCraft2Env):
    """Enemies that come to be shot: every battle is won, and pays 20."""

    enemy_damage = 0.0
    enemy_health = 3.0


class Peaceful(StarCraft2Env):
    """Nobody shoots: every episode ends at the time limit."""

    enemy_damage = 0.0
    shoot_range = -1.0


class Crashing(Winnable):
    """StarCraft II crashes in the third step of a game whose seed is a multiple of three."""

    def step(self, actions: list[int]) -> tuple[float, bool, dict[str, Any]]:
        if self._episode_count == 0 and self._episode_steps == 2 and (self._seed or 0) % 3 == 0:
            return self.crash()
        return super().step(actions)

    def crash(self) -> tuple[float, bool, dict[str, Any]]:
        self.full_restart()
        return 0, True, {}


class CrashingInReset(Winnable):
    """StarCraft II crashes when the second episode begins: SMAC goes on with the units of the first."""

    def reset(self) -> tuple[list[Any], Any]:
        if self._episode_count == 1:
            self._episode_steps = 0
            self.full_restart()
            return self.get_obs(), self.get_state()
        return super().reset()


class FailingLater(Winnable):
    """An exception in the third step of the second episode, as of a StarCraft II that cannot be started again."""

    def step(self, actions: list[int]) -> tuple[float, bool, dict[str, Any]]:
        if self._episode_count == 1 and self._episode_steps == 2:
            raise RuntimeError("no port left")
        return super().step(actions)


class Endless(Peaceful):
    """Never says that an episode is over."""

    def step(self, actions: list[int]) -> tuple[float, bool, dict[str, Any]]:
        reward, _, info = super().step(actions)
        return reward, False, info


class Dying(Crashing):
    """The whole interpreter dies there, and leaves behind a game that would go on for ever."""

    def reset(self) -> tuple[list[Any], Any]:
        game = subprocess.Popen(["sleep", "600"])
        print(f"game {game.pid}")
        sys.stdout.flush()
        return super().reset()

    def crash(self) -> tuple[float, bool, dict[str, Any]]:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("not reached")


class AlwaysCrashing(StarCraft2Env):
    def step(self, actions: list[int]) -> tuple[float, bool, dict[str, Any]]:
        return 0, True, {}


class Chatty(Winnable):
    """Prints far more than a pipe holds, to both of its outputs."""

    def step(self, actions: list[int]) -> tuple[float, bool, dict[str, Any]]:
        for stream in (1, 2):
            os.write(stream, b"unit died\n" * 20_000)
        return super().step(actions)


class Mappo(StarCraft2Env):
    """The sizes of the MAPPO variant."""

    def get_env_info(self) -> dict[str, Any]:
        return {**super().get_env_info(), "obs_shape": 124, "state_shape": 156}


class Forbidding(StarCraft2Env):
    """Leaves the third agent nothing to do."""

    def get_avail_actions(self) -> list[list[int]]:
        available = super().get_avail_actions()
        available[2] = [0] * self.n_actions
        return available


class Picky(StarCraft2Env):
    """Calls actions available and refuses them."""

    def get_agent_action(self, a_id: int, action: int) -> None:
        raise AssertionError(f"Agent {a_id} cannot perform action {action}")


class Hanging(StarCraft2Env):
    def step(self, actions: list[int]) -> tuple[float, bool, dict[str, Any]]:
        time.sleep(600)
        raise AssertionError("not reached")


class Failing(StarCraft2Env):
    def step(self, actions: list[int]) -> tuple[float, bool, dict[str, Any]]:
        raise RuntimeError("no such unit")


class NotSmac:
    def __init__(self, **keywords: Any) -> None: ...

    def reset(self) -> None: ...

    def step(self, actions: list[int]) -> None: ...
