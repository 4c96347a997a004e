"""Behaviour policies that come with the package: bundles under ``policies/<task>/<tier>/``.

A tier is one bundle, or several in numbered folders: ``medium-replay`` has the checkpoints of the same training run
up to medium. Where there are ``medium`` and ``expert``, the tier ``medium-expert`` is half of each.
``policies/README.md`` lists the bundles, their returns and the commands that made them. Tasks that are defined with
behaviour policies of their own (``toy/…``) have the one tier ``behavior``. Every task has the tier ``random``, of
uniformly random actions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omcda_deploy import registry
from omcda_deploy.bundle import MANIFEST
from omcda_deploy.errors import ConfigError, UnknownNameError
from omcda_deploy.local import JointTeam
from omcda_deploy.play.collect import Source
from omcda_deploy.play.scripted import RandomTeam

POLICIES = Path(__file__).parents[1] / "policies"
BEHAVIOR = "behavior"
RANDOM = "random"
MIXTURE = "medium-expert"
MIXED_TIERS = ("medium", "expert")


@dataclass(frozen=True)
class ShippedPolicy:
    """A bundle and the share of a dataset's transitions that it records."""

    label: str
    bundle: Path
    share: float


def shipped_tasks() -> tuple[str, ...]:
    """Return the tasks with shipped behaviour policies."""
    folders = (folder for folder in POLICIES.glob("*/*") if _tiers_in(folder))
    return tuple(sorted(str(folder.relative_to(POLICIES)) for folder in folders))


def tiers(task: str) -> tuple[str, ...]:
    """Return the tiers of a task's own behaviour policies, beside ``random``; none without such policies."""
    if registry.behavior_team(task) is not None:
        return (BEHAVIOR,)
    return _shipped_tiers(task)


def behavior_policies(task: str, tier: str) -> list[ShippedPolicy]:
    """Return the policies of a tier, in the order in which they record.

    Raises :class:`UnknownNameError` for a tier that the task does not have, :class:`ConfigError` for a task without
    shipped policies.
    """
    names = _shipped_tiers(task)
    if not names:
        raise ConfigError(
            f"{task} comes without behaviour policies: use --tier random, or record a policy of your own, with "
            "--bundle or --policy"
        )
    if tier not in names:
        raise UnknownNameError(f"tier of {task}", tier, (*names, RANDOM))
    folder = POLICIES / task
    if tier == MIXTURE:
        return [ShippedPolicy(name, folder / name, 0.5) for name in MIXED_TIERS]
    bundles = _bundles_in(folder / tier)
    return [ShippedPolicy(str(bundle.relative_to(folder)), bundle, 1.0) for bundle in bundles]


def sources(task: str, tier: str, options: Mapping[str, Any] | None = None) -> list[Source]:
    """Return the policies that record a dataset of ``tier``, with their shares.

    ``options`` go to the task's simulator, which may be asked for its spec. Raises :class:`UnknownNameError` for a
    tier that the task does not have, :class:`ConfigError` for a task without behaviour policies.
    """
    if tier == RANDOM:
        return [Source(tier, RandomTeam(registry.team_spec(task, **(options or {}))), 1.0)]
    if (names := tiers(task)) and tier not in names:
        raise UnknownNameError(f"tier of {task}", tier, (*names, RANDOM))
    if (team := registry.behavior_team(task)) is not None:
        return [Source(tier, team, 1.0)]
    return [
        Source(policy.label, JointTeam(policy.bundle), policy.share)
        for policy in behavior_policies(task, tier)
    ]


def _shipped_tiers(task: str) -> tuple[str, ...]:
    return _tiers_in(POLICIES / task) if task in shipped_tasks() else ()


def _tiers_in(folder: Path) -> tuple[str, ...]:
    """Return the tiers in a task's folder, and the mixture where it has both parts."""
    names = sorted({bundle.relative_to(folder).parts[0] for bundle in _bundles_in(folder)})
    return (*names, MIXTURE) if set(MIXED_TIERS) <= set(names) else tuple(names)


def _bundles_in(folder: Path) -> list[Path]:
    return sorted(manifest.parent for manifest in folder.rglob(MANIFEST))
