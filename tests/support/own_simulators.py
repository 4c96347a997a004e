"""Simulators as users write them, under ``tests.support.own_simulators:…``, and hostile ones that break rules."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Space
from numpy.typing import NDArray

from omcda_deploy.envs.adapters.parallel import from_parallel
from omcda_deploy.spec import ActionSpec, AgentSpec, TeamSpec

LENGTH = 12
SPEC = TeamSpec(
    task="reach",
    agents=(
        AgentSpec("base", 3, ActionSpec("continuous", 1)),
        AgentSpec("arm", 5, ActionSpec("continuous", 2, -2.0, 2.0)),
        AgentSpec("eye", 3, ActionSpec("continuous", 1)),
    ),
    state_size=3,
    control_rate=20.0,
    episode_limit=LENGTH,
)
CHOICES = replace(
    SPEC,
    agents=tuple(replace(agent, action=ActionSpec("discrete", 2 + i)) for i, agent in enumerate(SPEC.agents)),
)
Spoil = Callable[[int, Any], Any]  # (step, answer) -> answer; step 0 is the reset


class Reach:
    """A base, an arm and an eye that bring a point to the origin, in episodes of 12 steps."""

    spec = SPEC

    def __init__(self, spoil: Spoil | None = None) -> None:
        self._spoil = spoil or (lambda step, answer: answer)
        self._agents = {agent.name: agent.observation_size for agent in SPEC.agents}
        self._x: NDArray[np.float64] = np.zeros(3)
        self._steps = 0

    def reset(self, seed: int | None = None) -> Any:
        self._x, self._steps = np.random.default_rng(seed).normal(size=3), 0
        return self._spoil(0, (self.observe(), self.infos()))

    def step(self, actions: Mapping[str, Any]) -> Any:
        self._x = 0.9 * self._x + 0.1 * self.push(actions)
        self._steps += 1
        reward, over = -float((self._x**2).sum()), self._steps >= LENGTH
        shared = (dict.fromkeys(self._agents, value) for value in (reward, False, over))
        return self._spoil(self._steps, (self.observe(), *shared, self.infos()))

    def state(self) -> Any:
        return self._x.astype(np.float32)

    def close(self) -> None: ...

    def push(self, actions: Mapping[str, Any]) -> NDArray[np.float64]:
        """The forces of all agents [3]."""
        assert list(actions) == list(self._agents)
        return np.concatenate([actions["base"], actions["arm"][:1] - actions["arm"][1:], actions["eye"]])

    def observe(self) -> dict[str, Any]:
        wide = np.concatenate([self._x, self._x[:2] ** 2])
        return {name: wide[:size] for name, size in self._agents.items()}

    def infos(self) -> dict[str, Any]:
        return {name: {} for name in self._agents}


class Choose(Reach):
    """The same with choices, of which the first is not available to the arm while the point is on its right."""

    spec = CHOICES

    def push(self, actions: Mapping[str, Any]) -> NDArray[np.float64]:
        assert all(type(action) is int for action in actions.values())
        return np.array([actions[name] - 1.0 for name in self._agents])

    def infos(self) -> dict[str, Any]:
        masks = {name: np.ones(2 + i, np.int8) for i, name in enumerate(self._agents)}
        masks["arm"][0] = self._x[1] < 0.0
        return {name: {"action_mask": mask} for name, mask in masks.items()}


class ParallelReach:
    """:class:`Reach` as PettingZoo describes it: spaces instead of a spec, bounds that differ between entries."""

    possible_agents = ("base", "arm", "eye")
    metadata = {"render_fps": 50}  # noqa: RUF012
    max_cycles = LENGTH
    observation_spaces = {  # noqa: RUF012
        agent.name: Box(-np.inf, np.inf, (agent.observation_size,), np.float64) for agent in SPEC.agents
    }
    action_spaces: dict[str, Space[Any]] = {  # noqa: RUF012
        "base": Box(-1.0, 3.0, (1,)),
        "arm": Box(np.array([-1.0, 0.0], np.float32), np.array([1.0, 10.0], np.float32)),
        "eye": Box(-1.0, 1.0, (1,)),
    }

    def __init__(self, spoil: Spoil | None = None) -> None:
        self.inner = Reach(spoil)
        self.received: list[Mapping[str, Any]] = []

    def reset(self, seed: int | None = None, options: Any = None) -> Any:
        return self.inner.reset(seed)

    def step(self, actions: Mapping[str, Any]) -> Any:
        self.received.append(actions)
        assert all(self.action_spaces[name].contains(action) for name, action in actions.items())
        return self.inner.step(actions)


class MaskedChoose:
    """:class:`Choose` with PettingZoo's masks beside the observation, choices that start at 5, and a state."""

    possible_agents = ("base", "arm", "eye")
    state_space = Box(-np.inf, np.inf, (3,), np.float32)

    def __init__(self) -> None:
        self.inner = Choose()

    def observation_space(self, agent: str) -> Any:
        inner: Any = Dict({"where": ParallelReach.observation_spaces[agent], "phase": Discrete(3)})
        return Dict({"observation": inner, "action_mask": Box(0, 1, (self._size(agent),), np.int8)})

    def action_space(self, agent: str) -> Any:
        return Discrete(self._size(agent), start=5)

    def reset(self, seed: int | None = None) -> Any:
        observations, infos = self.inner.reset(seed)
        return self._masked(observations, infos), {}

    def step(self, actions: Mapping[str, Any]) -> Any:
        observations, *rest, infos = self.inner.step({name: action - 5 for name, action in actions.items()})
        return self._masked(observations, infos), *rest, {"base": {"won": True}}

    def state(self) -> Any:
        return self.inner.state()

    def _size(self, agent: str) -> int:
        return 2 + self.possible_agents.index(agent)

    def _masked(self, observations: Any, infos: Any) -> Any:
        return {
            name: {"observation": {"where": value, "phase": 1}, **infos[name]}
            for name, value in observations.items()
        }


