"""Counters of a server, which metrics and status read.

RPCs are counted as they come. Answers of models are kept as samples and counted in blocks, or when metrics or
status are read: a numpy call costs about a microsecond, whether for one row or for a hundred.

Samples are added by the event loop's thread and that of large requests. They are counted under a lock, by one
of these when a block is full, after the answer, or by a reader in another thread.

Shapes: B rows of an answer, k agents of a model, O the sizes of their observations.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.guard import Guard

# Seconds. A round trip with Python at both ends takes about 0.5 ms, a control period rarely more than 50 ms.
LATENCY_BOUNDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
RATIO_BOUNDS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 5.0, 10.0)  # divergence / threshold, and distance
LEAST_THRESHOLD, RATIO_LIMIT = 1e-6, 1e6  # keep ratios to a threshold of 0 nats finite
RECENT = 1024  # calls from which status computes percentiles and rates
RATE_S = 60.0
BLOCK = 8192  # entries of observations per block, which take about 100 microseconds to count


Buffer: TypeAlias = "bytes | NDArray[np.float32]"  # float32; must not change after it was added


class Sample(NamedTuple):
    """One answer of a model."""

    rows: int
    observation: Buffer  # [B, O]
    divergence: Buffer  # [B, k], nats
    policy_weight: Buffer  # [B, k]
    began: float  # reading of time.perf_counter
    seconds: float


class Histogram:
    """Counts values up to each bound, and above the last one."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def add_all(self, values: NDArray[np.float64]) -> None:
        places = np.searchsorted(self.bounds, values)
        for place, count in enumerate(np.bincount(places, minlength=len(self.counts)).tolist()):
            self.counts[place] += count
        self.sum += float(values.sum())

    def copy(self) -> Histogram:
        other = Histogram(self.bounds)
        other.counts, other.sum = self.counts.copy(), self.sum
        return other

    def cumulative(self) -> list[tuple[str, int]]:
        """Return (upper bound, number of values up to it) for each bound, in Prometheus' form."""
        totals = np.cumsum(self.counts).tolist()
        return list(zip([*map(repr, self.bounds), "+Inf"], totals, strict=True))


class MethodMeter:
    """Counters of one RPC method. ``kind``: ``unary`` or ``bidi_stream``."""

    def __init__(self, service: str, method: str, kind: str) -> None:
        self.service, self.method, self.kind = service, method, kind
        self.started = 0  # calls that arrived
        self.late = 0  # answers that were ready after their deadline
        self.handled: Counter[str] = Counter()  # calls that ended, by status code
        self.seconds = Histogram(LATENCY_BOUNDS)


@dataclass(frozen=True)
class Recent:
    """Rate and latency of a model's last calls: for people, not for dashboards."""

    per_second: float
    p50_ms: float
    p99_ms: float


@dataclass
class Totals:
    """Sums over a model's answers, per guard of its k agents."""

    divergence: NDArray[np.float64]  # [k], sum over rows, nats
    exceeded: NDArray[np.int64]  # [k], rows above the threshold
    replaced: NDArray[np.int64]  # [k], rows in which the guard acted
    ratios: Sequence[Histogram]  # k, of each answer's largest divergence / threshold
    distances: Sequence[Histogram]  # k, of each answer's largest distance; empty without a reference
    answers: int = 0
    rows: int = 0

    def copy(self) -> Totals:
        return Totals(
            self.divergence.copy(),
            self.exceeded.copy(),
            self.replaced.copy(),
            [histogram.copy() for histogram in self.ratios],
            [histogram.copy() for histogram in self.distances],
            self.answers,
            self.rows,
        )


