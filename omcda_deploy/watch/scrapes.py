"""Metrics of servers, read again and again, and by how much their counters grew in between."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import NamedTuple, TypeAlias
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

from omcda_deploy.errors import EndpointError, MissingExtraError

try:
    from prometheus_client.parser import text_string_to_metric_families
except ImportError as error:
    raise MissingExtraError("prometheus-client", "serve") from error

LIMIT_S = 2.0  # for one scrape
LIMIT_BYTES = 8 << 20
HISTORY = 150  # scrapes that are kept
FAMILIES = {  # that the page needs; histograms by agent are most of what servers tell
    *("grpc_server_handled", "grpc_server_handling_seconds", "process_resident_memory_bytes"),
    *("omcda_answers", "omcda_rows", "omcda_late_answers", "omcda_refused_calls", "omcda_denied_calls"),
    *("omcda_control_streams", "omcda_recording", "omcda_version_info"),
    *("omcda_divergence_nats", "omcda_divergence_budget_nats", "omcda_guard_threshold_nats"),
    *("omcda_guard_exceeded_rows", "omcda_guard_replaced_rows"),
}

Labels: TypeAlias = tuple[tuple[str, str], ...]  # names and values, sorted
Values: TypeAlias = dict[str, dict[Labels, float]]  # by name of the sample, and by labels


class Means(NamedTuple):
    """Means over the rows of one agent: the divergence in nats, and the share that its guard replaced."""

    divergence: float
    replaced: float


@dataclass(frozen=True)
class Interval:
    """Growth of a server's counters from one scrape to the next.

    ``means``: by labels of the agents, model and version that answered.
    """

    end: float  # readings of time.monotonic
    seconds: float
    growth: Values
    means: dict[Labels, Means]


@dataclass
class Watched:
    """Knowledge of one server. ``failure``: why its last scrape failed; empty if it did not."""

    endpoint: str
    values: Values = field(default_factory=dict)  # of the last scrape that succeeded
    at: float = 0.0
    failure: str = "not asked yet"
    intervals: deque[Interval] = field(default_factory=lambda: deque(maxlen=HISTORY))

    def scrape(self) -> None:
        """Read the metrics, and note what grew since the last time."""
        try:
            values = read_metrics(self.endpoint)
        except EndpointError as error:
            self.failure = str(error)
            return
        now = time.monotonic()
        if self.values:
            growth = _growth(self.values, values)
            self.intervals.append(Interval(now, now - self.at, growth, _means(growth)))
        self.values, self.at, self.failure = values, now, ""

    def within(self, seconds: float) -> list[Interval]:
        """Return the intervals that ended in the last ``seconds``."""
        now = time.monotonic()
        return [interval for interval in tuple(self.intervals) if now - interval.end <= seconds]


def select(values: Values, name: str, **labels: str) -> Iterator[tuple[dict[str, str], float]]:
    """Yield labels and values of the samples that have ``labels`` among theirs."""
    wanted = set(labels.items())
    for pairs, value in values.get(name, {}).items():
        if wanted <= set(pairs):
            yield dict(pairs), value


def total(values: Values, name: str, **labels: str) -> float:
    """Return the sum of the samples that have ``labels`` among theirs."""
    return sum(value for _, value in select(values, name, **labels))


def _growth(before: Values, after: Values) -> Values:
    """Return how much each sample grew; one that shrank began anew."""
    grown: Values = {}
    for name, samples in after.items():
        last = before.get(name, {})
        grown[name] = {
            labels: value - last.get(labels, 0.0) if value >= last.get(labels, 0.0) else value
            for labels, value in samples.items()
        }
    return grown


def _means(growth: Values) -> dict[Labels, Means]:
    replaced = {
        tuple(pair for pair in labels if pair[0] != "mode"): count
        for labels, count in growth.get("omcda_guard_replaced_rows_total", {}).items()
    }
    rows = growth.get("omcda_rows_total", {})
    means = {}
    for labels, divergence in growth.get("omcda_divergence_nats_total", {}).items():
        if count := rows.get(tuple(pair for pair in labels if pair[0] != "agent"), 0.0):
            means[labels] = Means(divergence / count, replaced.get(labels, 0.0) / count)
    return means


def require_address(endpoint: str) -> None:
    """Raise :class:`EndpointError` unless an endpoint is HOST:PORT, IPv6 hosts in brackets."""
    try:
        parts = urlsplit(f"http://{endpoint}")
        right = bool(parts.hostname and parts.port) and parts.netloc == endpoint and "@" not in endpoint
    except ValueError:
        right = False
    if not right:
        raise EndpointError(
            f"expected the address of metrics as HOST:PORT or [IPv6]:PORT, got {endpoint!r}: correct it"
        )


def read_metrics(endpoint: str) -> Values:
    """Return the samples at an endpoint that this page may need. Raises :class:`EndpointError`."""
    request = Request(f"http://{endpoint}/metrics", headers={"Accept": "text/plain"})
    try:
        with build_opener(ProxyHandler({})).open(request, timeout=LIMIT_S) as answer:
            text = answer.read(LIMIT_BYTES).decode()
        values: Values = {}
        for family in text_string_to_metric_families(text):
            if family.name in FAMILIES:
                for sample in family.samples:
                    labels = tuple(sorted(sample.labels.items()))
                    values.setdefault(sample.name, {})[labels] = sample.value
        return values
    except URLError as error:
        reason = getattr(error.reason, "strerror", None) or error.reason
        raise EndpointError(f"no metrics: {reason}") from error
    except (OSError, HTTPException, ValueError) as error:
        raise EndpointError(f"no metrics: {error or type(error).__name__}") from error
