"""The Grafana dashboard and the alert rules ask for metrics and labels that a server has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from omcda_deploy.bundle import TEAM, Bundle
from omcda_deploy.client.remote import RemoteTeam
from tests.support.server_process import free_port, server_process

BOARD = json.loads((Path(__file__).parents[2] / "serve" / "deploy" / "grafana-dashboard.json").read_text())
RULES = yaml.safe_load((Path(__file__).parents[2] / "serve" / "deploy" / "prometheus-rules.yaml").read_text())
FROM_PROMETHEUS = {"instance", "job"}  # labels that a scrape does not have
WORDS = {"and", "by", "on", "group_left"}
FUNCTIONS = {"rate", "sum", "count", "histogram_quantile", "changes"}
REQUIRED = {  # metrics that the dashboard must show
    *("grpc_server_started_total", "grpc_server_handled_total", "grpc_server_handling_seconds_bucket"),
    *("omcda_divergence_nats_total", "omcda_divergence_budget_nats", "omcda_guard_threshold_nats"),
    *(
        "omcda_guard_exceeded_rows_total",
        "omcda_guard_replaced_rows_total",
        "omcda_observation_distance_bucket",
    ),
    *("omcda_answers_total", "omcda_control_streams", "process_resident_memory_bytes"),
    *("omcda_refused_calls_total", "omcda_denied_calls_total", "omcda_late_answers_total"),
    *("omcda_shadow_difference_total", "omcda_shadow_answers_total"),
    "process_cpu_seconds_total",
}


def selectors(query: str) -> tuple[dict[str, set[str]], set[str]]:
    """Metric -> labels that it is selected by; and the labels that the query groups by or joins on."""
    text = re.sub(r"\[[^]]*\]|\boffset \w+", "", query)
    grouped = {
        label.strip()
        for listed in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", text)
        for label in listed.split(",")
    }
    text = re.sub(r"\b(?:by|on|group_left)\s*\([^)]*\)", "", text)
    labels_of: dict[str, set[str]] = {}
    for name, labels in re.findall(r"([a-zA-Z_]\w*)\s*(\{[^}]*\})?", text):
        if name not in WORDS | FUNCTIONS:
            labels_of.setdefault(name, set()).update(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", labels))
    return labels_of, grouped


def test_selectors_are_found() -> None:
    query = 'rate(a_total{x=~"$x",y!="1"}[1m]) / on (z, v) group_left () b and on (w) sum by (le) (c{y="2"})'
    assert selectors(query) == ({"a_total": {"x", "y"}, "b": set(), "c": {"y"}}, {"z", "v", "w", "le"})


def targets() -> Iterator[dict[str, Any]]:
    for panel in BOARD["panels"]:
        yield from panel.get("targets", ())


@pytest.fixture(scope="module")
def labels_of(continuous_bundle: Bundle) -> dict[str, set[str]]:
    """The labels of every metric that a server tells."""
    port = free_port()
    with server_process(continuous_bundle, options=("--metrics-port", str(port))) as process:
        with RemoteTeam({TEAM: process.endpoint}) as team:
            team.act(
                {a.name: np.zeros(a.observation_size, np.float32) for a in continuous_bundle.spec.agents}
            )
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


def test_the_rules_ask_for_what_a_server_says(labels_of: dict[str, set[str]]) -> None:
    rules = [rule for group in RULES["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules) > 5
    used: set[str] = set()
    for rule in rules:
        metrics, grouped = selectors(rule["expr"])
        known = {**labels_of, "up": set()}  # Prometheus' own
        for name, labels in metrics.items():
            assert labels <= known[name], rule["expr"]
        available = set().union(*(known[name] for name in metrics)) | FROM_PROMETHEUS
        assert grouped <= available, rule["expr"]
        said = rule["annotations"]["summary"] + rule["annotations"]["action"]
        assert set(re.findall(r"\$labels\.(\w+)", said)) <= available
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "1m"))
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["expr"].count("(") == rule["expr"].count(")")
        used |= metrics.keys()
    assert used >= {"omcda_refused_calls_total", "omcda_denied_calls_total", "omcda_late_answers_total"}


def test_the_dashboard_asks_for_what_a_server_says(labels_of: dict[str, set[str]]) -> None:
    used: set[str] = set()
    for target in targets():
        metrics, grouped = selectors(target["expr"])
        assert metrics
        for name, labels in metrics.items():
            assert name in labels_of, target["expr"]
            assert labels <= labels_of[name], target["expr"]
            assert grouped - FROM_PROMETHEUS <= set().union(*(labels_of[name] for name in metrics)), target[
                "expr"
            ]
        legend_labels = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        assert legend_labels - FROM_PROMETHEUS <= set().union(*(labels_of[name] for name in metrics)), target[
            "expr"
        ]
        assert "sum by" not in target["expr"] or legend_labels <= grouped, (
            "a legend names a label that is summed over"
        )
        used |= metrics.keys()
    assert used >= REQUIRED
    (query,) = (v["query"]["query"] for v in BOARD["templating"]["list"] if v["type"] == "query")
    metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", query).groups()  # type: ignore[union-attr]
    assert label in labels_of[metric]


def test_panels_stand_beside_each_other() -> None:
    panels = BOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for p in (panel["gridPos"] for panel in panels)
        for x in range(p["x"], p["x"] + p["w"])
        for y in range(p["y"], p["y"] + p["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    for panel in panels:
        marks = [target["refId"] for target in panel.get("targets", ())]
        assert len(set(marks)) == len(marks)
        assert panel["type"] == "row" or (panel["description"] and marks)
