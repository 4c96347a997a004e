"""Returns of behaviour policies: sampled and greedy play of a bundle, and the published returns to come near.

Recording samples actions, so ``sampled`` is what a dataset's returns will be. ``greedy`` play, the mean action or
the likeliest one, shows the skill below the noise: tiers that differ only in ``sampled`` differ in noise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from omcda_deploy.bundle import Bundle
from omcda_deploy.errors import ConfigError, UnknownNameError
from omcda_deploy.experiments.observer import Observer
from omcda_deploy.local import JointTeam
from omcda_deploy.play.evaluate import evaluate


@dataclass(frozen=True)
class Simulator:
    """Settings of the behaviour policies of one simulator."""

    module: str  # a BehaviorModule
    episodes: int  # played to measure a checkpoint
    digits: int  # of a return's fraction in the index


SIMULATORS = {  # by the first part of a task's name
    "mamujoco": Simulator("omcda_deploy.training.behavior.mujoco", episodes=20, digits=0),
    "mamujoco-khop1": Simulator("omcda_deploy.training.behavior.mujoco_khop", episodes=20, digits=0),
    # SMAX's episodes are short, and the share of them that is won needs many.
    "smax": Simulator("omcda_deploy.training.behavior.smax", episodes=200, digits=2),
}


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of a dataset's undiscounted returns."""

    mean: float
    std: float

    def distance(self, other: Moments) -> float:
        """2-Wasserstein distance of the normal distributions with these moments, in units of return."""
        return math.hypot(self.mean - other.mean, self.std - other.std)


# Returns of the published OMIGA datasets (docs/baselines.md#published-data), the targets of our tiers.
PUBLISHED_RETURNS = {
    "mamujoco/halfcheetah-6x1": {
        "medium": Moments(1425.66, 520.12),
        "expert": Moments(2785.10, 1053.14),
        "medium-replay": Moments(655.76, 590.40),
    },
    "mamujoco/hopper-3x1": {
        "medium": Moments(723.57, 211.66),
        "expert": Moments(2452.02, 1097.86),
        "medium-replay": Moments(746.42, 671.89),
    },
    "mamujoco/ant-2x4": {
        "medium": Moments(1418.70, 37.04),
        "expert": Moments(2055.07, 22.07),
        "medium-replay": Moments(1029.51, 141.27),
    },
}

PUBLISHED_MIXTURES = {  # of medium-expert, which has no policies of its own
    "mamujoco/halfcheetah-6x1": Moments(2105.38, 1073.24),
    "mamujoco/hopper-3x1": Moments(1190.61, 973.40),
    "mamujoco/ant-2x4": Moments(1736.88, 319.64),
}


@dataclass(frozen=True)
class Returns:
    """Undiscounted returns of episodes, their mean length, and the share of battles won where there are battles."""

    episodes: int
    return_mean: float
    return_std: float
    length_mean: float  # control steps
    win_rate: float | None = None

    @property
    def moments(self) -> Moments:
        return Moments(self.return_mean, self.return_std)

    def __str__(self) -> str:
        won = "" if self.win_rate is None else f", {self.win_rate:.1%} won"
        return f"{self.return_mean:g} ± {self.return_std:g}{won}"

    def to_json(self) -> dict[str, Any]:
        """Return the fields that have a value."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


@dataclass(frozen=True)
class PolicyReturns:
    """A policy's returns where actions are sampled, as in recording, and where it acts greedily."""

    sampled: Returns
    greedy: Returns

    def __str__(self) -> str:
        return f"return {self.sampled}; greedy {self.greedy}"

    def to_json(self) -> dict[str, Any]:
        """Return what :meth:`from_json` reads."""
        return {"sampled": self.sampled.to_json(), "greedy": self.greedy.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read :meth:`to_json`'s result. Raises :class:`ConfigError` for what another version wrote."""
        try:
            return cls(Returns(**data["sampled"]), Returns(**data["greedy"]))
        except (KeyError, TypeError) as error:
            raise ConfigError(f"expected returns of sampled and of greedy play, got {dict(data)}") from error


def simulator_of(task: str) -> Simulator:
    """Return the simulator of a task. Raises :class:`UnknownNameError` for one without behaviour policies."""
    name = task.partition("/")[0]
    if name not in SIMULATORS:
        raise UnknownNameError("simulator with behaviour policies", name, SIMULATORS)
    return SIMULATORS[name]


def measure_bundle(
    bundle: Bundle, label: str, workers: int = 2, observer: Observer | None = None
) -> PolicyReturns:
    """Play the episodes of the bundle's simulator twice, sampled and greedily, from the same starts.

    ``label`` names the policy to the observer.
    """
    sampled, greedy = (
        _play(bundle, label, temperature, workers, observer or Observer()) for temperature in (1.0, 0.0)
    )
    return PolicyReturns(sampled, greedy)


def mixture(parts: Sequence[Returns]) -> Moments:
    """Return the moments of a dataset that holds equally many transitions of each policy.

    A policy whose episodes are short has more of them.
    """
    weights = np.array([1.0 / part.length_mean for part in parts])
    means, stds = (
        np.array([getattr(part, name) for part in parts]) for name in ("return_mean", "return_std")
    )
    mean = float(np.average(means, weights=weights))
    variance = float(np.average(stds**2 + (means - mean) ** 2, weights=weights))
    return Moments(mean, math.sqrt(variance))


def _play(bundle: Bundle, label: str, temperature: float, workers: int, observer: Observer) -> Returns:
    task = bundle.spec.task
    episodes = simulator_of(task).episodes
    with observer.progress(f"{label}, {'sampled' if temperature else 'greedy'}", "episodes") as progress:
        result = evaluate(
            JointTeam(bundle),
            task,
            episodes=episodes,
            num_envs=episodes,
            temperature=temperature,
            workers=workers,
            progress=progress,
        )
    return Returns(
        episodes=episodes,
        return_mean=round(result.mean, 3),
        return_std=round(result.std, 3),
        length_mean=round(float(result.lengths.mean()), 1),
        win_rate=None if result.won is None else round(float(result.won.mean()), 4),
    )
