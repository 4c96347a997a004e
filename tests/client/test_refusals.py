"""Refusals for which a fallback may stand in, as another moment can end them, and what clients refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from omcda_deploy.bundle import Bundle
from omcda_deploy.client.admin import TeamAdmin
from omcda_deploy.client.fallback import BehaviorTeam
from omcda_deploy.client.remote import RemotePolicy, RemoteTeam
from omcda_deploy.errors import (
    BundleError,
    ConfigError,
    ContractError,
    EndpointError,
    MissedAnswerError,
    OmcdaError,
)
from omcda_deploy.local import JointTeam, LocalPolicy, LocalTeam
from omcda_deploy.spec import TeamSpec
from tests.client.test_client import assert_same, observations
from tests.client.test_fallback import SlowService, slow_server
from tests.support.bundles import continuous_spec, write_test_bundle
from tests.support.server_process import ServerProcess, free_port, server_process

ENDPOINTS = [
    "127.0.0.1:99999",
    "127.0.0.1",
    "::1:22331",
    "127.0.0.1:0",
    ":8500",
    "host:http",
    "",
    "dns:///host",
]
MISSES = [
    (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "expected at most 16 control streams, and so many are open: close one",
    ),
    (grpc.StatusCode.RESOURCE_EXHAUSTED, "Concurrent RPC limit exceeded!"),
    (grpc.StatusCode.NOT_FOUND, "unknown version '1': known are 2"),
    (grpc.StatusCode.UNAVAILABLE, "an operator ended this stream"),
]
REFUSALS = [
    (grpc.StatusCode.INVALID_ARGUMENT, "agent_0: expected finite numbers"),
    (grpc.StatusCode.NOT_FOUND, "unknown model 'agent_0': known are agent_1"),
    (grpc.StatusCode.UNAUTHENTICATED, "expected the metadata"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("code", "details", "missed"), [(*m, True) for m in MISSES] + [(*r, False) for r in REFUSALS]
)
def test_a_fallback_acts_for_what_may_pass(
    continuous_bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    stream: bool,
    code: grpc.StatusCode,
    details: str,
    missed: bool,
) -> None:
    monkeypatch.setattr(SlowService, "Act", lambda self, request, context: context.abort(code, details))
    fallback = LocalPolicy(continuous_bundle, "agent_0")
    observation = observations(continuous_bundle.spec, 2)["agent_0"]
    with (
        slow_server(continuous_bundle, "agent_0") as (endpoint, _, _),
        RemotePolicy(endpoint, stream=stream, fallback=fallback) as policy,
        RemotePolicy(endpoint, stream=stream) as alone,
    ):
        if missed:
            assert policy.act(observation).fallback
            assert policy.missed == 1
        else:
            with pytest.raises(EndpointError, match=details) as raised:
                policy.act(observation)
            assert not isinstance(raised.value, MissedAnswerError)
        with pytest.raises(EndpointError, match=details[:20]):
            alone.act(observation)


def test_an_episode_whose_version_is_gone_goes_on_by_its_fallback(tmp_path: Path) -> None:
    """Until the next episode, which takes the version that is current by then, on the servers that hold it."""
    spec = continuous_spec(agents=2)
    for version in ("1", "2"):
        write_test_bundle(tmp_path / version, spec, seed=int(version))
    (tmp_path / "current").write_text("1\n\n")
    port = free_port()
    batch: Any = observations(spec, 2)
    with (
        server_process(tmp_path, *spec.names, options=("--admin-port", str(port))) as server,
        TeamAdmin([f"127.0.0.1:{port}"]) as admin,
        RemoteTeam([server.endpoint], fallback=LocalTeam(tmp_path / "1")) as team,
    ):
        assert_same(team.act(batch), LocalTeam(tmp_path / "1").act(batch))
        admin.switch("2")
        admin.unload("1")
        decisions = team.act(batch)
        assert all(decision.fallback and decision.awaited for decision in decisions.values())
        team.reset()
        assert team.version == "2"
        assert_same(team.act(batch), LocalTeam(tmp_path / "2").act(batch))
        assert team.missed == dict.fromkeys(spec.names, 1)


def test_an_episode_begins_without_the_servers_that_lack_its_version(tmp_path: Path) -> None:
    spec = continuous_spec(agents=2)
    for version in ("1", "2"):
        write_test_bundle(tmp_path / version, spec, seed=int(version))
    (tmp_path / "current").write_text("1\n\n")
    ports = [free_port(), free_port()]
    batch: Any = observations(spec, 2)
    with (
        server_process(tmp_path, "agent_0", options=("--admin-port", str(ports[0]))) as first,
        server_process(tmp_path, "agent_1") as second,
        TeamAdmin([f"127.0.0.1:{ports[0]}"]) as half,
        RemoteTeam([first.endpoint, second.endpoint], fallback=LocalTeam(tmp_path / "1")) as team,
        RemoteTeam([first.endpoint, second.endpoint]) as strict,
    ):
        half.switch("2")
        with pytest.raises(EndpointError, match=f"{second.endpoint}: GetContract was refused with NOT_FOUND"):
            strict.reset()
        team.reset()
        decisions = team.act(batch)
        assert [decision.fallback for decision in decisions.values()] == [False, True]
        np.testing.assert_array_equal(
            decisions["agent_0"].action, LocalTeam(tmp_path / "2").act(batch)["agent_0"].action
        )


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_addresses_that_grpc_would_take_otherwise_are_refused(endpoint: str) -> None:
    with pytest.raises(EndpointError, match=r"expected an endpoint as HOST:PORT or \[IPv6\]:PORT .* got"):
        RemotePolicy(endpoint, "agent_0")


def test_addresses_in_every_form_are_taken(
    continuous_bundle: Bundle, continuous_server: ServerProcess
) -> None:
    port = continuous_server.endpoint.rpartition(":")[2]
    for form in (
        "127.0.0.1:{}",
        "localhost:{}",
        "dns:///127.0.0.1:{}",
        "dns:127.0.0.1:{}",
        "ipv4:127.0.0.1:{}",
    ):
        RemotePolicy(form.format(port), "agent_0").close()
    for form in ("[::1]:{}", "ipv6:[::1]:{}", "unix:/nowhere/{}"):
        with pytest.raises(MissedAnswerError):
            RemotePolicy(form.format(port), "agent_0")


@pytest.mark.parametrize("deadline_s", [-1.0, 0.0, float("nan"), float("inf"), "1", None])
def test_deadlines_that_are_none_are_refused(continuous_server: ServerProcess, deadline_s: Any) -> None:
    connects: list[Callable[[], object]] = [
        lambda: RemotePolicy(continuous_server.endpoint, "agent_0", deadline_s=deadline_s),
        lambda: RemoteTeam(continuous_server.endpoint, deadline_s=deadline_s),
    ]
    for connect in connects:
        with pytest.raises(ConfigError, match="deadline_s: expected a number of seconds above 0, got"):
            connect()


class Scripted:
    """A thing with a spec, as simulators have one, that cannot act."""

    def __init__(self, spec: TeamSpec) -> None:
        self.spec = spec


SETTINGS: list[tuple[str, Any, str]] = [
    (
        "spec",
        Scripted(continuous_spec()),
        "spec: expected a TeamSpec, as environment.spec is, .* got Scripted",
    ),
    ("spec", "toy/continuous", "spec: expected a TeamSpec"),
    ("seed", -1, "seed: expected a whole number from 0 on, got -1"),
    ("seed", "zero", "seed: expected a whole number from 0 on, got 'zero'"),
    ("seed", 0.5, "seed: expected a whole number from 0 on, got 0.5"),
    ("fallback", None, "fallback: expected .*, got None"),
    ("fallback", 3, "fallback: expected .*, got 3"),
    ("fallback", Scripted(continuous_spec()), "fallback: expected .*, got <.*Scripted"),
    (
        "credentials",
        "x.toml",
        r"credentials: expected those of read_credentials\(Path\(FILE\)\).* got 'x.toml'",
    ),
    ("credentials", Path("x.toml"), "credentials: expected those of read_credentials"),
    ("wait_s", "1", "wait_s: expected a number of seconds from 0 on, got '1'"),
    ("wait_s", None, "wait_s: expected a number of seconds from 0 on, got None"),
    ("temperature", "hot", "temperature: expected a number"),
    ("version", 3, "version: expected its name"),
]
OF_TEAMS: list[tuple[str, Any, str]] = [
    ("fallback", {0: None}, "policies of agent_0, agent_1, agent_2, got those of 0"),
    ("fallback", dict.fromkeys(continuous_spec().names), "expected a policy of agent_0, got None"),
    ("bundle", 3, "expected a bundle's folder, got 3"),
    ("record", 3, "record: expected a folder, got 3"),
    ("protocol", ["oip"], "protocol: expected omcda or oip"),
]


@pytest.mark.parametrize(("name", "value", "message"), [*SETTINGS, *OF_TEAMS])
def test_settings_that_are_none_are_refused(
    continuous_server: ServerProcess, name: str, value: Any, message: str
) -> None:
    with pytest.raises(OmcdaError, match=message):
        RemoteTeam(continuous_server.endpoint, **{name: value})
    if (name, value, message) in SETTINGS:
        with pytest.raises(OmcdaError, match=message):
            RemotePolicy(continuous_server.endpoint, "agent_0", **{name: value})


@pytest.mark.parametrize("endpoints", [None, 8500, [None], [["127.0.0.1:8500"]], {"agent_0": 8500}])
def test_endpoints_that_are_no_addresses_are_refused(endpoints: Any) -> None:
    with pytest.raises(EndpointError, match=r"expected (at least one|an) endpoint.*, got"):
        RemoteTeam(endpoints)


def test_local_teams_refuse_such_settings_too(continuous_bundle: Bundle) -> None:
    for make in (LocalTeam, JointTeam, BehaviorTeam):
        with pytest.raises(ConfigError, match="seed: expected a whole number from 0 on, got -1"):
            make(continuous_bundle, seed=-1)
        with pytest.raises(BundleError, match="expected a bundle's folder, got None"):
            make(None)  # type: ignore[arg-type]


def test_what_does_not_belong_to_the_team_is_refused(
    continuous_bundle: Bundle, continuous_server: ServerProcess
) -> None:
    spec = continuous_bundle.spec
    batch = observations(spec, 2)
    with RemoteTeam([continuous_server.endpoint]) as team:
        with pytest.raises(ContractError, match=r"as many observations of every agent, got \{'agent_0': 1"):
            team.act(batch | {"agent_0": batch["agent_0"][:1]})
        with pytest.raises(ContractError, match=r"observations: expected those of .*, got agent_9 too"):
            team.act(batch | {"agent_9": batch["agent_0"]})
        with pytest.raises(
            ContractError, match="action_mask of agent_0: expected none for continuous actions"
        ):
            team.act(batch, action_masks={a.name: np.ones((2, a.action.size), np.uint8) for a in spec.agents})
        assert_same(team.act(batch), LocalTeam(continuous_bundle).act(batch))
