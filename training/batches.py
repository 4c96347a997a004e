"""Minibatches of transitions and the noise of steps, drawn repeatably by (seed, step).

Source: docs/baselines.md#datasets-and-batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from omcda_deploy.errors import DatasetError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from omcda_deploy.datasets import Dataset

_BLOCK = 256  # steps whose indices are drawn at once: one generator per block, not per step


@dataclass(frozen=True)
class Batch:
    """B transitions. ``not_done`` is 0 where the next state's value must not be counted."""

    observation: Tensor  # [B, N, O]
    action: Tensor  # [B, N, A], or int64 [B, N]
    reward: Tensor  # [B]
    not_done: Tensor  # [B]
    state: Tensor  # [B, S]
    next_observation: Tensor  # [B, N, O]
    next_state: Tensor  # [B, S]
    next_action: Tensor  # the next row's, shaped like action
    next_action_known: Tensor  # [B], 0 where the next row is its episode's last, which has no action
    mask: Tensor | None = None  # uint8 [B, N, A], discrete tasks
    next_mask: Tensor | None = None
    # First rows of B episodes, each equally likely; None: every row counts as a first row.
    initial_observation: Tensor | None = None  # [B, N, O]
    initial_state: Tensor | None = None  # [B, S]


class TransitionSampler:
    """Batches of a :class:`Dataset`, gathered from one copy of its arrays on ``device``.

    Transitions are drawn uniformly with replacement. Indices depend on (seed, step) alone, so a resumed run draws
    the same batches as an uninterrupted one.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        *,
        time_limit_is_terminal: bool = False,
        device: str = "cpu",
        subset: NDArray[np.int64] | None = None,
    ) -> None:
        """Draw from the positions ``subset`` of ``dataset.transitions``; from all when None."""
        rows = np.asarray(dataset.transitions, np.int64)
        done = dataset.done(time_limit_is_terminal)
        followed = np.append(rows[1:] == rows[:-1] + 1, False)  # the next row is a transition, too
        if subset is not None:
            rows, done, followed = rows[subset], done[subset], followed[subset]
        if len(rows) < 1:
            raise DatasetError("the dataset holds no transition: expected at least one episode of two rows")
        self._rows, self._seed, self._batch_size = rows, seed, batch_size
        self._done = torch.from_numpy(done.astype(np.float32)).to(device)
        self._followed = torch.from_numpy(followed.astype(np.float32)).to(device)
        self._observations = torch.from_numpy(dataset.observations).to(device)
        shared = np.shares_memory(dataset.states, dataset.observations)
        self._states = (
            self._observations.reshape(len(dataset.observations), -1)
            if shared
            else torch.from_numpy(dataset.states).to(device)
        )
        self._actions = torch.from_numpy(dataset.actions).to(device)
        self._rewards = torch.from_numpy(dataset.rewards).to(device)
        masks = dataset.action_masks
        self._masks = None if masks is None else torch.from_numpy(masks).to(device)
        starts = dataset.episode_start if len(dataset.episode_start) else rows[:1]
        self._starts = np.asarray(starts, np.int64)
        self._device = device
        self._block: tuple[int, NDArray[np.int64]] = (-1, np.empty((0, 0), np.int64))

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, step: int) -> Batch:
        """Draw the batch of one step."""
        block, offset = divmod(step, _BLOCK)
        if self._block[0] != block:
            generator = np.random.default_rng([self._seed, block])
            self._block = (block, generator.integers(len(self._rows), size=(_BLOCK, self._batch_size)))
        return self.gather(self._block[1][offset])

    def gather(self, positions: NDArray[np.int64]) -> Batch:
        """Collect the transitions at the given positions."""
        rows = torch.from_numpy(self._rows[positions]).to(self._device)
        following = rows + 1
        index = torch.from_numpy(positions).to(self._device)
        # The remainder of a uniform position is uniform; a separate draw would shift all others.
        initial = torch.from_numpy(self._starts[positions % len(self._starts)]).to(self._device)
        return Batch(
            observation=self._observations[rows],
            action=self._actions[rows],
            reward=self._rewards[rows],
            not_done=1.0 - self._done[index],
            state=self._states[rows],
            next_observation=self._observations[following],
            next_state=self._states[following],
            next_action=self._actions[following],
            next_action_known=self._followed[index],
            mask=None if self._masks is None else self._masks[rows],
            next_mask=None if self._masks is None else self._masks[following],
            initial_observation=self._observations[initial],
            initial_state=self._states[initial],
        )


def noise_at(seed: int, step: int, device: str = "cpu") -> torch.Generator:
    """Make the generator of one training step's noise, which depends on (seed, step) alone."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + step)
