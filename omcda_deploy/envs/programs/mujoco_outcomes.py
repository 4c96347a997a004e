"""Outcomes of a MuJoCo body's episode: it fell, it stalled, or neither.

* **fell**: the simulator ended the episode (Hopper, Ant, Humanoid), or over its last tenth the torso was tilted by
  more than 45 degrees: the mean of its own z axis' vertical component is below cos 45°. No rule ends such an
  episode of HalfCheetah, which lies on its head or its back then, and none that of an Ant on its back.
* **stalled**: the episode reached the time limit, did not fall, and moved forward by less than :data:`STALL_SPEED`
  over its last tenth, on average.

Both tell people what a policy does (docs/evaluation.md); neither enters a reward. The margins are wide: bodies that
run make 0.5 to 3 m/s with a mean vertical component of 0.87 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.spec import TeamSpec

STALL_SPEED = 0.1  # m/s
LEAST_UPRIGHT = math.cos(math.radians(45.0))
_TORSO = 1  # body 0 is the world
_UPRIGHT = 8  # the vertical component of the torso's z axis, in its rotation matrix stored by rows


class OutcomeLog:
    """Outcomes of E bodies. ``data`` are their ``MjData`` in the order of rows, which stay the same objects."""

    def __init__(self, data: Sequence[Any], spec: TeamSpec) -> None:
        self._data = data
        self._part = max(spec.episode_limit // 10, 1)  # steps
        self._begin, self._rate = spec.episode_limit - self._part, spec.control_rate
        self._start = np.zeros(len(data))  # forward position where the last part began, in metres
        self._upright = np.zeros(len(data))  # sum over its steps

    def step(
        self,
        rows: Sequence[int],
        steps: NDArray[np.int64],
        terminated: NDArray[np.bool_],
        truncated: NDArray[np.bool_],
    ) -> dict[str, NDArray[np.bool_]]:
        """Return the outcomes [R] of the episodes of ``rows`` that end, False for the others.

        The other arguments are [R]: steps of each episode, this one included, and how it ends, if it does.
        """
        for index in np.flatnonzero(steps >= self._begin).tolist():
            row = rows[index]
            if steps[index] == self._begin:
                self._start[row], self._upright[row] = self._data[row].qpos[0], 0.0
            else:
                self._upright[row] += self._data[row].xmat[_TORSO, _UPRIGHT]
        fell, stalled = terminated.copy(), np.zeros(len(rows), np.bool_)
        for index in np.flatnonzero(truncated).tolist():
            row = rows[index]
            fell[index] = self._upright[row] / self._part < LEAST_UPRIGHT
            speed = (self._data[row].qpos[0] - self._start[row]) * self._rate / self._part
            stalled[index] = not fell[index] and speed < STALL_SPEED
        return {"stalled": stalled, "fell": fell}


def single_outcomes(log: OutcomeLog, steps: int, terminated: bool, truncated: bool) -> dict[str, bool]:
    """Return the outcomes of a log of one body, as the scalars of an agent's info."""
    outcomes = log.step([0], np.array([steps]), np.array([terminated]), np.array([truncated]))
    return {name: bool(values[0]) for name, values in outcomes.items()}
