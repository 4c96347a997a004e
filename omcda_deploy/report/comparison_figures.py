"""Figures of a comparison that its algorithms declare: returns over a setting, and curves of training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from omcda_deploy.plugins import Scan
from omcda_deploy.report.comparison import Comparison, Summary
from omcda_deploy.report.figures import Curve, curves_figure


@dataclass(frozen=True)
class Figure:
    """A figure of one ``<svg>`` element or more, with words around it as plain text."""

    kind: str  # for the name of its file
    title: str
    panels: tuple[str, ...]
    caption: str


def scan_figures(comparison: Comparison) -> list[Figure]:
    """Draw returns over a setting, a figure per dataset and algorithm that has two values of it or more."""
    scans: dict[tuple[Scan, str, str, str, int], dict[str, list[Summary]]] = {}
    for summary in comparison.summaries:
        v = summary.variant
        if summary.scan is not None:
            lines = scans.setdefault((summary.scan, v.task, v.digest, v.algorithm, v.steps), {})
            lines.setdefault(summary.scan_group, []).append(summary)
    figures = []
    for (scan, task, _, algorithm, steps), lines in scans.items():
        if max(len(summaries) for summaries in lines.values()) < 2:
            continue
        curves = {}
        for group, summaries in lines.items():
            summaries.sort(key=lambda summary: summary.scan_value)
            curves[group] = Curve(
                np.array([summary.scan_value for summary in summaries], np.float64),
                np.array([summary.mean for summary in summaries]),
                np.array([summary.std for summary in summaries]),
            )
        label = comparison.dataset(next(iter(lines.values()))[0].variant)
        figure = curves_figure(curves, scan.axis, "mean return", log_x=True, width=900.0)
        figures.append(
            Figure(
                scan.setting,
                f"{scan.title} of {algorithm} on {task}, {label}",
                (figure,),
                f"Mean ± std over seeds, at each point's selected temperature of play, against {scan.caption}; "
                f"{steps:,} steps. A point without a whisker has one seed.",
            )
        )
    return figures


def curve_figures(comparison: Comparison) -> list[Figure]:
    """Draw curves of training, a figure per row whose algorithm declares some."""
    return [
        _curve_figure(comparison, summary)
        for summary in comparison.summaries
        if any(result.curves is not None for result in summary.results)
    ]


def _curve_figure(comparison: Comparison, summary: Summary) -> Figure:
    """Draw the curves that the algorithm declares: over training, then one against another at the end."""
    runs = [result.curves for result in summary.results if result.curves is not None]
    section, agents = runs[0].section, runs[0].agents
    estimated = frozenset[str]().union(*(curves.estimated for curves in runs))
    steps = runs[0].steps
    for curves in runs[1:]:
        steps = np.intersect1d(steps, curves.steps)
    titles, notes = {}, []
    for curve in section.curves:
        estimate = curve.estimate if curve.name in estimated else None
        titles[curve.name] = estimate.title if estimate else curve.title
        notes += [note] if (note := estimate.note if estimate else curve.note) else []

    def over_training(name: str) -> dict[str, Curve]:
        mean = np.mean([curves.values[name][np.isin(curves.steps, steps)] for curves in runs], axis=0)
        return {agent: Curve(steps.astype(np.float64), mean[:, i]) for i, agent in enumerate(agents)}

    def at_the_end(name: str, against: str) -> dict[str, Curve]:
        x, y = (np.array([curves.values[key][-1] for curves in runs]) for key in (name, against))
        return {agent: Curve(x[:, i], y[:, i]) for i, agent in enumerate(agents)}

    figures = [curves_figure(over_training(name), "step", title) for name, title in titles.items() if title]
    pairs = [(curve.name, curve.against) for curve in section.curves if curve.against]
    figures += [
        curves_figure(at_the_end(name, against), f"{titles[name]}, at the end", titles[against], joined=False)
        for name, against in pairs
    ]
    caption = f"What training logged, mean over seeds ({len(runs)} of them)"
    caption += "; in the last panel one point per agent and seed, at the last step." if pairs else "."
    variant = summary.variant
    heading = f"{section.title}: {comparison.name(variant)} on {variant.task}, {comparison.dataset(variant)}"
    return Figure(section.file.partition(".")[0], heading, tuple(figures), " ".join([caption, *notes]))