# -- what is no environment -----------------------------------------------------------------------------------

number = 3


def nothing() -> None:
    """A function that forgot its return."""


def needs(port: int) -> Reach:
    return Reach()


def broken() -> Reach:
    raise ZeroDivisionError("no power")


ONE = Reach()
ADAPTED = from_parallel(ParallelReach())


class Slotted:
    """An environment that no weak reference can be made to."""

    __slots__ = ("reset", "state", "step")
    spec = SPEC

    def __init__(self) -> None:
        inner = Reach()
        self.reset, self.step, self.state = inner.reset, inner.step, inner.state


SLOTTED = Slotted()


class Wrapped(ParallelReach):
    """A new wrapper at each call, around one environment."""

    unwrapped = ONE


def the_same() -> Reach:
    return ONE


def the_same_adapted() -> Any:
    return ADAPTED


def the_same_slotted() -> Slotted:
    return SLOTTED


def with_render_mode(render_mode: str | None = None) -> Reach:
    return Reach()


class Stateless:
    """An environment whose spec has a state that no method gives."""

    spec = SPEC

    def reset(self, seed: int | None = None) -> Any: ...
    def step(self, actions: Any) -> Any: ...


class TakesTurns(ParallelReach):
    """An AECEnv by its methods."""

    def agent_iter(self) -> Any: ...


class OddSpaces(ParallelReach):
    """An action that is neither a vector nor a choice."""

    action_spaces = {**ParallelReach.action_spaces, "arm": MultiDiscrete([2, 3])}  # noqa: RUF012


class Unbounded(ParallelReach):
    action_spaces = {**ParallelReach.action_spaces, "arm": Box(-np.inf, np.inf, (2,))}  # noqa: RUF012


# -- environments that break the rules in step 5 --------------------------------------------------------------


def _replaced(part: int, name: str, value: Any) -> Spoil:
    """Give one agent another value in one dictionary of an answer."""

    def spoil(step: int, answer: Any) -> Any:
        parts = [dict(values) for values in answer]
        parts[part][name] = value
        return tuple(parts)

    return spoil


def _removed(*parts: int, name: str = "arm") -> Spoil:
    def spoil(step: int, answer: Any) -> Any:
        left = [{k: v for k, v in values.items() if k != name} for values in answer]
        return tuple(left[i] if i in parts else answer[i] for i in range(5))

    return spoil


