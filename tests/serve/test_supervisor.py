"""The supervisor: one process per agent, restarts after deaths, and an evaluation that goes on meanwhile."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from omcda_deploy import registry
from omcda_deploy.bundle import Bundle
from omcda_deploy.client.admin import TeamAdmin
from omcda_deploy.client.fallback import BehaviorTeam
from omcda_deploy.client.remote import RemotePolicy, RemoteTeam
from omcda_deploy.errors import EndpointError, MissedAnswerError, OmcdaError
from omcda_deploy.local import LocalTeam
from omcda_deploy.play.evaluate import evaluate
from omcda_deploy.serve.options import LOOPBACK, Listen, ServeOptions
from omcda_deploy.serve.repository import Pin
from omcda_deploy.serve.supervisor import AgentServer, Backoff, _last_of, serve_team
from tests.support.bundles import write_test_bundle
from tests.support.server_process import free_ports, require_ports_free

TASK = "toy/chain-mixed"
EPISODES = 12  # about 20 steps each


def supervisor(source: Path, base_port: int, code: str = "", *options: str) -> subprocess.Popen[str]:
    """Start a supervisor with further ``options``. ``code``: run first."""
    code += (
        "import sys\n"
        "from omcda_deploy.errors import OmcdaError\n"
        "from omcda_deploy.serve.options import ServeOptions\n"
        "from omcda_deploy.serve.supervisor import serve_team\n"
        "try: serve_team(ServeOptions.parse(sys.argv[1:]))\n"
        "except OmcdaError as error: sys.exit(f'error: {error}')\n"
    )
    command = [sys.executable, "-c", code, str(source), "--port", str(base_port), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_serve_team_runs_one_process_per_agent(discrete_bundle: Bundle) -> None:
    base = free_ports(2)
    with supervisor(discrete_bundle.path, base) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        endpoints = {f"agent_{i}": f"{LOOPBACK}:{base + i}" for i in range(2)}
        assert lines == [f"serving {agent} on {endpoint}\n" for agent, endpoint in endpoints.items()]
        with RemoteTeam(list(endpoints.values())) as team:
            assert team.endpoints == endpoints
        process.terminate()
        rest, errors = process.communicate(timeout=20)
    assert (process.returncode, rest, errors) == (0, "", "")
    require_ports_free(base, 2)


def test_serve_team_stops_all_when_one_cannot_start(discrete_bundle: Bundle, tmp_path: Path) -> None:
    bundle = write_test_bundle(tmp_path / "bundle", discrete_bundle.spec)
    broken = bundle.model_path("agent_1")
    broken.write_bytes(b"no graph")
    manifest = json.loads((bundle.path / "bundle.json").read_text())
    manifest["files"]["agent_1/1/model.onnx"] = hashlib.sha256(b"no graph").hexdigest()
    (bundle.path / "bundle.json").write_text(json.dumps(manifest))
    base = free_ports(2)
    with supervisor(bundle.path, base) as process:
        output, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert output == "", "ready lines of a team that is not ready"
    first, last = errors.strip().splitlines()
    assert first.startswith("error: ")
    assert "cannot be loaded" in first
    assert f"agent_1 on {LOOPBACK}:{base + 1} did not start" in last
    require_ports_free(base, 2)


def test_serve_team_names_the_port_in_use(
    continuous_bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    base = free_ports(3)
    with socket.socket() as taken:
        taken.bind((LOOPBACK, base + 2))
        taken.listen()
        with pytest.raises(EndpointError, match=f"cannot listen on {LOOPBACK}:{base + 2}: .* in use"):
            serve_team(ServeOptions(continuous_bundle.path, listen=Listen(port=base)))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("listen", "grace_s", "message"),
    [
        ({"port": 0}, 1.0, "--base-port: expected the port of the first agent, from 1 on, got 0"),
        ({"port": 20_100, "metrics_port": 65_534}, 1.0, "expected a port from 0 to 65535, got 65536"),
        ({"port": 20_100, "admin_port": 20_101}, 1.0, "got 20101 twice"),
        ({"port": 20_100, "metrics_port": 20_100}, 1.0, "expected a port for each purpose, got 20100 twice"),
        ({"port": 20_100}, float("nan"), "--grace: expected seconds from 0 on, got nan"),
        ({"port": 20_100, "host": "nobody.invalid"}, 1.0, "cannot listen on nobody.invalid: .* --host"),
    ],
)
def test_what_cannot_be_started_is_refused_before_any_process_is(
    continuous_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, listen: Any, grace_s: float, message: str
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(OmcdaError, match=message):
        serve_team(ServeOptions(continuous_bundle.path, listen=Listen(**listen), grace_s=grace_s))


def test_servers_stop_when_their_supervisor_is_killed(discrete_bundle: Bundle) -> None:
    base = free_ports(2)
    with supervisor(discrete_bundle.path, base) as process:
        assert process.stdout is not None
        for _ in range(2):
            assert process.stdout.readline().startswith("serving ")
        process.kill()
    end = time.monotonic() + 20
    while time.monotonic() < end:
        try:
            require_ports_free(base, 2)
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("servers without a supervisor went on")


# Deaths ----------------------------------------------------------------------------------------------------


def test_pauses_double_up_to_a_limit_and_a_minute_of_life_forgives() -> None:
    backoff = Backoff()
    pauses = [backoff.after(lived) for lived in (0.0, 59.9, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)]
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]
    assert [backoff.after(lived) for lived in (60.0, 0.0, 3600.0)] == [0.1, 0.2, 0.1]


def test_a_server_that_keeps_dying_is_started_at_growing_intervals_one_line_each(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    starts = tmp_path / "starts"
    code = f"import time; open({str(starts)!r}, 'a').write(f'{{time.time()}}\\n'); raise SystemExit(3)"
    server = AgentServer("agent_0", "an:endpoint", [sys.executable, "-c", code])
    end = time.monotonic() + 20
    with caplog.at_level(logging.INFO):
        while len(caplog.records) < 4 and time.monotonic() < end:
            server.keep_alive()
            time.sleep(0.01)
    assert [record.getMessage() for record in caplog.records] == [
        f"the server of agent_0 on an:endpoint exited with status 3 and is started again in {pause} s"
        for pause in (0.1, 0.2, 0.4, 0.8)
    ]
    times = [float(line) for line in starts.read_text().split()]
    assert len(times) == 4  # and not a fifth one: its pause has only begun
    assert (np.diff(times) >= (0.1, 0.2, 0.4)).all()
    server.terminate()
    server.wait(1.0)  # between two lives there is nothing to stop


def agent_process(supervisor_pid: int, agent: str) -> int:
    """Return the process id of an agent's server."""
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            command = (entry / "cmdline").read_text().split("\0")
            if parent == supervisor_pid and f"--model={agent}" in command:
                return int(entry.name)
    raise AssertionError(f"no process of {agent}")


