"""Figures for :mod:`omcda_deploy.report.html`: no plotting library, no script, no external resource.

Every function returns ``<svg>`` elements. Colours come from the CSS classes of the page, so the same figure reads
in light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.formatting import significant
from omcda_deploy.report.svg import (
    Scale,
    left_margin,
    legend,
    line,
    linear_scale,
    series_class,
    svg,
    text,
    vertical_text,
    whisker,
    x_axis,
    y_axis,
    y_grid,
)

_WIDTH = 900.0
_MAX_DOTS = 200  # per row; more would only darken the row
_MAX_POINTS = 300  # per curve; the panel has no more pixels


@dataclass(frozen=True)
class Bar:
    """A mean, its whisker and the values it was taken over.

    The whisker is ``error`` to each side or ``interval`` from low to high, nan where it is not known.
    """

    mean: float
    error: float
    values: NDArray[np.float64]
    interval: tuple[float, float] | None = None

    @property
    def whisker(self) -> tuple[float, float]:
        """Low and high end of the whisker."""
        return self.interval or (self.mean - self.error, self.mean + self.error)

    @property
    def label(self) -> str:
        """The numbers in words."""
        if not math.isfinite(self.whisker[0]):
            return significant(self.mean)
        if self.interval is None:
            return f"{significant(self.mean)} ± {significant(self.error)}"
        return f"{significant(self.mean)}, {significant(self.interval[0])} to {significant(self.interval[1])}"


@dataclass(frozen=True)
class Curve:
    """Points (x, y), in order where they are joined.

    Their whiskers are ``error`` to each side of y or ``interval`` [P, 2], from low to high; nan where they are not
    known.
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    error: NDArray[np.float64] | None = None
    interval: NDArray[np.float64] | None = None

    @property
    def whiskers(self) -> NDArray[np.float64] | None:
        """Low and high end of each point's whisker, [P, 2]; None for a curve without."""
        if self.interval is not None or self.error is None:
            return self.interval
        return np.stack([self.y - self.error, self.y + self.error], axis=1)


def returns_figure(rows: Mapping[str, NDArray[np.float64]], label: str = "return per episode") -> str:
    """One row per name: every episode as a dot, the mean as a diamond, one standard error to each side.

    Returns that are not finite have no place on an axis and are left out.
    """
    left, right, pitch = left_margin(rows), 24.0, 72.0 if len(rows) == 1 else 46.0
    top, bottom = 8.0, 8.0 + pitch * len(rows)
    rows = {name: values[np.isfinite(values)] for name, values in rows.items()}
    scale = linear_scale(np.concatenate(list(rows.values())), left, _WIDTH - right)
    parts = x_axis(scale, top, bottom, label)
    for index, (name, values) in enumerate(rows.items()):
        middle = top + pitch * (index + 0.5)
        parts.append(text(left - 12, middle + 4, name, "end", "name"))
        if values.size:
            parts += _returns_row(scale, middle, pitch, name, values)
    return svg(_WIDTH, bottom + 44, f"{label}, by row: {', '.join(rows)}", parts)


def _returns_row(
    scale: Scale, middle: float, pitch: float, name: str, values: NDArray[np.float64]
) -> list[str]:
    dots = (
        values
        if values.size <= _MAX_DOTS
        else np.quantile(values, np.linspace(0, 1, _MAX_DOTS))  # the same distribution, fewer dots
    )
    # A golden-ratio sequence spreads equal returns apart, the same way each time.
    offsets = (np.arange(dots.size) * 0.618034 % 1.0 - 0.5) * pitch * 0.5
    parts = [
        f'<circle class="dot" cx="{scale(value):.1f}" cy="{middle + offset:.1f}" r="3"/>'
        for value, offset in zip(dots, offsets, strict=True)
    ]
    mean = float(values.mean())
    if values.size > 1:
        error = float(values.std(ddof=1)) / math.sqrt(values.size)
        parts.append(line(scale(mean - error), middle, scale(mean + error), middle, "whisker"))
    parts.append(
        f'<path class="mean" d="M{scale(mean):.1f} {middle - 7:.1f}l6 7l-6 7l-6 -7z">'
        f"<title>{escape(name)}: mean {escape(significant(mean))}</title></path>"
    )
    return parts


