"""How a total divergence budget is split over agents, and how each agent's price for it is found.

Source: omcda.md section 4 (the paper's influence and dual; floors, warm-up and bounds are this project's).
Budgets and divergences are in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omcda_deploy.errors import ConfigError

SHARE_FLOOR = 0.05  # every agent keeps at least this much of the total, before renormalising
_EPS = 1e-12


def influence_shares(influence: Tensor, temperature: float) -> Tensor:
    """``softmax(m / T)`` with the floor: [N] -> [N], sums to 1."""
    return _floored(torch.softmax(influence / temperature, dim=0))


def uniform_shares(agents: int) -> Tensor:
    return torch.full((agents,), 1.0 / agents)


def random_shares(agents: int, seed: int) -> Tensor:
    """One draw from the uniform distribution over shares, with the floor."""
    drawn = np.random.default_rng([seed, 0xA110C]).dirichlet(np.ones(agents))
    return _floored(torch.tensor(drawn, dtype=torch.float32))


def _floored(shares: Tensor) -> Tensor:
    shares = shares.clamp_min(SHARE_FLOOR)
    return shares / shares.sum()


@dataclass(frozen=True)
class Strategy:
    """``follows_influence``: shares move with m_i. ``single_price``: one alpha, and no shares at all."""

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
    """The budgets d_i: an EMA of the influence m_i, rescaled, through softmax, times d_tot."""

    def __init__(
        self, strategy: str, agents: int, d_tot: float, seed: int, *, temperature: float, decay: float
    ) -> None:
        if strategy not in STRATEGIES:
            raise ConfigError(f"allocation: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
        self.strategy = STRATEGIES[strategy]
        self.d_tot, self._temperature, self._decay = d_tot, temperature, decay
        self.shares = self.strategy.initial(agents, seed)
        self.influence = torch.zeros(agents)
        self._scale = torch.zeros(())
        self._weight = 0.0  # sum of the EMA's weights so far, for its bias correction
        self.released = False  # shares stay as they began until the team has moved at all

    @property
    def budgets(self) -> Tensor:
        """d_i [N]; under ``optimal`` merely a reference line, since only the sum is held."""
        return self.shares * self.d_tot

    def observe(self, influence: Tensor, divergence: Tensor) -> None:
        """Take in a measurement of m_i [N] and the present KL_i [N] (batch means); move the shares."""
        keep = self._decay
        self.influence = keep * self.influence + (1.0 - keep) * influence
        self._scale = keep * self._scale + (1.0 - keep) * influence.abs().mean()
        self._weight = keep * self._weight + (1.0 - keep)
        # With next to no divergence m_i is a ratio of two noises.
        self.released = self.released or float(divergence.sum()) > 0.01 * self.d_tot
        if self.strategy.follows_influence and self.released:
            # Numerator and scale carry the same EMA weight, so the bias correction cancels.
            self.shares = influence_shares(self.influence / (self._scale + _EPS), self._temperature)

    @property
    def mean_influence(self) -> Tensor:
        """The bias-corrected EMA of m_i [N]."""
        return self.influence / max(self._weight, _EPS)

    def state_dict(self) -> dict[str, Any]:
        return {
            "shares": self.shares,
            "influence": self.influence,
            "scale": self._scale,
            "weight": self._weight,
            "released": self.released,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shares, self.influence, self._scale = state["shares"], state["influence"], state["scale"]
        self._weight, self.released = state["weight"], state["released"]


class Dual:
    """``min_alpha alpha_i (d_i - KL_i)`` by Adam on log alpha: a KL above the budget raises alpha_i."""

    def __init__(self, agents: int, alpha0: float, lr: float, *, single_price: bool) -> None:
        self._single = single_price
        self._agents = agents
        self.low, self.high = alpha0 / 200.0, 5.0 * alpha0
        self.log_alpha = torch.full(
            (1 if single_price else agents,), float(np.log(alpha0)), requires_grad=True
        )
        self._optimizer = torch.optim.Adam([self.log_alpha], lr=lr)

    @property
    def alpha(self) -> Tensor:
        """alpha_i [N], detached."""
        return self.log_alpha.detach().exp().expand(self._agents)

    @property
    def at_bound(self) -> Tensor:
        """[N] bool: the budget is unattainable (low) or below the noise (high)."""
        alpha = self.alpha
        return (alpha <= self.low * (1 + 1e-4)) | (alpha >= self.high * (1 - 1e-4))

    def step(self, budgets: Tensor, divergence: Tensor) -> Tensor:
        """One step on the batch means ``divergence`` [N]; returns the loss."""
        gap = (budgets - divergence).detach()
        alpha = self.log_alpha.exp()
        loss = (alpha * gap.sum()).sum() if self._single else (alpha * gap).sum()
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        with torch.no_grad():
            self.log_alpha.clamp_(float(np.log(self.low)), float(np.log(self.high)))
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        return {"log_alpha": self.log_alpha.detach().clone(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.log_alpha.copy_(state["log_alpha"])
        self._optimizer.load_state_dict(state["optimizer"])
