"""OMAR: offline multi-agent RL with actor rectification (Pan et al., ICML 2022, 2111.11188).

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

Source: docs/baselines.md#omar.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from omcda_deploy.training.actions import entry_mean
from omcda_deploy.training.batches import Batch
from omcda_deploy.training.conservative import (
    candidate_actions,
    discrete_penalty,
    sampled_penalty,
)
from omcda_deploy.training.distributions import Categorical, TanhGaussian, divergence, policy_of
from omcda_deploy.training.fleet import Noise, column, mean_per_run
from omcda_deploy.training.losses import mix
from omcda_deploy.training.metrics import KL
from omcda_deploy.training.networks import NetworkFactory, masked_log_softmax
from omcda_deploy.training.optimizer import Group, JointOptimizer, frozen, loss_metrics, parameters_of
from omcda_deploy.training.settings import (
    BatchSize,
    Choice,
    Discount,
    GradientNorm,
    LearningRate,
    MixerWidth,
    Range,
    SampleCount,
    StandardizeStates,
    Tau,
    Unit,
    Weight,
    Width,
    check,
)

PAPER = "Plan Better Amid Conservatism: Offline Multi-Agent RL with Actor Rectification (2022)"
SUMMARY = "conservative critic; the policy is drawn to the best action of a search"
ACTIONS = frozenset({"continuous", "discrete"})
DIVERGENCE = {"continuous": "kl", "discrete": "kl"}
PER_RUN = ("alpha", "coefficient")
COLUMNS = (KL,)

LOG_OFFSET = 1e-5  # bounds the discrete policy's loss below where A_i < 0
NO_QMIX = {
    "qmix": "the soft maximum over joint actions is a sum over agents only where Q_tot is linear in their values"
}


@dataclass(frozen=True)
class Config:
    """Settings of OMAR as published for MA-MuJoCo."""

    alpha: Annotated[Weight, "weight of the conservative penalty"] = 1.0
    coefficient: Annotated[Unit, "c: 0 climbs the critic alone, 1 imitates the search alone"] = 0.5
    penalty_samples: Annotated[
        SampleCount, "continuous: actions of each of three kinds in the soft maximum"
    ] = 10
    search_samples: Annotated[int, Range(2, 10**5), "continuous: actions per iteration of CEM"] = 20
    elites: Annotated[
        int, Range(2, 10**5), "continuous: best actions of an iteration, at most search_samples"
    ] = 5
    iterations: Annotated[int, Range(1, 1000), "continuous: iterations of CEM"] = 2
    search_std: Annotated[float, Range(1e-6, 1e3), "continuous: first sigma, of actions in [-1, 1]"] = 2.0
    bias_per_agent: Annotated[bool, "published for continuous actions: the penalty holds (N - 1) b"] = False
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
        Range(2, self.search_samples).require("omar.elites", self.elites)


@torch.no_grad()
def search(
    values: Callable[[Tensor], Tensor], like: Tensor, config: Config, noise: Noise
) -> tuple[Tensor, Tensor]:
    """Search by CEM: return the best actions [R, B, N, A], shaped as ``like``, and their values [R, B, N].

    ``values`` maps actions [R, K, B, N, A] to [R, K, B, N]. No action drawn on the way is better than the one
    returned.
    """
    runs, *shape = like.shape
    mean, std = like.new_zeros(()), like.new_full((), config.search_std)
    elites = like.new_empty(runs, 0, *shape)
    scores = like.new_empty(runs, 0, *shape[:-1])
    for _ in range(config.iterations):
        actions = (std * noise.normal(config.search_samples, *shape)).add_(mean).clamp_(-1.0, 1.0)
        pool = torch.cat((actions, elites), 1)
        scores, best = torch.cat((values(actions), scores), 1).topk(config.elites, dim=1)
        elites = pool.gather(1, best.unsqueeze(-1).expand(-1, -1, *shape))
        # Over contiguous rows, whose sums do not depend on R.
        std, mean = torch.std_mean(elites.movedim(1, -1).contiguous(), -1)
        mean, std = mean.unsqueeze(1), std.unsqueeze(1)
    return elites[:, 0], scores[:, 0]


def continuous_policy_loss(
    action: Tensor,
    value: Tensor,
    searched: Tensor,
    searched_value: Tensor,
    coefficient: Tensor,
    padding: Tensor | None = None,
) -> Tensor:
    """Return L_pi [R] from a_i [R, B, N, A] and q_i(o_i, a_i) [R, B, N], both with gradients.

    ``searched`` and ``searched_value`` are the search's, in the same shapes; ``coefficient`` [R]; ``padding``
    [N, A] of the actions.
    """
    best = torch.where((searched_value > value).unsqueeze(-1), searched, action).detach()
    mimic = entry_mean((action - best).square(), padding)
    return coefficient * mimic - (1.0 - coefficient) * mean_per_run(value)


def discrete_policy_loss(
    log_probs: Tensor, q: Tensor, action: Tensor, mask: Tensor, coefficient: Tensor
) -> Tensor:
    """Return L_pi [R] from log pi_i and q_i(o_i,.) [R, B, N, A], recorded actions [R, B, N], c [R]."""
    probability = log_probs.exp()
    best = F.one_hot(greedy(q, mask), q.shape[-1])
    index = action.unsqueeze(-1)
    advantage = (q.gather(-1, index).squeeze(-1) - (probability * q).sum(-1)).detach()
    log_prob = torch.log(probability.gather(-1, index).squeeze(-1) + LOG_OFFSET)
    mimic = mean_per_run((probability - best).square())
    return coefficient * mimic - (1.0 - coefficient) * mean_per_run(advantage * log_prob)


def greedy(q: Tensor, mask: Tensor) -> Tensor:
    """Choose the best available action, int64 [R, B, N], by values [R, B, N, A]."""
    return masked_log_softmax(q, mask).argmax(-1)


def make_policy(config: Config, networks: NetworkFactory) -> nn.Module:
    """Make the module that is snapshotted and exported."""
    return networks.actor()


class Algorithm:
    """Train R runs by OMAR: one :meth:`update` is one gradient step of each on its batch."""

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
        self._alpha = column(configs, "alpha", device).squeeze(-1)  # [R]
        self._coefficient = column(configs, "coefficient", device).squeeze(-1)
        self.noise = Noise(networks.seeds or (), device)
        self.q: Any = networks.q()
        self.mixer = networks.mixer(config.mixer_hidden, config.mixer)
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
        self.noise.at(self.step)
        self.step += 1
        return ()  # every step is like the others

    def compute(self, batch: Batch, plan: tuple[()]) -> dict[str, Tensor]:
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
            "policy": policy_loss,  # L_pi
            "critic": mean_per_run((q_tot - y).square()),  # L_Q, first term
            "conservative": self._alpha * mean_per_run(conservatism),  # L_Q, second term
        }
        self._optimizer.descend(losses)
        with torch.no_grad():
            return {
                **loss_metrics(losses),
                "kl": divergence(policy, batch.behavior).mean(1),
                "value/reward_total": mean_per_run(q_tot),
            }

    def _continuous(
        self, batch: Batch, policy: TanhGaussian, w: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return ``q_i(o_i,a_i)`` and penalty_i [R, B, N] of recorded actions, a' [R, B, N, A], and L_pi [R]."""
        c, o = self.config, batch.observation
        noise = self.noise
        with torch.no_grad():
            next_policy = policy_of(self.policy, batch.next_observation, None)
            assert isinstance(next_policy, TanhGaussian)  # like `policy`
            next_action = next_policy.sample(1, noise).squeeze(1)
        actions = candidate_actions(policy, next_policy, c.penalty_samples, noise, batch.action)
        values = self.q.candidates(o, actions)
        q = values[:, 0]
        penalty = sampled_penalty(w, values[:, 1:], q)
        action = policy.sample(1, noise).squeeze(1)
        with frozen(self.q):
            value = self.q(o, action)
        best, best_value = search(lambda tried: self.q.candidates(o, tried), action, c, noise)
        loss = continuous_policy_loss(action, value, best, best_value, self._coefficient, policy.padding)
        return q, penalty, next_action, loss

    def _discrete(
        self, batch: Batch, policy: Categorical, w: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the same as :meth:`_continuous`, with a' int64 [R, B, N]."""
        assert batch.mask is not None  # a categorical policy is made from a mask
        assert batch.next_mask is not None
        values = self.q.values(batch.observation)
        penalty = discrete_penalty(w, values, batch.action, batch.mask)
        with torch.no_grad():
            next_action = greedy(self.q.values(batch.next_observation), batch.next_mask)
        q = values.gather(-1, batch.action.unsqueeze(-1)).squeeze(-1)
        loss = discrete_policy_loss(
            policy.log_probs, values.detach(), batch.action, batch.mask, self._coefficient
        )
        return q, penalty, next_action, loss

    def state_dict(self, run: int) -> dict[str, Any]:
        return {**self._optimizer.state_dict(run), "step": self.step}

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        self._optimizer.load_state_dicts(states)
        self.step = states[0]["step"]
