"""Actions in place of a policy's: the behaviour policy's, and those of blends.

A blend is ``pi_w ~ pi_b^(1-w) pi^w`` of a policy and the behaviour policy. KL(pi_w || pi_b) grows with w from 0.
Its root at a threshold is found by Newton's method on the logarithms of both, where it is nearly a line, inside a
bracket that is halved when a step would leave it. Weights are multiples of 2^-30, rounded down, so they do not
depend on how they were found.

Per entry j of continuous actions (a Gaussian under the tanh, precisions p and p_b),

    r = p / p_b - 1,   d = p_b ((r + 1) (mean - mean_b))^2,   t = 1 + w r
    2 KL = sum_j  1 / t + log t - 1 + d (w / t)^2,            2 KL' = sum_j  w r^2 / t^2 + 2 d w / t^3

and for discrete ones, with D = log pi - log pi_b and Z = sum pi_b exp(w D),

    KL = w E_w[D] - log Z,                                    KL' = w Var_w[D]

Shapes: B rows, k agents, n the entries of all agents, joined along the last axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from omcda_deploy.spec import AgentSpec

Float64: TypeAlias = NDArray[np.float64]

UNIT = 2.0**-30  # weights are multiples of it
LAST = 2**30 - 1  # units of the largest weight below 1
ITERATIONS, CORRECTIONS = 60, 8  # many more than needed
NEAR = 1e-6  # relative step that is the last one, as the next would be its square
LONGEST = 20.0  # logarithm of a step
_MOMENTS = ("mean", "log_std", "behavior_mean", "behavior_log_std")


@dataclass(frozen=True, eq=False)
class Joined:
    """The places of k agents in joined vectors of n entries."""

    starts: NDArray[np.int64]  # [k] first entry of each agent
    owner: NDArray[np.int64]  # [n] agent of each entry

    @classmethod
    def of(cls, sizes: Sequence[int]) -> Joined:
        """Join agents of the given sizes."""
        ends = np.cumsum(sizes)
        return cls(ends - np.asarray(sizes), np.repeat(np.arange(len(sizes)), sizes))

    def slices(self) -> Iterator[slice]:
        """Yield the entries of each agent."""
        for start, end in zip(self.starts, [*self.starts[1:], len(self.owner)], strict=True):
            yield slice(int(start), int(end))

    def sum(self, terms: NDArray[Any]) -> NDArray[Any]:
        """Sum the entries of each agent: ``[..., n] -> [..., k]``."""
        total: NDArray[Any] = np.add.reduceat(terms, self.starts, axis=-1)
        return total

    def argmax(self, scores: NDArray[Any]) -> NDArray[np.int64]:
        """Choose the largest entry of each agent: ``[B, n] -> [B, k]``."""
        return np.stack([scores[:, part].argmax(axis=1) for part in self.slices()], axis=1)

    def spread(self, values: NDArray[Any]) -> NDArray[Any]:
        """Give each entry its agent's value: ``[..., k] -> [..., n]``."""
        spread: NDArray[Any] = values[..., self.owner]
        return spread


