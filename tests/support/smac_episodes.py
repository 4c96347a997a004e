"""Random episodes of SMAC's sizes, from which the tests of dataset formats write their sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

from omcda_deploy.datasets import Dataset
from omcda_deploy.spec import TeamSpec

LIMIT = 70  # steps, of 5m_vs_6m


@dataclass(frozen=True)
class SmacEpisode:
    observations: NDArray[np.float32]  # [T+1, N, O]
    states: NDArray[np.float32]  # [T+1, S], or [T+1, N, S / N] in the MAPPO variant
    actions: NDArray[np.int64]  # [T, N]
    masks: NDArray[np.int64]  # [T+1, N, A]
    rewards: NDArray[np.float64]  # [T], whole numbers: sums of them are exact


def random_episode(steps: int, seed: int, *, mappo: bool) -> SmacEpisode:
    """Random episode of the map 5m_vs_6m."""
    generator = np.random.default_rng(seed)
    masks = generator.integers(0, 2, (steps + 1, 5, 12))
    masks[..., 1] = 1
    actions = np.argmax(masks[:-1] * generator.random((steps, 5, 12)), axis=-1)
    state = (5, 156) if mappo else (98,)
    return SmacEpisode(
        generator.normal(size=(steps + 1, 5, 124 if mappo else 55)).astype(np.float32),
        generator.normal(size=(steps + 1, *state)).astype(np.float32),
        actions,
        masks,
        generator.integers(1, 9, steps).astype(np.float64),
    )


def held_last(rows: NDArray[Any]) -> NDArray[Any]:
    """Repeat the last transition's row as the final one of [T+1, …], for formats that do not record that."""
    return np.concatenate([rows[:-1], rows[-2:-1]])


def require_episode(dataset: Dataset, number: int, expected: SmacEpisode, *, final_recorded: bool) -> None:
    """Assert that episode ``number`` holds exactly ``expected``."""
    start, steps = int(dataset.episode_start[number]), int(dataset.episode_length[number])
    assert steps == len(expected.actions)
    rows, transitions = slice(start, start + steps + 1), slice(start, start + steps)
    rows_of = (lambda values: values) if final_recorded else held_last
    assert dataset.action_masks is not None
    np.testing.assert_array_equal(dataset.observations[rows], rows_of(expected.observations))
    np.testing.assert_array_equal(dataset.states[rows], rows_of(expected.states).reshape(steps + 1, -1))
    np.testing.assert_array_equal(dataset.action_masks[rows], rows_of(expected.masks))
    np.testing.assert_array_equal(dataset.actions[transitions], expected.actions)
    np.testing.assert_array_equal(dataset.rewards[transitions], expected.rewards)
    assert dataset.episode_returns[number] == expected.rewards.sum()


def pickled(episode: SmacEpisode) -> list[list[list[Any]]]:
    """Lists by agent and step, as MADT saves them; the last agent is dead from the second step on."""
    steps, agents = episode.actions.shape
    return [
        [
            [
                episode.states[t, i],
                episode.observations[t, i],
                [int(episode.actions[t, i])],
                np.array([episode.rewards[t]]),
                np.bool_(t == steps - 1 or (i == agents - 1 and t > 0)),
                episode.masks[t, i],
            ]
            for t in range(steps)
        ]
        for i in range(agents)
    ]


def save_madt(folder: Path, **episodes: SmacEpisode) -> Path:
    folder.mkdir(parents=True)
    for name, episode in episodes.items():
        torch.save(pickled(episode), folder / f"{name}.pt")
    return folder


Batch = dict[str, NDArray[Any]]


def pymarl_batch(
    episodes: Sequence[SmacEpisode], timeouts: Sequence[bool], filled_final: Sequence[bool]
) -> Batch:
    """Batch as PyMARL's runners fill it: the row behind the end holds the final one, if ``filled_final``."""
    count, rows = len(episodes), LIMIT + 1
    batch: Batch = {
        "obs": np.zeros((count, rows, 5, 55), np.float32),
        "state": np.zeros((count, rows, 98), np.float32),
        "actions": np.zeros((count, rows, 5, 1), np.int64),
        "avail_actions": np.zeros((count, rows, 5, 12), np.int32),
        "probs": np.zeros((count, rows, 5, 12), np.float32),
        "reward": np.zeros((count, rows, 1), np.float32),
        "terminated": np.zeros((count, rows, 1), np.uint8),
        "filled": np.zeros((count, rows, 1), np.int64),
    }
    for e, (episode, timeout, final) in enumerate(zip(episodes, timeouts, filled_final, strict=True)):
        steps = len(episode.actions)
        rows_filled = steps + final
        batch["obs"][e, :rows_filled] = episode.observations[:rows_filled]
        batch["state"][e, :rows_filled] = episode.states[:rows_filled]
        batch["avail_actions"][e, :rows_filled] = episode.masks[:rows_filled]
        batch["actions"][e, :steps, :, 0] = episode.actions
        batch["actions"][e, steps:rows_filled] = 3  # the runner chooses there too, and never acts
        batch["reward"][e, :steps, 0] = episode.rewards
        batch["terminated"][e, steps - 1, 0] = not timeout
        batch["filled"][e, :rows_filled] = 1
    return batch


def batch_of(spec: TeamSpec, lengths: list[int], seed: int = 0, *, continuing: bool = False) -> Batch:
    """Random episodes in the layout of PyMARL's runners; the alive can do all but nothing, the dead nothing else.

    ``terminated`` is 1 at the time limit too, unless the simulator calls such episodes ``continuing``.
    """
    generator = np.random.default_rng(seed)
    rows, agents = spec.episode_limit + 1, len(spec.agents)
    shape = (len(lengths), rows)
    recorded = np.arange(rows) <= np.array(lengths)[:, None]  # [E, T], the final row among them
    dead = generator.random((*shape, agents)) < 0.2
    masks = np.where(dead[..., None], np.eye(spec.action_size)[0], 1 - np.eye(spec.action_size)[0])
    masks *= recorded[..., None, None]
    last = np.arange(rows) == np.array(lengths)[:, None] - 1
    if continuing:
        last &= np.array(lengths)[:, None] < spec.episode_limit
    return {
        "obs": (
            generator.normal(size=(*shape, agents, spec.observation_size)) * recorded[..., None, None]
        ).astype("f4"),
        "state": (generator.normal(size=(*shape, spec.state_size)) * recorded[..., None]).astype("f4"),
        "actions": np.where(dead, 0, generator.integers(1, spec.action_size, dead.shape))[..., None],
        "avail_actions": masks.astype(np.int32),
        "reward": (generator.integers(0, 9, shape) * recorded)[..., None].astype(np.float32),
        "terminated": last[..., None].astype(np.uint8),
        "filled": recorded[..., None].astype(np.int64),
        "actions_onehot": np.zeros((*shape, agents, spec.action_size), np.float32),
    }


def save_pymarl(path: Path, batch: Batch, **options: Any) -> Path:
    with h5py.File(path, "w") as file:
        for name, values in batch.items():
            file.create_dataset(name, data=values, **options)
    return path
