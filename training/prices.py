"""The prices alpha_i of divergence that make each agent meet its budget d_i: a dual by gradient, or solved.

Source: docs/derivation.md#dual (the dual is the paper's; warm-up, bounds and the solved price are this project's).
Budgets and divergences are in nats. Shapes: R runs, B batch, N agents. States stay where they are in memory: a CUDA
graph finds them there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_BETA1, _BETA2, _ADAM_EPS = 0.9, 0.999, 1e-8  # of the dual's Adam, as torch's
WINDOW = 20  # batches from which a price is solved
SOLVE_EVERY = 50  # steps
_HALVINGS = 24  # of an interval of log alpha: its width ends below 1e-6
_CORRECTION = 0.1  # of log(d_i/KL_i) per solution
_LAG = 5.0  # of the averaged policy behind its price, in 1/tau_policy, before what it spends says anything
_SCALES = (0.5, 100.0)  # the least is near 1: a budget below the noise of training must not end all learning


class Settling:
    """The moment from which prices move: once a run's reward critic explains its targets; before, z is noise."""

    def __init__(self, threshold: Tensor) -> None:
        """``threshold`` [R]: of the average of L_Qr/Var(y)."""
        self._threshold = threshold
        self._ratio = torch.full_like(threshold, math.inf)
        self.active = torch.zeros_like(threshold, dtype=torch.bool)

    def observe(self, loss: Tensor, target: Tensor, late: bool) -> Tensor:
        """Take in L_Qr [R] and its targets [R, B]; return whose prices move, bool [R]: all where ``late``."""
        ratio = loss / target.var(1).clamp_min(1e-12)
        self._ratio.copy_(torch.where(self._ratio.isinf(), ratio, 0.99 * self._ratio + 0.01 * ratio))
        return self.active.logical_or_((self._ratio < self._threshold) | late)

    def state_dict(self, run: int) -> dict[str, Any]:
        """The state of one run."""
        return {"dual_active": bool(self.active[run]), "settling": float(self._ratio[run])}

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Load the states of all runs, in their order."""
        for run, state in enumerate(states):
            self.active[run], self._ratio[run] = state["dual_active"], state["settling"]


class Dual:
    """``min_alpha alpha_i (d_i - KL_i)`` by Adam on log alpha, for R runs: a KL above the budget raises alpha_i.

    A run under ``single_price`` has one alpha for all agents, ``min alpha (d_tot - sum_i KL_i)``. A run's dual
    begins when its reward critic has settled; until then its alpha and its moments stand still.
    """

    def __init__(self, agents: int, alpha0: Tensor, lr: float, *, single_price: Sequence[bool]) -> None:
        """``alpha0`` [R, 1]; ``single_price``: one flag per run."""
        self.low, self.high = alpha0 / 200.0, 5.0 * alpha0
        self._log_low, self._log_high = self.low.log(), self.high.log()
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
        self._steps.add_(moving)
        self._mean.copy_(torch.where(moving, torch.lerp(self._mean, gradient, 1.0 - _BETA1), self._mean))
        square = _BETA2 * self._square + (1.0 - _BETA2) * gradient * gradient
        self._square.copy_(torch.where(moving, square, self._square))
        steps = self._steps.clamp_min(1.0)
        mean = self._mean / -torch.expm1(steps * math.log(_BETA1))
        deviation = (self._square / -torch.expm1(steps * math.log(_BETA2))).sqrt() + _ADAM_EPS
        moved = self.log_alpha - self._lr * mean / deviation
        moved = torch.maximum(torch.minimum(moved, self._log_high), self._log_low)
        self.log_alpha.copy_(torch.where(moving, moved, self.log_alpha))
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


class Exponents:
    """Parts of z in the last :data:`WINDOW` batches that were added."""

    def __init__(self, device: torch.device) -> None:
        # [3, R, WINDOW, B, N]: advantages in units of reward, corrections in nats, weights; the first batch says B.
        self._parts = torch.empty(0, device=device)
        self._next = torch.zeros(1, dtype=torch.long, device=device)

    def add(self, advantage: Tensor, correction: Tensor, weight: Tensor) -> None:
        """Put in a batch, [R, B, N] each, for the oldest; ``weight`` is 0 where an agent had no choice, else 1."""
        batch = torch.stack((advantage, correction, weight)).unsqueeze(2)
        if not len(self._parts):
            self._parts = torch.zeros_like(batch.expand(-1, -1, WINDOW, -1, -1))
        self._parts.index_copy_(2, self._next, batch)
        self._next.add_(1).remainder_(WINDOW)

    def joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """Advantages, corrections and weights of all batches, [R, WINDOW B, N] each."""
        advantage, correction, weight = self._parts.flatten(2, 3)
        return advantage, correction, weight

    def state_dict(self, run: int) -> dict[str, Any]:
        """The batches of one run."""
        parts = self._parts[:, run].clone() if len(self._parts) else None
        return {"exponents": parts, "next_exponents": int(self._next)}

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Load the batches of all runs, which took in equally many."""
        parts = [state["exponents"] for state in states]
        if parts[0] is not None:
            self._parts = torch.stack(parts, dim=1).to(self._next.device)
        self._next.fill_(states[0]["next_exponents"])


