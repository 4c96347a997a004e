"""HDF5 files opened and written, and the names that readers and the writer share (formats/omiga_hdf5.py)."""

from __future__ import annotations

import errno
import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omcda_deploy.datasets import DIGEST_CONTENTS, DIGEST_VERSION
from omcda_deploy.errors import DatasetError, MissingExtraError

GROUP = "omcda"  # holds everything that OMIGA's files do not have
FORMAT_VERSION = DIGEST_VERSION  # a new one for each change of what the stored digest covers
READABLE_VERSIONS = tuple(DIGEST_CONTENTS)
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


class DamagedError(DatasetError):
    """A file is truncated or not HDF5."""


@contextmanager
def opened(path: Path, again: str) -> Iterator[Any]:
    """Open an existing HDF5 file for reading.

    Raises :class:`DamagedError` for what is truncated or no HDF5, in the block too, and :class:`DatasetError` for a
    file that is in use, cannot be locked or may not be read; ``again`` says how a damaged one is made anew.
    """
    h5py = import_h5py()
    try:
        with h5py.File(path, "r") as file:
            yield file
    except OSError as error:
        raise _unreadable(path, error, again) from error


def _unreadable(path: Path, error: OSError, again: str) -> DatasetError:
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    numbered = re.search(r"errno = (\d+)", said)  # h5py sets the attribute for some of them only
    number = error.errno or (int(numbered[1]) if numbered else 0)
    if number in (errno.EAGAIN, errno.EACCES) and "unable to lock" in said:
        return DatasetError(
            f"{path} is in use: another process has it open for writing, wait until it is closed"
        )
    if number in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
        return DatasetError(
            f"{path} cannot be locked on its file system ({os.strerror(number)}): set HDF5_USE_FILE_LOCKING=FALSE, "
            "and let nobody write it meanwhile"
        )
    if "already open for write" in said:
        return DatasetError(
            f"{path} was not closed by the program that writes it: wait for it, or, if it was killed, {again}"
        )
    if number and number != errno.EINVAL:  # the system's own; HDF5 has none for what is in a file
        return DatasetError(
            f"{path} cannot be read ({os.strerror(number)}): have it made readable, or {again}"
        )
    return DamagedError(f"{path} is truncated or not HDF5: {again} ({said})")


class Sink(io.RawIOBase):
    """A new file for HDF5 to write, in which no write fails as HDF5 sees it.

    HDF5 crashes the process when it cannot write what it has in its caches, on a full disk for instance, even as
    its file is closed. Here the content goes on in memory after the first failure, until :meth:`check`.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b", buffering=0)
        self._failure: OSError | None = None
        self._unwritten: list[tuple[int, bytes]] = []  # positions and contents, in the order they came
        self._position = self._size = 0

    def check(self) -> None:
        """Raise the :class:`OSError` of the first write that failed."""
        if self._failure is not None:
            raise self._failure

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        start, end = self._position, min(self._position + len(target), self._size)
        if end <= start:
            return 0
        target[: end - start] = os.pread(self._file.fileno(), end - start, start).ljust(end - start, b"\0")
        for position, content in self._unwritten:
            first, last = max(start, position), min(end, position + len(content))
            if first < last:
                target[first - start : last - start] = content[first - position : last - position]
        self._position = end
        return end - start

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        self._attempt(lambda: self._write(view))
        if self._failure is not None:
            self._unwritten.append((self._position, bytes(view)))
        self._position += len(view)
        self._size = max(self._size, self._position)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        self._size = self._position if size is None else size
        self._attempt(lambda: self._file.truncate(self._size))
        return self._size

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:
            self._failure = self._failure or error
        super().close()

    def _write(self, view: memoryview) -> None:
        written = 0
        while written < len(view):
            written += os.pwrite(self._file.fileno(), view[written:], self._position + written)

    def _attempt(self, call: Callable[[], object]) -> None:
        if self._failure is None:
            try:
                call()
            except OSError as error:
                self._failure = error
