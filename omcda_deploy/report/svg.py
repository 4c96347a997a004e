"""SVG primitives of :mod:`omcda_deploy.report.figures`: scales, axes, lines, texts and legends.

Functions return SVG elements as text, or a list of them. Coordinates are pixels of the figure's view box.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape, unescape

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.formatting import significant

COLOURS = 10  # classes s0 to s9 in the page's CSS; further series repeat them, paler


@dataclass(frozen=True)
class Scale:
    """A map from data values to pixels along one axis."""

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
        """Round values inside the scale: ``about`` as many, or the decades (and their 2 and 5) of a log scale."""
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


def linear_scale(values: NDArray[np.float64], start: float, end: float, *, from_zero: bool = False) -> Scale:
    """A scale over ``values`` with a margin of 5 % at both ends; never of zero length.

    ``from_zero``: the scale includes zero, and begins exactly there if no value is negative.
    """
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 1.0)
    if from_zero:
        low = min(low, 0.0)
    margin = 0.05 * (high - low) or max(abs(high) * 0.05, 0.5)
    return Scale(low if from_zero and low == 0.0 else low - margin, high + margin, start, end)


def svg(width: float, height: float, label: str, parts: Iterable[str]) -> str:
    """The whole element; ``label`` is read out by screen readers."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">'
        + "".join(parts)
        + "</svg>"
    )


def side_by_side(figures: Sequence[str], columns: int = 2, gap: float = 16.0) -> str:
    """One element of several of :func:`svg`, in rows of ``columns``, each as large as it is alone."""
    if len(figures) == 1:
        return figures[0]
    parts, labels, x, y, width, height = [], [], 0.0, 0.0, 0.0, 0.0
    for index, figure in enumerate(figures):
        if index % columns == 0:
            x, y = 0.0, height + (gap if index else 0.0)
        opening, _, content = figure.removesuffix("</svg>").partition(">")
        size = re.search(r'viewBox="0 0 (\S+) (\S+)"', opening)
        label = re.search(r'aria-label="(.*)"', opening)
        assert size is not None  # as svg() writes them
        assert label is not None
        parts.append(f'<g transform="translate({x:g} {y:g})">{content}</g>')
        labels.append(unescape(label[1]))
        width, height = max(width, x + float(size[1])), max(height, y + float(size[2]))
        x += float(size[1]) + gap
    return svg(width, height, "; ".join(labels), parts)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A straight line; ``kind`` is its CSS class."""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def text(x: float, y: float, content: str, anchor: str = "start", kind: str = "tick") -> str:
    """Plain text, escaped here; ``kind`` is its CSS class."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


def vertical_text(x: float, y: float, content: str) -> str:
    """Plain text that reads upwards, centred on a point: the label of a y axis."""
    return (
        f'<text class="label" x="{x:g}" y="{y:g}" text-anchor="middle" transform="rotate(-90 {x:g} {y:g})">'
        f"{escape(content)}</text>"
    )


def whisker(x: float, y1: float, y2: float, kind: str) -> list[str]:
    """An upright error bar with caps."""
    return [line(x, y1, x, y2, kind), *(line(x - 4, y, x + 4, y, kind) for y in (y1, y2))]


def x_axis(
    scale: Scale,
    top: float,
    bottom: float,
    label: str,
    about: int = 7,
    ticks: Sequence[float] | None = None,
) -> list[str]:
    """Axis, label and grid from ``top`` to ``bottom``; ``ticks`` replaces the scale's own."""
    parts = []
    for tick in scale.ticks(about) if ticks is None else ticks:
        x = scale(tick)
        parts += [line(x, top, x, bottom, "grid"), text(x, bottom + 16, significant(tick), "middle")]
    parts.append(line(scale.start, bottom, scale.end, bottom, "axis"))
    parts.append(text((scale.start + scale.end) / 2, bottom + 36, label, "middle", "label"))
    return parts


def y_grid(scale: Scale, ticks: Iterable[float], left: float, right: float, gap: float = 8.0) -> list[str]:
    """A grid line per tick, with its value to the left of the figure."""
    parts = []
    for tick in ticks:
        # Six digits remove the error of multiplying the step before it can show.
        label = significant(float(f"{tick:.6g}"))
        parts += [
            line(left, scale(tick), right, scale(tick), "grid"),
            text(left - gap, scale(tick) + 4, label, "end"),
        ]
    return parts


def y_axis(scale: Scale, left: float, right: float, label: str, middle: float, about: int) -> list[str]:
    """Grid and label; ``middle`` is the y of the label's centre."""
    return [*y_grid(scale, scale.ticks(about), left, right), vertical_text(14.0, middle, label)]


def left_margin(names: Iterable[str]) -> float:
    """Width to the left of a figure for its longest row name."""
    return min(28.0 + 7.0 * max(map(len, names)), 240.0)


def series_class(index: int) -> str:
    """CSS classes that colour the series of this index."""
    return f"s{index % COLOURS}" + (" pale" if index >= COLOURS else "")


def legend(classes: Mapping[str, str], width: float) -> tuple[list[str], float]:
    """A swatch per name, in as many rows as they need, and the y at which the plot below may begin."""
    parts = []
    x, y = 8.0, 14.0
    for name, kind in classes.items():
        entry = 30.0 + 6.6 * len(name)
        if x > 8.0 and x + entry > width:
            x, y = 8.0, y + 20.0
        parts += [
            f'<rect class="filled {kind}" x="{x:.1f}" y="{y - 9:.1f}" width="11" height="11" rx="2"/>',
            text(x + 17, y + 1, name, "start", "name"),
        ]
        x += entry
    return parts, y + 22.0
