"""Join of recordings to a dataset: what servers answered, and what clients report of it.

A step is known by its episode, its number and its row in the request, under which all agents and the client have
recorded it. An episode is complete if its steps are reported from the first to one that ends it, and each was
answered by the policy of every agent; others are left out, and counted by reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.bundle import TEAM
from omcda_deploy.datasets import Episode
from omcda_deploy.datasets.episodes import admitted, repeat_last
from omcda_deploy.datasets.recorded_tables import Key, Reports, Steps, read_recordings
from omcda_deploy.datasets.writer import DatasetWriter
from omcda_deploy.errors import ConfigError, DatasetError
from omcda_deploy.policy import MAX_TEMPERATURE
from omcda_deploy.spec import TeamSpec

Rows: TypeAlias = NDArray[np.int64]


class _LeftOutError(Exception):
    """The reason for which an episode is not in the dataset."""


@dataclass(frozen=True)
class _Part:
    """The rows [T] of an episode's steps in the table of one model, whose agents are of numbers ``agents``."""

    steps: Steps
    rows: Rows
    agents: range


def join(
    folders: Sequence[Path], out: Path, *, rewards: Path | None = None, temperature: float | None = None
) -> dict[str, Any]:
    """Write the complete episodes of recordings as a dataset, in the order in which they began.

    ``rewards``: a CSV file in place of the rewards and ends that clients reported
    (:mod:`omcda_deploy.datasets.recorded_tables`).
    ``temperature``: of the noise, where clients did not say. The dataset has the exact distributions that acted
    (:mod:`omcda_deploy.datasets.behavior`), if all of its steps have one: not at temperature 0, and not of a policy
    without a density.

    Returns a summary: path, task, episodes, transitions, mean and standard deviation of the returns, digest,
    whether behaviour is exact or why not, where states and final observations come from, episodes that were left
    out by reason, torn segments, lost rows, and answers without an episode. Raises :class:`DatasetError` for
    folders that are no recordings or of different teams, and without a complete episode.
    """
    if temperature is not None and not 0.0 < temperature <= MAX_TEMPERATURE:
        raise ConfigError(
            f"temperature: expected a number above 0, to {MAX_TEMPERATURE:g}, got {temperature:g}"
        )
    recordings = read_recordings(folders, rewards)
    left_out: Counter[str] = Counter()
    joined: list[tuple[Key, int, list[_Part]]] = []
    for key in recordings.reports.episodes():
        try:
            length = _length(recordings.reports, key)
            _require_sound(recordings.reports, recordings.spec, key, length)
            joined.append((key, length, _parts(recordings.steps, recordings.spec, key, length)))
        except _LeftOutError as error:
            left_out[str(error)] += 1
    reported = {
        key.episode for key in recordings.reports.episodes()
    }  # idle rows beside others are not reported
    answered = {key for steps in recordings.steps.values() for key in steps.episodes()}
    left_out["no reward was reported"] += sum(key.episode not in reported for key in answered)
    left_out = +left_out
    if not joined:
        reasons = "; ".join(f"{count}: {reason}" for reason, count in left_out.items()) or "there is none"
        raise DatasetError(
            f"expected a complete episode in {', '.join(map(str, folders))}, found none ({reasons}): report each "
            "step (docs/recording.md), or give --rewards"
        )
    inexact = Counter(reason for _, _, parts in joined if (reason := _inexact(parts, temperature)))
    states = all(_has_states(recordings.reports, recordings.spec, key, length) for key, length, _ in joined)
    spec = recordings.spec
    if not states:  # the state is all observations joined
        spec = replace(spec, state_size=len(spec.agents) * spec.observation_size)
    metadata = {"behavior": "recorded", "source": "recordings"}
    with DatasetWriter(out, spec, metadata) as writer:
        for key, length, parts in joined:
            episode = _episode(spec, recordings.reports, key, length, parts, states)
            if not inexact:
                episode = replace(episode, behavior=_behavior(spec, parts, temperature))
            writer.append(admitted(episode, spec, episode.label), _label(parts))
    final = sum(_final_known(recordings.reports, key, length) for key, length, _ in joined)
    return {
        "path": str(out),
        "task": spec.task,
        **writer.summary(),
        "behavior": "exact" if not inexact else f"not exact in {inexact.total()} episodes: {_most(inexact)}",
        "states": "reported" if states else "all observations joined",
        "final_observations": f"{final} reported, {len(joined) - final} repeated",
        "left_out": dict(left_out),
        "torn_segments": recordings.torn,
        "lost_rows": recordings.lost,
        "answers_without_episode": sum(steps.without_episode for steps in recordings.steps.values()),
    }


