"""Estimates of bundles on recorded episodes, as a function for notebooks and for the commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omcda_deploy.bundle import Bundle, read_bundle
from omcda_deploy.datasets import Dataset
from omcda_deploy.errors import ConfigError
from omcda_deploy.estimation import (
    Bounds,
    Comparison,
    Estimator,
    TeamDistributions,
    require_confidence,
    require_estimable,
    trained_share,
)
from omcda_deploy.registry import read_dataset


@dataclass(frozen=True)
class Estimates:
    """Estimates of bundles from recorded episodes, of which they may have played none."""

    dataset_digest: str
    episodes: int
    recorded: Bounds  # mean return of the episodes
    exact: bool  # whether the distributions that acted are on record, or cloned: bounds do not know a clone's error
    temperature: float  # of the bundles' play
    bundles: Mapping[str, Comparison]  # by bundle, in the order in which they were given
    digests: Mapping[str, str]  # of the bundles
    trained: Mapping[
        str, float | None
    ]  # share of the episodes that trained the bundle; None: it does not tell

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "dataset": self.dataset_digest,
            "episodes": self.episodes,
            "recorded": self.recorded._asdict(),
            "behavior": "exact" if self.exact else "cloned",
            "temperature": self.temperature,
            "bundles": {
                name: {
                    "digest": self.digests[name],
                    "trained_share": self.trained[name],
                    "silence": found.silence,
                    **found.to_json(),
                }
                for name, found in self.bundles.items()
            },
        }


def estimate(
    dataset: Dataset | str | Path,
    bundles: Sequence[Bundle | str | Path],
    *,
    temperature: float = 1.0,
    confidence: float = 0.95,
    behavior: Bundle | str | Path | None = None,
    task: str | None = None,
) -> Estimates:
    """Estimate what bundles would earn, and by how much more than what was recorded, without playing.

    Each bound holds alone with ``confidence``, and ``temperature`` is that of the bundles' play. Where the dataset
    does not have the exact distributions that acted, a clone stands in: the behaviour policy of the bundle
    ``behavior``, or one that is fitted to these episodes, which needs torch. Bundles that began as one clone are
    best compared by it: what is wrong with it is wrong with them as well, and cancels.

    Raises :class:`DatasetError` for fewer than 30 episodes and for returns-to-go in place of rewards,
    :class:`ContractError` for bundles of another team, :class:`ConfigError` for a deterministic or unknown
    temperature, for a confidence that is out of range and for a ``behavior`` beside what is on record, and
    :class:`BundleError` for damaged bundles and for policies without a density.
    """
    data = dataset if isinstance(dataset, Dataset) else read_dataset(Path(dataset), task)
    require_estimable(data)  # before anything is cloned, as the next
    require_confidence(confidence)
    read = [bundle if isinstance(bundle, Bundle) else read_bundle(bundle) for bundle in bundles]
    teams = {str(bundle.path): TeamDistributions.of_bundle(bundle, data, temperature) for bundle in read}
    exact = data.behavior is not None
    if exact and behavior is not None:
        raise ConfigError(
            "behavior: expected none, as the dataset has the exact distributions that acted: leave it out"
        )
    estimator = Estimator(data, _acted(data, behavior), confidence)
    return Estimates(
        data.digest,
        len(data.episode_length),
        estimator.recorded,
        exact,
        temperature,
        {name: estimator.compare(team) for name, team in teams.items()},
        {str(bundle.path): bundle.digest for bundle in read},
        {str(bundle.path): trained_share(bundle, data) for bundle in read},
    )


def _acted(dataset: Dataset, clone: Bundle | str | Path | None) -> TeamDistributions:
    """Return what acted at every row: as recorded, as ``clone`` says, or as it is cloned for training."""
    if dataset.behavior is not None:
        return TeamDistributions.of_recording(dataset)
    if clone is not None:
        bundle = clone if isinstance(clone, Bundle) else read_bundle(clone)
        return TeamDistributions.of_clone(bundle, dataset)
    from omcda_deploy.training.behavior_model import BehaviorConfig, cloned_rows

    return TeamDistributions.of_arrays(dataset, cloned_rows(dataset, BehaviorConfig()))
