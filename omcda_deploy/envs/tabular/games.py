"""Tabular team games: independent chains with a shared reward, and the named games of ``toy/…``.

Shapes beside those of :mod:`omcda_deploy.spec`: X local states, K actions of one agent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from omcda_deploy.envs import Float
from omcda_deploy.errors import ConfigError, UnknownNameError
from omcda_deploy.spec import ActionSpec, AgentSpec, TeamSpec

Table: TypeAlias = NDArray[np.float64]

CONTROL_RATE = 10.0  # Hz
SCALES = (3.0, 1.0, 0.1)  # reward scale of each agent, repeated in order for larger teams
_EPISODE_LIMIT = 25  # steps of a chain game


@dataclass(frozen=True)
class Chain:
    """Decision process of one agent, with its behaviour policy."""

    rewards: Table  # [X, K]
    transitions: Table  # [X, K, X], each row a distribution
    behavior: Table  # [X, K], each row a distribution
    start: Table  # [X]

    @property
    def available(self) -> NDArray[np.bool_]:
        """Available actions, bool [X, K]: those to which the behaviour policy gives a positive probability."""
        return self.behavior > 0


@dataclass(frozen=True)
class OneStepGame:
    """Game of one action per agent: ``reward = scale(s) * sum_i r_i(a_i)``, then the episode ends.

    ``state_scales`` has one entry per hidden state s, all equally likely. No agent observes s, but the centralised
    state contains it, so a linear mixer represents the game exactly with ``w_i(s) = scale(s)``.
    """

    rewards: Table  # [N, K]
    behavior: Table  # [N, K]
    state_scales: Table = field(default_factory=lambda: np.ones(1))  # [hidden states]

    @property
    def chains(self) -> tuple[Chain, ...]:
        """The agents' processes, each with a single local state."""
        actions = self.rewards.shape[1]
        return tuple(
            Chain(rewards[None], np.ones((1, actions, 1)), behavior[None], np.ones(1))
            for rewards, behavior in zip(self.rewards, self.behavior, strict=True)
        )

    @property
    def stop(self) -> float:
        """Probability with which an episode ends after a step."""
        return 1.0


@dataclass(frozen=True)
class ChainGame:
    """Independent chains whose common episode ends with probability ``stop`` after every step.

    An end that does not depend on the states keeps the optimum additive: it acts on every agent's values as the
    discount ``gamma * (1 - stop)``.
    """

    chains: tuple[Chain, ...]
    gamma: float
    stop: float

    @property
    def state_scales(self) -> Table:
        """Scale of the reward in the only hidden state."""
        return np.ones(1)


Game: TypeAlias = OneStepGame | ChainGame


def one_step_game(
    seed: int,
    agents: int = 3,
    actions: int = 5,
    scales: Sequence[float] = SCALES,
    state_scales: Sequence[float] = (1.0,),
) -> OneStepGame:
    """Draw a game: rewards normal of standard deviation ``scales[i]``, behaviour a softmax of normal logits."""
    rng = np.random.default_rng(seed)
    return OneStepGame(
        rewards=np.resize(scales, agents)[:, None] * rng.standard_normal((agents, actions)),
        behavior=_softmax(rng.standard_normal((agents, actions))),
        state_scales=np.asarray(state_scales, np.float64),
    )