OBSERVATIONS, REWARDS, TERMINATIONS, TRUNCATIONS, INFOS = range(5)
EVERYTHING = (OBSERVATIONS, REWARDS, TERMINATIONS, TRUNCATIONS, INFOS)
NAN = float("nan")
HOSTILE: dict[str, tuple[Spoil, str]] = {  # in step 5: what is done to the answer, and what is said of it
    "other reward": (
        _replaced(REWARDS, "arm", 1.0),
        r"the reward of arm is 1\.0, that of base -.*--reward sum",
    ),
    "reward nan": (_replaced(REWARDS, "eye", NAN), "reward of eye: expected a finite number, got nan"),
    "reward infinite": (
        _replaced(REWARDS, "base", np.inf),
        "reward of base: expected a finite number, got inf",
    ),
    "reward vector": (
        _replaced(REWARDS, "eye", np.ones(1)),
        r"reward of eye: expected one number, got float64 \[1\]",
    ),
    "reward text": (_replaced(REWARDS, "arm", "1"), "reward of arm: expected one number, got '1'"),
    "reward none": (_replaced(REWARDS, "arm", None), "reward of arm: expected one number, got None"),
    "reward missing": (
        _removed(REWARDS),
        r"arm is not among the rewards \(base, eye\): expected all of base, arm",
    ),
    "one terminates": (_replaced(TERMINATIONS, "arm", True), "terminations of arm is True, of base False"),
    "the first terminates": (
        _replaced(TERMINATIONS, "base", True),
        "terminations of arm is False, of base True",
    ),
    "one is truncated": (_replaced(TRUNCATIONS, "eye", True), "truncations of eye is True, of base False"),
    "end is text": (
        _replaced(TERMINATIONS, "eye", "no"),
        "terminations of eye: expected True or False, got 'no'",
    ),
    "end is a number": (
        _replaced(TRUNCATIONS, "eye", 2),
        "truncations of eye: expected True or False, got 2",
    ),
    "one dies": (
        _removed(*EVERYTHING),
        "arm is not among the observations .*stays, with its last observation",
    ),
    "the first dies": (_removed(*EVERYTHING, name="base"), "base is not among the observations"),
    "the last dies": (_removed(*EVERYTHING, name="eye"), "eye is not among the observations"),
    "all die": (
        lambda step, answer: ({}, {}, {}, {}, {}),
        r"base is not among the observations \(none\)",
    ),
    "extra agent": (
        _replaced(OBSERVATIONS, "leg", np.ones(3)),
        "'leg' is among the observations: .*leave it out",
    ),
    "end of all": (_replaced(TERMINATIONS, "__all__", False), "'__all__' is among the terminations"),
    "observation nan": (
        _replaced(OBSERVATIONS, "arm", np.array([0, 0, 0, NAN, 0])),
        "observation of arm: expected finite numbers, got nan in entry 3",
    ),
    "observation too large": (
        _replaced(OBSERVATIONS, "eye", np.array([0, 1e300, 0])),
        "observation of eye: expected finite numbers, got inf in entry 1",
    ),
    "observation too long": (
        _replaced(OBSERVATIONS, "eye", np.ones(4)),
        r"observation of eye: expected numbers \[3\], got float64 \[4\]",
    ),
    "observation 2-d": (
        _replaced(OBSERVATIONS, "eye", np.ones((1, 3))),
        r"observation of eye: expected numbers \[3\], got float64 \[1, 3\]",
    ),
    "observation text": (
        _replaced(OBSERVATIONS, "base", list("abc")),
        "observation of base: .* got a list of 3",
    ),
    "observation none": (_replaced(OBSERVATIONS, "base", None), "observation of base: .* got None"),
    "observation complex": (
        _replaced(OBSERVATIONS, "base", np.ones(3, complex)),
        r"observation of base: .* got complex128 \[3\]",
    ),
    "observation ragged": (
        _replaced(OBSERVATIONS, "base", [[1.0], [1.0, 2.0], []]),
        "observation of base: .* got a list of 3",
    ),
    "observations joined": (
        lambda step, answer: (np.ones(11), *answer[1:]),
        r"observations: expected a dictionary by agent, got float64 \[11\]",
    ),
    "four values": (
        lambda step, answer: answer[:4],
        r"expected the tuple \(observations, rewards, terminations, truncations, infos\), got 4 values",
    ),
    "no answer": (lambda step, answer: None, "expected the tuple .*, got a NoneType"),
    **{
        f"{name} {value!r}": (
            _replaced(INFOS, "base", {name: value}),
            f"{name} in the info of base: expected True or False, got .*: report that, or give",
        )
        for name, value in (
            ("won", -1),
            ("fell", NAN),
            ("stalled", 0.5),
            ("won", None),
            ("discarded", "yes"),
            ("discarded", [True]),
        )
    },
    "discarded under way": (
        _replaced(INFOS, "base", {"discarded": True}),
        "discarded in the info of base: expected a truncation with reward 0 .*, got none and reward -",
    ),
    "discarded with a reward": (
        lambda step, answer: (*answer[:3], dict.fromkeys(answer[3], True), {"base": {"discarded": 1}}),
        "discarded in the info of base: .*, got a truncation and reward -",
    ),
    "discarded at an end": (
        lambda step, answer: (
            answer[0],
            dict.fromkeys(answer[1], 0.0),
            *(dict.fromkeys(answer[2], True) for _ in range(2)),
            {"base": {"discarded": True}},
        ),
        "discarded in the info of base: .*, got none and reward 0",
    ),
    "infos none": (
        lambda step, answer: (*answer[:4], None),
        "infos: expected a dictionary by agent, got None",
    ),
}
MASKS: dict[str, tuple[Spoil, str]] = {
    "nothing available": (
        _replaced(INFOS, "arm", {"action_mask": np.zeros(3)}),
        r"action_mask of arm: expected 0 and 1, with at least one 1, got \[0\.0, 0\.0, 0\.0\]",
    ),
    "mask of twos": (
        _replaced(INFOS, "eye", {"action_mask": [2, 1, 0, 0]}),
        "action_mask of eye: expected 0 and 1",
    ),
    "mask too short": (
        _replaced(INFOS, "eye", {"action_mask": np.ones(3)}),
        r"action_mask of eye: expected numbers \[4\], got float64 \[3\]",
    ),
    "one without a mask": (
        _replaced(INFOS, "arm", {}),
        "arm has no action_mask in its info, other agents have",
    ),
}


