"""Configuration of a server: one TOML file, the same for every process of a team.

::

    [guard]                    # for every agent; omcda_deploy/guard.py describes the modes
    mode = "fallback"
    threshold = 0.5            # nats; default: the bundle's own
    distance_limit = 4.0       # refuse observations further from the training data; default: refuse none

    [guard.agents.agent_2]     # replaces [guard] for this agent
    mode = "blend"

    [releases]
    retire_s = 300.0           # seconds without a request until a version that is not current is unloaded

    [limits]
    concurrent_calls = 64      # concurrent unary calls (streams are limited separately)
    streams = 32               # open control streams, half of them for one connection
    connection_calls = 64      # calls, streams and watchers of one connection; clients keep further ones back
    message_bytes = 1048576
    rows = 4096                # rows of one request

    [recording]                # docs/recording.md
    folder = "recordings"      # default: none, until --record or an operator names one
    size_mb = 1024             # of all that is kept; the oldest is removed
    segment_s = 600.0          # seconds of one file

    [tls]                      # default: plaintext
    certificate = "server.pem"
    key = "server.key"
    client_ca = "clients.pem"  # every client must have a certificate of this authority; default: none needed

    [access]
    token_file = "tokens"      # one bearer token per line, and its holder's name; default: everybody may call
    admin_token_file = "admin-tokens"  # those that the admin port takes; default: those of token_file

Names of files are relative to the folder of the TOML file. The file can be read again while servers run
(:mod:`omcda_deploy.serve.reloading`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from omcda_deploy.errors import ConfigError, UnknownNameError
from omcda_deploy.files import read_toml
from omcda_deploy.guard import GuardSetting
from omcda_deploy.recordings.segments import RecordingLimits
from omcda_deploy.serve.security import Tls

C = TypeVar("C")
LARGEST = 2**31 - 1  # a C int, which gRPC takes


@dataclass(frozen=True)
class Limits:
    """Limits of a server's load; a call beyond them is answered RESOURCE_EXHAUSTED at once."""

    concurrent_calls: int = 64
    streams: int = 32
    connection_calls: int = 64
    message_bytes: int = 1 << 20
    rows: int = 4096

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"limits.{entry.name}: expected a whole number from 1 on, got {value!r}")
            if value > LARGEST:
                raise ConfigError(f"limits.{entry.name}: expected at most {LARGEST}, got {value}")

    @property
    def large_requests(self) -> int:
        """Number of requests that may wait for the thread of large ones."""
        return (self.concurrent_calls + 1) // 2

    @property
    def streams_of_one_connection(self) -> int:
        """Number of control streams that one connection may have: half, so that no client can have them all."""
        return (self.streams + 1) // 2


@dataclass(frozen=True)
class ServerConfig:
    """Contents of a configuration file. ``guards``: of single agents; ``guard``: of all others."""

    guard: GuardSetting = field(default_factory=GuardSetting)
    guards: Mapping[str, GuardSetting] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    retire_s: float = 300.0
    recording: RecordingLimits = field(default_factory=RecordingLimits)
    record_folder: Path | None = None
    tls: Tls | None = None
    token_file: Path | None = None
    admin_token_file: Path | None = None

    def require_reloadable(self, changed: ServerConfig) -> None:
        """Raise :class:`ConfigError` if ``changed`` differs in what a server that runs cannot change."""
        for entry, value, other in zip(_FIXED, self._fixed(), changed._fixed(), strict=True):
            if value != other:
                raise ConfigError(
                    f"{entry}: expected what the server was started with, got a change: restart it for that, or "
                    "take the change back"
                )

    def _fixed(self) -> tuple[object, ...]:
        limits = self.limits
        return (
            limits.message_bytes,
            limits.connection_calls,
            (self.recording, self.record_folder),
            self.tls,
            self.token_file is None,  # whether callers need any
        )

    def guards_of(self, agents: Iterable[str]) -> dict[str, GuardSetting]:
        """Return each agent's guard. Raises :class:`UnknownNameError` for a guard of another agent."""
        names = list(agents)
        for name in self.guards:
            if name not in names:
                raise UnknownNameError("agent of [guard.agents]", name, names)
        return {name: self.guards.get(name, self.guard) for name in names}


