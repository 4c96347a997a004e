"""Versions of a team: held together, switched on all servers or none, retired without requests."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from typer.testing import CliRunner

from omcda_deploy.cli import app
from omcda_deploy.client.admin import TeamAdmin
from omcda_deploy.client.remote import RemotePolicy, RemoteTeam
from omcda_deploy.errors import BundleError, ContractError, EndpointError, UnknownNameError
from omcda_deploy.local import LocalTeam
from omcda_deploy.protos import policy_pb2
from omcda_deploy.protos.admin_pb2 import ServerStatus
from omcda_deploy.serve.config import Limits, ServerConfig
from omcda_deploy.serve.releases import Releases
from omcda_deploy.serve.repository import CURRENT
from omcda_deploy.serve.status import ExhaustedError, RequestError, StateError
from omcda_deploy.serve.wire import WireTensors
from omcda_deploy.spec import TeamSpec
from tests.support.bundles import continuous_spec, discrete_spec, write_test_bundle
from tests.support.server_process import free_port, server_process

SPEC = continuous_spec(agents=2)
ROWS = {a.name: np.full((2, a.observation_size), 0.3, np.float32) for a in SPEC.agents}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Versions 1, 2 and 10 of one team, whose actions differ; in this process they load without pauses."""
    monkeypatch.setattr("omcda_deploy.serve.releases.LOAD_PAUSE_S", 0.0)
    monkeypatch.setattr("omcda_deploy.serve.releases.CLOSE_PAUSE_S", 0.0)
    for version in ("1", "2", "10"):
        write_test_bundle(tmp_path / "releases" / version, SPEC, seed=int(version))
    (tmp_path / "releases" / "notes").mkdir()
    return tmp_path / "releases"


def held(releases: Releases) -> list[str]:
    return [models.version for models, _ in releases.held_versions()]


def action(releases: Releases, version: str = "") -> Any:
    return releases.find("agent_0", version).action(WireTensors(2, ROWS["agent_0"].tobytes()))


def test_the_first_start_notes_the_highest_version_and_nothing_else_promotes_one(folder: Path) -> None:
    assert Releases(folder, (), ServerConfig()).current == "10"
    assert (folder / CURRENT).read_text() == "10\n\n"
    write_test_bundle(folder / "11", SPEC, seed=11)
    assert Releases(folder, (), ServerConfig()).current == "10"  # a restart
    (folder / "11" / "agent_0" / "1" / "model.onnx").write_bytes(b"no graph")
    assert Releases(folder, (), ServerConfig()).current == "10"
    (folder / CURRENT).write_text("2\n")
    assert Releases(folder, (), ServerConfig()).current == "2"
    (folder / CURRENT).write_text("7")
    with pytest.raises(BundleError, match="current says '7': expected one of 1, 2, 10"):
        Releases(folder, (), ServerConfig())
    assert Releases(folder / "2", (), ServerConfig()).current == "1"  # a bundle by itself
    with pytest.raises(BundleError, match=r"notes: expected a bundle, or a folder of bundles named 1, 2, …"):
        Releases(folder / "notes", (), ServerConfig())


def test_a_version_is_loaded_named_switched_to_and_back(folder: Path) -> None:
    async def run() -> None:
        releases = Releases(folder, (), ServerConfig(retire_s=1e9))
        local = {v: LocalTeam(folder / v).act(ROWS)["agent_0"].action for v in ("1", "2", "10")}
        np.testing.assert_array_equal(action(releases), local["10"])
        with pytest.raises(UnknownNameError, match="version '2'"):
            action(releases, "2")
        with pytest.raises(UnknownNameError, match="version '2'"):
            await releases.switch("2")
        await releases.load("2")
        np.testing.assert_array_equal(action(releases), local["10"])
        np.testing.assert_array_equal(action(releases, "2"), local["2"])
        await releases.switch("2")
        np.testing.assert_array_equal(action(releases), local["2"])
        np.testing.assert_array_equal(action(releases, "10"), local["10"])
        assert (releases.current, releases.previous, (folder / CURRENT).read_text()) == ("2", "10", "2\n10\n")
        with pytest.raises(StateError, match="version 2 is in use"):
            await releases.unload("2")
        await releases.unload("10")
        assert held(releases) == ["2"]

    asyncio.run(run())


