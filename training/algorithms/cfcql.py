"""CFCQL: counterfactual conservative Q-learning (Shao et al., NeurIPS 2023, 2309.12696).

CQL's penalty on the joint action grows with the team. Here each agent alone deviates from the data, one at a time,
and the penalties are averaged with weights lambda_i(s) that sum to one (bars: target networks, sg: no gradient,
m = 1 - terminal; 1 or 2 critics q, pi_b the behaviour model):

    Q^i(s,u)  = Q_tot(s, (u, a_-i));  under a linear mixer Q_tot(s,a) + w_i ( q_i(o_i,u) - q_i(o_i,a_i) )
    penalty   = sum_i lambda_i ( LSE_u Q^i(s,u) - Q_tot(s,a) )
    lambda_i  = softmax_i( tau KL(mu_i || pi_b^i) )  or with -tau; 1/N where tau = 0
    y         = r + gamma m min_critics Qbar_tot(s', a')
    L_Q       = sum_critics [ (Q_tot(s,a) - y)^2 + alpha penalty ]

Discrete: LSE and mu_i = softmax_u Q^i run over the available actions, exactly; a' is the first critic's argmax; the
policy is that argmax. Continuous: mu_i = pi_i, a tanh-Gaussian of fixed deviation; the LSE is estimated from 3 x 10
actions (uniform, of pi_i at o, of pi_i at o'), each divided by its density; a' ~ pi_i(.|o'), and the policy climbs
Q_tot while the others keep to the data:

    L_pi      = -mean_i Q^i(s, u_i) + c mean u^2,  u_i ~ pi_i reparameterised, gradient through pi_i alone

Under a linear mixer uniform weights make the penalty that of multi-agent CQL divided by N, so that lambda_i alone
tells the two apart. Every mixer works: for ``qmix``, Q^i of all u costs one rank-one update of its first layer.

The sign of tau: the released code weighs those agents more that deviate more (``lambda_sign=positive``); the paper
is said to do the opposite, which we could not verify (``negative``). A released tau of 100 stands for the argmax.

Deviations from the published code:

* A mixer and shared feed-forward networks on one step stand for a central critic and separate policies (continuous)
  and for a GRU and TD(lambda) (discrete).
* The squared error is not halved: twice a published discrete alpha is the same alpha here. Discrete runs have two
  critics unless ``twin=false``, as published.
* log pi of candidates from o and from o' is paired with their values; the released lists are in different orders.
* a' has the policy's own deviation (published 0.2 for candidates, 0.05 for a'), and KL(pi_i||pi_b) is closed form
  instead of a variational autoencoder's estimate.
* Policy and critics step together; published are five steps of the critics to one of the policy.
* Networks, learning rate and batch are OMIGA's; batch normalisation is left out.

Source: docs/baselines.md#cfcql.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from omcda_deploy.training.actions import entry_mean
from omcda_deploy.training.batches import Batch
from omcda_deploy.training.conservative import (
    candidate_actions,
    candidate_log_density,
    discrete_penalty,
    sampled_penalty,
)
from omcda_deploy.training.distributions import Categorical, TanhGaussian, gaussian_of
from omcda_deploy.training.fleet import Noise, column, mean_per_run
from omcda_deploy.training.losses import elu
from omcda_deploy.training.metrics import KL
from omcda_deploy.training.networks import (
    GreedyActor,
    NetworkFactory,
    QmixMixer,
    masked_log_softmax,
    total_value,
)
from omcda_deploy.training.optimizer import Group, JointOptimizer, frozen, loss_metrics, parameters_of
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
    Weight,
    Width,
    check,
)

PAPER = "Counterfactual Conservative Q Learning for Offline Multi-agent Reinforcement Learning (2023)"
SUMMARY = "conservative Q-learning in which one agent at a time deviates from the data"
ACTIONS = frozenset({"continuous", "discrete"})
DIVERGENCE = {"continuous": "kl", "discrete": "neg_log_behavior"}
PER_RUN = ("alpha", "lambda_tau", "action_penalty")
COLUMNS = (KL,)


@dataclass(frozen=True)
class Config:
    """Settings of CFCQL; alpha as published for MA-MuJoCo's medium data."""

    alpha: Annotated[Weight, "weight of the penalty"] = 1.0
    lambda_tau: Annotated[
        Weight, "strength with which lambda_i follows the agents' divergences; 0: uniform"
    ] = 1.0
    lambda_sign: Annotated[str, Choice("positive", "negative"), "sign of tau"] = "positive"
    twin: Annotated[bool, "two critics, the smaller value is the target; false: one"] = True
    mixer: Annotated[str, Choice("linear", "vdn", "qmix"), "how the agents' values are joined"] = "linear"
    candidates: Annotated[int, Range(1, 1024), "continuous: actions of each of the three kinds"] = 10
    policy_std: Annotated[float, Range(0.01, 1.0), "continuous: deviation of the policy under the tanh"] = 0.2
    action_penalty: Annotated[Weight, "continuous: c of L_pi"] = 1e-3
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


