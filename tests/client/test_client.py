"""Remote policies compared with local ones, and with servers that fail."""

from __future__ import annotations

import dataclasses
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from omcda_deploy import cli
from omcda_deploy.bundle import Bundle
from omcda_deploy.client.remote import RemotePolicy, RemoteTeam
from omcda_deploy.client.transport import Calls, Stream
from omcda_deploy.errors import ConfigError, ContractError, EndpointError
from omcda_deploy.local import JointTeam, LocalPolicy, LocalTeam
from omcda_deploy.play.evaluate import evaluate
from omcda_deploy.policy import Decision, NoiseSource
from omcda_deploy.protos import policy_pb2_grpc
from omcda_deploy.protos.policy_pb2 import ActResponse, GetContractResponse
from omcda_deploy.registry import team_spec
from omcda_deploy.serve.config import ServerConfig
from omcda_deploy.serve.policy_service import PolicyService
from omcda_deploy.serve.releases import Releases
from omcda_deploy.spec import TeamSpec
from tests.support.bundles import continuous_spec, write_test_bundle
from tests.support.server_process import ServerProcess, server_process

Float = NDArray[np.float32]


def observations(spec: TeamSpec, batch: int | None, seed: int = 0) -> dict[str, Float]:
    generator = np.random.default_rng(seed)
    lead = () if batch is None else (batch,)
    return {
        a.name: generator.standard_normal((*lead, a.observation_size)).astype(np.float32) for a in spec.agents
    }


def masks(spec: TeamSpec, batch: int) -> dict[str, NDArray[np.uint8]]:
    """Return masks that forbid every second action, beginning with another one in each row."""
    return {
        a.name: ((np.arange(a.action.size) + np.arange(batch)[:, None]) % 2).astype(np.uint8)
        for a in spec.agents
    }


def assert_same(ours: Mapping[str, Decision], theirs: Mapping[str, Decision]) -> None:
    """Assert that decisions are equal to the last bit, names, types and shapes included."""
    assert list(ours) == list(theirs)
    for name in ours:
        ours_by_name = {
            "action": ours[name].action,
            "divergence": ours[name].divergence,
            **ours[name].parameters,
        }
        by_name = {
            "action": theirs[name].action,
            "divergence": theirs[name].divergence,
            **theirs[name].parameters,
        }
        assert list(ours_by_name) == list(by_name)
        for key, values in by_name.items():
            assert ours_by_name[key].dtype == values.dtype
            assert ours_by_name[key].shape == values.shape
            assert ours_by_name[key].tobytes() == values.tobytes(), f"{name} {key}"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_a_remote_team_acts_as_the_local_one(kind: str, stream: bool, request: pytest.FixtureRequest) -> None:
    bundle: Bundle = request.getfixturevalue(f"{kind}_bundle")
    server: ServerProcess = request.getfixturevalue(f"{kind}_server")
    spec = bundle.spec
    local = LocalTeam(bundle)
    noise = NoiseSource(spec, seed=3)
    with RemoteTeam([server.endpoint], spec=spec, stream=stream, deadline_s=5) as team:
        assert_same(team.act(observations(spec, None)), local.act(observations(spec, None)))
        for step, batch in enumerate((1, 4, 4, 33)):
            options: dict[str, Any] = {"noise": noise.draw(batch)} if step % 2 else {}
            if kind == "discrete":
                options["action_masks"] = masks(spec, batch)
            if step == 2:
                team.reset()
            seen = observations(spec, batch, seed=step)
            assert_same(team.act(seen, **options), local.act(seen, **options))
        assert set(team.latencies) == set(spec.names)
        assert all(0 < seconds < 5 for seconds in team.latencies.values())