def latency_figure(seconds: NDArray[np.float64], deadline: float | None = None) -> str:
    """Histogram of times [calls] in seconds, on a logarithmic axis in ms.

    The median, p95, p99 and the ``deadline`` (s) are marked.
    """
    ms = np.maximum(seconds * 1e3, 1e-4)
    p50, p95, p99 = (float(value) for value in np.percentile(ms, (50, 95, 99)))
    marks = [("p50", p50, "quantile"), ("p95", p95, "quantile"), ("p99", p99, "quantile")]
    if deadline is not None:
        marks.append(("deadline", deadline * 1e3, "limit"))
    low = min(float(ms.min()), *(value for _, value, _ in marks)) / 1.15
    high = max(float(ms.max()), *(value for _, value, _ in marks)) * 1.15
    left, right, top = 64.0, 24.0, 8.0 + 16.0 * len(marks)
    bottom = top + 150.0
    x = Scale(low, high, left, _WIDTH - right, log=True)
    edges = np.geomspace(low, high, 61)
    counts, _ = np.histogram(ms, edges)
    y = linear_scale(np.array([0.0, counts.max()]), bottom, top, from_zero=True)
    parts = y_grid(y, [tick for tick in y.ticks(4) if tick == int(tick)], left, _WIDTH - right)
    parts += x_axis(x, top, bottom, "latency, ms (logarithmic)")
    for calls, first, last in zip(counts, edges[:-1], edges[1:], strict=True):
        if calls:
            x1, x2 = x(float(first)), x(float(last))
            height = bottom - y(float(calls))
            parts.append(
                f'<rect class="bar" x="{x1 + 0.5:.1f}" y="{bottom - height:.1f}" width="{x2 - x1 - 1:.1f}" '
                f'height="{height:.1f}"><title>{significant(float(first))}\u2013{significant(float(last))} ms: '
                f"{calls}</title></rect>"
            )
    for row, (name, value, kind) in enumerate(marks):
        height = 14.0 + 16.0 * row
        parts.append(line(x(value), height - 8, x(value), bottom, kind))
        beyond = x(value) > _WIDTH * 0.75
        label = f"{name} {significant(float(f'{value:.3g}'))} ms"
        parts.append(
            text(x(value) + (-5 if beyond else 5), height, label, "end" if beyond else "start", "mark")
        )
    parts.append(vertical_text(16.0, (top + bottom) / 2, "calls"))
    return svg(_WIDTH, bottom + 44, "histogram of latencies", parts)


def divergence_figures(
    curves: Mapping[str, NDArray[np.float64]], budgets: Mapping[str, float | None], label: str
) -> list[str]:
    """One panel per agent, all on one scale: divergence [T] over the steps of the episode, in nats.

    The budget d_i of an agent that has one is a dashed line.
    """
    limits = [value for value in budgets.values() if value is not None]
    points = {name: _averaged_points(curve) for name, curve in curves.items()}
    values = np.concatenate([pairs[:, 1] for pairs in points.values()])
    width, height, left, right, top, bottom = 300.0, 190.0, 52.0, 12.0, 24.0, 146.0
    y = linear_scale(np.concatenate([values, limits, [0.0]]), bottom, top, from_zero=True)
    length = max(curve.size for curve in curves.values())
    x = Scale(0.0, float(max(length - 1, 1)), left, width - right)
    panels = []
    for name, pairs in points.items():
        parts = [text(left, 14, name, "start", "name"), *y_grid(y, y.ticks(4), left, width - right, gap=7.0)]
        parts += x_axis(x, bottom, bottom, "step", about=5)
        if pairs.shape[0] == 1:
            parts.append(f'<circle class="mean" cx="{x(0.0):.1f}" cy="{y(pairs[0, 1]):.1f}" r="3"/>')
        elif pairs.shape[0]:
            path = "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in pairs)
            parts.append(f'<path class="curve" d="M{path}"/>')
        budget = budgets.get(name)
        if budget is not None:
            mark = f"d = {significant(float(f'{budget:.3g}'))} nats"
            parts.append(line(left, y(budget), width - right, y(budget), "limit dashed"))
            parts.append(text(width - right, 14, mark, "end", "mark limit-text"))
        parts.append(vertical_text(12.0, (top + bottom) / 2, "nats"))
        panels.append(svg(width, height, f"{label} of {name} over the episode", parts))
    return panels