def hostile(case: str = "") -> Reach:
    """Make an environment that spoils its fifth step as ``case`` says."""
    spoil, _ = {**HOSTILE, **MASKS}[case]
    kind = Choose if case in MASKS else Reach
    return kind(lambda step, answer: spoil(step, answer) if step == 5 else answer)


def takes_no_seed() -> Any:
    """Make an environment whose reset has no argument."""
    environment: Any = Reach()
    environment.reset = lambda: None
    return environment


def raises() -> Reach:
    """Make an environment whose fifth step fails."""

    def spoil(step: int, answer: Any) -> Any:
        motors: dict[str, Any] = {}
        return motors["torque"] if step == 5 else answer

    return Reach(spoil)


def leaves() -> Reach:
    """Make an environment whose fifth step ends the program, as if all were well."""

    def spoil(step: int, answer: Any) -> Any:
        return sys.exit() if step == 5 else answer

    return Reach(spoil)


class Clinging(Reach):
    """An environment that raises when it is closed; ``closed`` has each that was."""

    closed: list[Clinging] = []  # noqa: RUF012

    def close(self) -> None:
        self.closed.append(self)
        raise OSError("the port is gone")


def clinging_and_hostile() -> Clinging:
    return Clinging(lambda step, answer: HOSTILE["one dies"][0](step, answer) if step == 5 else answer)


def unequal_rewards() -> Reach:
    """Make an environment that rewards its agents with 0, 1 and 2 in every step."""

    def spoil(step: int, answer: Any) -> Any:
        if step == 0:
            return answer
        rewards = {name: float(i) for i, name in enumerate(answer[REWARDS])}
        return (answer[0], rewards, *answer[2:])

    return Reach(spoil)


# -- policies -------------------------------------------------------------------------------------------------


def toward(observations: Mapping[str, NDArray[np.float32]]) -> dict[str, Any]:
    """Push the point towards the origin."""
    pushes = {name: -np.clip(values, -0.9, 0.9) for name, values in observations.items()}
    return {"base": pushes["base"][:1], "arm": np.array([pushes["arm"][1], 0.0]), "eye": pushes["eye"][2:]}


def last_available(observations: Any, action_masks: Mapping[str, NDArray[np.uint8]]) -> dict[str, Any]:
    return {name: int(np.flatnonzero(mask)[-1]) for name, mask in action_masks.items()}


def answers(value: Any) -> Callable[[Any], Any]:
    """Make a policy that always answers the same."""
    return lambda observations: value


too_far = answers({"base": [0.0], "arm": [0.0, 2.5], "eye": [0.0]})
not_finite = answers({"base": [NAN], "arm": [0.0, 0.0], "eye": [0.0]})
too_short = answers({"base": [0.0], "arm": [0.0], "eye": [0.0]})
forgetful = answers({"base": [0.0], "arm": [0.0, 0.0]})
silent = answers(None)


def failing(observations: Any) -> Any:
    return observations["leg"]


def leaving(observations: Any) -> Any:
    sys.exit(0)


def of_two(observations: Any, infos: Any) -> Any: ...
