"""Segments on the disk: appended to, closed when they are large or old, removed when all together are too large."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

from omcda_deploy.errors import ConfigError, MissingExtraError
from omcda_deploy.files import refusal, require_writable
from omcda_deploy.recordings import import_pyarrow

SUFFIX = ".arrows"
LEAST_MB = 8
PARTS, LARGEST_SEGMENT = 32, 64 << 20  # a segment is a 32nd of all that may be kept, or so many bytes
RESERVES = 256


@dataclass(frozen=True)
class RecordingLimits:
    """Limits of a recording. ``size_mb``: 10^6 bytes of all segments in its folder, whoever writes them.

    ``segment_s``: seconds after which a segment is closed, and a new one begun. Raises :class:`ConfigError`.
    """

    size_mb: int = 1024
    segment_s: float = 600.0

    def __post_init__(self) -> None:
        if type(self.size_mb) is not int or self.size_mb < LEAST_MB:
            raise ConfigError(
                f"recording size_mb: expected a whole number from {LEAST_MB} on, got {self.size_mb!r}"
            )
        if type(self.segment_s) not in (int, float) or not 1.0 <= self.segment_s < float("inf"):
            raise ConfigError(f"recording segment_s: expected seconds from 1 on, got {self.segment_s!r}")

    @property
    def segment_bytes(self) -> int:
        """Bytes after which a segment is closed."""
        return min(self.size_mb * 10**6 // PARTS, LARGEST_SEGMENT)

    @property
    def reserve_bytes(self) -> int:
        """Bytes for which a writer makes room at once, as looking at all segments takes time."""
        return self.size_mb * 10**6 // RESERVES


def require_recordable(folder: Path) -> None:
    """Raise unless a recording can be written into ``folder``, which need not exist.

    :class:`ConfigError` for a place that cannot be written, :class:`MissingExtraError` without pyarrow.
    """
    if find_spec("pyarrow") is None:  # a supervisor need not import it
        raise MissingExtraError("pyarrow", "record")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file: expected a folder to record into")
    require_writable(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot record into {folder} {refusal(error)}") from error


class _Pieces(io.RawIOBase):
    """Takes what a writer writes, until it is asked for."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, piece: Any) -> int:
        self._pieces.append(bytes(piece))
        return len(self._pieces[-1])

    def take(self) -> bytes:
        data = b"".join(self._pieces)
        self._pieces.clear()
        return data


class Segment:
    """A segment that is written, locked as long as it is open, for batches like ``first``, which is not appended.

    Raises :class:`OSError` where it cannot be made.
    """

    def __init__(self, folder: Path, first: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
        self.path = folder / f"{now}-{uuid4().hex[:8]}{SUFFIX}"
        self.began = time.monotonic()
        self.size = 0
        self._file = os.open(
            self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666
        )
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._pieces, self._empty = _Pieces(), first.slice(0, 0)
            self._writer = import_pyarrow().ipc.new_stream(self._pieces, first.schema)
            self._append(self._pieces.take())
        except BaseException:
            os.close(self._file)
            self.path.unlink(missing_ok=True)
            raise

    def append(self, batch: Any, metadata: Mapping[str, str]) -> None:
        """Append a record batch, so that it outlives this process and a power cut.

        Raises :class:`OSError` where it cannot be written; the segment is then as before.
        """
        self._writer.write_batch(batch, custom_metadata=metadata)
        self._append(self._pieces.take())

    def close(self, metadata: Mapping[str, str]) -> None:
        """End the segment with an empty batch. Where that cannot be written, it ends without."""
        try:
            with suppress(OSError):
                self._writer.write_batch(self._empty, custom_metadata={**metadata, "closed": "true"})
                self._writer.close()
                self._append(self._pieces.take())
        finally:
            os.close(self._file)

    def _append(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._file, self.size)
            raise
        self.size += len(data)


def make_room(folder: Path, size: int, limits: RecordingLimits) -> None:
    """Remove the oldest segments, until ``size`` more bytes keep all below the limit; not those that are open.

    Raises :class:`OSError` where only open ones are left.
    """
    segments = sorted(folder.glob(f"*/*{SUFFIX}"), key=lambda path: path.name)
    sizes: dict[Path, int] = {}
    for path in segments:
        with suppress(FileNotFoundError):  # another process has removed it
            sizes[path] = path.stat().st_size
    surplus = sum(sizes.values()) + size - limits.size_mb * 10**6
    for path, length in sizes.items():
        if surplus <= 0:
            return
        if not _is_open(path):
            path.unlink(missing_ok=True)
            surplus -= length
    if surplus > 0:
        raise OSError(errno.EDQUOT, f"open segments alone take all {limits.size_mb} MB of the recording")


def _is_open(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
