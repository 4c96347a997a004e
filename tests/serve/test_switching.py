"""Operators of a team over several processes: switches that race or fail half-way, and its control streams."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from omcda_deploy.cli import app
from omcda_deploy.client.admin import TeamAdmin
from omcda_deploy.client.remote import RemotePolicy
from omcda_deploy.errors import EndpointError
from omcda_deploy.serve.repository import CURRENT
from tests.serve.test_releases import SPEC, Served
from tests.support.bundles import write_test_bundle
from tests.support.server_process import free_port, server_process

VERSIONS = ("1", "2", "3")


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Path]]:
    """Two processes of one folder, which hold all versions; and the folder. 3 is current, 1 the one before."""
    folder = tmp_path_factory.mktemp("releases")
    for version in VERSIONS:
        write_test_bundle(folder / version, SPEC, seed=int(version))
    (folder / CURRENT).write_text("3\n1\n")
    with ExitStack() as stack:
        endpoints, admin, processes = {}, [], []
        for agent in SPEC.names:
            port = free_port()
            server = stack.enter_context(
                server_process(folder, agent, options=("--admin-port", str(port)), log=folder / agent)
            )
            endpoints[agent] = server.endpoint
            admin.append(f"127.0.0.1:{port}")
            processes.append(server.process)
        with TeamAdmin(admin) as all_servers:
            for version in VERSIONS:
                all_servers.load(version)
        yield Served(endpoints, admin, processes), folder


@pytest.fixture
def admin(team: tuple[Served, Path]) -> Iterator[TeamAdmin]:
    """Operators of the team, who begin with 3 current and 1 before."""
    with TeamAdmin(team[0].admin) as admin:
        for version in ("1", "3"):
            admin.switch(version)
        yield admin


def versions(admin: TeamAdmin) -> set[tuple[str, str]]:
    return {(status.current, status.previous) for status in admin.status().values()}


def test_a_second_phase_that_fails_leaves_all_as_it_was(
    team: tuple[Served, Path], admin: TeamAdmin, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, folder = team
    admin.switch("1")
    admin.switch("3", evidence='{"low": 1}')
    before = admin.status()
    stopped = served.processes[1]
    load = admin.load

    def hang(version: str, **options: bool) -> object:
        statuses = load(version, **options)
        os.kill(stopped.pid, signal.SIGSTOP)
        return statuses

    monkeypatch.setattr(admin, "load", hang)
    monkeypatch.setattr("omcda_deploy.client.admin.LIMIT_S", 0.5)
    monkeypatch.setattr("omcda_deploy.client.admin.UNDO_LIMIT_S", 0.5)
    try:
        with pytest.raises(
            EndpointError, match=rf"Switch 2 failed on 1 servers: {served.admin[1]}: DEADLINE"
        ):
            admin.switch("2")
    finally:
        os.kill(stopped.pid, signal.SIGCONT)
    monkeypatch.undo()
    assert versions(admin) == {("3", "1")}
    assert {status.evidence for status in admin.status().values()} == {'{"low": 1}'}
    assert (folder / CURRENT).read_text() == '3\n1\n{"low": 1}\n'
    admin.rollback()  # to the version that answered before, not to the one that failed
    assert versions(admin) == {("1", "3")}
    assert before.keys() == admin.status().keys()


@pytest.mark.parametrize("same", [False, True])  # whether both want the same version
@pytest.mark.parametrize(
    "races",
    [20, pytest.param(100, marks=pytest.mark.slow)],  # slow: the number that is promised
)
def test_operators_who_switch_at_once_never_split_a_team(
    team: tuple[Served, Path], admin: TeamAdmin, races: int, same: bool
) -> None:
    outcomes = [0, 0, 0]  # races with no success, one, two
    refusals: list[str] = []
    draw = random.Random(0)
    with TeamAdmin(team[0].admin) as other:
        for _ in range(races):
            before = versions(admin)
            ((current, _),) = before
            first, second = draw.sample([version for version in VERSIONS if version != current], 2)
            second = first if same else second
            begin = threading.Barrier(2)
            succeeded: list[str] = []

            def switch(
                operator: TeamAdmin,
                version: str,
                begin: threading.Barrier = begin,
                succeeded: list[str] = succeeded,
                current: str = current,
            ) -> None:
                begin.wait()
                try:
                    operator.switch(version, replacing=current)
                    succeeded.append(version)
                except EndpointError as error:
                    refusals.append(str(error))

            threads = [
                threading.Thread(target=switch, args=pair) for pair in ((admin, first), (other, second))
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert versions(admin) == ({(succeeded[0], current)} if succeeded else before)
            outcomes[len(succeeded)] += 1
    assert all("somebody else has switched meanwhile" in refusal for refusal in refusals)
    assert outcomes[2] == 0
    assert outcomes[1] > 0


def test_an_operator_who_names_the_version_to_replace_replaces_no_other(
    team: tuple[Served, Path], admin: TeamAdmin
) -> None:
    words = ["release", "switch", "2", "--admin", ",".join(team[0].admin)]
    result = CliRunner().invoke(app, [*words, "--replacing", "1"])
    assert isinstance(result.exception, EndpointError)
    assert "expected version 1 to be current, version 3 is" in str(result.exception)
    assert versions(admin) == {("3", "1")}
    result = CliRunner().invoke(app, [*words, "--replacing", "3"], catch_exceptions=False)
    assert result.exit_code == 0
    assert versions(admin) == {("2", "3")}


def test_streams_are_listed_and_ended(team: tuple[Served, Path], admin: TeamAdmin) -> None:
    served, folder = team
    agent, endpoint = next(iter(served.endpoints.items()))
    observation = np.zeros((1, SPEC.agent(agent).observation_size), np.float32)
    words = ["release", "streams", "--admin", ",".join(served.admin)]
    with RemotePolicy(endpoint, stream=True) as policy:
        for _ in range(3):
            policy.act(observation)
        (stream,) = admin.streams()[served.admin[0]]
        assert (stream.steps, admin.streams()[served.admin[1]]) == (3, [])
        assert stream.client.startswith("127.0.0.1:")
        assert 0.0 <= stream.idle_s <= stream.age_s < 60.0
        assert stream.client in CliRunner().invoke(app, words, catch_exceptions=False).output
        assert admin.end_streams("127.0.0.2") == {endpoint: [] for endpoint in served.admin}
        result = CliRunner().invoke(app, [*words, "--end", stream.client], catch_exceptions=False)
        assert "ended 1 streams" in result.output
        assert admin.streams()[served.admin[0]] == []
        policy.act(observation)  # it opens a new one
        assert len(admin.end_streams("127.0.0.1")[served.admin[0]]) == 1
        with pytest.raises(
            EndpointError, match="expected the address or the host of a client, or all, got none"
        ):
            admin.end_streams("")
    assert f"EndStreams {stream.client} by ipv4:127.0.0.1:" in (folder / agent).read_text()
