"""Missed answers are counted exactly, never taken late, and answered by the fallback that the caller chose."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from omcda_deploy import cli, registry
from omcda_deploy.bundle import TEAM, Bundle
from omcda_deploy.client.fallback import BehaviorTeam, FallbackChoice
from omcda_deploy.client.remote import RemotePolicy, RemoteTeam
from omcda_deploy.errors import ConfigError, ContractError, EndpointError, MissedAnswerError
from omcda_deploy.guard import GuardSetting
from omcda_deploy.local import LocalPolicy, LocalTeam
from omcda_deploy.policy import Decision, NoiseSource
from omcda_deploy.protos import policy_pb2, policy_pb2_grpc
from omcda_deploy.serve.config import ServerConfig
from omcda_deploy.serve.policy_service import PolicyService
from omcda_deploy.serve.releases import Releases
from omcda_deploy.serve.session import Session
from tests.client.test_client import assert_same, masks, observations
from tests.support.bundles import continuous_spec, write_test_bundle
from tests.support.server_process import ServerProcess

DEADLINE_S = 0.5  # far longer than an answer takes, far shorter than a test


class SlowService(policy_pb2_grpc.PolicyServiceServicer):
    """Answer a step in ``late`` (model, step id) only after the model's next step has arrived, which is too late.

    ``pause_s`` is the number of seconds that a model takes for every step. ``hold_up`` is called with the model of
    each step, and with an empty name for a contract.
    """

    def __init__(self, bundle: Bundle, models: tuple[str, ...]) -> None:
        self.late: set[tuple[str, int]] = set()
        self.pause_s: dict[str, float] = {}
        self.hold_up: Callable[[str], object] = len
        self.requests: list[policy_pb2.ActRequest] = []
        self.answered_late = 0
        self._service = PolicyService(Releases(bundle.path, models, ServerConfig()))
        self._came = threading.Condition()

    def GetContract(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.hold_up("")
        return policy_pb2.GetContractResponse.FromString(self._service.get_contract(request))

    def Act(self, request: Any, context: Any) -> Any:  # noqa: N802
        models = [request.model, *(other.model for other in request.others)]
        for model in models:
            self.hold_up(model)
        with self._came:
            self.requests += [request, *request.others]
            self._came.notify_all()
            if (late := models[0], request.step_id) in self.late:
                assert self._came.wait_for(lambda: self._has_come(late, request.step_id + 1), 10)
                self.answered_late += 1
        time.sleep(sum(self.pause_s.get(model, 0.0) for model in models))
        return policy_pb2.ActResponse.FromString(self._service.act(request))

    def ActStream(self, requests: Any, context: Any) -> Any:  # noqa: N802
        for request in requests:
            yield self.Act(request, context)

    def _has_come(self, model: str, step: int) -> bool:
        return any(r.model == model and r.step_id == step for r in self.requests)


@contextmanager
def slow_server(
    bundle: Bundle, *models: str, port: int = 0
) -> Iterator[tuple[str, SlowService, grpc.Server]]:
    with slow_servers(bundle, models, [port]) as ([endpoint], service, server):
        yield endpoint, service, server


@contextmanager
def slow_addresses(bundle: Bundle) -> Iterator[tuple[dict[str, str], SlowService]]:
    """One slow service at an address of its own for each agent, so that their steps travel apart."""
    names = bundle.spec.names
    with slow_servers(bundle, names, [0] * len(names)) as (endpoints, service, _):
        yield dict(zip(names, endpoints, strict=True)), service


@contextmanager
def slow_servers(
    bundle: Bundle, models: tuple[str, ...], ports: Sequence[int]
) -> Iterator[tuple[list[str], SlowService, grpc.Server]]:
    service = SlowService(bundle, models)
    server = grpc.server(futures.ThreadPoolExecutor(16), options=(("grpc.so_reuseport", 0),))
    add: Any = policy_pb2_grpc.add_PolicyServiceServicer_to_server
    add(service, server)
    endpoints = [f"127.0.0.1:{server.add_insecure_port(f'127.0.0.1:{port}')}" for port in ports]
    server.start()
    try:
        yield endpoints, service, server
    finally:
        server.stop(None).wait()


@contextmanager
def team_without_servers(
    bundle: Bundle, fallback: FallbackChoice, *models: str, stream: bool = False
) -> Iterator[RemoteTeam]:
    """A team that has acted once, and whose server has stopped after that."""
    with (
        slow_server(bundle, *(models or bundle.spec.names)) as (endpoint, _, server),
        RemoteTeam([endpoint], fallback=fallback, deadline_s=5, stream=stream) as team,
    ):
        team.act(observations(bundle.spec, 2, seed=77), action_masks=all_available(bundle, 2))
        server.stop(None).wait()
        yield team


def all_available(bundle: Bundle, batch: int) -> dict[str, Any] | None:
    if bundle.spec.action_kind == "continuous":
        return None
    return {a.name: np.ones((batch, a.action.size), np.uint8) for a in bundle.spec.agents}


def is_fallback(decision: Decision) -> bool:
    """Tell a marked decision; it must not claim a divergence or parameters."""
    finite = np.isfinite(decision.divergence)
    assert finite.all() != decision.fallback
    assert not (decision.fallback and (finite.any() or decision.parameters))
    return decision.fallback


@pytest.mark.parametrize("stream", [False, True])
def test_misses_are_counted_exactly_and_late_answers_never_taken(
    continuous_bundle: Bundle, stream: bool
) -> None:
    spec = continuous_bundle.spec
    local = LocalTeam(continuous_bundle)
    late = {("agent_1", 3), ("agent_1", 4), ("agent_2", 4), ("agent_1", 7)}
    with (
        slow_addresses(continuous_bundle) as (addresses, service),
        RemoteTeam(addresses, stream=stream, deadline_s=DEADLINE_S, fallback="hold") as team,
    ):
        service.late = late
        previous: Mapping[str, Decision] = {}
        for step in range(1, 10):
            if step == 6:
                team.reset()
            batch = observations(spec, 2, seed=step)
            decisions, expected = team.act(batch), local.act(batch)
            missed = {name for name, missed_step in late if missed_step == step}
            assert {name for name, decision in decisions.items() if is_fallback(decision)} == missed
            assert set(team.latencies) == set(spec.names) - missed
            assert list(decisions) == list(spec.names)
            assert_same(
                {n: decisions[n] for n in spec.names if n not in missed},
                {n: expected[n] for n in spec.names if n not in missed},
            )
            for name in missed:
                assert decisions[name].action.tobytes() == previous[name].action.tobytes()
            previous = decisions
        assert team.missed == {"agent_0": 0, "agent_1": 3, "agent_2": 1}
        assert team.fallback == "hold"
        assert service.answered_late == 4, "no answer came late: the test shows nothing"
        # Requests mark the episode's first step until one of them is answered.
        assert [r.step_id for r in service.requests if r.model == "agent_1" and r.reset] == [1, 6]


@pytest.mark.parametrize("stream", [False, True])
def test_a_first_step_that_is_missed_has_nothing_to_hold_and_is_asked_again_as_the_first(
    continuous_bundle: Bundle, stream: bool
) -> None:
    batch = observations(continuous_bundle.spec, None)["agent_0"]
    with (
        slow_server(continuous_bundle, "agent_0") as (endpoint, service, _),
        RemotePolicy(endpoint, stream=stream, deadline_s=DEADLINE_S, fallback="hold") as policy,
    ):
        service.late = {("agent_0", 1), ("agent_0", 3)}
        with pytest.raises(MissedAnswerError, match=rf"{endpoint}: step of agent_0 .*500 ms.* to hold"):
            policy.act(batch)
        answered = policy.act(batch)
        assert_same({"": answered}, {"": LocalPolicy(continuous_bundle, "agent_0").act(batch)})
        assert [request.reset for request in service.requests] == [True, True]
        decision = policy.act(-batch)
        assert is_fallback(decision)
        assert decision.action.tobytes() == answered.action.tobytes()
        assert decision.action.shape == answered.action.shape
        assert (policy.missed, policy.latency) == (2, None)
        policy.reset()
        service.late = {("agent_0", 4)}
        with pytest.raises(
            MissedAnswerError, match="to hold"
        ):  # an action of the last episode is not held in this one
            policy.act(batch)


def test_held_actions_belong_to_the_policy_not_to_the_caller(continuous_bundle: Bundle) -> None:
    batch = observations(continuous_bundle.spec, 2)
    with team_without_servers(continuous_bundle, "hold") as team:
        first = team.act(batch)["agent_1"].action
        copy = first.copy()
        first[:] = 9.0
        np.testing.assert_array_equal(team.act(batch)["agent_1"].action, copy)
        with pytest.raises(MissedAnswerError, match="batch size to hold"):
            team.act(observations(continuous_bundle.spec, 3))


def test_a_held_action_that_is_forbidden_by_now_gives_way(discrete_bundle: Bundle) -> None:
    spec = discrete_bundle.spec
    with team_without_servers(discrete_bundle, "hold") as team:
        batch, free = observations(spec, 2, seed=5), all_available(discrete_bundle, 2)
        actions = {name: decision.action for name, decision in team.act(batch, action_masks=free).items()}
        allowed = masks(spec, 2)
        given_way = 0
        for name, decision in team.act(batch, action_masks=allowed).items():
            for row, action in enumerate(decision.action):
                allows = allowed[name][row, actions[name][row]]
                assert action == (actions[name][row] if allows else np.flatnonzero(allowed[name][row])[0])
                given_way += not allows
            assert decision.action.dtype == np.int64
        assert 0 < given_way < 4, "the masks forbid all or nothing: the test shows half"


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
@pytest.mark.parametrize("by", ["hold", "LocalTeam", "LocalPolicy", "BehaviorTeam"])
def test_a_fallback_takes_what_a_server_takes(kind: str, by: str, request: pytest.FixtureRequest) -> None:
    """Lists, masks of one row beside vectors, and noise of some agents alone."""
    bundle: Bundle = request.getfixturevalue(f"{kind}_bundle")
    names, first = bundle.spec.names, bundle.spec.agents[0].action.size
    fallback: Any = {
        "hold": "hold",
        "LocalTeam": LocalTeam(bundle),
        "LocalPolicy": {name: LocalPolicy(bundle, name) for name in names},
        "BehaviorTeam": BehaviorTeam(bundle),
    }[by]
    vectors = {name: values.tolist() for name, values in observations(bundle.spec, None).items()}
    inputs: dict[str, Any] = {"noise": {**dict.fromkeys(names), "agent_0": [[0.5] * first]}}
    if kind == "discrete":
        inputs["action_masks"] = {**dict.fromkeys(names), "agent_0": [[1] + [0] * (first - 1)]}
    with (
        slow_server(bundle, *names) as (endpoint, _, server),
        RemoteTeam([endpoint], fallback=fallback, deadline_s=5) as team,
    ):
        shapes = [decision.action.shape for decision in team.act(vectors, **inputs).values()]
        server.stop(None).wait()
        decisions = team.act(vectors, **inputs)
        assert all(is_fallback(decision) for decision in decisions.values())
        assert [np.shape(decision.action) for decision in decisions.values()] == shapes
        if kind == "discrete":
            assert decisions["agent_0"].action == 0
        with pytest.raises(ContractError, match="observation of agent_0: expected finite"):
            team.act(vectors | {"agent_0": [float("nan")] * len(vectors["agent_0"])})


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
@pytest.mark.parametrize("stream", [False, True])
def test_policies_stand_in_with_the_same_noise_and_masks(
    kind: str, stream: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bundle: Bundle = request.getfixturevalue(f"{kind}_bundle")
    other = write_test_bundle(tmp_path / "other", bundle.spec, seed=99)
    arguments: dict[str, Any] = {"noise": NoiseSource(bundle.spec, 4).draw(3)}
    if kind == "discrete":
        arguments["action_masks"] = masks(bundle.spec, 3)
    batch = observations(bundle.spec, 3)
    expected = LocalTeam(other).act(batch, **arguments)
    for fallback in (LocalTeam(other), {name: LocalPolicy(other, name) for name in bundle.spec.names}):
        with team_without_servers(bundle, fallback, stream=stream) as team:
            decisions = team.act(batch, **arguments)
            assert all(is_fallback(decision) for decision in decisions.values())
            for name, decision in decisions.items():
                assert decision.action.tobytes() == expected[name].action.tobytes()
            assert team.missed == dict.fromkeys(bundle.spec.names, 1)
            assert team.fallback == ("LocalTeam" if isinstance(fallback, LocalTeam) else "LocalPolicy")


def test_a_policys_fallback_takes_what_a_server_takes(discrete_bundle: Bundle) -> None:
    size = discrete_bundle.spec.agents[0].action.size
    seen: Any = observations(discrete_bundle.spec, None)["agent_0"].tolist()
    mask: Any = [[False] * (size - 1) + [True]]
    with (
        slow_server(discrete_bundle, "agent_0") as (endpoint, _, server),
        RemotePolicy(endpoint, fallback="hold", deadline_s=5, temperature=1.0) as policy,
    ):
        policy.act(seen, action_mask=[[True] + [False] * (size - 1)])  # type: ignore[arg-type]
        server.stop(None).wait()
        decision = policy.act(seen, action_mask=mask)
        assert is_fallback(decision)
        assert decision.action == size - 1


def test_a_missed_joint_graph_is_missed_by_every_agent(continuous_bundle: Bundle) -> None:
    batch = observations(continuous_bundle.spec, 2)
    with team_without_servers(continuous_bundle, LocalTeam(continuous_bundle), TEAM) as team:
        assert list(team.endpoints) == [TEAM]
        decisions = team.act(batch)
        assert all(is_fallback(decision) for decision in decisions.values())
        assert team.missed == dict.fromkeys(continuous_bundle.spec.names, 1)


def test_the_command_line_says_who_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    task = "toy/chain-mixed"
    bundle = write_test_bundle(tmp_path / "bundle", registry.team_spec(task))
    with slow_server(bundle, *bundle.spec.names) as (endpoint, service, _):
        service.late = {("agent_0", 2)}
        words = ["evaluate", task, "--endpoints", endpoint, "--bundle", str(bundle.path), "--episodes", "1"]
        words += [
            "--on-miss",
            "behavior",
            "--deadline",
            str(DEADLINE_S),
            "--json",
            str(tmp_path / "out.json"),
        ]
        monkeypatch.setattr("sys.argv", ["omcda-deploy", *words])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
    assert exit_info.value.code == 0
    result = json.loads((tmp_path / "out.json").read_text())
    steps = dict.fromkeys(bundle.spec.names, 1)  # of one server, so that their answers are one
    assert result["fallback"] == {"by": "BehaviorTeam", "steps": steps}
    assert "answered by the fallback: agent_0 in 1, agent_1 in 1, agent_2 in 1 of" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize("kind", ["continuous", "discrete"])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_the_behavior_team_acts_as_a_guard_that_never_trusts_the_policy(
    kind: str, temperature: float, request: pytest.FixtureRequest
) -> None:
    """Actions are equal to the bit, in a batch and row by row; the team's graph agrees with itself as well."""
    bundle: Bundle = request.getfixturevalue(f"{kind}_bundle")
    spec, rows = bundle.spec, 2000
    batch = observations(spec, rows)
    noise = NoiseSource(spec, 4, temperature).draw(rows) if temperature else None
    allowed = masks(spec, rows) if kind == "discrete" else None
    team = BehaviorTeam(bundle)
    decisions = team.act(batch, noise=noise, action_masks=allowed)
    distrust = dict.fromkeys(spec.names, GuardSetting("fallback", threshold=0.0))

    def inputs(row: slice, *names: str) -> dict[str, Any]:
        joined = {"observation": batch, "noise": noise, "action_mask": allowed}
        return {
            name: np.concatenate([values[agent][row] for agent in names], axis=1)
            for name, values in joined.items()
            if values is not None
        }

    joint = Session(bundle, TEAM, distrust).run(inputs(slice(None), *spec.names))
    for index, name in enumerate(spec.names):
        decision = decisions[name]
        session = Session(bundle, name, distrust)
        answer = session.run(inputs(slice(None), name))
        replaced = answer["policy_weight"] == 0
        assert replaced.sum() > rows / 3  # masks leave the other rows a single action: their divergence is 0
        assert decision.action.dtype == answer["action"].dtype
        assert decision.action.shape == answer["action"].shape
        assert decision.action[replaced].tobytes() == answer["action"][replaced].tobytes()
        if noise is None:
            assert answer["action"][replaced].tobytes() == answer["behavior_action"][replaced].tobytes()
            columns = spec.action_slices[index] if kind == "continuous" else index
            in_team = joint["policy_weight"][:, index] == 0
            assert (joint["action"][in_team, columns] == joint["behavior_action"][in_team, columns]).all()
        for row in range(0, rows, 10):
            single = team.act(
                {agent: values[row] for agent, values in batch.items()},
                noise=None if noise is None else {agent: values[row] for agent, values in noise.items()},
                action_masks=None if allowed is None else {agent: m[row] for agent, m in allowed.items()},
            )[name]
            one = session.run(inputs(slice(row, row + 1), name))
            if one["policy_weight"][0] == 0:
                assert single.action.tobytes() == one["action"][0].tobytes()
                assert np.shape(single.action) == np.shape(one["action"][0])
        assert decision.policy_weight is not None
        assert not np.any(decision.policy_weight)
        policy = LocalPolicy(bundle, name)
        trusted = policy.act(
            batch[name],
            noise=None if noise is None else noise[name],
            action_mask=None if allowed is None else allowed[name],
        )
        assert (decision.action != trusted.action).any()


