"""Served policies over gRPC, with the same :class:`~omcda_deploy.policy.Policy` protocols as policies in process.

Endpoints are gRPC targets, as ``127.0.0.1:8500``. When it connects, a client asks each server for its contract and
refuses one that does not fit. A policy is for one thread at a time (:mod:`omcda_deploy.client.usage`).

A step whose answer is missed (:class:`MissedAnswerError`: too late, the server is gone or has no place) is answered
by the caller's ``fallback`` (:mod:`omcda_deploy.client.fallback`); the next step asks the server again. A server
that keeps a loop waiting is not waited for any more until it answers in time (:mod:`omcda_deploy.client.circuit`).

Shapes: B rows, O observation size and A action size of an agent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from omcda_deploy.bundle import TEAM, Bundle, parameter_names, read_bundle
from omcda_deploy.client.channel import Credentials
from omcda_deploy.client.circuit import NotAwaitedError
from omcda_deploy.client.connection import ServerConnection
from omcda_deploy.client.episode import EpisodeClock
from omcda_deploy.client.fallback import FallbackChoice, fallback_of, marked
from omcda_deploy.client.open_inference import OpenModels
from omcda_deploy.client.placement import (
    Protocol,
    agreed_contract,
    connect,
    next_contract,
    only_agent,
    place_models,
)
from omcda_deploy.client.reports import Reports
from omcda_deploy.client.served import Outputs, ServedModels
from omcda_deploy.client.usage import UsedByOne
from omcda_deploy.errors import ConfigError, MissedAnswerError
from omcda_deploy.inputs import Mask, Rows, agent_rows, checked_inputs, joined_rows, team_rows, with_noise
from omcda_deploy.local import decision_of, first_row, in_kind, split_decisions
from omcda_deploy.policy import Decision, Float, NoiseSource, Policy, checked_temperature
from omcda_deploy.spec import AgentSpec, TeamSpec


class RemotePolicy(UsedByOne):
    """One served agent.

    ``agent``: its name; None for the only agent that the endpoint serves. ``spec``: the team that the caller was
    built for; None accepts any. ``deadline_s``: seconds for one answer. ``stream``: send one message per step on
    one gRPC stream, about half the cost of a call per step. ``fallback``: acts if the answer to a step is missed.
    ``credentials``: TLS and tokens; without them, plaintext and no token. ``temperature``: T of calls without
    ``noise``, 0 for deterministic actions, 1 for samples; their noise is drawn here, from ``seed``, and the server,
    its guard and the fallback all use it. Noise that a call brings is used as it is. ``version``: answers all
    episodes, if the server holds it; None for that which is current when an episode begins. ``wait_s``: seconds in
    which the server may get ready, and load the version. ``missed``: number of missed answers, ``not_awaited``: of
    those that were not waited for.

    Raises :class:`EndpointError` if the endpoint cannot be reached, does not serve the agent or refuses a request,
    :class:`MissedAnswerError`, :class:`ContractError` if its contract is another one than ``spec``'s, and
    :class:`ConfigError` for settings of another kind or out of range.
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
        temperature: float = 0.0,
        seed: int = 0,
        version: str | None = None,
        wait_s: float = 0.0,
    ) -> None:
        super().__init__()
        self.missed = self.not_awaited = 0
        self.temperature = checked_temperature(temperature)
        servers = connect([endpoint], "omcda", credentials, version=version, wait_s=wait_s)
        self._server = servers[endpoint]
        self._pinned = version is not None
        try:
            self._server.require_contract(spec)
            self.team: TeamSpec = self._server.contract.team
            name = only_agent(self._server) if agent is None else agent
            self.spec: AgentSpec = self.team.agent(name)
            choice = fallback if isinstance(fallback, str) else {name: fallback}
            self._fallback = fallback_of(choice, self.team, [self.spec])
            self._episode, breaks = EpisodeClock(), self._fallback is not None
            self._model = ServedModels(self._server, [name], deadline_s, stream, breaks, self._episode)
            self._noise = NoiseSource(self.team, seed, temperature)
        except BaseException:
            self._server.close()
            raise
        self._parameters = parameter_names(self.team)

    @property
    def latency(self) -> float | None:
        """Seconds from sending the last request to its answer's arrival; None without an answer."""
        return self._model.latency

    def reset(self, *, episode_id: str | None = None) -> None:
        """Mark the next step as the first of an episode, which the server's current version will answer.

        ``episode_id``: its name in recordings, which all agents of a team share; a new one if None.
        """
        with self._usage:
            self._episode.begin(episode_id)
            if not self._pinned:
                contract = next_contract([self._server], self.team, self._model)
                if contract is not None:
                    self._model.take(contract.version, contract.bundle_digest)
            self._model.reset()
            if self._fallback is not None:
                self._fallback.reset()

    def act(
        self, observation: Float, *, noise: Float | None = None, action_mask: Mask | None = None
    ) -> Decision:
        """Ask the server for the actions of one step.

        ``observation`` [B, O] or [O]; ``noise`` and ``action_mask`` [B, A] or [A].
        """
        with self._usage:
            return self._act(observation, noise, action_mask)

    def _act(self, observation: Float, noise: Float | None, action_mask: Mask | None) -> Decision:
        name = self.spec.name
        rows = agent_rows(self.spec, observation, noise, action_mask)
        noises = with_noise({name: rows}, self._noise, None if noise is None else {name: noise})
        self._episode.advance(noises)
        try:
            outputs = self._model.ask({name: rows})[name]
        except MissedAnswerError as error:
            self.missed += 1
            self.not_awaited += isinstance(error, NotAwaitedError)
            if self._fallback is None:
                raise
            inputs = checked_inputs({name: rows}, {name: observation}, noises)
            decisions = self._fallback.answer({name: error}, *inputs)
            return marked(decisions, {name: error})[name]
        decision = decision_of(outputs, self._parameters)
        if np.ndim(observation) != 2:
            decision = first_row(decision)
        if self._fallback is not None:
            self._fallback.note({name: decision})
        return decision

    def close(self) -> None:
        """Give up what is under way and close the connection."""
        self._usage.closed = True
        self._model.abandon()
        self._server.close()


