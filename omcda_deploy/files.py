"""Files on the user's disk: written whole or not at all, their digests, TOML, and the cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from omcda_deploy.errors import ConfigError


@contextmanager
def atomic(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place when the block succeeds.

    When the block fails, the temporary is removed and ``path`` stays as it was. The temporary ends in the same
    suffix, which some writers (numpy, imageio) look at. The file gets the permissions that a plain ``open`` would
    give it: those of the file it replaces, else those of the umask.

    ``durable``: flush the content to the disk first, so that ``path`` holds the old or the new content even after
    a power cut; slow for large files. Raises :class:`OSError` as the writing itself does.
    """
    # Not the process id: servers in several containers may share a folder and have one process id.
    temporary = path.with_name(f".{path.name}.{uuid4().hex}{path.suffix}")
    try:
        yield temporary
        if durable:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        if path.exists():
            temporary.chmod(stat.S_IMODE(path.stat().st_mode))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a whole UTF-8 file, or leave the one that is there.

    Raises :class:`ConfigError` where it cannot be written.
    """
    try:
        with atomic(Path(path)) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path} ({error.strerror}): choose another place") from error


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON as :func:`write_text` does.

    Raises :class:`ValueError` for NaN and infinity, which are not JSON.
    """
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_toml(path: Path, content: str) -> dict[str, Any]:
    """Parse a TOML file; ``content`` names what should be in it, for the message.

    Raises :class:`ConfigError` for a file that does not exist or is not TOML.
    """
    if not path.is_file():
        state = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"{path} {state}: expected {content} (TOML)")
    try:
        return tomllib.loads(path.read_text())
    except ValueError as error:  # also for bytes that are not text
        raise ConfigError(f"{path} is not TOML: {error}") from error


def cache_folder() -> Path:
    """Folder for files that can be computed again: ``$OMCDA_CACHE``, else ``~/.cache/omcda-deploy``."""
    return Path(os.environ.get("OMCDA_CACHE") or Path.home() / ".cache" / "omcda-deploy")
