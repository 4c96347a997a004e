"""Teams without networks: uniformly random actions, and a callable of the user's own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.errors import ConfigError, ContractError, PluginError
from omcda_deploy.policy import Decision, Float
from omcda_deploy.references import load_callable, require_arguments, user_code
from omcda_deploy.spec import AgentSpec, TeamSpec

MASKS = "action_masks"  # the argument of a callable that wants them


class RandomTeam:
    """Draws each action uniformly: in the range of every entry, or among the available choices.

    The draw is a function of the noise, as every policy's is. Without noise there is nothing to draw from: raises
    :class:`ConfigError`.
    """

    def __init__(self, spec: TeamSpec) -> None:
        self.spec = spec

    def reset(self) -> None:
        """Do nothing: the policy has no state."""

    def act(
        self,
        observations: Mapping[str, Float],
        *,
        noise: Mapping[str, Float] | None = None,
        action_masks: Mapping[str, NDArray[np.uint8]] | None = None,
    ) -> dict[str, Decision]:
        if noise is None:
            raise ConfigError("random actions have no mean: expected temperature 1, or noise")
        decisions = {}
        for agent in self.spec.agents:
            numbers = noise[agent.name]
            mask = None if action_masks is None else action_masks[agent.name]
            decisions[agent.name] = _decision(_draw(agent, numbers, mask), numbers.shape[:-1])
        return decisions


class CallableTeam:
    """A user's callable as a team: ``policy(observations) -> actions``, for one step of one environment.

    ``observations`` maps each agent to its float32 [O]; the answer maps each agent to its action, [A] numbers or an
    int. A callable with an argument ``action_masks`` is given those too, uint8 [A] by agent (None for continuous
    actions). It is called once per environment and step, in no promised order, so it must keep nothing between
    calls; what is random in it is the user's own. Its divergence is zero: what is recorded is the behaviour.

    Raises :class:`PluginError` for a reference to something else, and for an exception in the callable;
    :class:`ContractError` for an answer of another form.
    """

    def __init__(self, reference: str, spec: TeamSpec) -> None:
        self.spec = spec
        self._reference = reference
        self._call = load_callable(reference)
        self._masked = _takes_masks(self._call)
        require_arguments(reference, self._call, {}, **({MASKS: None} if self._masked else {}))

    def reset(self) -> None:
        """Do nothing: the callable has no state."""

    def act(
        self,
        observations: Mapping[str, Float],
        *,
        noise: Mapping[str, Float] | None = None,
        action_masks: Mapping[str, NDArray[np.uint8]] | None = None,
    ) -> dict[str, Decision]:
        batched = observations[self.spec.names[0]].ndim == 2
        rows = len(observations[self.spec.names[0]]) if batched else 1
        answers: dict[str, list[NDArray[Any]]] = {name: [] for name in self.spec.names}
        for row in range(rows):
            for name, action in self._one(row, batched, observations, action_masks).items():
                answers[name].append(action)
        return {
            name: _decision(np.stack(actions), (rows,)) if batched else _decision(actions[0], ())
            for name, actions in answers.items()
        }

    def _one(
        self,
        row: int,
        batched: bool,
        observations: Mapping[str, Float],
        action_masks: Mapping[str, NDArray[np.uint8]] | None,
    ) -> dict[str, NDArray[Any]]:
        """Call the callable for one row, and give back its actions by agent."""

        def at(values: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
            return {name: (array[row] if batched else array).copy() for name, array in values.items()}

        masks = {MASKS: None if action_masks is None else at(action_masks)} if self._masked else {}
        with user_code(f"{self._reference}: the policy", PluginError):
            answer = self._call(at(observations), **masks)
        if not isinstance(answer, Mapping) or answer.keys() != set(self.spec.names):
            got = sorted(map(str, answer)) if isinstance(answer, Mapping) else type(answer).__name__
            raise ContractError(
                f"{self._reference}: expected a dictionary with an action of each of {', '.join(self.spec.names)}, "
                f"got {got}"
            )
        return {agent.name: self._action(agent, answer[agent.name]) for agent in self.spec.agents}

    def _action(self, agent: AgentSpec, value: Any) -> NDArray[Any]:
        """Return an action as an array of its shape; its range is checked where it is played."""
        discrete = agent.action.kind == "discrete"
        shape, kinds = ((), "iu") if discrete else ((agent.action.size,), "fiu")
        try:
            action = np.asarray(value)
        except ValueError:  # rows of unequal lengths
            action = np.empty(0, object)
        if action.shape != shape or action.dtype.kind not in kinds:
            expected = "one integer" if discrete else f"numbers {list(shape)}"
            raise ContractError(
                f"{self._reference}: action of {agent.name}: expected {expected}, got {action.dtype} "
                f"{list(action.shape)}"
            )
        return action.astype(np.int64 if discrete else np.float32)


def _takes_masks(call: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(call).parameters.values()
    except (TypeError, ValueError):  # some builtins do not say
        return False
    return any(p.name == MASKS or p.kind is p.VAR_KEYWORD for p in parameters)


def _draw(agent: AgentSpec, noise: Float, mask: NDArray[np.uint8] | None) -> NDArray[Any]:
    """Map noise [..., A] to uniform actions: normal noise by its distribution function, Gumbel noise by argmax."""
    action = agent.action
    if action.kind == "discrete":
        scores = noise if mask is None else np.where(mask, noise, -np.inf)
        choice: NDArray[Any] = np.argmax(scores, axis=-1)
        return choice
    uniform = np.array([0.5 * math.erfc(-x / math.sqrt(2.0)) for x in noise.ravel().tolist()])
    drawn: NDArray[Any] = (action.low + (action.high - action.low) * uniform).reshape(noise.shape)
    return drawn.astype(np.float32)


def _decision(action: NDArray[Any], rows: tuple[int, ...]) -> Decision:
    """Make a decision of the behaviour policy itself, whose divergence [*rows] is zero."""
    return Decision(action, np.zeros(rows, np.float32))
