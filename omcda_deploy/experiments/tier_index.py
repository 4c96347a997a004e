"""README.md of a folder of shipped policies, written from the bundles' manifests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from omcda_deploy.bundle import MANIFEST
from omcda_deploy.errors import ConfigError
from omcda_deploy.experiments.behavior_returns import (
    PUBLISHED_MIXTURES,
    PUBLISHED_RETURNS,
    Moments,
    PolicyReturns,
    Returns,
    mixture,
    simulator_of,
)
from omcda_deploy.files import write_text
from omcda_deploy.play.shipped import MIXED_TIERS, MIXTURE

HEAD = """\
# Behaviour policies

Written by `omcda-deploy behavior ship`; do not edit. Each folder is a bundle. Returns are of 20 episodes (mean ±
standard deviation, evaluation seed 0), and of 200 in SMAX, with the share of battles won: *sampled* as in
recording, and *greedy*, the mean or likeliest action. Tiers whose greedy returns are equal differ in noise alone.
Published are the returns of OMIGA's dataset of that name; `ship` chooses the checkpoints that are nearest in both
mean and spread. The distance is the square root of the two differences' sum of squares, the 2-Wasserstein distance
of normal distributions. SMAX is not SMAC, and nothing published compares with it.

| bundle | PPO steps | seed | sampled | won | greedy | won | published | distance |
|---|---|---|---|---|---|---|---|---|
"""

TAIL = """
`behavior measure` plays a run's checkpoints, and `ship` without `--tier` then chooses those that are nearest to the
published returns. `train --record FILE` also keeps the training's own episodes, as published medium-replay data do.
"""

# Tiers that the tasks' learners have not reached, and why; every other name is a folder.
MISSING = {
    "smax/5m_vs_6m": {"good": "no checkpoint of 2.5 million steps wins a tenth of its battles"},
    "smax/corridor": {"good": "no checkpoint of 4 million steps wins a battle"},
}


def write_index(out: Path) -> None:
    """Write README.md of a folder of shipped policies from the bundles' manifests.

    Raises :class:`ConfigError` for a bundle that was shipped by another version.
    """
    manifests = [
        (str(path.parent.relative_to(out)), json.loads(path.read_text()))
        for path in sorted(out.rglob(MANIFEST))
    ]
    rows, missing, commands = [], [], []
    for task, bundles in groupby(manifests, key=lambda item: item[1]["team"]["task"]):
        trainings = {folder: manifest["training"] for folder, manifest in bundles}
        rows += _rows(task, trainings)
        commands += _commands(task, trainings)
        shipped = {training["tier"] for training in trainings.values()}
        missing += [
            f"* `{task}/{tier}`: {reason}."
            for tier, reason in MISSING.get(task, {}).items()
            if tier not in shipped
        ]
    text = HEAD + "".join(f"{row}\n" for row in rows)
    if missing:
        text += "\nTiers that could not be had:\n\n" + "".join(f"{line}\n" for line in missing)
    text += (
        "\nThe commands that made them:\n\n```bash\n" + "".join(f"{line}\n" for line in commands) + "```\n"
    )
    text += TAIL
    write_text(out / "README.md", text)


def _rows(task: str, trainings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the rows of a task's bundles, after a tier's own where it consists of several, and of the mixture."""
    rows = []
    by_tier: dict[str, PolicyReturns] = {}  # of the tiers that are one policy
    for tier, members in groupby(trainings.items(), key=lambda item: str(item[1]["tier"])):
        bundles = dict(members)
        returns = {folder: _returns(folder, training) for folder, training in bundles.items()}
        published = PUBLISHED_RETURNS.get(task, {}).get(tier)
        if len(bundles) > 1:
            rows.append(_mixture_row(task, f"`{task}/{tier}`, all", list(returns.values()), published))
            published = None
        else:
            by_tier[tier] = next(iter(returns.values()))
        for folder, training in bundles.items():
            sampled, greedy = returns[folder].sampled, returns[folder].greedy
            rows.append(
                _row(
                    f"`{folder}`",
                    f"{training['ppo_steps']:,}",
                    str(training["ppo"]["seed"]),
                    _moments(task, sampled.moments),
                    _won(sampled),
                    _moments(task, greedy.moments),
                    _won(greedy),
                    *_comparison(task, sampled.moments, published),
                )
            )
    if set(MIXED_TIERS) <= set(by_tier):
        parts = [by_tier[tier] for tier in MIXED_TIERS]
        label = f"`{task}/{MIXTURE}`, half of each"
        rows.append(_mixture_row(task, label, parts, PUBLISHED_MIXTURES.get(task)))
    return rows


def _mixture_row(task: str, label: str, parts: Sequence[PolicyReturns], published: Moments | None) -> str:
    whole = mixture([part.sampled for part in parts])
    return _row(label, "", "", _moments(task, whole), "", "", "", *_comparison(task, whole, published))


def _returns(folder: str, training: Mapping[str, Any]) -> PolicyReturns:
    try:
        return PolicyReturns.from_json(training["returns"])
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}: run  omcda-deploy behavior index --measure") from error


def _commands(task: str, trainings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the commands that made a task's bundles."""
    run = f"runs/{task.split('/')[1]}"
    seeds = {training["ppo"]["seed"] for training in trainings.values()}
    chosen = {training["tier"]: training["ppo_steps"] for training in trainings.values()}
    last = max(chosen.values())
    options = "".join(f" --tier {tier}={steps}" for tier, steps in chosen.items())
    return [
        *(
            f"omcda-deploy behavior train {task} --out {run} --seed {seed} --until {last}"
            for seed in sorted(seeds)
        ),
        f"omcda-deploy behavior ship {run}{options}",
    ]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _moments(task: str, moments: Moments) -> str:
    digits = simulator_of(task).digits
    return f"{moments.mean:.{digits}f} ± {moments.std:.{digits}f}"


def _won(returns: Returns) -> str:
    return "" if returns.win_rate is None else f"{returns.win_rate:.1%}"


def _comparison(task: str, moments: Moments, published: Moments | None) -> tuple[str, str]:
    if published is None:
        return "", ""
    return _moments(task, published), f"{published.distance(moments):.{simulator_of(task).digits}f}"
