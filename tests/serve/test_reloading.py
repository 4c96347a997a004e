"""Configurations that are read again while servers run: taken over whole, or refused whole."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
from typer.testing import CliRunner

from omcda_deploy.cli import app
from omcda_deploy.client.admin import TeamAdmin
from omcda_deploy.client.remote import RemoteTeam
from omcda_deploy.errors import EndpointError
from tests.serve.test_supervisor import agent_process
from tests.support.bundles import continuous_spec, with_references, write_test_bundle
from tests.support.server_process import free_port, free_ports, server_process

SPEC = continuous_spec(agents=2)
ROWS = {a.name: np.full((2, a.observation_size), 0.3, np.float32) for a in SPEC.agents}
WATCHES, ACTS = "[guard]\n", '[guard]\nmode = "fallback"\nthreshold = 0.0\n'
WRONG = {
    '[guard]\nmode = "blen"': "guard mode: expected one of observe, fallback, blend, got 'blen'",
    '[guard.agents.agent_7]\nmode = "blend"': "version 1: unknown agent of [guard.agents] 'agent_7'",
    "[guard": "is not TOML",
    ACTS
    + "[limits]\nmessage_bytes = 5000": "limits.message_bytes: expected what the server was started with",
    ACTS + "[limits]\nconnection_calls = 2": "limits.connection_calls: expected what the server was started",
    ACTS
    + "[recording]\nsize_mb = 50": "[recording]: expected what the server was started with, got a change",
    ACTS + '[tls]\ncertificate = "a"\nkey = "b"': "[tls]: expected what the server was started with",
    ACTS + '[access]\ntoken_file = "serve.toml"': "access.token_file: expected what the server was started",
    ACTS + '[access]\nadmin_token_file = "none"': "access.admin_token_file: ",
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_references(write_test_bundle(tmp_path_factory.mktemp("reloading") / "bundle", SPEC)).path


@dataclass(frozen=True)
class Server:
    """A server of all models, with its configuration and its log."""

    endpoint: str
    admin: str
    metrics: str
    config: Path
    log: Path
    pid: int

    def audited(self) -> list[dict[str, Any]]:
        lines = (json.loads(line) for line in self.log.read_text().splitlines())
        return [line for line in lines if "call" in line]


@pytest.fixture
def server(bundle: Path, tmp_path: Path) -> Iterator[Server]:
    config, ports = tmp_path / "serve.toml", free_ports(2)
    config.write_text(WATCHES)
    options = ["--config", str(config), "--log-json"]
    options += ["--admin-port", str(ports), "--metrics-port", str(ports + 1)]
    with server_process(bundle, options=options, log=tmp_path / "log") as process:
        metrics = f"http://127.0.0.1:{ports + 1}/metrics"
        admin, pid = f"127.0.0.1:{ports}", process.process.pid
        yield Server(process.endpoint, admin, metrics, config, tmp_path / "log", pid)


def guards(team: RemoteTeam) -> bool:
    """Test if the guard replaced all actions of a step; if not, it replaced none."""
    weights = {float(w) for d in team.act(ROWS).values() for w in np.asarray(d.policy_weight)}
    assert weights in ({0.0}, {1.0}), weights
    return weights == {0.0}


def reload(server: Server) -> Any:
    return CliRunner().invoke(app, ["release", "reload-config", "--admin", server.admin])


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_guards_and_limits_change_between_two_steps_of_a_stream(server: Server) -> None:
    with RemoteTeam([server.endpoint], stream=True, deadline_s=5) as team:
        assert not guards(team)
        server.config.write_text(ACTS + "[limits]\nrows = 2\nstreams = 1\n")
        assert not guards(team), "a file changes nothing by itself"
        result = reload(server)
        assert result.exit_code == 0
        assert "fallback 0" in result.output
        assert guards(team)
        with urlopen(server.metrics) as answer:  # the graph of all agents answered; it counts anew
            text = answer.read().decode()
        labels = 'agent="agent_1",mode="fallback",model="team",version="1"'
        assert f"omcda_guard_replaced_rows_total{{{labels}}} 2.0" in text
        assert 'omcda_rows_total{model="team",version="1"} 2.0' in text
        with (
            RemoteTeam([server.endpoint], stream=True) as second,
            pytest.raises(EndpointError, match="at most 1 control streams"),
        ):
            second.act(ROWS)
        with RemoteTeam([server.endpoint]) as calls, pytest.raises(EndpointError, match="at most 2 rows"):
            calls.act({name: np.concatenate([rows, rows]) for name, rows in ROWS.items()})
        assert guards(team)
    assert [(line["call"], line["outcome"]) for line in server.audited()] == [
        ("CheckConfig", "OK"),
        ("ReloadConfig", "OK"),
    ]


def test_wrong_files_are_refused_and_the_old_stays(server: Server) -> None:
    with RemoteTeam([server.endpoint], stream=True, deadline_s=5) as team:
        for text, message in WRONG.items():
            server.config.write_text(text)
            with TeamAdmin([server.admin]) as admin, pytest.raises(EndpointError) as refusal:
                admin.reload_config()
            assert message in str(refusal.value)
            assert not guards(team), text
        result = reload(server)
        assert (result.exit_code, isinstance(result.exception, EndpointError)) == (1, True)
        server.config.unlink()
        assert "does not exist" in str(reload(server).exception)
        os.kill(server.pid, signal.SIGHUP)
        eventually(lambda: server.audited()[-1]["peer"] == "SIGHUP")
        assert server.audited()[-1]["outcome"] == "FAILED_PRECONDITION"
        assert not guards(team)
        server.config.write_text(ACTS)
        os.kill(server.pid, signal.SIGHUP)
        eventually(lambda: guards(team))


def test_one_wrong_file_of_a_team_changes_no_server(server: Server, bundle: Path, tmp_path: Path) -> None:
    port, other = free_port(), tmp_path / "other.toml"
    other.write_text(WATCHES)
    options = ("--config", str(other), "--admin-port", str(port))
    with (
        server_process(bundle, options=options),
        TeamAdmin([server.admin, f"127.0.0.1:{port}"]) as admin,
        RemoteTeam([server.endpoint]) as team,
    ):
        server.config.write_text(ACTS)
        other.write_text("[gard]")
        with pytest.raises(
            EndpointError, match=rf"CheckConfig failed on 1 servers: 127.0.0.1:{port}: .*'gard'"
        ):
            admin.reload_config()
        assert not guards(team)


def test_a_server_without_a_file_says_so(bundle: Path) -> None:
    port = free_port()
    with (
        server_process(bundle, "agent_0", options=("--admin-port", str(port))),
        TeamAdmin([f"127.0.0.1:{port}"]) as admin,
        pytest.raises(EndpointError, match="expected a server that was started with --config"),
    ):
        admin.reload_config()


def test_a_supervisor_passes_on_what_is_right(bundle: Path, tmp_path: Path) -> None:
    config, base, log = tmp_path / "serve.toml", free_ports(2), tmp_path / "log"
    config.write_text(WATCHES)
    command = ("-m", "omcda_deploy.cli", "serve")
    options = ("--base-port", str(base), "--config", str(config))
    with ExitStack() as stack:
        process = stack.enter_context(server_process(bundle, start=command, options=options, log=log)).process
        team = stack.enter_context(RemoteTeam([f"127.0.0.1:{base}", f"127.0.0.1:{base + 1}"], deadline_s=5))
        processes = [agent_process(process.pid, name) for name in SPEC.names]
        config.write_text(ACTS + "[limits]\nmessage_bytes = 5000")
        os.kill(process.pid, signal.SIGHUP)
        eventually(lambda: "of all servers stays as it was" in log.read_text())
        assert not guards(team)
        config.write_text(ACTS)
        os.kill(process.pid, signal.SIGHUP)
        eventually(lambda: log.read_text().count("ReloadConfig by SIGHUP: OK") == 2)
        assert guards(team)
        assert [agent_process(process.pid, name) for name in SPEC.names] == processes
