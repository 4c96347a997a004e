"""Choice of the total divergence budget d_tot from the data alone.

Two limits bound it:

* In a step: the episodes are split in two folds. On each, behaviour is cloned and OMCDA trained at every budget;
  the other fold then says how much of its data speaks for the trained teams: the effective sample size of their
  one-step joint ratios (:func:`omcda_deploy.estimation.effective_sample_size`), with behaviour cloned on the fold
  that the team was trained on. Too small a share means that the team acts in ways that nobody recorded; what its
  critic promises there is extrapolation.
* In an episode: the divergences of its steps add up to that of what is visited. They are the budget's, or the
  trained team's own where it spends more.

The choice is the largest budget within both limits up to which no smaller one breaks them. In discrete tasks, where
fitted Q evaluation can be relied on, the share may be smaller, and the budget is taken whose estimate, less one
deviation over bootstrap members, is largest. Source: docs/derivation.md#choice-of-the-budget.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from omcda_deploy.datasets import DIGEST_VERSION, Dataset
from omcda_deploy.errors import ConfigError, DatasetError
from omcda_deploy.estimation import effective_sample_size
from omcda_deploy.files import cached, write_json
from omcda_deploy.registry import load_algorithm
from omcda_deploy.training.algorithm import Algorithm, create_algorithm
from omcda_deploy.training.batches import (
    DistributionTable,
    TransitionSampler,
    episode_of,
    returns_to_go,
)
from omcda_deploy.training.behavior_model import BehaviorConfig, fit
from omcda_deploy.training.estimation import (
    FittedConfig,
    Values,
    fitted_values,
    log_ratios,
    mean_divergence,
)
from omcda_deploy.training.fleet import run_state
from omcda_deploy.training.metrics import Window, require_finite
from omcda_deploy.training.networks import NetworkFactory
from omcda_deploy.training.settings import build

BUDGETS = (0.01, 0.03, 0.1, 0.3, 0.6, 1.0, 2.0)  # nats
LEAST_BUDGET = 1e-6  # nats; stands for 0: a team that stays what it was cloned to be
FLOOR = 0.3  # least share of the held-out steps that must speak for a team
FLOOR_WITH_VALUES = 0.1  # where fitted values decide as well
MOST_PER_EPISODE = 40.0  # nats of a budget in the mean recorded episode
_TESTED = 0.5  # part of a budget that a team spends, below which it is said: few steps have moved it
CHECK_EVERY = 100  # steps of training, for losses that are no longer finite
_FOLDS = 2
_NO_VALUES: Values = np.empty(0)


@dataclass(frozen=True)
class BudgetRow:
    """Measurements of one budget; means over both folds."""

    d_tot: float
    per_episode: float  # d_tot, or spent if that is more, times the steps of the mean recorded episode: nats
    spent: float  # sum of KL(pi_i || pi_b^i) of the trained team, nats per step
    effective_share: float  # held out
    gain: float | None  # fitted value of the team less that of behaviour, at episode starts (discrete tasks)
    deviation: float | None  # of the gain, over bootstrap members
    beyond_data: bool  # the fitted value exceeds the largest return of the data: extrapolation

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return dict(vars(self))


@dataclass(frozen=True)
class BudgetChoice:
    """The chosen budget, 0 where the data support none, and what it was chosen from."""

    d_tot: float
    rows: tuple[BudgetRow, ...]
    floor: float

    @property
    def advice(self) -> str:
        """One sentence for the user."""
        if self.d_tot == 0.0:
            return f"Clone the behaviour policy: {self._objection}."
        row = next(row for row in self.rows if row.d_tot == self.d_tot)
        untested = (
            "" if row.spent >= _TESTED * row.d_tot else f" It spends {row.spent:.2g} nats a step so far."
        )
        return (
            f"Use d_tot {self.d_tot:g}: {100 * row.effective_share:.0f} % of the held-out steps speak for the "
            f"trained team, whose budget adds up to {row.per_episode:.3g} nats in an episode.{untested}"
        )

    @property
    def _objection(self) -> str:
        """The limit that leaves no budget."""
        least = self.rows[0]
        if least.effective_share < self.floor:
            return (
                f"at {least.d_tot:g} nats {100 * least.effective_share:.0f} % of the held-out steps speak for the "
                f"trained team, {100 * self.floor:.0f} % are the least"
            )
        if least.per_episode > MOST_PER_EPISODE:
            return (
                f"at {least.d_tot:g} nats a team adds up to {least.per_episode:.3g} nats in an episode, "
                f"{MOST_PER_EPISODE:g} are the most"
            )
        gains = "; ".join(
            f"{row.gain:.3g} ± {row.deviation:.2g} at {row.d_tot:g} nats{', beyond the data' * row.beyond_data}"
            for row in self.rows
            if row.gain is not None
        )
        return f"no budget within the limits has a fitted gain above its deviation ({gains})"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        rows = [row.to_json() for row in self.rows]
        return {"d_tot": self.d_tot, "floor": self.floor, "advice": self.advice, "budgets": rows}


def require_budgets(budgets: Sequence[float], settings: Mapping[str, Any]) -> None:
    """Raise :class:`ConfigError` unless ``budgets`` ascend, and each fits OMCDA's other ``settings``."""
    rising = all(a < b for a, b in itertools.pairwise(budgets))
    if not budgets or budgets[0] <= 0 or not rising or bool in map(type, budgets):
        raise ConfigError(
            f"budgets: expected one or more positive numbers in ascending order, got {list(budgets)}"
        )
    for budget in budgets:
        try:
            build(load_algorithm("omcda").Config, {**settings, "d_tot": budget})
        except ConfigError as error:
            raise ConfigError(f"the choice of d_tot tries {budget:g} nats: {error}") from None


