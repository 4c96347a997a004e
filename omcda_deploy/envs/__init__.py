"""Simulators behind one small protocol, shaped like PettingZoo's parallel API.

One file per simulator. Each defines ``TASKS``, the task names it serves, and ``make(task, **options)``; the
registry finds the file by listing this folder, or through the entry-point group ``omcda_deploy.envs``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.spec import TeamSpec

Float: TypeAlias = NDArray[np.float32]
Observations: TypeAlias = dict[str, Float]
StepResult: TypeAlias = tuple[
    Observations, dict[str, float], dict[str, bool], dict[str, bool], dict[str, dict[str, Any]]
]


class Environment(Protocol):
    """One episode at a time of a cooperative team; every agent receives the same reward.

    As in PettingZoo, dictionaries are keyed by agent name. A discrete task puts ``action_mask`` (uint8 [A]) into
    each agent's info. ``terminations`` are ends of the task, ``truncations`` are time limits; both are equal for
    all agents, and the keys of observations never change during an episode.
    """

    spec: TeamSpec

    @property
    def possible_agents(self) -> list[str]: ...

    def reset(self, seed: int | None = None) -> tuple[Observations, dict[str, dict[str, Any]]]:
        """Start an episode; the same seed starts the same episode."""
        ...

    def step(self, actions: Mapping[str, Any]) -> StepResult:
        """Apply one action per agent: float32 [A] in [-1, 1], or an int."""
        ...

    def state(self) -> Float:
        """Centralised state [S] of the present step, for mixers."""
        ...

    def render(self) -> NDArray[np.uint8]:
        """The present frame, uint8 [height, width, 3]."""
        ...

    def close(self) -> None: ...