def test_rows_without_noise_take_the_graphs_own_behavior_action(continuous_bundle: Bundle) -> None:
    """A server fills in zeros for a request without noise, so zeros must mean the same as none."""
    spec, rows = continuous_bundle.spec, 64
    batch, noise = observations(spec, rows), NoiseSource(spec, 4).draw(rows)
    for values in noise.values():
        values[::2] = 0.0
    mixed = BehaviorTeam(continuous_bundle).act(batch, noise=noise)
    quiet = BehaviorTeam(continuous_bundle).act(batch)
    for name in spec.names:
        assert mixed[name].action[::2].tobytes() == quiet[name].action[::2].tobytes()
        assert (mixed[name].action[1::2] != quiet[name].action[1::2]).all()


@pytest.mark.parametrize("stream", [False, True])
def test_an_agents_latency_is_its_own(continuous_bundle: Bundle, stream: bool) -> None:
    """Answers are read in team order, but a slow first one does not lengthen the latencies of the others."""
    spec = continuous_bundle.spec
    with (
        slow_addresses(continuous_bundle) as (addresses, service),
        RemoteTeam(addresses, stream=stream, deadline_s=5) as team,
    ):
        service.pause_s = {"agent_0": 0.6, "agent_1": 0.3}
        team.act(observations(spec, 1))
        assert 0.6 <= team.latencies["agent_0"] < 1.0
        assert 0.3 <= team.latencies["agent_1"] < 0.6
        assert team.latencies["agent_2"] < 0.3


