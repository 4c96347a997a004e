"""The bundles of a team on disk by version, and the file that says which of them is current.

::

    releases/1/bundle.json …
    releases/2/bundle.json …
    releases/current              a line each: the version that answers, the one before (or nothing), and on what
                                  evidence the first was promoted, if on any

The first server to start on a folder without this file writes it: the highest version answers from then on. After
that only a switch changes it, so neither a folder that is copied there nor a restart makes another version answer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from omcda_deploy.bundle import MANIFEST, Bundle, read_bundle
from omcda_deploy.errors import BundleError, ConfigError, UnknownNameError
from omcda_deploy.files import atomic, sha256

log = logging.getLogger(__name__)

ONLY_VERSION = "1"  # the name of the version where one bundle is served
CURRENT = "current"  # name of the file with the current and the previous version
NAME_LIMIT = 100  # characters of a version's name that are repeated
NOTE_READS, NOTE_PAUSE_S = 20, 0.05


class Pin(NamedTuple):
    """The bundle that answered last and the version before it: ``VERSION@DIGEST@PREVIOUS``, or without a previous.

    Servers tell it to their supervisor, and the supervisor to a server that it starts again.
    """

    version: str
    digest: str
    previous: str = ""

    def __str__(self) -> str:
        return "@".join(filter(None, self))

    @classmethod
    def parse(cls, text: str) -> Pin:
        """Read what :meth:`__str__` wrote."""
        version, digest, previous = (*text.split("@"), "", "")[:3]
        return cls(version, digest, previous)


class Repository:
    """The bundles on disk by version."""

    def __init__(self, source: Path) -> None:
        self._source = source
        self._file = source / CURRENT
        self._single = (source / MANIFEST).is_file()

    def versions(self) -> list[str]:
        """List the versions, from the lowest. Raises :class:`BundleError` if there is none."""
        if self._single:
            return [ONLY_VERSION]
        versions = [
            path.name
            for path in (self._source.iterdir() if self._source.is_dir() else ())
            if path.name.isdecimal() and (path / MANIFEST).is_file()
        ]
        if not versions:
            raise BundleError(
                f"{self._source}: expected a bundle, or a folder of bundles named 1, 2, …, found none. Make one "
                "with  omcda-deploy export"
            )
        return sorted(versions, key=int)

    def read(self, version: str) -> Bundle:
        """Read a version's bundle. Raises :class:`UnknownNameError` and :class:`BundleError`."""
        self.require(version)
        return read_bundle(self._folder(version))

    def require(self, version: str) -> None:
        """Raise :class:`UnknownNameError` for a version that does not exist."""
        if version not in (versions := self.versions()):
            raise UnknownNameError("version", version[:NAME_LIMIT], versions)

    def begin(self, pin: Pin | None = None) -> tuple[str, str]:
        """Return the current version and the previous one, which is empty if there is none any more.

        ``pin``: what the team has, whatever the folder says by now, as another team may have been switched. In a
        folder that does not say which version is current, ``pin`` or else the highest one is noted as such.

        Raises :class:`BundleError` if that version is damaged or, under its number, another bundle than ``pin``'s,
        and :class:`ConfigError` if it cannot be noted.
        """
        if pin is not None and (digest := self.digest(pin.version)) != pin.digest:
            raise BundleError(
                f"version {pin.version} of {self._source} was bundle {pin.digest[:12]} and is {digest[:12]} now: "
                "restore it, add a new bundle under a new number, and switch to that"
            )
        if not self._single and not self._file.exists():
            version = self.versions()[-1] if pin is None else pin.version
            self.read(version)  # a damaged version is not noted
            with suppress(FileExistsError), self._writing(), self._file.open("x") as file:
                file.write(f"{version}\n{'' if pin is None else pin.previous}\n")
        try:
            version, previous = (ONLY_VERSION, "") if self._single else self._noted()
        except BundleError as error:
            if pin is None:
                raise
            log.warning("%s. Version %s goes on, as it answered before", error, pin.version)
            version = pin.version
        if pin is None:
            return version, previous
        if version != pin.version:
            log.warning("%s says %s. Version %s goes on, as in its team", self._file, version, pin.version)
        return pin.version, pin.previous if pin.previous in self.versions() else ""

    def pin(self) -> Pin:
        """Return the current version with its digest, and the previous one; errors are those of :meth:`begin`."""
        version, previous = self.begin()
        return Pin(version, self.digest(version), previous)

    def digest(self, version: str) -> str:
        """Return the digest of a version's manifest, without verifying the files. Raises :class:`BundleError`."""
        try:
            return sha256(self._folder(version) / MANIFEST)
        except OSError as error:
            raise BundleError(f"{self._folder(version)} cannot be read: {error.strerror}") from error

    def _noted(self) -> tuple[str, str]:
        """Return the versions that the file names."""
        text = ""
        try:
            for _ in range(NOTE_READS):
                if text := self._file.read_text(errors="replace"):
                    break
                time.sleep(NOTE_PAUSE_S)  # another server has just created the file and is about to write it
        except OSError as error:
            raise BundleError(f"{self._file} cannot be read: {error.strerror}") from error
        version, previous, _ = _lines(text)
        if version not in (versions := self.versions()):
            raise BundleError(
                f"{self._file} says {version!r}: expected one of {', '.join(versions)}; correct it"
            )
        return version, previous if previous in versions else ""

    def evidence(self, version: str) -> str:
        """Return on what evidence ``version`` was promoted, if it is noted as current; else an empty string."""
        try:
            current, _, evidence = _lines(self._file.read_text(errors="replace"))
        except OSError:
            return ""
        return evidence if current == version else ""

    def write_current(self, version: str, previous: str, evidence: str = "") -> None:
        """Remember all for the next start; ``evidence`` is one line.

        Raises :class:`ConfigError` if the folder cannot be written.
        """
        if self._single:
            return
        with self._writing(), atomic(self._file) as temporary:
            temporary.write_text(
                "".join(f"{line}\n" for line in (version, previous, *filter(None, [evidence])))
            )

    def _folder(self, version: str) -> Path:
        return self._source if self._single else self._source / version

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except FileExistsError:
            raise
        except OSError as error:
            raise ConfigError(
                f"{self._file} cannot be written ({error.strerror}): make the folder writable, or write the number "
                "of the version that is to answer into this file yourself"
            ) from error


def _lines(text: str) -> tuple[str, str, str]:
    """Return the current version, the previous one and the evidence of the file's text, each empty if missing."""
    version, previous, evidence = (line.strip() for line in [*text.splitlines(), "", "", ""][:3])
    return version, previous, evidence
