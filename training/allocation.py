"""Allocation of a total divergence budget to agents, and the dual that finds each agent's price.

Source: docs/derivation.md#allocation and docs/derivation.md#dual (the influence and the dual are the paper's; least
shares, warm-up and bounds are this project's). Budgets and divergences are in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omcda_deploy.errors import ConfigError

MIN_SHARE = 0.05  # every agent's least share of the total, before renormalising
_EPS = 1e-12


def influence_shares(influence: Tensor, temperature: float) -> Tensor:
    """Return ``softmax(m / T)`` with the least share applied: [N] -> [N], sums to 1."""
    return _bounded(torch.softmax(influence / temperature, dim=0))


def uniform_shares(agents: int) -> Tensor:
    """Return equal shares [N]."""
    return torch.full((agents,), 1.0 / agents)


def random_shares(agents: int, seed: int) -> Tensor:
    """Draw shares [N] from the uniform distribution over shares, with the least share applied."""
    shares = np.random.default_rng([seed, 0xA110C]).dirichlet(np.ones(agents))
    return _bounded(torch.tensor(shares, dtype=torch.float32))


def _bounded(shares: Tensor) -> Tensor:
    shares = shares.clamp_min(MIN_SHARE)
    return shares / shares.sum()


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
    """The budgets d_i: d_tot times the softmax of a rescaled EMA of the influence m_i."""

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
        self.released = False  # shares keep their first values until the team has moved

    @property
    def budgets(self) -> Tensor:
        """Budgets d_i [N]; under ``optimal``, which holds the sum alone, a reference line of d_tot/N each."""
        return self.shares * self.d_tot

    def observe(self, influence: Tensor, divergence: Tensor) -> None:
        """Update the shares from measurements of m_i [N] and the present KL_i [N], both batch means."""
        keep = self._decay
        self.influence = keep * self.influence + (1.0 - keep) * influence
        self._scale = keep * self._scale + (1.0 - keep) * influence.abs().mean()
        self._weight = keep * self._weight + (1.0 - keep)
        # While the divergence is near zero, m_i is the ratio of two noises.
        self.released = self.released or float(divergence.sum()) > 0.01 * self.d_tot
        if self.strategy.follows_influence and self.released:
            # Numerator and scale carry the same EMA weight, so the bias correction cancels.
            self.shares = influence_shares(self.influence / (self._scale + _EPS), self._temperature)

    @property
    def mean_influence(self) -> Tensor:
        """EMA of m_i [N], bias-corrected."""
        return self.influence / max(self._weight, _EPS)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values that :meth:`load_state_dict` takes."""
        return {
            "shares": self.shares,
            "influence": self.influence,
            "scale": self._scale,
            "weight": self._weight,
            "released": self.released,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state that :meth:`state_dict` returned."""
        self.shares, self.influence, self._scale = state["shares"], state["influence"], state["scale"]
        self._weight, self.released = state["weight"], state["released"]


class Dual:
    """Minimise ``L_alpha = alpha_i (d_i - KL_i)`` by Adam on log alpha: a KL above the budget raises alpha_i."""

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
        """Prices alpha_i [N], detached."""
        return self.log_alpha.detach().exp().expand(self._agents)

    @property
    def at_bound(self) -> Tensor:
        """Bool [N]; at the lower bound the budget cannot be reached, at the upper it is below the noise."""
        alpha = self.alpha
        return (alpha <= self.low * (1 + 1e-4)) | (alpha >= self.high * (1 - 1e-4))

    def descend(self, budgets: Tensor, divergence: Tensor) -> Tensor:
        """Take one step on the batch means ``divergence`` [N]; return L_alpha."""
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
        """Return tensors and plain values that :meth:`load_state_dict` takes."""
        return {"log_alpha": self.log_alpha.detach().clone(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state that :meth:`state_dict` returned."""
        with torch.no_grad():
            self.log_alpha.copy_(state["log_alpha"])
        self._optimizer.load_state_dict(state["optimizer"])
