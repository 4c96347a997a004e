"""The behaviour policies that come with the package: bundles under ``policies/<task>/<tier>/``.

``medium`` and ``expert`` hold one policy each, ``medium-replay`` the checkpoints of the same training run up to
medium in numbered folders, and ``medium-expert`` is half of each; ``smax/…`` has ``good``, ``medium`` and ``poor``,
as far as they were reached. ``policies/README.md`` says how they were made and what they return. Tasks that are
defined with behaviour policies of their own (``toy/…``) have the one tier ``behavior``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omcda_deploy import registry
from omcda_deploy.bundle import MANIFEST
from omcda_deploy.errors import ConfigError, UnknownNameError
from omcda_deploy.local import JointTeam
from omcda_deploy.play.collect import Source

POLICIES = Path(__file__).parents[1] / "policies"
TIERS = ("expert", "medium", "medium-replay", "medium-expert")
BATTLE_TIERS = ("good", "medium", "poor")  # of SMAX, after SMAC's datasets
BEHAVIOR = "behavior"


@dataclass(frozen=True)
class ShippedPolicy:
    """A bundle and the share of a dataset's transitions that it records."""

    label: str
    bundle: Path
    share: float


def shipped_tasks() -> tuple[str, ...]:
    """Tasks with shipped behaviour policies."""
    folders = {path.parent for path in POLICIES.glob("*/*/*") if path.name in (*TIERS, *BATTLE_TIERS)}
    return tuple(sorted(str(folder.relative_to(POLICIES)) for folder in folders))


def tiers(task: str) -> tuple[str, ...]:
    """The tiers that datasets of a task can be recorded with; none where it has no behaviour policies."""
    if registry.behavior_team(task) is not None:
        return (BEHAVIOR,)
    return _shipped_tiers(task) if task in shipped_tasks() else ()


def behavior_policies(task: str, tier: str) -> list[ShippedPolicy]:
    """The policies of a tier, in the order in which they record.

    Raises :class:`UnknownNameError`, and :class:`ConfigError` for a task without any.
    """
    folder = POLICIES / task
    if task not in shipped_tasks():
        raise ConfigError(
            f"{task} comes without behaviour policies: record a policy of your own, with --bundle"
        )
    if tier not in _shipped_tiers(task):
        raise UnknownNameError(f"tier of {task}", tier, _shipped_tiers(task))
    if tier == "medium-expert":
        return [ShippedPolicy(name, folder / name, 0.5) for name in ("medium", "expert")]
    if tier == "medium-replay":
        found = sorted(path.parent for path in (folder / tier).glob(f"*/{MANIFEST}"))
        return [ShippedPolicy(f"{tier}/{path.name}", path, 1.0) for path in found]
    return [ShippedPolicy(tier, folder / tier, 1.0)]


def sources(task: str, tier: str, bundle: Path | None = None) -> list[Source]:
    """The policies that record a dataset of ``tier``, with their shares; ``bundle`` alone where one is given.

    Raises :class:`UnknownNameError` for a tier that the task does not have.
    """
    if bundle is not None:
        return [Source(bundle.absolute().name, JointTeam(bundle), 1.0)]
    if (known := tiers(task)) and tier not in known:
        raise UnknownNameError(f"tier of {task}", tier, known)
    if (own := registry.behavior_team(task)) is not None:
        return [Source(tier, own, 1.0)]
    return [
        Source(policy.label, JointTeam(policy.bundle), policy.share)
        for policy in behavior_policies(task, tier)
    ]


def _shipped_tiers(task: str) -> tuple[str, ...]:
    if task.startswith("smax/"):
        return tuple(tier for tier in BATTLE_TIERS if (POLICIES / task / tier / MANIFEST).is_file())
    return TIERS
