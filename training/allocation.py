"""Allocation of a total divergence budget to agents.

Source: docs/derivation.md#allocation (the softmax of the influence is the paper's; least shares and the
accumulation of influence are this project's). Budgets and divergences are in nats.
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
ACCUMULATED_MIN_SHARE = 0.01
_STEP = 0.05  # of log shares under `accumulated`, per measurement
_EPS = 1e-12


def influence_shares(influence: Tensor, temperature: float | Tensor) -> Tensor:
    """Return ``softmax(m / T)`` with the least share applied: [..., N] -> [..., N], sums to 1."""
    return _bounded(torch.softmax(influence / temperature, dim=-1))


def accumulated_shares(shares: Tensor, influence: Tensor) -> Tensor:
    """Return shares [..., N] after a step of mirror ascent along ``influence`` [..., N], relative to its mean size.

    It rests where all m_i are equal, as they are where the budget is best split. A softmax of the present m_i
    answers 1/N there, and so rests elsewhere.
    """
    moved = shares * torch.exp(_STEP * (influence - 1.0))
    return _bounded(moved / moved.sum(-1, keepdim=True), ACCUMULATED_MIN_SHARE)


def uniform_shares(agents: int) -> Tensor:
    """Return equal shares [N]."""
    return torch.full((agents,), 1.0 / agents)


def random_shares(agents: int, seed: int) -> Tensor:
    """Draw shares [N] from the uniform distribution over shares, with the least share applied."""
    shares = np.random.default_rng([seed, 0xA110C]).dirichlet(np.ones(agents))
    return _bounded(torch.tensor(shares, dtype=torch.float32))


def _bounded(shares: Tensor, least: float = MIN_SHARE) -> Tensor:
    shares = shares.clamp_min(least)
    return shares / shares.sum(-1, keepdim=True)


@dataclass(frozen=True)
class Strategy:
    """A rule of allocation.

    With ``single_price`` all agents have one alpha, and only the sum of their divergences is held.
    """

    initial: Callable[[int, int], Tensor]  # (agents, seed) -> shares [N]
    # (shares [R, N], relative influence [R, N], temperature [R, 1]) -> shares; None: they never move
    moved: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    single_price: bool = False

    @property
    def follows_influence(self) -> bool:
        """True where shares move with m_i."""
        return self.moved is not None


STRATEGIES: dict[str, Strategy] = {
    "influence": Strategy(
        lambda agents, seed: uniform_shares(agents),
        lambda shares, influence, temperature: influence_shares(influence, temperature),
    ),
    "accumulated": Strategy(
        lambda agents, seed: uniform_shares(agents),
        lambda shares, influence, temperature: accumulated_shares(shares, influence),
    ),
    "uniform": Strategy(lambda agents, seed: uniform_shares(agents)),
    "random": Strategy(random_shares),
    "optimal": Strategy(lambda agents, seed: uniform_shares(agents), single_price=True),
}


class Allocation:
    """The budgets d_i of R runs: an average of the influence m_i, rescaled, through softmax, times d_tot.

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
        self._rows = {
            name: torch.tensor([[other == name] for other in strategies], device=device)
            for name in dict.fromkeys(strategies)
        }
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
        """d_i [R, N]; under ``optimal`` a reference line, d_tot/N, since only the sum is held."""
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
        for name, rows in self._rows.items():
            if moved := STRATEGIES[name].moved:
                shares = moved(self.shares, relative, self._temperature)
                self.shares.copy_(torch.where(rows & self.released, shares, self.shares))

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