def test_a_stream_that_ended_between_two_steps_costs_no_step(continuous_bundle: Bundle) -> None:
    """The server was started again between two steps."""
    batch = observations(continuous_bundle.spec, 1)
    with slow_server(continuous_bundle, *continuous_bundle.spec.names) as (endpoint, _, server):
        team = RemoteTeam([endpoint], stream=True, deadline_s=5, fallback="hold")
        team.act(batch)
        readers = {thread for thread in threading.enumerate() if thread.name.startswith("answers of")}
        server.stop(None).wait()
    for thread in readers:  # the readers of the old streams have reached their end
        thread.join(5)
    port = int(endpoint.rpartition(":")[2])
    with slow_server(continuous_bundle, *continuous_bundle.spec.names, port=port), team:
        assert_same(team.act(batch), LocalTeam(continuous_bundle).act(batch))
        assert not any(team.missed.values())


@pytest.mark.parametrize("stream", [False, True])
def test_what_a_server_refuses_is_no_miss(
    continuous_bundle: Bundle, continuous_server: ServerProcess, stream: bool
) -> None:
    """A fallback would hide a wrong request for ever."""
    batch = observations(continuous_bundle.spec, 2)
    bad = batch | {"agent_1": np.full((2, 5), 3e38, np.float32)}
    with RemoteTeam([continuous_server.endpoint], stream=stream, deadline_s=5, fallback="hold") as team:
        team.act(batch)
        with pytest.raises(EndpointError, match=r"agent_1.*finite") as raised:
            team.act(bad)
        assert not isinstance(raised.value, MissedAnswerError)
        assert not any(team.missed.values())