@pytest.mark.parametrize("stream", [False, True])
def test_one_endpoint_may_serve_the_whole_team(
    continuous_bundle: Bundle, joint_server: ServerProcess, stream: bool
) -> None:
    spec = continuous_bundle.spec
    local = JointTeam(continuous_bundle)
    noise = NoiseSource(spec, seed=3).draw(5)
    for endpoints in (joint_server.endpoint, [joint_server.endpoint], {"team": joint_server.endpoint}):
        with RemoteTeam(endpoints, spec=spec, stream=stream, deadline_s=5) as team:
            assert_same(
                team.act(observations(spec, 5), noise=noise), local.act(observations(spec, 5), noise=noise)
            )
            assert_same(team.act(observations(spec, None)), local.act(observations(spec, None)))
            assert list(team.latencies) == ["team"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_remote_policy_acts_as_the_local_one(
    continuous_bundle: Bundle, continuous_server: ServerProcess, stream: bool
) -> None:
    local = LocalPolicy(continuous_bundle, "agent_1")
    with RemotePolicy(continuous_server.endpoint, "agent_1", stream=stream, deadline_s=5) as policy:
        assert policy.spec == local.spec
        assert policy.latency is None
        for batch in (None, 3):
            seen = observations(continuous_bundle.spec, batch)["agent_1"]
            assert_same({"agent_1": policy.act(seen)}, {"agent_1": local.act(seen)})
        assert policy.latency is not None
        decision = policy.act(seen)
        decision.action[:] = 0  # the caller's own copy


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["continuous", "discrete"])
def test_a_temperature_gives_served_and_local_teams_the_same_actions(
    kind: str, stream: bool, request: pytest.FixtureRequest
) -> None:
    """Each draws its own noise, of one seed; policies of that seed act as their team."""
    bundle: Bundle = request.getfixturevalue(f"{kind}_bundle")
    server: ServerProcess = request.getfixturevalue(f"{kind}_server")
    spec = bundle.spec
    options: dict[str, Any] = {"temperature": 0.5, "seed": 6}
    local, sampled = LocalTeam(bundle, **options), LocalTeam(bundle)
    last = spec.names[-1]
    with (
        RemoteTeam([server.endpoint], stream=stream, deadline_s=5, **options) as team,
        RemotePolicy(server.endpoint, last, stream=stream, deadline_s=5, **options) as policy,
    ):
        assert team.temperature == policy.temperature == 0.5
        different = 0
        for step, batch in enumerate((1, None, 4)):
            seen = observations(spec, batch, seed=step)
            ours, theirs = team.act(seen), local.act(seen)
            assert_same(ours, theirs)
            assert_same({last: policy.act(seen[last])}, {last: theirs[last]})
            different += int(np.sum(ours[last].action != sampled.act(seen)[last].action))
        assert different
        noise = NoiseSource(spec, 1).draw(4)  # used as it is
        assert_same(team.act(seen, noise=noise), sampled.act(seen, noise=noise))
    with pytest.raises(ConfigError, match="temperature: expected a number from 0"):
        RemoteTeam([server.endpoint], temperature=-1.0)
    with pytest.raises(ConfigError, match="temperature: expected a number from 0"):
        RemotePolicy(server.endpoint, last, temperature=float("nan"))


