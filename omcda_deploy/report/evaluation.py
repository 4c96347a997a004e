"""Evaluations for people: sections of a report and tables for the terminal, one by one or side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from omcda_deploy.envs import OUTCOMES
from omcda_deploy.formatting import UNKNOWN, count, digits_of, number, percent
from omcda_deploy.play.evaluate import Evaluation
from omcda_deploy.report.figures import Curve, returns_figure
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
    temperature_words,
    version_line,
)
from omcda_deploy.report.temperatures import over_temperatures
from omcda_deploy.report.terminal import terminal_table

Returns: TypeAlias = NDArray[np.float64]  # [E] of E episodes
Entry: TypeAlias = Evaluation | Returns | Sequence[Evaluation]  # a row, or one team's at several temperatures


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
                "Temperature": temperature_words(evaluation.temperature),
                **({} if evaluation.reward is None else {"Team's reward": evaluation.reward}),
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
    known = {name: share for name, share in evaluation.shares.items() if share is not None}
    return agent_table(
        evaluation,
        f"{evaluation.task}: return {_mean_words(evaluation, ' (standard error)')} over "
        f"{count(evaluation.returns.size, 'episode')} at temperature {evaluation.temperature:g}"
        f"{''.join(f', {percent(share)} {name}' for name, share in known.items())}"
        f"{_discarded_words(evaluation)}\n"
        f"one answer of the team: {latency_words(evaluation.step_latency)}"
        f"{fallback_line(evaluation)}{version_line(evaluation)}",
        "|a|>0.999",
        _saturation(evaluation),
    )


def comparison_section(rows: Mapping[str, Entry], heading: str = "Comparison") -> Section:
    """Several evaluations in one table and figures. A row may be bare returns [E], such as a dataset's.

    A team that was played at several temperatures has a row for each, and a curve over them.
    """
    entries = _entries(rows)
    table = html_table(*_comparison(entries, _COMPARED))
    figure = returns_figure({_label(name, entry): _returns(entry) for name, entry in entries})
    curves = {
        name: Curve(
            np.array([evaluation.temperature for evaluation in entry]),
            np.array([evaluation.mean for evaluation in entry]),
            np.array([evaluation.standard_error for evaluation in entry]),
        )
        for name, entry in rows.items()
        if isinstance(entry, Sequence) and len(entry) > 1
    }
    return Section(
        heading,
        captioned(
            table,
            "Returns per episode at temperature T of play, mean length, shares of episodes that stalled, fell or "
            "were won, and the latency of one answer of the whole team.",
        )
        + (captioned(over_temperatures(curves), _OVER_TEMPERATURES) if curves else "")
        + captioned(figure, "Every episode, the mean, one standard error."),
    )


def comparison_table(rows: Mapping[str, Entry], title: str = "Returns") -> Table:
    """:func:`comparison_section` for the terminal."""
    left_out = ("min", "max")
    header, cells = _comparison(_entries(rows), [name for name in _COMPARED if name not in left_out])
    table = terminal_table(title, "", header[1:])
    for row in cells:
        table.add_row(*row)
    return table


def _tiles(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    returns = evaluation.returns
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
        *(
            (name, percent(values.mean()), f"{int(values.sum())} of {values.size} episodes")
            for name, values in _outcomes(evaluation).items()
        ),
        spread,
        length,
        latency_tile(evaluation.step_latency),
        *fallback_tiles(evaluation),
    ]


def _mean_words(evaluation: Evaluation, unit: str = "") -> str:
    """The mean with its standard error, which ``unit`` names, where there is one."""
    digits = digits_of(evaluation.returns)
    mean, error = number(evaluation.mean, digits), evaluation.standard_error
    return mean if math.isnan(error) else f"{mean} ± {number(error, digits)}{unit}"


def _discarded_words(evaluation: Evaluation) -> str:
    lost = evaluation.discarded
    return f"; {count(lost, 'episode')} lost by the simulator and left out" if lost else ""


def _outcomes(evaluation: Evaluation) -> dict[str, NDArray[np.bool_]]:
    """The outcomes [E] that the simulator reports, by name."""
    outcomes = {name: getattr(evaluation, name) for name in OUTCOMES}
    return {name: values for name, values in outcomes.items() if values is not None}


def _saturation(evaluation: Evaluation) -> dict[str, str]:
    return {name: percent(share) for name, share in evaluation.saturation.items()}


def _episode_table(evaluation: Evaluation) -> str:
    digits, outcomes = digits_of(evaluation.returns) + 1, _outcomes(evaluation)
    header = ["episode", "seed", "return", "length", "ended by", *outcomes]
    rows = [
        [
            str(episode),
            str(evaluation.episode_seeds[episode]),
            number(evaluation.returns[episode], digits),
            str(evaluation.lengths[episode]),
            "terminal" if evaluation.terminated[episode] else "time limit",
            *("yes" if values[episode] else "no" for values in outcomes.values()),
        ]
        for episode in range(evaluation.returns.size)
    ]
    return html_table(header, rows)


_OVER_TEMPERATURES = "Mean return over the temperature of play; whiskers: one standard error over episodes."
_OUTCOMES = ("length", *OUTCOMES)
_COMPARED = ("T", "mean", "std. error", "min", "max", "episodes", *_OUTCOMES, "p50 ms", "p95 ms", "p99 ms")


def _entries(rows: Mapping[str, Entry]) -> list[tuple[str, Evaluation | Returns]]:
    """List the rows, one for each temperature."""
    return [
        (name, one)
        for name, entry in rows.items()
        for one in (entry if isinstance(entry, Sequence) else [entry])
    ]


def _label(name: str, entry: Evaluation | Returns) -> str:
    return f"{name}, T {entry.temperature:g}".removeprefix(", ") if isinstance(entry, Evaluation) else name


def _returns(entry: Evaluation | Returns) -> Returns:
    return entry.returns if isinstance(entry, Evaluation) else np.asarray(entry, np.float64)


def _comparison(
    entries: Sequence[tuple[str, Evaluation | Returns]], columns: Sequence[str]
) -> tuple[list[str], list[list[str]]]:
    """Make header and rows of a table of ``columns``, without outcomes that no row knows."""
    digits = digits_of(np.concatenate([_returns(entry) for _, entry in entries]))
    cells = [_comparison_cells(entry, digits) for _, entry in entries]
    shown = [name for name in columns if name not in _OUTCOMES or any(row[name] != UNKNOWN for row in cells)]
    names = [name for name, _ in entries]
    return ["", *shown], [
        [name, *(row[column] for column in shown)] for name, row in zip(names, cells, strict=True)
    ]


def _comparison_cells(entry: Evaluation | Returns, digits: int) -> dict[str, str]:
    returns = _returns(entry)
    error = returns.std(ddof=1) / math.sqrt(returns.size) if returns.size > 1 else math.nan
    values = (returns.mean(), error, returns.min(), returns.max())
    played = entry if isinstance(entry, Evaluation) else None
    shares = played.shares if played else dict.fromkeys(OUTCOMES)
    cells = [
        f"{played.temperature:g}" if played else UNKNOWN,
        *(number(value, digits) for value in values),
        str(returns.size),
        number(float(played.lengths.mean()) if played else None, 0),
        *(percent(shares[name]) for name in OUTCOMES),
        *latency_cells(played.step_latency if played else None),
    ]
    return dict(zip(_COMPARED, cells, strict=True))
