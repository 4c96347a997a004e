"""Episodes of any source, checked against their team before they are written.

Logs often have one row for each observation, and NaN where the last of them has no action and no reward. Nobody
acts in that row, so :func:`admitted` drops these; a final observation that is all NaN was not recorded, and the row
before stands in for it, as :class:`~omcda_deploy.datasets.Episode` says.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.datasets import Episode
from omcda_deploy.errors import DatasetError
from omcda_deploy.spec import TeamSpec


def admitted(episode: Episode, spec: TeamSpec, label: str) -> Episode:
    """Return an episode of the team ``spec`` without padding; messages begin with the episode's or this label.

    Raises :class:`DatasetError` for arrays and single values other than :class:`Episode` states, for an episode
    without a step or longer than the spec's limit, and for actions beyond the agents' bounds.
    """
    label = episode.label or label
    if any(np.ndim(values) == 0 for values in (episode.observations, episode.actions, episode.rewards)):
        raise DatasetError(
            f"{label}: expected arrays with a row per step, got a single number: give whole episodes"
        )
    episode = _unpadded(_with_checked_numbers(episode, label))
    if len(episode):
        require_shapes(episode, spec, label)
    if not 1 <= len(episode) <= spec.episode_limit:
        raise DatasetError(
            f"{label}: expected 1 to {spec.episode_limit} steps, the episode limit of {spec.task}, got "
            f"{len(episode)}: name the task that was recorded, or cut the episode out"
        )
    if spec.action_kind == "continuous":
        _require_within(episode.actions, spec, label)
    return episode


def require_shapes(episode: Episode, spec: TeamSpec, label: str) -> None:
    """Raise :class:`DatasetError` naming the first array whose shape or type does not fit the team's spec."""
    steps, agents, discrete = len(episode), len(spec.agents), spec.action_kind == "discrete"
    if steps < 1:
        raise DatasetError(f"{label}: expected at least one step, got none: take the episode out")
    if discrete != (episode.action_masks is not None):
        raise DatasetError(
            f"{label}: {spec.task} has {spec.action_kind} actions: expected action masks with discrete ones, and "
            "with no others"
        )
    state = (agents, spec.state_size // agents) if np.ndim(episode.states) == 3 else (spec.state_size,)
    action = (agents,) if discrete else (agents, spec.action_size)
    for name, values, expected, kinds in (
        ("observations", episode.observations, (steps + 1, agents, spec.observation_size), "fiub"),
        ("states", episode.states, (steps + 1, *state), "fiub"),
        ("actions", episode.actions, (steps, *action), "iu" if discrete else "fiub"),
        ("action masks", episode.action_masks, (steps + 1, agents, spec.action_size), "iub"),
        ("rewards", episode.rewards, (steps,), "fiub"),
    ):
        if values is None:
            continue
        if np.shape(values) != expected:
            raise DatasetError(
                f"{label}: {name}: expected shape {list(expected)} of {steps} steps of {spec.task}, got "
                f"{list(np.shape(values))}: {_advice(name, np.shape(values), expected)}"
            )
        if (dtype := np.asarray(values).dtype).kind not in kinds:
            expected_type = "numbers" if "f" in kinds else "integers"
            raise DatasetError(
                f"{label}: {name}: expected {expected_type}, got {dtype}: convert the array first"
            )


def team_reward(rewards: NDArray[Any], label: str) -> NDArray[Any]:
    """Reduce rewards [T, N], equal for all agents, to the team's [T]; rewards [T] stay as they are.

    Raises :class:`DatasetError` naming the first step in which they differ.
    """
    if rewards.ndim != 2:
        return rewards
    # NaN, which equals nothing, is found by a check of its own.
    if (unequal := ((rewards != rewards[:, :1]) & ~np.isnan(rewards)).any(axis=1)).any():
        step = int(np.argmax(unequal))
        raise DatasetError(
            f"{label}: expected one reward for the whole team, got {rewards[step].tolist()} in step {step}: join "
            "the agents' rewards first"
        )
    return rewards[:, 0]


def whole(values: NDArray[Any]) -> bool:
    """Test if all ``values`` are whole numbers."""
    return values.dtype.kind in "iu" or (
        values.dtype.kind == "f" and bool((values == np.floor(values)).all())
    )


def all_available(spec: TeamSpec, rows: int) -> NDArray[np.uint8]:
    """Masks [rows, N, A] of choices that are always available, for sources without masks."""
    choices = np.array([[agent.action.size] for agent in spec.agents])
    masks = (np.arange(spec.action_size) < choices).astype(np.uint8)
    return np.repeat(masks[None], rows, axis=0)


def repeat_last(rows: NDArray[Any]) -> NDArray[Any]:
    """Repeat the last of ``rows``, in place of a final one that was not recorded."""
    return np.concatenate([rows, rows[-1:]])


def _require_within(actions: NDArray[Any], spec: TeamSpec, label: str) -> None:
    """Raise :class:`DatasetError` naming the number of ``actions`` [T, N, A] that is farthest beyond its bounds.

    Published files hold such numbers and are read and selected from as they are; what is written anew may not.
    """
    for index, agent in enumerate(spec.agents):
        own = actions[:, index, : agent.action.size]
        if not np.isfinite(own).all() or agent.action.admits(own):  # the writer refuses what is not finite
            continue
        beyond = np.maximum(agent.action.low - own, own - agent.action.high)
        row, column = np.unravel_index(np.argmax(beyond), own.shape)
        raise DatasetError(
            f"{label}: actions: expected {agent.action} of {agent.name}, got {own[row, column]:g} in row {row}, "
            f"column {column}: give the actions' own bounds, as action_low and action_high with --team or in the "
            "spec, or clip what went beyond them"
        )


def _with_checked_numbers(episode: Episode, label: str) -> Episode:
    """Return the episode with its ``timeout`` as a bool. Raises :class:`DatasetError` for other single values."""
    for name, value, kinds, fits, expected in (
        ("timeout", episode.timeout, "biuf", lambda number: number in (0, 1), "True or False"),
        (
            "seed",
            episode.seed,
            "iu",
            lambda number: -(2**63) <= number < 2**63,
            "a whole number of 64 bits, or None",
        ),
        ("episode_return", episode.episode_return, "iuf", np.isfinite, "a finite number, or None"),
    ):
        if value is None and name != "timeout":
            continue
        number = np.asarray(value)
        if number.ndim or number.dtype.kind not in kinds or not fits(number.item()):
            raise DatasetError(
                f"{label}: {name}: expected {expected}, got {str(value)[:60]}: give one for the whole episode"
            )
    return replace(episode, timeout=bool(episode.timeout))


def _advice(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> str:
    if name == "observations" and shape and shape[0] == expected[0] - 1:
        return (
            "an episode has one observation more than actions: append the final one, or drop the last action"
        )
    if len(shape) != len(expected):
        return f"give the array {len(expected)} axes"
    return "take the episode out, or give the spec of its own team"


def _unpadded(episode: Episode) -> Episode:
    rows = len(episode.observations)
    given = np.asarray(episode.actions)
    actions = _without_nan_row(given, rows)
    if actions is not given and episode.action_masks is not None and whole(actions):
        actions = actions.astype(np.int64)  # choices, which NaN had made floating numbers
    return replace(
        episode,
        observations=_held(np.asarray(episode.observations)),
        states=_held(np.asarray(episode.states)),
        actions=actions,
        rewards=_without_nan_row(np.asarray(episode.rewards), rows),
    )


def _is_nan(row: NDArray[Any]) -> bool:
    return row.dtype.kind == "f" and row.size > 0 and bool(np.isnan(row).all())


def _without_nan_row(values: NDArray[Any], rows: int) -> NDArray[Any]:
    """Drop the last row, all NaN, of values that have as many ``rows`` as observations."""
    return values[:-1] if len(values) == rows > 0 and _is_nan(values[-1]) else values


def _held(values: NDArray[Any]) -> NDArray[Any]:
    """Repeat the row before a last one that is all NaN."""
    return repeat_last(values[:-1]) if values.ndim and len(values) > 1 and _is_nan(values[-1]) else values