class FixedDeviationActor(nn.Module):
    """A tanh-Gaussian policy with a learned mean and a fixed deviation: the published policy and its noise."""

    def __init__(self, actor: nn.Module, deviation: float) -> None:
        """Replace the log_std of ``actor``, a Gaussian one."""
        super().__init__()
        self.actor = actor
        self.padding = getattr(actor, "padding", None)
        self.log_std = math.log(deviation)

    def forward(self, observation: Tensor, agent: int | None = None) -> tuple[Tensor, Tensor]:
        """Map ``[B, (N,) O] -> (mean, log_std)``, each [B, (N,) A]."""
        mean, _ = self.actor(observation, agent)
        return mean, torch.full_like(mean, self.log_std)


def counterfactual_change(mixer: nn.Module, values: Tensor, data_values: Tensor, state: Tensor) -> Tensor:
    """Return ``Q^i(s, u) - Q_tot(s, a)`` [R, K, B, N]: the gain when agent i alone does each of K actions u.

    ``values`` q_i(o_i, u^k) [R, K, B, N], ``data_values`` q_i(o_i, a_i) [R, B, N], ``state`` [R, B, S].
    """
    change = values - data_values.unsqueeze(1)  # [R, K, B, N]
    if not isinstance(mixer, QmixMixer):
        weights, _ = mixer(state)
        product: Tensor = weights.unsqueeze(1) * change
        return product
    w1 = mixer.w1(state).abs().unflatten(-1, (mixer.agents, mixer.embed))  # [R, B, N, E]
    hidden = (data_values.unsqueeze(-1) * w1).sum(-2) + mixer.b1(state)
    hidden = hidden.unsqueeze(-2)  # [R, B, 1, E]
    moved = hidden.unsqueeze(1) + change.unsqueeze(-1) * w1.unsqueeze(1)  # [R, K, B, N, E]
    gain = elu(moved) - elu(hidden).unsqueeze(1)
    total: Tensor = (gain * mixer.w2(state).abs()[:, None, :, None]).sum(-1)
    return total


def agent_weights(kl: Tensor, tau: Tensor, sign: str) -> Tensor:
    """Return ``lambda_i = softmax_i( +-tau KL_i )``, tau [R, 1, 1]: [R, B, N] -> [R, B, N], without gradient."""
    return torch.softmax((tau if sign == "positive" else -tau) * kl.detach(), -1)


def make_policy(config: Config, networks: NetworkFactory) -> nn.Module:
    """Make the module that is snapshotted and exported."""
    if networks.spec.action_kind == "discrete":
        q: Any = networks.q()
        return GreedyActor(q)
    return FixedDeviationActor(networks.actor(), config.policy_std)