class ModelMeter:
    """Counters of one model, an agent or ``team``."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._width = sum(agent.observation_size for agent in guard.agents)
        k = len(guard.agents)
        ratios, distances = ([Histogram(RATIO_BOUNDS) for _ in guard.agents] for _ in range(2))
        self._totals = Totals(np.zeros(k), np.zeros(k, np.int64), np.zeros(k, np.int64), ratios, distances)
        self._samples: deque[Sample] = deque()  # not counted yet
        self._entries = 0  # entries of observations since the last block
        self._counting = Lock()
        self._recent = np.zeros((RECENT, 2))  # ring of (began, seconds)
        self.compared = 0  # answers that were compared with a shadow's
        self.difference = 0.0  # sum over these: mean absolute difference, or share of different choices
        self.shadow_failures = 0  # answers that a shadow could not give

    def add(self, sample: Sample) -> None:
        """Add an answer. A full block is counted after the answer was sent, if this is an event loop's thread."""
        self._samples.append(sample)
        self._entries += sample.rows * self._width
        if self._entries >= BLOCK:
            self._entries = 0
            try:
                asyncio.get_running_loop().call_soon(self._count_block)
            except RuntimeError:  # no event loop here: nobody waits
                self._count_block()

    def _count_block(self) -> None:
        with self._counting:
            self._count()

    def totals(self) -> Totals:
        """Count all samples, and return a copy of the totals."""
        with self._counting:
            self._count()
            return self._totals.copy()

    def _count(self) -> None:
        samples = [self._samples.popleft() for _ in range(len(self._samples))]
        if not samples:
            return
        totals, guard = self._totals, self._guard
        rows, observations, divergences, weights, began, seconds = zip(*samples, strict=True)
        k = len(guard.agents)
        divergence = np.frombuffer(b"".join(divergences), np.float32).reshape(-1, k).astype(np.float64)
        weight = np.frombuffer(b"".join(weights), np.float32).reshape(-1, k)
        distance = guard.distance(np.frombuffer(b"".join(observations), np.float32).reshape(-1, self._width))
        first = np.cumsum((0, *rows[:-1]))  # first row of each answer
        ratio = np.maximum.reduceat(divergence, first) / np.maximum(guard.thresholds, LEAST_THRESHOLD)
        for histogram, values in zip(totals.ratios, np.minimum(ratio, RATIO_LIMIT).T, strict=True):
            histogram.add_all(values)
        if distance is not None:
            for histogram, values in zip(
                totals.distances, np.maximum.reduceat(distance, first).T, strict=True
            ):
                histogram.add_all(values)
        totals.divergence += divergence.sum(axis=0)
        totals.exceeded += guard.exceeded(divergence).sum(axis=0)
        totals.replaced += (weight < 1.0).sum(axis=0)
        places = (totals.answers + np.arange(len(samples))) % RECENT
        self._recent[places] = np.column_stack((began, seconds))
        totals.answers += len(samples)
        totals.rows += sum(rows)

    def compare(self, action: NDArray[Any], shadow_action: NDArray[Any]) -> None:
        """Add the difference of a shadow's action from the one that was answered."""
        discrete = action.dtype.kind == "i"
        difference = float((action != shadow_action if discrete else np.abs(action - shadow_action)).mean())
        with self._counting:
            self.compared += 1
            self.difference += difference

    def reset_comparison(self) -> None:
        self.compared, self.difference, self.shadow_failures = 0, 0.0, 0

    def recent(self) -> Recent | None:
        """Return the last calls' rate and latency; None before the first answer."""
        with self._counting:
            self._count()
            began, seconds = self._recent[: self._totals.answers].T.copy()
        if not len(began):
            return None
        now = time.perf_counter()
        inside = np.count_nonzero(now - began <= RATE_S)
        # A full ring may cover less than a minute; the rate is then over the time that it covers.
        span = RATE_S if len(began) < RECENT else max(now - float(began.min()), 1e-3)
        p50, p99 = 1e3 * np.sort(seconds)[[len(seconds) // 2, len(seconds) * 99 // 100]]
        return Recent(inside / min(span, RATE_S), float(p50), float(p99))
