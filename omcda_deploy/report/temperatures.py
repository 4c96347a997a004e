"""Returns of a comparison over the temperature of play: a table and a figure per dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from omcda_deploy.envs import OUTCOMES
from omcda_deploy.formatting import UNKNOWN, digits_of, number
from omcda_deploy.report.comparison import Comparison, Summary
from omcda_deploy.report.figures import Curve, curves_figure
from omcda_deploy.report.statistics import Interval, Values, bootstrap_interval, interquartile_mean, std

CAPTION = (
    "Return over the temperature of play: interquartile mean over seeds, whiskers from end to end of its 95 % "
    "interval; a curve without whiskers has one seed."
)
_HEADER = (
    *("", "T", "mean ± std", "95 % interval", "std of snapshots", "std of episodes", "length"),
    *OUTCOMES,
)
_ALWAYS = 7  # so many columns are shown always, the others where some row has a value


def temperature_table(
    comparison: Comparison, summaries: Sequence[Summary]
) -> tuple[list[str], list[list[str]]]:
    """Make the header and the rows of a table with a row for each variant and temperature."""
    rows = [
        _cells(comparison.name(summary.variant), summary, index)
        for summary in summaries
        for index in range(len(summary.temperatures))
    ]
    return shown(_HEADER, rows, _ALWAYS)


def shown(
    header: Sequence[str], rows: Sequence[Sequence[str]], always: int
) -> tuple[list[str], list[list[str]]]:
    """Leave out the columns behind the first ``always`` in which every row is unknown."""
    columns = [i for i in range(len(header)) if i < always or any(row[i] != UNKNOWN for row in rows)]
    return [header[i] for i in columns], [[row[i] for i in columns] for row in rows]


def _cells(name: str, summary: Summary, index: int) -> list[str]:
    values = summary.curve[:, index]
    digits = digits_of(summary.curve)
    selected = " (selected)" if index == summary.best else ""
    return [
        name,
        f"{summary.temperatures[index]:g}{selected}",
        mean_words(values, digits),
        interval_words(bootstrap_interval([values]), digits),
        number(float(summary.std_of_snapshots[index]), digits),
        number(float(summary.std_of_episodes[index]), digits),
        number(float(summary.lengths[index]), 0),
        *(share_words(summary.shares[outcome], index) for outcome in OUTCOMES),
    ]


def mean_words(values: Values, digits: int) -> str:
    """Mean over runs with its population standard deviation, unknown for one run."""
    return f"{number(float(values.mean()), digits)} ± {number(std(values), digits)}"


def interval_words(interval: Interval | None, digits: int) -> str:
    """An interval from its low to its high end."""
    return (
        UNKNOWN if interval is None else f"{number(interval.low, digits)} to {number(interval.high, digits)}"
    )


def share_words(shares: Values | None, index: int) -> str:
    """Mean share of episodes over runs [R, K] at a temperature in percent, with its std where there are several."""
    if shares is None:
        return UNKNOWN
    values = 100 * shares[:, index]
    return f"{mean_words(values, 1) if values.size > 1 else number(float(values[0]), 1)} %"


def temperature_figure(comparison: Comparison, summaries: Sequence[Summary]) -> str:
    """Draw a curve per variant."""
    curves = {}
    for summary in summaries:
        intervals = [bootstrap_interval([values]) for values in summary.curve.T]
        ends = [(np.nan, np.nan) if i is None else (i.low, i.high) for i in intervals]
        curves[comparison.name(summary.variant)] = Curve(
            np.array(summary.temperatures),
            interquartile_mean(summary.curve.T),
            interval=np.array(ends),
        )
    return over_temperatures(curves)


def over_temperatures(curves: Mapping[str, Curve]) -> str:
    """Draw returns over the temperature of play."""
    return curves_figure(
        curves, "temperature of play", "return", marked=True, apart=3.0, width=900.0, height=260.0
    )
