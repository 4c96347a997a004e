"""Fallbacks: actions for agents whose server does not answer in time.

| ``fallback``                  | in a step whose answer is missed                                           |
|-------------------------------|----------------------------------------------------------------------------|
| ``"raise"``                   | the step fails with :class:`MissedAnswerError`                             |
| ``"hold"``                    | the agent repeats its last action of this episode; without one, as "raise" |
| a policy per agent, or a team | that policy acts; it is asked in missed steps only                         |

A held action that the present mask forbids is replaced by the first action that the mask allows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import numpy as np

from omcda_deploy.bundle import Bundle
from omcda_deploy.client.circuit import NotAwaitedError
from omcda_deploy.errors import ConfigError, ContractError, MissedAnswerError
from omcda_deploy.guard import behavior_action
from omcda_deploy.inputs import Mask, team_rows, with_noise
from omcda_deploy.local import LocalTeam
from omcda_deploy.policy import Decision, Float, NoiseSource, Policy, TeamPolicy
from omcda_deploy.spec import AgentSpec, TeamSpec, require_same_contract

FallbackChoice: TypeAlias = Literal["raise", "hold"] | Mapping[str, Policy] | TeamPolicy


class Fallback(Protocol):
    """Source of the actions of missed steps; reports name it by ``name``, ``hold`` or the types of the policies."""

    name: str

    def reset(self) -> None:
        """Forget the episode."""
        ...

    def note(self, decisions: Mapping[str, Decision]) -> None:
        """Remember the decisions of a finished step, those of all agents and of the fallback included."""
        ...

    def answer(
        self,
        missed: Mapping[str, MissedAnswerError],
        observations: Mapping[str, Float],
        noise: Mapping[str, Float] | None,
        action_masks: Mapping[str, Mask] | None,
    ) -> dict[str, Decision]:
        """Decide for the agents in ``missed``, of inputs that were checked (:mod:`omcda_deploy.inputs`).

        Raises :class:`MissedAnswerError` where there is nothing to hold.
        """
        ...


def marked(decisions: Mapping[str, Decision], missed: Mapping[str, MissedAnswerError]) -> dict[str, Decision]:
    """Mark the decisions of a fallback that did not wait for the policy's answer."""
    return {
        name: replace(decision, awaited=not isinstance(missed[name], NotAwaitedError))
        for name, decision in decisions.items()
    }


def fallback_of(choice: FallbackChoice, spec: TeamSpec, agents: Sequence[AgentSpec]) -> Fallback | None:
    """Make the fallback of ``agents`` of a team; None for ``"raise"``.

    Raises :class:`ConfigError` for an unknown choice or policies of other agents, :class:`ContractError` for
    policies of another task.
    """
    if isinstance(choice, str):
        if choice not in ("raise", "hold"):
            raise ConfigError(f"fallback: expected 'raise', 'hold' or policies, got {choice!r}")
        return _Hold() if choice == "hold" else None
    if isinstance(choice, Mapping):
        if set(choice) != {agent.name for agent in agents}:
            raise ConfigError(
                f"fallback: expected policies of {', '.join(agent.name for agent in agents)}, got those of "
                f"{', '.join(map(str, choice)) or 'none'}"
            )
        for agent in agents:
            _require_policy(choice[agent.name], AgentSpec, f"a policy of {agent.name}")
            if choice[agent.name].spec != agent:
                raise ContractError(
                    f"the fallback of {agent.name} was made for {choice[agent.name].spec}, the served agent is "
                    f"{agent}: use a policy of the same task"
                )
        return _Policies(choice)
    _require_policy(choice, TeamSpec, "'raise', 'hold', a team or a policy for each agent")
    require_same_contract(choice.spec, spec, "the fallback", "the served team")
    return _Team(choice)


def _require_policy(choice: object, kind: type, expected: str) -> None:
    """Raise :class:`ConfigError` for what cannot act: that would come up when a server is gone."""
    able = all(callable(getattr(choice, name, None)) for name in ("act", "reset"))
    if not able or not isinstance(getattr(choice, "spec", None), kind):
        raise ConfigError(f"fallback: expected {expected}, got {choice!r}")


