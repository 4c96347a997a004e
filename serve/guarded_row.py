"""The guard of a single row, in plain numbers: the bits of :class:`omcda_deploy.guard.Guard` for less.

A guard acts when something unusual happens, and just then a control loop should not be slower. Here it costs no
second run of the graph, and few numpy calls: those of functions that numpy and Python round differently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from omcda_deploy.blend import CORRECTIONS, ITERATIONS, LAST, LONGEST, NEAR, UNIT
from omcda_deploy.guard import Guard, Mode
from omcda_deploy.local import BoundRow

Curve: TypeAlias = Callable[[float], tuple[float, float]]  # w -> KL, KL'


class _Acting(NamedTuple):
    """An agent whose guard may act, and its entries in the joined vectors."""

    place: int  # among the model's agents
    mode: Mode
    threshold: float
    columns: slice
    middle: float  # of its range of actions
    half: float


class GuardedRow:
    """Replaces the actions in the bound outputs of a graph."""

    def __init__(self, guard: Guard, row: BoundRow) -> None:
        self._noise = row.inputs["noise"].reshape(-1)
        self._outputs = {name: array.reshape(-1) for name, array in row.outputs.items()}
        self._replace = self._choose if "behavior_logits" in row.outputs else self._sample
        self._acting = [
            _Acting(
                index,
                setting.mode,
                float(guard.thresholds[index]),
                columns,
                (agent.action.high + agent.action.low) / 2.0,
                (agent.action.high - agent.action.low) / 2.0,
            )
            for index, (agent, setting, columns) in enumerate(
                zip(guard.agents, guard.settings, guard.action_slices, strict=True)
            )
            if setting.mode != "observe"
        ]
        self._agents = len(guard.agents)
        self._exponents = np.empty((3, self._noise.size))

    def __call__(self, divergence: Sequence[float]) -> tuple[list[Any], list[float]]:
        """Return the actions and weights of all agents, given their ``divergence``.

        Raises :class:`ArithmeticError` for numbers that are too large for it.
        """
        action, weights = self._outputs["action"].tolist(), [1.0] * self._agents
        untrusted = [agent for agent in self._acting if divergence[agent.place] > agent.threshold]
        self._replace(untrusted, self._noise.tolist(), action, weights)
        return action, weights

    def _choose(
        self, untrusted: Iterable[_Acting], noise: list[float], action: list[int], weights: list[float]
    ) -> None:
        """Replace discrete actions, and set their weights."""
        logits, logits_b = (self._outputs[name].tolist() for name in ("logits", "behavior_logits"))
        for place, mode, threshold, columns, *_ in untrusted:
            behavior, gumbel = logits_b[columns], noise[columns]
            if mode == "fallback":
                w = 0.0
                scores = [b + g for b, g in zip(behavior, gumbel, strict=True)]
            else:
                policy = logits[columns]
                w = largest_weight(*logits_curve(policy, behavior), threshold)
                scores = [(1.0 - w) * b + w * p + g for p, b, g in zip(policy, behavior, gumbel, strict=True)]
            weights[place] = w
            quiet = mode == "fallback" and not any(gumbel)
            action[place] = (
                int(self._outputs["behavior_action"][place]) if quiet else scores.index(max(scores))
            )

    def _sample(
        self, untrusted: Iterable[_Acting], noise: list[float], action: list[float], weights: list[float]
    ) -> None:
        """Replace continuous actions, all by one call of tanh at the end, and set their weights."""
        mean, mean_b = (self._outputs[name].tolist() for name in ("mean", "behavior_mean"))
        exponents, log_std_b = self._exponents, self._outputs["behavior_log_std"]
        np.multiply(self._outputs["log_std"], -2.0, out=exponents[0])
        np.multiply(log_std_b, -2.0, out=exponents[1])
        exponents[2] = log_std_b
        precision, precision_b, std_b = np.exp(exponents).tolist()
        latent: list[float] = []
        places: list[tuple[int, _Acting]] = []
        for agent in untrusted:
            entries = range(agent.columns.start, agent.columns.stop)
            if agent.mode == "fallback":
                weights[agent.place] = 0.0
                if not any(noise[agent.columns]):
                    action[agent.columns] = self._outputs["behavior_action"][agent.columns].tolist()
                    continue
                latent += [mean_b[j] + std_b[j] * noise[j] for j in entries]
            else:
                moments = [(mean[j], precision[j], mean_b[j], precision_b[j]) for j in entries]
                w = weights[agent.place] = largest_weight(*gaussian_curve(moments), agent.threshold)
                for j, (m, p, mb, pb) in zip(entries, moments, strict=True):
                    blended = (1.0 - w) * pb + w * p
                    latent.append(((1.0 - w) * pb * mb + w * p * m) / blended + noise[j] / math.sqrt(blended))
            places += [(j, agent) for j in entries]
        for (j, agent), squashed in zip(places, np.tanh(latent).tolist(), strict=True):
            action[j] = agent.middle + agent.half * squashed


def gaussian_curve(moments: Iterable[tuple[float, float, float, float]]) -> tuple[float, Curve]:
    """Return KL'' at 0 and the function from w to KL and KL', as :class:`omcda_deploy.blend.Gaussians` does.

    ``moments``: per entry mean and precision of the policy, and of the behaviour policy.
    """
    entries = []
    for m, p, mb, pb in moments:
        ratio = p / pb - 1.0
        gap = (ratio + 1.0) * (m - mb)
        entries.append((ratio, pb * (gap * gap)))

    def curve(w: float) -> tuple[float, float]:
        kl = slope = 0.0
        for ratio, distance in entries:
            inverse = 1.0 / (1.0 + w * ratio)
            share = w * inverse
            kl += inverse - 1.0 - math.log(inverse) + distance * share * share
            slope += share * inverse * (ratio * ratio + 2.0 * distance * inverse)
        return 0.5 * kl, 0.5 * slope

    return sum(0.5 * ratio * ratio + distance for ratio, distance in entries), curve


def logits_curve(logits: Sequence[float], logits_b: Sequence[float]) -> tuple[float, Curve]:
    """Return KL'' at 0 and the function from w to KL and KL', as :class:`omcda_deploy.blend.Logits` does."""
    possible = [(b, p - b) for p, b in zip(logits, logits_b, strict=True) if b > -math.inf]

    def moments(w: float) -> tuple[float, float, float]:
        scores = [b + w * gap for b, gap in possible]
        top = max(scores)
        shares = [math.exp(score - top) for score in scores]
        total = sum(shares)
        mean = sum(share * gap for share, (_, gap) in zip(shares, possible, strict=True)) / total
        squares = sum(
            share * (gap - mean) * (gap - mean) for share, (_, gap) in zip(shares, possible, strict=True)
        )
        return mean, squares / total, top + math.log(total)

    def curve(w: float) -> tuple[float, float]:
        mean, variance, log_total = moments(w)
        return w * mean - log_total, w * variance

    return moments(0.0)[1], curve


