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

Prints = NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class TrainingEpisodes:
    """A sample of the episodes of a dataset, by which they are known again in any other file.

    ``prints``: fingerprints in ascending order, all of those up to ``limit``. As they are spread evenly, the share
    of another dataset's episodes that is found among them tells that of all (a bottom-k sketch: E. Cohen and
    H. Kaplan, 2007). Empty where episodes are repeated, as in games of a few steps: two equal ones then need not be
    the same.
    """

    prints: Prints
    limit: int

    @classmethod
    def of(cls, dataset: Dataset) -> TrainingEpisodes:
        """Take a sample of at most :data:`KEPT` episodes."""
        every = fingerprints(dataset)
        prints = np.unique(every)
        if len(prints) < (1 - REPEATED) * len(every):
            return cls(prints[:0], 0)
        if len(prints) <= KEPT:
            return cls(prints, 2**64 - 1)
        return cls(prints[:KEPT], int(prints[KEPT - 1]))

    def share_of(self, dataset: Dataset) -> float:
        """Estimate the share of a dataset's episodes that are among these: 0 to 1."""
        every = fingerprints(dataset)
        comparable = every[every <= np.uint64(self.limit)]
        return float(np.isin(comparable, self.prints).mean()) if len(comparable) else 0.0

    def to_text(self) -> str:
        """Return fingerprints, little-endian, in base64, with the limit as the last one."""
        numbers = np.append(self.prints, np.uint64(self.limit)).astype("<u8")
        return base64.b64encode(numbers.tobytes()).decode()

    @classmethod
    def from_text(cls, text: str) -> TrainingEpisodes:
        """Read what :meth:`to_text` returned. Raises :class:`DatasetError` for anything else."""
        try:
            numbers = np.frombuffer(base64.b64decode(text, validate=True), "<u8").astype(np.uint64)
            return cls(numbers[:-1], int(numbers[-1]))
        except (ValueError, TypeError, IndexError) as error:
            raise DatasetError(
                f"fingerprints of episodes: expected base64, got another text: {error}"
            ) from error


def fingerprints(dataset: Dataset) -> Prints:
    """Return 64 bits for each closed episode, of its observations, actions and rewards: [E]."""
    prints = np.empty(len(dataset.episode_length), np.uint64)
    for number in range(len(prints)):
        episode = dataset.episode(number)
        digest = ContentDigest()
        for name, values in (
            ("o", episode.observations[:-1]),  # the last one is not in every format
            ("a", episode.actions),
            ("r", episode.rewards),
        ):
            digest.update(name, np.asarray(values))
        prints[number] = int(digest.hexdigests()[1][:16], 16)
    return prints
