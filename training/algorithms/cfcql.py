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
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omcda_deploy.training.batches import Batch
from omcda_deploy.training.conservative import (
    candidate_actions,
    candidate_log_density,
    discrete_penalty,
    sampled_penalty,
)
from omcda_deploy.training.distributions import Categorical, TanhGaussian, policy_of
from omcda_deploy.training.learner import Group, Learner, frozen, parameters_of
from omcda_deploy.training.networks import (
    GreedyActor,
    NetworkFactory,
    QmixMixer,
    masked_log_softmax,
    total_value,
)
from omcda_deploy.training.settings import require, require_choice

PAPER = "Counterfactual Conservative Q Learning for Offline Multi-agent Reinforcement Learning (2023)"
SUMMARY = "conservative Q-learning in which one agent at a time deviates from the data"
ACTIONS = frozenset({"continuous", "discrete"})
DIVERGENCE = {"continuous": "kl", "discrete": "neg_log_behavior"}


@dataclass(frozen=True)
class Config:
    """Settings of CFCQL; alpha as published for MA-MuJoCo's medium data."""

    alpha: float = 1.0  # weight of the penalty
    lambda_tau: float = 1.0  # how much lambda_i follows the agents' divergences; 0: uniform
    lambda_sign: str = "positive"  # positive | negative: of tau
    twin: bool = True  # two critics, the smaller of which is the target
    mixer: str = "linear"  # linear | vdn | qmix
    candidates: int = 10  # actions of each of the three kinds (continuous)
    policy_std: float = 0.2  # under the tanh (continuous)
    action_penalty: float = 1e-3  # c of L_pi (continuous)
    lr: float = 5e-4
    gamma: float = 0.99
    tau: float = 0.005  # of target networks
    grad_clip: float = 1.0
    batch_size: int = 128
    hidden: int = 256
    mixer_hidden: int = 64

    def __post_init__(self) -> None:
        require_choice(self, lambda_sign=("positive", "negative"), mixer=("linear", "vdn", "qmix"))
        require(
            self,
            alpha=(0.0, 1e6),
            lambda_tau=(0.0, 1e6),
            candidates=(1, 1024),
            policy_std=(0.01, 1.0),
            action_penalty=(0.0, 1e6),
            lr=(0.0, 1.0),
            gamma=(0.0, 1.0),
            tau=(1e-6, 1.0),
            grad_clip=(1e-6, math.inf),
            batch_size=(1, 10**6),
            hidden=(1, 65536),
            mixer_hidden=(1, 65536),
        )


class FixedDeviationActor(nn.Module):
    """A tanh-Gaussian policy of which only the mean is learned: the published policy and its noise."""

    def __init__(self, actor: nn.Module, deviation: float) -> None:
        """``actor``: a Gaussian one, of which log_std is replaced."""
        super().__init__()
        self.actor = actor
        self.log_std = math.log(deviation)

    def forward(self, observation: Tensor, agent: int | None = None) -> tuple[Tensor, Tensor]:
        """``[B, (N,) O] -> (mean, log_std)``, each [B, (N,) A]."""
        mean, _ = self.actor(observation, agent)
        return mean, torch.full_like(mean, self.log_std)


def counterfactual_change(mixer: nn.Module, values: Tensor, recorded: Tensor, state: Tensor) -> Tensor:
    """``Q^i(s, u) - Q_tot(s, a)`` [K, B, N]: what Q_tot gains when agent i alone does each of K actions u.

    ``values`` q_i(o_i, u^k) [K, B, N], ``recorded`` q_i(o_i, a_i) [B, N], ``state`` [B, S].
    """
    change = values - recorded  # [K, B, N]
    if not isinstance(mixer, QmixMixer):
        weights, _ = mixer(state)
        product: Tensor = weights * change
        return product
    w1 = mixer.w1(state).abs().view(-1, mixer.agents, mixer.embed)  # [B, N, E]
    hidden = torch.einsum("bn,bne->be", recorded, w1) + mixer.b1(state)
    hidden = hidden.unsqueeze(1)  # [B, 1, E]
    gain = F.elu(hidden + change.unsqueeze(-1) * w1) - F.elu(hidden)  # [K, B, N, E]
    total: Tensor = (gain * mixer.w2(state).abs().unsqueeze(1)).sum(-1)
    return total


def agent_weights(kl: Tensor, tau: float, sign: str) -> Tensor:
    """``lambda_i = softmax_i( +-tau KL_i )``: [B, N] -> [B, N], without gradient."""
    return torch.softmax((tau if sign == "positive" else -tau) * kl.detach(), -1)


def make_policy(config: Config, networks: NetworkFactory) -> nn.Module:
    """The module that is snapshotted and exported."""
    if networks.spec.action_kind == "discrete":
        q: Any = networks.q()
        return GreedyActor(q)
    return FixedDeviationActor(networks.actor(), config.policy_std)


