"""SMAX, JaxMARL's battles without StarCraft II: ``smax/{5m_vs_6m,6h_vs_8z,corridor}``.

Allies fight JaxMARL's scripted enemies, which walk to a unit they see and shoot the closest in range
(docs/simulators.md#smax). SMAX is not SMAC: docs/smax.md says how they differ, and their numbers never stand in one
table. ``corridor`` is SMAC's units on SMAX's open field (JaxMARL has no such map), without SMAC's choke point.

Actions are 0-3 move, 4 stop, 5+k attack enemy k; the dead can only stop. The reward is the fraction of the enemies'
health that the step took off, plus 1 in the step that wins. An episode has at most 100 steps.

JaxMARL steps :data:`ROWS` environments at a time in one compiled program, however many there are. XLA rounds
differently for other shapes, and a battle amplifies the last digit; with one shape an episode is a function of its
seed and actions alone. It also takes one compilation per map only, kept in ``$OMCDA_CACHE/jax`` for later processes
(unless jax already has a cache). Specs need no jax.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.entries import AgentEntries, Entry
from omcda_deploy.envs import Float, Observations, StepResult, joint_choice
from omcda_deploy.envs.programs.smax_battles import Programs, programs
from omcda_deploy.envs.vector import VectorStep, checked_actions, require_counts, require_indices
from omcda_deploy.errors import ConfigError, ContractError, UnknownNameError
from omcda_deploy.spec import ActionSpec, AgentSpec, TeamSpec

_MAPS = {"5m_vs_6m": (5, 6), "6h_vs_8z": (6, 8), "corridor": (6, 24)}  # allies, enemies
_UNIT_TYPES = ("marine", "marauder", "stalker", "zealot", "zergling", "hydralisk")
_OTHER_FEATURES = 7 + len(_UNIT_TYPES)  # per other unit in an observation
# Health, x, y, weapon cooldown and type: per observing unit in its observation, and per unit in the state.
_UNIT_FEATURES = 4 + len(_UNIT_TYPES)
_STOP, _FIRST_ATTACK = 4, 5
_OF_FULL = "0 to 1, of its full one"

CONTROL_RATE = 2.0  # Hz: 8 world steps of 1/16 s to a control step
EPISODE_LIMIT = 100
ROWS = 32  # environments per call of the compiled programs
MAP_SIZE = 32.0
_PIXELS = 12  # per unit of length

PACKAGES = ("jaxmarl", "jax")


def _spec(name: str) -> TeamSpec:
    allies, enemies = _MAPS[name]
    observation = _OTHER_FEATURES * (allies + enemies - 1) + _UNIT_FEATURES
    actions = ActionSpec("discrete", _FIRST_ATTACK + enemies)
    return TeamSpec(
        task=f"smax/{name}",
        agents=tuple(AgentSpec(f"agent_{i}", observation, actions) for i in range(allies)),
        state_size=(_UNIT_FEATURES + 2)
        * (allies + enemies),  # the features, team and type number of each unit
        control_rate=CONTROL_RATE,
        episode_limit=EPISODE_LIMIT,
    )


SPECS: Mapping[str, TeamSpec] = {f"smax/{name}": _spec(name) for name in _MAPS}
TASKS = tuple(SPECS)


def entries(task: str) -> dict[str, AgentEntries]:
    """Name what each agent observes and may choose; a unit that is dead or out of sight is all zeros."""
    _, enemies = _MAPS[task.split("/")[1]]
    actions = [Entry("", f"move {direction}") for direction in ("north", "east", "south", "west")]
    actions += [Entry("", "stop"), *(Entry(f"enemy {k}", "attack") for k in range(enemies))]

    def seen_by(agent: str) -> tuple[Entry, ...]:
        others = [name for name in SPECS[task].names if name != agent]
        units = [*others, *(f"enemy {k}" for k in range(enemies))]
        return tuple(entry for unit in units for entry in _other(unit)) + tuple(_own(agent))

    return {name: AgentEntries(seen_by(name), tuple(actions)) for name in SPECS[task].names}


def _other(unit: str) -> list[Entry]:
    return [
        Entry(unit, "health", _OF_FULL),
        *(Entry(unit, f"relative {axis}", "1 is the range of sight") for axis in "xy"),
        *(Entry(unit, f"last move {axis}", "-1, 0 or 1") for axis in "xy"),
        Entry(unit, "last attack", "action's number, 1 is the last action"),
        *_cooldown_and_type(unit),
    ]


def _own(unit: str) -> list[Entry]:
    place = [Entry(unit, axis, f"0 to 1, {MAP_SIZE:g} of the map's units") for axis in "xy"]
    return [Entry(unit, "health", _OF_FULL), *place, *_cooldown_and_type(unit)]


def _cooldown_and_type(unit: str) -> list[Entry]:
    return [
        Entry(unit, "weapon's cooldown", _OF_FULL),
        *(Entry(unit, f"is a {kind}", "0 or 1") for kind in _UNIT_TYPES),
    ]


def state_positions(spec: TeamSpec) -> list[tuple[int, int]]:
    """Indices of each unit's x and y in the centralised state; their values are from 0 to :data:`MAP_SIZE`."""
    units = spec.state_size // (_UNIT_FEATURES + 2)
    return [(unit * _UNIT_FEATURES + 1, unit * _UNIT_FEATURES + 2) for unit in range(units)]


