"""Simulated promotions on toy games: how often evidence lets a harmful team act, or misses a better one.

The present team, a game's behaviour policies, is recorded for some episodes with its exact distributions; a
candidate is estimated on them and promoted where the lower bound of its improvement is above 0. The true
improvement of each is known exactly (:func:`omcda_deploy.envs.tabular.exact_return`). The code that decides is the
one that decides about served versions (:mod:`omcda_deploy.estimation`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.datasets import Dataset, RowIndex
from omcda_deploy.envs import tabular
from omcda_deploy.errors import ConfigError
from omcda_deploy.estimation import Categorical, Estimator, TeamDistributions

if TYPE_CHECKING:
    from omcda_deploy.envs.tabular import Game, Table

GAMES = ("toy/one-step", "toy/one-step-hidden", "toy/chain", "toy/chain-mixed", "toy/masked")
SIZES = (0.05, 1.0)  # deviation of the normal numbers that are added to a candidate's logits
CLEAR = 0.2  # the share of the candidates, from the best, that are clearly better
MOST_HARMFUL, LEAST_CLEAR = 0.05, 0.6  # shares that may and shall be promoted


@dataclass(frozen=True)
class Trial:
    """One simulated promotion."""

    improvement: float  # true
    estimate: float
    low: float
    high: float
    silent: bool  # the data could not tell
    promoted: bool


@dataclass(frozen=True)
class Outcome:
    """The promotions of one game that were decided on one number of episodes."""

    task: str
    episodes: int
    trials: Sequence[Trial]

    @property
    def harmful(self) -> Sequence[Trial]:
        """The candidates that earn less than the present team."""
        return [trial for trial in self.trials if trial.improvement < 0.0]

    @property
    def clear(self) -> Sequence[Trial]:
        """The candidates of the largest improvements."""
        ranked = sorted(self.trials, key=lambda trial: trial.improvement)
        return ranked[-round(CLEAR * len(ranked)) :]

    def to_json(self) -> dict[str, Any]:
        """Counts and shares as plain JSON."""
        better = [trial for trial in self.trials if trial.improvement > 0.0]
        return {
            "task": self.task,
            "episodes": self.episodes,
            "promotions": len(self.trials),
            "harmful": len(self.harmful),
            "harmful_promoted": promoted(self.harmful),
            "better_promoted": promoted(better),
            "clear_promoted": promoted(self.clear),
            "silent": sum(trial.silent for trial in self.trials) / len(self.trials),
            "above_low": sum(trial.low <= trial.improvement for trial in self.trials) / len(self.trials),
        }


def promoted(trials: Sequence[Trial]) -> float:
    """Return the share that was promoted; 0 of none."""
    return sum(trial.promoted for trial in trials) / max(len(trials), 1)


def simulate(
    task: str,
    episodes: int,
    promotions: int,
    *,
    confidence: float = 0.95,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> Outcome:
    """Decide about ``promotions`` random candidates, each on ``episodes`` new episodes of the present team.

    ``progress`` is called with the number of decisions. Raises :class:`UnknownNameError` for another task than a
    toy game, :class:`ConfigError` for fewer than five promotions, and as
    :class:`omcda_deploy.estimation.Estimator` does.
    """
    if promotions < 5:
        raise ConfigError(
            f"promotions: expected at least 5, as a fifth of them is looked at, got {promotions}"
        )
    game = tabular.game(task)
    present = [chain.behavior for chain in game.chains]
    earned = tabular.exact_return(game, present)
    trials = []
    for number in range(promotions):
        generator = np.random.default_rng([seed, number])
        size = generator.uniform(*SIZES)
        candidate = [reweighted(table, size, generator) for table in present]
        dataset = record(game, task, present, episodes, generator)
        estimator = Estimator(dataset, TeamDistributions.of_recording(dataset), confidence)
        found = estimator.compare(at_rows(candidate, dataset))
        trials.append(
            Trial(
                tabular.exact_return(game, candidate) - earned,
                *found.improvement,
                silent=bool(found.silence),
                promoted=not found.silence and found.improvement.low > 0.0,
            )
        )
        progress(number + 1)
    return Outcome(task, episodes, trials)


def reweighted(table: Table, size: float, generator: np.random.Generator) -> Table:
    """Add normal numbers of deviation ``size`` to a policy's logits [X, K]."""
    weights = table * np.exp(size * generator.standard_normal(table.shape))
    policy: Table = weights / weights.sum(-1, keepdims=True)
    return policy


