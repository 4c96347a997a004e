"""Toy games: the table of docs/toy-results.md, from nothing.

Records each game's own behaviour policies, trains every algorithm that handles discrete actions with the shipped
networks, evaluates the learned policy at every observation of the game, and computes its expected return exactly
(:func:`omcda_deploy.envs.tabular.exact_return`). So the numbers carry no noise of evaluation, only that of
recording the dataset and of training. One process, one thread; nothing is kept but the table.

Source: docs/simulators.md#toy-games.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from omcda_deploy.datasets import Dataset
    from omcda_deploy.envs import tabular

Settings: TypeAlias = Mapping[str, Any]

GAMES = ("toy/one-step", "toy/chain", "toy/masked")
IMITATORS = ("bc",)  # expected to earn what the behaviour policies earn; all others more
TOLERANCE = 0.01  # share of the way from the behaviour policies to the best play, for imitators

COMMON: Settings = {"hidden": 32, "batch_size": 128, "lr": 1e-3}
# Prices and temperatures are in units of return, so they follow the games and not the published benchmarks.
PER_ALGORITHM: Mapping[str, Settings] = {
    "bc": {"batch_size": 1024, "lr": 5e-4},  # with 1e-3 its last steps wander by a hundredth of the way
    "omcda": {"d_tot": 1.0, "alpha0": 3.0},
    "omiga": {"alpha": 1.0},
    "icq": {"critic_temperature": 3.0, "policy_temperature": 1.0},
    "comadice": {"alpha": 1.0},
}
PER_GAME: Mapping[tuple[str, str], Settings] = {}


@dataclass(frozen=True)
class Row:
    """The exact return of one algorithm's policies on one game, or the reason why there are none."""

    algorithm: str
    earned: float | None
    failure: str = ""


@dataclass(frozen=True)
class GameResult:
    """All rows of a game, with the returns of its behaviour policies and of the best play."""

    task: str
    dataset: Dataset
    behavior: float  # exact expected return of the behaviour policies
    best: float  # most that any policies can earn
    rows: tuple[Row, ...]

    def gain(self, earned: float) -> float:
        """Return the share of the way from the behaviour policies to the best play."""
        return (earned - self.behavior) / (self.best - self.behavior)

    def violations(self) -> list[str]:
        """List the expectations that do not hold, one line each."""
        lines = []
        for row in self.rows:
            if row.earned is None:
                lines.append(f"{self.task}: {row.algorithm} failed ({row.failure})")
            elif row.algorithm in IMITATORS:
                if abs(self.gain(row.earned)) > TOLERANCE:
                    lines.append(
                        f"{self.task}: {row.algorithm} earns {row.earned:.3f}, expected within {TOLERANCE:.0%} of "
                        f"the way from behaviour ({self.behavior:.3f}) to best play ({self.best:.3f}), got "
                        f"{self.gain(row.earned):+.1%}"
                    )
            elif row.earned <= self.behavior:
                lines.append(
                    f"{self.task}: {row.algorithm} earns {row.earned:.3f}, expected more than the behaviour "
                    f"policies' {self.behavior:.3f}"
                )
        return lines


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
            row = Row(algorithm, tabular.exact_return(game, tables))
        except Exception as error:  # one algorithm must not cost the others' rows; the table shows the reason
            row = Row(algorithm, None, f"{type(error).__name__}: {str(error).splitlines()[0]}")
        rows.append(row)
        if on_row:
            on_row(task, row)
    behavior = tabular.exact_return(game, [chain.behavior for chain in game.chains])
    return GameResult(task, dataset, behavior, tabular.best_return(game), tuple(rows))


def settings_of(algorithm: str, task: str) -> dict[str, Any]:
    """Merge the settings of all runs, of the algorithm and of the game."""
    return {**COMMON, **PER_ALGORITHM.get(algorithm, {}), **PER_GAME.get((algorithm, task), {})}


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
        settings=settings_of(algorithm, task),
        behavior={"lr": COMMON["lr"], "steps": steps},
        log_every=steps,
        checkpoint_every=steps,
        snapshot_every=steps,
    )
    return policy_tables(read_snapshot(run).policy, tabular.game(task))


def write_table(
    path: Path, results: Sequence[GameResult], *, transitions: int, steps: int, seed: int
) -> None:
    """Write the Markdown table: a row per algorithm, with exact return and gain in a column per game."""
    from omcda_deploy.files import write_text
    from omcda_deploy.play.measurements import machine, now
    from omcda_deploy.training.run_folder import git_revision

    tasks = [result.task for result in results]
    violations = [line for result in results for line in result.violations()]
    lines = [
        "# Exact returns on the toy games",
        "",
        "Written by `omcda-deploy toy-results`; do not edit. Each entry is the exact expected undiscounted return",
        "of an episode (`omcda_deploy.envs.tabular.exact_return`) under the learned policies: stochastic ones as",
        "they are, greedy ones with all probability on their choice. In brackets the gain: the share of the way",
        "from the behaviour policies (0 %) to the best play (100 %). Nothing is sampled and nothing selected;",
        "one seed.",
        "",
        *(
            f"* `{r.task}`: {r.dataset.transitions.size:,} transitions of the game's own behaviour policies, which "
            f"differ in quality and entropy between agents; digest `{r.dataset.digest}`"
            for r in results
        ),
        f"* {steps:,} steps of every algorithm, last policy; seed {seed}; {_formatted(COMMON)}; settings not "
        "named are the defaults",
        f"* commit `{git_revision()}`, {machine()}, {now()[:10]}",
        "",
        f"| | {' | '.join(f'`{task}`' for task in tasks)} | settings |",
        "|---|" + "---|" * (len(tasks) + 1),
        f"| best play | {' | '.join(f'{r.best:.3f}' for r in results)} | |",
        f"| behaviour policies | {' | '.join(f'{r.behavior:.3f}' for r in results)} | |",
    ]
    for index, row in enumerate(results[0].rows):
        cells = [_cell(result, result.rows[index]) for result in results]
        lines.append(f"| {row.algorithm} | {' | '.join(cells)} | {_special_settings(row.algorithm, tasks)} |")
    lines += [
        "",
        "Best play is an upper bound: it knows how many steps are left, which no learned policy sees.",
        "",
        f"Expected: every algorithm but {', '.join(IMITATORS)} earns more than the behaviour policies, and "
        f"{', '.join(IMITATORS)} as much, within {TOLERANCE:.0%} of the way to the best play (returns near zero "
        "have no percentage that a dataset of this size could show).",
        *(
            ["Expectations that do not hold:", "", *(f"* {line}" for line in violations)]
            if violations
            else ["All expectations hold."]
        ),
        "",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(lines))


def _cell(result: GameResult, row: Row) -> str:
    if row.earned is None:
        return f"failed: {row.failure}"
    return f"{row.earned:.3f} ({result.gain(row.earned):+.1%})"


def _special_settings(algorithm: str, tasks: Sequence[str]) -> str:
    general = _formatted(PER_ALGORITHM.get(algorithm, {}))
    differences = [
        f"on `{task}` {_formatted(PER_GAME[algorithm, task])}"
        for task in tasks
        if (algorithm, task) in PER_GAME
    ]
    return "; ".join(part for part in [general, *differences] if part)


def _formatted(settings: Settings) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in settings.items())
