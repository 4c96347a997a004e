"""Toy games: the table of docs/toy-results.md, from nothing.

Records each game's own behaviour policies, trains every algorithm that handles discrete actions with the shipped
networks, evaluates the learned policy at every observation of the game, and computes exactly what it earns, sampled
and greedy, and the divergence that it spends. So the numbers carry no noise of evaluation, only that of recording
the dataset and of training. One process, one thread; nothing is kept but the table.

Source: docs/simulators.md#toy-games.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from omcda_deploy.datasets import Dataset
    from omcda_deploy.envs import tabular

Settings: TypeAlias = Mapping[str, Any]

GAMES = ("toy/one-step", "toy/chain", "toy/masked")
IMITATORS = ("bc",)  # expected to earn what the behaviour policies earn; all others more
TOLERANCE = 0.01  # share of the way from the behaviour policies to the best play, for imitators and for OMCDA
NATS = 1.0  # OMCDA's budget
GAMMA = 0.99  # every algorithm's default

COMMON: Settings = {"hidden": 32, "batch_size": 128, "lr": 1e-3}
# Prices and temperatures are in units of return, so they follow the games and not the published benchmarks.
PER_ALGORITHM: Mapping[str, Settings] = {
    "bc": {"batch_size": 1024, "lr": 5e-4},  # with 1e-3 its last steps wander by a hundredth of the way
    "omcda": {"d_tot": NATS, "d_eval": NATS, "alpha0": 3.0},
    "omiga": {"alpha": 1.0},
    "icq": {"critic_temperature": 3.0, "policy_temperature": 1.0},
    "comadice": {"alpha": 1.0},
}


@dataclass(frozen=True)
class Outcome:
    """Returns and divergence of policies of a game, exact."""

    sampled: float  # expected return of an episode
    greedy: float  # the same where every agent takes its most probable action
    nats: float  # the team's divergence from the behaviour policies per step


@dataclass(frozen=True)
class Row:
    """The outcome of one algorithm's policies on one game, or the reason why there are none."""

    algorithm: str
    outcome: Outcome | None
    failure: str = ""


@dataclass(frozen=True)
class GameResult:
    """All rows of a game, with the returns of its behaviour policies and of the best play."""

    task: str
    dataset: Dataset
    behavior: float  # exact expected return of the behaviour policies
    best: float  # most that any policies can earn
    rows: tuple[Row, ...]

    @cached_property
    def optimum(self) -> Outcome:
        """The outcome of the best policies that spend OMCDA's budget."""
        from omcda_deploy.envs import tabular

        game = tabular.game(self.task)
        return outcome_of(game, tabular.budget_optimum(game, NATS, GAMMA))

    def gain(self, earned: float) -> float:
        """Return the share of the way from the behaviour policies to the best play."""
        return (earned - self.behavior) / (self.best - self.behavior)

    def violations(self) -> list[str]:
        """List the expectations that do not hold, one line each."""
        lines = []
        for row in self.rows:
            if row.outcome is None:
                lines.append(f"{self.task}: {row.algorithm} failed ({row.failure})")
                continue
            earned = row.outcome.sampled
            if row.algorithm in IMITATORS:
                lines += self._unless_near(row.algorithm, earned, self.behavior, "the behaviour policies")
            elif row.algorithm == "omcda":
                lines += self._unless_near(
                    row.algorithm, earned, self.optimum.sampled, f"the best for {NATS:g} nat"
                )
            elif earned <= self.behavior:
                lines.append(
                    f"{self.task}: {row.algorithm} earns {earned:.3f}, expected more than the behaviour "
                    f"policies' {self.behavior:.3f}"
                )
        return lines

    def _unless_near(self, algorithm: str, earned: float, expected: float, whose: str) -> list[str]:
        missed = self.gain(earned) - self.gain(expected)
        if abs(missed) <= TOLERANCE:
            return []
        return [
            f"{self.task}: {algorithm} earns {earned:.3f}, expected {whose}' {expected:.3f} within "
            f"{TOLERANCE:.0%} of the way to best play, got {missed:+.1%}"
        ]


def play_games(
    tasks: Sequence[str],
    algorithms: Sequence[str],
    *,
    transitions: int,
    steps: int,
    seed: int,
    on_row: Callable[[str, Row], None] | None = None,
) -> list[GameResult]:
    """Call :func:`play_game` for each task, in a temporary folder.

    An empty list of algorithms stands for all that handle discrete actions. Raises :class:`UnknownNameError` for an
    unknown algorithm.
    """
    from omcda_deploy import registry

    discrete = [name for name, module in registry.load_algorithms().items() if "discrete" in module.ACTIONS]
    names = algorithms or discrete
    for name in names:
        registry.load_algorithm(name)
    with tempfile.TemporaryDirectory() as scratch:
        return [
            play_game(
                task,
                names,
                Path(scratch) / task,
                transitions=transitions,
                steps=steps,
                seed=seed,
                on_row=on_row,
            )
            for task in tasks
        ]


def play_game(
    task: str,
    algorithms: Sequence[str],
    folder: Path,
    *,
    transitions: int,
    steps: int,
    seed: int,
    on_row: Callable[[str, Row], None] | None = None,
) -> GameResult:
    """Record the game and train the algorithms in ``folder``; a run that fails becomes a row with the reason.

    ``on_row`` is called with the task and each row when it is finished.
    """
    from omcda_deploy.datasets.formats.omiga_hdf5 import read
    from omcda_deploy.envs import tabular, toy
    from omcda_deploy.play.collect import collect

    game = tabular.game(task)
    path = folder / "dataset.hdf5"
    collect(
        task,
        toy.behavior_team(task),
        path,
        transitions=transitions,
        seed=seed,
        behavior="behavior",
        workers=0,
    )
    dataset = read(path, task)
    rows = []
    for algorithm in algorithms:
        try:
            tables = learn(dataset, algorithm, folder / algorithm, steps=steps, seed=seed)
            row = Row(algorithm, outcome_of(game, tables))
        except Exception as error:  # one algorithm must not cost the others' rows; the table shows the reason
            row = Row(algorithm, None, f"{type(error).__name__}: {str(error).splitlines()[0]}")
        rows.append(row)
        if on_row:
            on_row(task, row)
    behavior = tabular.exact_return(game, [chain.behavior for chain in game.chains])
    return GameResult(task, dataset, behavior, tabular.best_return(game), tuple(rows))