def divergence_of(exponents: tuple[Tensor, Tensor, Tensor], alpha: Tensor, z_max: float) -> Tensor:
    """Return KL(pi*_i || pi_b^i) [R, N] of ``pi*_i = pi_b exp z``, ``z = advantage / alpha + correction``.

    From actions of pi_b: ``E[rho z]/E[rho] - log E[rho]``, which needs no normalised z. ``alpha``: [R, N].
    """
    advantage, correction, weight = exponents
    z = (advantage / alpha.unsqueeze(1) + correction).clamp_max(z_max)
    z = z - z.amax(1, keepdim=True)  # which changes nothing but rounding
    rho = z.exp() * weight

    # Sums over contiguous rows do not depend on the number of runs.
    def total(values: Tensor) -> Tensor:
        return values.mT.contiguous().sum(-1)

    mass, count = total(rho).clamp_min(1e-30), total(weight).clamp_min(1.0)
    return total(rho * z) / mass - (mass / count).log()


class SolvedPrice:
    """Prices at which the policies ``pi_b exp z`` spend their budgets, by bisection on recent batches.

    No integrator lags behind the critic, and noise of the trained network counts for nothing. What the trained
    policy spends is another matter: :class:`BudgetScales`.
    """

    def __init__(self, agents: int, alpha0: Tensor, *, single_price: Sequence[bool], z_max: float) -> None:
        """``alpha0`` [R, 1], the price until the first solution; ``single_price``: one flag per run."""
        self.low, self.high = alpha0 / 1e3, alpha0 * 1e6
        self._log_low, self._log_high = self.low.log(), self.high.log()
        self._single = torch.tensor([[flag] for flag in single_price], device=alpha0.device)
        self._z_max = z_max
        self.log_alpha = alpha0.log().expand(-1, agents).clone()

    @property
    def alpha(self) -> Tensor:
        """alpha_i [R, N]."""
        return self.log_alpha.exp()

    @property
    def at_bound(self) -> Tensor:
        """[R, N] bool: the budget is beyond what recorded actions allow (low), or 0 (high)."""
        alpha = self.alpha
        return (alpha <= self.low * (1 + 1e-3)) | (alpha >= self.high * (1 - 1e-3))

    def solve(self, exponents: tuple[Tensor, Tensor, Tensor], budgets: Tensor, active: Tensor) -> None:
        """Set the prices of the ``active`` [R] runs so that they spend ``budgets`` [R, N]."""
        low, high = self._log_low.expand_as(self.log_alpha), self._log_high.expand_as(self.log_alpha)
        for _ in range(_HALVINGS):
            middle = 0.5 * (low + high)
            excess = divergence_of(exponents, middle.exp(), self._z_max) - budgets
            excess = torch.where(self._single, excess.sum(1, keepdim=True).expand_as(excess), excess)
            excess = torch.where(budgets > 0, excess, 1.0)  # rounding of a divergence near 0 decides nothing
            low, high = torch.where(excess > 0, middle, low), torch.where(excess > 0, high, middle)
        self.log_alpha.copy_(torch.where(active.unsqueeze(1), 0.5 * (low + high), self.log_alpha))

    def state_dict(self, run: int) -> dict[str, Any]:
        """The state of one run."""
        return {"log_alpha": self.log_alpha[run].clone()}

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Load the states of all runs, in their order."""
        for run, state in enumerate(states):
            self.log_alpha[run] = state["log_alpha"]


class BudgetScales:
    """Factors of the budgets that prices are solved for, such that the trained policies spend their budgets.

    A network with the agent's observation cannot follow what z owes to the state or to noise, and may spend less
    than ``pi_b exp z``. So scale_i grows while less than d_i is measured.
    """

    def __init__(
        self, agents: int, *, single_price: Sequence[bool], tau_policy: float, device: torch.device | str
    ) -> None:
        """``single_price``: one flag per run; ``tau_policy``: step of the average whose divergence is measured."""
        self._single = torch.tensor([[flag] for flag in single_price], device=device)
        self._log_scale = torch.zeros(len(single_price), agents, device=device)
        self._solutions = torch.zeros(len(single_price), 1, device=device)  # so far
        self._wait = _LAG / tau_policy / SOLVE_EVERY  # solutions before the first correction
        self._followed = 1.0 - (1.0 - tau_policy) ** SOLVE_EVERY  # of a new budget, until the next solution
        self._budgets = torch.zeros_like(self._log_scale)  # averaged as the policy is

    @property
    def values(self) -> Tensor:
        """scale_i [R, N]."""
        return self._log_scale.exp()

    def correct(self, budgets: Tensor, divergence: Tensor, active: Tensor) -> None:
        """Move the scales of the ``active`` [R] runs by what their policies spend, ``divergence`` [R, N].

        Budgets are averaged as those policies are, which cannot have followed what has moved since.
        """
        followed = torch.where(self._solutions > 0, self._followed, 1.0)
        self._budgets.copy_(torch.lerp(self._budgets, budgets, followed))
        budgets = self._budgets
        spent = torch.where(self._single, divergence.sum(1, keepdim=True).expand_as(divergence), divergence)
        allowed = torch.where(self._single, budgets.sum(1, keepdim=True).expand_as(budgets), budgets)
        error = (allowed.clamp_min(1e-9) / spent.clamp_min(1e-9)).log().clamp(-1.0, 1.0)
        low, high = _SCALES
        moved = (self._log_scale + _CORRECTION * error).clamp(math.log(low), math.log(high))
        late = active.unsqueeze(1) & (self._solutions >= self._wait)
        self._log_scale.copy_(torch.where(late, moved, self._log_scale))
        self._solutions.add_(active.unsqueeze(1))

    def state_dict(self, run: int) -> dict[str, Any]:
        """The state of one run."""
        return {
            "log_scale": self._log_scale[run].clone(),
            "solutions": float(self._solutions[run]),
            "budgets": self._budgets[run].clone(),
        }

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Load the states of all runs, in their order."""
        for run, state in enumerate(states):
            self._log_scale[run], self._solutions[run] = state["log_scale"], state["solutions"]
            self._budgets[run] = state["budgets"]


