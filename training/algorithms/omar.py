"""OMAR: offline multi-agent RL with actor rectification (Pan et al., ICML 2022, 2111.11188; baselines.md 5).

A conservative critic as in CQL, and a policy that is drawn towards the best action a search finds, since gradients
alone get stuck where a conservative critic is not concave. With ``Q_tot = sum_i w_i(s) q_i(o_i,a_i) + b(s)`` (bars:
target networks, no gradient; m = 1 - terminal; sg: no gradient):

    L_Q  = (Q_tot(s,a) - [r + gamma m Qbar_tot(s',a')])^2
           + alpha sum_i ( logsumexp_{a_i} w_i q_i(o_i,.) - w_i q_i(o_i,a_i) )

Continuous: a' ~ pi(.|o'); the soft maximum runs over 10 uniform actions, 10 of pi(.|o) and 10 of pi(.|o'), all
valued at o. a_i ~ pi_i is reparameterised; the cross-entropy method (CEM) searches q_i at every state, agent by
agent: m = 0, sigma = 2, then ``iterations`` times: draw ``search_samples`` actions of N(m, sigma^2) clamped to
[-1, 1], keep the ``elites`` best of these and of the last elites, set m and sigma to their mean and deviation.

    a*_i = argmax q_i over { best action of CEM, a_i }
    L_pi = c mean[(a_i - sg(a*_i))^2] - (1 - c) q_i(o_i,a_i);   gradient through a_i alone

Discrete: a'_i = argmax q_i(o'_i,.), the soft maximum is exact, and so is the search: a*_i = argmax q_i(o_i,.).

    L_pi = c mean_a[(pi_i(a|o_i) - 1{a = a*_i})^2] - (1 - c) sg(A_i) log(pi_i(a_i|o_i) + 1e-5)
    A_i  = q_i(o_i,a_i) - sum_a pi_i(a|o_i) q_i(o_i,a)

with a_i recorded; every argmax, logsumexp and policy is over available actions. The penalty is a sum over agents
only under a mixer that is linear in q, so ``mixer=qmix`` is refused.

This is OMAR as ported to the linear mixer (shared networks, one critic, c = 0.5 for every dataset); no discrete
port is public, so the discrete one joins CFCQL's discrete OMAR to the same critic. Deviations from the ports: the
mixer's bias does not enter the penalty (``bias_per_agent``); elites are carried from one iteration to the next as
in the original, so no iteration loses its best action; unavailable actions count nowhere; targets are one-step; the
unused target policy is left out.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omcda_deploy.errors import ConfigError
from omcda_deploy.training.batches import Batch
from omcda_deploy.training.conservative import candidate_actions, discrete_penalty, sampled_penalty
from omcda_deploy.training.distributions import Categorical, TanhGaussian, divergence, policy_of
from omcda_deploy.training.learner import Group, Learner, frozen, parameters_of
from omcda_deploy.training.losses import mix
from omcda_deploy.training.networks import NetworkFactory, masked_log_softmax
from omcda_deploy.training.settings import require, require_choice

PAPER = "Plan Better Amid Conservatism: Offline Multi-Agent RL with Actor Rectification (2022)"
SUMMARY = "conservative critic; the policy is drawn to the best action of a search"
ACTIONS = frozenset({"continuous", "discrete"})
DIVERGENCE = {"continuous": "kl", "discrete": "kl"}

LOG_FLOOR = 1e-5  # in the discrete policy's loss, which is otherwise unbounded below where A_i < 0


@dataclass(frozen=True)
class Config:
    """Settings of OMAR as published for MA-MuJoCo."""

    alpha: float = 1.0  # weight of the conservative penalty
    coefficient: float = 0.5  # c: 0 climbs the critic alone, 1 imitates the search alone
    penalty_samples: int = 10  # actions of each of three kinds in the soft maximum (continuous)
    search_samples: int = 20  # actions per iteration of CEM (continuous)
    elites: int = 5
    iterations: int = 2
    search_std: float = 2.0  # first sigma, of actions in [-1, 1]
    bias_per_agent: bool = False  # as published for continuous actions: the penalty holds (N - 1) b
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
                "omar.mixer: expected linear or vdn, got 'qmix': the soft maximum over joint actions is a sum over "
                "agents only where Q_tot is linear in their values"
            )
        require_choice(self, mixer=("linear", "vdn"))
        require(
            self,
            alpha=(0.0, 1e6),
            coefficient=(0.0, 1.0),
            penalty_samples=(1, 10**5),
            search_samples=(2, 10**5),
            elites=(2, self.search_samples),
            iterations=(1, 1000),
            search_std=(1e-6, 1e3),
            lr=(0.0, 1.0),
            gamma=(0.0, 1.0),
            tau=(1e-6, 1.0),
            grad_clip=(1e-6, math.inf),
            batch_size=(1, 10**6),
            hidden=(1, 65536),
            mixer_hidden=(1, 65536),
        )


@torch.no_grad()
def search(
    values: Callable[[Tensor], Tensor], like: Tensor, config: Config, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """CEM's best actions [B, N, A], shaped as ``like``, and their values [B, N].

    ``values`` maps actions [K, B, N, A] to [K, B, N]. No action drawn on the way is better than the one returned.
    """
    mean, std = torch.zeros_like(like), torch.full_like(like, config.search_std)
    elites = like.new_empty(0, *like.shape)
    scores = like.new_empty(0, *like.shape[:-1])
    for _ in range(config.iterations):
        noise = torch.randn((config.search_samples, *like.shape), generator=generator, device=like.device)
        drawn = (mean + std * noise).clamp(-1.0, 1.0)
        pool = torch.cat((drawn, elites))
        scores, best = torch.cat((values(drawn), scores)).topk(config.elites, dim=0)
        elites = pool.gather(0, best.unsqueeze(-1).expand(-1, *like.shape))
        mean, std = elites.mean(0), elites.std(0)
    return elites[0], scores[0]


def continuous_policy_loss(
    action: Tensor, value: Tensor, found: Tensor, found_value: Tensor, coefficient: float
) -> Tensor:
    """L_pi from a_i [B, N, A] and q_i(o_i, a_i) [B, N], which carry gradients, and what the search found."""
    best = torch.where((found_value > value).unsqueeze(-1), found, action).detach()
    return coefficient * F.mse_loss(action, best) - (1.0 - coefficient) * value.mean()


def discrete_policy_loss(
    log_probs: Tensor, q: Tensor, action: Tensor, mask: Tensor, coefficient: float
) -> Tensor:
    """L_pi from log pi_i [B, N, A], q_i(o_i,.) [B, N, A] and recorded actions [B, N]."""
    probability = log_probs.exp()
    best = F.one_hot(greedy(q, mask), q.shape[-1])
    index = action.unsqueeze(-1)
    advantage = (q.gather(-1, index).squeeze(-1) - (probability * q).sum(-1)).detach()
    log_prob = torch.log(probability.gather(-1, index).squeeze(-1) + LOG_FLOOR)
    mimic = (probability - best).square().mean()
    return coefficient * mimic - (1.0 - coefficient) * (advantage * log_prob).mean()


def greedy(q: Tensor, mask: Tensor) -> Tensor:
    """The best available action, int64 [B, N], of values [B, N, A]."""
    return masked_log_softmax(q, mask).argmax(-1)


def make_policy(config: Config, networks: NetworkFactory) -> nn.Module:
    """The module that is snapshotted and exported."""
    return networks.actor()


class Algorithm:
    """OMAR's learner: one :meth:`update` is one gradient step on a batch."""

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
        self.q: Any = networks.q()
        self.mixer = networks.mixer(config.mixer_hidden, config.mixer)
        self.policy = make_policy(config, networks).to(device)
        self.behavior = behavior.to(device).requires_grad_(False)
        self.online = nn.ModuleList((self.q, self.mixer)).to(device)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.q_target, self.mixer_target = self.target
        self._learner = Learner(
            [
                Group(parameters_of(self.policy), config.lr),
                Group(parameters_of(self.online), config.lr),
            ],
            config.grad_clip,
            averages=[(self.target, self.online)],
            tau=config.tau,
        )
        self._noise = torch.Generator(device)
        self.step = 0

    @property
    def budgets(self) -> None:
        """OMAR has no budget per agent."""
        return None

    @property
    def alpha(self) -> None:
        return None

    def update(self, batch: Batch) -> dict[str, Tensor]:
        self._noise.manual_seed(self._seed * 1_000_003 + self.step)
        policy = policy_of(self.policy, batch.observation, batch.mask)
        w, b = self.mixer(batch.state)
        if isinstance(policy, TanhGaussian):
            q, penalty, next_action, policy_loss = self._continuous(batch, policy, w)
        else:
            q, penalty, next_action, policy_loss = self._discrete(batch, policy, w)
        with torch.no_grad():
            w2, b2 = self.mixer_target(batch.next_state)
            q2 = self.q_target(batch.next_observation, next_action)
            y = batch.reward + self.config.gamma * batch.not_done * mix(w2, q2, b2)
        q_tot = mix(w, q, b)
        conservatism = penalty.sum(-1)
        if self.config.bias_per_agent:
            conservatism = conservatism + (penalty.shape[-1] - 1) * b
        losses = {
            "policy": policy_loss,
            "critic": (q_tot - y).square().mean(),
            "conservative": self.config.alpha * conservatism.mean(),
        }
        self._learner.descend(losses)
        self.step += 1
        with torch.no_grad():
            behavior = policy_of(self.behavior, batch.observation, batch.mask)
            return {
                **{f"loss/{name}": loss.detach() for name, loss in losses.items()},
                "kl": divergence(policy, behavior).mean(0),
                "value/reward_total": q_tot.mean(),
            }

    def _continuous(
        self, batch: Batch, policy: TanhGaussian, w: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``q_i(o_i,a_i)`` and penalty_i [B, N] of recorded actions, a' [B, N, A], L_pi."""
        c, o = self.config, batch.observation
        with torch.no_grad():
            next_policy = policy_of(self.policy, batch.next_observation, None)
            assert isinstance(next_policy, TanhGaussian)  # as `policy` is
            [next_action] = next_policy.sample(1, self._noise)
        candidates = candidate_actions(policy, next_policy, c.penalty_samples, self._noise)
        values = self.q.candidates(o, torch.cat((batch.action[None], candidates)))
        q, penalty = values[0], sampled_penalty(w, values[1:], values[0])
        [action] = policy.sample(1, self._noise)
        with frozen(self.q):
            value = self.q(o, action)
            found = search(lambda actions: self.q.candidates(o, actions), action, c, self._noise)
        return q, penalty, next_action, continuous_policy_loss(action, value, *found, c.coefficient)

    def _discrete(
        self, batch: Batch, policy: Categorical, w: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As :meth:`_continuous`, with a' [B, N]."""
        assert batch.mask is not None  # a categorical policy is made from a mask
        assert batch.next_mask is not None
        values = self.q.values(batch.observation)
        penalty = discrete_penalty(w, values, batch.action, batch.mask)
        with torch.no_grad():
            next_action = greedy(self.q.values(batch.next_observation), batch.next_mask)
        q = values.gather(-1, batch.action.unsqueeze(-1)).squeeze(-1)
        loss = discrete_policy_loss(
            policy.log_probs, values.detach(), batch.action, batch.mask, self.config.coefficient
        )
        return q, penalty, next_action, loss

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
