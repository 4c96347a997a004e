"""Served policies over gRPC: the same :class:`~omcda_deploy.policy.Policy` protocols as in process.

Endpoints are gRPC targets, ``127.0.0.1:8500``. On connecting, a client asks each server for its contract and
refuses one that does not fit. Policies are for one thread; their channels may be shared.

A step whose answer is missed (:class:`MissedAnswerError`: too late, or the server is gone) is answered by the
``fallback`` that the caller chose (:mod:`omcda_deploy.client.fallback`), and the next step asks the server again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Literal, Self

import numpy as np

from omcda_deploy.bundle import TEAM, parameter_names
from omcda_deploy.client.channel import Credentials
from omcda_deploy.client.connection import Outputs, Rows, ServedModel, Server
from omcda_deploy.client.fallback import FallbackChoice, Mask, fallback_of
from omcda_deploy.errors import ContractError, EndpointError, MissedAnswerError
from omcda_deploy.local import batch_of, decision_of, first_row, observation_of, split_decisions
from omcda_deploy.policy import Decision, Float, Policy
from omcda_deploy.spec import AgentSpec, TeamSpec, require_same_contract


class RemotePolicy:
    """One served agent.

    ``agent``: its name; None for the only agent that the endpoint serves. ``spec``: the team that the caller was
    built for; None takes the server's word. ``deadline_s``: seconds for one answer. ``stream``: one message per
    step on one gRPC stream, about half the cost of a call per step. ``fallback``: who acts where the answer to a
    step is missed. ``missed``: how many were so far. ``credentials``: TLS and tokens; plaintext and none without.

    Raises :class:`EndpointError` when the endpoint cannot be reached, does not serve the agent or refuses a
    request, :class:`MissedAnswerError`, and :class:`ContractError` when its contract is another one than
    ``spec``'s.
    """

    def __init__(
        self,
        endpoint: str,
        agent: str | None = None,
        *,
        spec: TeamSpec | None = None,
        deadline_s: float = 1.0,
        stream: bool = False,
        fallback: Literal["raise", "hold"] | Policy = "raise",
        credentials: Credentials | None = None,
    ) -> None:
        self.missed = 0
        self._server = Server(endpoint, credentials)
        try:
            self._server.require_contract(spec)
            name = _only_agent(self._server) if agent is None else agent
            self.spec: AgentSpec = self._server.team.agent(name)
            choice = fallback if isinstance(fallback, str) else {name: fallback}
            self._fallback = fallback_of(choice, self._server.team, [self.spec])
            self._model = ServedModel(self._server, name, deadline_s, stream)
        except BaseException:
            self._server.close()
            raise
        self.team = self._server.team
        self._parameters = parameter_names(self.team)

    @property
    def latency(self) -> float | None:
        """Seconds from sending the last request to its answer's arrival; None without one."""
        return self._model.latency

    def reset(self) -> None:
        """Mark the next step as the first of an episode, which the server's current version will answer."""
        self._model.version = _next_version([self._server], self.team)
        self._model.reset()
        if self._fallback is not None:
            self._fallback.reset()

    def act(
        self, observation: Float, *, noise: Float | None = None, action_mask: Mask | None = None
    ) -> Decision:
        """``observation`` [B, O] or [O]; ``noise`` and ``action_mask`` [B, A] or [A]."""
        name = self.spec.name
        try:
            outputs = self._model.ask(_rows(self.spec, observation, noise, action_mask))
        except MissedAnswerError as error:
            self.missed += 1
            if self._fallback is None:
                raise
            drawn = None if noise is None else {name: noise}
            masks = None if action_mask is None else {name: action_mask}
            return self._fallback.answer({name: error}, {name: observation}, drawn, masks)[name]
        decision = decision_of(outputs, self._parameters)
        if np.ndim(observation) == 1:
            decision = first_row(decision)
        if self._fallback is not None:
            self._fallback.note({name: decision})
        return decision

    def close(self) -> None:
        self._model.abandon()
        self._server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class RemoteTeam:
    """A served team: one endpoint per agent, one for several agents, or one that serves the joint graph.

    ``endpoints``: addresses in any order, each taken for the agents that it serves, or a mapping from agent
    (or ``"team"``) to address. Other arguments are :class:`RemotePolicy`'s. A step sends all requests before it
    waits for the first answer. One agent's missed answer costs the others nothing: theirs are used.

    ``missed``: by agent, the steps missed so far; a missed joint graph is missed by all. ``fallback``: who answers
    those, ``raise``, ``hold`` or the policy's type.

    Raises :class:`EndpointError` as :class:`RemotePolicy` does, when an agent is served twice or not at all, and
    when the servers do not hold one and the same bundle.
    """

    def __init__(
        self,
        endpoints: Sequence[str] | Mapping[str, str],
        *,
        spec: TeamSpec | None = None,
        deadline_s: float = 1.0,
        stream: bool = False,
        fallback: FallbackChoice = "raise",
        credentials: Credentials | None = None,
    ) -> None:
        if isinstance(endpoints, str):
            endpoints = [endpoints]
        addresses = endpoints.values() if isinstance(endpoints, Mapping) else endpoints
        self._servers: dict[str, Server] = {}
        self._models: dict[str, ServedModel] = {}
        try:
            for endpoint in addresses:
                if endpoint in self._servers and not isinstance(endpoints, Mapping):
                    raise EndpointError(f"{endpoint} was given twice: give every endpoint once")
                if endpoint not in self._servers:
                    self._servers[endpoint] = Server(endpoint, credentials)
            if not self._servers:
                raise EndpointError(
                    "expected at least one endpoint, got none: start servers with  omcda-deploy serve"
                )
            first = _agreement(self._servers.values(), spec)
            placed = (
                _named(endpoints, self._servers, first.team)
                if isinstance(endpoints, Mapping)
                else _placed(self._servers, first.team)
            )
            self._fallback = fallback_of(fallback, first.team, first.team.agents)
            for model, server in placed.items():
                self._models[model] = ServedModel(server, model, deadline_s, stream)
        except BaseException:
            self.close()
            raise
        self.spec: TeamSpec = first.team
        self._describe()
        self.endpoints: dict[str, str] = {model: server.endpoint for model, server in placed.items()}
        self.missed: dict[str, int] = dict.fromkeys(self.spec.names, 0)
        self.fallback: str = "raise" if self._fallback is None else self._fallback.name
        self._parameters = parameter_names(self.spec)

    @property
    def latencies(self) -> dict[str, float]:
        """Seconds of the last step by agent (``"team"`` for the joint graph), from sending to the answer's arrival.

        Without the agents whose answer was missed.
        """
        return {name: m.latency for name, m in self._models.items() if m.latency is not None}

    def reset(self) -> None:
        """Mark the next step as the first of an episode.

        All of it will be answered by the version that is the first server's current one now, which all must hold.
        """
        version = _next_version(list(self._servers.values()), self.spec)
        self._describe()
        for model in self._models.values():
            model.version = version
            model.reset()
        if self._fallback is not None:
            self._fallback.reset()

    def act(
        self,
        observations: Mapping[str, Float],
        *,
        noise: Mapping[str, Float] | None = None,
        action_masks: Mapping[str, Mask] | None = None,
    ) -> dict[str, Decision]:
        """One step of every agent; shapes are :meth:`RemotePolicy.act`'s. After an error no answer is pending."""
        rows = {
            agent.name: _rows(
                agent,
                observation_of(observations, agent.name),
                noise[agent.name] if noise else None,
                action_masks[agent.name] if action_masks else None,
            )
            for agent in self.spec.agents
        }
        outputs, missed = self._ask(rows)
        decisions = (
            split_decisions(self.spec, outputs[TEAM])
            if TEAM in outputs
            else {name: decision_of(answer, self._parameters) for name, answer in outputs.items()}
        )
        decisions = {
            name: decision if np.ndim(observations[name]) == 2 else first_row(decision)
            for name, decision in decisions.items()
        }
        if self._fallback is not None:
            if missed:
                decisions |= self._fallback.answer(missed, observations, noise, action_masks)
                decisions = {name: decisions[name] for name in self.spec.names}
            self._fallback.note(decisions)
        return decisions

    def _describe(self) -> None:
        first = next(iter(self._servers.values()))
        self.divergence_kind: str = first.divergence_kind
        self.bundle_digest: str = first.bundle_digest
        self.budgets: dict[str, float | None] = first.budgets
        self.version: str = first.version

    def _ask(self, rows: Mapping[str, Rows]) -> tuple[dict[str, Outputs], dict[str, MissedAnswerError]]:
        """The models' answers, and the agents whose answers are missed."""
        outputs: dict[str, Outputs] = {}
        missed: dict[str, MissedAnswerError] = {}
        takes: dict[str, Callable[[], Outputs]]
        try:
            if TEAM in self._models:
                takes = {TEAM: lambda: self._models[TEAM].ask(_joined(self.spec, rows))}
            else:
                for name, model in self._models.items():
                    model.send(rows[name])
                takes = {name: model.receive for name, model in self._models.items()}
            for asked, take in takes.items():
                try:
                    outputs[asked] = take()
                except MissedAnswerError as error:
                    missed |= dict.fromkeys(self.spec.names if asked == TEAM else [asked], error)
                    if self._fallback is None:
                        raise
        except BaseException:
            for model in self._models.values():
                model.abandon()
            raise
        finally:
            for name in missed:
                self.missed[name] += 1
        return outputs, missed

    def close(self) -> None:
        for model in self._models.values():
            model.abandon()
        for server in self._servers.values():
            server.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _next_version(servers: Sequence[Server], spec: TeamSpec) -> str:
    """The version of a new episode: the first server's current one, and every server's answer for it."""
    first = servers[0]
    try:
        version = first.current_version()
    except MissedAnswerError:  # the steps will tell, or the fallback acts
        return first.version
    if version != first.version:
        for server in servers:
            server.describe(version)
        _agreement(servers, spec)
    return version


