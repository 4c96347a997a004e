"""Inputs of policies: which observations, noise and masks are valid, for teams in this process and served ones.

Everything is checked before a policy is asked and before noise is drawn, so that a call that is refused leaves no
trace, and no fallback hides a wrong one.

Shapes: B rows, O observation size and A action size of an agent.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.errors import ContractError
from omcda_deploy.policy import Float, NoiseSource, ScaledNoise
from omcda_deploy.spec import AgentSpec, TeamSpec

Mask: TypeAlias = NDArray[np.uint8]
Rows: TypeAlias = dict[str, NDArray[Any]]  # a model's inputs by name, one row per sample

_FLOAT32 = np.dtype(np.float32)
_MASK_VALUES = b"\0\1"
_PLAIN_SUM_LIMIT = 32  # numbers; a plain sum of more costs more than one numpy call


def agent_rows(agent: AgentSpec, observation: Float, noise: Float | None, action_mask: Mask | None) -> Rows:
    """Return an agent's inputs as [B, O] and [B, A]; absent noise is left out, an absent mask allows all.

    Raises :class:`ContractError` for other shapes, numbers that are not finite, and masks that hold anything but 0
    and 1 or allow nothing.
    """
    name, actions = agent.name, agent.action.size
    observed = finite_rows(
        observation, agent.observation_size, f"observation of {name}", "look at what the simulator shows"
    )
    rows: Rows = {"observation": observed}
    batch = len(observed)
    if not batch:
        raise ContractError(
            f"observation of {name}: expected at least one row, got none: act for one or more"
        )
    if noise is not None:
        rows["noise"] = finite_rows(noise, actions, f"noise of {name}", "draw it with NoiseSource")
    if agent.action.kind == "discrete" and action_mask is None:
        rows["action_mask"] = np.ones((batch, actions), np.uint8)
    elif agent.action.kind == "discrete":
        rows["action_mask"] = mask_rows(action_mask, actions, f"action_mask of {name}")
        _require_available(rows["action_mask"], f"action_mask of {name}")
    elif action_mask is not None:
        raise ContractError(f"action_mask of {name}: expected none for continuous actions: leave it out")
    for kind, values in rows.items():
        if len(values) != batch:
            raise ContractError(
                f"{kind} of {name}: expected {batch} rows as in the observation, got {len(values)}"
            )
    return rows


def team_rows(
    spec: TeamSpec,
    observations: Mapping[str, Float],
    noise: Mapping[str, Float] | None,
    action_masks: Mapping[str, Mask] | None,
) -> dict[str, Rows]:
    """Return every agent's :func:`agent_rows`, all of one batch size; raises as it does.

    Also raises :class:`ContractError` for an agent that is left out, or that the team does not have.
    """
    if spec.action_kind == "continuous" and isinstance(action_masks, Mapping) and not action_masks:
        action_masks = None  # those of no agent, where none has any
    for what, vectors in (("observations", observations), ("noise", noise), ("action_masks", action_masks)):
        if isinstance(vectors, Mapping) and len(vectors) > len(spec.agents):
            others = ", ".join(sorted(str(name) for name in vectors if name not in spec.names))
            raise ContractError(
                f"{what}: expected those of {', '.join(spec.names)}, got {others} too: leave it out"
            )
    rows = {
        agent.name: agent_rows(
            agent,
            of_agent(observations, agent.name, "observation"),
            None if noise is None else of_agent(noise, agent.name, "noise"),
            None if action_masks is None else of_agent(action_masks, agent.name, "action_mask"),
        )
        for agent in spec.agents
    }
    batches = {name: len(inputs["observation"]) for name, inputs in rows.items()}
    if len(set(batches.values())) > 1:
        raise ContractError(f"expected as many observations of every agent, got {batches}")
    if noise is not None:  # of all agents or of none: an agent's None is as zeros
        rows = {agent.name: with_zero_noise(agent, rows[agent.name]) for agent in spec.agents}
    return rows


def with_noise(
    rows: Mapping[str, Rows], source: NoiseSource, noise: Mapping[str, Float] | None
) -> Mapping[str, Float] | None:
    """Return the call's noise: the caller's, or that drawn from ``source``, which is added to checked ``rows``."""
    if noise is not None:
        return noise
    first = next(iter(rows.values()))
    drawn = source.for_call(None, {"": first["observation"]})
    if drawn is not None:
        for name, inputs in rows.items():
            inputs["noise"] = drawn[name]
    return drawn


class TeamInputs(NamedTuple):
    """Arguments of :meth:`omcda_deploy.policy.TeamPolicy.act`."""

    observations: Mapping[str, Float]
    noise: Mapping[str, Float] | None
    action_masks: Mapping[str, Mask] | None


def checked_inputs(
    rows: Mapping[str, Rows], observations: Mapping[str, Float], noise: Mapping[str, Float] | None
) -> TeamInputs:
    """Return checked ``rows`` as another policy takes them, in kind: vectors where ``observations`` are vectors.

    ``noise``: the call's, whose temperature is kept.
    """

    def of_all(kind: str) -> dict[str, NDArray[Any]]:
        return {
            name: inputs[kind] if np.ndim(observations[name]) == 2 else inputs[kind][0]
            for name, inputs in rows.items()
            if kind in inputs
        }

    drawn: Mapping[str, Float] | None = of_all("noise") or None
    if drawn and isinstance(noise, ScaledNoise):
        drawn = ScaledNoise(drawn, noise.temperature)
    return TeamInputs(of_all("observation"), drawn, of_all("action_mask") or None)


def joined_rows(spec: TeamSpec, rows: Mapping[str, Rows]) -> Rows:
    """Return the joint graph's inputs: the agents' side by side."""
    agents = [rows[name] for name in spec.names]
    return {name: np.concatenate([inputs[name] for inputs in agents], axis=1) for name in agents[0]}


def with_zero_noise(agent: AgentSpec, rows: Rows) -> Rows:
    """Return a graph's inputs, which need noise: zeros where there is none."""
    if "noise" in rows:
        return rows
    return rows | {"noise": np.zeros((len(rows["observation"]), agent.action.size), np.float32)}


