"""The page of a served team: its figures are those of the servers' answers, and a browser shows them."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import grpc
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from omcda_deploy.cli import app
from omcda_deploy.client.remote import RemoteTeam
from omcda_deploy.errors import EndpointError, OmcdaError
from omcda_deploy.watch import scrapes
from omcda_deploy.watch.figures import quantile
from omcda_deploy.watch.scrapes import Watched, read_metrics, require_address, total
from omcda_deploy.watch.site import watching
from tests.support.bundles import continuous_spec, with_references, write_test_bundle
from tests.support.server_process import free_port, server_process

SPEC = continuous_spec(agents=2)
CHROMIUM = shutil.which("chromium")


def asked(url: str) -> dict[str, Any]:
    with urlopen(f"{url}figures", timeout=5) as answer:
        figures: dict[str, Any] = json.load(answer)
    return figures


def eventually(url: str, condition: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    end = time.monotonic() + 10
    while not condition(figures := asked(url)):
        assert time.monotonic() < end, figures
        time.sleep(0.05)
    return figures


def dom(url: str) -> str:
    """The page's text after its script has run in a browser."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=1000"]
    done = subprocess.run(
        [*command, "--dump-dom", url], capture_output=True, text=True, timeout=60, check=True
    )
    return re.sub(r"<[^>]*>", " ", done.stdout.partition("<body>")[2].partition("<script>")[0])


def test_figures_are_those_of_the_answers(tmp_path: Path) -> None:
    bundle = with_references(write_test_bundle(tmp_path / "bundle", SPEC))
    (tmp_path / "serve.toml").write_text('[guard.agents.agent_1]\nmode = "fallback"\nthreshold = 0.0\n')
    metrics, absent = free_port(), free_port()
    options = ("--metrics-port", str(metrics), "--config", str(tmp_path / "serve.toml"))
    generator = np.random.default_rng(3)
    endpoints = [f"127.0.0.1:{metrics}", f"127.0.0.1:{absent}"]
    with watching(endpoints, 0, 0.05) as url:
        with server_process(bundle, options=options) as server, RemoteTeam([server.endpoint]) as team:
            eventually(url, lambda figures: figures["servers"][0]["down"] == "")
            divergence = []
            for rows in (1, 3, 2):
                decisions = team.act(
                    {
                        a.name: generator.normal(size=(rows, a.observation_size)).astype("f4")
                        for a in SPEC.agents
                    }
                )
                divergence.append(np.stack([decisions[name].divergence for name in SPEC.names], axis=1))
            with pytest.raises(grpc.RpcError), grpc.insecure_channel(server.endpoint) as channel:
                channel.unary_unary("/omcda.v1.PolicyService/Act")(b"", timeout=5)  # type: ignore[arg-type]
            figures = eventually(url, lambda figures: figures["servers"][0]["misses"])
            with urlopen(f"http://{endpoints[0]}/metrics", timeout=5) as answer:
                told = {family.name for family in text_string_to_metric_families(answer.read().decode())}
            assert told >= scrapes.FAMILIES
            up, down = figures["servers"]
            assert down["down"] == "no metrics: Connection refused"
            assert up["misses"] == {"NOT_FOUND": 1}
            assert up["versions"] == [{"version": "1", "current": "yes", "shadow": "no"}]
            assert 0.0 < up["p50_ms"] <= up["p99_ms"] < 1000.0
            assert up["answers_per_s"] > 0.0
            agents = {row["agent"]: row for row in figures["agents"] if row["model"] == "team"}
            assert {row["model"] for row in figures["agents"]} == {"team", *SPEC.names}
            for index, (name, mode) in enumerate(zip(SPEC.names, ("observe", "fallback"), strict=True)):
                row = agents[name]
                assert row["divergence"] == pytest.approx(
                    np.concatenate(divergence)[:, index].mean(), rel=1e-5
                )
                assert (row["mode"], row["replaced"]) == (mode, float(mode == "fallback"))
                assert (row["version"], row["current"], row["budget"]) == ("1", True, bundle.budgets[name])
                assert sum(point[3] * point[1] for point in row["trend"]) == (
                    pytest.approx(sum(point[1] for point in row["trend"]) * row["replaced"])
                )
            if CHROMIUM is not None:
                shown = dom(url)
                assert "1 of 2 servers answer" in shown
                assert re.search(
                    rf"agent_1\s+of team\s.*{agents['agent_1']['divergence']:.3g}\b", shown, re.DOTALL
                )
                assert re.search(r"fallback\s+above 0\s+100 %\s+100 %", shown)
                assert "1 NOT_FOUND" in shown
        eventually(url, lambda figures: figures["servers"][0]["down"] != "")
        assert {row["agent"] for row in asked(url)["agents"]} == set(SPEC.names), "the last known ones stay"
        with pytest.raises(HTTPError, match="403"):  # a foreign page that names this machine
            urlopen(Request(f"{url}figures", headers={"Host": "evil.example"}), timeout=5)
        with pytest.raises(HTTPError, match="404"):
            urlopen(f"{url}../etc/passwd", timeout=5)
        with urlopen(url, timeout=5) as answer:
            text = answer.read().decode()
            assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert set(re.findall(r"https?://[^\"' ]+", text)) == {"http://www.w3.org/2000/svg"}  # a name, no address


