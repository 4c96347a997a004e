"""Saving and loading of training state: tensors and plain values only, written atomically."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from omcda_deploy.errors import ConfigError


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` so that ``path`` holds either the old content or all of the new, even after a power cut."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_state(path: Path, device: str = "cpu") -> dict[str, Any]:
    """Read what :func:`save_state` wrote; never unpickles code. Raises :class:`ConfigError` for a damaged file."""
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: expected a file that training wrote") from None
    except Exception as error:  # torch raises many types for truncated archives
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{path} is damaged ({first}): resume from another checkpoint") from error
    return state
