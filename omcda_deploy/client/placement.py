"""Choice of the server that answers for each model of a team, and checks that the servers belong together."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeAlias, get_args

from omcda_deploy.bundle import TEAM, Bundle
from omcda_deploy.client.channel import Credentials, require_endpoint, require_seconds
from omcda_deploy.client.connection import Contract, ServerConnection, episode_limit_s
from omcda_deploy.client.open_inference import OpenServer
from omcda_deploy.client.served import ServedModels
from omcda_deploy.errors import ConfigError, EndpointError, MissedAnswerError
from omcda_deploy.spec import TeamSpec, require_same_contract

Protocol: TypeAlias = Literal["omcda", "oip"]  # this package's, or the Open Inference Protocol v2
Servers = Mapping[str, ServerConnection]  # by endpoint


def connect(
    endpoints: Sequence[str] | Mapping[str, str],
    protocol: Protocol,
    credentials: Credentials | None,
    bundle: Bundle | None = None,
    *,
    version: str | None = None,
    wait_s: float = 0.0,
) -> dict[str, ServerConnection]:
    """Connect to every endpoint once; returns the connections by endpoint.

    ``version``: whose contracts are asked for; the current one if None. ``wait_s``: as for
    :class:`ServerConnection`, for all endpoints together.

    Raises :class:`EndpointError`, also for an address that is listed twice, and :class:`ConfigError` for a protocol
    that is none, a version without a name and seconds below 0. What was connected before an error is closed.
    """
    if protocol not in get_args(Protocol):
        raise ConfigError(f"protocol: expected {' or '.join(get_args(Protocol))}, got {protocol!r}")
    if not isinstance(endpoints, Iterable) or not (
        addresses := list(endpoints.values() if isinstance(endpoints, Mapping) else endpoints)
    ):
        raise EndpointError(
            f"expected at least one endpoint, got {endpoints or 'none'}: start servers with  omcda-deploy serve"
        )
    for address in addresses:
        require_endpoint(address)
    if version is not None and not (isinstance(version, str) and version):
        raise ConfigError(f"version: expected its name, or None for the current one, got {version!r}")
    require_seconds("wait_s", wait_s, from_zero=True)
    end = time.monotonic() + wait_s
    servers: dict[str, ServerConnection] = {}
    try:
        for endpoint in addresses:
            if endpoint not in servers:
                asked = (version or "", max(0.0, end - time.monotonic()))
                servers[endpoint] = (
                    OpenServer(endpoint, credentials, bundle, *asked)
                    if protocol == "oip"
                    else ServerConnection(endpoint, credentials, *asked)
                )
            elif not isinstance(endpoints, Mapping):
                raise EndpointError(f"{endpoint} was given twice: give every endpoint once")
    except BaseException:
        for server in servers.values():
            server.close()
        raise
    return servers


def agreed_contract(
    servers: Iterable[ServerConnection], spec: TeamSpec | None, *, lenient: bool = False
) -> Contract:
    """Return the first server's contract, of a bundle that all servers hold.

    ``lenient``: others may hold another bundle, and refuse their steps of this one.

    Raises :class:`ContractError` if it is another one than ``spec``'s or differs between servers, and
    :class:`EndpointError` if their bundles differ.
    """
    first, *others = servers
    first.require_contract(spec)
    contract = first.contract
    for other in others:
        require_same_contract(
            contract.team,
            other.contract.team,
            f"the team served at {first.endpoint}",
            f"the team served at {other.endpoint}",
        )
        if other.contract.bundle_digest != contract.bundle_digest and not lenient:
            raise EndpointError(
                f"{first.endpoint} serves bundle {contract.bundle_digest[:12]}, {other.endpoint} serves "
                f"{other.contract.bundle_digest[:12]}: start all servers of a team from one bundle"
            )
    return contract


def place_models(
    endpoints: Sequence[str] | Mapping[str, str], servers: Servers, team: TeamSpec
) -> dict[str, ServerConnection]:
    """Return each agent's server in team order, or the joint graph's alone.

    ``endpoints``: addresses, or a mapping from agent (or ``team``) to address. Raises :class:`EndpointError` if an
    agent is served twice or not at all.
    """
    if isinstance(endpoints, Mapping):
        return _named(endpoints, servers, team)
    if len(servers) == 1:
        (server,) = servers.values()
        if TEAM in server.contract.models:
            return {TEAM: server}
    return {name: _only_server(name, servers, team) for name in team.names}


def only_agent(server: ServerConnection) -> str:
    """Return the name of the only agent that a server has. Raises :class:`EndpointError` if it has more."""
    agents = [name for name in server.contract.models if name != TEAM]
    if len(agents) != 1:
        raise EndpointError(
            f"{server.endpoint} serves {', '.join(server.contract.models)}: say which agent, or use RemoteTeam"
        )
    return agents[0]


def next_contract(
    servers: Sequence[ServerConnection], spec: TeamSpec, served: ServedModels
) -> Contract | None:
    """Return the contract of a new episode: of the current version of the first server that answers.

    All are asked each time, at once, as one that was started again may have another bundle under the version's
    name. None without any answer; the episode's steps then fail, or the fallback acts. With a fallback the same
    holds for the steps of another server that does not hold this version of this bundle, or does not answer.
    ``served``: any of the client's models, for their deadline and whether there is a fallback.

    Raises as :func:`agreed_contract`, and without a fallback :class:`EndpointError` if a server does not hold the
    version or does not answer.
    """
    lenient = served.replaceable
    limit_s = episode_limit_s(served.deadline_s, lenient=lenient)
    end = time.monotonic() + limit_s
    asked = [server for server in servers if not server.silent] or servers
    misses = _describe(asked, "", limit_s)
    if not (answered := [server for server in asked if server not in misses]):
        return None
    version = answered[0].contract.version
    others = [server for server in answered if server.contract.version != version]
    misses |= _describe(others, version, max(0.0, end - time.monotonic()))
    if misses and not lenient:
        raise next(iter(misses.values()))
    return agreed_contract([server for server in asked if server not in misses], spec, lenient=lenient)


def _describe(
    servers: Sequence[ServerConnection], version: str, limit_s: float
) -> dict[ServerConnection, MissedAnswerError]:
    """Ask servers for the contract of a version, all at once; returns the errors of those that do not tell it."""
    misses = {}
    for server in servers:
        server.begin(version, limit_s)
    for server in servers:
        try:
            server.describe()
        except MissedAnswerError as error:
            misses[server] = error
    return misses


def _named(endpoints: Mapping[str, str], servers: Servers, team: TeamSpec) -> dict[str, ServerConnection]:
    if set(endpoints) == {TEAM}:
        return {TEAM: servers[endpoints[TEAM]]}
    if set(endpoints) != set(team.names):
        raise EndpointError(
            f"expected endpoints of {', '.join(team.names)}, or of {TEAM}, got those of {', '.join(endpoints)}"
        )
    return {name: servers[endpoints[name]] for name in team.names}


def _only_server(agent: str, servers: Servers, team: TeamSpec) -> ServerConnection:
    holders = [server for server in servers.values() if agent in server.contract.models]
    if not holders:
        listing = "; ".join(f"{s.endpoint} serves {', '.join(s.contract.models)}" for s in servers.values())
        raise EndpointError(
            f"no endpoint serves {agent} of {', '.join(team.names)} ({listing}): add its endpoint"
        )
    if len(holders) > 1:
        raise EndpointError(
            f"{agent} is served by {' and by '.join(server.endpoint for server in holders)}: give one of them"
        )
    return holders[0]
