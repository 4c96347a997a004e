"""Summarise a dataset, as ``omcda-deploy inspect dataset FILE`` prints it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.datasets import DIGEST_CONTENTS, Dataset, blocks
from omcda_deploy.datasets.coverage import coverage
from omcda_deploy.formatting import digits_of, number

if TYPE_CHECKING:
    from rich.table import Table

SATURATED = 0.999  # beyond it atanh(a), and with it a squashed policy's log-probability, grows without bound
NEARLY_SATURATED = 0.99


def summarize(dataset: Dataset) -> dict[str, Any]:
    """Shapes, episodes, returns, ends, actions, coverage, digest and metadata, as JSON values.

    Continuous actions are summed up by the shares at and beyond the bounds, over all numbers of all agents, scaled
    to [-1, 1] where a team has other bounds, discrete ones by the share of each choice, per agent. Rows behind an
    episode's end do not count.
    """
    summary: dict[str, Any] = {
        "task": dataset.spec.task,
        "agents": list(dataset.spec.names),
        "shapes": {
            name: list(getattr(dataset, name).shape)
            for name in ("observations", "states", "actions", "rewards", "action_masks")
            if getattr(dataset, name) is not None
        },
        "transitions": int(dataset.transitions.size),
        "episodes": int(dataset.episode_start.size),
        "transitions_without_end": int(dataset.transitions.size - dataset.episode_length.sum()),
        "terminals": int(dataset.terminal.sum()),
        "timeouts": int(dataset.timeout.sum()),
        "returns": _distribution(dataset.episode_returns),
        "lengths": _distribution(dataset.episode_length),
        **(_bounds(dataset) if dataset.spec.action_kind == "continuous" else _choices(dataset)),
        "coverage": coverage(dataset),
        "digest": dataset.digest,
        "digest_version": dataset.digest_version,
        "metadata": dict(dataset.metadata),
    }
    if dataset.behavior is not None:
        summary["exact_behavior"] = sorted(dataset.behavior)
    if dataset.episode_behaviors is not None:
        summary["behaviors"] = {
            label: {
                "episodes": int(members.sum()),
                "returns": _distribution(dataset.episode_returns[members]),
            }
            for index, label in enumerate(dataset.behaviors)
            if (members := dataset.episode_behaviors == index).any()
        }
    return summary


def _bounds(dataset: Dataset) -> dict[str, float]:
    """Measure actions in units of their bounds, in which they lie within [-1, 1]."""
    nearly, saturated, outside, largest, numbers = 0, 0, 0, 0.0, 0
    for block in blocks(dataset.transitions.size):
        magnitudes = np.abs(dataset.spec.squashed(dataset.actions[dataset.transitions[block]]))
        nearly += int((magnitudes > NEARLY_SATURATED).sum())
        saturated += int((magnitudes > SATURATED).sum())
        outside += int((magnitudes > 1).sum())
        largest = max(largest, float(magnitudes.max()))
        numbers += magnitudes.size
    return {
        "share_nearly_saturated": nearly / numbers,
        "share_saturated": saturated / numbers,
        "share_outside": outside / numbers,
        "largest_action": largest,
    }


def _choices(dataset: Dataset) -> dict[str, dict[str, list[float]]]:
    choices = dataset.actions[dataset.transitions]  # [M, N]
    return {
        "action_shares": {
            agent.name: (np.bincount(choices[:, i], minlength=agent.action.size) / len(choices)).tolist()
            for i, agent in enumerate(dataset.spec.agents)
        }
    }


def card(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Put :func:`summarize`'s result into words: names and values, in the order in which they are shown."""
    lines = [("agents", ", ".join(summary["agents"]))]
    lines += [(name, " x ".join(f"{size:,}" for size in shape)) for name, shape in summary["shapes"].items()]
    lines.append(("transitions", f"{summary['transitions']:,}"))
    ends = f"{summary['terminals']:,} terminal, {summary['timeouts']:,} by the time limit"
    lines.append(("episodes", f"{summary['episodes']:,} ({ends})"))
    if summary["transitions_without_end"]:
        lines.append(("in an unfinished tail", f"{summary['transitions_without_end']:,} transitions"))
    lines.append(("return", _line(summary["returns"])))
    for label, behavior in summary.get("behaviors", {}).items():
        lines.append((f"  {label}", f"{behavior['episodes']:,} episodes, {_line(behavior['returns'])}"))
    if "exact_behavior" in summary:
        lines.append(("exact distributions that acted", ", ".join(summary["exact_behavior"])))
    lengths = "{mean:.1f} ± {std:.1f} (sd), {min:.0f} to {max:.0f}"
    lines.append(("episode length", lengths.format(**summary["lengths"])))
    if "action_shares" in summary:
        for name, shares in summary["action_shares"].items():
            line = "  ".join(f"{choice}: {share:.1%}" for choice, share in enumerate(shares))
            lines.append((f"actions of {name}", line))
    else:
        lines.append((f"|a| > {NEARLY_SATURATED}", f"{summary['share_nearly_saturated']:.3%}"))
        lines.append((f"|a| > {SATURATED}", f"{summary['share_saturated']:.3%}"))
        lines.append(("|a| > 1", f"{summary['share_outside']:.3%} (largest {summary['largest_action']:.4g})"))
    lines += _coverage_lines(summary["coverage"])
    lines.append(("digest", summary["digest"]))
    lines.append(("digest covers", DIGEST_CONTENTS[summary["digest_version"]]))
    return [*lines, *((name, str(value)) for name, value in summary["metadata"].items())]


def render_table(summary: Mapping[str, Any]) -> Table:
    """Make a table of :func:`summarize`'s result, for a terminal."""
    from rich.table import Table

    table = Table(title=summary["task"], show_header=False)
    for name, words in card(summary):
        table.add_row(name, words)
    return table


def _coverage_lines(covered: Mapping[str, Any]) -> list[tuple[str, str]]:
    lines = []
    if covered["policies"] is not None:
        lines.append(("effective number of policies", f"{covered['policies']:.1f}"))
    distinct, entries = covered["distinct_observation_entries"], covered["observation_entries"]
    lines.append(("distinct observation entries", f"{distinct:,} of {entries:,}"))
    lines.append(("their effective dimensions", f"{covered['effective_dimensions']:.1f}"))
    for name, spread in covered["action_spread"].items():
        if isinstance(spread, list):
            words = "  ".join(f"{value:.2f}" for value in spread)
            lines.append((f"spread of {name}'s actions", f"{words} (sd)"))
        else:
            lines.append((f"actions that {name} uses", f"{spread:.1f} (effective number)"))
    return lines


def _distribution(values: NDArray[Any]) -> dict[str, float]:
    return {
        "mean": float(values.mean()),
        "std": float(values.std()),
        "min": float(values.min()),
        "max": float(values.max()),
    }


def _line(distribution: Mapping[str, float]) -> str:
    digits = digits_of(list(distribution.values()))
    mean, std, low, high = (number(distribution[name], digits) for name in ("mean", "std", "min", "max"))
    return f"{mean} ± {std} (sd), {low} to {high}"