def _most(reasons: Counter[str]) -> str:
    return reasons.most_common(1)[0][0]


def _length(reports: Reports, key: Key) -> int:
    """Return the number of steps until the first that ends the episode."""
    rows = reports.rows(key)
    numbers = reports.columns["episode_step"][rows].astype(np.int64)
    if len(set(numbers.tolist())) < len(numbers):
        raise _LeftOutError("a step was reported twice")
    ended = (reports.columns["terminated"][rows] | reports.columns["truncated"][rows]) != 0
    if not ended.any():
        raise _LeftOutError("no end was reported")
    length = int(numbers[np.argmax(ended)])
    if numbers[:length].tolist() != list(range(1, length + 1)):
        raise _LeftOutError("steps were not reported")
    if reports.columns["fallback"][rows[:length]].any():
        raise _LeftOutError("a fallback acted for an agent whose answer was missed")
    return length


def _require_sound(reports: Reports, spec: TeamSpec, key: Key, length: int) -> None:
    """Leave out an episode that no dataset takes, so that it does not keep the others from one.

    Clients refuse to report such numbers; other programs, and earlier versions, may have recorded them.
    """
    if length > spec.episode_limit:
        raise _LeftOutError(f"it has more than {spec.episode_limit} steps, the limit of {spec.task}")
    rows, columns = reports.rows(key)[:length], reports.columns
    numbers = {
        "reward": [columns["reward"][rows]],
        "state": [columns["state"][row] for row in rows],
        "next_state": [columns["next_state"][rows[-1]]],
        "next_observation": [columns["next_observation"][rows[-1]]],
    }
    for name, told in numbers.items():
        with np.errstate(over="ignore"):  # datasets have float32
            if not np.isfinite(np.concatenate(told).astype(np.float32)).all():
                raise _LeftOutError(f"a {name} that is not finite was reported")
    if (columns["next_action_mask"][rows[-1]] > 1).any():
        raise _LeftOutError("a next_action_mask of more than 0 and 1 was reported")


def _parts(tables: Mapping[str, Steps], spec: TeamSpec, key: Key, length: int) -> list[_Part]:
    """Return where the answers of all agents are: by the joint graph, or by each agent's own."""
    parts = []
    joint = TEAM in tables and len(tables[TEAM].rows(key)) > 0
    places = (
        {TEAM: range(len(spec.agents))}
        if joint
        else {name: range(i, i + 1) for i, name in enumerate(spec.names)}
    )
    for model, agents in places.items():
        if model not in tables or not len(tables[model].rows(key)):
            raise _LeftOutError(f"no answer of {model} was recorded")
        steps = tables[model]
        rows = steps.rows(key)
        numbers = steps.columns["episode_step"][rows].astype(np.int64)
        rows, numbers = rows[numbers <= length], numbers[numbers <= length]
        first = np.append(True, numbers[1:] != numbers[:-1])
        if not first.all() and not steps.repeats(rows, first):
            raise _LeftOutError(f"{model} answered one step in two ways")
        rows, numbers = rows[first], numbers[first]
        if numbers.tolist() != list(range(1, length + 1)):
            raise _LeftOutError(f"answers of {model} are missing")
        parts.append(_Part(steps, rows, agents))
    return parts


def _inexact(parts: Sequence[_Part], temperature: float | None) -> str:
    """Say why an episode has no exact distributions; empty if it has."""
    for part in parts:
        factor = _temperatures(part, temperature)
        if not part.steps.has_density[part.rows].all():
            return "the policy has no density"
        if np.isnan(factor).any():
            return "the temperature of the noise is not known: give --temperature"
        if not (factor > 0.0).all() or not np.isfinite(factor).all():
            return "actions at temperature 0 have no density"
    return ""


def _temperatures(part: _Part, temperature: float | None) -> NDArray[np.float64]:
    values = part.steps.columns["temperature"][part.rows].astype(np.float64)
    return values if temperature is None else np.where(np.isnan(values), temperature, values)