def make(task: str, render_mode: str | None = None) -> Smax:
    """Make one battle; errors are those of :class:`SmaxVector`."""
    return Smax(task, render_mode)


def make_vector(task: str, num_envs: int, render_mode: str | None = None) -> SmaxVector:
    """Make ``num_envs`` battles that are stepped together; errors are those of :class:`SmaxVector`."""
    return SmaxVector(task, num_envs, render_mode)


@dataclass
class _StepArrays:
    """Arrays of the present step; E is a multiple of :data:`ROWS`."""

    observation: Float  # [E, N, O]
    state: Float  # [E, S]
    action_mask: NDArray[np.uint8]  # [E, N, A]


class SmaxVector:
    """E battles stepped together, an :class:`omcda_deploy.envs.vector.BatchedEnvironment`.

    Info holds ``won`` [E]: all enemies are dead and an ally lives, so mutual destruction is not won. Seeds are
    those of ``jax.random.PRNGKey``: 0 to 2**64 - 1. ``render()`` needs ``render_mode="rgb_array"``.

    Actions that a mask forbids raise :class:`ContractError` before any battle is stepped. Raises
    :class:`UnknownNameError`, MissingExtraError without jaxmarl, and :class:`ConfigError` for another
    ``render_mode``.
    """

    def __init__(self, task: str, num_envs: int, render_mode: str | None = None) -> None:
        require_counts(num_envs)
        if task not in SPECS:
            raise UnknownNameError("task", task, SPECS)
        if render_mode not in (None, "rgb_array"):
            raise ConfigError(f"render_mode: expected 'rgb_array' or None, got {render_mode!r}")
        self.spec = SPECS[task]
        self.num_envs = num_envs
        self._render_mode = render_mode
        name = task.removeprefix("smax/")
        self._programs: Programs | None = programs(name, *_MAPS[name], EPISODE_LIMIT)
        self._idle = np.ones(num_envs, np.bool_)
        blocks = -(-num_envs // ROWS)
        self._carries: list[Any] = [None] * blocks
        agents, rows = len(self.spec.agents), blocks * ROWS
        self._present = _StepArrays(
            np.zeros((rows, agents, self.spec.observation_size), np.float32),
            np.zeros((rows, self.spec.state_size), np.float32),
            np.zeros((rows, agents, self.spec.action_size), np.uint8),
        )

    def reset(self, seeds: Mapping[int, int]) -> VectorStep:
        compiled = self._open()
        require_indices(seeds, self.num_envs)
        if outside := [seed for seed in seeds.values() if not 0 <= seed < 2**64]:
            raise ContractError(f"expected seeds from 0 to 2**64 - 1, got {outside[0]}")
        keys = np.zeros((len(self._present.state), 2), np.uint32)
        chosen = np.zeros(len(keys), np.bool_)
        for row, seed in seeds.items():
            keys[row], chosen[row] = divmod(seed, 2**32), True  # the two halves of jax.random.PRNGKey(seed)
        for block, rows in self._blocks(chosen):
            fresh, previous = compiled.reset(keys[rows]), self._carries[block]
            self._carries[block] = fresh if previous is None else compiled.keep(chosen[rows], fresh, previous)
            self._observe(compiled, block, rows)
        self._idle[list(seeds)] = False
        terminated, truncated, won = (np.zeros(self.num_envs, np.bool_) for _ in range(3))
        return self._answer(np.zeros(self.num_envs), terminated, truncated, won)

    def step(
        self, actions: Mapping[str, NDArray[Any]], active: NDArray[np.bool_] | None = None
    ) -> VectorStep:
        compiled = self._open()
        active, columns = checked_actions(self.spec, self.num_envs, self._idle, actions, active)
        joint = np.full((len(self._present.state), len(columns)), _STOP, np.int32)
        stepped = np.zeros(len(joint), np.bool_)
        stepped[: self.num_envs] = active
        joint[stepped] = self._available(np.stack(columns, axis=1), active)
        reward = np.zeros(len(joint), np.float64)
        terminated, truncated, won = (np.zeros(len(joint), np.bool_) for _ in range(3))
        for block, rows in self._blocks(stepped):
            self._carries[block], outcome = compiled.step(self._carries[block], joint[rows], stepped[rows])
            reward[rows], terminated[rows], truncated[rows], won[rows] = outcome
            self._observe(compiled, block, rows)
        count = self.num_envs
        answer = self._answer(reward[:count], terminated[:count], truncated[:count], won[:count])
        self._idle |= answer.terminated | answer.truncated
        return answer

    def render(self, index: int) -> NDArray[np.uint8]:
        """Draw the present frame of one battle, uint8 [384, 384, 3]: allies blue, enemies red, the wounded pale."""
        require_indices([index], self.num_envs)
        if self._render_mode is None:
            raise ConfigError("SMAX was made without render_mode: use render_mode='rgb_array'")
        return _frame(self._present.state[index], len(self.spec.agents))

    def close(self) -> None:
        self._programs, self._carries = None, []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> Programs:
        if self._programs is None:
            raise ContractError("this SmaxVector is closed: make a new one")
        return self._programs

    def _blocks(self, marked: NDArray[np.bool_]) -> list[tuple[int, slice]]:
        """Find the blocks of ROWS rows in which any row is marked: number of each block, and its rows."""
        blocks = [(block, slice(block * ROWS, (block + 1) * ROWS)) for block in range(len(self._carries))]
        return [(block, rows) for block, rows in blocks if marked[rows].any()]

    def _observe(self, compiled: Programs, block: int, rows: slice) -> None:
        arrays = self._present
        arrays.observation[rows], arrays.state[rows], arrays.action_mask[rows] = compiled.observe(
            self._carries[block]
        )

    def _available(self, choices: NDArray[Any], active: NDArray[np.bool_]) -> NDArray[Any]:
        """Select the active rows of ``choices`` [E, N]. Raises :class:`ContractError` where a mask forbids one."""
        masks = self._present.action_mask[: self.num_envs][active]
        chosen = choices[active]
        inside = (chosen >= 0) & (chosen < self.spec.action_size)
        allowed = np.take_along_axis(masks, np.where(inside, chosen, 0)[..., None], axis=-1)[..., 0] != 0
        if (wrong := ~inside | ~allowed).any():
            row, agent = np.argwhere(wrong)[0]
            raise ContractError(
                f"action of {self.spec.names[agent]} in environment {np.flatnonzero(active)[row]}: expected one of "
                f"the available {np.flatnonzero(masks[row, agent]).tolist()}, got {chosen[row, agent]}"
            )
        return chosen

    def _answer(
        self,
        reward: NDArray[np.float64],
        terminated: NDArray[np.bool_],
        truncated: NDArray[np.bool_],
        won: NDArray[np.bool_],
    ) -> VectorStep:
        count, names = self.num_envs, self.spec.names
        observation = self._present.observation[:count].copy()
        mask = self._present.action_mask[:count].copy()
        return VectorStep(
            observations={name: observation[:, i] for i, name in enumerate(names)},
            state=self._present.state[:count].copy(),
            action_masks={name: mask[:, i] for i, name in enumerate(names)},
            reward=reward,
            terminated=terminated,
            truncated=truncated,
            info={"won": won},
        )


class Smax:
    """One battle, a :class:`SmaxVector` of one row. The first agent's info holds ``won``."""

    def __init__(self, task: str, render_mode: str | None = None) -> None:
        self._vector = SmaxVector(task, 1, render_mode)
        self.spec = self._vector.spec
        self._seeds = np.random.default_rng()
        self._last: VectorStep | None = None

    @property
    def possible_agents(self) -> list[str]:
        return list(self.spec.names)

    def reset(self, seed: int | None = None) -> tuple[Observations, dict[str, dict[str, Any]]]:
        self._last = self._vector.reset({0: int(self._seeds.integers(2**32)) if seed is None else seed})
        return self._observations(self._last), self._infos(self._last)

    def step(self, actions: Mapping[str, Any]) -> StepResult:
        choices = joint_choice(self.spec, actions)
        names = self.spec.names
        last = self._last = self._vector.step(
            {name: np.array([choice]) for name, choice in zip(names, choices, strict=True)}
        )
        return (
            self._observations(last),
            dict.fromkeys(names, float(last.reward[0])),
            dict.fromkeys(names, bool(last.terminated[0])),
            dict.fromkeys(names, bool(last.truncated[0])),
            self._infos(last),
        )

    def state(self) -> Float:
        if self._last is None:
            raise ContractError("the environment has no state yet: call reset first")
        state: Float = self._last.state[0].copy()
        return state

    def render(self) -> NDArray[np.uint8]:
        return self._vector.render(0)

    def close(self) -> None:
        self._vector.close()

    @staticmethod
    def _observations(step: VectorStep) -> Observations:
        return {name: values[0] for name, values in step.observations.items()}

    @staticmethod
    def _infos(step: VectorStep) -> dict[str, dict[str, Any]]:
        infos: dict[str, dict[str, Any]] = {
            name: {"action_mask": mask[0]} for name, mask in (step.action_masks or {}).items()
        }
        next(iter(infos.values()))["won"] = bool(step.info["won"][0])
        return infos


def _frame(state: Float, allies: int) -> NDArray[np.uint8]:
    size = int(MAP_SIZE * _PIXELS)
    frame = np.full((size, size, 3), 235, np.uint8)
    across, down = np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5)
    units = state[: state.size // (_UNIT_FEATURES + 2) * _UNIT_FEATURES].reshape(-1, _UNIT_FEATURES)
    for unit, (health, x, y, *_) in enumerate(units):
        if health > 0:  # the dead are all zeros
            inside = (across - x * _PIXELS) ** 2 + (down - (MAP_SIZE - y) * _PIXELS) ** 2 < (
                0.6 * _PIXELS
            ) ** 2
            color = (40, 90, 220) if unit < allies else (210, 50, 40)
            frame[inside] = 235 + (np.array(color) - 235) * (0.25 + 0.75 * health)
    return frame
