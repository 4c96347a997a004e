"""Server configurations: contents of files, and the effect of guards and limits on requests."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from omcda_deploy.bundle import MANIFEST, TEAM, Bundle, read_bundle
from omcda_deploy.client.remote import RemotePolicy, RemoteTeam
from omcda_deploy.errors import BundleError, ConfigError, EndpointError, UnknownNameError
from omcda_deploy.guard import GuardSetting
from omcda_deploy.serve.config import Limits, ServerConfig, read_server_config
from omcda_deploy.serve.session import Models, Session
from omcda_deploy.serve.status import RangeError
from tests.support.bundles import continuous_spec, with_references, write_test_bundle
from tests.support.server_process import ServerProcess, server_process

FILE = """
[guard]
mode = "fallback"
threshold = 0.5

[guard.agents.agent_2]
mode = "blend"

[limits]
streams = 3
"""


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(FILE)
    config = read_server_config(path)
    assert config.limits == Limits(streams=3)
    assert config.guards_of(["agent_1", "agent_2"]) == {
        "agent_1": GuardSetting("fallback", 0.5),
        "agent_2": GuardSetting("blend"),
    }
    assert read_server_config(None) == ServerConfig()
    with pytest.raises(UnknownNameError, match=r"\[guard.agents\] 'agent_2': did you mean 'agent_1'"):
        config.guards_of(["agent_0", "agent_1"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[limits]", "[limit]"), "unknown table 'limit': did you mean 'limits'"),
        (("streams = 3", "streams = true"), "limits.streams: expected a whole number from 1 on, got True"),
        (
            ("streams = 3", "message_bytes = 99999999999"),
            "limits.message_bytes: expected at most 2147483647, got 99999999999",
        ),
        (("threshold = 0.5", "threshold = true"), "threshold: expected a number from 0 on, got True"),
        (("threshold = 0.5", "distance_limit = true"), "distance_limit: expected a number from 0 on"),
        (('mode = "blend"', 'mode = "mix"'), "expected one of observe, fallback, blend, got 'mix'"),
        (("threshold = 0.5", "threshold = nan"), "threshold: expected a number from 0 on, got nan"),
        (("threshold", "treshold"), r"entry of \[guard\] 'treshold': did you mean 'threshold'"),
        (("[guard.agents.agent_2]\nmode", "agents"), r"guard.agents: expected a table"),
        (("[guard]", "[guard"), "is not TOML"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(FILE.replace(*change))
    with pytest.raises(ConfigError, match=message):
        read_server_config(path)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("divergence_p99", float("nan"), "divergence_p99: expected a finite number, got nan"),
        ("divergence_p99", None, "divergence_p99: expected a finite number, got None"),
        ("distance_p99", "1", "distance_p99: expected a finite number, got '1'"),
        ("observation_mean", 3.0, "observation_mean: expected numbers"),
        ("observation_std", [0.0] * 4, "observation_std: expected numbers above 0"),
        ("observation_std", [1.0] * 3, "as many means as standard deviations, got 4 and 3"),
        ("both", [1.0] * 3, "reference of agent_0: expected means of 4 entries, got 3"),
        ("more", 1, "unexpected keyword argument 'more'"),
    ],
)
def test_references_that_no_data_can_have_are_refused(
    bundle: Bundle, entry: str, value: Any, message: str
) -> None:
    manifest = json.loads((bundle.path / MANIFEST).read_text())
    names = ("observation_mean", "observation_std") if entry == "both" else (entry,)
    manifest["agents"]["agent_0"]["reference"] |= dict.fromkeys(names, value)
    (bundle.path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=message):
        read_bundle(bundle.path)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return with_references(write_test_bundle(tmp_path / "bundle", continuous_spec()))


def test_the_team_and_its_agents_are_guarded_alike(bundle: Bundle) -> None:
    guards = {"agent_0": GuardSetting("fallback", 0.2), "agent_2": GuardSetting("blend")}
    models = Models(bundle, (), guards)
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(50, sum(a.observation_size for a in bundle.spec.agents))).astype(np.float32)
    team = models.sessions[TEAM].run({"observation": rows})
    start = width = 0
    for index, agent in enumerate(bundle.spec.agents):
        agent_rows = rows[:, start : start + agent.observation_size]
        alone = models.sessions[agent.name].run({"observation": agent_rows})
        np.testing.assert_array_equal(team["policy_weight"][:, index], alone["policy_weight"])
        np.testing.assert_allclose(
            team["action"][:, width : width + agent.action.size], alone["action"], atol=1e-6
        )
        start, width = start + agent.observation_size, width + agent.action.size
    acted = team["policy_weight"]
    assert set(np.unique(acted[:, 0])) == {0.0, 1.0}
    assert (acted[:, 1] == 1.0).all()
    assert (acted[:, 2] > 0.0).all()
    np.testing.assert_array_equal(acted[:, 0] == 0.0, team["divergence"][:, 0] > 0.2)


def test_observations_far_from_the_data_are_refused_where_asked_for(bundle: Bundle) -> None:
    session = Session(bundle, "agent_1", {"agent_1": GuardSetting(distance_limit=3.0)})
    rows = np.zeros((2, 5), np.float32)
    session.run({"observation": rows})
    rows[1] = 10.0
    with pytest.raises(
        RangeError, match=r"agent_1: expected observations within 3 .* got one at 9.* in row 1"
    ):
        session.run({"observation": rows})


def test_a_server_guards_and_says_so(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text('[guard]\nmode = "fallback"\nthreshold = 0.0\n[limits]\nstreams = 1\n')
    observations = {a.name: np.ones((3, a.observation_size), np.float32) for a in bundle.spec.agents}
    with server_process(bundle, TEAM, options=("--config", str(path))) as server:
        with RemoteTeam([server.endpoint], stream=True) as team:
            decisions = team.act(observations)
            for name, decision in decisions.items():
                assert decision.policy_weight is not None, name
                np.testing.assert_array_equal(decision.policy_weight, 0.0)
                np.testing.assert_allclose(decision.action, decision.parameters["behavior_action"], atol=1e-6)
            # The only stream is taken: a second one is refused at once, and the first goes on.
            with (
                RemoteTeam([server.endpoint], stream=True) as second,
                pytest.raises(EndpointError, match=r"at most 1 control streams.*raise limits.streams$"),
            ):
                second.act(observations)
            team.act(observations)
            with RemoteTeam([server.endpoint]) as calls:
                calls.act(observations)
        with RemoteTeam([server.endpoint], stream=True) as third:  # its place is free again
            third.act(observations)


@pytest.fixture(scope="module")
def narrow_server(
    continuous_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    """A server with small limits."""
    path = tmp_path_factory.mktemp("narrow") / "serve.toml"
    path.write_text("[limits]\nmessage_bytes = 2000\nconcurrent_calls = 1\nstreams = 1\n")
    with server_process(continuous_bundle, "agent_0", options=("--config", str(path))) as server:
        yield server


def test_a_message_beyond_the_limit_is_refused(narrow_server: ServerProcess) -> None:
    with grpc.insecure_channel(narrow_server.endpoint) as channel:
        act: Any = channel.unary_unary("/omcda.v1.PolicyService/Act")
        with pytest.raises(grpc.RpcError) as raised:
            act(bytes(3000), timeout=5)
    assert isinstance(raised.value, grpc.Call)
    assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_calls_beyond_the_limit_are_refused_at_once(narrow_server: ServerProcess) -> None:
    """A call whose message has not come gives way to other connections, but not to its own."""
    never = threading.Event()
    pool = (("grpc.use_local_subchannel_pool", 1),)  # a connection of its own
    with (
        grpc.insecure_channel(narrow_server.endpoint, pool) as channel,
        grpc.insecure_channel(narrow_server.endpoint, pool) as other,
    ):
        open_call: Any = channel.stream_unary("/omcda.v1.PolicyService/Act")
        first = open_call.future((never.wait() for _ in range(1)), timeout=30)
        time.sleep(0.3)  # nothing tells when it has arrived
        ask: Any = channel.unary_unary("/omcda.v1.PolicyService/GetContract")
        with pytest.raises(grpc.RpcError) as raised:
            ask(b"", timeout=30)
        assert isinstance(raised.value, grpc.Call)
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert raised.value.details() == (
            "expected at most 1 concurrent calls, and so many are open: close one, or raise limits.concurrent_calls"
        )
        assert not first.done()
        ask_too: Any = other.unary_unary("/omcda.v1.PolicyService/GetContract")
        assert ask_too(b"", timeout=30)
        assert first.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "its place was given to another connection" in first.details()
        never.set()


def test_one_connection_has_half_of_the_streams(continuous_bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text("[limits]\nstreams = 4\n")
    row = np.ones((1, 4), np.float32)
    with (
        server_process(continuous_bundle, "agent_0", options=("--config", str(path))) as server,
        ExitStack() as stack,
    ):
        first, second, third = (
            stack.enter_context(RemotePolicy(server.endpoint, stream=True)) for _ in range(3)
        )
        for policy in (first, second):
            policy.act(row)
        with pytest.raises(
            EndpointError, match="at most 2 control streams of one connection, and so many are"
        ):
            third.act(row)  # gRPC gives all channels of a process to one address the same connection
        words = ["-c", ASK_ONCE, server.endpoint]
        other = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=30)
        assert other.returncode == 0, other.stderr


ASK_ONCE = """if True:
    import sys
    import numpy as np
    from omcda_deploy.client.remote import RemotePolicy
    with RemotePolicy(sys.argv[1], stream=True) as policy:
        policy.act(np.ones((1, 4), np.float32))
"""


def test_health_watchers_take_no_place_of_calls(narrow_server: ServerProcess) -> None:
    with grpc.insecure_channel(narrow_server.endpoint) as channel:
        watch: Any = channel.unary_stream("/grpc.health.v1.Health/Watch")
        watchers = [watch(b"", timeout=30) for _ in range(3)]
        for watcher in watchers:
            next(watcher)
        ask: Any = channel.unary_unary("/omcda.v1.PolicyService/GetContract")
        assert ask(b"", timeout=30)
        for watcher in watchers:
            watcher.cancel()
