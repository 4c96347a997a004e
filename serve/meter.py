"""What a server counts while it answers, at the price of a few additions per call; metrics and status read it.

Everything is added to in the event loop's thread alone. Readers in other threads see a state that is at most one
call old.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.guard import Guarded

# Seconds. Python's own round trip is about half a millisecond, a control step rarely more than 50.
LATENCY_BOUNDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
RATIO_BOUNDS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 5.0, 10.0)  # of divergence to threshold, of distance
LEAST_THRESHOLD, RATIO_LIMIT = 1e-6, 1e6  # of a threshold of 0 nats, ratios are only large
RECENT = 1024  # calls of which status reports percentiles and rates
RATE_S = 60.0


class Histogram:
    """Counts of values up to each bound, and above the last; cumulative only when read."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def cumulative(self) -> list[tuple[str, int]]:
        """(upper bound, values up to it), as Prometheus has them."""
        totals = np.cumsum(self.counts).tolist()
        return list(zip([*map(repr, self.bounds), "+Inf"], totals, strict=True))


class MethodMeter:
    """One RPC method."""

    def __init__(self, service: str, method: str, kind: str) -> None:
        self.service, self.method, self.kind = service, method, kind  # kind: unary, bidi_stream
        self.started = 0
        self.handled: Counter[str] = Counter()  # by status code
        self.seconds = Histogram(LATENCY_BOUNDS)


@dataclass(frozen=True)
class Recent:
    """The last calls of a model: for people, not for dashboards."""

    per_second: float
    p50_ms: float
    p99_ms: float


class ModelMeter:
    """One model (an agent, or the team): its answers, and each of its agents' guards."""

    def __init__(self, agents: Sequence[str]) -> None:
        self.agents = tuple(agents)
        self.answers = 0
        self.rows = 0
        self.divergence = [0.0 for _ in agents]  # sums over rows, nats
        self.exceeded = [0 for _ in agents]  # rows above the threshold
        self.replaced = [0 for _ in agents]  # rows in which the guard acted
        self.ratios = [
            Histogram(RATIO_BOUNDS) for _ in agents
        ]  # of divergence to threshold, an answer's largest
        self.distances = [Histogram(RATIO_BOUNDS) for _ in agents]  # an answer's largest; empty where unknown
        self.compared = 0  # answers that a shadow gave too
        self.difference = 0.0  # sum over them: mean absolute difference, or share of different choices
        self.shadow_failures = 0  # answers that it could not give
        self._recent = np.zeros((RECENT, 2))  # when, and how many seconds; a ring

    def add(
        self, guarded: Guarded, divergence: NDArray[np.float32], thresholds: Sequence[float], seconds: float
    ) -> None:
        """An answer with ``divergence`` [B, k] and what the guard made of it."""
        rows = len(divergence)
        self.answers += 1
        self.rows += rows
        # Plain numbers: on these few, each call of numpy costs more than the whole loop.
        single = rows == 1
        sums = (divergence[0] if single else divergence.sum(axis=0)).tolist()
        largest = sums if single else divergence.max(axis=0).tolist()
        exceeded = (guarded.exceeded[0] if single else guarded.exceeded.sum(axis=0)).tolist()
        weights = guarded.policy_weight
        replaced = (
            [weight < 1.0 for weight in weights[0].tolist()]
            if single
            else (weights < 1.0).sum(axis=0).tolist()
        )
        for index, threshold in enumerate(thresholds):
            self.divergence[index] += sums[index]
            self.exceeded[index] += exceeded[index]
            self.replaced[index] += replaced[index]
            self.ratios[index].add(min(largest[index] / max(threshold, LEAST_THRESHOLD), RATIO_LIMIT))
        if guarded.distance is not None:
            far = (guarded.distance[0] if single else guarded.distance.max(axis=0)).tolist()
            for histogram, distance in zip(self.distances, far, strict=True):
                histogram.add(distance)
        self._recent[(self.answers - 1) % RECENT] = time.monotonic(), seconds

    def compare(self, action: NDArray[Any], other: NDArray[Any]) -> None:
        """Note what a shadow would have done instead."""
        different = action != other if action.dtype.kind == "i" else np.abs(action - other)
        if np.isfinite(mean := float(different.mean())):
            self.compared += 1
            self.difference += mean

    def forget_comparison(self) -> None:
        self.compared, self.difference, self.shadow_failures = 0, 0.0, 0

    def recent(self) -> Recent | None:
        """None before the first answer."""
        when, seconds = self._recent[: self.answers].T
        if not len(when):
            return None
        now = time.monotonic()
        inside = np.count_nonzero(now - when <= RATE_S)
        # A full window may cover less than a minute: then the rate is that of the time it covers.
        span = RATE_S if len(when) < RECENT else max(now - float(when.min()), 1e-3)
        p50, p99 = 1e3 * np.sort(seconds)[[len(seconds) // 2, len(seconds) * 99 // 100]]
        return Recent(inside / min(span, RATE_S), float(p50), float(p99))