def _by_agent(spec: TeamSpec, parts: Sequence[_Part], name: str) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield the numbers of agents, and their columns ``name`` [T, …] of an episode."""
    for part in parts:
        values = part.steps.columns[name][part.rows]
        # One choice per agent: [T] of an agent's own graph, [T, N] of the joint one.
        if name == "action" and spec.action_kind == "discrete":
            yield from zip(part.agents, values.reshape(len(values), -1).T, strict=True)
            continue
        if len(part.agents) == 1:
            yield part.agents[0], values
            continue
        slices = spec.observation_slices if name == "observation" else spec.action_slices
        yield from ((index, values[:, slices[index]]) for index in part.agents)


def _padded(
    spec: TeamSpec, parts: Sequence[_Part], name: str, shape: tuple[int, ...], kind: Any
) -> NDArray[Any]:
    """Return a column of all agents, with zeros behind those that have less."""
    joined = np.zeros(shape, kind)
    for index, values in _by_agent(spec, parts, name):
        joined[:, index, : values.shape[1]] = values
    return joined


def _episode(
    spec: TeamSpec, reports: Reports, key: Key, length: int, parts: Sequence[_Part], states: bool
) -> Episode:
    agents, discrete = len(spec.agents), spec.action_kind == "discrete"
    rows = reports.rows(key)[:length]
    last = rows[-1]

    def with_final(values: NDArray[Any], column: str, slices: Sequence[slice]) -> NDArray[Any]:
        """Append the row behind the last step: as reported, or else the last one again."""
        final = reports.columns[column][last]
        if not len(final):
            return repeat_last(values)
        row = np.zeros((1, *values.shape[1:]), values.dtype)
        for index, columns in enumerate(slices):
            row[0, index, : columns.stop - columns.start] = final[columns]
        return np.concatenate([values, row])

    observations = _padded(spec, parts, "observation", (length, agents, spec.observation_size), np.float32)
    observations = with_final(observations, "next_observation", spec.observation_slices)
    masks: NDArray[np.uint8] | None = None
    actions: NDArray[Any]
    if discrete:
        masks = _padded(spec, parts, "action_mask", (length, agents, spec.action_size), np.uint8)
        masks = with_final(masks, "next_action_mask", spec.action_slices)
        actions = np.zeros((length, agents), np.int64)
        for index, values in _by_agent(spec, parts, "action"):
            actions[:, index] = values
    else:
        actions = _padded(spec, parts, "action", (length, agents, spec.action_size), np.float32)
    return Episode(
        observations,
        np.stack([*(reports.columns["state"][row] for row in rows), reports.columns["next_state"][last]])
        if states
        else observations.reshape(length + 1, -1),
        actions,
        reports.columns["reward"][rows],
        timeout=not reports.columns["terminated"][last],
        action_masks=masks,
        label=f"episode {key.episode}, row {key.row}",
    )


def _behavior(spec: TeamSpec, parts: Sequence[_Part], temperature: float | None) -> dict[str, NDArray[Any]]:
    """Return the distributions that the actions were drawn from, and the actions' log-probabilities."""
    length, agents = len(parts[0].rows), len(spec.agents)
    fill = np.finfo(np.float32).min if spec.action_kind == "discrete" else 0.0
    names = ("logits",) if spec.action_kind == "discrete" else ("mean", "log_std")
    arrays: dict[str, NDArray[Any]] = {
        name: np.full((length, agents, spec.action_size), fill, np.float32) for name in names
    }
    arrays["log_prob"] = np.zeros((length, agents))
    for part in parts:
        step = {
            name: values[part.rows] for name, values in part.steps.columns.items() if name != "episode_id"
        }
        densities = part.steps.densities
        acted = densities.executed(step, _temperatures(part, temperature)[:, None])
        log_prob = densities.log_prob(step, acted)
        start = 0
        for column, index in enumerate(part.agents):
            size = spec.agents[index].action.size
            arrays["log_prob"][:, index] = log_prob[:, column]
            for name in names:
                arrays[name][:, index, :size] = acted[name][:, start : start + size]
            start += size
    return arrays


def _label(parts: Sequence[_Part]) -> str:
    """Name the bundle that acted."""
    labels = sorted({label for part in parts for label in part.steps.labels[part.rows].tolist()})
    return " and ".join(labels)


def _has_states(reports: Reports, spec: TeamSpec, key: Key, length: int) -> bool:
    """Test if an episode's states are known from the first to the last."""
    rows = reports.rows(key)[:length]
    states = [*(reports.columns["state"][row] for row in rows), reports.columns["next_state"][rows[-1]]]
    return all(len(state) == spec.state_size for state in states)


def _final_known(reports: Reports, key: Key, length: int) -> bool:
    return len(reports.columns["next_observation"][reports.rows(key)[length - 1]]) > 0
