"""Allocation of a total divergence budget to agents, and the dual that finds each agent's price.

Source: docs/derivation.md#allocation and docs/derivation.md#dual (the influence and the dual are the paper's; least
shares, warm-up and bounds are this project's). Budgets and divergences are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omcda_deploy.errors import ConfigError

MIN_SHARE = 0.05  # every agent's least share of the total, before renormalising
_EPS = 1e-12
_BETA1, _BETA2, _ADAM_EPS = 0.9, 0.999, 1e-8  # of the dual's Adam, as torch's


def influence_shares(influence: Tensor, temperature: float | Tensor) -> Tensor:
    """Return ``softmax(m / T)`` with the least share applied: [..., N] -> [..., N], sums to 1."""
    return _bounded(torch.softmax(influence / temperature, dim=-1))


def uniform_shares(agents: int) -> Tensor:
    """Return equal shares [N]."""
    return torch.full((agents,), 1.0 / agents)


def random_shares(agents: int, seed: int) -> Tensor:
    """Draw shares [N] from the uniform distribution over shares, with the least share applied."""
    shares = np.random.default_rng([seed, 0xA110C]).dirichlet(np.ones(agents))
    return _bounded(torch.tensor(shares, dtype=torch.float32))


def _bounded(shares: Tensor) -> Tensor:
    shares = shares.clamp_min(MIN_SHARE)
    return shares / shares.sum(-1, keepdim=True)


@dataclass(frozen=True)
class Strategy:
    """A rule of allocation.

    With ``follows_influence`` shares move with m_i. With ``single_price`` all agents have one alpha, and only the
    sum of their divergences is held.
    """

    initial: Callable[[int, int], Tensor]  # (agents, seed) -> shares [N]
    follows_influence: bool = False
    single_price: bool = False


STRATEGIES: dict[str, Strategy] = {
    "influence": Strategy(lambda agents, seed: uniform_shares(agents), follows_influence=True),
    "uniform": Strategy(lambda agents, seed: uniform_shares(agents)),
    "random": Strategy(random_shares),
    "optimal": Strategy(lambda agents, seed: uniform_shares(agents), single_price=True),
}


class Allocation:
    """The budgets d_i of R runs: an average of the influence m_i, rescaled, through softmax, times d_tot."""

    def __init__(
        self,
        strategies: Sequence[str],
        agents: int,
        d_tot: Tensor,
        seeds: Sequence[int],
        *,
        temperature: Tensor,
        decay: float,
    ) -> None:
        """``strategies``: names of :data:`STRATEGIES`, one per run; ``d_tot``, ``temperature``: [R, 1]."""
        for strategy in strategies:
            if strategy not in STRATEGIES:
                raise ConfigError(f"allocation: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
        self.strategies = [STRATEGIES[strategy] for strategy in strategies]
        self.d_tot, self._temperature, self._decay = d_tot, temperature, decay
        device = d_tot.device
        self._follows = torch.tensor([[s.follows_influence] for s in self.strategies], device=device)
        self.shares = torch.stack(
            [s.initial(agents, seed) for s, seed in zip(self.strategies, seeds, strict=True)]
        ).to(device)
        self.influence = torch.zeros_like(self.shares)
        self._scale = torch.zeros_like(d_tot)
        self._weight = 0.0  # sum of the average's weights so far, for its bias correction
        self.released = torch.zeros_like(
            d_tot, dtype=torch.bool
        )  # shares wait until the team has moved at all

    @property
    def budgets(self) -> Tensor:
        """d_i [R, N]; under ``optimal`` a reference line, d_tot/N, since only the sum is held."""
        return self.shares * self.d_tot

    def observe(self, influence: Tensor, divergence: Tensor) -> None:
        """Take in a measurement of m_i [R, N] and the present KL_i [R, N] (batch means); move the shares."""
        keep = self._decay
        self.influence = keep * self.influence + (1.0 - keep) * influence
        self._scale = keep * self._scale + (1.0 - keep) * influence.abs().mean(1, keepdim=True)
        self._weight = keep * self._weight + (1.0 - keep)
        # With next to no divergence m_i is a ratio of two noises.
        self.released = self.released | (divergence.sum(1, keepdim=True) > 0.01 * self.d_tot)
        # Numerator and scale carry the same weight of the average, so the bias correction cancels.
        shares = influence_shares(self.influence / (self._scale + _EPS), self._temperature)
        self.shares = torch.where(self._follows & self.released, shares, self.shares)

    @property
    def mean_influence(self) -> Tensor:
        """The bias-corrected average of m_i [R, N]."""
        return self.influence / max(self._weight, _EPS)

    def state_dict(self, run: int) -> dict[str, Any]:
        """The state of one run."""
        return {
            "shares": self.shares[run].cpu(),
            "influence": self.influence[run].cpu(),
            "scale": self._scale[run, 0].cpu(),
            "weight": self._weight,
            "released": bool(self.released[run]),
        }

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Load the states of all runs, which have taken in equally many measurements."""
        device = self.shares.device

        def rows(name: str) -> Tensor:
            return torch.stack([torch.as_tensor(state[name]) for state in states]).to(device)

        self.shares, self.influence = rows("shares"), rows("influence")
        self._scale, self.released = rows("scale").unsqueeze(1), rows("released").unsqueeze(1)
        self._weight = states[0]["weight"]