class RemoteTeam(UsedByOne):
    """A served team: one endpoint per agent, one for several agents, or one that serves the joint graph.

    ``endpoints``: addresses in any order, each used for the agents that it serves, or a mapping from agent (or
    ``"team"``) to address. The other arguments are those of :class:`RemotePolicy`. A step sends all requests before
    it waits for the first answer; if one agent's answer is missed, the other agents' answers are used all the same.
    ``record``: a folder for what is reported (:meth:`report`). ``protocol``: ``oip`` for other servers that hold a
    bundle's models (:mod:`omcda_deploy.client.open_inference`), whose contract ``bundle`` states where they do not.

    As attributes, ``spec`` is the served team, ``endpoints`` has the address by agent, or of ``"team"``, ``missed``
    the number of missed answers by agent (one missed by the joint graph is missed by all agents), ``not_awaited``
    that of those which were not waited for, and ``fallback`` is ``raise``, ``hold`` or the type of the fallback's
    policies. ``version``, ``bundle_digest``, ``divergence_kind`` and ``budgets`` (d_i in nats by agent) describe
    the bundle that answers this episode.

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
        temperature: float = 0.0,
        seed: int = 0,
        record: str | Path | None = None,
        protocol: Protocol = "omcda",
        bundle: Bundle | str | Path | None = None,
        version: str | None = None,
        wait_s: float = 0.0,
    ) -> None:
        self.temperature = checked_temperature(temperature)
        super().__init__()
        self._episode = EpisodeClock()
        self._reports: Reports | None = None
        if isinstance(endpoints, str):
            endpoints = [endpoints]
        self._servers: dict[str, ServerConnection] = {}  # by endpoint
        self._served: list[ServedModels] = []  # one per server that is asked
        try:
            held = bundle if bundle is None or isinstance(bundle, Bundle) else read_bundle(bundle)
            self._servers = connect(endpoints, protocol, credentials, held, version=version, wait_s=wait_s)
            contract = agreed_contract(self._servers.values(), spec)
            placement = place_models(endpoints, self._servers, contract.team)
            self._fallback = fallback_of(fallback, contract.team, contract.team.agents)
            breaks = self._fallback is not None
            for server in dict.fromkeys(placement.values()):
                models = [model for model, holder in placement.items() if holder is server]
                serve = OpenModels if protocol == "oip" else ServedModels
                self._served.append(serve(server, models, deadline_s, stream, breaks, self._episode))
            self._noise = NoiseSource(contract.team, seed, temperature)
            if record is not None and not isinstance(record, (str, Path)):
                raise ConfigError(f"record: expected a folder, got {record!r}")
            if record is not None and protocol == "oip":
                raise ConfigError("record: expected protocol omcda, whose servers record their half, got oip")
            if record is not None:
                self._reports = Reports(Path(record), contract.team, self._episode)
        except BaseException:
            self.close()
            raise
        self.spec: TeamSpec = contract.team
        self.endpoints: dict[str, str] = {model: server.endpoint for model, server in placement.items()}
        self.missed: dict[str, int] = dict.fromkeys(self.spec.names, 0)
        self.not_awaited: dict[str, int] = dict.fromkeys(self.spec.names, 0)
        self.fallback: str = "raise" if self._fallback is None else self._fallback.name
        self.version: str = contract.version
        self.bundle_digest: str = contract.bundle_digest
        self.divergence_kind: str = contract.divergence_kind
        self.budgets: dict[str, float | None] = contract.budgets
        self._parameters = parameter_names(self.spec)
        self._pinned = version is not None  # episodes keep their version

    @property
    def latencies(self) -> dict[str, float]:
        """Seconds from sending the last step to its answer's arrival, by agent (``"team"`` for the joint graph).

        Agents whose answer was missed are left out.
        """
        latencies = {model: served.latency for served in self._served for model in served.models}
        return {name: latency for name in self.endpoints if (latency := latencies[name]) is not None}

    @property
    def episode(self) -> tuple[str, int]:
        """The episode's name in recordings, and the number of its last step, from 1 on."""
        return self._episode.id, self._episode.step

    @property
    def reporting(self) -> bool:
        """True if :meth:`report` is to be called after each step."""
        return self._reports is not None

    def reset(self, *, episode_id: str | None = None) -> None:
        """Mark the next step as the first of an episode, named ``episode_id`` in recordings, or anew.

        The whole episode is answered by the version that is now the first server's current one, and by one bundle.
        Without a fallback it raises :class:`EndpointError` if another server does not hold that version, or another
        bundle under its name; with one, that server's answers are missed.
        """
        with self._usage:
            self._episode.begin(episode_id)
            self._reset()

    def report(self, reward: Any, terminated: Any, truncated: Any, **unseen: Any) -> None:
        """Record what became of the step that :meth:`act` answered last, into the folder ``record``.

        The team's ``reward``, and whether the task or a time limit ended the episode: a number and two truth
        values, arrays [B] of them, or equal ones by agent. ``unseen``: ``next_observations`` and
        ``next_action_masks`` by agent, as for :meth:`act`, which servers never see of the last step; ``state`` and
        ``next_state`` [B, S] of tasks whose state is not all observations joined; and ``active`` [B], where some
        rows of a batch took no step. Never waits for the disk.

        Raises :class:`ConfigError` without ``record`` or without a step to report, :class:`ContractError` for other
        shapes, numbers that are not finite, masks of anything but 0 and 1, and rewards that differ by agent.
        """
        with self._usage:
            if self._reports is None:
                raise ConfigError("report: expected RemoteTeam(..., record=FOLDER), got none: name a folder")
            self._reports.add(reward, terminated, truncated, unseen)

    def _reset(self) -> None:
        if not self._pinned:
            contract = next_contract(list(self._servers.values()), self.spec, self._served[0])
            if contract is not None:
                self.version, self.bundle_digest = contract.version, contract.bundle_digest
                self.divergence_kind, self.budgets = contract.divergence_kind, contract.budgets
        for served in self._served:
            served.take(self.version, self.bundle_digest)
            served.reset()
        if self._fallback is not None:
            self._fallback.reset()

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Let the version and bundle that are current now answer all episodes that begin inside the context."""
        self.reset()
        before, self._pinned = self._pinned, True
        try:
            yield
        finally:
            self._pinned = before

    def act(
        self,
        observations: Mapping[str, Float],
        *,
        noise: Mapping[str, Float] | None = None,
        action_masks: Mapping[str, Mask] | None = None,
    ) -> dict[str, Decision]:
        """Ask for one step of every agent, all of one batch size; shapes as in :meth:`RemotePolicy.act`.

        After an error no request is pending.
        """
        with self._usage:
            return self._act(observations, noise, action_masks)

    def _act(
        self,
        observations: Mapping[str, Float],
        noise: Mapping[str, Float] | None,
        action_masks: Mapping[str, Mask] | None,
    ) -> dict[str, Decision]:
        rows = team_rows(self.spec, observations, noise, action_masks)
        noise = with_noise(rows, self._noise, noise)
        self._episode.advance(noise)
        outputs, missed = self._ask(rows)
        if self._reports is not None:
            self._reports.expect(len(next(iter(rows.values()))["observation"]), bool(missed))
        decisions = (
            split_decisions(self.spec, outputs[TEAM])
            if TEAM in outputs
            else {name: decision_of(answer, self._parameters) for name, answer in outputs.items()}
        )
        decisions = in_kind(decisions, observations)
        if self._fallback is not None:
            if missed:
                answers = self._fallback.answer(missed, *checked_inputs(rows, observations, noise))
                decisions |= marked(answers, missed)
                decisions = {name: decisions[name] for name in self.spec.names}
            self._fallback.note(decisions)
        return decisions

    def _ask(self, rows: Mapping[str, Rows]) -> tuple[dict[str, Outputs], dict[str, MissedAnswerError]]:
        """Return the models' answers, and the errors of the agents whose answers are missed."""
        outputs: dict[str, Outputs] = {}
        missed: dict[str, MissedAnswerError] = {}
        if TEAM in self.endpoints:
            rows = {TEAM: joined_rows(self.spec, rows)}
        try:
            receivers: list[Callable[[], dict[str, Outputs]]]
            if len(self._served) == 1:
                receivers = [lambda: self._served[0].ask(rows)]
            else:
                for served in self._served:
                    served.send(rows)
                receivers = [served.receive for served in self._served]
            for served, receive in zip(self._served, receivers, strict=True):
                try:
                    outputs |= receive()
                except MissedAnswerError as error:
                    names = self.spec.names if TEAM in served.models else served.models
                    missed |= dict.fromkeys(names, error)
                    if self._fallback is None:
                        raise
        except BaseException:
            for served in self._served:
                served.abandon()
            raise
        finally:
            for name, miss in missed.items():
                self.missed[name] += 1
                self.not_awaited[name] += isinstance(miss, NotAwaitedError)
        return {name: outputs[name] for name in self.endpoints if name in outputs}, missed

    def close(self) -> None:
        """Give up what is under way and close all connections."""
        self._usage.closed = True
        for served in self._served:
            served.abandon()
        for server in self._servers.values():
            server.close()
        if self._reports is not None:
            self._reports.close()