class Gaussians:
    """Blends of Gaussians under the tanh: precision and precision-weighted mean are linear in w."""

    def __init__(
        self, joined: Joined, mean: Float64, log_std: Float64, mean_b: Float64, log_std_b: Float64
    ) -> None:
        """Take the parameters [B, n] of the policies and of the behaviour policies."""
        self._joined = joined
        self._precision, self._precision_b = np.exp(-2.0 * log_std), np.exp(-2.0 * log_std_b)
        self._mean, self._mean_b = mean, mean_b
        self._ratio = self._precision / self._precision_b - 1.0
        self._distance = self._precision_b * ((self._ratio + 1.0) * (mean - mean_b)) ** 2

    def act(self, weight: Float64, noise: Float64) -> Float64:
        """Sample actions [B, n] in [-1, 1] of the blends with ``weight`` [B, k], by standard normal ``noise``."""
        w = self._joined.spread(weight)
        precision = (1.0 - w) * self._precision_b + w * self._precision
        mean = ((1.0 - w) * self._precision_b * self._mean_b + w * self._precision * self._mean) / precision
        squashed: Float64 = np.tanh(mean + noise / np.sqrt(precision))
        return squashed

    def curves(self) -> tuple[Float64, Callable[[Float64], tuple[Float64, Float64]]]:
        """Return KL'' [B, k] at 0, and the function from w [B, k] to KL and KL'."""
        ratio, distance, joined = self._ratio, self._distance, self._joined
        ratio2, distance2 = ratio**2, 2.0 * distance

        def curve(weight: Float64) -> tuple[Float64, Float64]:
            w = joined.spread(weight)
            inverse = 1.0 / (1.0 + w * ratio)
            share = w * inverse
            kl = joined.sum(inverse - 1.0 - np.log(inverse) + distance * share * share)
            slope = joined.sum(share * inverse * (ratio2 + distance2 * inverse))
            return 0.5 * kl, 0.5 * slope

        return joined.sum(0.5 * ratio2 + distance), curve


class Logits:
    """Blends of categorical distributions: log-probabilities are linear in w, up to their normalisation."""

    def __init__(self, joined: Joined, logits: Float64, logits_b: Float64) -> None:
        """Take log-probabilities [B, n]; an action that both exclude stays excluded."""
        self._joined = joined
        self._logits, self._logits_b = logits, logits_b
        with np.errstate(invalid="ignore"):
            self._gap = np.nan_to_num(logits - logits_b, nan=0.0)

    def act(self, weight: Float64, noise: Float64) -> NDArray[np.int64]:
        """Sample actions [B, k] of the blends with ``weight`` [B, k], by Gumbel ``noise`` [B, n]."""
        w = self._joined.spread(weight)
        return self._joined.argmax((1.0 - w) * self._logits_b + w * self._logits + noise)

    def curves(self) -> tuple[Float64, Callable[[Float64], tuple[Float64, Float64]]]:
        """Return KL'' [B, k] at 0, and the function from w [B, k] to KL and KL'."""
        gap, logits_b, joined = self._gap, self._logits_b, self._joined

        def moments(weight: Float64) -> tuple[Float64, Float64, Float64]:
            """Mean and variance of D under pi_w, and log Z."""
            scores = logits_b + joined.spread(weight) * gap
            top = np.maximum.reduceat(scores, joined.starts, axis=-1)
            shares = np.exp(scores - joined.spread(top))
            total = joined.sum(shares)
            shares /= joined.spread(total)
            mean = joined.sum(shares * gap)
            return mean, joined.sum(shares * (gap - joined.spread(mean)) ** 2), top + np.log(total)

        def curve(weight: Float64) -> tuple[Float64, Float64]:
            mean, variance, log_total = moments(weight)
            return weight * mean - log_total, weight * variance

        return moments(np.zeros((len(gap), len(joined.starts))))[1], curve


