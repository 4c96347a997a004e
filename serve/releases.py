"""The versions of a team that a server holds, and which of them answers.

A server is given one bundle, or a folder of bundles named by version::

    releases/1/bundle.json …
    releases/2/bundle.json …
    releases/current              the version that answers, and below it the one before; the highest where there is
                                  no such file

A request may name its version, and so an episode stays with one while others come and go; a request that names none
is answered by the current one. A version that is no longer current stays until nobody has asked for it for
``releases.retire_s`` seconds. All versions of a team have one contract.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.bundle import MANIFEST, Bundle, read_bundle
from omcda_deploy.errors import BundleError, ConfigError, ContractError, UnknownNameError
from omcda_deploy.serve.config import ServerConfig
from omcda_deploy.serve.meter import Histogram
from omcda_deploy.serve.session import NAME_LIMIT, Models, Session
from omcda_deploy.serve.status import ExhaustedError, RequestError, StateError
from omcda_deploy.spec import require_same_contract

log = logging.getLogger(__name__)

T = TypeVar("T")
ONLY = "1"  # version of a bundle that is served by itself
CURRENT = "current"
LEAST_PRIORITY = 19
LOADING_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds
# Pauses after each model of a version that comes or goes: the milliseconds in which requests wait stay rare.
LOAD_PAUSE_S, CLOSE_PAUSE_S = 0.2, 0.02


class Repository:
    """The bundles on disk by version."""

    def __init__(self, source: Path) -> None:
        self._source = source
        self._single = (source / MANIFEST).is_file()

    def versions(self) -> list[str]:
        """Raises :class:`BundleError` where there is none."""
        if self._single:
            return [ONLY]
        found = [
            path.name
            for path in (self._source.iterdir() if self._source.is_dir() else ())
            if path.name.isdecimal() and (path / MANIFEST).is_file()
        ]
        if not found:
            raise BundleError(
                f"{self._source}: expected a bundle, or a folder of bundles named 1, 2, …, found none. Make one "
                "with  omcda-deploy export"
            )
        return sorted(found, key=int)

    def read(self, version: str) -> Bundle:
        if version not in (known := self.versions()):
            raise UnknownNameError("version", version[:NAME_LIMIT], known)
        return read_bundle(self._source if self._single else self._source / version)

    def current(self) -> tuple[str, str]:
        """The version to answer, and the one that did before; that is empty where none is known, or gone."""
        known = self.versions()
        note = self._source / CURRENT
        if self._single or not note.is_file():
            return known[-1], ""
        version, previous = [*note.read_text(errors="replace").split(), "", ""][:2]
        if version not in known:
            raise BundleError(
                f"{note} says {version!r}: expected one of {', '.join(known)}; correct or remove it"
            )
        return version, previous if previous in known else ""

    def note_current(self, version: str, previous: str) -> None:
        """Remember both for the next start. Raises :class:`ConfigError` where the folder cannot be written."""
        if self._single:
            return
        # Servers in containers may share the folder, and have one process id.
        temporary = self._source / f".{CURRENT}.{uuid4().hex}"
        try:
            temporary.write_text(f"{version}\n{previous}\n")
            temporary.replace(self._source / CURRENT)
        except OSError as error:
            raise ConfigError(f"{self._source / CURRENT} cannot be written: {error.strerror}") from error


def _stand_back() -> None:
    """Lower this thread's priority, where the system knows such a thing."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LEAST_PRIORITY)


def _free(models: Models) -> None:
    """Close them, and return what glibc would keep in pieces too small for the next version."""
    models.close(CLOSE_PAUSE_S)
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # of glibc alone
        trim(0)


def _require_named(version: str) -> None:
    """An empty version is the current one in a request of a step; here it says nothing."""
    if not version:
        raise RequestError("expected the name of a version, got an empty one")


class _Held:
    def __init__(self, models: Models) -> None:
        self.models = models
        self.used = time.monotonic()