def test_without_fallback_a_miss_is_counted_and_raised(continuous_bundle: Bundle) -> None:
    with (
        team_without_servers(continuous_bundle, "raise") as team,
        pytest.raises(
            MissedAnswerError, match=r"127\.0\.0\.1:\d+: step of agent_0, .* failed.*cannot be reached"
        ),
    ):
        team.act(observations(continuous_bundle.spec, 2))
    assert team.missed == dict.fromkeys(continuous_bundle.spec.names, 1)
    assert team.fallback == "raise"


def test_fallbacks_that_do_not_fit_are_refused_at_connect(
    continuous_bundle: Bundle, discrete_bundle: Bundle, continuous_server: ServerProcess
) -> None:
    def connect(fallback: Any) -> None:
        RemoteTeam([continuous_server.endpoint], fallback=fallback)

    with pytest.raises(ConfigError, match="expected 'raise', 'hold' or policies, got 'behaviour'"):
        connect("behaviour")
    with pytest.raises(ConfigError, match="policies of agent_0, agent_1, agent_2, got those of agent_0"):
        connect({"agent_0": LocalPolicy(continuous_bundle, "agent_0")})
    with pytest.raises(ContractError, match="the fallback of agent_1 was made for"):
        connect({name: LocalPolicy(continuous_bundle, "agent_0") for name in continuous_spec().names})
    with pytest.raises(ContractError, match=r"the fallback .* and the served team .* do not fit"):
        connect(LocalTeam(discrete_bundle))