def _averaged_points(curve: NDArray[np.float64]) -> NDArray[np.float64]:
    """(step, value) of the finite points [P, 2], averaged in groups where there are more than ``_MAX_POINTS``."""
    steps = np.flatnonzero(np.isfinite(curve))
    points = np.stack([steps.astype(np.float64), curve[steps]], axis=1)
    group = math.ceil(len(points) / _MAX_POINTS)
    if group <= 1:
        return points
    return np.stack([part.mean(axis=0) for part in np.array_split(points, math.ceil(len(points) / group))])


def bars_figure(
    values: Mapping[str, float], label: str, limits: Mapping[str, float | None] | None = None
) -> str:
    """Horizontal bars per agent from zero, each with its limit (such as d_i) as a mark where it has one."""
    limits = limits or {}
    left, right, pitch, top = left_margin(values), 76.0, 28.0, 8.0
    bottom = top + pitch * len(values)
    marks = [value for value in limits.values() if value is not None]
    finite = [value for value in values.values() if math.isfinite(value)]
    scale = linear_scale(np.array([0.0, *finite, *marks]), left, _WIDTH - right, from_zero=True)
    largest = max(map(abs, finite), default=0.0)
    digits = (
        max(0, 2 - math.floor(math.log10(largest))) if largest else 0
    )  # three significant ones in the largest
    parts = x_axis(scale, top, bottom, label)
    for index, (name, value) in enumerate(values.items()):
        middle = top + pitch * (index + 0.5)
        parts.append(text(left - 12, middle + 4, name, "end", "name"))
        if not math.isfinite(value):
            parts.append(text(left + 6, middle + 4, "not finite", "start", "mark"))
            continue
        x1, x2 = sorted((scale(0.0), scale(value)))
        parts.append(
            f'<rect class="bar" x="{x1:.1f}" y="{middle - 8:.1f}" width="{x2 - x1:.1f}" height="16" rx="2"/>'
        )
        limit = limits.get(name)
        if limit is not None:
            parts.append(line(scale(limit), middle - 12, scale(limit), middle + 12, "limit"))
        # Without thousands separators: the numbers stand below each other, right-aligned.
        parts.append(
            text(_WIDTH - 4, middle + 4, f"{value:.{digits}f}".replace("-", "\u2212"), "end", "mark")
        )
    return svg(_WIDTH, bottom + 44, f"{label} per agent", parts)


def grouped_bars_figure(groups: Mapping[str, Mapping[str, Bar]], label: str, series: Sequence[str]) -> str:
    """Upright bars from zero, side by side in each group, with whiskers and a dot per value.

    ``series``: names of all bars of this figure and of those beside it, so that colours agree between them. A
    series keeps its place in every group; where a group lacks it, its place stays empty.
    """
    names = [name for name in series if any(name in group for group in groups.values())]
    classes = {name: series_class(index) for index, name in enumerate(series)}
    key, top = legend({name: classes[name] for name in names}, _WIDTH)
    left, right, bottom = 72.0, 8.0, top + 250.0
    bars = [bar for group in groups.values() for bar in group.values()]
    ends = [end for bar in bars for end in (*bar.whisker, bar.mean, *bar.values)]
    finite = np.array([0.0, *(end for end in ends if math.isfinite(end))])
    y = linear_scale(finite, bottom, top, from_zero=True)
    parts = [*key, *y_axis(y, left, _WIDTH - right, label, (top + bottom) / 2, about=6)]
    pitch = (_WIDTH - left - right) / len(groups)
    width = min(64.0, 0.86 * pitch / len(names))
    for index, (group, group_bars) in enumerate(groups.items()):
        centre = left + pitch * (index + 0.5)
        for position, name in enumerate(names):
            bar = group_bars.get(name)
            if bar is not None and math.isfinite(bar.mean):
                middle = centre + width * (position - (len(names) - 1) / 2)
                parts += _upright_bar(y, middle, width, bar, classes[name], f"{group}, {name}")
        parts.append(text(centre, bottom + 18, group, "middle", "name"))
    parts.append(line(left, y(0.0), _WIDTH - right, y(0.0), "axis"))
    return svg(_WIDTH, bottom + 28, f"{label}, {', '.join(names)}", parts)


