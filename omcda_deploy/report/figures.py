"""Small SVG figures for :mod:`omcda_deploy.report.html`: no plotting library, no script, no external resource.

Every function returns one ``<svg>`` element. Colours come from the CSS classes of the page it stands on, so the
same figure reads in light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

_WIDTH = 900.0
SERIES = 10  # colours there are; further series take the same ones again, paler
_MAX_DOTS = 200  # per row; more would only darken the row


@dataclass(frozen=True)
class Bar:
    """``error`` to each side of ``mean`` (nan: none is known), and the values that the mean was taken over."""

    mean: float
    error: float
    values: NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """Points (x, y), in order where they are joined; ``error`` to each side of y, nan where none is known."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    error: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class _Scale:
    """Data values to pixels along one axis."""

    low: float
    high: float
    start: float  # pixel of `low`
    end: float  # pixel of `high`
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self, about: int) -> list[float]:
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            wide = math.log10(self.high / self.low) > 2.5
            values = [m * 10.0**d for d in decades for m in ((1,) if wide else (1, 2, 5))]
            return [value for value in values if self.low <= value <= self.high]
        step = _nice_step((self.high - self.low) / about)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [k * step for k in range(first, last + 1)]


def _nice_step(rough: float) -> float:
    magnitude = 10.0 ** math.floor(math.log10(rough))
    return next(m * magnitude for m in (1.0, 2.0, 5.0, 10.0) if m * magnitude >= rough * (1 - 1e-9))


def _linear(values: NDArray[np.float64], start: float, end: float, *, from_zero: bool = False) -> _Scale:
    """A scale over ``values`` with a little room, never of zero length."""
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    if from_zero:
        low = min(low, 0.0)
    room = 0.05 * (high - low) or max(abs(high) * 0.05, 0.5)
    return _Scale(low if from_zero and low == 0.0 else low - room, high + room, start, end)


def plain(value: float) -> str:
    """A number for an axis: as many digits as it needs, thousands apart, a true minus sign."""
    if value == 0:
        return "0"
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return text.replace(",", "\u202f").replace("-", "\u2212")


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _x_axis(
    scale: _Scale,
    top: float,
    bottom: float,
    label: str,
    about: int = 7,
    ticks: Sequence[float] | None = None,
) -> list[str]:
    parts = []
    for tick in scale.ticks(about) if ticks is None else ticks:
        x = scale(tick)
        parts += [_line(x, top, x, bottom, "grid"), _text(x, bottom + 16, plain(tick), "middle")]
    parts.append(_line(scale.start, bottom, scale.end, bottom, "axis"))
    parts.append(_text((scale.start + scale.end) / 2, bottom + 36, label, "middle", "label"))
    return parts


def returns_figure(rows: Mapping[str, NDArray[np.float64]], label: str = "return per episode") -> str:
    """One row per name: every episode as a dot, the mean as a diamond, one standard error to each side.

    Returns that are not finite have no place on an axis and are left out.
    """
    left, right, pitch = _gutter(rows), 24.0, 72.0 if len(rows) == 1 else 46.0
    top, bottom = 8.0, 8.0 + pitch * len(rows)
    rows = {name: values[np.isfinite(values)] for name, values in rows.items()}
    scale = _linear(np.concatenate(list(rows.values())), left, _WIDTH - right)
    parts = _x_axis(scale, top, bottom, label)
    for index, (name, values) in enumerate(rows.items()):
        middle = top + pitch * (index + 0.5)
        parts.append(_text(left - 12, middle + 4, name, "end", "name"))
        if not values.size:
            continue
        shown = (
            values
            if values.size <= _MAX_DOTS
            else np.quantile(values, np.linspace(0, 1, _MAX_DOTS))  # the same distribution, fewer dots
        )
        # A golden-ratio sequence spreads equal returns apart, the same way each time.
        offsets = (np.arange(shown.size) * 0.618034 % 1.0 - 0.5) * pitch * 0.5
        for value, offset in zip(shown, offsets, strict=True):
            parts.append(f'<circle class="dot" cx="{scale(value):.1f}" cy="{middle + offset:.1f}" r="3"/>')
        mean = float(values.mean())
        if values.size > 1:
            error = float(values.std(ddof=1)) / math.sqrt(values.size)
            parts.append(_line(scale(mean - error), middle, scale(mean + error), middle, "whisker"))
        x = scale(mean)
        parts.append(
            f'<path class="mean" d="M{x:.1f} {middle - 7:.1f}l6 7l-6 7l-6 -7z">'
            f"<title>{escape(name)}: mean {escape(plain(mean))}</title></path>"
        )
    return _svg(_WIDTH, bottom + 44, f"{label}, by row: {', '.join(rows)}", parts)


