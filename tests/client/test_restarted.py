"""Servers that come back with another bundle under the same version: clients never mix the answers of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import ExitStack, contextmanager
from typing import Any

import grpc
import pytest

from omcda_deploy import registry
from omcda_deploy.bundle import Bundle
from omcda_deploy.client.placement import Protocol
from omcda_deploy.client.remote import RemotePolicy, RemoteTeam
from omcda_deploy.errors import EndpointError, MissedAnswerError
from omcda_deploy.local import LocalTeam
from omcda_deploy.play.evaluate import evaluate
from omcda_deploy.protos import oip, policy_pb2
from omcda_deploy.serve.config import ServerConfig
from omcda_deploy.serve.oip import SERVICE as OPEN_SERVICE
from omcda_deploy.serve.oip import InferenceService
from omcda_deploy.serve.policy_service import SERVICE, PolicyService
from omcda_deploy.serve.releases import Releases
from omcda_deploy.serve.status import OtherBundleError, status_of
from tests.client.test_client import masks, observations
from tests.support.bundles import write_test_bundle
from tests.support.stand_in import stand_in

TASK = "toy/chain-mixed"
PROTOCOLS: tuple[Protocol, ...] = ("omcda", "oip")
Start = Callable[[Bundle], None]  # the server again, on the same port


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    """Three bundles of one contract."""
    folder = tmp_path_factory.mktemp("bundles")
    return [write_test_bundle(folder / str(seed), registry.team_spec(TASK), seed) for seed in range(3)]


@contextmanager
def restartable(bundle: Bundle, *models: str) -> Iterator[tuple[str, Start]]:
    """Yield the address of a server in this process, and a function that gives it another bundle."""
    services: dict[str, Any] = {}

    def start(bundle: Bundle) -> None:
        releases = Releases(bundle.path, models, ServerConfig())
        services["policy"], services["open"] = PolicyService(releases), InferenceService(releases)

    def handler(service: str, method: str, request_type: Any) -> Any:
        def handle(request: Any, context: Any) -> bytes:
            try:
                answer = getattr(services[service], method)(request)
                return answer if isinstance(answer, bytes) else answer.SerializeToString()
            except Exception as error:
                context.abort(*status_of(error))
                raise

        return grpc.unary_unary_rpc_method_handler(handle, request_deserializer=request_type.FromString)

    start(bundle)
    server = grpc.server(futures.ThreadPoolExecutor(4), options=(("grpc.so_reuseport", 0),))
    for service, name, methods in (
        (
            "policy",
            SERVICE,
            {
                "GetContract": ("get_contract", policy_pb2.GetContractRequest),
                "Act": ("act", policy_pb2.ActRequest),
            },
        ),
        (
            "open",
            OPEN_SERVICE,
            {
                "ModelMetadata": ("model_metadata", oip.ModelMetadataRequest),
                "ModelInfer": ("model_infer", oip.ModelInferRequest),
            },
        ),
    ):
        handlers = {method: handler(service, *described) for method, described in methods.items()}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}", start
    finally:
        server.stop(None).wait()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_evaluation_is_of_one_bundle(bundles: list[Bundle], protocol: Protocol) -> None:
    """Its server dies after three episodes and comes back as the same version of another bundle."""
    first, second, _ = bundles
    with restartable(first) as (endpoint, start), RemoteTeam([endpoint], protocol=protocol) as team:

        def restart(done: float, total: float) -> None:
            if done >= 3:
                start(second)

        with pytest.raises(
            MissedAnswerError,
            match=f"NOT_FOUND: unknown version 1 of bundle {first.digest[:12]}: it is {second.digest[:12]}",
        ):
            evaluate(team, TASK, episodes=12, num_envs=1, progress=restart)
        assert team.bundle_digest == first.digest
        result = evaluate(team, TASK, episodes=2, num_envs=1)  # a new one begins with what is served
        assert team.bundle_digest == second.digest == result.to_json()["team"]["bundle_digest"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_episode_is_of_one_bundle_on_all_servers(bundles: list[Bundle], protocol: Protocol) -> None:
    first, second, third = bundles
    names, seen = first.spec.names, observations(first.spec, 1)
    allowed = masks(first.spec, 1)
    with ExitStack() as stack:
        servers = [stack.enter_context(restartable(first, name)) for name in names]
        endpoints = [endpoint for endpoint, _ in servers]
        options: dict[str, Any] = {"protocol": protocol, "bundle": first if protocol == "oip" else None}
        team = stack.enter_context(RemoteTeam(endpoints, fallback=LocalTeam(third), **options))
        strict = stack.enter_context(RemoteTeam(endpoints, **options))

        def missed() -> list[str]:
            return [name for name, d in team.act(seen, action_masks=allowed).items() if d.fallback]

        assert missed() == []
        servers[1][1](second)
        assert missed() == [names[1]]  # in the middle of an episode
        team.reset()
        assert (missed(), team.bundle_digest) == ([names[1]], first.digest)
        with pytest.raises(EndpointError, match=f"{endpoints[0]} serves bundle {first.digest[:12]}, "):
            strict.reset()
        servers[0][1](third)
        team.reset()  # the first server's bundle is the team's
        assert (missed(), team.bundle_digest) == ([*names[1:]], third.digest)
        for _, start in servers:
            start(third)
        for each in (team, strict):
            each.reset()
            assert each.bundle_digest == third.digest
        assert missed() == []


def test_a_policy_begins_each_episode_with_the_bundle_that_is_served(bundles: list[Bundle]) -> None:
    first, second, _ = bundles
    name = first.spec.names[0]
    seen = observations(first.spec, 1)[name]
    mask = masks(first.spec, 1)[name]
    with (
        restartable(first, name) as (endpoint, start),
        RemotePolicy(endpoint) as policy,
        RemotePolicy(endpoint, version="1") as pinned,
    ):
        for each in (policy, pinned):
            each.act(seen, action_mask=mask)
        start(second)
        for each in (policy, pinned):
            with pytest.raises(MissedAnswerError, match="unknown version 1 of bundle"):
                each.act(seen, action_mask=mask)
            each.reset()
        policy.act(seen, action_mask=mask)
        with pytest.raises(MissedAnswerError, match="unknown version 1 of bundle"):
            pinned.act(seen, action_mask=mask)  # all its episodes are of the bundle that it connected to


def test_a_request_may_leave_open_which_bundle_it_means(bundles: list[Bundle]) -> None:
    """As clients from before do; an expectation also holds for the current version, which need not be named."""
    releases = Releases(bundles[0].path, (), ServerConfig())
    for version in ("", "1"):
        for digest in ("", bundles[0].digest):
            assert releases.find("team", version, digest).name == "team"
        with pytest.raises(OtherBundleError):
            releases.find("team", version, bundles[1].digest)


def test_other_servers_are_sent_no_parameter_that_they_do_not_know(bundles: list[Bundle]) -> None:
    with (
        stand_in(bundles[0].path) as (endpoint, service),
        RemoteTeam([endpoint], protocol="oip", bundle=bundles[0]) as team,
    ):
        assert team.bundle_digest == bundles[0].digest
        team.act(observations(bundles[0].spec, 1), action_masks=masks(bundles[0].spec, 1))
    assert len(service.calls) == len(bundles[0].spec.names)
    assert service.parameters == set()
