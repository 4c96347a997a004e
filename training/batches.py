"""Minibatches of transitions, drawn uniformly with replacement and repeatably by (seed, step).

Source: docs/baselines.md#datasets-and-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from omcda_deploy.errors import DatasetError
from omcda_deploy.training.actions import padding_of
from omcda_deploy.training.distributions import Categorical, Distribution, TanhGaussian, policy_of
from omcda_deploy.training.losses import atanh_action, gaussian_log_prob

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from omcda_deploy.datasets import Dataset, Float

_BLOCK = 256  # steps whose indices are drawn at once: one generator per block, not per step
_TAIL = 200  # transitions whose mean reward goes on after a time limit
_CONSTANT = 1e-4  # deviation below which an entry of the state tells nothing
_WIDEST = 3.0  # deviations
_CHUNK = 4096  # rows of a dataset that the behaviour model sees at once


class Batch:
    """B transitions for each of R runs. ``not_done`` is 0 where the next state's value must not be counted.

    A field may be given as a tensor or as a function that gathers it; such a function is called when the field is
    first read, so that an algorithm pays for what it reads alone. Fields that are left out are None.
    """

    observation: Tensor  # [R, B, N, O]
    action: Tensor  # [R, B, N, A], or int64 [R, B, N]
    reward: Tensor  # [R, B]
    not_done: Tensor  # [R, B]
    state: Tensor  # [R, B, S]
    next_observation: Tensor  # [R, B, N, O]
    next_state: Tensor  # [R, B, S]
    next_action: Tensor  # as action: the recorded action of the next row
    next_action_known: Tensor  # [R, B], 0 where the next row is its episode's last, in which nobody acted
    mask: Tensor | None  # uint8 [R, B, N, A], discrete tasks
    next_mask: Tensor | None
    return_to_go: Tensor  # [R, B] discounted, recorded; see :func:`returns_to_go`
    return_range: Tensor  # [R, 2]: the least and the largest of the dataset's
    # First rows of B episodes, each as likely as another; None: every row counts as one.
    initial_observation: Tensor | None  # [R, B, N, O]
    initial_state: Tensor | None  # [R, B, S]
    behavior: Distribution  # pi_b at the observation
    next_behavior: Distribution  # pi_b at the next observation
    u: Tensor | None  # continuous: atanh of the action [R, B, N, A]
    log_jacobian: Tensor | None  # continuous: log|da/du| [R, B, N]

    def __init__(self, **fields: Any) -> None:
        self._fields = fields

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in Batch.__annotations__:
            raise AttributeError(name)
        field = self._fields.get(name)
        value = field() if callable(field) else field
        setattr(self, name, value)
        return value

    def log_prob(self, policy: Distribution) -> Tensor:
        """``log pi_i(a_i|o_i)`` [R, B, N] of the recorded actions."""
        if isinstance(policy, Categorical):
            return policy.log_prob(self.action)
        if self.u is None or self.log_jacobian is None:
            self.u, self.log_jacobian = atanh_action(self.action, policy.padding)
        return gaussian_log_prob(self.u, policy.mean, policy.log_std, policy.padding) - self.log_jacobian


class DistributionTable:
    """A policy's distributions at every row of a dataset: where it is frozen, they are computed once for all."""

    def __init__(self, whole: Distribution, rows: int = 0) -> None:
        """``rows``: those of each of R policies, whose distributions follow one another; 0 for one policy."""
        self._whole, self._rows = whole, rows

    @classmethod
    def of(cls, actor: nn.Module, observations: Tensor, masks: Tensor | None) -> DistributionTable:
        """The distributions of ``actor``, of one run, at ``observations`` [rows, N, O]."""
        with torch.no_grad():
            parts = [
                policy_of(actor, observations[rows], None if masks is None else masks[rows])
                for rows in (slice(first, first + _CHUNK) for first in range(0, len(observations), _CHUNK))
            ]
        return cls(_joined(parts))

    @classmethod
    def recorded(
        cls, dataset: Dataset, padding: Tensor | None, device: str = "cpu"
    ) -> DistributionTable | None:
        """The exact distributions that acted (:mod:`omcda_deploy.datasets.behavior`); None where not known.

        ``padding``: of the actions (:mod:`omcda_deploy.training.actions`). Rows in which nobody acts mean nothing.
        """
        if dataset.behavior is None:
            return None
        arrays = {name: torch.from_numpy(values).to(device) for name, values in dataset.behavior.items()}
        if "logits" in arrays:
            return cls(Categorical(arrays["logits"]))
        padding = None if padding is None else padding.to(device)
        return cls(TanhGaussian(arrays["mean"], arrays["log_std"], padding))

    @classmethod
    def of_runs(cls, tables: Sequence[DistributionTable]) -> DistributionTable:
        """The tables of R runs, of equally many rows, as one; where all are the same table, that table."""
        first = tables[0]._whole
        if all(table is tables[0] for table in tables):
            return tables[0]
        rows = len(first.mean if isinstance(first, TanhGaussian) else first.log_probs)
        return cls(_joined([table._whole for table in tables]), rows)

    def over(self, other: DistributionTable, rows: Tensor) -> DistributionTable:
        """These distributions at ``rows`` [M], and those of ``other`` everywhere else."""
        if isinstance(self._whole, TanhGaussian):
            assert isinstance(other._whole, TanhGaussian)
            mean, log_std = other._whole.mean.clone(), other._whole.log_std.clone()
            mean[rows], log_std[rows] = self._whole.mean[rows], self._whole.log_std[rows]
            return DistributionTable(TanhGaussian(mean, log_std, other._whole.padding))
        assert isinstance(other._whole, Categorical)
        log_probs = other._whole.log_probs.clone()
        log_probs[rows] = self._whole.log_probs[rows]
        return DistributionTable(Categorical(log_probs))

    def at(self, rows: Tensor) -> Distribution:
        """The distributions at ``rows`` [...]; of R policies, those of run r at ``rows[r]``."""
        if self._rows:
            first = torch.arange(len(rows), device=rows.device) * self._rows
            rows = rows + first.view(-1, *[1] * (rows.dim() - 1))
        if isinstance(self._whole, TanhGaussian):
            mean, log_std = _take(self._whole.mean, rows), _take(self._whole.log_std, rows)
            return TanhGaussian(mean, log_std, self._whole.padding)
        return Categorical(_take(self._whole.log_probs, rows))