def latency_figure(seconds: NDArray[np.float64], deadline: float | None = None) -> str:
    """Histogram of times on a logarithmic axis in ms, with the median, p95, p99 and the deadline (s) marked."""
    ms = np.maximum(seconds * 1e3, 1e-4)
    p50, p95, p99 = (float(value) for value in np.percentile(ms, (50, 95, 99)))
    marks = [("p50", p50, "quantile"), ("p95", p95, "quantile"), ("p99", p99, "quantile")]
    if deadline is not None:
        marks.append(("deadline", deadline * 1e3, "limit"))
    low = min(float(ms.min()), *(value for _, value, _ in marks)) / 1.15
    high = max(float(ms.max()), *(value for _, value, _ in marks)) * 1.15
    left, right, top = 64.0, 24.0, 8.0 + 16.0 * len(marks)
    bottom = top + 150.0
    x = _Scale(low, high, left, _WIDTH - right, log=True)
    edges = np.geomspace(low, high, 61)
    counts, _ = np.histogram(ms, edges)
    y = _linear(np.array([0.0, counts.max()]), bottom, top, from_zero=True)
    parts = []
    for tick in y.ticks(4):
        if tick == int(tick):
            parts += [
                _line(left, y(tick), _WIDTH - right, y(tick), "grid"),
                _text(left - 8, y(tick) + 4, plain(tick), "end"),
            ]
    parts += _x_axis(x, top, bottom, "latency, ms (logarithmic)")
    for count, first, second in zip(counts, edges[:-1], edges[1:], strict=True):
        if count:
            x1, x2 = x(float(first)), x(float(second))
            height = bottom - y(float(count))
            parts.append(
                f'<rect class="bar" x="{x1 + 0.5:.1f}" y="{bottom - height:.1f}" width="{x2 - x1 - 1:.1f}" '
                f'height="{height:.1f}"><title>{plain(float(first))}\u2013{plain(float(second))} ms: {count}'
                "</title></rect>"
            )
    for row, (name, value, kind) in enumerate(marks):
        height = 14.0 + 16.0 * row
        at = x(value)
        parts.append(_line(at, height - 8, at, bottom, kind))
        beyond = at > _WIDTH * 0.75
        text = f"{name} {plain(float(f'{value:.3g}'))} ms"
        parts.append(_text(at + (-5 if beyond else 5), height, text, "end" if beyond else "start", "mark"))
    parts.append(_turned(16.0, (top + bottom) / 2, "calls"))
    return _svg(_WIDTH, bottom + 44, "histogram of latencies", parts)


def _turned(x: float, y: float, text: str) -> str:
    return (
        f'<text class="label" x="{x:g}" y="{y:g}" text-anchor="middle" transform="rotate(-90 {x:g} {y:g})">'
        f"{escape(text)}</text>"
    )


def divergence_figures(
    curves: Mapping[str, NDArray[np.float64]], budgets: Mapping[str, float | None], label: str
) -> list[str]:
    """One panel per agent on one common scale: divergence over the steps of the episode, d_i as a dashed line."""
    known = [value for value in budgets.values() if value is not None]
    drawn = {name: _thinned(curve) for name, curve in curves.items()}
    values = np.concatenate([points[:, 1] for points in drawn.values()])
    width, height, left, right, top, bottom = 300.0, 190.0, 52.0, 12.0, 24.0, 146.0
    y = _linear(np.concatenate([values, known, [0.0]]), bottom, top, from_zero=True)
    length = max(curve.size for curve in curves.values())
    x = _Scale(0.0, float(max(length - 1, 1)), left, width - right)
    panels = []
    for name, points in drawn.items():
        parts = [_text(left, 14, name, "start", "name")]
        for tick in y.ticks(4):
            parts += [
                _line(left, y(tick), width - right, y(tick), "grid"),
                _text(left - 7, y(tick) + 4, plain(float(f"{tick:.6g}")), "end"),
            ]
        parts += _x_axis(x, bottom, bottom, "step", about=5)
        if points.shape[0] == 1:
            parts.append(f'<circle class="mean" cx="{x(0.0):.1f}" cy="{y(points[0, 1]):.1f}" r="3"/>')
        elif points.shape[0]:
            path = "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in points)
            parts.append(f'<path class="curve" d="M{path}"/>')
        budget = budgets.get(name)
        if budget is not None:
            parts.append(_line(left, y(budget), width - right, y(budget), "limit dashed"))
            parts.append(
                _text(
                    width - right, 14, f"d = {plain(float(f'{budget:.3g}'))} nats", "end", "mark limit-text"
                )
            )
        parts.append(_turned(12.0, (top + bottom) / 2, "nats"))
        panels.append(_svg(width, height, f"{label} of {name} over the episode", parts))
    return panels


