"""Distributions and log-probabilities of recorded steps, in float64.

The variable under the tanh is known exactly, as the noise is recorded: ``u = mean + std * noise``. From the action,
a float32 near +-1, it could not be had.

Shapes: R rows, k agents, n the entries of their actions, joined.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.blend import Joined
from omcda_deploy.spec import AgentSpec

Float64: TypeAlias = NDArray[np.float64]
Arrays: TypeAlias = Mapping[str, NDArray[Any]]

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)
LOWEST = float(np.finfo(np.float32).min)  # log-probability of an action that is not available


class Densities:
    """The distributions of one model's steps. ``discrete``: whether its agents choose."""

    def __init__(self, agents: Sequence[AgentSpec]) -> None:
        self._joined = Joined.of([agent.action.size for agent in agents])
        self.discrete = agents[0].action.kind == "discrete"

    def executed(self, step: Arrays, temperature: Float64 | None = None) -> dict[str, Float64]:
        """Return the parameters [R, n] of the distribution that each action was drawn from.

        That is the policy's where ``policy_weight`` is 1, the behaviour policy's where it is 0, and else the
        guard's blend of them; the noise was multiplied by ``temperature`` [R, 1], 1 if None. Continuous: ``mean``
        and ``log_std``, under the tanh; discrete: ``logits``, normalised.
        """
        weight = self._joined.spread(_rows(step["policy_weight"]))
        factor = np.ones((len(weight), 1)) if temperature is None else temperature
        if self.discrete:
            policy, behavior = (_rows(step[f"{prefix}logits"]) for prefix in ("", "behavior_"))
            logits = np.where(weight == 1.0, policy, (1.0 - weight) * behavior + weight * policy)
            as_answered = ((weight == 1.0) | (weight == 0.0)) & (factor == 1.0)
            scaled = self._normalized(np.maximum(logits / factor, LOWEST))
            return {"logits": np.maximum(np.where(as_answered, logits, scaled), LOWEST)}
        mean, log_std, mean_b, log_std_b = (
            _rows(step[f"{prefix}{name}"]) for prefix in ("", "behavior_") for name in ("mean", "log_std")
        )
        precision, precision_b = np.exp(-2.0 * log_std), np.exp(-2.0 * log_std_b)
        blended = (1.0 - weight) * precision_b + weight * precision
        blended_mean = ((1.0 - weight) * precision_b * mean_b + weight * precision * mean) / blended
        pure, none = weight == 1.0, weight == 0.0
        return {
            "mean": np.where(pure, mean, np.where(none, mean_b, blended_mean)),
            "log_std": np.where(pure, log_std, np.where(none, log_std_b, -0.5 * np.log(blended)))
            + np.log(factor),
        }

    def log_prob(self, step: Arrays, parameters: Arrays) -> Float64:
        """Return the log-probabilities [R, k] of the recorded actions under a distribution.

        Continuous: densities of actions in [-1, 1]. ``parameters``: as :meth:`executed` returns them.
        """
        if self.discrete:
            rows = np.arange(len(step["action"]))[:, None]
            chosen = self._joined.starts + step["action"].reshape(len(rows), -1)
            return np.asarray(self._normalized(_rows(parameters["logits"]))[rows, chosen])
        mean, log_std = _rows(parameters["mean"]), _rows(parameters["log_std"])
        acted = self.executed(step)
        u = acted["mean"] + np.exp(acted["log_std"]) * _rows(step["noise"])
        z = (u - mean) * np.exp(-log_std)
        log_jacobian = 2.0 * (math.log(2.0) - u - np.logaddexp(0.0, -2.0 * u))
        total: Float64 = self._joined.sum(-0.5 * z * z - log_std - _HALF_LOG_2PI - log_jacobian)
        return total

    def _normalized(self, logits: Float64) -> Float64:
        top = np.maximum.reduceat(logits, self._joined.starts, axis=-1)
        shifted = logits - self._joined.spread(top)
        normalized: Float64 = shifted - self._joined.spread(np.log(self._joined.sum(np.exp(shifted))))
        return normalized


def _rows(values: NDArray[Any]) -> Float64:
    """Return values [R, …] as [R, m]: contiguous, as numpy rounds some functions differently on strided arrays."""
    return np.ascontiguousarray(values, np.float64).reshape(len(values), -1)
