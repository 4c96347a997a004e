"""CQL: conservative Q-learning for teams (Kumar et al., NeurIPS 2020, 2006.04779; baselines.md section 3).

One Q per agent, mixed by ``Q_tot = sum_i w_i(s) Q_i(o_i,a_i) + b(s)``, is pushed down where the soft maximum over
joint actions lies and up at the data (bars: target networks, no gradient; m = 1 - terminal):

    L_Q = (Q_tot(s,a) - y)^2 + alpha (LSE_a Q_tot(s,.) - Q_tot(s,a)),      y = r + gamma m Qbar_tot(s', a')

Under a linear mixer the soft maximum over the whole joint action space is a sum over agents, and b cancels:

    LSE_a Q_tot = sum_i LSE_{a_i}[w_i Q_i(o_i, .)] + b
    penalty     = sum_i ( LSE_{a_i}[w_i Q_i(o_i, .)] - w_i Q_i(o_i, a_i) )

A nonlinear mixer has no such form, so ``mixer=qmix`` is refused.

Discrete: the LSE is exact over available actions, a' is the online Q's argmax, the policy the argmax of Q_i.

Continuous: the LSE is over 3 x 10 actions per agent, uniform, of pi(.|o) and of pi(.|o'), with an option to weigh
them by 1/density: ``exp(LSE)/30`` is then unbiased for ``integral exp(w_i Q_i) da_i``. a' ~ pi(.|o'). The policy is

    L_pi = log pi_i(a_i|o_i) - w_i Q_i(o_i, a_i),  a_i ~ pi_i reparameterised, gradient through pi_i alone

(``improvement=soft_q``): up to a constant KL(pi_i || exp(w_i Q_i)/Z_i), so pi_i goes to the very distribution whose
value the penalty's LSE is, as in CQL(H). Published (``improvement=q_weighted_cloning``) is cloning weighted by raw
values, ``L_pi = -Q_i(o_i,a_i) log pi_i(a_i|o_i)`` on the data: where Q_i < 0 it is unbounded below, and adding a
constant to all rewards changes its policy. A baseline would mend both, but would put a second restraint on the
policy beside the critic's, which makes CQL's lower bound pointless; so the critic alone is conservative here.

Other deviations from the published team code: the bias of the mixer counts once, not once per agent
(``bias_per_agent``). Its actions are weighted by no density, which is the default here too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omcda_deploy.errors import ConfigError
from omcda_deploy.training.batches import Batch
from omcda_deploy.training.conservative import (
    candidate_actions,
    candidate_log_density,
    discrete_penalty,
    sampled_penalty,
)
from omcda_deploy.training.distributions import TanhGaussian, divergence, policy_of
from omcda_deploy.training.learner import Group, Learner, frozen, parameters_of
from omcda_deploy.training.losses import gaussian_log_prob, mix, tanh_log_jacobian
from omcda_deploy.training.networks import GreedyActor, NetworkFactory, masked_log_softmax
from omcda_deploy.training.settings import require, require_choice

PAPER = "Conservative Q-Learning for Offline Reinforcement Learning (2020), with OMIGA's networks"
SUMMARY = "pushes Q down on all joint actions and up on the data"
ACTIONS = frozenset({"continuous", "discrete"})
DIVERGENCE = {"continuous": "kl", "discrete": "neg_log_behavior"}


@dataclass(frozen=True)
class Config:
    """Settings of CQL as published for MA-MuJoCo, but for the policy's improvement."""

    alpha: float = 1.0  # weight of the penalty
    samples: int = 10  # continuous: actions of each of three kinds in the soft maximum
    importance_correction: bool = False  # continuous: weigh them by 1/density
    improvement: str = "soft_q"  # continuous: soft_q | q_weighted_cloning (as published)
    bias_per_agent: bool = (
        False  # as published for continuous actions: the mixer's bias enters once per agent
    )
    mixer: str = "linear"  # linear | vdn
    lr: float = 5e-4
    gamma: float = 0.99
    tau: float = 0.005
    grad_clip: float = 1.0  # norm, per group of parameters
    batch_size: int = 128
    hidden: int = 256
    mixer_hidden: int = 64

    def __post_init__(self) -> None:
        if self.mixer == "qmix":
            raise ConfigError(
                "cql.mixer: expected linear or vdn, got 'qmix': the soft maximum over joint actions is a sum "
                "over agents only where Q_tot is linear in their values"
            )
        require_choice(self, improvement=("soft_q", "q_weighted_cloning"), mixer=("linear", "vdn"))
        require(
            self,
            alpha=(0.0, 1e6),
            samples=(1, 10**5),
            lr=(0.0, 1.0),
            gamma=(0.0, 1.0),
            tau=(1e-6, 1.0),
            grad_clip=(1e-6, math.inf),
            batch_size=(1, 10**6),
            hidden=(1, 65536),
            mixer_hidden=(1, 65536),
        )