def _thinned(curve: NDArray[np.float64], most: int = 300) -> NDArray[np.float64]:
    """(step, value) of the finite points, averaged in groups where there are more than the panel has pixels."""
    steps = np.flatnonzero(np.isfinite(curve))
    points = np.stack([steps.astype(np.float64), curve[steps]], axis=1)
    groups = math.ceil(len(points) / most)
    if groups <= 1:
        return points
    return np.stack([part.mean(axis=0) for part in np.array_split(points, math.ceil(len(points) / groups))])


def bars_figure(
    values: Mapping[str, float], label: str, limits: Mapping[str, float | None] | None = None
) -> str:
    """Horizontal bars per agent from zero, each with its limit (such as d_i) as a mark where it has one."""
    limits = limits or {}
    left, right, pitch, top = _gutter(values), 76.0, 28.0, 8.0
    bottom = top + pitch * len(values)
    known = [value for value in limits.values() if value is not None]
    finite = [value for value in values.values() if math.isfinite(value)]
    scale = _linear(np.array([0.0, *finite, *known]), left, _WIDTH - right, from_zero=True)
    largest = max(map(abs, finite), default=0.0)
    digits = max(0, 2 - math.floor(math.log10(largest))) if largest else 0  # three that count in the largest
    parts = _x_axis(scale, top, bottom, label)
    for index, (name, value) in enumerate(values.items()):
        middle = top + pitch * (index + 0.5)
        parts.append(_text(left - 12, middle + 4, name, "end", "name"))
        if not math.isfinite(value):
            parts.append(_text(left + 6, middle + 4, "not finite", "start", "mark"))
            continue
        x1, x2 = sorted((scale(0.0), scale(value)))
        parts.append(
            f'<rect class="bar" x="{x1:.1f}" y="{middle - 8:.1f}" width="{x2 - x1:.1f}" height="16" rx="2"/>'
        )
        limit = limits.get(name)
        if limit is not None:
            parts.append(_line(scale(limit), middle - 12, scale(limit), middle + 12, "limit"))
        parts.append(
            _text(_WIDTH - 4, middle + 4, f"{value:.{digits}f}".replace("-", "\u2212"), "end", "mark")
        )
    return _svg(_WIDTH, bottom + 44, f"{label} per agent", parts)


def _gutter(names: Mapping[str, object]) -> float:
    """Room to the left of a figure for its longest row name."""
    return min(28.0 + 7.0 * max(len(name) for name in names), 240.0)


def grouped_bars_figure(groups: Mapping[str, Mapping[str, Bar]], label: str, series: Sequence[str]) -> str:
    """Upright bars from zero, side by side in each group, with whiskers and a dot per value.

    ``series``: names of all bars of this figure and of those beside it, so that colours agree between them. A
    series keeps its place in every group; where a group lacks it, its place stays empty.
    """
    names = [name for name in series if any(name in group for group in groups.values())]
    colours = {name: _series(index) for index, name in enumerate(series)}
    legend, top = _legend({name: colours[name] for name in names}, _WIDTH)
    left, right, bottom = 72.0, 8.0, top + 250.0
    bars = [bar for group in groups.values() for bar in group.values()]
    ends = [end for b in bars for end in (b.mean - b.error, b.mean + b.error, b.mean, *b.values)]
    finite = np.array([0.0, *(end for end in ends if math.isfinite(end))])
    y = _linear(finite, bottom, top, from_zero=True)
    parts = [*legend, *_y_axis(y, left, _WIDTH - right, label, (top + bottom) / 2, about=6)]
    pitch = (_WIDTH - left - right) / len(groups)
    width = min(64.0, 0.86 * pitch / len(names))
    for index, (group, own) in enumerate(groups.items()):
        centre = left + pitch * (index + 0.5)
        for position, name in enumerate(names):
            bar = own.get(name)
            if bar is None or not math.isfinite(bar.mean):
                continue
            middle = centre + width * (position - (len(names) - 1) / 2)
            low, high = sorted((y(0.0), y(bar.mean)))
            said = plain(bar.mean) + (f" ± {plain(bar.error)}" if math.isfinite(bar.error) else "")
            parts.append(
                f'<rect class="filled {colours[name]}" x="{middle - 0.43 * width:.1f}" y="{low:.1f}" '
                f'width="{0.86 * width:.1f}" height="{high - low:.1f}" rx="2">'
                f"<title>{escape(f'{group}, {name}: {said}')}</title></rect>"
            )
            parts += [
                f'<circle class="run" cx="{middle:.1f}" cy="{y(value):.1f}" r="2.5"/>'
                for value in bar.values
                if math.isfinite(value)
            ]
            if math.isfinite(bar.error):
                parts += _whisker(middle, y(bar.mean - bar.error), y(bar.mean + bar.error), "error")
        parts.append(_text(centre, bottom + 18, group, "middle", "name"))
    parts.append(_line(left, y(0.0), _WIDTH - right, y(0.0), "axis"))
    return _svg(_WIDTH, bottom + 28, f"{label}, {', '.join(names)}", parts)


