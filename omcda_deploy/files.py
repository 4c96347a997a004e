"""Files of the user's: where this package keeps what it can make again, and how its TOML files are read."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

from omcda_deploy.errors import ConfigError


def cache_folder() -> Path:
    """``$OMCDA_CACHE``, else ``~/.cache/omcda-deploy``."""
    return Path(os.environ.get("OMCDA_CACHE") or Path.home() / ".cache" / "omcda-deploy")


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """Raises :class:`ConfigError` for a file that is missing or no TOML; ``what`` says what was expected of it."""
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"{path} {found}: expected {what} (TOML)")
    try:
        return tomllib.loads(path.read_text())
    except ValueError as error:  # also bytes that are no text
        raise ConfigError(f"{path} is not TOML: {error}") from error
