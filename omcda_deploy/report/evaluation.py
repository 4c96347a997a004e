"""Evaluations for people: sections of a report and tables for the terminal, one by one or side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from omcda_deploy.formatting import count, digits_of, number, percent
from omcda_deploy.play.evaluate import Evaluation
from omcda_deploy.report.figures import returns_figure
from omcda_deploy.report.html import Section, captioned, folded, html_table, provenance_list, tiles
from omcda_deploy.report.measurements import (
    agent_section,
    agent_table,
    divergence_name,
    divergence_parts,
    fallback_line,
    fallback_tiles,
    latency_cells,
    latency_histogram,
    latency_tile,
    latency_words,
    origin,
)
from omcda_deploy.report.terminal import terminal_table

Returns: TypeAlias = NDArray[np.float64]  # [E] of E episodes


def evaluation_section(evaluation: Evaluation, heading: str = "Evaluation") -> Section:
    """Returns, latency and divergence of one evaluation, its episodes, and where it came from."""
    parts = [
        tiles(_tiles(evaluation)),
        captioned(
            returns_figure({"episodes": evaluation.returns}),
            "Returns: every episode, the mean, one standard error.",
        ),
        agent_section(evaluation, "|a| > 0.999", _saturation(evaluation)),
        *divergence_parts(evaluation.divergence, divergence_name(evaluation.team)),
        latency_histogram(
            evaluation.step_latency,
            f"One answer of the whole team for {count(evaluation.num_envs, 'environment')}; "
            "the deadline is one control period.",
            1 / evaluation.spec.control_rate,
        ),
        folded(f"All {evaluation.returns.size} episodes", _episode_table(evaluation)),
        provenance_list(
            {
                "Task": evaluation.task,
                "Actions": "sampled" if evaluation.stochastic else "deterministic",
                "Seed": str(evaluation.seed),
                "Environments in step": str(evaluation.num_envs),
                "Wall clock": f"{number(evaluation.seconds, 1)} s",
                **origin(evaluation),
            }
        ),
    ]
    return Section(heading, "".join(parts))


def evaluation_table(evaluation: Evaluation) -> Table:
    """Per agent: divergence beside its budget, saturation, latency; the returns in the heading."""
    won = "" if evaluation.won is None else f", {percent(evaluation.won.mean())} won"
    return agent_table(
        evaluation,
        f"{evaluation.task}: return {_mean_words(evaluation)} over "
        f"{count(evaluation.returns.size, 'episode')}{won}{_discarded_words(evaluation)}\n"
        f"one answer of the team: {latency_words(evaluation.step_latency)}{fallback_line(evaluation)}",
        "|a|>0.999",
        _saturation(evaluation),
    )


def comparison_section(rows: Mapping[str, Evaluation | Returns], heading: str = "Comparison") -> Section:
    """Several evaluations in one table and one figure. A row may be bare returns [E], such as a dataset's."""
    header = ["", "mean", "standard error", "min", "max", "episodes", "p50, ms", "p95, ms", "p99, ms"]
    table = html_table(header, _comparison_rows(rows))
    figure = returns_figure({name: _returns(entry) for name, entry in rows.items()})
    return Section(
        heading,
        captioned(table, "Returns per episode, and the latency of one answer of the whole team.")
        + captioned(figure, "Every episode, the mean, one standard error."),
    )


def comparison_table(rows: Mapping[str, Evaluation | Returns], title: str = "Returns") -> Table:
    """:func:`comparison_section` for the terminal."""
    table = terminal_table(title, "", ("mean", "std. error", "episodes", "p50 ms", "p95 ms", "p99 ms"))
    for name, mean, error, _, _, *rest in _comparison_rows(rows):
        table.add_row(name, mean, error, *rest)
    return table


def _tiles(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    returns, won = evaluation.returns, evaluation.won
    digits = digits_of(returns)
    mean = (
        "mean return",
        _mean_words(evaluation),
        f"{returns.size} episodes, ± standard error{_discarded_words(evaluation)}",
    )
    spread = (
        "spread",
        number(evaluation.std, digits),
        f"std; {number(returns.min(), digits)} to {number(returns.max(), digits)}",
    )
    length = (
        "mean length",
        number(evaluation.lengths.mean(), 0),
        f"{int((~evaluation.terminated).sum())} of {returns.size} reached the time limit",
    )
    return [
        mean,
        *([] if won is None else [("won", percent(won.mean()), f"{int(won.sum())} of {won.size} episodes")]),
        spread,
        length,
        latency_tile(evaluation.step_latency),
        *fallback_tiles(evaluation),
    ]


def _mean_words(evaluation: Evaluation) -> str:
    digits = digits_of(evaluation.returns)
    mean, error = number(evaluation.mean, digits), evaluation.standard_error
    return mean if math.isnan(error) else f"{mean} ± {number(error, digits)}"


def _discarded_words(evaluation: Evaluation) -> str:
    lost = evaluation.discarded
    return f"; {count(lost, 'episode')} lost by the simulator and left out" if lost else ""


def _saturation(evaluation: Evaluation) -> dict[str, str]:
    return {name: percent(share) for name, share in evaluation.saturation.items()}


def _episode_table(evaluation: Evaluation) -> str:
    digits, won = digits_of(evaluation.returns) + 1, evaluation.won
    header = ["episode", "seed", "return", "length", "ended by", *([] if won is None else ["won"])]
    rows = [
        [
            str(episode),
            str(evaluation.episode_seeds[episode]),
            number(evaluation.returns[episode], digits),
            str(evaluation.lengths[episode]),
            "terminal" if evaluation.terminated[episode] else "time limit",
            *([] if won is None else ["yes" if won[episode] else "no"]),
        ]
        for episode in range(evaluation.returns.size)
    ]
    return html_table(header, rows)


def _returns(entry: Evaluation | Returns) -> Returns:
    return entry.returns if isinstance(entry, Evaluation) else np.asarray(entry, np.float64)


def _comparison_rows(rows: Mapping[str, Evaluation | Returns]) -> list[list[str]]:
    digits = digits_of(np.concatenate([_returns(entry) for entry in rows.values()]))
    return [[name, *_comparison_cells(entry, digits)] for name, entry in rows.items()]


def _comparison_cells(entry: Evaluation | Returns, digits: int) -> list[str]:
    returns = _returns(entry)
    error = returns.std(ddof=1) / math.sqrt(returns.size) if returns.size > 1 else math.nan
    return [
        *(number(value, digits) for value in (returns.mean(), error, returns.min(), returns.max())),
        str(returns.size),
        *latency_cells(entry.step_latency if isinstance(entry, Evaluation) else None),
    ]
