"""Checks of what simulators say, in one place: behind it, what they said is believed.

:class:`Border` reads the answers of one environment, by agent, and gives them back joined. It refuses an agent that
is missing or unknown, shapes and types that do not fit the spec, numbers that are not finite, and ends that differ
between agents. Rewards that differ are refused too, unless the user has chosen how they join (:data:`Reward`).
:func:`require_sound` looks at the answers of simulators that step many environments by themselves.

Every error is a :class:`ContractError` that names the agent and the step of its episode, counted from 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.envs import DISCARDED, OUTCOMES, Float
from omcda_deploy.errors import ConfigError, ContractError
from omcda_deploy.spec import TeamSpec

if TYPE_CHECKING:
    from omcda_deploy.envs.vector import VectorStep

# The team's reward: the one that all agents share, or the sum or mean of their own.
Reward = Literal["shared", "sum", "mean"]
_NUMBERS = "fiub"  # kinds of numpy types that are numbers


def require_reward(reward: str) -> None:
    """Raise :class:`ConfigError` for anything but a :data:`Reward`."""
    if reward not in get_args(Reward):
        raise ConfigError(f"reward: expected {' or '.join(get_args(Reward))}, got {reward!r}")


@dataclass(frozen=True, eq=False)
class Answer:
    """An environment's answer to a reset or a step; vectors are joined in team order, and the caller's own."""

    observation: Float  # [sum of O_i]
    state: Float  # [S]
    action_mask: NDArray[np.uint8] | None  # [sum of A_i], None for continuous actions
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]  # scalars of the first agent's info


Parts: TypeAlias = tuple[Mapping[str, Any], Mapping[str, Any]]


class Border:
    """The checks of one environment, episode after episode.

    ``reward`` says how the agents' rewards join. ``translate`` maps the observations and infos of an answer to
    those of the spec; it raises :class:`ContractError` for values that it cannot map.
    """

    def __init__(
        self,
        spec: TeamSpec,
        reward: Reward = "shared",
        translate: Callable[[Mapping[str, Any], Mapping[str, Any]], Parts] | None = None,
    ) -> None:
        require_reward(reward)
        self.spec = spec
        self.steps = 0  # of the present episode
        self._reward, self._translate = reward, translate
        self._names, self._team = spec.names, set(spec.names)

    def reset(self, answer: Any, state: Any) -> Answer:
        """Read the answer to a reset, ``(observations, infos)`` by agent, and the state after it.

        A state of None is all observations joined.
        """
        self.steps = 0
        observations, infos = self._parts(answer, ("observations", "infos"))
        return self._read(observations, infos, state, 0.0, False, False)

    def step(self, answer: Any, state: Any) -> Answer:
        """Read the answer to a step, PettingZoo's five dictionaries by agent, and the state after it."""
        self.steps += 1
        parts = ("observations", "rewards", "terminations", "truncations", "infos")
        observations, rewards, terminations, truncations, infos = self._parts(answer, parts)
        reward = self._joined_reward(rewards)
        terminated = self._common("terminations", terminations)
        truncated = self._common("truncations", truncations)
        # An end in the last step allowed is an end of the task.
        return self._read(observations, infos, state, reward, terminated, truncated and not terminated)

    def actions(self, actions: Mapping[str, Any], mask: NDArray[np.uint8] | None) -> dict[str, Any]:
        """Check the actions of the coming step: float32 [A_i] within the bounds, or ints that ``mask`` allows."""
        self.steps += 1  # the coming one, for messages
        try:
            return self._checked_actions(actions, mask)
        finally:
            self.steps -= 1

    def _checked_actions(self, actions: Mapping[str, Any], mask: NDArray[np.uint8] | None) -> dict[str, Any]:
        self._require_agents("actions", actions)
        if mask is not None:
            return {
                agent.name: self._choice(agent.name, actions[agent.name], mask[columns])
                for agent, columns in zip(self.spec.agents, self.spec.action_slices, strict=True)
            }
        checked: dict[str, Any] = {}
        for agent in self.spec.agents:
            action = np.empty(agent.action.size, np.float32)
            self._fill(action, actions[agent.name], "action", agent.name)
            if not agent.action.admits(action):
                raise self._error(f"action of {agent.name}: expected {agent.action}, got {action.tolist()}")
            checked[agent.name] = action
        return checked

    def _read(
        self,
        observations: Mapping[str, Any],
        infos: Mapping[str, Any],
        state: Any,
        reward: float,
        terminated: bool,
        truncated: bool,
    ) -> Answer:
        if self._translate is not None:
            try:
                observations, infos = self._translate(observations, infos)
            except ContractError as error:
                raise self._error(str(error)) from error
        joined = np.empty(self.spec.observation_slices[-1].stop, np.float32)
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as that
            for name, columns in zip(self._names, self.spec.observation_slices, strict=True):
                self._fill(joined[columns], observations[name], "observation", name)
            checked_state = joined
            if state is not None:
                checked_state = np.empty(self.spec.state_size, np.float32)
                self._fill(checked_state, state, "state")
        if not np.isfinite(joined).all():
            for name, columns in zip(self._names, self.spec.observation_slices, strict=True):
                self._require_finite(joined[columns], "observation", name)
        self._require_finite(checked_state, "state")
        mask = self._masks(infos) if self.spec.action_kind == "discrete" else None
        told = self._told(infos.get(self._names[0]), reward, truncated)
        return Answer(joined, checked_state, mask, reward, terminated, truncated, told)

    def _parts(self, answer: Any, names: tuple[str, ...]) -> list[Mapping[str, Any]]:
        """Divide an answer into its dictionaries; infos alone may leave agents out, and hold others."""
        if not isinstance(answer, tuple) or len(answer) != len(names):
            got = f"{len(answer)} values" if isinstance(answer, tuple) else f"a {type(answer).__name__}"
            raise self._error(f"expected the tuple ({', '.join(names)}), got {got}")
        for name, part in zip(names, answer, strict=True):
            if not isinstance(part, Mapping):
                raise self._error(f"{name}: expected a dictionary by agent, got {_describe(part)}")
            if name != "infos":
                self._require_agents(name, part)
        return list(answer)

    def _require_agents(self, part: str, values: Mapping[str, Any]) -> None:
        if values.keys() == self._team:
            return
        for name in self._names:
            if name not in values:
                raise self._error(
                    f"{name} is not among the {part} ({', '.join(map(str, values)) or 'none'}): expected all of "
                    f"{', '.join(self._names)} in every step. An agent that has nothing left to do stays, with its "
                    "last observation, until the team's episode ends"
                )
        strangers = [name for name in values if name not in self._names]
        raise self._error(
            f"{strangers[0]!r} is among the {part}: expected {', '.join(self._names)} alone; leave it out"
        )

    def _fill(self, row: NDArray[np.float32], value: Any, what: str, agent: str = "") -> None:
        """Write a vector of numbers, which is ``what`` of ``agent``, into ``row``, whose length it must have."""
        try:
            values = np.asarray(value)
        except ValueError:  # rows of unequal lengths
            values = np.empty(0, object)
        if values.dtype.kind not in _NUMBERS or values.shape != row.shape:
            raise self._error(f"{_of(what, agent)}: expected numbers [{len(row)}], got {_describe(value)}")
        row[:] = values

    def _require_finite(self, values: NDArray[Any], what: str, agent: str = "") -> None:
        if not (finite := np.isfinite(values)).all():
            entry = int(np.argmin(finite))
            raise self._error(
                f"{_of(what, agent)}: expected finite numbers, got {values[entry]} in entry {entry}"
            )

    def _joined_reward(self, rewards: Mapping[str, Any]) -> float:
        numbers = []
        for name in self._names:
            reward = rewards[name]
            if not isinstance(reward, float):  # which np.float64 is, too
                value = np.asarray(reward)
                if value.dtype.kind not in _NUMBERS or value.shape != ():
                    raise self._error(f"reward of {name}: expected one number, got {_describe(reward)}")
                reward = float(value)
            if not math.isfinite(reward):
                raise self._error(f"reward of {name}: expected a finite number, got {reward}")
            numbers.append(float(reward))
        if self._reward == "shared":
            if other := _different(self._names, numbers):
                raise self._error(
                    f"the reward of {other[0]} is {other[1]}, that of {self._names[0]} {numbers[0]}: expected one "
                    "reward for the team. Choose how they join, with --reward sum or mean, or reward= of "
                    "from_parallel"
                )
            return numbers[0]
        total = sum(numbers)
        return total if self._reward == "sum" else total / len(numbers)

    def _common(self, part: str, values: Mapping[str, Any]) -> bool:
        """Return the flag that all agents share."""
        flags = []
        for name in self._names:
            flag = values[name]
            if not isinstance(flag, bool):
                number = np.asarray(flag)
                if number.shape != () or number.dtype.kind not in "biu" or number not in (0, 1):
                    raise self._error(f"{part} of {name}: expected True or False, got {_describe(flag)}")
            flags.append(bool(flag))
        if other := _different(self._names, flags):
            raise self._error(
                f"{part} of {other[0]} is {other[1]}, of {self._names[0]} {flags[0]}: expected one end for the "
                "team. An agent that is done stays, with its last observation, until all are"
            )
        return flags[0]

    def _told(self, info: Any, reward: float, truncated: bool) -> dict[str, Any]:
        """Return the scalars of the first agent's info; those whose names have a meaning are True or False."""
        told = _scalars(info)
        for name in (*OUTCOMES, DISCARDED):
            if isinstance(info, Mapping) and name in info:
                number = np.asarray(info[name])
                if number.shape != () or number.dtype.kind not in _NUMBERS or number not in (0, 1):
                    raise self._error(
                        f"{name} in the info of {self._names[0]}: expected True or False, got "
                        f"{_describe(info[name])}: report that, or give what else it is another name"
                    )
                told[name] = bool(number)
        if told.get(DISCARDED) and (reward or not truncated):
            raise self._error(
                f"{DISCARDED} in the info of {self._names[0]}: expected a truncation with reward 0 where it is "
                f"True, got {'a truncation' if truncated else 'none'} and reward {reward}: end lost episodes so, "
                "and leave it out of others"
            )
        return told

    def _masks(self, infos: Mapping[str, Any]) -> NDArray[np.uint8]:
        """Join the agents' masks; without any, all choices are available."""
        masks = np.ones(self.spec.action_slices[-1].stop, np.uint8)
        given = {
            name: infos[name]["action_mask"]
            for name in self._names
            if isinstance(infos.get(name), Mapping) and "action_mask" in infos[name]
        }
        if not given:
            return masks
        for agent, columns in zip(self.spec.agents, self.spec.action_slices, strict=True):
            if agent.name not in given:
                raise self._error(
                    f"{agent.name} has no action_mask in its info, other agents have: give one to each, or to none"
                )
            row = np.empty(agent.action.size, np.float32)
            self._fill(row, given[agent.name], "action_mask", agent.name)
            if not (row * row == row).all() or not row.any():
                raise self._error(
                    f"action_mask of {agent.name}: expected 0 and 1, with at least one 1, got {row.tolist()}"
                )
            masks[columns] = row
        return masks

    def _choice(self, name: str, action: Any, mask: NDArray[np.uint8]) -> int:
        choice = np.asarray(action)
        whole = choice.shape == () and choice.dtype.kind in "iu"
        if not whole or not 0 <= choice < len(mask) or not mask[choice]:
            raise self._error(
                f"action of {name}: expected one of the available {np.flatnonzero(mask).tolist()}, got {action!r}"
            )
        return int(choice)

    def _error(self, message: str) -> ContractError:
        where = f"step {self.steps}" if self.steps else "reset"
        return ContractError(f"{self.spec.task}, {where}: {message}")