@dataclass(frozen=True)
class BudgetSearch:
    """Search among budgets: OMCDA's settings (all of them), the length of training, and of what follows."""

    settings: Mapping[str, Any]
    steps: int
    behavior: BehaviorConfig
    budgets: Sequence[float] = BUDGETS
    seed: int = 0
    time_limit_is_terminal: bool = False
    device: str = "cpu"
    fitted: FittedConfig = field(default_factory=lambda: FittedConfig(steps=2000))  # discrete tasks alone

    def __post_init__(self) -> None:
        require_budgets(self.budgets, self.settings)

    def key(self, dataset: Dataset) -> str:
        """Name of the cached choice for ``dataset``."""
        content = dataset.digests[DIGEST_VERSION]  # a file's own may be of a version that covers less
        settings = json.dumps([content, dataclasses.asdict(self)], sort_keys=True)
        return hashlib.sha256(settings.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class _Half:
    """Worth of one fold's teams, one per budget, are worth on the other fold."""

    spent: list[float]
    shares: list[float]
    of_behavior: Values  # [K] members' mean fitted values at episode starts; empty where none are fitted
    fitted: list[Values]  # [K] each


def choose_budget(
    dataset: Dataset, search: BudgetSearch, progress: Callable[[int, int], None] | None = None
) -> BudgetChoice:
    """Choose the budget; ``progress`` is called with (done, total) training steps.

    Raises :class:`DatasetError` for fewer than four episodes, and DivergedError where training with one of the
    budgets is no longer finite.
    """
    folds = _folds(dataset, search.seed)
    total = _FOLDS * search.steps
    halves = []
    for number, (fold, other) in enumerate(zip(folds, reversed(folds), strict=True)):

        def report(step: int, before: int = number * search.steps) -> None:
            if progress:
                progress(before + step, total)

        halves.append(_half(dataset, search, fold, other, report))
    with_values = dataset.spec.action_kind == "discrete"
    largest = math.inf
    if with_values:
        returns = returns_to_go(dataset, search.fitted.gamma, search.time_limit_is_terminal)
        largest = float(returns.max())
    rows = []
    for index, budget in enumerate(search.budgets):
        # A budget beyond its limits on both halves has no values.
        fitted = [half.fitted[index] for half in halves]
        gain = np.concatenate(
            [members - half.of_behavior[: len(members)] for members, half in zip(fitted, halves, strict=True)]
        )
        known = bool(gain.size)
        spent = float(np.mean([half.spent[index] for half in halves]))
        rows.append(
            BudgetRow(
                d_tot=float(budget),
                per_episode=_per_episode(dataset, budget, spent),
                spent=spent,
                effective_share=float(np.mean([half.shares[index] for half in halves])),
                gain=float(gain.mean()) if known else None,
                deviation=float(gain.std(ddof=1)) if known else None,
                beyond_data=known and float(np.concatenate(fitted).mean()) > largest,
            )
        )
    return decide(rows, with_values)


def cached_choice(
    dataset: Dataset, search: BudgetSearch, progress: Callable[[int, int], None] | None = None
) -> BudgetChoice:
    """Return :func:`choose_budget`'s answer, from measurements in the cache where it was asked before."""
    with cached(f"budget/{search.key(dataset)}.json") as path:
        if path.is_file():
            rows = [BudgetRow(**row) for row in json.loads(path.read_text())["budgets"]]
            return decide(rows, dataset.spec.action_kind == "discrete")
        choice = choose_budget(dataset, search, progress)
        write_json(path, choice.to_json())
    return choice


def decide(rows: Sequence[BudgetRow], with_values: bool) -> BudgetChoice:
    """Choose among measured budgets in ascending order; see the module for the rule."""
    floor = FLOOR_WITH_VALUES if with_values else FLOOR
    supported = []
    for row in rows:
        if not _supported(row.effective_share, row.per_episode, floor):
            break
        supported.append(row)
    if with_values:
        lower = {
            row.d_tot: row.gain - row.deviation
            for row in supported
            if row.gain is not None and row.deviation is not None and not row.beyond_data
        }
        best = max(lower, key=lambda budget: lower[budget], default=0.0)
        chosen = best if lower.get(best, 0.0) > 0.0 else 0.0
    else:
        chosen = supported[-1].d_tot if supported else 0.0
    return BudgetChoice(chosen, tuple(rows), floor)


def _supported(share: float, per_episode: float, floor: float) -> bool:
    """Say whether a budget is within the limits of a step and of an episode."""
    return share >= floor and per_episode <= MOST_PER_EPISODE


def _per_episode(dataset: Dataset, budget: float, spent: float) -> float:
    """Nats of a budget in the mean recorded episode, or of a team that spends more."""
    return max(float(budget), spent) * float(np.mean(dataset.episode_length))


def _folds(dataset: Dataset, seed: int) -> list[NDArray[np.int64]]:
    """Positions of the transitions of two halves of the episodes."""
    count = len(dataset.episode_length)
    if count < 2 * _FOLDS:
        raise DatasetError(f"expected at least {2 * _FOLDS} episodes to choose a budget from, got {count}")
    order = np.random.default_rng([seed, 0xB0D6E7]).permutation(count)
    episode = episode_of(dataset)
    return [np.flatnonzero(np.isin(episode, order[fold::_FOLDS])) for fold in range(_FOLDS)]


def _half(
    dataset: Dataset,
    search: BudgetSearch,
    fold: NDArray[np.int64],
    other: NDArray[np.int64],
    report: Callable[[int], None],
) -> _Half:
    """Clone and train on ``fold``, and measure on ``other``; both are positions of transitions."""
    behavior, _ = fit(dataset, search.behavior, device=search.device, subset=fold)
    algorithm = _trained(dataset, search, fold, behavior, report)
    tables = [_table(dataset, policy) for policy in (behavior, *_policies(algorithm, dataset, search))]
    of_behavior, *of_teams = tables
    rows = torch.from_numpy(np.asarray(dataset.transitions, np.int64)[other])
    half = _Half(
        spent=[mean_divergence(table, of_behavior, rows) for table in of_teams],
        shares=[effective_sample_size(log_ratios(dataset, t, of_behavior)[other]) for t in of_teams],
        of_behavior=_NO_VALUES,
        fitted=[_NO_VALUES] * len(of_teams),
    )
    if dataset.spec.action_kind == "continuous":
        return half
    episodes = np.unique(episode_of(dataset)[other])

    def members(table: DistributionTable) -> Values:
        fitted = fitted_values(
            dataset,
            table,
            search.fitted,
            episodes=episodes,
            time_limit_is_terminal=search.time_limit_is_terminal,
        )
        means: Values = fitted.starts[:, episodes].mean(1)
        return means

    return dataclasses.replace(
        half,
        of_behavior=members(of_behavior),
        fitted=[
            members(table)
            if _supported(share, _per_episode(dataset, budget, spent), FLOOR_WITH_VALUES)
            else _NO_VALUES
            for table, share, budget, spent in zip(
                of_teams, half.shares, search.budgets, half.spent, strict=True
            )
        ],
    )


def _trained(
    dataset: Dataset,
    search: BudgetSearch,
    fold: NDArray[np.int64],
    behavior: nn.Module,
    report: Callable[[int], None],
) -> Algorithm:
    """Train one team per budget on a fold, side by side and on the same batches."""
    settings, seeds = search.settings, [search.seed] * len(search.budgets)
    algorithm = create_algorithm(
        "omcda",
        dataset.spec,
        [behavior] * len(seeds),
        settings=[{**settings, "d_tot": budget} for budget in search.budgets],
        steps=search.steps,
        seeds=seeds,
        device=search.device,
    )
    sampler = TransitionSampler(
        dataset,
        settings["batch_size"],
        seeds,
        time_limit_is_terminal=search.time_limit_is_terminal,
        device=search.device,
        subset=fold,
        behaviors=[behavior] * len(seeds),
        gamma=settings["gamma"],
        standardize_states=settings["standardize_states"],
    )
    while algorithm.step < search.steps:
        metrics = algorithm.update(sampler.sample(algorithm.step), watched=False)
        report(algorithm.step)
        if algorithm.step % CHECK_EVERY == 0 or algorithm.step == search.steps:
            window = Window(dataset.spec.names)
            window.add(metrics)
            for means in window.close():
                require_finite(means, algorithm.step)
    return algorithm


def _policies(algorithm: Algorithm, dataset: Dataset, search: BudgetSearch) -> list[nn.Module]:
    """The trained policies, one module each."""
    actors = []
    for run in range(len(search.budgets)):
        actor = NetworkFactory(dataset.spec, search.settings["hidden"]).actor()
        actor.load_state_dict(run_state(algorithm.policy, run))
        actors.append(actor)
    return actors


def _table(dataset: Dataset, policy: nn.Module) -> DistributionTable:
    masks = dataset.action_masks
    observations = torch.from_numpy(dataset.observations)
    return DistributionTable.of(
        policy.cpu(), observations, None if masks is None else torch.from_numpy(masks)
    )