def chain_game(
    seed: int,
    agents: int = 2,
    states: int | Sequence[int] = 4,
    actions: int | Sequence[int] = 3,
    scales: Sequence[float] = SCALES,
    branching: int = 2,
    gamma: float = 0.9,
    stop: float = 0.1,
    masked: float = 0.0,
) -> ChainGame:
    """Draw random chains; ``states`` and ``actions`` are one number for all agents or one per agent.

    ``branching`` successors follow each state and action (1: deterministic), with random probabilities.
    Rewards and behaviour are drawn as in :func:`one_step_game`. Each action is unavailable with probability
    ``masked``, except one drawn for each state. Raises :class:`ConfigError` for sizes and probabilities that are
    out of range.
    """
    if not 0.0 <= gamma < 1.0 or not 0.0 <= stop <= 1.0 or not 0.0 <= masked <= 1.0:
        raise ConfigError(
            "chain_game: expected gamma in [0, 1), stop and masked in [0, 1], "
            f"got {gamma}, {stop} and {masked}"
        )
    rng = np.random.default_rng(seed)
    chains = []
    for scale, size, choices in zip(
        np.resize(scales, agents), _per_agent(states, agents), _per_agent(actions, agents), strict=True
    ):
        if not 1 <= branching <= size:
            raise ConfigError(f"chain_game: expected branching from 1 to the {size} states, got {branching}")
        order = rng.permuted(np.tile(np.arange(size), (size, choices, 1)), axis=-1)[..., :branching]
        transitions = np.zeros((size, choices, size))
        np.put_along_axis(transitions, order, rng.dirichlet(np.ones(branching), (size, choices)), axis=-1)
        rewards = scale * rng.standard_normal((size, choices))
        logits = rng.standard_normal((size, choices))
        if masked > 0.0:
            unavailable = rng.random((size, choices)) < masked
            unavailable[np.arange(size), rng.integers(choices, size=size)] = False
            logits[unavailable] = -np.inf
        chains.append(Chain(rewards, transitions, _softmax(logits), start=np.full(size, 1.0 / size)))
    return ChainGame(tuple(chains), gamma, stop)


GAMES: Mapping[str, Callable[[], Game]] = {
    "toy/one-step": lambda: one_step_game(0),
    "toy/one-step-hidden": lambda: one_step_game(1, state_scales=(0.5, 1.5)),
    "toy/chain": lambda: chain_game(2),
    "toy/chain-single": lambda: chain_game(2, agents=1),
    "toy/chain-mixed": lambda: chain_game(3, agents=3, states=(2, 4, 3), actions=(3, 2, 4)),
    "toy/masked": lambda: chain_game(6, agents=3, states=3, actions=4, masked=0.4),
}


def game(task: str) -> Game:
    """Return the game of a task. Raises :class:`UnknownNameError`."""
    if task not in GAMES:
        raise UnknownNameError("task", task, GAMES)
    return GAMES[task]()


def team_spec(task: str, game: Game) -> TeamSpec:
    """Team specification of a game that is played under the name ``task``."""
    hidden = len(game.state_scales)
    sizes = [chain.rewards.shape for chain in game.chains]
    return TeamSpec(
        task=task,
        agents=tuple(
            AgentSpec(f"agent_{i}", states, ActionSpec("discrete", actions))
            for i, (states, actions) in enumerate(sizes)
        ),
        state_size=sum(states for states, _ in sizes) + (hidden if hidden > 1 else 0),
        control_rate=CONTROL_RATE,
        episode_limit=_EPISODE_LIMIT if isinstance(game, ChainGame) else 1,
    )


def central_state(game: Game, positions: NDArray[np.int64], context: NDArray[np.int64]) -> Float:
    """Join the one-hots of local states ``positions`` [B, N] and of hidden states ``context`` [B]: float32 [B, S].

    The hidden state is left out where the game has only one.
    """
    blocks = [
        np.eye(len(chain.start), dtype=np.float32)[positions[:, i]] for i, chain in enumerate(game.chains)
    ]
    if len(game.state_scales) > 1:
        blocks.append(np.eye(len(game.state_scales), dtype=np.float32)[context])
    return np.concatenate(blocks, axis=1)


def _per_agent(sizes: int | Sequence[int], agents: int) -> tuple[int, ...]:
    per_agent = (sizes,) * agents if isinstance(sizes, int) else tuple(sizes)
    if len(per_agent) != agents or min(per_agent) < 1:
        raise ConfigError(f"chain_game: expected {agents} sizes of at least 1, got {list(per_agent)}")
    return per_agent


def _softmax(logits: ArrayLike) -> Table:
    exponentials = np.exp(np.asarray(logits, np.float64))
    distribution: Table = exponentials / exponentials.sum(-1, keepdims=True)
    return distribution