def test_admin_calls_name_a_version(folder: Path) -> None:
    async def run() -> None:
        releases = Releases(folder, (), ServerConfig())
        await releases.load("2")
        await releases.set_shadow("2")
        for change in (releases.load, releases.switch, releases.unload):
            with pytest.raises(RequestError, match="expected the name of a version, got an empty one"):
                await change("")
        assert (releases.current, releases.shadow, held(releases)) == ("10", "2", ["2", "10"])
        assert (folder / CURRENT).read_text() == "10\n\n"

    asyncio.run(run())


def test_a_server_that_is_started_again_holds_the_version_before_too(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        releases = Releases(folder, (), ServerConfig())
        before = action(releases)
        await releases.load("2")
        await releases.switch("2")
        again = Releases(folder, (), ServerConfig())
        assert (again.current, again.previous, held(again)) == ("2", "10", ["2", "10"])
        np.testing.assert_array_equal(action(again, "10"), before)  # an episode goes on

    asyncio.run(run())
    (folder / "10" / "agent_0" / "1" / "model.onnx").write_bytes(b"no graph")
    assert held(Releases(folder, (), ServerConfig())) == ["2"]
    assert "version 10, which answered before, is not held" in caplog.text
    shutil.rmtree(folder / "10")
    gone = Releases(folder, (), ServerConfig())
    assert (gone.current, gone.previous) == ("2", "")


def test_requests_of_many_rows_are_refused(folder: Path) -> None:
    releases = Releases(folder, (), ServerConfig(limits=Limits(rows=5)))
    session = releases.find("agent_0", "")
    tensor = session.inputs["observation"]
    releases.answer(session, WireTensors(5, bytes(tensor.size(5))))
    with pytest.raises(ExhaustedError, match=r"at most 5 rows in a request, got 6: .*raise limits.rows"):
        releases.answer(session, WireTensors(6, bytes(tensor.size(6))))
    with pytest.raises(RequestError, match=f"expected {tensor.size(6)} bytes .* got 1"):
        releases.answer(session, WireTensors(6, bytes(1)))  # rows that it does not have are no load


def test_what_cannot_be_loaded_changes_nothing(folder: Path) -> None:
    shutil.rmtree(folder / "1")
    write_test_bundle(folder / "1", discrete_spec())
    (folder / "2" / "agent_0" / "1" / "model.onnx").write_bytes(b"no graph")

    async def run() -> None:
        releases = Releases(folder, (), ServerConfig())
        with pytest.raises(ContractError, match=r"version 10, which is served, .* do not fit together"):
            await releases.load("1")
        with pytest.raises(BundleError, match="was changed after export"):
            await releases.load("2")
        with pytest.raises(UnknownNameError, match="unknown version '3'"):
            await releases.load("3")
        assert (held(releases), releases.current) == (["10"], "10")

    asyncio.run(run())


def test_versions_that_nobody_asks_for_retire(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("omcda_deploy.serve.releases.time.monotonic", lambda: now)

    async def run() -> None:
        nonlocal now
        releases = Releases(folder, (), ServerConfig(retire_s=60.0))
        await releases.load("2")
        await releases.switch("2")
        now += 50
        action(releases, "10")  # an episode that began before the switch
        now += 50
        assert await releases.retire() == []
        now += 11
        assert await releases.retire() == ["10"]
        with pytest.raises(UnknownNameError, match=r"version '10': .*known are 2"):
            action(releases, "10")
        now += 1000
        assert await releases.retire() == []  # the current one stays

    asyncio.run(run())


@pytest.mark.parametrize("spec", [continuous_spec(), discrete_spec()], ids=["continuous", "discrete"])
def test_a_shadow_is_measured_and_answers_nothing(
    tmp_path: Path, spec: TeamSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("1", "2"):
        write_test_bundle(tmp_path / version, spec, seed=int(version))
    agent, generator = spec.agents[0], np.random.default_rng(0)
    observations = generator.normal(size=(40, agent.observation_size)).astype(np.float32)
    masks = (
        np.ones((40, agent.action.size), np.uint8) if spec.action_kind == "discrete" else np.zeros((40, 0))
    )
    batch = WireTensors(40, observations.tobytes(), action_mask=masks.astype(np.uint8).tobytes())
    row = WireTensors(1, observations[:1].tobytes(), action_mask=masks[:1].astype(np.uint8).tobytes())

    async def run() -> None:
        releases = Releases(tmp_path, (), ServerConfig())
        await releases.load("1")
        await releases.set_shadow("1")
        with pytest.raises(StateError, match="version 2 answers"):
            await releases.set_shadow("2")
        session, shadow = releases.find("agent_0", ""), releases.find("agent_0", "1")
        ours, other = session.action(batch), shadow.action(batch)
        different = np.abs(ours - other) if ours.dtype.kind == "f" else ours != other
        assert different.mean() > 0.0
        for _ in range(2):
            assert releases.answer(session, batch)["action"] == ours.tobytes()
        assert (session.meter.compared, session.meter.shadow_failures) == (2, 0)
        assert session.meter.difference / session.meter.compared == pytest.approx(different.mean())
        releases.answer(session, row)  # a step on the fast path is compared, too
        assert session.meter.compared == 3
        assert session.meter.difference == pytest.approx(2 * different.mean() + different[:1].mean())
        assert shadow.meter.totals().answers == 0
        monkeypatch.setattr(shadow, "action", lambda tensors: 1 / 0)
        assert releases.answer(session, batch)["action"] == ours.tobytes()
        assert (session.meter.compared, session.meter.shadow_failures) == (3, 1)
        await releases.set_shadow("")
        releases.answer(session, row)
        releases.answer(session, batch)
        assert (session.meter.compared, session.meter.shadow_failures) == (0, 0)

    asyncio.run(run())


def test_a_version_that_answers_again_is_compared_anew(folder: Path) -> None:
    """Also where the shadow goes on, and where another one has taken its place meanwhile."""

    def compared(releases: Releases) -> tuple[int, float]:
        meter = releases.find("agent_0", "").meter
        return meter.compared, meter.difference

    async def run() -> None:
        releases = Releases(folder, (), ServerConfig())
        for version in ("1", "2"):
            await releases.load(version)
        step = WireTensors(2, ROWS["agent_0"].tobytes())
        await releases.set_shadow("1")
        for _ in range(5):
            releases.answer(releases.find("agent_0", ""), step)
        assert compared(releases)[0] == 5
        await releases.switch("2")
        assert compared(releases) == (0, 0.0)
        releases.answer(releases.find("agent_0", ""), step)
        assert compared(releases)[0] == 1
        await releases.set_shadow("")
        await releases.switch("10")
        assert compared(releases) == (0, 0.0)

    asyncio.run(run())


# -- a team over several processes ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    endpoints: dict[str, str]
    admin: list[str]
    processes: list[Any]


@contextmanager
def served(folders: dict[str, Path], tmp_path: Path) -> Iterator[Served]:
    """Run a process per agent, each with its own folder of versions, so that one of them can be made to fail."""
    with ExitStack() as stack:
        endpoints, admin, processes = {}, [], []
        for agent, folder in folders.items():
            port = free_port()
            server = stack.enter_context(
                server_process(folder, agent, options=("--admin-port", str(port), "--log-json"))
            )
            endpoints[agent] = server.endpoint
            admin.append(f"127.0.0.1:{port}")
            processes.append(server.process)
        yield Served(endpoints, admin, processes)


def copies(folder: Path, tmp_path: Path) -> dict[str, Path]:
    return {a.name: Path(shutil.copytree(folder, tmp_path / f"of-{a.name}")) for a in SPEC.agents}


def test_a_team_is_switched_together_or_not_at_all(folder: Path, tmp_path: Path) -> None:
    folders = copies(folder, tmp_path)
    shutil.rmtree(folders["agent_1"] / "1")  # one server that cannot load version 1
    with served(folders, tmp_path) as team, TeamAdmin(team.admin) as admin:
        with pytest.raises(EndpointError, match=rf"Load 1 failed on 1 servers: {team.admin[1]}: NOT_FOUND"):
            admin.switch("1")
        shutil.copytree(folder / "1", folders["agent_1"] / "1")
        (folders["agent_1"] / "1" / "agent_1" / "1" / "model.onnx").write_bytes(b"no graph")
        with pytest.raises(EndpointError, match=r"FAILED_PRECONDITION: .* was changed after export"):
            admin.switch("1")
        for status in admin.status().values():
            assert (status.current, [v.version for v in status.versions]) == ("10", ["10"])
        admin.switch("2")
        for agent, endpoint in team.endpoints.items():
            with RemotePolicy(endpoint, agent) as policy:
                expected = LocalTeam(folder / "2").act(ROWS)[agent].action
                np.testing.assert_array_equal(policy.act(ROWS[agent]).action, expected)
        words = ["--admin", ",".join(team.admin)]
        result = CliRunner().invoke(app, ["release", "rollback", *words], catch_exceptions=False)
        assert result.exit_code == 0
        assert {status.current for status in admin.status().values()} == {"10"}
        result = CliRunner().invoke(app, ["status", *words], catch_exceptions=False)
        assert "agent_1" in result.output
        # One server is gone: the other does not switch.
        team.processes[1].kill()
        team.processes[1].wait()
        with pytest.raises(EndpointError, match=rf"failed on 1 servers: {team.admin[1]}: UNAVAILABLE"):
            admin.switch("2")
        result = CliRunner().invoke(app, ["status", *words], catch_exceptions=False)
        assert result.exit_code == 1
        assert f"{team.admin[1]} told no status: UNAVAILABLE" in result.output
        result = CliRunner().invoke(app, ["status", "--json", *words], catch_exceptions=False)
        assert result.exit_code == 1
        values = json.loads(result.output)
        assert list(values) == ["servers", "down"]
        assert list(values["down"]) == [team.admin[1]]
        server = values["servers"][team.admin[0]]
        assert list(server) == [field.name for field in ServerStatus.DESCRIPTOR.fields]
        assert (server["current"], server["serving"]) == ("10", True)
        assert [agent["agent"] for model in server["models"] for agent in model["agents"]] == ["agent_0"]
        assert server["models"][0]["shadow_difference"] is None, "not a number"
        with TeamAdmin(team.admin[:1]) as rest:
            assert {status.current for status in rest.status().values()} == {"10"}


def test_an_episode_keeps_its_version_and_the_next_takes_the_current_one(
    folder: Path, tmp_path: Path
) -> None:
    actions = {v: {n: d.action for n, d in LocalTeam(folder / v).act(ROWS).items()} for v in ("2", "10")}
    with (
        served(copies(folder, tmp_path), tmp_path) as running,
        TeamAdmin(running.admin) as admin,
        RemoteTeam(running.endpoints, stream=True) as team,
        RemotePolicy(running.endpoints["agent_1"]) as policy,
    ):
        digest = team.bundle_digest

        def acts_as(version: str) -> None:
            for name, decision in team.act(ROWS).items():
                np.testing.assert_array_equal(decision.action, actions[version][name])
            answer = policy.act(ROWS["agent_1"])
            np.testing.assert_array_equal(answer.action, actions[version]["agent_1"])

        acts_as("10")
        admin.switch("2")
        acts_as("10")  # the episode goes on as it began
        team.reset()
        policy.reset()
        acts_as("2")
        assert team.version == "2"
        assert team.bundle_digest != digest
        # Half of a switch: the first server has moved, the others hold the version and answer by it.
        with TeamAdmin(running.admin[:1]) as half:
            half.switch("10")
        team.reset()
        policy.reset()
        assert team.version == "10"
        for name, decision in team.act(ROWS).items():
            np.testing.assert_array_equal(decision.action, actions["10"][name])
        np.testing.assert_array_equal(policy.act(ROWS["agent_1"]).action, actions["2"]["agent_1"])
        # A version that one of them has given up is refused when an episode begins, by name.
        with TeamAdmin(running.admin[1:]) as rest:
            rest.unload("10")
        with TeamAdmin(running.admin[:1]) as half:
            half.switch("2")
        team.reset()
        with TeamAdmin(running.admin[:1]) as half:
            half.switch("10")
        with pytest.raises(
            EndpointError, match=r"GetContract was refused with NOT_FOUND: unknown version '10'"
        ):
            team.reset()


def test_reloads_under_load_fail_no_request_and_mix_no_versions(folder: Path) -> None:
    """Requests that name a version are answered by it, those that name none by one of the two, and all are."""
    port = free_port()
    answers = {v: LocalTeam(folder / v).act(ROWS)["agent_0"].action.tobytes() for v in ("2", "10")}
    wrong: list[str] = []
    counts = dict.fromkeys(("2", "10", ""), 0)
    done = threading.Event()

    def load(version: str, endpoint: str) -> None:
        request = policy_pb2.ActRequest(
            model="agent_0", model_version=version, batch=2, observation=ROWS["agent_0"].tobytes()
        )
        with grpc.insecure_channel(endpoint) as channel:
            act: Any = channel.unary_unary(
                "/omcda.v1.PolicyService/Act",
                request_serializer=policy_pb2.ActRequest.SerializeToString,
                response_deserializer=policy_pb2.ActResponse.FromString,
            )
            while not done.is_set():
                try:
                    response = act(request, timeout=10)
                except grpc.RpcError as error:
                    wrong.append(f"{version or 'any'}: {error}")
                    return
                answered = response.model_version
                if version not in ("", answered) or answers[answered] != response.action:
                    wrong.append(f"asked for {version or 'any'}, answered by {answered}")
                counts[version] += 1

    with (
        server_process(folder, "agent_0", options=("--admin-port", str(port))) as server,
        TeamAdmin([f"127.0.0.1:{port}"]) as admin,
    ):
        admin.load("2")
        threads = [threading.Thread(target=load, args=(v, server.endpoint)) for v in ("2", "10", "")]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60.0
        switches = 0
        while (switches < 20 or min(counts.values()) < 40) and time.monotonic() < deadline:
            admin.switch("2" if switches % 2 == 0 else "10")
            switches += 1
        done.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert switches >= 20
    assert min(counts.values()) >= 40


def test_every_change_leaves_a_line(folder: Path) -> None:
    port = free_port()
    with (
        server_process(
            folder, "agent_0", options=("--admin-port", str(port), "--log-json"), log=folder / "log"
        ),
        TeamAdmin([f"127.0.0.1:{port}"]) as admin,
    ):
        admin.switch("2")
        with pytest.raises(EndpointError):
            admin.unload("99")
    lines = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
    noted = [
        (line["call"], line["version"], line["outcome"], line["current"]) for line in lines if "call" in line
    ]
    assert noted == [
        ("Load", "2", "OK", "10"),
        ("Switch", "2", "OK", "2"),
        ("Unload", "99", "NOT_FOUND", "2"),
    ]
    assert all(line["peer"].startswith("ipv4:127.0.0.1:") for line in lines if "call" in line)