class Algorithm:
    """CFCQL's learner: one :meth:`update` is one gradient step on a batch."""

    def __init__(
        self,
        config: Config,
        networks: NetworkFactory,
        behavior: nn.Module,
        *,
        steps: int,
        seed: int,
        device: str = "cpu",
    ) -> None:
        """``behavior`` is the cloned pi_b that lambda_i and the exported divergence are measured against."""
        self.config = config
        self._seed = seed
        self.policy = make_policy(config, networks).to(device)
        self.mixer = networks.mixer(config.mixer_hidden, config.mixer)
        # A greedy policy is its critic: the two share their parameters.
        first = self.policy.q if isinstance(self.policy, GreedyActor) else networks.q()
        self.critics: list[Any] = [first, networks.q()] if config.twin else [first]
        self.behavior = behavior.to(device).requires_grad_(False)
        self.online = nn.ModuleList((self.mixer, *self.critics)).to(device)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.critics_target: list[Any]
        self.mixer_target, *self.critics_target = self.target
        groups = [Group(parameters_of(self.online), config.lr)]
        if not isinstance(self.policy, GreedyActor):
            groups.append(Group(parameters_of(self.policy), config.lr))
        self._learner = Learner(
            groups, config.grad_clip, averages=[(self.target, self.online)], tau=config.tau
        )
        self._noise = torch.Generator(device)
        self.step = 0

    @property
    def budgets(self) -> None:
        """CFCQL has no budget per agent."""
        return None

    @property
    def alpha(self) -> None:
        return None

    def update(self, batch: Batch) -> dict[str, Tensor]:
        self._noise.manual_seed(self._seed * 1_000_003 + self.step)
        with torch.no_grad():
            behavior = policy_of(self.behavior, batch.observation, batch.mask)
        if isinstance(behavior, Categorical):
            losses, metrics = self._discrete(batch, behavior)
        else:
            losses, metrics = self._continuous(batch, behavior)
        self._learner.descend(losses)
        self.step += 1
        return {**{f"loss/{name}": loss.detach() for name, loss in losses.items()}, **metrics}

    def _discrete(self, batch: Batch, behavior: Categorical) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        c = self.config
        assert batch.mask is not None  # the batch of a categorical behaviour
        assert batch.next_mask is not None
        tables = [critic.values(batch.observation) for critic in self.critics]  # [B, N, A] each
        recorded = [table.gather(-1, batch.action.unsqueeze(-1)).squeeze(-1) for table in tables]
        changes = [
            counterfactual_change(self.mixer, table.movedim(-1, 0), own, batch.state).movedim(0, -1)
            for table, own in zip(tables, recorded, strict=True)
        ]
        with torch.no_grad():
            next_scores = self.critics[0].values(batch.next_observation)
            y = self._target(batch, masked_log_softmax(next_scores, batch.next_mask).argmax(-1))
            soft_greedy = Categorical(masked_log_softmax(changes[0], batch.mask))  # mu_i
            weights = agent_weights(soft_greedy.kl(behavior), c.lambda_tau, c.lambda_sign)
            surprise = -behavior.log_prob(masked_log_softmax(tables[0], batch.mask).argmax(-1))
        unit = torch.ones_like(y).unsqueeze(-1)
        penalties = [discrete_penalty(unit, change, batch.action, batch.mask) for change in changes]
        losses = self._critic_losses(batch, recorded, penalties, weights, y)
        return losses, {"kl": surprise.mean(0), "lambda": weights.mean(0), "value/target": y.mean()}

    def _continuous(
        self, batch: Batch, behavior: TanhGaussian
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        c, o, s = self.config, batch.observation, batch.state
        policy = TanhGaussian(*self.policy(o))
        with torch.no_grad():
            next_policy = TanhGaussian(*self.policy(batch.next_observation))
            y = self._target(batch, next_policy.sample(1, self._noise)[0])
            actions = candidate_actions(policy, next_policy, c.candidates, self._noise)
            log_density = candidate_log_density(actions, policy, next_policy) + math.log(len(actions))
            kl = policy.kl(behavior)
            weights = agent_weights(kl, c.lambda_tau, c.lambda_sign)
            actions = torch.cat((batch.action.unsqueeze(0), actions))
        values = [critic.candidates(o, actions) for critic in self.critics]  # [1 + K, B, N] each
        recorded = [value[0] for value in values]
        unit, zero = torch.ones_like(weights), torch.zeros_like(weights)
        penalties = [
            sampled_penalty(unit, counterfactual_change(self.mixer, value[1:], own, s), zero, log_density)
            for value, own in zip(values, recorded, strict=True)
        ]
        losses = self._critic_losses(batch, recorded, penalties, weights, y)
        own_action = policy.sample(1, self._noise)
        with frozen(self.online):
            value = self.critics[0].candidates(o, own_action)
            gain = counterfactual_change(self.mixer, value, recorded[0].detach(), s)
        losses["policy"] = -gain.mean() + c.action_penalty * own_action.square().mean()
        return losses, {"kl": kl.mean(0), "lambda": weights.mean(0), "value/target": y.mean()}

    def _critic_losses(
        self, batch: Batch, recorded: list[Tensor], penalties: list[Tensor], weights: Tensor, y: Tensor
    ) -> dict[str, Tensor]:
        """L_Q, summed over critics; the lists hold one [B, N] each."""
        errors = [total_value(self.mixer, own, batch.state) - y for own in recorded]
        return {
            "critic": torch.stack([error.square().mean() for error in errors]).sum(),
            "conservative": self.config.alpha
            * torch.stack([(weights * penalty).sum(-1).mean() for penalty in penalties]).sum(),
        }

    def _target(self, batch: Batch, next_action: Tensor) -> Tensor:
        """``y`` [B] for actions at s' chosen by the online policy and valued by the target critics."""
        totals = [
            total_value(self.mixer_target, critic(batch.next_observation, next_action), batch.next_state)
            for critic in self.critics_target
        ]
        y: Tensor = batch.reward + self.config.gamma * batch.not_done * torch.stack(totals).amin(0)
        return y

    def state_dict(self) -> dict[str, Any]:
        return {
            "policy": self.policy.state_dict(),
            "online": self.online.state_dict(),
            "target": self.target.state_dict(),
            "learner": self._learner.state_dict(),
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy.load_state_dict(state["policy"])
        self.online.load_state_dict(state["online"])
        self.target.load_state_dict(state["target"])
        self._learner.load_state_dict(state["learner"])
        self.step = state["step"]
