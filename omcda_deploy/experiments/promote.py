"""Promotion on evidence: a version acts only if recorded episodes say that it earns more than the present one."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omcda_deploy.bundle import Bundle, read_bundle
from omcda_deploy.datasets import Dataset
from omcda_deploy.errors import BundleError, ConfigError, EndpointError, OmcdaError
from omcda_deploy.estimation import Comparison, Estimator, TeamDistributions, trained_share
from omcda_deploy.formatting import percent
from omcda_deploy.registry import read_dataset

if TYPE_CHECKING:
    from omcda_deploy.client.admin import Statuses, TeamAdmin


KNOWN_SHARE = 0.05  # of the episodes that judge a version: so many may have trained it


class RefusedError(OmcdaError):
    """A promotion that the evidence does not carry; nothing has changed."""


@dataclass(frozen=True)
class Demand:
    """Demands on the evidence: an improvement of the undiscounted return of at least ``at_least``.

    ``temperature``: of play, of both versions. ``shadow_s``: seconds for which the version first runs beside the
    present one, 0 for none.
    """

    at_least: float = 0.0
    confidence: float = 0.95
    temperature: float = 1.0
    shadow_s: float = 0.0

    def __post_init__(self) -> None:
        if not abs(self.at_least) < float("inf"):
            raise ConfigError(f"--at-least: expected a number, got {self.at_least}")
        if not 0.0 <= self.shadow_s < float("inf"):
            raise ConfigError(f"--shadow-first: expected seconds from 0 on, got {self.shadow_s}")


def promote(
    team: TeamAdmin,
    version: str,
    dataset: Dataset | str | Path,
    releases: str | Path,
    demand: Demand | None = None,
) -> tuple[dict[str, Any], Statuses]:
    """Make ``version`` the current one on all servers if the evidence carries it; return that and the statuses.

    ``dataset``: recorded episodes with the exact distributions that acted, of any versions. ``releases``: a folder
    with the bundles of ``version`` and of the current version, the same ones that the servers hold. The evidence is
    written into the servers' audit lines; they switch only if the version that it speaks of is still current.

    Raises :class:`RefusedError` where the lower bound of the improvement is not above the demand or the data cannot
    tell, with what would have to be recorded; :class:`BundleError` for other bundles than the servers';
    :class:`EndpointError` where servers fail or differ; and as :func:`omcda_deploy.estimate` does.
    """
    demand = demand or Demand()
    statuses = team.status()
    current = _one((status.current for status in statuses.values()), "current version")
    if version == current:
        raise ConfigError(f"version {version} is current already: name another one")
    data = dataset if isinstance(dataset, Dataset) else read_dataset(Path(dataset))
    bundles = {name: read_bundle(Path(releases) / name) for name in (current, version)}
    _require_served(statuses, current, bundles[current])
    share = trained_share(bundles[version], data)
    if share is not None and share > KNOWN_SHARE:
        raise RefusedError(
            f"version {version} does not replace version {current}: it was trained on {percent(share)} of these "
            "episodes, which therefore flatter it: estimate on others, such as the part that  omcda-deploy split  "
            "holds out"
        )
    candidate, present = (
        TeamDistributions.of_bundle(bundles[name], data, demand.temperature) for name in (version, current)
    )
    estimator = Estimator(data, TeamDistributions.of_recording(data), demand.confidence)
    found = estimator.compare(candidate, present)
    if reason := refusal(found, demand.at_least):
        raise RefusedError(f"version {version} does not replace version {current}: {reason}")
    _require_served(team.load(version), version, bundles[version])
    evidence = {
        "dataset": data.digest,
        "version": version,
        "bundle": bundles[version].digest,
        "over": current,
        "over_bundle": bundles[current].digest,
        "at_least": demand.at_least,
        "temperature": demand.temperature,
        "trained_share": share,
        **found.to_json(),
    }
    if demand.shadow_s:
        evidence["shadow"] = _shadowed(team, version, demand.shadow_s)
    return evidence, team.switch(version, current, json.dumps(evidence))


def refusal(found: Comparison, at_least: float) -> str:
    """Return the reason why the evidence carries no promotion, and what would have to be recorded; else nothing."""
    if found.silence:
        return f"the data cannot tell: {found.silence}"
    gain = found.improvement
    if gain.low > at_least:
        return ""
    sure = f"with {100 * found.confidence:g} % confidence"
    if gain.high <= at_least:
        return (
            f"it earns at most {gain.high:.4g} more {sure}, expected over {at_least:g}: keep the present one"
        )
    needed = found.episodes_for(at_least)
    advice = (
        "record more only if you believe in it all the same"
        if needed is None
        else f"about {max(needed, found.episodes + 1)} episodes would tell, these are {found.episodes}"
    )
    return (
        f"it earns at least {gain.low:.4g} more {sure}, expected over {at_least:g} (the estimate is "
        f"{gain.estimate:.4g}): {advice}"
    )


def _shadowed(team: TeamAdmin, version: str, seconds: float) -> dict[str, Any]:
    """Run a version beside the current one and return how it answered."""
    team.shadow(version)
    try:
        time.sleep(seconds)
        statuses = team.status()
        answers, failures = (
            sum(getattr(model, entry) for status in statuses.values() for model in status.models)
            for entry in ("shadow_answers", "shadow_failures")
        )
        if failures or not all(model.shadow_answers for s in statuses.values() for model in s.models):
            raise RefusedError(
                f"version {version} does not replace the present one: expected a shadow that answers every "
                f"request of every server for {seconds:g} s, it answered {answers} and failed at {failures}: let "
                "clients ask all servers meanwhile, and look at the servers' logs"
            )
        if _one((status.shadow for status in statuses.values()), "shadow") != version:
            raise EndpointError("somebody else has changed the shadow meanwhile: look at the status")
        difference = sum(
            model.shadow_difference * model.shadow_answers for s in statuses.values() for model in s.models
        )
    except BaseException:
        team.shadow("")
        raise
    return {"seconds": seconds, "answers": answers, "difference": difference / answers}


def _require_served(statuses: Statuses, version: str, bundle: Bundle) -> None:
    """Raise :class:`BundleError` unless all servers hold ``bundle`` as ``version``."""
    for endpoint, status in statuses.items():
        held = next((held.bundle_digest for held in status.versions if held.version == version), "none")
        if held != bundle.digest:
            raise BundleError(
                f"{bundle.path}: expected the bundle that {endpoint} holds as version {version}, {held[:12]}, got "
                f"{bundle.digest[:12]}: name the folder that is served with --releases"
            )


def _one(names: Iterable[str], what: str) -> str:
    """Return the one name that all servers tell."""
    found = sorted(set(names))
    if len(found) != 1:
        raise EndpointError(
            f"expected one {what} on all servers, got {', '.join(found)}: switch to one first"
        )
    return found[0]
