"""Exact quantities of tabular games: all transitions with their probabilities, and expected returns.

Shapes beside those of :mod:`omcda_deploy.spec`: X local states, K actions of one agent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.envs import Float
from omcda_deploy.envs.tabular.games import Chain, Game, Table, central_state, team_spec
from omcda_deploy.errors import ContractError


@dataclass(frozen=True)
class Transitions:
    """Arrays of B transitions, padded to the largest observation O and number of actions A of any agent.

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
        """Select ``rows`` and weight them equally."""
        arrays = {name: values[rows] for name, values in vars(self).items() if name != "weights"}
        return Transitions(**arrays, weights=np.full(len(rows), 1.0 / len(rows)))

    def sample(self, count: int, seed: int) -> Transitions:
        """Draw ``count`` transitions independently by ``weights``, as an offline dataset."""
        return self.take(np.random.default_rng(seed).choice(len(self), size=count, p=self.weights))


def transitions(game: Game) -> Transitions:
    """Enumerate the transitions of a game, each weighted by its probability under the behaviour policies.

    Weights are ``uniform(x) * pi_b(a|x) * P(x'|x, a)`` times the probability of stopping or going on. Local states
    are weighted uniformly rather than by the occupancy of the behaviour policies.
    """
    spec = team_spec("", game)
    steps = [_chain_transitions(chain) for chain in game.chains]  # (x, a, x', probability), each [M_i]
    hidden = len(game.state_scales)
    ends = [(end, p) for end, p in ((True, game.stop), (False, 1.0 - game.stop)) if p > 0.0]
    grid = np.meshgrid(
        *(np.arange(len(rows[3])) for rows in steps), np.arange(hidden), np.arange(len(ends)), indexing="ij"
    )
    *picks, context, end = (axis.reshape(-1) for axis in grid)
    pairs = list(zip(steps, picks, strict=True))
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
        states=central_state(game, state, context),
        actions=action,
        rewards=(game.state_scales[context] * rewards).astype(np.float32),
        terminals=np.array([is_end for is_end, _ in ends])[end],
        next_observations=width[successor],
        next_states=central_state(game, successor, context),
        action_masks=masks[team, state],
        next_action_masks=masks[team, successor],
        weights=weights,
    )


def exact_return(game: Game, policies: Sequence[Table]) -> float:
    """Expected undiscounted return of an episode in which agent i acts by ``policies[i]`` [X, K].

    ``omcda-deploy evaluate`` estimates the same number: the mean sum of rewards over the start distribution, the
    transitions, the random end and the episode limit. Raises :class:`ContractError` as :func:`require_policies`
    does.
    """
    require_policies(game, policies)
    limit = team_spec("", game).episode_limit
    total = 0.0
    for chain, policy in zip(game.chains, policies, strict=True):
        reward = (policy * chain.rewards).sum(-1)
        step = (1.0 - game.stop) * np.einsum("xk,xky->xy", policy, chain.transitions)
        occupancy = chain.start  # probability that the episode still runs and is in x
        for _ in range(limit):
            total += float(occupancy @ reward)
            occupancy = occupancy @ step
    return float(game.state_scales.mean()) * total


def best_return(game: Game) -> float:
    """Largest expected return of any policies, by backward induction for each agent.

    The optimal policies know the number of steps that are left. No table of probabilities per state earns more, and
    the best table may earn less, because near the episode limit another action may be the best one in a state.
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


def require_policies(game: Game, policies: Sequence[Table]) -> None:
    """Raise :class:`ContractError` unless each agent has a table [X, K] of distributions over available actions."""
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


def _chain_transitions(chain: Chain) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], Table]:
    joint = chain.behavior[:, :, None] * chain.transitions / len(chain.start)
    state, action, successor = np.nonzero(joint)
    return state, action, successor, joint[state, action, successor]