_FIXED = ("limits.message_bytes", "limits.connection_calls", "[recording]", "[tls]", "access.token_file")


def read_server_config(path: Path | None) -> ServerConfig:
    """Read a configuration file; without one, return the defaults.

    Raises :class:`ConfigError`, which names the file and the entry.
    """
    if path is None:
        return ServerConfig()
    values = read_toml(path, "a server configuration")
    try:
        _require_names("table", values, ("guard", "limits", "releases", "recording", "tls", "access"))
        guard = dict(_table("guard", values.get("guard", {})))
        agents = _table("guard.agents", guard.pop("agents", {}))
        recording = dict(_table("recording", values.get("recording", {})))
        folder = _file_name("recording.folder", recording.pop("folder", None), "a folder", path.parent)
        return ServerConfig(
            _build(GuardSetting, "guard", guard),
            {name: _build(GuardSetting, f"guard.agents.{name}", table) for name, table in agents.items()},
            _build(Limits, "limits", values.get("limits", {})),
            _retire_s(values.get("releases", {})),
            _build(RecordingLimits, "recording", recording),
            folder,
            _tls(values.get("tls"), path.parent),
            **_token_files(values.get("access", {}), path.parent),
        )
    except (ConfigError, UnknownNameError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _retire_s(values: Any) -> float:
    _require_names("entry of [releases]", _table("releases", values), ("retire_s",))
    seconds = values.get("retire_s", ServerConfig.retire_s)
    if type(seconds) not in (int, float) or not 0.0 <= seconds < math.inf:
        raise ConfigError(f"releases.retire_s: expected seconds from 0 on, got {seconds!r}")
    return float(seconds)


def _tls(values: Any, folder: Path) -> Tls | None:
    if values is None:
        return None
    names = [entry.name for entry in dataclasses.fields(Tls)]
    _require_names("entry of [tls]", _table("tls", values), names)
    for name in names:
        if name in values and not isinstance(values[name], str):
            raise ConfigError(f"tls.{name}: expected the name of a PEM file, got {values[name]!r}")
    if missing := {"certificate", "key"} - values.keys():
        raise ConfigError(f"tls: expected certificate and key, {' and '.join(sorted(missing))} is missing")
    return Tls(**{name: str(folder / value) for name, value in values.items()})


def _token_files(values: Any, folder: Path) -> dict[str, Path | None]:
    names = ("token_file", "admin_token_file")
    _require_names("entry of [access]", _table("access", values), names)
    return {name: _file_name(f"access.{name}", values.get(name), "a file", folder) for name in names}


def _file_name(entry: str, name: Any, kind: str, folder: Path) -> Path | None:
    """Return a name as a path that is relative to ``folder``; None for none."""
    if name is not None and not isinstance(name, str):
        raise ConfigError(f"{entry}: expected the name of {kind}, got {name!r}")
    return None if name is None else folder / name


def _build(kind: type[C], name: str, values: Any) -> C:
    names = [entry.name for entry in dataclasses.fields(kind)]  # type: ignore[arg-type]
    _require_names(f"entry of [{name}]", _table(name, values), names)
    return kind(**values)


def _table(name: str, values: Any) -> Mapping[str, Any]:
    if not isinstance(values, dict):
        raise ConfigError(f"{name}: expected a table [{name}], got {values!r}")
    return values


def _require_names(kind: str, values: Mapping[str, Any], choices: Iterable[str]) -> None:
    """Raise :class:`UnknownNameError` for a name in ``values`` that is no choice."""
    for name in values:
        if name not in choices:
            raise UnknownNameError(kind, name, choices)
