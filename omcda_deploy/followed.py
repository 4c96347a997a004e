"""Files that are read again when they change, such as those of tokens, which are replaced while processes run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from omcda_deploy.errors import ConfigError

T = TypeVar("T")

LOOK_S = 1.0  # between two looks at a file

log = logging.getLogger(__name__)


class Trouble:
    """Warns of a file once, until it can be read again: it may be wanted hundreds of times a second."""

    def __init__(self) -> None:
        self._told = ""

    def tell(self, error: ConfigError) -> None:
        if str(error) != self._told:
            self._told = str(error)
            log.warning("%s; the last contents stay", error)

    def end(self) -> None:
        self._told = ""


class FollowedFile(Generic[T]):
    """Contents of a file as ``read`` returns them, at most a second old; the last ones while it cannot be read.

    Raises :class:`ConfigError`, as ``read`` does, if it cannot be read at the start.
    """

    def __init__(self, path: Path, read: Callable[[Path], T]) -> None:
        self._path, self._read = path, read
        self._looked, self._stamp = time.monotonic(), _stamp(path)
        self._contents = read(path)
        self._trouble = Trouble()

    @property
    def contents(self) -> T:
        now = time.monotonic()
        if now - self._looked >= LOOK_S:
            self._looked = now
            self._look()
        return self._contents

    def _look(self) -> None:
        try:
            if (stamp := _stamp(self._path)) != self._stamp:
                self._contents, self._stamp = self._read(self._path), stamp
                log.info("%s was read again", self._path)
            self._trouble.end()
        except ConfigError as error:  # half-written, or missing for a moment
            self._trouble.tell(error)


def _stamp(path: Path) -> tuple[int, ...]:
    """Return what differs if the file was changed or replaced; nothing if there is none."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_mtime_ns, status.st_size, status.st_ino
