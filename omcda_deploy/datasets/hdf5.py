"""Names that the reader and the writer of HDF5 datasets share; the layout is in formats/omiga_hdf5.py."""

from __future__ import annotations

from typing import Any

from omcda_deploy.errors import MissingExtraError

GROUP = "omcda"  # holds everything that OMIGA's files do not have
FORMAT_VERSION = 1
RESERVED_ATTRIBUTES = frozenset(
    {"spec", "digest", "format_version", "state"}
)  # of the group; the rest is metadata


def import_h5py() -> Any:
    """Import h5py, which only datasets need. Raises :class:`MissingExtraError`."""
    try:
        import h5py
    except ImportError as error:
        raise MissingExtraError("h5py", "data") from error
    return h5py