class Attack:
    """A progress callback that sends a signal to an agent's server after 20 steps, and awaits the server's return.

    ``missed``: answers of that agent until its return. ``after``: steps since then.
    """

    def __init__(self, process: int, agent: str, number: signal.Signals, team: RemoteTeam) -> None:
        self.missed = self.after = 0
        self._target, self._number, self._agent, self._team = (
            agent_process(process, agent),
            number,
            agent,
            team,
        )
        self._steps = 0

    def __call__(self, done: float, total: float) -> None:
        self._steps += 1
        if self._steps == 20:
            os.kill(self._target, self._number)
        elif self._steps > 20 and self._team.missed[self._agent] < 3:
            time.sleep(0.03)  # the others are asked, and the server that is to stop comes to it
        elif self._steps > 20 and not self.missed:
            self.missed = self._team.missed[self._agent]
            wait_for(self._team.endpoints[self._agent], self._agent)
            time.sleep(1.3)  # channels look again within a second
        elif self.missed:
            self.after += 1


def wait_for(endpoint: str, agent: str) -> None:
    end = time.monotonic() + 20
    while True:
        try:
            return RemotePolicy(endpoint, agent).close()
        except EndpointError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


@pytest.fixture(scope="module")
def toy_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_test_bundle(tmp_path_factory.mktemp("toy") / "bundle", registry.team_spec(TASK))


