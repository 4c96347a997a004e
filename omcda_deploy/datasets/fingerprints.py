"""Fingerprints of episodes: whether some of those that are judged are among those that trained."""

from __future__ import annotations

import base64
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.datasets import ContentDigest, Dataset
from omcda_deploy.errors import DatasetError

KEPT = 1024  # fingerprints: 11 kB in a bundle
REPEATED = 0.01  # share of equal episodes up to which an episode's contents name it
VERSION = 2
_ARRAYS = {1: "oar", 2: "oa"}  # by version, of which 1, with rewards, is that of older runs and bundles

Prints = NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class TrainingEpisodes:
    """A sample of the episodes of a dataset, by which they are known again in any other file.

    ``prints``: fingerprints in ascending order, all of those up to ``limit``. As they are spread evenly, the share
    of another dataset's episodes that is found among them tells that of all (a bottom-k sketch: E. Cohen and
    H. Kaplan, 2007). Empty where episodes are repeated, as in games of a few steps: two equal ones then need not be
    the same. ``version``: of what a fingerprint is taken of.
    """

    prints: Prints
    limit: int
    version: int = VERSION

    @classmethod
    def of(cls, dataset: Dataset) -> TrainingEpisodes:
        """Take a sample of at most :data:`KEPT` episodes."""
        every = fingerprints(dataset)
        prints = np.unique(every)
        if repeats_itself(every):
            return cls(prints[:0], 0)
        if len(prints) <= KEPT:
            return cls(prints, 2**64 - 1)
        return cls(prints[:KEPT], int(prints[KEPT - 1]))

    def share_of(self, dataset: Dataset) -> float | None:
        """Estimate the share of a dataset's episodes that are among these: 0 to 1; None where nothing tells."""
        every = fingerprints(dataset, self.version)
        comparable = every[every <= np.uint64(self.limit)]
        return (
            float(np.isin(comparable, self.prints).mean()) if len(self.prints) and len(comparable) else None
        )

    def to_text(self) -> str:
        """Return the version and fingerprints, little-endian, in base64, with the limit as the last one."""
        numbers = np.append(self.prints, np.uint64(self.limit)).astype("<u8")
        return f"{self.version}:{base64.b64encode(numbers.tobytes()).decode()}"

    @classmethod
    def from_text(cls, text: str) -> TrainingEpisodes:
        """Read what :meth:`to_text` returned. Raises :class:`DatasetError` for anything else."""
        try:
            named, colon, encoded = text.rpartition(":")
            version = int(named) if colon else 1
            numbers = np.frombuffer(base64.b64decode(encoded, validate=True), "<u8").astype(np.uint64)
            if version not in _ARRAYS:
                raise ValueError(f"version {version} is not known here")
            return cls(numbers[:-1], int(numbers[-1]), version)
        except (ValueError, TypeError, IndexError) as error:
            raise DatasetError(
                f"fingerprints of episodes: expected base64, got another text: {error}"
            ) from error


def repeats_itself(prints: Prints) -> bool:
    """Test if so many of the fingerprints of one dataset are equal that they do not name its episodes."""
    return len(np.unique(prints)) < (1 - REPEATED) * len(prints)


def fingerprints(dataset: Dataset, version: int = VERSION) -> Prints:
    """Return 64 bits for each closed episode, of its observations and actions, whatever it is said to earn: [E]."""
    prints = np.empty(len(dataset.episode_length), np.uint64)
    for number in range(len(prints)):
        episode = dataset.episode(number)
        digest = ContentDigest()
        for name, values in (
            ("o", episode.observations[:-1]),  # the last one is not in every format
            ("a", episode.actions),
            ("r", episode.rewards),
        ):
            if name in _ARRAYS[version]:
                digest.update(name, np.asarray(values))
        prints[number] = int(digest.hexdigests()[1][:16], 16)
    return prints
