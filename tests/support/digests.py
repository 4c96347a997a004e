"""Digests of dataset files, computed apart from the package; and files as version 1 of the format wrote them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import h5py
import numpy as np


def digest_of(path: Path, version: int) -> str:
    """The digest that a file of this package should carry, from its bytes."""
    with h5py.File(path) as file:
        arrays = {name: file[name][:] for name in ("a", "avail", "d", "o", "r") if name in file}
        if version == 2:
            rows = len(file["s"])
            if not np.array_equal(file["s"][:], file["o"][:]):
                shared = file["omcda"].attrs["state"] == "shared"
                arrays["s"] = file["s"][:, 0] if shared else file["s"][:].reshape(rows, -1)
            arrays["timeouts"] = file["omcda/episode_timeouts"][:].astype(np.uint8)
    lines = [
        f"{name} {arrays[name].shape} {hashlib.sha256(np.ascontiguousarray(arrays[name]).tobytes()).hexdigest()}"
        for name in sorted(arrays)
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def as_version_1(path: Path) -> Path:
    """Rewrite a file of version 2 as version 1 wrote it: only its version and its digest differ."""
    digest = digest_of(path, 1)
    with h5py.File(path, "a") as file:
        file["omcda"].attrs["format_version"] = 1
        file["omcda"].attrs["digest"] = digest
    return path
