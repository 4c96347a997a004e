"""The versions of a team that a server holds, and which of them answers.

A server is given one bundle, or a folder of bundles named by version (:mod:`omcda_deploy.serve.repository`).

A request may name its version, so that an episode keeps one version while others are loaded and unloaded; a request
that names none is answered by the current one. A version that is no longer current is unloaded when no request has
named it for ``releases.retire_s`` seconds. All versions of a team have one contract.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from omcda_deploy.errors import BundleError, ConfigError, ContractError, UnknownNameError
from omcda_deploy.serve.batches import return_free_memory
from omcda_deploy.serve.config import ServerConfig
from omcda_deploy.serve.meter import Histogram
from omcda_deploy.serve.recording import FlightRecorder, Request
from omcda_deploy.serve.repository import Pin, Repository
from omcda_deploy.serve.session import NAME_LIMIT, Models, Session
from omcda_deploy.serve.status import ExhaustedError, OtherBundleError, RequestError, StateError
from omcda_deploy.serve.wire import WireTensors
from omcda_deploy.spec import require_same_contract

log = logging.getLogger(__name__)

T = TypeVar("T")
LEAST_PRIORITY = 19
LOADING_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds
# Pauses after each model that is loaded or freed: they keep the milliseconds in which requests wait rare.
LOAD_PAUSE_S, CLOSE_PAUSE_S = 0.2, 0.02


def _lower_priority() -> None:
    """Lower this thread's priority, on systems that have priorities of threads."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LEAST_PRIORITY)


def _free(models: Models) -> None:
    """Close models and return their memory, of which pieces too small for the next version would be left."""
    models.close(CLOSE_PAUSE_S)
    return_free_memory()


def _require_named(version: str) -> None:
    """Refuse an empty version, which means the current one only in requests for steps."""
    if not version:
        raise RequestError("expected the name of a version, got an empty one")


class HeldVersion(NamedTuple):
    """A version that a server holds, and the seconds since the last request for it."""

    models: Models
    idle_s: float