@contextmanager
def supervised(
    source: Path, agents: int, code: str = ""
) -> Iterator[tuple[int, list[str], Callable[[], list[str]]]]:
    """Yield the process id, the endpoints, and a function that stops all servers and returns their log lines."""
    base = free_ports(agents)
    with supervisor(source, base, code) as process:
        assert process.stdout is not None
        endpoints = [process.stdout.readline().split()[-1] for _ in range(agents)]

        def stop() -> list[str]:
            process.terminate()
            errors = process.communicate(timeout=20)[1]
            assert process.returncode == 0, errors
            return errors.splitlines()

        try:
            yield process.pid, endpoints, stop
        finally:
            process.terminate()


def restarted(agent: str, endpoint: str, status: int, pause: float) -> str:
    return (
        f"the server of {agent} on {endpoint} exited with status {status} and is started again in {pause} s"
    )


def test_an_evaluation_outlives_its_servers(toy_bundle: Bundle) -> None:
    local = LocalTeam(toy_bundle)
    expected = evaluate(local, TASK, episodes=EPISODES, num_envs=1)
    with supervised(toy_bundle.path, 3) as (process, endpoints, stop):
        first = agent_process(process, "agent_0")
        for stream, number, fallback in (
            (True, signal.SIGKILL, local),
            (False, signal.SIGTERM, BehaviorTeam(toy_bundle)),
        ):
            with RemoteTeam(endpoints, stream=stream, deadline_s=5, fallback=fallback) as team:
                attack = Attack(process, "agent_1", number, team)
                result = evaluate(team, TASK, episodes=EPISODES, num_envs=1, progress=attack)
                assert 3 <= attack.missed == team.missed["agent_1"], "missed again after its return"
                assert attack.after > 20
                steps = {"agent_0": 0, "agent_1": attack.missed, "agent_2": 0}
                assert result.fallback_steps == team.missed == steps
                assert result.to_json()["fallback"] == {"by": type(fallback).__name__, "steps": steps}
                if fallback is local:  # the same bundle: every episode is the one played without servers
                    assert result.returns.tolist() == expected.returns.tolist()

        with RemoteTeam(endpoints, deadline_s=5) as team:
            attack = Attack(process, "agent_2", signal.SIGKILL, team)
            with pytest.raises(
                MissedAnswerError, match=f"{endpoints[2]}: step of agent_2 failed.*cannot be reached"
            ):
                evaluate(team, TASK, episodes=EPISODES, num_envs=1, progress=attack)
        assert agent_process(process, "agent_0") == first
        time.sleep(1.0)  # it is starting again: that holds up no end
        assert stop() == [
            restarted("agent_1", endpoints[1], -9, 0.1),
            restarted("agent_1", endpoints[1], 0, 0.2),
            restarted("agent_2", endpoints[2], -9, 0.1),
        ]


def test_a_restart_promotes_no_version(discrete_bundle: Bundle, tmp_path: Path) -> None:
    """A new bundle lies in the folder, then the note of the current version is gone: neither is a switch."""
    folder = tmp_path / "releases"
    shutil.copytree(discrete_bundle.path, folder / "1")
    with supervised(folder, 2) as (process, endpoints, stop), RemoteTeam(endpoints, fallback="hold") as team:
        write_test_bundle(folder / "2", discrete_bundle.spec, seed=9)
        for gone in (False, True):
            if gone:
                (folder / "current").unlink()
            os.kill(agent_process(process, "agent_0"), signal.SIGKILL)
            wait_for(endpoints[0], "agent_0")
            time.sleep(0.2)
            team.reset()
            assert (team.version, team.bundle_digest) == ("1", discrete_bundle.digest)
            assert (folder / "current").read_text() == "1\n\n"
        assert len(stop()) == 2


