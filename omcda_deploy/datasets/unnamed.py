"""Files in this package's own layout, by other programs, that do not say of which team they are.

Published ones are recognised and read as they are (:mod:`omcda_deploy.datasets.omiga_header`); others are imported
with the user's words about the team. As they say nothing of time limits, an episode as long as the team's was ended
by it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from omcda_deploy.datasets import Claim, Dataset, Episode, Recording
from omcda_deploy.datasets.formats.omiga_hdf5 import read
from omcda_deploy.datasets.hdf5 import GROUP, opened
from omcda_deploy.datasets.omiga_header import published_task, shape_of
from omcda_deploy.datasets.teams import Sizes, claimed_team, team_of
from omcda_deploy.spec import ActionSpec

NAME = "omiga_hdf5"  # of the format

logger = logging.getLogger(__name__)


def needs_words(path: Path, claim: Claim) -> bool:
    """Test if a file is to be imported: it has no team, and the user describes one, or nothing else tells it.

    A known task alone is no description, as whatever reads the file takes its name.
    """
    with opened(path, "download it again") as file:
        if GROUP in file and "spec" in file[GROUP].attrs:
            return False
        if claim.team is not None or claim.control_rate is not None:
            return True
        return claim.task is None and published_task(path, shape_of(file, path)) is None


@contextmanager
def open_recording(path: Path, claim: Claim) -> Iterator[Recording]:
    """Open a file without a team. Raises as :func:`~omcda_deploy.datasets.teams.team_of` and the reader do."""
    with opened(path, "download it again") as file:
        shape, size = shape_of(file, path), file["s"].shape[2]
    claimed = claimed_team(claim)
    # One state that all agents share, if the team has it so; else a part of it for each agent.
    state_size = size if claimed is not None and claimed.state_size == size else size * shape.agents
    action = ActionSpec("discrete" if shape.discrete else "continuous", shape.action_size)
    spec = team_of(path, claim, Sizes.of_arrays(shape.agents, shape.observation_size, action, state_size))
    dataset = read(path, spec)
    if left := dataset.transitions.size - int(dataset.episode_length.sum()):
        logger.warning("%s: the last %d rows are no whole episode and are left out", path, left)
    count = len(dataset.episode_length)
    yield Recording(spec, count, (_episode(dataset, number) for number in range(count)))


def _episode(dataset: Dataset, number: int) -> Episode:
    episode = dataset.episode(number)
    return replace(episode, timeout=len(episode) == dataset.spec.episode_limit, episode_return=None)