class _Slot:
    """A version's place among those held, with the time of the last request for it."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self.last_used = time.monotonic()


class Releases:
    """The versions of a team that one server process holds.

    Its coroutines change which versions those are; a lock lets one of them run at a time.
    """

    def __init__(
        self, source: str | Path, models: Sequence[str], config: ServerConfig, pin: Pin | None = None
    ) -> None:
        """Load the current version, and the previous one for episodes that outlive a server which died.

        ``source``: a bundle or a folder of versions. ``models``: agents or ``team``; all if empty. ``pin``: as for
        :meth:`Repository.begin`.

        Raises :class:`BundleError`, :class:`ConfigError`, and :class:`UnknownNameError` for an unknown model.
        """
        self._repository = Repository(Path(source))
        self._names, self._config = models, config
        self.current, self.previous = self._repository.begin(pin)
        self.switched: Callable[[], object] | None = None  # called after each switch
        self._change = ""  # name of the last switch
        self.evidence = self._repository.evidence(self.current)  # on which the current version was promoted
        self.replaced_evidence = ""  # on which the one was that the last switch replaced
        self.shadow = ""
        first = self._load(self.current)
        self.spec = first.bundle.spec
        self.contract_hash = first.contract_hash
        self._slots = {self.current: _Slot(first)}
        self._answered = {self.current: first.digest}  # of the versions that were current, when they were
        if self.previous:
            try:
                self._hold(self._load(self.previous))
            except (BundleError, ConfigError, ContractError) as error:
                log.warning("version %s, which answered before, is not held: %s", self.previous, error)
        self.answered: Callable[[str, str], None] | None = (
            None  # called with model and version of each answer
        )
        self.recorder: FlightRecorder | None = None
        self._lock = asyncio.Lock()
        self.loading = Histogram(LOADING_BOUNDS)  # seconds of each load
        self._worker = ThreadPoolExecutor(1, "releases", _lower_priority)

    def find(self, name: str, version: str, digest: str = "") -> Session:
        """Return a model's session; an empty version is the current one, an empty digest any bundle.

        Raises :class:`UnknownNameError`, and :class:`OtherBundleError` for a version that has another digest.
        """
        models = self.models(version)
        if digest and digest != models.digest:
            # Clients know a version that is not held by the first two words, and take it for a missed answer.
            raise OtherBundleError(
                f"unknown version {models.version} of bundle {digest[:12]}: it is {models.digest[:12]} here. "
                "Begin a new episode, or connect anew if all episodes are to have one bundle"
            )
        return models.find(name)

    def models(self, version: str = "") -> Models:
        """Return a version's models and restart its idle time. Raises :class:`UnknownNameError`."""
        slot = self._slots.get(version or self.current)
        if slot is None:
            raise UnknownNameError("version", version[:NAME_LIMIT], self._slots)
        slot.last_used = time.monotonic()
        return slot.models

    @property
    def pin(self) -> Pin:
        """The versions with which another server of this team has to start."""
        return Pin(self.current, self._slots[self.current].models.digest, self.previous)

    def held_versions(self) -> Iterator[HeldVersion]:
        """Yield the versions held, from the lowest."""
        now = time.monotonic()
        slots = list(self._slots.values())  # a copy, as metrics are read in another thread
        for slot in sorted(slots, key=lambda slot: int(slot.models.version)):
            yield HeldVersion(slot.models, now - slot.last_used)

    def answer(
        self, session: Session, tensors: WireTensors, request: Request | None = None
    ) -> dict[str, bytes]:
        """Answer as :meth:`Session.answer`, and compare the action with the shadow's if there is one.

        ``request``: which held ``tensors``; it is recorded with the answer if there is a recorder.

        Raises :class:`ExhaustedError` for more rows than a request may have.
        """
        limit = self._config.limits.rows
        if tensors.batch > limit:
            session.decode(tensors)  # rows that the request does not contain are an error in the request
            raise ExhaustedError(
                f"{session.name}: expected at most {limit} rows in a request, got {tensors.batch}: send smaller "
                "batches, or raise limits.rows"
            )
        answer = session.answer(tensors)
        if self.answered is not None:
            self.answered(session.name, session.version)
        if self.recorder is not None and request is not None:
            self.recorder.record(session, tensors, request, answer)
        if self.shadow and session.version == self.current:
            self._compare_with_shadow(session, tensors, answer["action"])
        return answer

    def _compare_with_shadow(self, session: Session, tensors: WireTensors, action: bytes) -> None:
        """Count how the shadow's action differs; whatever the shadow does, the answer stands."""
        try:
            with np.errstate(all="ignore"):
                shadow_action = self._slots[self.shadow].models.find(session.name).action(tensors)
        except Exception:
            session.meter.shadow_failures += 1
        else:
            session.meter.compare(session.outputs["action"].decode(action, tensors.batch), shadow_action)

    def _forget_comparison(self) -> None:
        """Begin anew to compare the current version with the shadow."""
        for session in self.models().sessions.values():
            session.meter.reset_comparison()

    async def load(self, version: str, *, as_held: bool = False) -> None:
        """Load and warm up a version outside the event loop's thread. Does nothing if it is held already.

        ``as_held``: whether what is held may be another bundle than the folder has under this name by now; what is
        not held any more must then be the bundle that answered. Raises :class:`StateError` for another one.
        """
        _require_named(version)
        async with self._lock:
            if version in self._slots:
                await self._compare_with_folder(version, as_held)
                return
            began = time.perf_counter()
            loaded = await self._in_worker(self._load, version, LOAD_PAUSE_S)
            if as_held and (digest := self._answered.get(version, loaded.digest)) != loaded.digest:
                raise StateError(
                    f"version {version} was bundle {digest[:12]} when it answered, is not held any more and is "
                    f"{loaded.digest[:12]} on disk: restore it, or name a version with release switch"
                )
            self.loading.add(time.perf_counter() - began)
            self._hold(loaded)

    async def switch(
        self,
        version: str,
        expected: str = "",
        previous: str | None = None,
        evidence: str = "",
        *,
        change: str = "",
        undoes: str = "",
        as_held: bool = False,
    ) -> None:
        """Make a version the current one.

        ``expected``: the version that it replaces, if that matters. ``previous``: the version that counts from then
        on as the one before; the one that it replaces if None. ``evidence``: why, in one line. ``change``: a name
        of this switch; ``undoes``: that of the switch before, if it is to be undone. ``as_held``: as for
        :meth:`load`.

        Raises :class:`UnknownNameError` if it is not held (load it first), and :class:`StateError` if ``expected``
        is not current, ``undoes`` was not the last switch, or the folder has another bundle under this name.
        """
        _require_named(version)
        async with self._lock:
            self.models(version)
            if expected not in ("", self.current):
                raise StateError(
                    f"expected version {expected[:NAME_LIMIT]} to be current, version {self.current} is: somebody "
                    "else has switched meanwhile, look at the status and decide again"
                )
            if undoes not in ("", self._change):
                raise StateError("the switch to undo was not the last one: nothing was changed")
            if not undoes:
                await self._compare_with_folder(version, as_held)
            if version == self.current and previous is None:
                return
            previous = self.current if previous is None else previous
            if previous not in ("", *self._slots):  # one that is held may be gone from the disk
                await self._in_worker(self._repository.require, previous)
            # Writing to a disk takes milliseconds, in which the event loop goes on answering.
            await self._in_worker(self._repository.write_current, version, previous, evidence)
            if version == self.shadow:
                self.shadow = ""
            self.models(self.current)  # its idle time begins now
            self.previous, self.current = previous, version
            self._answered[version] = self.models().digest
            self._forget_comparison()  # what it counted when it answered last was perhaps of another shadow
            self._change = change
            self.replaced_evidence, self.evidence = self.evidence, evidence
            if self.switched is not None:
                self.switched()

    async def unload(self, version: str) -> None:
        """Stop holding a version. Raises :class:`StateError` if it is the current one or the shadow."""
        _require_named(version)
        async with self._lock:
            self.models(version)
            if version in (self.current, self.shadow):
                raise StateError(
                    f"version {version} is in use: switch to another version, or end the shadow, first"
                )
            await self._drop(version)

    async def set_shadow(self, version: str) -> None:
        """Make a version the shadow, which runs on every request and answers none; an empty one ends it."""
        async with self._lock:
            if version:
                self.models(version)
                if version == self.current:
                    raise StateError(f"version {version} answers: expected another one as its shadow")
                await self._compare_with_folder(version)
            self.shadow = version
            self._forget_comparison()

    async def retire(self) -> list[str]:
        """Unload the versions that no request has named for ``retire_s`` seconds, and return their names."""
        async with self._lock:
            idle = [
                models.version
                for models, seconds in self.held_versions()
                if models.version not in (self.current, self.shadow) and seconds > self._config.retire_s
            ]
            for version in idle:
                await self._drop(version)
            return idle

    async def reconfigure(self, config: ServerConfig, *, apply: bool = True) -> None:
        """Take over guards, rows of a request and ``retire_s`` of a configuration, for all versions or for none.

        A model whose guard changes counts anew. ``apply``: False to look for errors only. Raises
        :class:`ConfigError` for guards that a version cannot have.
        """
        async with self._lock:
            changed = await self._in_worker(self._guarded, config)
            if apply:
                self._config = config
                for version, sessions in changed.items():
                    self._slots[version].models.sessions.update(sessions)

    def _guarded(self, config: ServerConfig) -> dict[str, dict[str, Session]]:
        """Return the sessions of all versions held, with the guards of ``config``."""
        changed = {}
        for models, _ in self.held_versions():
            try:
                guards = config.guards_of(models.bundle.spec.names)
                changed[models.version] = {
                    name: session.with_guards(guards) for name, session in models.sessions.items()
                }
            except (ConfigError, UnknownNameError) as error:
                raise ConfigError(f"version {models.version}: {error}") from error
        return changed

    def release_memory(self) -> None:
        """Free the memory that large batches needed."""
        for models, _ in list(self.held_versions()):
            for session in list(models.sessions.values()):
                session.release_memory()

    def _hold(self, loaded: Models) -> None:
        """Hold a loaded version. Raises :class:`ContractError` if it was made for another team."""
        served, other = f"version {self.current}, which is served,", f"version {loaded.version}"
        require_same_contract(self.spec, loaded.bundle.spec, served, other)
        self._slots[loaded.version] = _Slot(loaded)

    async def _compare_with_folder(self, version: str, as_held: bool = False) -> None:
        """Raise :class:`StateError` if the folder has another bundle under a held version's name, or log it.

        An operator means the folder's, and so does the next start.
        """
        models = self._slots[version].models
        try:
            models.folder_digest = await self._in_worker(self._repository.digest, version)
        except BundleError:
            models.folder_digest = ""
        if models.folder_digest == models.digest:
            return
        found = models.folder_digest[:12] or "no bundle"
        difference = f"version {version} is held as bundle {models.digest[:12]} and is {found} on disk"
        if not as_held:
            raise StateError(
                f"{difference}: unload it first, or give the new bundle a number of its own; only release rollback "
                "takes it as it is held"
            )
        log.warning("%s, which the next start would read: restore it", difference)

    async def _drop(self, version: str) -> None:
        await self._in_worker(_free, self._slots.pop(version).models)

    async def _in_worker(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function in the worker, a thread of lower priority than the one that answers."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *arguments)

    def _load(self, version: str, pause_s: float = 0.0) -> Models:
        bundle = self._repository.read(version)
        return Models(bundle, self._names, self._config.guards_of(bundle.spec.names), version, pause_s)
