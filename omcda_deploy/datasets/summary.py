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


def render_table(summary: Mapping[str, Any]) -> Table:
    """Make a table of :func:`summarize`'s result, for a terminal."""
    from rich.table import Table

    table = Table(title=summary["task"], show_header=False)
    table.add_row("agents", ", ".join(summary["agents"]))
    for name, shape in summary["shapes"].items():
        table.add_row(name, " x ".join(f"{size:,}" for size in shape))
    table.add_row("transitions", f"{summary['transitions']:,}")
    ends = f"{summary['terminals']:,} terminal, {summary['timeouts']:,} by the time limit"
    table.add_row("episodes", f"{summary['episodes']:,} ({ends})")
    if summary["transitions_without_end"]:
        table.add_row("in an unfinished tail", f"{summary['transitions_without_end']:,} transitions")
    table.add_row("return", _line(summary["returns"]))
    for label, behavior in summary.get("behaviors", {}).items():
        table.add_row(f"  {label}", f"{behavior['episodes']:,} episodes, {_line(behavior['returns'])}")
    if "exact_behavior" in summary:
        table.add_row("exact distributions that acted", ", ".join(summary["exact_behavior"]))
    lengths = "{mean:.1f} ± {std:.1f} (sd), {min:.0f} to {max:.0f}"
    table.add_row("episode length", lengths.format(**summary["lengths"]))
    if "action_shares" in summary:
        for name, shares in summary["action_shares"].items():
            line = "  ".join(f"{choice}: {share:.1%}" for choice, share in enumerate(shares))
            table.add_row(f"actions of {name}", line)
    else:
        table.add_row(f"|a| > {NEARLY_SATURATED}", f"{summary['share_nearly_saturated']:.3%}")
        table.add_row(f"|a| > {SATURATED}", f"{summary['share_saturated']:.3%}")
        table.add_row("|a| > 1", f"{summary['share_outside']:.3%} (largest {summary['largest_action']:.4g})")
    _add_coverage(table, summary["coverage"])
    table.add_row("digest", summary["digest"])
    table.add_row("digest covers", DIGEST_CONTENTS[summary["digest_version"]])
    for name, value in summary["metadata"].items():
        table.add_row(name, str(value))
    return table


def _add_coverage(table: Table, covered: Mapping[str, Any]) -> None:
    if covered["policies"] is not None:
        table.add_row("effective number of policies", f"{covered['policies']:.1f}")
    distinct, entries = covered["distinct_observation_entries"], covered["observation_entries"]
    table.add_row("distinct observation entries", f"{distinct:,} of {entries:,}")
    table.add_row("their effective dimensions", f"{covered['effective_dimensions']:.1f}")
    for name, spread in covered["action_spread"].items():
        if isinstance(spread, list):
            table.add_row(
                f"spread of {name}'s actions", "  ".join(f"{value:.2f}" for value in spread) + " (sd)"
            )
        else:
            table.add_row(f"actions that {name} uses", f"{spread:.1f} (effective number)")


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
