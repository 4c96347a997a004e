"""Allocation of a total divergence budget to agents.

Source: docs/derivation.md#allocation (the softmax of the influence is the paper's; least shares and the one price
for all agents are this project's). Budgets and divergences are in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omcda_deploy.errors import ConfigError

MIN_SHARE = 0.05  # every agent's least share of the total, before renormalising
_EPS = 1e-12


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

    With ``single_price`` all agents have one alpha, and only the sum of their divergences is held: shares are an
    average of what each of them spends.
    """

    initial: Callable[[int, int], Tensor]  # (agents, seed) -> shares [N]
    follows_influence: bool = False
    single_price: bool = False


STRATEGIES: dict[str, Strategy] = {
    "optimal": Strategy(lambda agents, seed: uniform_shares(agents), single_price=True),
    "influence": Strategy(lambda agents, seed: uniform_shares(agents), follows_influence=True),
    "uniform": Strategy(lambda agents, seed: uniform_shares(agents)),
    "random": Strategy(random_shares),
}


class Allocation:
    """The budgets d_i of R runs: shares times d_tot.

    Its state stays where it is in memory: a CUDA graph finds it there.
    """

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
        self._by_influence = torch.tensor([[s.follows_influence] for s in self.strategies], device=device)
        self._single_price = torch.tensor([[s.single_price] for s in self.strategies], device=device)
        self.shares = torch.stack(
            [s.initial(agents, seed) for s, seed in zip(self.strategies, seeds, strict=True)]
        ).to(device)
        self.influence = torch.zeros_like(self.shares)
        self._scale = torch.zeros_like(d_tot)
        # Sum of the average's weights so far, for its bias correction.
        self._weight = torch.zeros((), dtype=torch.float64, device=device)
        # Shares wait until the team has moved at all.
        self.released = torch.zeros_like(d_tot, dtype=torch.bool)

    @property
    def budgets(self) -> Tensor:
        """d_i [R, N]."""
        return self.shares * self.d_tot

    def observe(self, influence: Tensor, divergence: Tensor) -> None:
        """Take in a measurement of m_i [R, N] and the present KL_i [R, N] (batch means); move the shares."""
        keep = self._decay
        self.influence.copy_(keep * self.influence + (1.0 - keep) * influence)
        self._scale.copy_(keep * self._scale + (1.0 - keep) * influence.abs().mean(1, keepdim=True))
        self._weight.mul_(keep).add_(1.0 - keep)
        # With next to no divergence m_i is a ratio of two noises.
        self.released.logical_or_(divergence.sum(1, keepdim=True) > 0.01 * self.d_tot)
        # Numerator and scale carry the same weight of the average, so the bias correction cancels.
        relative = self.influence / (self._scale + _EPS)
        by_influence = influence_shares(relative, self._temperature)
        spent = divergence.clamp_min(_EPS)
        spent = keep * self.shares + (1.0 - keep) * spent / spent.sum(1, keepdim=True)
        moved = torch.where(self._single_price, _bounded(spent), by_influence)
        moves = self.released & (self._single_price | self._by_influence)
        self.shares.copy_(torch.where(moves, moved, self.shares))

    @property
    def mean_influence(self) -> Tensor:
        """The bias-corrected average of m_i [R, N]."""
        return self.influence / self._weight.clamp_min(_EPS).float()

    def state_dict(self, run: int) -> dict[str, Any]:
        """The state of one run."""
        return {
            "shares": self.shares[run].cpu(),
            "influence": self.influence[run].cpu(),
            "scale": self._scale[run, 0].cpu(),
            "weight": float(self._weight),
            "released": bool(self.released[run]),
        }

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Load the states of all runs, which have taken in equally many measurements."""
        device = self.shares.device

        def rows(name: str) -> Tensor:
            return torch.stack([torch.as_tensor(state[name]) for state in states]).to(device)

        self.shares, self.influence = rows("shares"), rows("influence")
        self._scale, self.released = rows("scale").unsqueeze(1), rows("released").unsqueeze(1)
        self._weight.fill_(states[0]["weight"])
