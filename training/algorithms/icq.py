"""ICQ: implicit constraint Q-learning for teams (Yang et al., NeurIPS 2021, 2106.03400).

Targets use no value of an action outside the data: they value the *recorded* next action, weighed by how much
likelier the improved policy would take it, and the policy clones recorded actions with such weights. With
``Q_tot = sum_i w_i(s) q_i(o_i,a_i) + b(s)`` and ``pi* = pi_b exp(Q_tot/T)/Z`` the policy factors into agents
(bars: target networks, no gradient; m = 1 - terminal; B rows in a batch of a run; sg: no gradient):

    A_i   = q_i(o_i,a_i) - v_i(o_i)
    rho   = min( B softmax_batch( sum_i wbar_i(s') Abar_i(o'_i,a'_i) / T_Q ), rho_max )
    L_Q   = (Q_tot(s,a) - [r + gamma m rho Qbar_tot(s',a')])^2
    W_i   = B softmax_batch( w_i(s) A_i / T_pi )
    L_pi  = -sg(W_i) log pi_i(a_i|o_i);   at its minimum pi_i = pi_b^i exp(w_i q_i/T_pi)/Z_i

q_i is the smaller of two critics everywhere, as published with the linear mixer. v_i, which makes weights of
different states comparable, is q_i under the present policy: its mean over available actions (discrete, exact) or
its value at the policy's mode (continuous). Without it rho favours good states instead of good actions, which makes
the discount exceed 1 there, and Q runs away (on HalfCheetah 6x1 at T_Q 10 and at 1000). Since rho is normalised
over the batch and not in each state, the same happens, more slowly, where T_Q is well below the spread of the
team's advantages (on a chain game at 1 and 2, not at 5). W_i needs a weight w_i per agent, so ``mixer=qmix`` is
refused.

The last transition before a time limit bootstraps, but no action was taken after it: such rows are left out of L_Q
and of rho's softmax. Rows that do not bootstrap are left out of that softmax too.

Deviations from the published team code with a linear mixer: both softmaxes average to 1 over the batch, as in the
original ICQ-MA, where the port's sum to 1 and cut the bootstrap to 1/B; both see advantages, not raw values; rho is
capped; squared errors are not decayed along the shuffled batch as though it were a trajectory. ``as_released``
restores all four, since published numbers may depend on them. From ICQ-MA itself this differs by one-step targets,
a feed-forward actor, masks before the softmax and no least exploration probability in log pi.

Source: docs/baselines.md#icq.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from omcda_deploy.training.batches import Batch
from omcda_deploy.training.distributions import Categorical, Distribution, divergence, policy_of
from omcda_deploy.training.fleet import column, mean_per_run
from omcda_deploy.training.losses import mix
from omcda_deploy.training.metrics import KL
from omcda_deploy.training.networks import NetworkFactory
from omcda_deploy.training.optimizer import Group, JointOptimizer, loss_metrics, parameters_of
from omcda_deploy.training.settings import (
    BatchSize,
    Choice,
    Discount,
    GradientNorm,
    LearningRate,
    MixerWidth,
    Range,
    StandardizeStates,
    Tau,
    Width,
    check,
)

PAPER = "Believe What You See: Implicit Constraint Approach for Offline Multi-Agent RL (2021)"
SUMMARY = "values and clones recorded actions only, weighted by a softmax over the batch"
ACTIONS = frozenset({"continuous", "discrete"})
DIVERGENCE = {"continuous": "kl", "discrete": "kl"}
COLUMNS = (KL,)
PER_RUN = ("critic_temperature", "policy_temperature", "rho_max")

RELEASED_LAMBDA = 0.8
NO_QMIX = {
    "qmix": "pi_b exp(Q_tot/T) factors into agents, each with its weight w_i, only where Q_tot is linear in their "
    "values"
}


@dataclass(frozen=True)
class Config:
    """Settings of ICQ as published for MA-MuJoCo."""

    critic_temperature: Annotated[float, Range(1e-6, 1e9), "T_Q, in units of return"] = 10.0
    policy_temperature: Annotated[float, Range(1e-6, 1e9), "T_pi, in units of return"] = 100.0
    rho_max: Annotated[float, Range(1.0, 1e6), "cap of the weights"] = 10.0
    as_released: Annotated[bool, "the published code's weights and decay (the module's docstring)"] = False
    mixer: Annotated[str, Choice("linear", "vdn", refused=NO_QMIX), "how the agents' values are joined"] = (
        "linear"
    )
    lr: LearningRate = 5e-4
    gamma: Discount = 0.99
    tau: Tau = 0.005
    grad_clip: GradientNorm = 1.0
    batch_size: BatchSize = 128
    hidden: Width = 256
    mixer_hidden: MixerWidth = 64
    standardize_states: StandardizeStates = False

    def __post_init__(self) -> None:
        check(self)


class TwinQ(nn.Module):
    """A pair of critics; the smaller of their values counts."""

    def __init__(self, networks: NetworkFactory) -> None:
        super().__init__()
        self.first: Any = networks.q()
        self.second: Any = networks.q()

    def forward(self, observation: Tensor, action: Tensor, policy: Distribution) -> tuple[Tensor, Tensor]:
        """Return ``(q_i(o_i,a_i), v_i(o_i))``, both [R, B, N]; v_i under ``policy`` and without gradient."""
        if isinstance(policy, Categorical):
            values = torch.minimum(self.first.values(observation), self.second.values(observation))
            expected = (policy.log_probs.detach().exp() * values.detach()).sum(-1)
            return values.gather(-1, action.unsqueeze(-1)).squeeze(-1), expected
        q = torch.minimum(self.first(observation, action), self.second(observation, action))
        with torch.no_grad():
            mode = torch.tanh(policy.mean)
            return q, torch.minimum(self.first(observation, mode), self.second(observation, mode))


def batch_weights(scores: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return ``B softmax(scores)`` over axis 1 of [R, B, …].

    With ``valid`` [R, B], 0 or 1, the mean is 1 over the valid rows of a run, and others have weight 0.
    """
    if valid is None:
        return scores.shape[1] * torch.softmax(scores, 1)
    lowest = torch.finfo(scores.dtype).min
    return valid * valid.sum(1, keepdim=True) * torch.softmax(scores.masked_fill(valid == 0, lowest), 1)