def largest_weight(curvature: float, curve: Curve, threshold: float) -> float:
    """Find one weight, as :func:`omcda_deploy.blend.largest_weights` finds many."""
    if not (threshold > 0.0 and 0.0 < curvature < math.inf):
        return 0.0
    low, high = 0.0, 1.0
    w = min(max(math.sqrt(2.0 * threshold / curvature), UNIT), 1.0 - UNIT)
    for _ in range(ITERATIONS):
        kl, slope = curve(w)
        low, high = (w, high) if kl <= threshold else (low, w)
        newton = math.inf
        if 0.0 < kl < math.inf and 0.0 < slope < math.inf:
            newton = w * math.exp(min(math.log(threshold / kl) * kl / (w * slope), LONGEST))
        if abs(newton - w) <= NEAR * w * (1.0 - w):
            w = newton
            break
        w = newton if low < newton < high else 0.5 * (low + high)
    units = min(int(w / UNIT), LAST)
    for _ in range(CORRECTIONS):
        if units and not curve(units * UNIT)[0] <= threshold:
            units -= 1
        elif units < LAST and curve((units + 1) * UNIT)[0] <= threshold:
            units += 1
        else:
            return units * UNIT
    units, step = 0, (LAST + 1) // 2
    while step:
        units += step if curve((units + step) * UNIT)[0] <= threshold else 0
        step //= 2
    return units * UNIT