def curves_figure(
    curves: Mapping[str, Curve],
    x_label: str,
    y_label: str,
    *,
    joined: bool = True,
    log_x: bool = False,
    width: float = 440.0,
) -> str:
    """Curves, or points where they are not ``joined``, over one pair of axes with a legend.

    ``log_x`` is for a scan of few values: the axis is marked at these.
    """
    colours = {name: _series(index) for index, name in enumerate(curves)}
    legend, top = _legend(colours, width)
    left, right, bottom = 78.0, 14.0, top + 170.0
    xs = np.concatenate([curve.x for curve in curves.values()])
    ends = [curve.y for curve in curves.values()]
    for curve in curves.values():
        if curve.error is not None:
            ends += [curve.y - curve.error, curve.y + curve.error]
    ys = np.concatenate(ends)
    y = _linear(ys[np.isfinite(ys)], bottom, top)
    if log_x:
        x = _Scale(float(xs.min()) / 1.3, float(xs.max()) * 1.3, left, width - right, log=True)
    else:
        x = _linear(xs, left, width - right)
    parts = [*legend, *_y_axis(y, left, width - right, y_label, (top + bottom) / 2, about=5)]
    measured = sorted(set(xs.tolist()))
    parts += _x_axis(x, top, bottom, x_label, about=5, ticks=measured if log_x else None)
    for name, curve in curves.items():
        series = colours[name]
        points = [
            (x(float(at)), y(float(value)))
            for at, value in zip(curve.x, curve.y, strict=True)
            if math.isfinite(value)
        ]
        if joined and len(points) > 1:
            path = "L".join(f"{across:.1f} {up:.1f}" for across, up in points)
            parts.append(f'<path class="stroked {series}" d="M{path}"><title>{escape(name)}</title></path>')
        if not joined or len(points) == 1 or curve.error is not None:
            parts += [
                f'<circle class="filled {series}" cx="{across:.1f}" cy="{up:.1f}" r="4">'
                f"<title>{escape(name)}</title></circle>"
                for across, up in points
            ]
        if curve.error is not None:
            for at, value, error in zip(curve.x, curve.y, curve.error, strict=True):
                if math.isfinite(value) and math.isfinite(error):
                    parts += _whisker(x(float(at)), y(value - error), y(value + error), f"stroked {series}")
    return _svg(width, bottom + 44, f"{y_label} against {x_label}, {', '.join(curves)}", parts)


def _series(index: int) -> str:
    return f"s{index % SERIES}" + (" pale" if index >= SERIES else "")


def _whisker(x: float, y1: float, y2: float, kind: str) -> list[str]:
    return [_line(x, y1, x, y2, kind), *(_line(x - 4, y, x + 4, y, kind) for y in (y1, y2))]


def _y_axis(scale: _Scale, left: float, right: float, label: str, middle: float, about: int) -> list[str]:
    parts = []
    for tick in scale.ticks(about):
        text = plain(float(f"{tick:.6g}"))
        parts += [
            _line(left, scale(tick), right, scale(tick), "grid"),
            _text(left - 8, scale(tick) + 4, text, "end"),
        ]
    return [*parts, _turned(14.0, middle, label)]


def _legend(colours: Mapping[str, str], width: float) -> tuple[list[str], float]:
    """A swatch per name in as many rows as they need, and where the plot below may begin."""
    parts = []
    x, y = 8.0, 14.0
    for name, colour in colours.items():
        room = 30.0 + 6.6 * len(name)
        if x > 8.0 and x + room > width:
            x, y = 8.0, y + 20.0
        parts += [
            f'<rect class="filled {colour}" x="{x:.1f}" y="{y - 9:.1f}" width="11" height="11" rx="2"/>',
            _text(x + 17, y + 1, name, "start", "name"),
        ]
        x += room
    return parts, y + 22.0