class Algorithm:
    """Train R runs by CFCQL: one :meth:`update` is one gradient step of each on its batch."""

    budgets = alpha = None

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
        self._alpha, self._action_penalty = (
            column(configs, name, device).squeeze(-1) for name in ("alpha", "action_penalty")
        )  # [R] each
        self._lambda_tau = column(configs, "lambda_tau", device).unsqueeze(-1)  # [R, 1, 1]
        self.noise = Noise(networks.seeds or (), device)
        self.policy = make_policy(config, networks).to(device)
        self.mixer = networks.mixer(config.mixer_hidden, config.mixer)
        # A greedy policy is its critic: the two share their parameters.
        first = self.policy.q if isinstance(self.policy, GreedyActor) else networks.q()
        self.critics: list[Any] = [first, networks.q()] if config.twin else [first]
        self.online = nn.ModuleList((self.mixer, *self.critics)).to(device)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.critics_target: list[Any]
        self.mixer_target, *self.critics_target = self.target
        groups = [Group(parameters_of(self.online), config.lr)]
        if not isinstance(self.policy, GreedyActor):
            groups.append(Group(parameters_of(self.policy), config.lr))
        self._optimizer = JointOptimizer(
            groups,
            config.grad_clip,
            modules={"policy": self.policy, "online": self.online, "target": self.target},
            averages=[(self.target, self.online)],
            tau=config.tau,
        )
        self.step = 0

    def update(self, batch: Batch, watched: bool = True) -> dict[str, Tensor]:
        return self.compute(batch, self.begin(watched))

    def begin(self, watched: bool) -> tuple[()]:
        self.noise.at(self.step)
        self.step += 1
        return ()  # every step is like the others

    def compute(self, batch: Batch, plan: tuple[()]) -> dict[str, Tensor]:
        behavior = batch.behavior
        if isinstance(behavior, Categorical):
            losses, metrics = self._discrete(batch, behavior)
        else:
            losses, metrics = self._continuous(batch, behavior)
        self._optimizer.descend(losses)
        return {**loss_metrics(losses), **metrics}

    def _discrete(self, batch: Batch, behavior: Categorical) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        c = self.config
        assert batch.mask is not None  # since behaviour is categorical
        assert batch.next_mask is not None
        tables = [critic.values(batch.observation) for critic in self.critics]  # [R, B, N, A] each
        data_values = [table.gather(-1, batch.action.unsqueeze(-1)).squeeze(-1) for table in tables]
        changes = [
            counterfactual_change(self.mixer, table.movedim(-1, 1), q, batch.state).movedim(1, -1)
            for table, q in zip(tables, data_values, strict=True)
        ]
        with torch.no_grad():
            next_scores = self.critics[0].values(batch.next_observation)
            y = self._target(batch, masked_log_softmax(next_scores, batch.next_mask).argmax(-1))
            soft_greedy = Categorical(masked_log_softmax(changes[0], batch.mask))  # mu_i
            weights = agent_weights(soft_greedy.kl(behavior), self._lambda_tau, c.lambda_sign)
            surprise = -behavior.log_prob(masked_log_softmax(tables[0], batch.mask).argmax(-1))
        unit = torch.ones_like(y).unsqueeze(-1)
        penalties = [discrete_penalty(unit, change, batch.action, batch.mask) for change in changes]
        losses = self._critic_losses(batch, data_values, penalties, weights, y)
        return losses, {"kl": surprise.mean(1), "lambda": weights.mean(1), "value/target": y.mean(1)}

    def _continuous(
        self, batch: Batch, behavior: TanhGaussian
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        c, o, s = self.config, batch.observation, batch.state
        noise = self.noise
        policy = gaussian_of(self.policy, o)
        with torch.no_grad():
            next_policy = gaussian_of(self.policy, batch.next_observation)
            y = self._target(batch, next_policy.sample(1, noise).squeeze(1))
            actions = candidate_actions(policy, next_policy, c.candidates, noise, batch.action)
            log_density = candidate_log_density(actions[:, 1:], policy, next_policy)
            log_density += math.log(3 * c.candidates)
            kl = policy.kl(behavior)
            weights = agent_weights(kl, self._lambda_tau, c.lambda_sign)
        values = [critic.candidates(o, actions) for critic in self.critics]  # [R, 1 + K, B, N] each
        data_values = [value[:, 0] for value in values]
        unit, zero = torch.ones_like(weights), torch.zeros_like(weights)
        penalties = [
            sampled_penalty(unit, counterfactual_change(self.mixer, value[:, 1:], q, s), zero, log_density)
            for value, q in zip(values, data_values, strict=True)
        ]
        losses = self._critic_losses(batch, data_values, penalties, weights, y)
        policy_action = policy.sample(1, noise)  # [R, 1, B, N, A]
        with frozen(self.online):
            value = self.critics[0].candidates(o, policy_action)
            gain = counterfactual_change(self.mixer, value, data_values[0].detach(), s)
        effort = self._action_penalty * entry_mean(policy_action.square(), policy.padding)
        losses["policy"] = effort - mean_per_run(gain)  # L_pi
        return losses, {"kl": kl.mean(1), "lambda": weights.mean(1), "value/target": y.mean(1)}

    def _critic_losses(
        self, batch: Batch, data_values: list[Tensor], penalties: list[Tensor], weights: Tensor, y: Tensor
    ) -> dict[str, Tensor]:
        """Return the two terms of L_Q, summed over critics; the lists hold one [R, B, N] per critic."""
        errors = [total_value(self.mixer, q, batch.state) - y for q in data_values]
        return {
            "critic": functools.reduce(torch.add, [mean_per_run(error.square()) for error in errors]),
            "conservative": self._alpha
            * functools.reduce(
                torch.add, [mean_per_run((weights * penalty).sum(-1)) for penalty in penalties]
            ),
        }

    def _target(self, batch: Batch, next_action: Tensor) -> Tensor:
        """Return ``y`` [R, B] for actions at s' that the online policy chose, valued by the target critics."""
        totals = [
            total_value(self.mixer_target, critic(batch.next_observation, next_action), batch.next_state)
            for critic in self.critics_target
        ]
        y: Tensor = batch.reward + self.config.gamma * batch.not_done * functools.reduce(
            torch.minimum, totals
        )
        return y

    def state_dict(self, run: int) -> dict[str, Any]:
        return {**self._optimizer.state_dict(run), "step": self.step}

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        self._optimizer.load_state_dicts(states)
        self.step = states[0]["step"]