def largest_weights(blends: Gaussians | Logits, thresholds: Float64) -> Float64:
    """Return the largest w [B, k] with KL <= the thresholds [B, k]: 0 where these are, or numbers are too large."""
    curvature, curve = blends.curves()
    with np.errstate(all="ignore"):
        possible = (thresholds > 0.0) & (curvature > 0.0) & (curvature < np.inf)
        low, high = np.zeros(thresholds.shape), np.ones(thresholds.shape)
        w = np.where(possible, np.clip(np.sqrt(2.0 * thresholds / curvature), UNIT, 1.0 - UNIT), 0.5)
        for _ in range(ITERATIONS):
            kl, slope = curve(w)
            inside = kl <= thresholds
            low, high = np.where(inside, w, low), np.where(inside, high, w)
            newton = w * np.exp(np.minimum(np.log(thresholds / kl) * kl / (w * slope), LONGEST))
            settled = (np.abs(newton - w) <= NEAR * w * (1.0 - w)) | ~possible
            usable = settled | ((newton > low) & (newton < high))
            w = np.where(usable, newton, 0.5 * (low + high))
            if settled.all():
                break
        units = np.clip(np.floor(w / UNIT), 0, LAST)
        for _ in range(CORRECTIONS):  # the iteration ends beside the root, and not always on its side
            down = possible & (units > 0) & ~(curve(units * UNIT)[0] <= thresholds)
            up = possible & (units < LAST) & ~down & (curve((units + 1) * UNIT)[0] <= thresholds)
            if not (down | up).any():
                break
            units += np.where(down, -1.0, up)
        else:  # numbers so large that the iteration ended too early: halve steps instead
            found, step = np.zeros(units.shape), (LAST + 1) // 2
            while step:
                found += np.where(curve((found + step) * UNIT)[0] <= thresholds, step, 0)
                step //= 2
            units = np.where(down | up, found, units)
        return np.where(possible, units * UNIT, 0.0)


class JoinedActions:
    """Actions of k agents, joined as in the team graph: ``[B, n]`` entries, or ``[B, k]`` discrete actions.

    Numbers are computed in float64 from contiguous copies, because numpy rounds some functions differently on
    strided arrays: so the answer to a row does not depend on the arrays that it came in.
    """

    def __init__(self, agents: Sequence[AgentSpec]) -> None:
        self.places = Joined.of([agent.action.size for agent in agents])
        self.discrete = agents[0].action.kind == "discrete"
        low, high = (np.array([getattr(a.action, bound) for a in agents]) for bound in ("low", "high"))
        self._middle, self._half = (self.places.spread(v) for v in ((high + low) / 2.0, (high - low) / 2.0))

    def behavior(self, parameters: Mapping[str, NDArray[Any]], noise: NDArray[Any]) -> NDArray[Any]:
        """Return the behaviour policies' actions; the deterministic ones where an agent's noise is zero.

        ``parameters``: ``behavior_action``, ``behavior_mean`` and ``behavior_log_std``, or ``behavior_logits``.
        """
        noise = _contiguous(noise)
        noisy = self.places.sum(noise != 0.0) > 0  # [B, k]
        deterministic = parameters["behavior_action"]
        if self.discrete:
            scores = _contiguous(parameters["behavior_logits"]) + noise
            return np.where(noisy, self.places.argmax(scores), deterministic)
        mean, log_std = (_contiguous(parameters[f"behavior_{name}"]) for name in ("mean", "log_std"))
        sample = self._scaled(np.tanh(mean + np.exp(log_std) * noise))
        return np.where(self.places.spread(noisy), sample, deterministic).astype(np.float32)

    def blend(
        self,
        parameters: Mapping[str, NDArray[Any]],
        noise: NDArray[Any],
        thresholds: Float64,
        wanted: NDArray[np.bool_],
    ) -> tuple[NDArray[Any], Float64]:
        """Return actions of the blends, and their weights [B, k]: the largest ones where ``wanted``, elsewhere 1.

        ``parameters``: ``mean``, ``log_std``, ``behavior_mean`` and ``behavior_log_std``, or both ``logits``.
        """
        names = ("logits", "behavior_logits") if self.discrete else _MOMENTS
        values = [_contiguous(parameters[name]) for name in names]
        blends: Any = (Logits if self.discrete else Gaussians)(self.places, *values)
        limits = np.broadcast_to(thresholds, wanted.shape)
        weight = np.where(wanted, largest_weights(blends, limits), 1.0)
        action = blends.act(weight, _contiguous(noise))
        return action if self.discrete else self._scaled(action), weight

    def _scaled(self, squashed: Float64) -> Float64:
        """Scale actions from [-1, 1] to their agents' ranges."""
        return self._middle + self._half * squashed


def _contiguous(values: NDArray[Any]) -> Float64:
    return np.ascontiguousarray(values, np.float64)