def test_a_restart_follows_its_own_team_and_not_the_switches_of_another(
    discrete_bundle: Bundle, tmp_path: Path
) -> None:
    """Two teams share a folder: what one of them is switched to must not reach one server of the other."""
    folder = tmp_path / "releases"
    for version in ("1", "2", "3"):
        write_test_bundle(folder / version, discrete_bundle.spec, seed=int(version))
    (folder / "current").write_text("1\n\n")
    base = free_ports(4)
    endpoints = [f"{LOOPBACK}:{base + i}" for i in range(2)]
    with (
        supervisor(folder, base, "", "--admin-port", str(base + 2)) as process,
        TeamAdmin([f"{LOOPBACK}:{base + 2 + i}" for i in range(2)]) as admin,
    ):

        def versions() -> list[tuple[str, str]]:
            return [(status.current, status.previous) for status in admin.status().values()]

        def restart(agent: int) -> None:
            os.kill(agent_process(process.pid, f"agent_{agent}"), signal.SIGKILL)
            wait_for(endpoints[agent], f"agent_{agent}")
            time.sleep(1.3)  # channels look again within a second

        try:
            assert process.stdout is not None
            for _ in endpoints:
                process.stdout.readline()
            (folder / "current").write_text("3\n1\n")  # as another team's switch does
            restart(0)
            assert versions() == 2 * [("1", "")]
            admin.switch("2")
            (folder / "current").write_text("3\n1\n")
            restart(1)  # at once: nobody has asked the other server since
            assert versions() == 2 * [("2", "1")]
        finally:
            process.terminate()
            process.communicate(timeout=20)


def test_a_server_is_started_with_what_the_others_agree_on(tmp_path: Path) -> None:
    """It may have died in the middle of a switch, which the others have undone or completed."""
    idle = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    servers = [AgentServer(f"agent_{i}", "an:endpoint", idle) for i in range(3)]
    one, two = Pin("1", "a"), Pin("2", "b", "1")
    try:
        assert _last_of(servers[0], servers) is None
        servers[0].said = two
        assert _last_of(servers[0], servers) == two
        servers[1].said = servers[2].said = one
        assert _last_of(servers[0], servers) == one
        servers[1].said = two
        assert _last_of(servers[0], servers) == two  # they differ: what it had
        servers[1].terminate()
        servers[1].wait(5.0)
        assert _last_of(servers[0], servers) == one  # the dead have no say
    finally:
        for server in servers:
            server.terminate()
            server.wait(5.0)


def test_a_hung_server_is_killed_and_started_again(
    discrete_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others go on; a stop does not wait for one that hangs."""
    code = "from omcda_deploy.serve import supervisor; supervisor.LOOK_S = 0.2\n"
    with supervised(discrete_bundle.path, 2, code) as (process, endpoints, stop):
        first, other = agent_process(process, "agent_0"), agent_process(process, "agent_1")
        os.kill(first, signal.SIGSTOP)
        wait_for(endpoints[0], "agent_0")
        assert agent_process(process, "agent_1") == other
        os.kill(agent_process(process, "agent_0"), signal.SIGSTOP)
        time.sleep(0.9)
        began = time.monotonic()
        assert stop() == [
            f"the server of agent_0 on {endpoints[0]} has not answered for 1 s and is killed",
            restarted("agent_0", endpoints[0], -9, 0.1),
        ]
        assert time.monotonic() - began < 3.0


def test_a_server_is_ready_only_when_its_models_are_warm(continuous_bundle: Bundle, tmp_path: Path) -> None:
    """Warm-up waits until the test allows it; until then no answer may be SERVING."""
    begun, go = tmp_path / "begun", tmp_path / "go"
    code = f"""if True:
        import pathlib, sys, time
        from omcda_deploy.serve import server, session
        run = session.OnnxModel.run
        def hold_up(self, feeds):
            pathlib.Path({str(begun)!r}).touch()
            while not pathlib.Path({str(go)!r}).exists():
                time.sleep(0.01)
            return run(self, feeds)
        session.OnnxModel.run = hold_up
        sys.exit(server.main(sys.argv[1:]))
    """
    port = free_ports(1)
    command = [
        sys.executable,
        "-c",
        code,
        str(continuous_bundle.path),
        "--model",
        "agent_0",
        "--port",
        str(port),
    ]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process,
        grpc.insecure_channel(f"{LOOPBACK}:{port}") as channel,
    ):
        check = health_pb2_grpc.HealthStub(channel).Check
        try:
            end = time.monotonic() + 20
            while not begun.exists() and time.monotonic() < end:
                time.sleep(0.01)
            assert begun.exists(), "it never ran its model before it was asked to"
            with pytest.raises(grpc.RpcError):
                check(health_pb2.HealthCheckRequest(), timeout=0.5, wait_for_ready=True)
            go.touch()
            answer = check(health_pb2.HealthCheckRequest(), timeout=20, wait_for_ready=True)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        finally:
            process.terminate()