def at_rows(policies: Sequence[Table], dataset: Dataset) -> TeamDistributions:
    """Return the distributions of tabular policies at every row of a dataset."""
    lowest = np.finfo(np.float32).min
    agents = []
    for index, table in enumerate(policies):
        with np.errstate(divide="ignore"):
            logits = np.maximum(np.log(table), lowest)
        agents.append(Categorical(logits[dataset.observations[:, index].argmax(-1)]))
    return TeamDistributions(agents)


def record(
    game: Game, task: str, policies: Sequence[Table], episodes: int, generator: np.random.Generator
) -> Dataset:
    """Play all episodes side by side and return them as a dataset with exact behaviour."""
    spec = tabular.team_spec(task, game)
    agents, limit = len(game.chains), spec.episode_limit
    states = np.zeros((episodes, limit + 1, agents), np.int64)
    actions = np.zeros((episodes, limit + 1, agents), np.int64)
    rewards = np.zeros((episodes, limit + 1))
    context = generator.integers(len(game.state_scales), size=episodes)
    lengths, running = np.zeros(episodes, np.int64), np.ones(episodes, bool)
    for i, chain in enumerate(game.chains):
        states[:, 0, i] = _draw(np.tile(chain.start, (episodes, 1)), generator)
    for step in range(limit):
        for i, (chain, policy) in enumerate(zip(game.chains, policies, strict=True)):
            x = states[:, step, i]
            a = actions[:, step, i] = _draw(policy[x], generator)
            rewards[:, step] += game.state_scales[context] * chain.rewards[x, a]
            states[:, step + 1, i] = _draw(chain.transitions[x, a], generator)
        lengths += running
        running &= generator.random(episodes) >= game.stop
    kept = np.arange(limit + 1) <= lengths[:, None]  # with each episode's final row
    final = (np.arange(limit + 1) == lengths[:, None])[kept]
    contexts = np.broadcast_to(context[:, None], kept.shape)[kept]
    return _dataset(
        game, task, policies, states[kept], contexts, actions[kept], rewards[kept], final, ~running
    )


def _dataset(
    game: Game,
    task: str,
    policies: Sequence[Table],
    positions: NDArray[np.int64],
    contexts: NDArray[np.int64],
    actions: NDArray[np.int64],
    rewards: NDArray[np.float64],
    final: NDArray[np.bool_],
    terminated: NDArray[np.bool_],
) -> Dataset:
    """Return rows [R, …] as a dataset; ``terminated`` [E]: whether the game ended rather than the time."""
    spec = tabular.team_spec(task, game)
    rows, agents = positions.shape
    index = RowIndex.of(final)
    last = index.last_transitions()
    terminal, timeout = np.zeros((2, len(index.transitions)), bool)
    terminal[last], timeout[last] = terminated, ~terminated
    lowest = np.finfo(np.float32).min
    logits = np.full((rows, agents, spec.action_size), lowest, np.float32)
    masks = np.zeros((rows, agents, spec.action_size), np.uint8)
    for i, (chain, policy) in enumerate(zip(game.chains, policies, strict=True)):
        x, choices = positions[:, i], policy.shape[1]
        with np.errstate(divide="ignore"):
            logits[:, i, :choices] = np.maximum(np.log(policy), lowest)[x]
        masks[:, i, :choices] = chain.available[x]
    chosen = np.take_along_axis(logits, actions[..., None], -1)[..., 0]
    observations = np.eye(spec.observation_size, dtype=np.float32)[positions]
    return Dataset(
        spec=spec,
        observations=observations,
        states=tabular.central_state(game, positions, contexts),
        actions=actions,
        rewards=np.where(final, 0.0, rewards).astype(np.float32),
        transitions=index.transitions,
        terminal=terminal,
        timeout=timeout,
        episode_start=index.episode_start,
        episode_length=index.episode_length,
        episode_returns=np.add.reduceat(np.where(final, 0.0, rewards), index.episode_start),
        episode_seeds=None,
        episode_behaviors=None,
        behaviors=(),
        metadata={},
        digest="simulated",
        action_masks=masks,
        behavior={"logits": logits, "log_prob": chosen.astype(np.float64)},
    )


def _draw(distributions: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.int64]:
    """Draw one entry from each distribution [E, K]."""
    below = generator.random(len(distributions))[:, None] > distributions.cumsum(-1)[:, :-1]
    drawn: NDArray[np.int64] = below.sum(-1)
    return drawn