def test_counters_that_begin_anew_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([5.0, 7.0, 1.0, 4.0])
    monkeypatch.setattr(scrapes, "read_metrics", lambda _: {"omcda_rows_total": {(): next(counts)}})
    server = Watched("a:1")
    for _ in range(4):
        server.scrape()
    assert [total(interval.growth, "omcda_rows_total") for interval in server.intervals] == [2.0, 1.0, 3.0]


def test_quantiles_lie_within_their_buckets() -> None:
    inf = float("inf")
    counts = Counter({1.0: 10, 2.0: 30, inf: 40})
    assert quantile(counts, 0.5) == pytest.approx(1.5)
    assert quantile(counts, 0.25) == pytest.approx(1.0)
    assert quantile(counts, 0.99) == 2.0  # beyond the last bound nothing is known
    assert quantile(Counter({1.0: 0, inf: 0}), 0.5) is None
    assert quantile(Counter(), 0.5) is None


@pytest.mark.parametrize(
    "address", ["a", "a:", ":1", "a:99999", "a:0", "a/b:1", "u@a:1", "::1:9600", "a:1/x", ""]
)
def test_addresses_that_are_none_are_refused(address: str) -> None:
    with pytest.raises(EndpointError, match=r"HOST:PORT or \[IPv6\]:PORT, got"):
        require_address(address)


def test_addresses_are_taken() -> None:
    for address in ("127.0.0.1:9600", "[::1]:9600", "robot.example:1"):
        require_address(address)


def test_what_is_no_metrics_is_said() -> None:
    with watching(["127.0.0.1:1"], 0, 60.0) as url:
        with pytest.raises(EndpointError, match="no metrics: Not Found"):
            read_metrics(url.removeprefix("http://").rstrip("/"))
        taken = int(url.rstrip("/").rpartition(":")[2])
        with (
            pytest.raises(EndpointError, match=r"cannot listen on .* in use\. Choose another --port"),
            watching(["127.0.0.1:1"], taken, 60.0),
        ):
            pass


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--metrics", "127.0.0.1"], "expected the address of metrics as HOST:PORT"),
        (["--metrics", ","], "expected at least one metrics port"),
        (["--metrics", "127.0.0.1:1", "--port", "70000"], "cannot listen on 127.0.0.1:70000"),
        (["--metrics", "127.0.0.1:1", "--every", "nan"], "--every: expected seconds above 0, got nan"),
    ],
)
def test_the_command_refuses_what_is_wrong(words: list[str], message: str) -> None:
    with pytest.raises(OmcdaError, match=message):
        CliRunner().invoke(app, ["watch", *words], catch_exceptions=False)


def test_the_command_ends_by_signal() -> None:
    command = [sys.executable, "-m", "omcda_deploy.cli", "watch", "--metrics", "127.0.0.1:1-3", "--port", "0"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("watching 3 servers on http://127.0.0.1:")
        assert len(asked(line.split()[-1])["servers"]) == 3
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 143