class Dual:
    """``min_alpha alpha_i (d_i - KL_i)`` by Adam on log alpha, for R runs: a KL above the budget raises alpha_i.

    A run under ``single_price`` has one alpha for all agents, ``min alpha (d_tot - sum_i KL_i)``. A run's dual
    begins when its reward critic has settled; until then its alpha and its moments stand still.
    """

    def __init__(self, agents: int, alpha0: Tensor, lr: float, *, single_price: Sequence[bool]) -> None:
        """``alpha0`` [R, 1]; ``single_price``: one flag per run."""
        self.low, self.high = alpha0 / 200.0, 5.0 * alpha0
        self._lr = lr
        self._single = torch.tensor([[flag] for flag in single_price], device=alpha0.device)
        self.log_alpha = alpha0.log().expand(-1, agents).clone()
        self._mean, self._square = torch.zeros_like(self.log_alpha), torch.zeros_like(self.log_alpha)
        self._steps = torch.zeros_like(alpha0)

    @property
    def alpha(self) -> Tensor:
        """alpha_i [R, N]."""
        return self.log_alpha.exp()

    @property
    def at_bound(self) -> Tensor:
        """[R, N] bool: the budget is unattainable (low) or below the noise (high)."""
        alpha = self.alpha
        return (alpha <= self.low * (1 + 1e-4)) | (alpha >= self.high * (1 - 1e-4))

    def descend(self, budgets: Tensor, divergence: Tensor, active: Tensor) -> Tensor:
        """Take one step of the ``active`` [R] runs on the batch means ``divergence`` [R, N]; return L_alpha [R]."""
        moving = active.unsqueeze(1)
        gap = budgets - divergence
        gap = torch.where(self._single, gap.sum(1, keepdim=True).expand_as(gap), gap)
        alpha = self.alpha
        terms = alpha * gap
        loss = torch.where(self._single[:, 0], terms[:, 0], terms.sum(1))
        gradient = terms  # d/d log alpha
        self._steps = self._steps + moving
        self._mean = torch.where(moving, torch.lerp(self._mean, gradient, 1.0 - _BETA1), self._mean)
        square = _BETA2 * self._square + (1.0 - _BETA2) * gradient * gradient
        self._square = torch.where(moving, square, self._square)
        steps = self._steps.clamp_min(1.0)
        mean = self._mean / -torch.expm1(steps * math.log(_BETA1))
        deviation = (self._square / -torch.expm1(steps * math.log(_BETA2))).sqrt() + _ADAM_EPS
        moved = self.log_alpha - self._lr * mean / deviation
        moved = torch.maximum(torch.minimum(moved, self.high.log()), self.low.log())
        self.log_alpha = torch.where(moving, moved, self.log_alpha)
        return loss

    def state_dict(self, run: int) -> dict[str, Any]:
        """The state of one run, in the form of ``torch.optim.Adam`` over its own prices."""
        width = 1 if bool(self._single[run]) else self.log_alpha.shape[1]
        moments = {
            "step": self._steps[run, 0].clone(),
            "exp_avg": self._mean[run, :width].clone(),
            "exp_avg_sq": self._square[run, :width].clone(),
        }
        return {"log_alpha": self.log_alpha[run, :width].clone(), "optimizer": {"state": {0: moments}}}

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Load the states of all runs, in their order."""
        for run, state in enumerate(states):
            self.log_alpha[run] = state["log_alpha"]
            moments = state["optimizer"]["state"].get(0)
            if moments:
                self._steps[run] = moments["step"]
                self._mean[run], self._square[run] = moments["exp_avg"], moments["exp_avg_sq"]
