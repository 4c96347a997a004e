"""Numbers for people from the metrics of servers: by server, and by agent of each."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from omcda_deploy.watch.scrapes import Interval, Values, Watched, select, total

WINDOW_S = 60.0  # over which rates, means and percentiles are taken
STEPS = ("Act", "TeamAct", "ActStream", "ModelInfer")  # methods that answer control steps
NO_MISS = {"unary": {"OK"}, "bidi_stream": {"OK", "CANCELLED"}}  # a stream may be given up between two steps


def overview(servers: Sequence[Watched]) -> dict[str, Any]:
    """Return what the page shows, ready for JSON; numbers that are not known are None."""
    return {
        "window_s": WINDOW_S,
        "servers": [server_figures(server) for server in servers],
        "agents": [row for server in servers for row in agent_figures(server)],
    }


def server_figures(server: Watched) -> dict[str, Any]:
    """Return rate, latency, misses and refusals of one server over the window."""
    window = server.within(WINDOW_S)
    grown = _sum(window)
    misses, refused, buckets = Counter[str](), Counter[str](), Counter[float]()
    for labels, count in select(grown, "grpc_server_handled_total"):
        if labels["grpc_method"] in STEPS and labels["grpc_code"] not in NO_MISS[labels["grpc_type"]]:
            misses[labels["grpc_code"]] += int(count)
    misses["late"] += int(total(grown, "omcda_late_answers_total"))
    for labels, count in select(grown, "omcda_refused_calls_total"):
        refused[labels["reason"]] += int(count)
    refused["no token"] += int(total(grown, "omcda_denied_calls_total"))
    for labels, count in select(grown, "grpc_server_handling_seconds_bucket"):
        if labels["grpc_method"] in STEPS:
            buckets[float(labels["le"])] += int(count)
    return {
        "endpoint": server.endpoint,
        "down": server.failure,
        "versions": [labels for labels, _ in select(server.values, "omcda_version_info")],
        "answers_per_s": _per_second(total(grown, "omcda_answers_total"), window),
        "p50_ms": _milliseconds(quantile(buckets, 0.5)),
        "p99_ms": _milliseconds(quantile(buckets, 0.99)),
        "misses": dict(+misses),
        "refused": dict(+refused),
        "streams": next((v for _, v in select(server.values, "omcda_control_streams")), None),
        "memory_bytes": next((v for _, v in select(server.values, "process_resident_memory_bytes")), None),
        "recording": bool(total(server.values, "omcda_recording")),
    }


def agent_figures(server: Watched) -> Iterator[dict[str, Any]]:
    """Yield divergence, budget and guard of every agent of a server, by version that is current or answered."""
    window = server.within(WINDOW_S)
    grown = _sum(window)
    parts = {labels["version"]: labels for labels, _ in select(server.values, "omcda_version_info")}
    for place, threshold in select(server.values, "omcda_guard_threshold_nats"):
        model = {name: place[name] for name in ("model", "version")}
        answers, rows = (total(grown, f"omcda_{what}_total", **model) for what in ("answers", "rows"))
        part = parts.get(place["version"], {})
        if not answers and part.get("current") != "yes" and part.get("shadow") != "yes":
            continue
        replaced = list(select(server.values, "omcda_guard_replaced_rows_total", **place))
        yield {
            "server": server.endpoint,
            **place,
            "current": part.get("current") == "yes",
            "shadow": part.get("shadow") == "yes",
            "answers_per_s": _per_second(answers, window),
            "divergence": _ratio(total(grown, "omcda_divergence_nats_total", **place), rows),
            "budget": next(
                (v for _, v in select(server.values, "omcda_divergence_budget_nats", **place)), None
            ),
            "threshold": threshold if math.isfinite(threshold) else None,
            "mode": replaced[0][0]["mode"] if replaced else "",
            "exceeded": _ratio(total(grown, "omcda_guard_exceeded_rows_total", **place), rows),
            "replaced": _ratio(total(grown, "omcda_guard_replaced_rows_total", **place), rows),
            "trend": _trend(server, place),
        }


def _trend(server: Watched, place: dict[str, str]) -> list[tuple[float, ...]]:
    """Return age of the end and length in seconds, divergence and replaced share of the intervals with answers."""
    now, labels = time.monotonic(), tuple(sorted(place.items()))
    return [
        (round(now - interval.end, 1), round(interval.seconds, 1), *means)
        for interval in tuple(server.intervals)
        if (means := interval.means.get(labels)) is not None
    ]


def quantile(cumulative: Counter[float], share: float) -> float | None:
    """Estimate a quantile from counts up to bounds, linearly within a bucket; None without any.

    As Prometheus' ``histogram_quantile``: above the last finite bound it is that bound.
    """
    bounds = sorted(cumulative)
    if not bounds or not cumulative[bounds[-1]]:
        return None
    wanted = share * cumulative[bounds[-1]]
    low, below = 0.0, 0
    for bound in bounds:
        if cumulative[bound] >= wanted and math.isfinite(bound):
            inside = cumulative[bound] - below
            return low + (bound - low) * ((wanted - below) / inside if inside else 0.0)
        if math.isfinite(bound):
            low, below = bound, cumulative[bound]
    return low


def _sum(window: Sequence[Interval]) -> Values:
    summed: dict[str, Counter[Any]] = {}
    for interval in window:
        for name, samples in interval.growth.items():
            summed.setdefault(name, Counter()).update(samples)
    return {name: dict(samples) for name, samples in summed.items()}


def _per_second(count: float, window: Sequence[Interval]) -> float | None:
    return _ratio(count, sum(interval.seconds for interval in window))


def _ratio(value: float, by: float) -> float | None:
    return value / by if by and math.isfinite(value) else None


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1000.0 * seconds