def _joined(parts: Sequence[Distribution]) -> Distribution:
    """Distributions of one kind, one after another."""
    gaussians = [part for part in parts if isinstance(part, TanhGaussian)]
    if gaussians:
        return TanhGaussian(
            torch.cat([part.mean for part in gaussians]),
            torch.cat([part.log_std for part in gaussians]),
            gaussians[0].padding,
        )
    return Categorical(torch.cat([part.log_probs for part in parts if isinstance(part, Categorical)]))


def episode_of(dataset: Dataset) -> NDArray[np.int64]:
    """Return the number of each transition's episode, [M]; a tail that is never closed counts to the last."""
    numbers: NDArray[np.int64] = np.searchsorted(dataset.episode_start, dataset.transitions, side="right") - 1
    return numbers


def returns_to_go(
    dataset: Dataset, gamma: float, time_limit_is_terminal: bool = False
) -> NDArray[np.float64]:
    """Return the discounted sum of recorded rewards from each transition on, [M].

    An episode that a time limit cut goes on for ever at the mean reward of its last 200 transitions, unless the
    limit counts as its end; so does a tail of rows that no closed episode covers.
    """
    rows = np.asarray(dataset.transitions, np.int64)
    rewards = dataset.rewards[rows].astype(np.float64)
    done = dataset.done(time_limit_is_terminal)
    last = np.append(rows[1:] != rows[:-1] + 1, True)
    values = np.empty(len(rows))
    first = 0
    for end in np.flatnonzero(last).tolist():
        piece = rewards[first : end + 1]
        value = 0.0 if done[end] else float(piece[-_TAIL:].mean()) / max(1.0 - gamma, 1e-3)
        for at in range(len(piece) - 1, -1, -1):
            value = piece[at] + gamma * value
            values[first + at] = value
        first = end + 1
    return values


def standardized(values: Float, rows: NDArray[np.int64]) -> Float:
    """Return ``values`` [R, S] with mean 0 and deviation 1 over ``rows``, within [-3, 3].

    Entries that hardly vary become 0.
    """
    mean, deviation = values[rows].mean(0, dtype=np.float64), values[rows].std(0, dtype=np.float64)
    varies = deviation > _CONSTANT
    scaled = np.where(varies, (values - mean) / np.where(varies, deviation, 1.0), 0.0)
    return np.clip(scaled, -_WIDEST, _WIDEST).astype(np.float32)


