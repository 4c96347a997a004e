"""Team specifications: the agents in order, their observations and actions, and the control rate.

A :class:`TeamSpec` is the contract between a simulator, a dataset, a bundle, a policy server and a client. Its
:attr:`~TeamSpec.contract_hash` is compared wherever two of them meet, and :func:`require_same_contract` names
the first fields in which they differ.

Shape letters used in every docstring of this package: B batch (also E, parallel episodes), T time, N agents,
O observation size, A action size (continuous) or number of actions (discrete), S state size.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.errors import ConfigError, ContractError

ActionKind = Literal["continuous", "discrete"]
# A vector of smaller variance has entries that are equal up to float32 rounding; they become (nearly) zeros.
LEAST_VARIANCE = 1e-12
_AGENT_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
# The type of every observation, noise and continuous action, in files, in graphs and on the wire.
DTYPE = "float32"


@dataclass(frozen=True)
class ActionSpec:
    """Actions of one agent: ``size`` numbers in [low, high], or one of ``size`` choices under a mask.

    Raises :class:`ConfigError` for an unknown kind, a size below 1, and bounds that leave no range.
    """

    kind: ActionKind
    size: int
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("continuous", "discrete"):
            raise ConfigError(f"ActionSpec.kind: expected 'continuous' or 'discrete', got {self.kind!r}")
        if isinstance(self.size, bool) or self.size < 1:
            raise ConfigError(f"ActionSpec.size: expected at least 1, got {self.size}")
        bounds = (self.low, self.high)
        if bool in map(type, bounds) or not -math.inf < self.low < self.high < math.inf:
            raise ConfigError(
                f"ActionSpec: expected finite bounds with low < high, got low {self.low} and high {self.high}"
            )

    def __str__(self) -> str:
        if self.kind == "discrete":
            return f"an integer from 0 to {self.size - 1}"
        return f"numbers from {self.low:g} to {self.high:g}"

    def admits(self, actions: NDArray[Any]) -> bool:
        """Tell if all actions [..., A], or all choices [...], lie in the range, up to rounding."""
        lowest, highest = actions.min(), actions.max()  # nan where one is nan
        if self.kind == "discrete":
            return actions.dtype.kind in "iu" and bool(lowest >= 0 and highest < self.size)
        slack = 1e-6 * (self.high - self.low)
        return bool(lowest >= self.low - slack and highest <= self.high + slack)


@dataclass(frozen=True)
class AgentSpec:
    """One agent: its name, the length of its observation vector, and its actions.

    Raises :class:`ConfigError` for an observation without numbers.
    """

    name: str
    observation_size: int
    action: ActionSpec

    def __post_init__(self) -> None:
        if isinstance(self.observation_size, bool) or self.observation_size < 1:
            raise ConfigError(
                f"AgentSpec.observation_size of {self.name}: expected at least 1, got {self.observation_size}"
            )


@dataclass(frozen=True)
class Normalizer:
    """Map from a simulator's raw observation to the one that policies see.

    ``none`` is the identity. ``per-vector-standardize`` is ``(x - mean(x)) / std(x)`` over the entries of each
    vector, OMIGA's recipe (docs/simulators.md#observations). It is idempotent, so the exported graph applies it to
    raw and to normalised observations alike. Raises :class:`ConfigError` for any other kind.
    """

    kind: Literal["none", "per-vector-standardize"] = "none"

    def __post_init__(self) -> None:
        if self.kind not in ("none", "per-vector-standardize"):
            raise ConfigError(
                f"Normalizer.kind: expected 'none' or 'per-vector-standardize', got {self.kind!r}"
            )

    @property
    def digest(self) -> str:
        """Short hash of the kind, as the contract lists it."""
        return hashlib.sha256(self.kind.encode()).hexdigest()[:16]

    def apply(self, vectors: NDArray[Any]) -> NDArray[Any]:
        """Normalise observations: ``[..., O] -> [..., O]``, of the same floating type."""
        if self.kind == "none":
            return vectors
        centered = vectors - vectors.mean(axis=-1, keepdims=True)
        variance = (centered * centered).mean(axis=-1, keepdims=True)
        normalised: NDArray[Any] = centered / np.sqrt(np.maximum(variance, LEAST_VARIANCE))
        return normalised


@dataclass(frozen=True)
class TeamSpec:
    """The agents of a task, in the order of every joined vector.

    ``control_rate`` is in Hz. ``state_size`` is the length S of the centralised state that mixers are trained on;
    servers never see it. ``episode_limit`` is in steps. The contract that two sides must share (:meth:`contract`)
    consists of agents, normaliser and control rate; ``task`` is a label. Raises :class:`ConfigError` for a team
    without agents, with two agents of one name, with a name that no folder can have, or with both kinds of actions,
    and for a state, a rate or a limit that is not above 0.
    """

    task: str
    agents: tuple[AgentSpec, ...]
    state_size: int
    control_rate: float
    normalizer: Normalizer = Normalizer()
    episode_limit: int = 1000

    def __post_init__(self) -> None:
        if not self.agents:
            raise ConfigError("TeamSpec.agents: expected at least one agent, got none")
        if len({agent.name for agent in self.agents}) != len(self.agents):
            raise ConfigError(f"TeamSpec.agents: names must be distinct, got {[a.name for a in self.agents]}")
        if odd := [name for name in self.names if not _AGENT_NAME.fullmatch(name) or name == "team"]:
            raise ConfigError(
                f"TeamSpec.agents: expected names of letters, digits, '_', '-' and '.', and none called team, as "
                f"folders of a bundle and served models have them; got {odd[0]!r}"
            )
        if len({agent.action.kind for agent in self.agents}) != 1:
            raise ConfigError("TeamSpec.agents: all agents must share one action kind")
        sizes = (self.state_size, self.episode_limit)
        if bool in map(type, sizes) or min(sizes) < 1:
            raise ConfigError(
                f"TeamSpec: expected a state_size and an episode_limit of at least 1, got {self.state_size} and "
                f"{self.episode_limit}"
            )
        if isinstance(self.control_rate, bool) or not 0 < self.control_rate < math.inf:
            raise ConfigError(
                f"TeamSpec.control_rate: expected a number of Hz above 0, got {self.control_rate}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the agents in team order."""
        return tuple(agent.name for agent in self.agents)

    @property
    def action_kind(self) -> ActionKind:
        """The one kind of actions that all agents share."""
        return self.agents[0].action.kind

    @property
    def observation_size(self) -> int:
        """Length of the longest observation, to which shared networks pad the others."""
        return max(agent.observation_size for agent in self.agents)

    @property
    def action_size(self) -> int:
        """Largest action size of any agent, to which shared networks pad the others."""
        return max(agent.action.size for agent in self.agents)

    @cached_property
    def observation_slices(self) -> tuple[slice, ...]:
        """Position of each agent's observation in a joined vector [sum of O_i], in team order."""
        return _consecutive_slices(agent.observation_size for agent in self.agents)

    @cached_property
    def action_slices(self) -> tuple[slice, ...]:
        """Position of each agent's entries in a joined vector [sum of A_i], in team order.

        Such vectors are continuous actions, noise, distribution parameters and, for discrete tasks, masks and
        logits; a joined discrete action [N] has one entry per agent instead.
        """
        return _consecutive_slices(agent.action.size for agent in self.agents)

    def squashed(self, actions: NDArray[Any]) -> NDArray[Any]:
        """Map actions [..., N, A] from the agents' bounds to [-1, 1], in which policies are trained.

        Numbers behind a short action become 0. Where nothing changes, as with choices, the result is ``actions``.
        """
        if self.action_kind == "discrete":
            return actions
        if (limits := self._limits) is not None:
            center, half_range = limits
            actions = ((actions - center) / half_range).astype(actions.dtype)
        sizes = np.array([[agent.action.size] for agent in self.agents])
        padding = np.arange(self.action_size) >= sizes
        return np.where(padding, 0, actions).astype(actions.dtype) if padding.any() else actions

    def unsquashed(self, actions: NDArray[Any]) -> NDArray[Any]:
        """Map continuous actions [..., N, A] from [-1, 1] to the agents' bounds, as an exported policy does."""
        if (limits := self._limits) is None:
            return actions
        center, half_range = limits
        scaled: NDArray[Any] = (center + half_range * actions).astype(actions.dtype)
        return scaled

    @property
    def _limits(self) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """Center and half of each agent's range of actions, both [N, 1]; None where all are [-1, 1]."""
        low = np.array([[agent.action.low] for agent in self.agents])
        high = np.array([[agent.action.high] for agent in self.agents])
        if (low == -1.0).all() and (high == 1.0).all():
            return None
        return (high + low) / 2.0, (high - low) / 2.0

    def agent(self, name: str) -> AgentSpec:
        """The agent of that name. Raises :class:`ContractError` where the team has none."""
        for agent in self.agents:
            if agent.name == name:
                return agent
        raise ContractError(f"unknown agent {name!r}: the team of {self.task} is {', '.join(self.names)}")

    def contract(self) -> dict[str, Any]:
        """Fields that two sides must agree on, as plain JSON values in a fixed order."""
        return {
            "agents": [
                {
                    "name": agent.name,
                    "observation_size": agent.observation_size,
                    "action_kind": agent.action.kind,
                    "action_size": agent.action.size,
                    "action_low": agent.action.low,
                    "action_high": agent.action.high,
                }
                for agent in self.agents
            ],
            "dtype": DTYPE,
            "normalizer": {"kind": self.normalizer.kind, "digest": self.normalizer.digest},
            "control_rate": self.control_rate,
        }

    @property
    def contract_hash(self) -> str:
        """SHA-256 of :meth:`contract` in canonical JSON, as hexadecimal digits."""
        canonical = json.dumps(self.contract(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values, as bundles, datasets and run folders store them."""
        return {
            "task": self.task,
            **self.contract(),
            "state_size": self.state_size,
            "episode_limit": self.episode_limit,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TeamSpec:
        """Read what :meth:`to_json` wrote.

        Raises :class:`ContractError` for missing fields and other types, :class:`ConfigError` for other values.
        """
        try:
            return cls(
                task=str(data["task"]),
                agents=tuple(
                    AgentSpec(
                        name=str(agent["name"]),
                        observation_size=_whole(agent["observation_size"]),
                        action=ActionSpec(
                            kind=agent["action_kind"],
                            size=_whole(agent["action_size"]),
                            low=_number(agent["action_low"]),
                            high=_number(agent["action_high"]),
                        ),
                    )
                    for agent in data["agents"]
                ),
                state_size=_whole(data["state_size"]),
                control_rate=_number(data["control_rate"]),
                normalizer=Normalizer(data["normalizer"]["kind"]),
                episode_limit=_whole(data["episode_limit"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:  # the last for infinity
            raise ContractError(f"not a team spec: {type(error).__name__} {error}") from error


def _whole(number: Any) -> int:
    """Read a whole number. Raises :class:`ValueError` for one with decimals, which int() would cut off."""
    if isinstance(number, bool) or number != int(number):
        raise ValueError(f"expected a whole number, got {number}")
    return int(number)


def _number(value: Any) -> float:
    """Read a number. Raises :class:`ValueError` for true and false, which float() would take."""
    if isinstance(value, bool):
        raise ValueError(f"expected a number, got {value}")
    return float(value)


def _consecutive_slices(sizes: Iterable[int]) -> tuple[slice, ...]:
    slices = []
    start = 0
    for size in sizes:
        slices.append(slice(start, start + size))
        start += size
    return tuple(slices)


def _differences(ours: Any, theirs: Any, path: str) -> list[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [
            line
            for key in sorted(ours.keys() | theirs.keys())
            for line in _differences(ours.get(key), theirs.get(key), f"{path}.{key}" if path else key)
        ]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        return [
            line
            for index, (a, b) in enumerate(zip(ours, theirs, strict=True))
            for line in _differences(a, b, f"{path}[{index}]")
        ]
    if isinstance(ours, list) and isinstance(theirs, list):
        return [f"{path}: {len(ours)} entries against {len(theirs)}"]
    return [] if ours == theirs else [f"{path}: {ours!r} against {theirs!r}"]


def require_same_contract(ours: TeamSpec, theirs: TeamSpec, ours_is: str, theirs_is: str) -> None:
    """Raise :class:`ContractError`, naming the fields that differ, unless both specs have one contract hash."""
    if ours.contract_hash == theirs.contract_hash:
        return
    fields = "; ".join(_differences(ours.contract(), theirs.contract(), "")[:3])
    raise ContractError(
        f"{ours_is} ({ours.task}) and {theirs_is} ({theirs.task}) do not fit together: {fields}. "
        "Use a bundle, dataset and task that were made for each other"
    )
