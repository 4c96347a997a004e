"""Reading and checking of algorithm settings: frozen dataclasses of plain numbers and strings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_type_hints

from omcda_deploy.errors import ConfigError, UnknownNameError

C = TypeVar("C")


def require(config: Any, **ranges: tuple[float, float]) -> None:
    """Raise :class:`ConfigError` unless each named field lies in its closed range."""
    for field, (low, high) in ranges.items():
        value = getattr(config, field)
        if not (low <= value <= high and math.isfinite(value)):
            expected = f"{low:g} to {high:g}" if math.isfinite(high) else f"a finite number from {low:g} on"
            raise ConfigError(f"{_owner(type(config))}.{field}: expected {expected}, got {value!r}")


def require_choice(config: Any, **choices: Sequence[str]) -> None:
    """Raise :class:`ConfigError` unless each named field holds one of its choices."""
    for field, allowed in choices.items():
        value = getattr(config, field)
        if value not in allowed:
            raise ConfigError(
                f"{_owner(type(config))}.{field}: expected one of {', '.join(allowed)}, got {value!r}"
            )


def build(kind: type[C], values: Mapping[str, Any]) -> C:
    """A config of ``kind`` from ``values``, whose strings (from the command line) are parsed by field type.

    Raises :class:`UnknownNameError` for a field that does not exist, :class:`ConfigError` for one that does not
    parse or is out of range.
    """
    types = get_type_hints(kind)
    fields = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    parsed = {}
    for name, value in values.items():
        if name not in fields:
            raise UnknownNameError(f"setting of {_owner(kind)}", name, fields)
        parsed[name] = _parse(_owner(kind), name, types[name], value)
    return kind(**parsed)


def _owner(kind: type[Any]) -> str:
    """What a user calls it: the algorithm for its ``Config``, else the class."""
    return kind.__module__.rpartition(".")[2] if kind.__name__ == "Config" else kind.__name__


def _parse(owner: str, name: str, kind: Any, value: Any) -> Any:
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
    elif kind in (int, float):
        try:
            parsed = kind(value)
        except (TypeError, ValueError, OverflowError):
            pass
        else:
            if isinstance(value, str) or parsed == value:  # int() would cut 8.5 to 8
                return parsed
    elif kind is str:
        return str(value)
    raise ConfigError(f"{owner}.{name}: expected {getattr(kind, '__name__', kind)}, got {value!r}")