def require_sound(spec: TeamSpec, num_envs: int, step: VectorStep, ages: NDArray[np.int64]) -> None:
    """Check the answer of ``num_envs`` environments, whose episodes are ``ages`` [E] steps old.

    Raises :class:`ContractError` for shapes, types and numbers that do not fit, naming environment and step.
    """

    def require(values: NDArray[Any], shape: tuple[int, ...], kind: str, what: str, agent: str = "") -> None:
        if values.shape != shape or values.dtype.kind != kind:
            expected = f"{'bool' if kind == 'b' else 'numbers'} {list(shape)}"
            raise ContractError(
                f"{spec.task}: {_of(what, agent)}: expected {expected}, got {_describe(values)}"
            )
        # A finite sum proves finite terms, at half the price of looking at each.
        if kind == "f" and not math.isfinite(values.sum()) and not (finite := np.isfinite(values)).all():
            environment = int(np.argmin(finite.reshape(num_envs, -1).all(axis=1)))
            raise ContractError(
                f"{spec.task}, environment {environment}, step {ages[environment]}: {_of(what, agent)}: expected "
                "finite numbers, got NaN or infinity"
            )

    for agent in spec.agents:
        if agent.name not in step.observations:
            raise ContractError(
                f"{spec.task}: {agent.name} is not among the observations ({', '.join(step.observations)})"
            )
        shape = (num_envs, agent.observation_size)
        require(step.observations[agent.name], shape, "f", "observation", agent.name)
    require(step.state, (num_envs, spec.state_size), "f", "state")
    require(step.reward, (num_envs,), "f", "reward")
    require(step.terminated, (num_envs,), "b", "terminated")
    require(step.truncated, (num_envs,), "b", "truncated")
    for name in step.info.keys() & {*OUTCOMES, DISCARDED}:
        values = np.asarray(step.info[name])
        if (
            values.shape != (num_envs,)
            or values.dtype.kind not in _NUMBERS
            or not ((values == 0) | (values == 1)).all()
        ):
            raise ContractError(f"{spec.task}: {name}: expected bool [{num_envs}], got {_describe(values)}")
        if (
            name == DISCARDED
            and (wrong := values.astype(np.bool_) & ~(step.truncated & (step.reward == 0))).any()
        ):
            environment = int(np.argmax(wrong))
            raise ContractError(
                f"{spec.task}, environment {environment}, step {ages[environment]}: {name}: expected a truncation "
                "with reward 0 where it is True, got another step"
            )


def _of(what: str, agent: str) -> str:
    return f"{what} of {agent}" if agent else what


def _different(names: Iterable[str], values: list[Any]) -> tuple[str, Any] | None:
    """Return the first agent whose value is not the first agent's, with its value."""
    return next(
        ((name, value) for name, value in zip(names, values, strict=True) if value != values[0]), None
    )


def _scalars(info: Any) -> dict[str, Any]:
    return {
        name: value
        for name, value in (info.items() if isinstance(info, Mapping) else ())
        if isinstance(value, bool | int | float | np.bool_ | np.number)
    }


def _describe(value: Any) -> str:
    """Describe a value by its type, and by its shape if it has one."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, list | tuple | dict | set):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 40 else f"a {type(value).__name__}"