class BehaviorTeam:
    """The behaviour policy of a local bundle as a team of its own: it acts as the recorded data did.

    Its actions are those of a server whose guard is in mode ``fallback`` and never trusts the policy
    (:func:`omcda_deploy.guard.behavior_action`). ``divergence`` and ``parameters`` are the bundle's,
    ``policy_weight`` is 0; ``temperature`` and ``seed`` are those of :class:`~omcda_deploy.local.LocalTeam`. A
    team hands its own noise on to its fallback.
    """

    def __init__(self, bundle: Bundle | str | Path, *, temperature: float = 0.0, seed: int = 0) -> None:
        self._team = LocalTeam(bundle)
        self._noise = NoiseSource(self._team.spec, seed, temperature)
        self.temperature = self._noise.temperature
        self.spec: TeamSpec = self._team.spec

    def reset(self) -> None:
        self._team.reset()

    def act(
        self,
        observations: Mapping[str, Float],
        *,
        noise: Mapping[str, Float] | None = None,
        action_masks: Mapping[str, Mask] | None = None,
    ) -> dict[str, Decision]:
        rows = team_rows(self.spec, observations, noise, action_masks)
        noise = with_noise(rows, self._noise, noise)
        return {
            name: replace(
                decision,
                action=behavior_action(self.spec.agent(name), decision.parameters, rows[name].get("noise")),
                policy_weight=np.zeros_like(decision.divergence),
            )
            for name, decision in self._team.act(observations, noise=noise, action_masks=action_masks).items()
        }


class _Hold:
    name = "hold"

    def __init__(self) -> None:
        self._last: dict[str, Decision] = {}

    def reset(self) -> None:
        self._last.clear()

    def note(self, decisions: Mapping[str, Decision]) -> None:
        self._last = {name: _as_fallback(decision) for name, decision in decisions.items()}

    def answer(
        self,
        missed: Mapping[str, MissedAnswerError],
        observations: Mapping[str, Float],
        noise: Mapping[str, Float] | None,
        action_masks: Mapping[str, Mask] | None,
    ) -> dict[str, Decision]:
        return {
            name: self._hold(name, error, observations[name], action_masks[name] if action_masks else None)
            for name, error in missed.items()
        }

    def _hold(self, name: str, error: MissedAnswerError, observation: Float, mask: Mask | None) -> Decision:
        last = self._last.get(name)
        if last is None or last.divergence.shape != np.shape(observation)[:-1]:
            raise MissedAnswerError(
                f"{error}. There is no action of this episode and batch size to hold: use a policy as fallback"
            ) from error
        if mask is None:
            return _as_fallback(last)
        allowed = np.take_along_axis(mask, np.asarray(last.action)[..., None], axis=-1)[..., 0]
        return replace(last, action=np.where(allowed, last.action, mask.argmax(axis=-1)))


class _Policies:
    def __init__(self, policies: Mapping[str, Policy]) -> None:
        self.name = ", ".join(sorted({type(policy).__name__ for policy in policies.values()}))
        self._policies = policies

    def reset(self) -> None:
        for policy in self._policies.values():
            policy.reset()

    def note(self, decisions: Mapping[str, Decision]) -> None:
        pass

    def answer(
        self,
        missed: Mapping[str, MissedAnswerError],
        observations: Mapping[str, Float],
        noise: Mapping[str, Float] | None,
        action_masks: Mapping[str, Mask] | None,
    ) -> dict[str, Decision]:
        return {
            name: _as_fallback(
                self._policies[name].act(
                    observations[name],
                    noise=noise[name] if noise else None,
                    action_mask=action_masks[name] if action_masks else None,
                )
            )
            for name in missed
        }


class _Team:
    def __init__(self, team: TeamPolicy) -> None:
        self.name = type(team).__name__
        self._team = team

    def reset(self) -> None:
        self._team.reset()

    def note(self, decisions: Mapping[str, Decision]) -> None:
        pass

    def answer(
        self,
        missed: Mapping[str, MissedAnswerError],
        observations: Mapping[str, Float],
        noise: Mapping[str, Float] | None,
        action_masks: Mapping[str, Mask] | None,
    ) -> dict[str, Decision]:
        decisions = self._team.act(observations, noise=noise, action_masks=action_masks)
        return {name: _as_fallback(decisions[name]) for name in missed}


def _as_fallback(decision: Decision) -> Decision:
    """Copy the action alone; divergence and parameters belong to the fallback, not to the requested policy."""
    return Decision(
        np.array(decision.action), np.full(np.shape(decision.divergence), np.nan, np.float32), fallback=True
    )