def soft_q_loss(policy: TanhGaussian, noise: Tensor, value: Callable[[Tensor], Tensor]) -> Tensor:
    """``mean[ log pi(a|o) - value(a) ]``, a reparameterised by ``noise`` [B, N, A]; ``value`` gives w Q [B, N]."""
    u = policy.mean + policy.log_std.exp() * noise
    # From u itself: the atanh of a saturated action has neither its value nor its gradient.
    log_prob = gaussian_log_prob(u, policy.mean, policy.log_std) - tanh_log_jacobian(u)
    return (log_prob - value(torch.tanh(u))).mean()


def q_weighted_cloning_loss(policy: TanhGaussian, action: Tensor, q: Tensor) -> Tensor:
    """``mean[ -Q log pi(a|o) ]`` on recorded actions, Q [B, N] as it comes."""
    return -(q.detach() * policy.log_prob(action)).mean()


@dataclass(frozen=True)
class Look:
    """What one look at a batch yields, by action kind; [B, N] but for the actions."""

    recorded: Tensor  # Q_i(o_i, a_i)
    penalty: Tensor
    next_action: Tensor  # [B, N, A], or int64 [B, N]
    kl: Tensor
    policy_loss: dict[str, Tensor]  # none where the policy is an argmax


def make_policy(config: Config, networks: NetworkFactory) -> nn.Module:
    """The module that is snapshotted and exported."""
    if networks.spec.action_kind == "continuous":
        return networks.actor()
    q: Any = networks.q()
    return GreedyActor(q)


class Algorithm:
    """CQL's learner: one :meth:`update` is one gradient step on a batch."""

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
        """``behavior`` is not trained on; it is what the exported divergence is measured against."""
        self.config, self._seed = config, seed
        self.policy = make_policy(config, networks).to(device)
        self.behavior = behavior.to(device).requires_grad_(False)
        self.q: Any = self.policy.q if isinstance(self.policy, GreedyActor) else networks.q()
        self.mixer = networks.mixer(config.mixer_hidden, config.mixer)
        self.online = nn.ModuleList((self.q, self.mixer)).to(device)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.q_target, self.mixer_target = self.target
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
        """CQL has no budget per agent."""
        return None

    @property
    def alpha(self) -> None:
        return None

    def update(self, batch: Batch) -> dict[str, Tensor]:
        c = self.config
        self._noise.manual_seed(self._seed * 1_000_003 + self.step)
        w, bias = self.mixer(batch.state)
        look = self._continuous(batch, w) if batch.mask is None else self._discrete(batch, w, batch.mask)
        with torch.no_grad():
            w2, bias2 = self.mixer_target(batch.next_state)
            following = mix(w2, self.q_target(batch.next_observation, look.next_action), bias2)
            y = batch.reward + c.gamma * batch.not_done * following
        q_tot = mix(w, look.recorded, bias)
        penalty = look.penalty.sum(-1)
        if c.bias_per_agent:
            penalty = penalty + (w.shape[-1] - 1) * bias
        losses = {
            "critic": (q_tot - y).square().mean(),
            "conservative": c.alpha * penalty.mean(),
            **look.policy_loss,
        }
        self._learner.descend(losses)
        self.step += 1
        return {
            **{f"loss/{name}": loss.detach() for name, loss in losses.items()},
            "kl": look.kl.mean(0),
            "value/reward_total": q_tot.detach().mean(),
        }

    def _discrete(self, batch: Batch, w: Tensor, mask: Tensor) -> Look:
        scores = self.q.values(batch.observation)  # [B, N, A]
        with torch.no_grad():
            greedy = masked_log_softmax(scores, mask).argmax(-1)
            behavior = policy_of(self.behavior, batch.observation, mask)
            next_action = self.policy(batch.next_observation, batch.next_mask).argmax(-1)
        return Look(
            recorded=scores.gather(-1, batch.action.unsqueeze(-1)).squeeze(-1),
            penalty=discrete_penalty(w, scores, batch.action, mask),
            next_action=next_action,
            kl=-behavior.log_prob(greedy),
            policy_loss={},
        )

    def _continuous(self, batch: Batch, w: Tensor) -> Look:
        c, o = self.config, batch.observation
        policy = TanhGaussian(*self.policy(o))
        with torch.no_grad():
            next_policy = TanhGaussian(*self.policy(batch.next_observation))
            actions = candidate_actions(policy, next_policy, c.samples, self._noise)
            density = candidate_log_density(actions, policy, next_policy) if c.importance_correction else None
            next_action = next_policy.sample(1, self._noise)[0]
            kl = divergence(policy, policy_of(self.behavior, o, None))
        values = self.q.candidates(o, torch.cat((batch.action[None], actions)))  # [1 + 3 samples, B, N]
        recorded = values[0]
        if c.improvement == "soft_q":
            noise = torch.randn(policy.mean.shape, generator=self._noise, device=o.device)
            with frozen(self.q):
                loss = soft_q_loss(policy, noise, lambda action: w.detach() * self.q(o, action))
        else:
            loss = q_weighted_cloning_loss(policy, batch.action, recorded)
        return Look(
            recorded=recorded,
            penalty=sampled_penalty(w, values[1:], recorded, density),
            next_action=next_action,
            kl=kl,
            policy_loss={"policy": loss},
        )

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
