"""What a server counts while it answers; metrics and status read it.

RPCs are counted as they come. What models answered is noted, and counted in blocks or when somebody asks: a call of
numpy costs about a microsecond whether it gets one row or a hundred.

Everything is noted in the event loop's thread alone, and counted under a lock by whoever comes first: that thread,
when a block is full, or a reader in another.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.guard import Guard

# Seconds. Python's own round trip is about half a millisecond, a control step rarely more than 50.
LATENCY_BOUNDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
RATIO_BOUNDS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 5.0, 10.0)  # of divergence to threshold, of distance
LEAST_THRESHOLD, RATIO_LIMIT = 1e-6, 1e6  # of a threshold of 0 nats, ratios are only large
RECENT = 1024  # calls of which status reports percentiles and rates
RATE_S = 60.0
BLOCK = 8192  # entries of observations that are noted before they are counted: a hundred microseconds' work


Buffer: TypeAlias = "bytes | NDArray[np.float32]"
Note: TypeAlias = tuple[int, Buffer, Buffer, Buffer, float, float]  # what ModelMeter.add is given


class Histogram:
    """Counts of values up to each bound, and above the last; cumulative only when read."""

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
        """(upper bound, values up to it), as Prometheus has them."""
        totals = np.cumsum(self.counts).tolist()
        return list(zip([*map(repr, self.bounds), "+Inf"], totals, strict=True))


class MethodMeter:
    """One RPC method."""

    def __init__(self, service: str, method: str, kind: str) -> None:
        self.service, self.method, self.kind = service, method, kind  # kind: unary, bidi_stream
        self.started = 0  # calls that came
        self.late = 0  # answers that were ready only after their deadline
        self.handled: Counter[str] = Counter()  # by status code
        self.seconds = Histogram(LATENCY_BOUNDS)


@dataclass(frozen=True)
class Recent:
    """The last calls of a model: for people, not for dashboards."""

    per_second: float
    p50_ms: float
    p99_ms: float


@dataclass
class Totals:
    """A model's answers, and what they were to the guards of its k agents."""

    divergence: NDArray[np.float64]  # [k], sums over rows, nats
    exceeded: NDArray[np.int64]  # [k], rows above the threshold
    replaced: NDArray[np.int64]  # [k], rows in which the guard acted
    ratios: Sequence[Histogram]  # k, of divergence to threshold, an answer's largest
    distances: Sequence[Histogram]  # k, an answer's largest; empty where unknown
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
    """One model, an agent or the team."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._width = sum(agent.observation_size for agent in guard.agents)
        k = len(guard.agents)
        ratios, distances = ([Histogram(RATIO_BOUNDS) for _ in guard.agents] for _ in range(2))
        self._totals = Totals(np.zeros(k), np.zeros(k, np.int64), np.zeros(k, np.int64), ratios, distances)
        self._notes: deque[Note] = deque()
        self._entries = 0  # of observations, noted since the last block
        self._counting = Lock()
        self._recent = np.zeros((RECENT, 2))  # when, and how many seconds; a ring
        self.compared = 0  # answers that a shadow gave too
        self.difference = 0.0  # sum over them: mean absolute difference, or share of different choices
        self.shadow_failures = 0  # answers that it could not give

    def add(
        self,
        rows: int,
        observation: Buffer,
        divergence: Buffer,
        policy_weight: Buffer,
        began: float,
        seconds: float,
    ) -> None:
        """Note an answer of B ``rows``; ``began`` is a reading of ``time.perf_counter``.

        ``observation`` [B, sum O], ``divergence`` and ``policy_weight`` [B, k] are float32, as bytes or arrays, and
        not to be changed any more.
        """
        self._notes.append((rows, observation, divergence, policy_weight, began, seconds))
        self._entries += rows * self._width
        if self._entries >= BLOCK:
            self._entries = 0
            with self._counting:
                self._count()

    def totals(self) -> Totals:
        """All that has been noted so far, counted; it does not change any more."""
        with self._counting:
            self._count()
            return self._totals.copy()

    def _count(self) -> None:
        notes = [self._notes.popleft() for _ in range(len(self._notes))]
        if not notes:
            return
        totals, guard = self._totals, self._guard
        rows, observations, divergences, weights, began, seconds = zip(*notes, strict=True)
        k = len(guard.agents)
        divergence = np.frombuffer(b"".join(divergences), np.float32).reshape(-1, k).astype(np.float64)
        weight = np.frombuffer(b"".join(weights), np.float32).reshape(-1, k)
        distance = guard.distance(np.frombuffer(b"".join(observations), np.float32).reshape(-1, self._width))
        first = np.cumsum((0, *rows[:-1]))  # row of each answer
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
        places = (totals.answers + np.arange(len(notes))) % RECENT
        self._recent[places] = np.column_stack((began, seconds))
        totals.answers += len(notes)
        totals.rows += sum(rows)

    def compare(self, action: NDArray[Any], other: NDArray[Any]) -> None:
        """Note what a shadow would have done instead."""
        different = action != other if action.dtype.kind == "i" else np.abs(action - other)
        self.compared += 1
        self.difference += float(different.mean())

    def forget_comparison(self) -> None:
        self.compared, self.difference, self.shadow_failures = 0, 0.0, 0

    def recent(self) -> Recent | None:
        """None before the first answer."""
        with self._counting:
            self._count()
            when, seconds = self._recent[: self._totals.answers].T.copy()
        if not len(when):
            return None
        now = time.perf_counter()
        inside = np.count_nonzero(now - when <= RATE_S)
        # A full window may cover less than a minute: then the rate is that of the time it covers.
        span = RATE_S if len(when) < RECENT else max(now - float(when.min()), 1e-3)
        p50, p99 = 1e3 * np.sort(seconds)[[len(seconds) // 2, len(seconds) * 99 // 100]]
        return Recent(inside / min(span, RATE_S), float(p50), float(p99))
