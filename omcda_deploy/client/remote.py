"""Served policies over gRPC, with the same :class:`~omcda_deploy.policy.Policy` protocols as policies in process.

Endpoints are gRPC targets, as ``127.0.0.1:8500``. When it connects, a client asks each server for its contract and
refuses one that does not fit. A policy is for one thread.

A step whose answer is missed (:class:`MissedAnswerError`: too late, or the server is gone) is answered by the
caller's ``fallback`` (:mod:`omcda_deploy.client.fallback`); the next step asks the server again.

Shapes: B rows, O observation size and A action size of an agent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Literal, Self

import numpy as np

from omcda_deploy.bundle import TEAM, parameter_names
from omcda_deploy.client.channel import Credentials
from omcda_deploy.client.connection import Outputs, Rows, ServedModel, ServerConnection
from omcda_deploy.client.fallback import FallbackChoice, Mask, fallback_of
from omcda_deploy.client.placement import agreed_contract, next_version, only_agent, place_models
from omcda_deploy.errors import ContractError, EndpointError, MissedAnswerError
from omcda_deploy.local import batch_of, decision_of, first_row, observation_of, split_decisions
from omcda_deploy.policy import Decision, Float, Policy
from omcda_deploy.spec import AgentSpec, TeamSpec


class RemotePolicy:
    """One served agent.

    ``agent``: its name; None for the only agent that the endpoint serves. ``spec``: the team that the caller was
    built for; None accepts any. ``deadline_s``: seconds for one answer. ``stream``: send one message per step on
    one gRPC stream, about half the cost of a call per step. ``fallback``: acts if the answer to a step is missed.
    ``credentials``: TLS and tokens; without them, plaintext and no token. ``missed``: number of missed answers.

    Raises :class:`EndpointError` if the endpoint cannot be reached, does not serve the agent or refuses a request,
    :class:`MissedAnswerError`, and :class:`ContractError` if its contract is another one than ``spec``'s.
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
        self._server = ServerConnection(endpoint, credentials)
        try:
            self._server.require_contract(spec)
            self.team: TeamSpec = self._server.contract.team
            name = only_agent(self._server) if agent is None else agent
            self.spec: AgentSpec = self.team.agent(name)
            choice = fallback if isinstance(fallback, str) else {name: fallback}
            self._fallback = fallback_of(choice, self.team, [self.spec])
            self._model = ServedModel(self._server, name, deadline_s, stream)
        except BaseException:
            self._server.close()
            raise
        self._parameters = parameter_names(self.team)

    @property
    def latency(self) -> float | None:
        """Seconds from sending the last request to its answer's arrival; None without an answer."""
        return self._model.latency

    def reset(self) -> None:
        """Mark the next step as the first of an episode, which the server's current version will answer."""
        self._model.version = next_version([self._server], self.team)
        self._model.reset()
        if self._fallback is not None:
            self._fallback.reset()

    def act(
        self, observation: Float, *, noise: Float | None = None, action_mask: Mask | None = None
    ) -> Decision:
        """Ask the server for the actions of one step.

        ``observation`` [B, O] or [O]; ``noise`` and ``action_mask`` [B, A] or [A].
        """
        name = self.spec.name
        try:
            outputs = self._model.ask(_rows(self.spec, observation, noise, action_mask))
        except MissedAnswerError as error:
            self.missed += 1
            if self._fallback is None:
                raise
            noises = None if noise is None else {name: noise}
            masks = None if action_mask is None else {name: action_mask}
            return self._fallback.answer({name: error}, {name: observation}, noises, masks)[name]
        decision = decision_of(outputs, self._parameters)
        if np.ndim(observation) == 1:
            decision = first_row(decision)
        if self._fallback is not None:
            self._fallback.note({name: decision})
        return decision

    def close(self) -> None:
        """Give up what is under way and close the connection."""
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

    ``endpoints``: addresses in any order, each used for the agents that it serves, or a mapping from agent (or
    ``"team"``) to address. The other arguments are those of :class:`RemotePolicy`. A step sends all requests before
    it waits for the first answer; if one agent's answer is missed, the other agents' answers are used all the same.

    As attributes, ``spec`` is the served team, ``endpoints`` has the address by agent, or of ``"team"``, ``missed``
    the number of missed answers by agent (one missed by the joint graph is missed by all agents), and ``fallback``
    is ``raise``, ``hold`` or the type of the fallback's policies. ``version``, ``bundle_digest``,
    ``divergence_kind`` and ``budgets`` (d_i in nats by agent) describe the bundle that answers this episode.

    Raises :class:`EndpointError` as :class:`RemotePolicy` does, if an agent is served twice or not at all, and if
    the servers do not all hold the same bundle.
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
        self._servers: dict[str, ServerConnection] = {}  # by endpoint
        self._models: dict[str, ServedModel] = {}
        try:
            self._connect(endpoints, credentials)
            contract = agreed_contract(self._servers.values(), spec)
            placement = place_models(endpoints, self._servers, contract.team)
            self._fallback = fallback_of(fallback, contract.team, contract.team.agents)
            for model, server in placement.items():
                self._models[model] = ServedModel(server, model, deadline_s, stream)
        except BaseException:
            self.close()
            raise
        self.spec: TeamSpec = contract.team
        self.endpoints: dict[str, str] = {model: server.endpoint for model, server in placement.items()}
        self.missed: dict[str, int] = dict.fromkeys(self.spec.names, 0)
        self.fallback: str = "raise" if self._fallback is None else self._fallback.name
        self.version: str = contract.version
        self.bundle_digest: str = contract.bundle_digest
        self.divergence_kind: str = contract.divergence_kind
        self.budgets: dict[str, float | None] = contract.budgets
        self._parameters = parameter_names(self.spec)

    def _connect(self, endpoints: Sequence[str] | Mapping[str, str], credentials: Credentials | None) -> None:
        """Connect to every endpoint once. Raises :class:`EndpointError`."""
        addresses = list(endpoints.values() if isinstance(endpoints, Mapping) else endpoints)
        if not addresses:
            raise EndpointError(
                "expected at least one endpoint, got none: start servers with  omcda-deploy serve"
            )
        for endpoint in addresses:
            if endpoint not in self._servers:
                self._servers[endpoint] = ServerConnection(endpoint, credentials)
            elif not isinstance(endpoints, Mapping):
                raise EndpointError(f"{endpoint} was given twice: give every endpoint once")

    @property
    def latencies(self) -> dict[str, float]:
        """Seconds from sending the last step to its answer's arrival, by agent (``"team"`` for the joint graph).

        Agents whose answer was missed are left out.
        """
        models = self._models.items()
        return {name: model.latency for name, model in models if model.latency is not None}

    def reset(self) -> None:
        """Mark the next step as the first of an episode.

        The whole episode is answered by the version that is now the first server's current one. Raises
        :class:`EndpointError` if another server does not hold that version.
        """
        servers = list(self._servers.values())
        version = next_version(servers, self.spec)
        contract = servers[0].contract
        self.version, self.bundle_digest = contract.version, contract.bundle_digest
        self.divergence_kind, self.budgets = contract.divergence_kind, contract.budgets
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
        """Ask for one step of every agent; shapes as in :meth:`RemotePolicy.act`.

        After an error no request is pending.
        """
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

    def _ask(self, rows: Mapping[str, Rows]) -> tuple[dict[str, Outputs], dict[str, MissedAnswerError]]:
        """Return the models' answers, and the errors of the agents whose answers are missed."""
        outputs: dict[str, Outputs] = {}
        missed: dict[str, MissedAnswerError] = {}
        receivers: dict[str, Callable[[], Outputs]]
        try:
            if TEAM in self._models:
                receivers = {TEAM: lambda: self._models[TEAM].ask(_joined(self.spec, rows))}
            else:
                for name, model in self._models.items():
                    model.send(rows[name])
                receivers = {name: model.receive for name, model in self._models.items()}
            for name, receive in receivers.items():
                try:
                    outputs[name] = receive()
                except MissedAnswerError as error:
                    missed |= dict.fromkeys(self.spec.names if name == TEAM else [name], error)
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
        """Give up what is under way and close all connections."""
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


def _rows(agent: AgentSpec, observation: Float, noise: Float | None, action_mask: Mask | None) -> Rows:
    """Return an agent's inputs as [B, O] and [B, A]; absent noise is not sent."""
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
    """Return the joint graph's inputs: the agents' side by side."""
    batches = {name: len(inputs["observation"]) for name, inputs in rows.items()}
    if len(set(batches.values())) > 1:
        raise ContractError(f"expected as many observations of every agent, got {batches}")
    return {
        name: np.concatenate([rows[agent][name] for agent in spec.names], axis=1)
        for name in rows[spec.names[0]]
    }