def _only_agent(server: Server) -> str:
    agents = [name for name in server.models if name != TEAM]
    if len(agents) != 1:
        raise EndpointError(
            f"{server.endpoint} serves {', '.join(server.models)}: say which agent, or use RemoteTeam"
        )
    return agents[0]


def _agreement(servers: Iterable[Server], spec: TeamSpec | None) -> Server:
    """One of the servers, which all hold one bundle of the contract asked for."""
    first, *others = servers
    first.require_contract(spec)
    for other in others:
        require_same_contract(
            first.team,
            other.team,
            f"the team served at {first.endpoint}",
            f"the team served at {other.endpoint}",
        )
        if other.bundle_digest != first.bundle_digest:
            raise EndpointError(
                f"{first.endpoint} serves bundle {first.bundle_digest[:12]}, {other.endpoint} serves "
                f"{other.bundle_digest[:12]}: start all servers of a team from one bundle"
            )
    return first


def _placed(servers: Mapping[str, Server], team: TeamSpec) -> dict[str, Server]:
    """Each agent's server, in team order; or the joint graph's, where one server has it and is the only one."""
    if len(servers) == 1:
        (only,) = servers.values()
        if TEAM in only.models:
            return {TEAM: only}
    placed = {}
    for name in team.names:
        holders = [server for server in servers.values() if name in server.models]
        if not holders:
            served = "; ".join(f"{s.endpoint} serves {', '.join(s.models)}" for s in servers.values())
            raise EndpointError(
                f"no endpoint serves {name} of {', '.join(team.names)} ({served}): add its endpoint"
            )
        if len(holders) > 1:
            raise EndpointError(
                f"{name} is served by {' and by '.join(server.endpoint for server in holders)}: give one of them"
            )
        placed[name] = holders[0]
    return placed


