"""Tabular team games with closed-form solutions.

Every agent walks a chain of its own, ``x' ~ P_i(.|x, a)``, sees only its own local state (one-hot) and adds
``r_i(x_i, a_i)`` to the reward that all receive, so the optimum under any conservatism is known agent by
agent (omcda.md section 7). The centralised state is all one-hots one after another.

* ``toy/one-step``: 3 agents, 5 actions, reward scales 3 : 1 : 0.1; the episode ends after one action.
* ``toy/one-step-hidden``: another such game with two states that no agent sees; each scales the reward.
* ``toy/chain``: 2 agents, 4 states, 3 actions, stochastic transitions.
* ``toy/chain-single``: the first of these chains alone.
* ``toy/chain-mixed``: 3 agents whose observation and action sizes all differ.
* ``toy/masked``: 3 agents, 3 states, 4 actions, some of them unavailable: which ones depends on agent and state.

A task name fixes the seed of its game: a task is one MDP, and :func:`game` returns it. :func:`transitions`
enumerates a game's transitions with their probabilities, so that expectations can be taken without sampling;
:func:`exact_return` is what any policies earn, and :func:`best_return` the most that can be earned.

Shapes beside those of :mod:`omcda_deploy.spec`: X local states, K actions of one agent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from omcda_deploy.envs import Float, Observations, StepResult, joint_choice
from omcda_deploy.errors import ConfigError, ContractError, UnknownNameError
from omcda_deploy.policy import Decision
from omcda_deploy.spec import ActionSpec, AgentSpec, TeamSpec

Table: TypeAlias = NDArray[np.float64]

CONTROL_RATE = 10.0  # Hz
SCALES = (3.0, 1.0, 0.1)  # how much each agent matters; repeated in order for larger teams
_EPISODE_LIMIT = 25
_CELL = 24  # pixels


@dataclass(frozen=True)
class Chain:
    """One agent's own decision process and its behaviour policy."""

    rewards: Table  # [X, K]
    transitions: Table  # [X, K, X], each row a distribution
    behavior: Table  # [X, K], each row a distribution
    start: Table  # [X]

    @property
    def available(self) -> NDArray[np.bool_]:
        """[X, K]; what the behaviour never does cannot be done."""
        return self.behavior > 0


@dataclass(frozen=True)
class OneStepGame:
    """One action per agent, then the end: ``reward = scale(s) * sum_i r_i(a_i)``.

    ``state_scales`` has one entry per hidden state s, all equally likely. No agent observes s; the
    centralised state does, so a linear mixer represents the game exactly with ``w_i(s) = scale(s)``.
    """

    rewards: Table  # [N, K]
    behavior: Table  # [N, K]
    state_scales: Table = field(default_factory=lambda: np.ones(1))  # [hidden states]

    @property
    def chains(self) -> tuple[Chain, ...]:
        actions = self.rewards.shape[1]
        return tuple(
            Chain(rewards[None], np.ones((1, actions, 1)), behavior[None], np.ones(1))
            for rewards, behavior in zip(self.rewards, self.behavior, strict=True)
        )

    @property
    def stop(self) -> float:
        return 1.0


@dataclass(frozen=True)
class ChainGame:
    """Independent chains under one clock: the episode terminates with probability ``stop`` after every step.

    A terminal that does not depend on the states keeps the optimum additive: it acts on every agent's values
    as the discount ``gamma * (1 - stop)``.
    """

    chains: tuple[Chain, ...]
    gamma: float
    stop: float

    @property
    def state_scales(self) -> Table:
        return np.ones(1)


Game: TypeAlias = OneStepGame | ChainGame