def outcome_of(game: tabular.Game, policies: Sequence[tabular.Table]) -> Outcome:
    """Compute the outcome of policies, a table [X, K] per agent."""
    import numpy as np

    from omcda_deploy.envs import tabular

    greedy = [np.eye(table.shape[1])[table.argmax(-1)] for table in policies]
    return Outcome(
        tabular.exact_return(game, policies),
        tabular.exact_return(game, greedy),
        float(tabular.divergences(game, policies).sum()),
    )


def settings_of(algorithm: str) -> dict[str, Any]:
    """Merge the settings of all runs and of the algorithm."""
    return {**COMMON, **PER_ALGORITHM.get(algorithm, {})}


def learn(dataset: Dataset, algorithm: str, run: Path, *, steps: int, seed: int) -> list[tabular.Table]:
    """Train one run and return its policies, a table [X, K] per agent."""
    from omcda_deploy.envs import tabular
    from omcda_deploy.experiments.train import train
    from omcda_deploy.training.policy_tables import policy_tables
    from omcda_deploy.training.run_folder import read_snapshot

    task = dataset.spec.task
    train(
        dataset,
        algorithm,
        run,
        steps=steps,
        seed=seed,
        settings=settings_of(algorithm),
        behavior={"lr": COMMON["lr"], "steps": steps},
        log_every=steps,
        checkpoint_every=steps,
        snapshot_every=steps,
    )
    return policy_tables(read_snapshot(run).policy, tabular.game(task))


def write_table(
    path: Path, results: Sequence[GameResult], *, transitions: int, steps: int, seed: int
) -> None:
    """Write the Markdown page: a table per game, with a row per algorithm."""
    from omcda_deploy.files import write_text
    from omcda_deploy.play.measurements import machine, now
    from omcda_deploy.training.run_folder import git_revision

    violations = [line for result in results for line in result.violations()]
    lines = [
        "# Exact returns on the toy games",
        "",
        "Written by `omcda-deploy toy-results`; do not edit. Every number is exact for the learned policies",
        "(`omcda_deploy.envs.tabular`): the expected undiscounted return of an episode in which actions are",
        "sampled, and in which every agent takes its most probable one (greedy); and the divergence from the",
        "behaviour policies in nats per step, of all agents together. The gain is the share of the way from the",
        "behaviour policies (0 %) to the best play (100 %). Nothing was selected; one seed.",
        "",
        f"Who spends more may earn more: compare rows of equal nats. OMCDA may spend {NATS:g} nat; the row",
        f"*best for {NATS:g} nat* is the most that any sampled policies can gain for it, by soft value iteration.",
        "Greedy play is held by no budget.",
        "",
        f"* {steps:,} steps of every algorithm, last policy; seed {seed}; {_formatted(COMMON)}; settings not "
        "named are the defaults",
        f"* commit `{git_revision()}`, {machine()}, {now()[:10]}",
    ]
    for result in results:
        lines += [
            "",
            f"## `{result.task}`",
            "",
            f"{result.dataset.transitions.size:,} transitions of the game's own behaviour policies, which differ "
            f"in quality and entropy between agents; digest `{result.dataset.digest}`.",
            "",
            "| | sampled | gain | greedy | gain | nats | settings |",
            "|---|---|---|---|---|---|---|",
            f"| best play | | | {result.best:.3f} | {result.gain(result.best):+.1%} | | |",
            _line(result, f"best for {NATS:g} nat", result.optimum),
            f"| behaviour policies | {result.behavior:.3f} | {result.gain(result.behavior):+.1%} | | | 0 | |",
            *(
                f"| {row.algorithm} | failed: {row.failure} | | | | | |"
                if row.outcome is None
                else _line(
                    result, row.algorithm, row.outcome, _formatted(PER_ALGORITHM.get(row.algorithm, {}))
                )
                for row in result.rows
            ),
        ]
    lines += [
        "",
        "## Expectations",
        "",
        "Best play is an upper bound: it knows how many steps are left, which no learned policy sees.",
        "",
        f"Expected of sampled play: {', '.join(IMITATORS)} earns what the behaviour policies earn, and omcda what "
        f"its budget can buy, both within {TOLERANCE:.0%} of the way to the best play; every other algorithm earns "
        "more than the behaviour policies.",
        "",
        *(
            ["Expectations that do not hold:", "", *(f"* {line}" for line in violations)]
            if violations
            else ["All expectations hold."]
        ),
        "",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(lines))


def _line(result: GameResult, name: str, outcome: Outcome, settings: str = "") -> str:
    cells = (
        f"{outcome.sampled:.3f}",
        f"{result.gain(outcome.sampled):+.1%}",
        f"{outcome.greedy:.3f}",
        f"{result.gain(outcome.greedy):+.1%}",
        f"{outcome.nats:.2f}",
    )
    return f"| {name} | {' | '.join(cells)} | {settings} |"


def _formatted(settings: Settings) -> str:
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, int | float) else f"{name} {value}"
        for name, value in settings.items()
    )