@pytest.mark.parametrize("task", ["mamujoco/hopper-3x1", "toy/masked"])
def test_temperatures_are_played_alike_served_and_in_process(
    tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line: all numbers of the episodes, and the shape of the files for one and several."""
    bundle = write_test_bundle(tmp_path / "bundle", team_spec(task))

    def played(name: str, *words: str) -> dict[str, Any]:
        file = tmp_path / f"{name}.json"
        line = [
            "evaluate",
            task,
            "--episodes",
            "5",
            "--num-envs",
            "3",
            "--seed",
            "4",
            "--json",
            str(file),
            *words,
        ]
        monkeypatch.setattr("sys.argv", ["omcda-deploy", *line])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 0, capsys.readouterr().err
        values: dict[str, Any] = json.loads(file.read_text())
        return values

    report = tmp_path / "report.html"
    with threaded_server(bundle, *bundle.spec.names) as endpoint:
        served = played(
            "served",
            "--endpoints",
            endpoint,
            "--temperature",
            "1,0.5,0",
            "--deadline",
            "5",
            "--report",
            str(report),
        )
        with RemoteTeam([endpoint], temperature=0.5, deadline_s=5) as team:
            own = evaluate(team, task, episodes=5, num_envs=3, seed=4)
    printed = capsys.readouterr().out
    assert f"{task}: 5 episodes at each temperature T" in printed
    local = played("local", "--bundle", str(bundle.path), "--temperature", "0,0.5,1")
    one = played("one", "--bundle", str(bundle.path), "--temperature", "0.5")
    assert served["kind"] == local["kind"] == "evaluations"
    returns = set()
    for ours, theirs, temperature in zip(
        served["evaluations"], local["evaluations"], (0.0, 0.5, 1.0), strict=True
    ):
        assert ours["temperature"] == theirs["temperature"] == temperature
        for key in ("returns", "lengths", "ended_by", "fell", "divergence", "shares", "episode_seeds"):
            assert ours[key] == theirs[key], key
        returns.add(tuple(ours["returns"]))
    assert len(returns) == 3
    assert (one["kind"], one["temperature"]) == ("evaluation", 0.5)
    assert one["returns"] == served["evaluations"][1]["returns"] == own.returns.tolist()
    assert own.temperature == 0.5
    assert "Temperature 0.5" in report.read_text()


def test_the_report_learns_what_the_bundle_says(
    continuous_bundle: Bundle, continuous_server: ServerProcess
) -> None:
    with RemoteTeam([continuous_server.endpoint]) as team:
        assert team.spec == continuous_bundle.spec
        assert team.budgets == {"agent_0": 0.1, "agent_1": 0.2, "agent_2": None}
        assert team.divergence_kind == "kl"
        assert team.bundle_digest == continuous_bundle.digest


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_server_refuses_says_why_and_the_next_step_works(
    continuous_bundle: Bundle, continuous_server: ServerProcess, stream: bool
) -> None:
    seen = observations(continuous_bundle.spec, 2)
    bad = seen | {"agent_1": np.full((2, 5), 3e38, np.float32)}
    with RemoteTeam([continuous_server.endpoint], stream=stream, deadline_s=5) as team:
        with pytest.raises(EndpointError, match=f"{continuous_server.endpoint}.*agent_1.*finite"):
            team.act(bad)
        assert_same(team.act(seen), LocalTeam(continuous_bundle).act(seen))


def test_shapes_are_checked_before_anything_is_sent(continuous_server: ServerProcess) -> None:
    spec = continuous_spec()
    with RemoteTeam([continuous_server.endpoint]) as team:
        seen = observations(spec, 2)
        with pytest.raises(ContractError, match="no observation for agent_2"):
            team.act({name: seen[name] for name in ("agent_0", "agent_1")})
        with pytest.raises(ContractError, match=r"observation of agent_0: expected shape \[B, 4\]"):
            team.act(seen | {"agent_0": seen["agent_1"]})
        with pytest.raises(ContractError, match=r"noise of agent_0: expected 2 rows .* got 3"):
            team.act(seen, noise=NoiseSource(spec, 0).draw(3))
        assert team.latencies == {}


# Servers in this process, so that a test can place and slow them --------------------------------------------


@contextmanager
def threaded_server(bundle: Bundle, *models: str, slow: threading.Event | None = None) -> Iterator[str]:
    """Run a server of ``models`` in this process; while ``slow`` is set, a step takes half a second."""
    service = PolicyService(Releases(bundle.path, models, ServerConfig()))

    class Servicer(policy_pb2_grpc.PolicyServiceServicer):
        def GetContract(self, request: Any, context: Any) -> Any:  # noqa: N802
            return GetContractResponse.FromString(service.get_contract(request))

        def Act(self, request: Any, context: Any) -> Any:  # noqa: N802
            if slow is not None and slow.is_set():
                time.sleep(0.5)
            return ActResponse.FromString(service.act(request))

        def ActStream(self, requests: Any, context: Any) -> Any:  # noqa: N802
            for request in requests:
                yield self.Act(request, context)

    server = grpc.server(futures.ThreadPoolExecutor(8), options=(("grpc.so_reuseport", 0),))
    add: Any = policy_pb2_grpc.add_PolicyServiceServicer_to_server
    add(Servicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def test_endpoints_are_placed_by_what_they_serve(continuous_bundle: Bundle) -> None:
    seen = observations(continuous_bundle.spec, 2)
    expected = LocalTeam(continuous_bundle).act(seen)
    with (
        threaded_server(continuous_bundle, "agent_0") as a,
        threaded_server(continuous_bundle, "agent_1", "agent_2") as bc,
    ):
        with RemoteTeam([bc, a]) as team:
            assert team.endpoints == {"agent_0": a, "agent_1": bc, "agent_2": bc}
            assert_same(team.act(seen), expected)
        with RemoteTeam({"agent_2": bc, "agent_0": a, "agent_1": bc}) as team:
            assert_same(team.act(seen), expected)
        with RemotePolicy(a) as policy:
            assert policy.spec.name == "agent_0"
        with pytest.raises(EndpointError, match="no endpoint serves agent_0"):
            RemoteTeam([bc])
        with pytest.raises(EndpointError, match="given twice"):
            RemoteTeam([a, bc, a])
        with pytest.raises(EndpointError, match=f"{a} serves agent_0, not agent_1"):
            RemoteTeam({"agent_0": a, "agent_1": a, "agent_2": bc})
        with pytest.raises(EndpointError, match="expected endpoints of agent_0, agent_1, agent_2"):
            RemoteTeam({"agent_0": a})
        with pytest.raises(EndpointError, match="say which agent"):
            RemotePolicy(bc)
        with pytest.raises(EndpointError, match=f"{a} serves agent_0, not agent_2"):
            RemotePolicy(a, "agent_2")
        with pytest.raises(ContractError, match="unknown agent 'agent_9'"):
            RemotePolicy(a, "agent_9")
        with (
            threaded_server(continuous_bundle, "agent_0") as double,
            pytest.raises(EndpointError, match=r"agent_0 is served by .* and by"),
        ):
            RemoteTeam([a, bc, double])


def test_no_endpoints_are_an_error() -> None:
    with pytest.raises(EndpointError, match="at least one endpoint"):
        RemoteTeam([])


def test_another_contract_is_refused_by_its_differing_field(
    continuous_bundle: Bundle, tmp_path: Path
) -> None:
    other = dataclasses.replace(continuous_bundle.spec, control_rate=50.0)
    other_bundle = write_test_bundle(tmp_path / "other", other)
    with (
        threaded_server(continuous_bundle, "agent_0", "agent_1") as a,
        threaded_server(other_bundle, "agent_2") as b,
    ):
        with pytest.raises(ContractError, match=r"control_rate: 50\.0 against 20\.0"):
            RemotePolicy(a, "agent_0", spec=other)
        with pytest.raises(ContractError, match=r"control_rate: 50\.0 against 20\.0"):
            RemoteTeam([a], spec=other)
        with pytest.raises(ContractError, match=rf"{a}.*{b}.*control_rate: 20\.0 against 50\.0"):
            RemoteTeam([a, b])


def test_servers_of_different_bundles_are_refused(continuous_bundle: Bundle, tmp_path: Path) -> None:
    retrained = write_test_bundle(tmp_path / "retrained", continuous_bundle.spec, seed=99)
    with (
        threaded_server(continuous_bundle, "agent_0", "agent_1") as a,
        threaded_server(retrained, "agent_2") as b,
        pytest.raises(EndpointError, match="from one bundle"),
    ):
        RemoteTeam([a, b])


@pytest.mark.parametrize("stream", [False, True])
def test_a_missed_deadline_is_an_error_and_its_answer_is_never_taken_later(
    continuous_bundle: Bundle, stream: bool
) -> None:
    slow = threading.Event()
    spec = continuous_bundle.spec
    first, second = observations(spec, 2, seed=1), observations(spec, 2, seed=2)
    local = LocalTeam(continuous_bundle)
    with (
        threaded_server(continuous_bundle, *spec.names, slow=slow) as endpoint,
        RemoteTeam([endpoint], stream=stream, deadline_s=0.2) as team,
    ):
        assert_same(team.act(first), local.act(first))
        slow.set()
        begin = time.monotonic()
        with pytest.raises(
            EndpointError,
            match=f"{endpoint}: step of {', '.join(spec.names)} failed, no answer within 200 ms",
        ):
            team.act(first)
        assert 0.15 < time.monotonic() - begin < 0.45
        slow.clear()
        time.sleep(0.5)
        assert_same(team.act(second), local.act(second))


def test_a_stream_outlives_many_deadlines(continuous_bundle: Bundle) -> None:
    seen = observations(continuous_bundle.spec, 1)
    with (
        threaded_server(continuous_bundle, *continuous_bundle.spec.names) as endpoint,
        RemoteTeam([endpoint], stream=True, deadline_s=0.2) as team,
    ):
        end = time.monotonic() + 0.6
        while time.monotonic() < end:
            team.act(seen)
            time.sleep(0.02)
        time.sleep(0.3)  # idle is not late
        team.act(seen)


def test_an_endpoint_that_is_down_is_named_with_what_to_do() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{closed.getsockname()[1]}"
        for connect in (lambda: RemotePolicy(endpoint), lambda: RemoteTeam([endpoint])):
            with pytest.raises(EndpointError, match=f"{endpoint}.*cannot be reached.*omcda-deploy serve"):
                connect()


def test_a_server_of_something_else_is_named() -> None:
    server = grpc.server(futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(EndpointError, match=f"127.0.0.1:{port}.*no policy server"):
            RemotePolicy(f"127.0.0.1:{port}")
    finally:
        server.stop(None).wait()


def test_a_server_killed_between_steps_is_an_error(continuous_bundle: Bundle) -> None:
    observation = np.zeros(4, np.float32)
    with (
        server_process(continuous_bundle, "agent_0") as server,
        RemotePolicy(server.endpoint) as calls,
        RemotePolicy(server.endpoint, stream=True) as stream,
    ):
        for policy in (calls, stream):
            policy.act(observation)
        server.process.kill()
        server.process.wait()
        for policy in (calls, stream):
            with pytest.raises(EndpointError, match=f"{server.endpoint}.*cannot be reached"):
                policy.act(observation)


def test_closing_leaves_no_thread_behind(continuous_bundle: Bundle, continuous_server: ServerProcess) -> None:
    before = set(threading.enumerate())
    with RemoteTeam([continuous_server.endpoint], stream=True, deadline_s=60) as team:
        team.act(observations(continuous_bundle.spec, 1))
        begun = set(threading.enumerate()) - before
        assert len(begun) >= 2  # per stream: gRPC's for requests, ours for answers
    end = time.monotonic() + 5
    while any(thread.is_alive() for thread in begun) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(thread.is_alive() for thread in begun)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("rows", "messages"), [(1, 1), (3, 1), (500, 3)])
def test_the_agents_of_one_server_share_a_message_unless_they_are_large(
    continuous_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, stream: bool, rows: int, messages: int
) -> None:
    sent: list[int] = []
    transport = Stream if stream else Calls
    send = transport.send

    def counted(self: Any, requests: Sequence[bytes]) -> None:
        sent.append(len(requests))
        send(self, requests)

    monkeypatch.setattr(transport, "send", counted)
    spec = continuous_bundle.spec
    noise = NoiseSource(spec, 3).draw(rows)
    local = LocalTeam(continuous_bundle)
    with (
        threaded_server(continuous_bundle, *spec.names) as endpoint,
        RemoteTeam([endpoint], stream=stream) as team,
    ):
        for seed in range(3):
            batch = observations(spec, rows, seed=seed)
            assert_same(team.act(batch, noise=noise), local.act(batch, noise=noise))
            assert set(team.latencies) == set(spec.names)
    assert set(sent) <= {messages}
    assert sent or messages == 1


def test_a_server_that_answers_some_agents_alone_is_told_apart(
    continuous_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that does not know that steps can share a message."""
    spec = continuous_bundle.spec
    monkeypatch.setattr(PolicyService, "act", PolicyService._act)
    with (
        threaded_server(continuous_bundle, *spec.names) as endpoint,
        RemoteTeam([endpoint]) as team,
        pytest.raises(EndpointError, match=r"expected 3 answers, got 1: .* update it"),
    ):
        team.act(observations(spec, 1))