class PriceSolver:
    """Prices of the policies that are trained, and of those that critics evaluate, from the last batches."""

    def __init__(
        self,
        agents: int,
        alpha0: Tensor,
        d_tot: Tensor,
        d_eval: Tensor,
        *,
        single_price: Sequence[bool],
        z_max: float,
        tau_policy: float,
    ) -> None:
        """``alpha0``, ``d_tot``, ``d_eval`` [R, 1]: nats at most, in total, of the policies that critics evaluate.

        ``single_price``: one flag per run; ``tau_policy``: step of the average whose divergence is measured.
        """
        self.price = SolvedPrice(agents, alpha0, single_price=single_price, z_max=z_max)
        self.eval_price = SolvedPrice(agents, alpha0, single_price=single_price, z_max=z_max)
        self.exponents = Exponents(alpha0.device)
        self.capped = d_tot > d_eval  # [R, 1]: evaluated policies have a smaller budget than the trained ones
        self._d_eval = d_eval
        self._scales = BudgetScales(
            agents, single_price=single_price, tau_policy=tau_policy, device=alpha0.device
        )

    @property
    def eval_alpha(self) -> Tensor:
        """Prices [R, N] of the policies that critics evaluate."""
        return torch.where(self.capped, self.eval_price.alpha, self.price.alpha)

    def eval_budgets(self, budgets: Tensor) -> Tensor:
        """Most nats [R, N] that evaluated policies spend under ``budgets``, whatever the scales."""
        return self._cap(self._scales.values.clamp_min(1.0) * budgets)

    def solve(self, budgets: Tensor, divergence: Tensor, active: Tensor) -> None:
        """Set the prices of the ``active`` [R] runs, whose averaged policies spend ``divergence`` [R, N]."""
        exponents = self.exponents.joined()
        self._scales.correct(budgets, divergence, active)
        scaled = self._scales.values * budgets
        self.price.solve(exponents, scaled, active)
        self.eval_price.solve(exponents, self._cap(scaled), active)
        above = scaled.sum(1, keepdim=True) > self._d_eval * (1.0 + 1e-5)  # not by rounding alone
        self.capped.copy_(torch.where(active.unsqueeze(1), above, self.capped))

    def _cap(self, budgets: Tensor) -> Tensor:
        total = budgets.sum(1, keepdim=True).clamp_min(1e-30)
        return budgets * (self._d_eval / total).clamp_max(1.0)

    def state_dict(self, run: int) -> dict[str, Any]:
        """The state of one run, but for the price of what is trained."""
        return {
            "eval_price": self.eval_price.state_dict(run),
            "capped": bool(self.capped[run]),
            "scales": self._scales.state_dict(run),
            **self.exponents.state_dict(run),
        }

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Load the states of all runs, in their order."""
        self.eval_price.load_state_dicts([state["eval_price"] for state in states])
        for run, state in enumerate(states):
            self.capped[run] = state["capped"]
        self._scales.load_state_dicts([state["scales"] for state in states])
        self.exponents.load_state_dicts(states)