def effective_share(weights: Tensor) -> Tensor:
    """Return ``(sum W)^2 / (B sum W^2)`` [R, N]: the share of the batch [R, B, N] that carries the weight."""
    return weights.sum(1).square() / (weights.shape[1] * weights.square().sum(1))


def released_decay(not_done: Tensor, gamma: float) -> Tensor:
    """Return ``(0.8 gamma)^(2 j)`` [R, B]; j counts rows from the last with ``not_done`` 0."""
    position = torch.arange(not_done.shape[1], device=not_done.device)
    start = torch.where(not_done == 0, position, 0).cummax(1).values
    # Powers are looked up: how the last numbers of a tensor are rounded depends on its length, and so on R.
    powers: Tensor = (RELEASED_LAMBDA * gamma) ** (2 * position)
    return powers[position - start]


def make_policy(config: Config, networks: NetworkFactory) -> nn.Module:
    """Make the module that is snapshotted and exported."""
    return networks.actor()


class Algorithm:
    """Train R runs by ICQ: one :meth:`update` is one gradient step of each on its batch."""

    budgets = alpha = noise = None

    def __init__(
        self,
        configs: Sequence[Config],
        networks: NetworkFactory,
        behavior: nn.Module,
        *,
        steps: int,
        device: str = "cpu",
    ) -> None:
        config = self.config = configs[0]
        self._critic_temperature = column(configs, "critic_temperature", device)
        self._policy_temperature = column(configs, "policy_temperature", device).unsqueeze(-1)  # [R, 1, 1]
        self._rho_max = column(configs, "rho_max", device)
        self.q, self.mixer = TwinQ(networks), networks.mixer(config.mixer_hidden, config.mixer)
        self.policy = make_policy(config, networks).to(device)
        self.online = nn.ModuleList((self.q, self.mixer)).to(device)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.q_target, self.mixer_target = self.target
        self._optimizer = JointOptimizer(
            [
                Group(parameters_of(self.policy), config.lr),
                Group(parameters_of(self.online), config.lr),
            ],
            config.grad_clip,
            modules={"policy": self.policy, "online": self.online, "target": self.target},
            averages=[(self.target, self.online)],
            tau=config.tau,
        )
        self.step = 0

    def update(self, batch: Batch, watched: bool = True) -> dict[str, Tensor]:
        return self.compute(batch, self.begin(watched))

    def begin(self, watched: bool) -> tuple[()]:
        self.step += 1
        return ()  # every step is like the others

    def compute(self, batch: Batch, plan: tuple[()]) -> dict[str, Tensor]:
        c = self.config
        policy = policy_of(self.policy, batch.observation, batch.mask)
        y, rho = self._target(batch)
        q, v = self.q(batch.observation, batch.action, policy)
        w, b = self.mixer(batch.state)
        q_tot = mix(w, q, b)
        error = (q_tot - y).square()
        if c.as_released:
            weights = torch.softmax((w * q).detach() / self._policy_temperature, 1)
            error = error * released_decay(batch.not_done, c.gamma)
        else:
            weights = batch_weights((w * (q - v)).detach() / self._policy_temperature)
        # A transition that bootstraps, but after which no action was taken, has no target.
        valid = 1.0 - batch.not_done * (1.0 - batch.next_action_known)
        losses = {
            "policy": -mean_per_run(weights * batch.log_prob(policy)),  # L_pi
            "critic": (valid * error).sum(1) / valid.sum(1).clamp_min(1.0),  # L_Q
        }
        self._optimizer.descend(losses)
        with torch.no_grad():
            return {
                **loss_metrics(losses),
                "kl": divergence(policy, batch.behavior).mean(1),
                "value/reward_total": q_tot.mean(1),
                "weights/effective_share": effective_share(weights),
                "weights/rho_capped": mean_per_run((rho >= self._rho_max).float()),
            }

    @torch.no_grad()
    def _target(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return ``(y, rho)``, both [R, B]."""
        c = self.config
        policy = policy_of(self.policy, batch.next_observation, batch.next_mask)
        q, v = self.q_target(batch.next_observation, batch.next_action, policy)
        w, b = self.mixer_target(batch.next_state)
        q_tot = mix(w, q, b)
        if c.as_released:
            rho = torch.softmax(q_tot / self._critic_temperature, 1)
        else:
            advantage = (w * (q - v)).sum(-1)
            bootstraps = batch.not_done * batch.next_action_known
            rho = batch_weights(advantage / self._critic_temperature, bootstraps).minimum(self._rho_max)
        return batch.reward + c.gamma * batch.not_done * rho * q_tot, rho

    def state_dict(self, run: int) -> dict[str, Any]:
        return {**self._optimizer.state_dict(run), "step": self.step}

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        self._optimizer.load_state_dicts(states)
        self.step = states[0]["step"]