class TransitionSampler:
    """Batches of a :class:`Dataset`, gathered from one copy of its arrays on ``device``.

    Row r of a batch depends on (seeds[r], step) alone, so a resumed run draws what an uninterrupted one would have
    drawn, whoever is trained beside it.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seeds: Sequence[int],
        *,
        time_limit_is_terminal: bool = False,
        device: str = "cpu",
        subset: NDArray[np.int64] | None = None,
        behaviors: Sequence[nn.Module] = (),
        gamma: float = 0.99,
        standardize_states: bool = False,
    ) -> None:
        """``subset``: positions in ``dataset.transitions`` to draw from; all when None.

        ``behaviors``: the runs' frozen pi_b, for batches that hold its distributions; the dataset's own come first,
        in the rows for which it has them. ``gamma`` discounts returns-to-go.
        ``standardize_states``: batches hold states as :func:`standardized` by the dataset's mean and deviation.
        """
        rows = np.asarray(dataset.transitions, np.int64)
        done = dataset.done(time_limit_is_terminal)
        followed = np.append(rows[1:] == rows[:-1] + 1, False)  # the next row is a transition's too
        if subset is not None:
            rows, done, followed = rows[subset], done[subset], followed[subset]
        if len(rows) < 1:
            raise DatasetError("the dataset holds no transition: expected at least one episode of two rows")
        self._seeds, self._batch_size = tuple(seeds), batch_size
        self._rows = torch.from_numpy(rows).to(device)
        self._not_done = 1.0 - torch.from_numpy(done.astype(np.float32)).to(device)
        self._followed = torch.from_numpy(followed.astype(np.float32)).to(device)
        self._observations = torch.from_numpy(dataset.observations).to(device)
        shared = np.shares_memory(dataset.states, dataset.observations)
        self._states_are_joined = shared and not standardize_states
        if self._states_are_joined:
            self._states = self._observations.flatten(1)
        elif standardize_states:
            self._states = torch.from_numpy(standardized(dataset.states, dataset.transitions)).to(device)
        else:
            self._states = torch.from_numpy(dataset.states).to(device)
        self._actions = torch.from_numpy(dataset.spec.squashed(dataset.actions)).to(device)
        self._rewards = torch.from_numpy(dataset.rewards).to(device)
        masks = dataset.action_masks
        self._masks = None if masks is None else torch.from_numpy(masks).to(device)
        starts = dataset.episode_start if len(dataset.episode_start) else rows[:1]
        self._starts = torch.from_numpy(np.asarray(starts, np.int64)).to(device)
        self._table = DistributionTable.recorded(dataset, padding_of(dataset.spec), device)
        if behaviors:
            tables = {
                behavior: DistributionTable.of(behavior, self._observations, self._masks)
                for behavior in dict.fromkeys(behaviors)
            }
            if self._table is not None:
                every = torch.from_numpy(np.asarray(dataset.transitions, np.int64)).to(device)
                tables = {behavior: self._table.over(table, every) for behavior, table in tables.items()}
            self._table = DistributionTable.of_runs([tables[behavior] for behavior in behaviors])
        returns = returns_to_go(dataset, gamma, time_limit_is_terminal).astype(np.float32)
        self._returns_to_go = torch.from_numpy(returns if subset is None else returns[subset]).to(device)
        self._return_range = torch.stack(self._returns_to_go.aminmax())
        self._device = device
        self._block: tuple[int, Tensor] = (-1, torch.empty(0))

    @cached_property
    def _atanh(self) -> tuple[Tensor, Tensor]:
        """The variable under the tanh and the log-Jacobian of every recorded action, once for all steps."""
        return atanh_action(self._actions)  # of padding, which is zero, both are zero

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, step: int) -> Batch:
        """The batch of a step."""
        return self.gather(self.positions(step))

    def positions(self, step: int) -> Tensor:
        """The positions [R, B] of the batch of a step in ``dataset.transitions``."""
        block, offset = divmod(step, _BLOCK)
        if self._block[0] != block:
            size = (_BLOCK, self._batch_size)
            draws = [
                np.random.default_rng([seed, block]).integers(len(self), size=size) for seed in self._seeds
            ]
            self._block = (block, torch.from_numpy(np.stack(draws, axis=1)).to(self._device))
        return self._block[1][offset]

    def rows(self, positions: Tensor) -> Tensor:
        """The dataset's rows of the transitions at ``positions``."""
        return self._rows[positions]

    def gather(self, positions: Tensor) -> Batch:
        """The transitions at ``positions`` int64 [R, B]."""
        rows = _take(self._rows, positions)
        following = rows + 1

        def take(values: Tensor | None, at: Tensor) -> Callable[[], Tensor | None]:
            return lambda: None if values is None else _take(values, at)

        def first(values: Tensor) -> Callable[[], Tensor]:
            # The remainder of a uniform position is uniform: no draw of its own that would shift the others.
            return lambda: _take(values, self._starts[positions % len(self._starts)])

        table, joined = self._table, self._states_are_joined
        batch: Batch = Batch(
            observation=take(self._observations, rows),
            action=take(self._actions, rows),
            reward=take(self._rewards, rows),
            not_done=take(self._not_done, positions),
            state=(lambda: batch.observation.flatten(2)) if joined else take(self._states, rows),
            next_observation=take(self._observations, following),
            next_state=(lambda: batch.next_observation.flatten(2))
            if joined
            else take(self._states, following),
            next_action=take(self._actions, following),
            next_action_known=take(self._followed, positions),
            mask=take(self._masks, rows),
            next_mask=take(self._masks, following),
            return_to_go=lambda: _take(self._returns_to_go, positions),
            return_range=lambda: self._return_range.expand(len(positions), -1),
            initial_observation=first(self._observations),
            initial_state=first(self._states),
            behavior=None if table is None else lambda: table.at(rows),
            next_behavior=None if table is None else lambda: table.at(following),
            u=lambda: None if self._masks is not None else _take(self._atanh[0], rows),
            log_jacobian=lambda: None if self._masks is not None else _take(self._atanh[1], rows),
        )
        return batch


def _take(values: Tensor, at: Tensor) -> Tensor:
    """Return ``values[at]``, whole rows, by the call with which torch copies them fastest."""
    return values.index_select(0, at.flatten()).view(*at.shape, *values.shape[1:])
