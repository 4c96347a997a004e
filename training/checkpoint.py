"""Saving and loading of training state: tensors and plain values only, written atomically."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from omcda_deploy.errors import ConfigError
from omcda_deploy.files import atomic


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` so that ``path`` holds either the old content or all of the new, even after a power cut.

    Raises :class:`OSError` where it cannot be written.
    """
    content = io.BytesIO()  # torch itself reports a full disk as a RuntimeError without the reason
    torch.save(state, content)
    with atomic(path, durable=True) as temporary:
        temporary.write_bytes(content.getbuffer())


def load_state(path: Path) -> dict[str, Any]:
    """Read a file of :func:`save_state` onto the CPU, without unpickling code.

    Modules and optimisers copy from it to their devices. Raises :class:`ConfigError` for a missing or damaged file.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: expected a file that training wrote") from None
    except Exception as error:  # torch raises many types for truncated archives
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{path} is damaged ({first}): restore it from a copy, or remove it") from error
    return state
