"""The parts of the package ``minari`` that its reader and its writer need."""

from __future__ import annotations

from typing import Any, NamedTuple

from omcda_deploy.errors import MissingExtraError


class MinariPackage(NamedTuple):
    """Classes and names of Minari, and gymnasium's spaces."""

    storage: Any  # class of a dataset on the disk
    episode: Any  # class of an episode to be stored
    identity: Any  # pattern of a dataset's id, with a group ``version``
    version: str
    spaces: Any


def import_minari() -> MinariPackage:
    """Import the package, which only its datasets need. Raises :class:`MissingExtraError`."""
    try:
        import minari
        import PIL.Image  # noqa: F401 (Minari's storage imports it, without requiring it)
        from gymnasium import spaces
        from minari.data_collector import EpisodeBuffer
        from minari.dataset.minari_dataset import DATASET_ID_RE
        from minari.dataset.minari_storage import MinariStorage
    except ImportError as error:
        raise MissingExtraError("minari", "minari") from error
    return MinariPackage(MinariStorage, EpisodeBuffer, DATASET_ID_RE, minari.__version__, spaces)