def one_step_game(
    seed: int,
    agents: int = 3,
    actions: int = 5,
    scales: Sequence[float] = SCALES,
    state_scales: Sequence[float] = (1.0,),
) -> OneStepGame:
    """Rewards normal with standard deviation ``scales[i]``, behaviour a softmax of standard normal logits."""
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
    """Random chains; ``states`` and ``actions`` may be one number per agent.

    ``branching`` successors follow each state and action (1: deterministic), with random probabilities.
    Rewards and behaviour are drawn as in :func:`one_step_game`. Each action is unavailable with probability
    ``masked``, save one drawn for each state. Raises :class:`ConfigError` for sizes and probabilities out of range.
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


_GAMES: Mapping[str, Callable[[], Game]] = {
    "toy/one-step": lambda: one_step_game(0),
    "toy/one-step-hidden": lambda: one_step_game(1, state_scales=(0.5, 1.5)),
    "toy/chain": lambda: chain_game(2),
    "toy/chain-single": lambda: chain_game(2, agents=1),
    "toy/chain-mixed": lambda: chain_game(3, agents=3, states=(2, 4, 3), actions=(3, 2, 4)),
    "toy/masked": lambda: chain_game(6, agents=3, states=3, actions=4, masked=0.4),
}
TASKS = tuple(_GAMES)


def game(task: str) -> Game:
    """The game behind a task name."""
    if task not in _GAMES:
        raise UnknownNameError("task", task, TASKS)
    return _GAMES[task]()


def team_spec(task: str, game: Game) -> TeamSpec:
    """The contract of a game played under the name ``task``."""
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


@dataclass(frozen=True)
class Transitions:
    """B transitions as plain arrays, padded to the widest agent (O, A over all agents).

    ``weights`` [B] are probabilities that sum to one.
    """

    observations: Float  # [B, N, O]
    states: Float  # [B, S]
    actions: NDArray[np.int64]  # [B, N]
    rewards: Float  # [B]
    terminals: NDArray[np.bool_]  # [B]
    next_observations: Float  # [B, N, O]
    next_states: Float  # [B, S]
    action_masks: NDArray[np.uint8]  # [B, N, A], at the observations
    next_action_masks: NDArray[np.uint8]  # [B, N, A], at the next ones
    weights: Table  # [B]

    def __len__(self) -> int:
        return len(self.weights)

    def take(self, rows: NDArray[np.int64]) -> Transitions:
        """The given rows, equally weighted."""
        arrays = {name: values[rows] for name, values in vars(self).items() if name != "weights"}
        return Transitions(**arrays, weights=np.full(len(rows), 1.0 / len(rows)))

    def sample(self, count: int, seed: int) -> Transitions:
        """``count`` transitions drawn independently by ``weights``: an offline dataset."""
        return self.take(np.random.default_rng(seed).choice(len(self), size=count, p=self.weights))


def transitions(game: Game) -> Transitions:
    """Every transition of a game, weighted by how likely the behaviour policies make it.

    Weights are ``uniform(x) * pi_b(a|x) * P(x'|x, a)`` times the probability of stopping or going on: the
    local states of chains are taken as uniform, whatever the behaviour's own occupancy.
    """
    spec = team_spec("", game)
    own = [_enumerate(chain) for chain in game.chains]  # per agent: (x, a, x', probability), each [M_i]
    hidden = len(game.state_scales)
    ends = [(end, p) for end, p in ((True, game.stop), (False, 1.0 - game.stop)) if p > 0.0]
    grid = np.meshgrid(
        *(np.arange(len(rows[3])) for rows in own), np.arange(hidden), np.arange(len(ends)), indexing="ij"
    )
    *picks, context, end = (axis.reshape(-1) for axis in grid)
    pairs = list(zip(own, picks, strict=True))
    state = np.stack([rows[0][pick] for rows, pick in pairs], axis=1)  # [B, N]
    action = np.stack([rows[1][pick] for rows, pick in pairs], axis=1)
    successor = np.stack([rows[2][pick] for rows, pick in pairs], axis=1)
    weights = np.prod([rows[3][pick] for rows, pick in pairs], axis=0)
    weights = weights * np.array([p for _, p in ends])[end] / hidden
    rewards = np.sum(
        [chain.rewards[state[:, i], action[:, i]] for i, chain in enumerate(game.chains)], axis=0
    )
    masks = np.zeros((len(spec.agents), spec.observation_size, spec.action_size), np.uint8)
    for i, chain in enumerate(game.chains):
        states, actions = chain.available.shape
        masks[i, :states, :actions] = chain.available
    team = np.arange(len(spec.agents))
    width = np.eye(spec.observation_size, dtype=np.float32)
    return Transitions(
        observations=width[state],
        states=_centralised(game, state, context),
        actions=action,
        rewards=(game.state_scales[context] * rewards).astype(np.float32),
        terminals=np.array([is_end for is_end, _ in ends])[end],
        next_observations=width[successor],
        next_states=_centralised(game, successor, context),
        action_masks=masks[team, state],
        next_action_masks=masks[team, successor],
        weights=weights,
    )


def exact_return(game: Game, policies: Sequence[Table]) -> float:
    """The expected undiscounted return of an episode in which agent i acts by ``policies[i]`` [X, K].

    That is what ``omcda-deploy evaluate`` estimates: the mean sum of rewards over the environment's start
    distribution, its transitions, its random end and its episode limit, without discount. Raises
    :class:`ContractError` for tables that are not one distribution over available actions per state.
    """
    _require_policies(game, policies)
    limit = team_spec("", game).episode_limit
    total = 0.0
    for chain, policy in zip(game.chains, policies, strict=True):
        reward = (policy * chain.rewards).sum(-1)
        step = (1.0 - game.stop) * np.einsum("xk,xky->xy", policy, chain.transitions)
        occupancy = chain.start  # probability of being in x and of the episode still running
        for _ in range(limit):
            total += float(occupancy @ reward)
            occupancy = occupancy @ step
    return float(game.state_scales.mean()) * total


def best_return(game: Game) -> float:
    """The most that any policies can earn in expectation, by backward induction per agent.

    These policies know how many steps are left: no table of probabilities earns more, and none need earn as much,
    because near the episode limit another action may be the best one in a state.
    """
    limit = team_spec("", game).episode_limit
    total = 0.0
    for chain in game.chains:
        rewards = np.where(chain.available, chain.rewards, -np.inf)
        value = np.zeros(len(chain.start))
        for _ in range(limit):
            value = (rewards + (1.0 - game.stop) * chain.transitions @ value).max(-1)
        total += float(chain.start @ value)
    return float(game.state_scales.mean()) * total


def make(task: str, render_mode: str | None = None) -> TabularTeam:
    return TabularTeam(task, render_mode)


def behavior_team(task: str) -> TabularPolicies:
    """The behaviour policies that a task is defined with: ``collect --tier behavior`` records them."""
    return TabularPolicies(task)


class TabularTeam:
    """A game as an environment. ``render_mode="rgb_array"`` makes ``render()`` work."""

    def __init__(self, task: str, render_mode: str | None = None) -> None:
        if render_mode not in (None, "rgb_array"):
            raise ConfigError(f"render_mode: expected 'rgb_array' or None, got {render_mode!r}")
        self.game = game(task)
        self.spec = team_spec(task, self.game)
        self._chains = self.game.chains
        self._render_mode = render_mode
        self._generator = np.random.default_rng()
        self._positions: NDArray[np.int64] | None = None  # [N]
        self._context = 0
        self._steps = 0

    @property
    def possible_agents(self) -> list[str]:
        return list(self.spec.names)

    def reset(self, seed: int | None = None) -> tuple[Observations, dict[str, dict[str, Any]]]:
        if seed is not None:
            self._generator = np.random.default_rng(seed)
        self._steps = 0
        self._context = int(self._generator.integers(len(self.game.state_scales)))
        self._positions = np.array([self._draw(chain.start) for chain in self._chains])
        return self._observe(), self._infos()

    def step(self, actions: Mapping[str, Any]) -> StepResult:
        positions = self._present()
        choices = joint_choice(self.spec, actions)
        for name, mask, a in zip(self.spec.names, self._available(), choices, strict=True):
            if not mask[a]:
                raise ContractError(
                    f"action of {name}: expected one of the available {np.flatnonzero(mask).tolist()}, got {a}"
                )
        reward = float(self.game.state_scales[self._context]) * sum(
            float(chain.rewards[x, a]) for chain, x, a in zip(self._chains, positions, choices, strict=True)
        )
        self._positions = np.array(
            [
                self._draw(chain.transitions[x, a])
                for chain, x, a in zip(self._chains, positions, choices, strict=True)
            ]
        )
        self._steps += 1
        terminated = bool(self._generator.random() < self.game.stop)
        truncated = not terminated and self._steps >= self.spec.episode_limit
        names = self.spec.names
        return (
            self._observe(),
            dict.fromkeys(names, reward),
            dict.fromkeys(names, terminated),
            dict.fromkeys(names, truncated),
            self._infos(),
        )

    def state(self) -> Float:
        state: Float = _centralised(self.game, self._present()[None], np.array([self._context]))[0]
        return state

    def render(self) -> NDArray[np.uint8]:
        """One row of cells per agent, one cell per local state, the present one lit."""
        if self._render_mode is None:
            raise ConfigError(f"{self.spec.task} was made without render_mode: use render_mode='rgb_array'")
        cells = np.zeros((len(self._chains), self.spec.observation_size), np.uint8)
        for i, x in enumerate(self._present()):
            cells[i, : len(self._chains[i].start)] = 64
            cells[i, x] = 255
        pixels = np.kron(cells, np.ones((_CELL, _CELL), np.uint8))
        return np.repeat(pixels[:, :, None], 3, axis=2)

    def close(self) -> None:
        pass

    def _draw(self, distribution: Table) -> int:
        # Generator.choice would take most of a step's time.
        return int(np.searchsorted(distribution.cumsum()[:-1], self._generator.random(), side="right"))

    def _present(self) -> NDArray[np.int64]:
        if self._positions is None:
            raise ContractError(f"{self.spec.task}: no episode has started, call reset() first")
        return self._positions

    def _observe(self) -> Observations:
        return {
            agent.name: np.eye(agent.observation_size, dtype=np.float32)[x]
            for agent, x in zip(self.spec.agents, self._present(), strict=True)
        }

    def _infos(self) -> dict[str, dict[str, Any]]:
        masks = zip(self.spec.names, self._available(), strict=True)
        return {name: {"action_mask": mask.astype(np.uint8)} for name, mask in masks}

    def _available(self) -> list[NDArray[np.bool_]]:
        """Per agent [K_i], at the present states."""
        return [chain.available[x] for chain, x in zip(self._chains, self._present(), strict=True)]


class TabularPolicies:
    """A team policy from tables ``pi_i`` [X, K], for one-hot observations: the behaviour's, or an optimum.

    ``divergence`` is KL(pi_i || pi_b^i) in nats at the observed state.
    """

    def __init__(self, task: str, policies: Sequence[Table] | None = None) -> None:
        """``policies``: one table per agent; the task's behaviour policies when None."""
        played = game(task)
        self.spec = team_spec(task, played)
        behavior = [chain.behavior for chain in played.chains]
        tables = behavior if policies is None else policies
        _require_policies(played, tables)
        with np.errstate(divide="ignore"):
            self._logits = [np.log(table) for table in tables]
            self._behavior_logits = [np.log(table) for table in behavior]

    def reset(self) -> None:
        pass

    def act(
        self,
        observations: Mapping[str, Float],
        *,
        noise: Mapping[str, Float] | None = None,
        action_masks: Mapping[str, NDArray[np.uint8]] | None = None,
    ) -> dict[str, Decision]:
        decisions = {}
        for i, name in enumerate(self.spec.names):
            x = np.argmax(observations[name], axis=-1)
            logits, behavior = self._logits[i][x], self._behavior_logits[i][x]
            scores = logits if noise is None else logits + noise[name]
            taken = np.isfinite(logits)
            ratio = np.subtract(logits, behavior, where=taken, out=np.zeros_like(logits))
            decisions[name] = Decision(
                action=np.argmax(scores, axis=-1),
                divergence=np.asarray((np.exp(logits) * ratio).sum(-1), np.float32),
                parameters={
                    "behavior_action": np.argmax(behavior, axis=-1),
                    "logits": logits.astype(np.float32),
                    "behavior_logits": behavior.astype(np.float32),
                },
            )
        return decisions


def _require_policies(game: Game, policies: Sequence[Table]) -> None:
    """Raise :class:`ContractError` unless there is one table per agent, of distributions over available actions."""
    shapes = [chain.rewards.shape for chain in game.chains]
    if [table.shape for table in policies] != shapes:
        raise ContractError(f"expected tables of shapes {shapes}, got {[table.shape for table in policies]}")
    for i, (chain, table) in enumerate(zip(game.chains, policies, strict=True)):
        for x, row in enumerate(table):
            if not (row >= 0).all() or abs(row.sum() - 1.0) > 1e-5 or row[~chain.available[x]].any():
                raise ContractError(
                    f"policy of agent {i} in state {x}: expected probabilities of the available actions "
                    f"{np.flatnonzero(chain.available[x]).tolist()} that sum to 1, got {row.tolist()}"
                )


def _enumerate(chain: Chain) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], Table]:
    joint = chain.behavior[:, :, None] * chain.transitions / len(chain.start)
    state, action, successor = np.nonzero(joint)
    return state, action, successor, joint[state, action, successor]


def _centralised(game: Game, positions: NDArray[np.int64], context: NDArray[np.int64]) -> Float:
    """``positions`` [B, N], ``context`` [B] -> [B, S]."""
    blocks = [
        np.eye(len(chain.start), dtype=np.float32)[positions[:, i]] for i, chain in enumerate(game.chains)
    ]
    if len(game.state_scales) > 1:
        blocks.append(np.eye(len(game.state_scales), dtype=np.float32)[context])
    return np.concatenate(blocks, axis=1)


def _per_agent(sizes: int | Sequence[int], agents: int) -> tuple[int, ...]:
    given = (sizes,) * agents if isinstance(sizes, int) else tuple(sizes)
    if len(given) != agents or min(given) < 1:
        raise ConfigError(f"chain_game: expected {agents} sizes of at least 1, got {list(given)}")
    return given


def _softmax(logits: ArrayLike) -> Table:
    exponentials = np.exp(np.asarray(logits, np.float64))
    distribution: Table = exponentials / exponentials.sum(-1, keepdims=True)
    return distribution
