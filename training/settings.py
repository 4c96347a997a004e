"""Settings of algorithms: frozen dataclasses of plain numbers and strings, with their ranges beside their defaults.

A field states its range and its meaning in its type, ``lr: LearningRate = 5e-4`` or
``alpha: Annotated[float, Range(0.0, 1e6), "weight of the penalty"]``, where the last text counts, and the class has
:func:`check` as its ``__post_init__``. :func:`describe` lists them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any, TypeAlias, TypeVar, get_type_hints

from omcda_deploy.errors import ConfigError, UnknownNameError

C = TypeVar("C")


@dataclasses.dataclass(frozen=True)
class Range:
    """A closed range of finite numbers."""

    low: float
    high: float = math.inf

    def require(self, name: str, value: Any) -> None:
        """Raise :class:`ConfigError` unless ``value`` lies in the range."""
        if not (self.low <= value <= self.high and math.isfinite(value)):
            raise ConfigError(f"{name}: expected {self}, got {value!r}")

    def __str__(self) -> str:
        bounded = math.isfinite(self.high)
        return f"{self.low:g} to {self.high:g}" if bounded else f"a finite number from {self.low:g} on"


class Choice:
    """The names that a setting may hold; ``refused`` gives the reason why another name is not among them."""

    def __init__(self, *names: str, refused: Mapping[str, str] | None = None) -> None:
        self.names, self.refused = names, refused or {}

    def require(self, name: str, value: Any) -> None:
        """Raise :class:`ConfigError` unless ``value`` is one of the names."""
        if value in self.refused:
            raise ConfigError(
                f"{name}: expected {' or '.join(self.names)}, got {value!r}: {self.refused[value]}"
            )
        if value not in self.names:
            raise ConfigError(f"{name}: expected one of {self}, got {value!r}")

    def __str__(self) -> str:
        return ", ".join(self.names)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A setting as users see it; ``range`` is in words, ``meaning`` is empty where its algorithm states none."""

    name: str
    type: str
    default: Any
    limit: Range | Choice | None
    meaning: str

    @property
    def range(self) -> str:
        """The values that it may have."""
        return "true, false" if self.type == "bool" else str(self.limit or "")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; null for bounds and choices that there are not."""
        low, high = (self.limit.low, self.limit.high) if isinstance(self.limit, Range) else (None, None)
        return {
            "name": self.name,
            "type": self.type,
            "default": self.default,
            "range": self.range,
            "low": low,
            "high": high if high is not None and math.isfinite(high) else None,
            "choices": list(self.limit.names) if isinstance(self.limit, Choice) else None,
            "meaning": self.meaning,
        }


LearningRate: TypeAlias = Annotated[float, Range(0.0, 1.0), "step size of Adam"]
Unit: TypeAlias = Annotated[float, Range(0.0, 1.0)]  # a share, a probability, a discount
Discount: TypeAlias = Annotated[float, Range(0.0, 1.0), "discount of rewards per step"]
Tau: TypeAlias = Annotated[float, Range(1e-6, 1.0), "step of the target networks, a Polyak average"]
GradientNorm: TypeAlias = Annotated[
    float, Range(1e-6), "largest norm of the gradient, per group of parameters"
]
Count: TypeAlias = Annotated[int, Range(1, 10**6)]
SampleCount: TypeAlias = Annotated[int, Range(1, 10**5)]
BatchSize: TypeAlias = Annotated[int, Range(1, 10**6), "transitions of a batch"]
Width: TypeAlias = Annotated[int, Range(1, 65536), "units of a hidden layer"]
MixerWidth: TypeAlias = Annotated[int, Range(1, 65536), "units of the mixers' hidden layers"]
StandardizeStates: TypeAlias = Annotated[bool, "mixers see states of mean 0 and deviation 1 over the dataset"]
Weight: TypeAlias = Annotated[float, Range(0.0, 1e6)]  # factor of a term of a loss


def check(config: Any) -> None:
    """Raise :class:`ConfigError` unless every field lies in the range, or is one of the choices, of its type."""
    for name, hint in _types(type(config)).items():
        _require(f"{owner(type(config))}.{name}", hint, getattr(config, name))


def build(kind: type[C], values: Mapping[str, Any]) -> C:
    """Make a configuration of ``kind`` from ``values``.

    Raises as :func:`parse` does, and :class:`ConfigError` where fields do not fit together.
    """
    return kind(**parse(kind, values))


def parse(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values`` in the types of the fields of ``kind``; strings come from the command line.

    Raises :class:`UnknownNameError` for a field that does not exist, :class:`ConfigError` for one that does not
    parse or is out of range.
    """
    types = _types(kind)
    parsed = {}
    for name, value in values.items():
        if name not in types:
            raise UnknownNameError(f"setting of {owner(kind)}", name, types)
        title = f"{owner(kind)}.{name}"
        parsed[name] = _parse(title, _plain(types[name]), value)
        _require(title, types[name], parsed[name])
    return parsed


def changed_settings(kind: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of ``values`` that are not the defaults of ``kind``."""
    defaults = dataclasses.asdict(kind())
    return {name: value for name, value in values.items() if defaults.get(name) != value}


def describe(kind: type[Any]) -> list[Setting]:
    """List the settings of ``kind``, in order."""
    defaults = kind()
    described = []
    for name, hint in _types(kind).items():
        texts = [entry for entry in getattr(hint, "__metadata__", ()) if isinstance(entry, str)]
        limit = next(iter(_limits(hint)), None)
        meaning = texts[-1] if texts else ""
        described.append(Setting(name, _plain(hint).__name__, getattr(defaults, name), limit, meaning))
    return described


def plain_types(kind: type[Any]) -> dict[str, type]:
    """Each field's type without its range."""
    return {name: _plain(hint) for name, hint in _types(kind).items()}


def _plain(hint: Any) -> type:
    kind: type = getattr(hint, "__origin__", hint)
    return kind


def _require(title: str, hint: Any, value: Any) -> None:
    for limit in _limits(hint):
        limit.require(title, value)


def _limits(hint: Any) -> list[Range | Choice]:
    return [entry for entry in getattr(hint, "__metadata__", ()) if isinstance(entry, Range | Choice)]


_TYPES: dict[type[Any], dict[str, Any]] = {}  # evaluated from text, which takes longer than a job's checks


def _types(kind: type[Any]) -> dict[str, Any]:
    if kind not in _TYPES:
        hints = get_type_hints(kind, include_extras=True)
        _TYPES[kind] = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    return _TYPES[kind]


def owner(kind: type[Any]) -> str:
    """Name a configuration as users do: by the algorithm for its ``Config``, else by the class."""
    return kind.__module__.rpartition(".")[2] if kind.__name__ == "Config" else kind.__name__


def _parse(name: str, kind: type, value: Any) -> Any:
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
    elif kind in (int, float) and not isinstance(value, bool):  # which Python counts as 0 and 1
        try:
            number = kind(value)
        except (TypeError, ValueError, OverflowError):
            pass
        else:
            if isinstance(value, str) or number == value:  # int() would cut 8.5 to 8
                return number
    elif kind is str:
        return str(value)
    raise ConfigError(f"{name}: expected {kind.__name__}, got {value!r}")