def of_agent(vectors: Mapping[str, Any], name: str, what: str) -> Any:
    """Take one agent's vectors, ``what`` of it. Raises :class:`ContractError` where they are missing."""
    try:
        return vectors[name]
    except (KeyError, IndexError, TypeError):
        got = sorted(map(str, vectors)) if isinstance(vectors, Mapping) else type(vectors).__name__
        raise ContractError(f"no {what} for {name}: expected one per agent, got {got}") from None


def finite_rows(vectors: Any, width: int, what: str, advice: str) -> Float:
    """Return numbers as :func:`batch_of` does; refuse infinite ones and NaN. ``advice`` ends the message."""
    rows = batch_of(vectors, width, what)
    if not all_finite(rows):
        row, column = np.argwhere(~np.isfinite(rows))[0].tolist()
        raise ContractError(
            f"{what}: expected finite numbers, got {rows[row, column]} in row {row}, column {column}: {advice}"
        )
    return rows


def batch_of(vectors: Any, width: int, what: str) -> Float:
    """Return [B, width] or [width] as contiguous float32 [B, width]; raise :class:`ContractError` for other shapes.

    ``what`` names the vectors in the message.
    """
    try:
        if getattr(vectors, "dtype", None) == _FLOAT32:
            array = np.ascontiguousarray(vectors)
        elif np.iscomplexobj(vectors):
            raise TypeError("complex numbers")  # numpy would drop their imaginary parts
        else:
            with np.errstate(over="ignore"):  # what is too large becomes infinite
                array = np.ascontiguousarray(vectors, _FLOAT32)
    except (TypeError, ValueError):
        raise _no_numbers(vectors, width, what) from None
    return _in_rows(array, vectors, width, what)


def mask_rows(mask: Any, width: int, what: str) -> Mask:
    """Return a mask [B, width] or [width] as contiguous uint8 [B, width]; raises as :func:`batch_of`.

    Anything but 0 and 1 is refused, as a cast would make a choice of 257 and none of 256 or 0.5.
    """
    try:
        given = np.asarray(mask)
    except ValueError:  # lists of different lengths
        given = np.asarray(None)
    if given.dtype.kind not in "biuf":
        raise _no_numbers(mask, width, what)
    rows = _in_rows(given, mask, width, what)
    if rows.dtype == np.uint8:
        valid = not rows.tobytes().translate(None, _MASK_VALUES)
    else:
        valid = bool(np.isin(rows, (0, 1)).all())
    if not valid:
        wrong = rows[~np.isin(rows, (0, 1))][0]
        raise ContractError(f"{what}: expected 0 or 1, got {wrong}: mark what is available with 1")
    return np.ascontiguousarray(rows, np.uint8)


def all_finite(values: NDArray[Any], plain: int = _PLAIN_SUM_LIMIT) -> bool:
    """Return whether all values are finite; up to ``plain`` of them are summed without numpy.

    For many values a finite sum of squares proves it at half the price of looking at each.
    """
    if values.size <= plain:
        return math.isfinite(sum(values.ravel().tolist()))
    return math.isfinite(np.vdot(values, values)) or bool(np.isfinite(values).all())


def _require_available(mask: Mask, what: str) -> None:
    if len(mask) == 1 and 1 in mask.tobytes():  # a quick look at the ordinary control step
        return
    available = mask.any(axis=1)
    if 0 in available.tobytes():
        raise ContractError(
            f"{what}: expected at least one available action, got none in row {int(available.argmin())}: look at "
            "what the simulator allows"
        )


def _in_rows(array: NDArray[Any], given: Any, width: int, what: str) -> NDArray[Any]:
    """Return [B, width] or [width] as [B, width]; ``given``: what the caller sent, for the message."""
    rows = array[None] if array.ndim == 1 else array
    if rows.ndim != 2 or rows.shape[1] != width:
        raise ContractError(f"{what}: expected shape [B, {width}] or [{width}], got {list(np.shape(given))}")
    return rows


def _no_numbers(vectors: Any, width: int, what: str) -> ContractError:
    return ContractError(
        f"{what}: expected numbers of shape [B, {width}] or [{width}], got {type(vectors).__name__} "
        f"{reprlib.repr(vectors)}"
    )
