"""How a server is run: one TOML file, the same for every process of a team.

::

    [guard]                    # of every agent; omcda_deploy/guard.py says what the modes do
    mode = "fallback"
    threshold = 0.5            # nats; the bundle's own where left out
    distance_limit = 4.0       # refuse observations further from the training data; none where left out

    [guard.agents.agent_2]     # instead of the above, for this agent
    mode = "blend"

    [limits]
    concurrent_calls = 64      # waiting or answered at once, beside the streams
    streams = 16               # open control streams
    message_bytes = 4194304
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from omcda_deploy.errors import ConfigError, UnknownNameError
from omcda_deploy.guard import GuardSetting

C = TypeVar("C")


@dataclass(frozen=True)
class Limits:
    """What a server takes in at once; what is beyond gets RESOURCE_EXHAUSTED at once."""

    concurrent_calls: int = 64
    streams: int = 16
    message_bytes: int = 4 << 20

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"limits.{entry.name}: expected a whole number from 1 on, got {value!r}")


@dataclass(frozen=True)
class ServerConfig:
    """``guards`` are those of single agents, ``guard`` is everybody else's."""

    guard: GuardSetting = field(default_factory=GuardSetting)
    guards: Mapping[str, GuardSetting] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)

    def guards_of(self, agents: Iterable[str]) -> dict[str, GuardSetting]:
        """Raises :class:`UnknownNameError` for a guard of an agent that is none of ``agents``."""
        names = list(agents)
        for name in self.guards:
            if name not in names:
                raise UnknownNameError("agent of [guard.agents]", name, names)
        return {name: self.guards.get(name, self.guard) for name in names}


def read_server_config(path: Path | None) -> ServerConfig:
    """The defaults without a file. Raises :class:`ConfigError` and :class:`UnknownNameError`, naming the entry."""
    if path is None:
        return ServerConfig()
    if not path.is_file():
        raise ConfigError(f"{path} does not exist: expected a server configuration (TOML)")
    try:
        values = tomllib.loads(path.read_text())
    except ValueError as error:  # also bytes that are no text
        raise ConfigError(f"{path} is not TOML: {error}") from error
    try:
        _require_names("table", values, ("guard", "limits"))
        guard = dict(_table("guard", values.get("guard", {})))
        agents = _table("guard.agents", guard.pop("agents", {}))
        return ServerConfig(
            _build(GuardSetting, "guard", guard),
            {name: _build(GuardSetting, f"guard.agents.{name}", table) for name, table in agents.items()},
            _build(Limits, "limits", values.get("limits", {})),
        )
    except (ConfigError, UnknownNameError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _build(kind: type[C], name: str, values: Any) -> C:
    known = [entry.name for entry in dataclasses.fields(kind)]  # type: ignore[arg-type]
    _require_names(f"entry of [{name}]", _table(name, values), known)
    return kind(**values)


def _table(name: str, values: Any) -> Mapping[str, Any]:
    if not isinstance(values, dict):
        raise ConfigError(f"{name}: expected a table [{name}], got {values!r}")
    return values


def _require_names(kind: str, values: Mapping[str, Any], known: Iterable[str]) -> None:
    for name in values:
        if name not in known:
            raise UnknownNameError(kind, name, known)