class Releases:
    """What one server process holds of a team. Its coroutines are for one caller at a time."""

    def __init__(self, source: str | Path, models: Sequence[str], config: ServerConfig) -> None:
        self._repository = Repository(Path(source))
        self._names, self._config = models, config
        self.current, self.previous = self._repository.current()
        self.shadow = ""
        first = self._load(self.current)
        self.spec = first.bundle.spec
        self.contract_hash = first.contract_hash
        self._held = {self.current: _Held(first)}
        if self.previous:  # of episodes that outlive a server which died
            try:
                self._hold(self._load(self.previous))
            except (BundleError, ConfigError, ContractError) as error:
                log.warning("version %s, which answered before, is not held: %s", self.previous, error)
        self._lock = asyncio.Lock()
        self.loading = Histogram(LOADING_BOUNDS)  # seconds of each load
        self._worker = ThreadPoolExecutor(1, "releases", _stand_back)

    def find(self, name: str, version: str) -> Session:
        """The session of a model; an empty version is the current one. Raises :class:`UnknownNameError`."""
        return self.models(version).find(name)

    def models(self, version: str = "") -> Models:
        held = self._held.get(version or self.current)
        if held is None:
            raise UnknownNameError("version", version[:NAME_LIMIT], self._held)
        held.used = time.monotonic()
        return held.models

    def held(self) -> Iterator[tuple[Models, float]]:
        """Every version's models, and the seconds since they were asked for last, by version."""
        now = time.monotonic()
        held_now = list(self._held.values())  # metrics are read in another thread
        for held in sorted(held_now, key=lambda held: int(held.models.version)):
            yield held.models, now - held.used

    def answer(self, session: Session, given: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """As :meth:`Session.answer`; where there is a shadow, it runs too and the difference is noted.

        Raises :class:`ExhaustedError` for more rows than a request may have.
        """
        limit = self._config.limits.rows
        if (rows := max(map(len, given.values()), default=0)) > limit:
            raise ExhaustedError(
                f"{session.name}: expected at most {limit} rows in a request, got {rows}: send smaller batches, or "
                "raise limits.rows"
            )
        outputs = session.answer(given)
        if self.shadow and session.version == self.current:
            try:
                with np.errstate(all="ignore"):
                    other = self._held[self.shadow].models.find(session.name).act(given)
            except Exception:  # whatever a shadow does, the answer stands
                session.meter.shadow_failures += 1
            else:
                session.meter.compare(outputs["action"], other)
        return outputs

    def step(
        self, session: Session, observation: bytes, noise: bytes, mask: bytes
    ) -> dict[str, bytes] | None:
        """As :class:`omcda_deploy.serve.step.Step`; nothing is ordinary where there is a shadow."""
        if session.step is None or (self.shadow and session.version == self.current):
            return None
        return session.step(observation, noise, mask)

    async def load(self, version: str) -> None:
        """Load and warm up, beside the event loop. Does nothing for a version that is held."""
        _require_named(version)
        async with self._lock:
            if version in self._held:
                return
            began = time.perf_counter()
            loaded = await self._beside(self._load, version, LOAD_PAUSE_S)
            self.loading.add(time.perf_counter() - began)
            self._hold(loaded)

    async def switch(self, version: str) -> None:
        """Raises :class:`UnknownNameError` for a version that is not held: load it first."""
        _require_named(version)
        async with self._lock:
            self.models(version)
            if version == self.shadow:
                self.shadow = ""
            if version != self.current:
                # Beside the event loop: disks take milliseconds.
                await self._beside(self._repository.note_current, version, self.current)
                self.models(self.current)  # its idle time starts now
                self.previous, self.current = self.current, version

    async def unload(self, version: str) -> None:
        _require_named(version)
        async with self._lock:
            self.models(version)
            if version in (self.current, self.shadow):
                raise StateError(
                    f"version {version} is in use: switch to another version, or end the shadow, first"
                )
            await self._give_up(version)

    async def follow(self, version: str) -> None:
        """Make a version the shadow; an empty one ends it."""
        async with self._lock:
            if version:
                self.models(version)
                if version == self.current:
                    raise StateError(f"version {version} answers: expected another one as its shadow")
            self.shadow = version
            for session in self.models().sessions.values():
                session.meter.forget_comparison()

    async def retire(self) -> list[str]:
        """Give up versions that nobody has asked for in a while; returns them."""
        async with self._lock:
            idle = [
                models.version
                for models, seconds in self.held()
                if models.version not in (self.current, self.shadow) and seconds > self._config.retire_s
            ]
            for version in idle:
                await self._give_up(version)
            return idle

    def _hold(self, loaded: Models) -> None:
        """Raises :class:`ContractError` where it was made for another team."""
        served, other = f"version {self.current}, which is served,", f"version {loaded.version}"
        require_same_contract(self.spec, loaded.bundle.spec, served, other)
        self._held[loaded.version] = _Held(loaded)

    async def _give_up(self, version: str) -> None:
        await self._beside(_free, self._held.pop(version).models)

    async def _beside(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run in another thread, which stands back behind the one that answers."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *arguments)

    def _load(self, version: str, pause_s: float = 0.0) -> Models:
        bundle = self._repository.read(version)
        return Models(bundle, self._names, self._config.guards_of(bundle.spec.names), version, pause_s)
