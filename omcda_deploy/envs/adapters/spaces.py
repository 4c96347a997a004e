"""Gymnasium's spaces in terms of a team spec: what an agent observes becomes a vector, its action a plain one.

Any space that Gymnasium can flatten is observed, and so is PettingZoo's dictionary of an observation and its
``action_mask``. Actions are a Discrete, or a Box with bounds. A team's spec has one pair of bounds for all entries:
the Box's own where it has one, as recorded data have it, else [-1, 1], from which each entry is scaled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.errors import ContractError, MissingExtraError, PluginError
from omcda_deploy.spec import ActionSpec, AgentSpec

MASK, MASKED = "action_mask", "observation"  # entries of PettingZoo's dictionary


@dataclass(frozen=True)
class AgentSpaces:
    """The spaces of one agent, and its spec that follows from them."""

    spec: AgentSpec
    observed: Any  # the space that is flattened
    masked: bool  # observations are dictionaries of an observation and a mask
    acted: Any  # a Box or a Discrete

    @classmethod
    def of(cls, source: Any, name: str, label: str) -> AgentSpaces:
        """Read the spaces of agent ``name``.

        Raises :class:`PluginError` for spaces that no team spec describes; ``label`` names the environment.
        """
        observed, acted = (_space(source, kind, name) for kind in ("observation", "action"))
        masked = MASK in getattr(observed, "spaces", ())
        if masked:
            observed = observed.spaces[MASKED]
        action = _action_spec(acted, f"{label}: action space of {name}")
        size = flat_size(observed, f"{label}: observation space of {name}")
        return cls(AgentSpec(name, size, action), observed, masked, acted)

    def observation(self, value: Any) -> tuple[Any, Any]:
        """Divide a raw observation into a vector [O] and a mask, None without one.

        Raises :class:`ContractError` for a value of another space.
        """
        mask = None
        if self.masked:
            if not isinstance(value, Mapping) or not {MASK, MASKED} <= value.keys():
                raise ContractError(
                    f"observation of {self.spec.name}: expected a dictionary of {MASKED} and {MASK}, got "
                    f"{sorted(value) if isinstance(value, Mapping) else type(value).__name__}"
                )
            value, mask = value[MASKED], value[MASK]
        return flatten(self.observed, value, f"observation of {self.spec.name}"), mask

    def action(self, action: Any) -> Any:
        """Map an action of the team to one of the space."""
        if self.spec.action.kind == "discrete":
            return int(action) + int(self.acted.start)
        box, ours = self.acted, self.spec.action
        low, high = box.low.reshape(-1).astype(np.float64), box.high.reshape(-1).astype(np.float64)
        values = np.asarray(action, np.float64)
        if (low != ours.low).any() or (high != ours.high).any():
            values = low + (high - low) * (values - ours.low) / (ours.high - ours.low)
        return np.clip(values, low, high).reshape(box.shape).astype(box.dtype)


def flat_size(space: Any, what: str) -> int:
    """Return the length of a space's values as vectors. Raises :class:`PluginError` where they are none."""
    spaces = _gymnasium()
    if not isinstance(space, spaces.Space):
        raise PluginError(
            f"{what}: expected one of gymnasium.spaces, got {space!r}: or give the environment a `spec`, a TeamSpec"
        )
    if not space.is_np_flattenable or (size := spaces.flatdim(space)) < 1:
        raise PluginError(f"{what}: expected a space that flattens to a vector, got {space}")
    return int(size)


def flatten(space: Any, value: Any, what: str) -> NDArray[Any]:
    """Flatten a value of a space, part by part, as Gymnasium does.

    Numbers of a Box pass as they are, of any type: Gymnasium would give them the Box's without a word. Raises
    :class:`ContractError` for a value that is not of the space, with the part's name.
    """
    spaces = _gymnasium()
    if isinstance(space, spaces.Box):
        try:
            values = np.asarray(value)
        except ValueError:  # rows of unequal lengths
            values = np.empty(0, object)
        if values.shape != space.shape:
            raise ContractError(
                f"{what}: expected shape {list(space.shape)}, got "
                f"{list(values.shape) if values.dtype != object else type(value).__name__}"
            )
        if values.dtype.kind not in "fiub":
            raise ContractError(f"{what}: expected numbers, got {values.dtype} {list(values.shape)}")
        return values.reshape(-1)
    if isinstance(space, spaces.Dict):
        if not isinstance(value, Mapping) or value.keys() != space.spaces.keys():
            got = list(value) if isinstance(value, Mapping) else type(value).__name__
            raise ContractError(f"{what}: expected a dictionary of {', '.join(space.spaces)}, got {got}")
        return np.concatenate([flatten(part, value[name], f"{what}, {name}") for name, part in space.items()])
    if isinstance(space, spaces.Tuple):
        if not isinstance(value, tuple) or len(value) != len(space):
            got = f"{len(value)} values" if isinstance(value, tuple) else f"a {type(value).__name__}"
            raise ContractError(f"{what}: expected a tuple of {len(space)} values, got {got}")
        parts = zip(space, value, strict=True)
        return np.concatenate([flatten(part, entry, f"{what}, {i}") for i, (part, entry) in enumerate(parts)])
    if not space.contains(value):
        kind = f", {value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray | np.generic) else ""
        raise ContractError(f"{what}: expected a value of {space}, got {value!r}{kind}")
    flat: NDArray[Any] = spaces.flatten(space, value)
    return flat


def _action_spec(space: Any, what: str) -> ActionSpec:
    spaces = _gymnasium()
    if isinstance(space, spaces.Discrete):
        return ActionSpec("discrete", int(space.n))
    if not isinstance(space, spaces.Box) or space.dtype.kind != "f":
        raise PluginError(
            f"{what}: expected a Box of floats or a Discrete, got {space}: give the agent one vector, or one "
            "choice among all combinations"
        )
    if not (
        np.isfinite(space.low).all() and np.isfinite(space.high).all() and (space.low < space.high).all()
    ):
        raise PluginError(f"{what}: expected finite bounds with low < high in every entry, got {space}")
    size, bounds = int(np.prod(space.shape)), (space.low.min(), space.high.max())
    one_pair = (space.low == bounds[0]).all() and (space.high == bounds[1]).all()
    return ActionSpec("continuous", size, *map(float, bounds)) if one_pair else ActionSpec("continuous", size)


def _space(source: Any, kind: str, name: str) -> Any:
    """Return a space by PettingZoo's attribute of all agents, or by its method, which may warn of a missing one."""
    every = getattr(source, f"{kind}_spaces", None)
    if isinstance(every, Mapping) and name in every:
        return every[name]
    return getattr(source, f"{kind}_space")(name)


def _gymnasium() -> Any:
    try:
        from gymnasium import spaces
    except ImportError as error:
        raise MissingExtraError("gymnasium", "pettingzoo") from error
    return spaces