def _named(endpoints: Mapping[str, str], servers: Mapping[str, Server], team: TeamSpec) -> dict[str, Server]:
    """Each agent's server as the caller named it, in team order; or the joint graph's."""
    if set(endpoints) == {TEAM}:
        return {TEAM: servers[endpoints[TEAM]]}
    if set(endpoints) != set(team.names):
        raise EndpointError(
            f"expected endpoints of {', '.join(team.names)}, or of {TEAM}, got those of {', '.join(endpoints)}"
        )
    return {name: servers[endpoints[name]] for name in team.names}


def _rows(agent: AgentSpec, observation: Float, noise: Float | None, action_mask: Mask | None) -> Rows:
    """An agent's inputs as [B, O] and [B, A]; noise that is absent stays away from the wire."""
    rows: Rows = {
        "observation": batch_of(observation, agent.observation_size, f"observation of {agent.name}")
    }
    batch, actions = len(rows["observation"]), agent.action.size
    if noise is not None:
        rows["noise"] = batch_of(noise, actions, f"noise of {agent.name}")
    if agent.action.kind == "discrete":
        rows["action_mask"] = (
            np.ones((batch, actions), np.uint8)
            if action_mask is None
            else batch_of(action_mask, actions, f"action_mask of {agent.name}")
        )
    for name, values in rows.items():
        if len(values) != batch:
            raise ContractError(
                f"{name} of {agent.name}: expected {batch} rows as in the observation, got {len(values)}"
            )
    return rows


def _joined(spec: TeamSpec, rows: Mapping[str, Rows]) -> Rows:
    """The joint graph's inputs: the agents' side by side."""
    batches = {name: len(own["observation"]) for name, own in rows.items()}
    if len(set(batches.values())) > 1:
        raise ContractError(f"expected as many observations of every agent, got {batches}")
    return {
        name: np.concatenate([rows[agent][name] for agent in spec.names], axis=1)
        for name in rows[spec.names[0]]
    }