def _upright_bar(y: Scale, middle: float, width: float, bar: Bar, kind: str, name: str) -> list[str]:
    low, high = sorted((y(0.0), y(bar.mean)))
    parts = [
        f'<rect class="filled {kind}" x="{middle - 0.43 * width:.1f}" y="{low:.1f}" '
        f'width="{0.86 * width:.1f}" height="{high - low:.1f}" rx="2">'
        f"<title>{escape(f'{name}: {bar.label}')}</title></rect>"
    ]
    parts += [
        f'<circle class="run" cx="{middle:.1f}" cy="{y(value):.1f}" r="2.5"/>'
        for value in bar.values
        if math.isfinite(value)
    ]
    bottom, top = bar.whisker
    if math.isfinite(bottom) and math.isfinite(top):
        parts += whisker(middle, y(bottom), y(top), "error")
    return parts


def curves_figure(
    curves: Mapping[str, Curve],
    x_label: str,
    y_label: str,
    *,
    joined: bool = True,
    log_x: bool = False,
    marked: bool = False,
    apart: float = 0.0,
    width: float = 440.0,
    height: float = 170.0,
) -> str:
    """Curves, or points where they are not ``joined``, over one pair of axes with a legend.

    ``log_x`` is for a scan of few values: the axis is marked at these, as it is where it is ``marked``. ``apart``:
    pixels between points of neighbouring curves at the same x, so that their whiskers can be told apart. ``height``
    is that of the plot.
    """
    classes = {name: series_class(index) for index, name in enumerate(curves)}
    key, top = legend(classes, width)
    left, right, bottom = 78.0, 14.0, top + height
    xs = np.concatenate([curve.x for curve in curves.values()])
    ends = [curve.y for curve in curves.values()]
    ends += [curve.whiskers.ravel() for curve in curves.values() if curve.whiskers is not None]
    ys = np.concatenate(ends)
    y = linear_scale(ys[np.isfinite(ys)], bottom, top)
    if log_x:
        x = Scale(float(xs.min()) / 1.3, float(xs.max()) * 1.3, left, width - right, log=True)
    else:
        x = linear_scale(xs, left, width - right)
    parts = [*key, *y_axis(y, left, width - right, y_label, (top + bottom) / 2, about=5)]
    measured = sorted(set(xs.tolist()))
    parts += x_axis(x, top, bottom, x_label, about=5, ticks=measured if log_x or marked else None)
    for index, (name, curve) in enumerate(curves.items()):
        shift = apart * (index - (len(curves) - 1) / 2)
        parts += _curve(
            replace(x, start=x.start + shift, end=x.end + shift), y, name, curve, classes[name], joined
        )
    return svg(width, bottom + 44, f"{y_label} against {x_label}, {', '.join(curves)}", parts)


def _curve(x: Scale, y: Scale, name: str, curve: Curve, kind: str, joined: bool) -> list[str]:
    parts = []
    title = f"<title>{escape(name)}</title>"
    points = [
        (x(float(step)), y(float(value)))
        for step, value in zip(curve.x, curve.y, strict=True)
        if math.isfinite(value)
    ]
    if joined and len(points) > 1:
        path = "L".join(f"{across:.1f} {up:.1f}" for across, up in points)
        parts.append(f'<path class="stroked {kind}" d="M{path}">{title}</path>')
    whiskers = curve.whiskers
    if not joined or len(points) == 1 or whiskers is not None:
        parts += [
            f'<circle class="filled {kind}" cx="{across:.1f}" cy="{up:.1f}" r="4">{title}</circle>'
            for across, up in points
        ]
    if whiskers is not None:
        for step, (low, high) in zip(curve.x, whiskers, strict=True):
            if math.isfinite(low) and math.isfinite(high):
                parts += whisker(x(float(step)), y(low), y(high), f"stroked {kind}")
    return parts
