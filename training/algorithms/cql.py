"""CQL: conservative Q-learning for teams (Kumar et al., NeurIPS 2020, 2006.04779).

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
(``bias_per_agent``). The published code weighs the actions by no density, which is the default here too.

Source: docs/baselines.md#cql.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from omcda_deploy.training.batches import Batch
from omcda_deploy.training.conservative import (
    candidate_actions,
    candidate_log_density,
    discrete_penalty,
    sampled_penalty,
)
from omcda_deploy.training.distributions import TanhGaussian, divergence, gaussian_of
from omcda_deploy.training.fleet import Noise, column, mean_per_run
from omcda_deploy.training.losses import gaussian_log_prob, mix, tanh_log_jacobian
from omcda_deploy.training.metrics import KL
from omcda_deploy.training.networks import GreedyActor, NetworkFactory, masked_log_softmax
from omcda_deploy.training.optimizer import Group, JointOptimizer, frozen, loss_metrics, parameters_of
from omcda_deploy.training.settings import (
    BatchSize,
    Choice,
    Discount,
    GradientNorm,
    LearningRate,
    MixerWidth,
    SampleCount,
    StandardizeStates,
    Tau,
    Weight,
    Width,
    check,
)

PAPER = "Conservative Q-Learning for Offline Reinforcement Learning (2020), with OMIGA's networks"
SUMMARY = "pushes Q down on all joint actions and up on the data"
ACTIONS = frozenset({"continuous", "discrete"})
DIVERGENCE = {"continuous": "kl", "discrete": "neg_log_behavior"}
PER_RUN = ("alpha",)
COLUMNS = (KL,)

NO_QMIX = {
    "qmix": "the soft maximum over joint actions is a sum over agents only where Q_tot is linear in their values"
}


@dataclass(frozen=True)
class Config:
    """Settings of CQL as published for MA-MuJoCo, but for the policy's improvement."""

    alpha: Annotated[Weight, "weight of the penalty"] = 1.0
    samples: Annotated[SampleCount, "continuous: actions of each of three kinds in the soft maximum"] = 10
    importance_correction: Annotated[bool, "continuous: weigh these actions by 1/density"] = False
    improvement: Annotated[
        str,
        Choice("soft_q", "q_weighted_cloning"),
        "continuous: how the policy improves; q_weighted_cloning is as published",
    ] = "soft_q"
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


def soft_q_loss(policy: TanhGaussian, noise: Tensor, value: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``mean[ log pi(a|o) - value(a) ]`` [R].

    ``noise`` [R, B, N, A] reparameterises a; ``value`` maps actions [R, B, N, A] to w Q [R, B, N].
    """
    u = policy.mean + policy.log_std.exp() * noise
    # From u itself: the atanh of a saturated action has neither its value nor its gradient.
    log_density = gaussian_log_prob(u, policy.mean, policy.log_std, policy.padding)
    log_prob = log_density - tanh_log_jacobian(u, policy.padding)
    return mean_per_run(log_prob - value(torch.tanh(u)))


def q_weighted_cloning_loss(log_prob: Tensor, q: Tensor) -> Tensor:
    """Return ``mean[ -Q log pi(a|o) ]`` [R] of recorded actions, Q [R, B, N] without a baseline."""
    return -mean_per_run(q.detach() * log_prob)


@dataclass(frozen=True)
class BatchTerms:
    """Terms of the losses on one batch, by action kind; [R, B, N] unless stated."""

    q: Tensor  # Q_i(o_i, a_i) of recorded actions
    penalty: Tensor
    next_action: Tensor  # [R, B, N, A], or int64 [R, B, N]
    kl: Tensor
    policy_loss: dict[str, Tensor]  # [R]; empty where the policy is an argmax


def make_policy(config: Config, networks: NetworkFactory) -> nn.Module:
    """Make the module that is snapshotted and exported."""
    if networks.spec.action_kind == "continuous":
        return networks.actor()
    q: Any = networks.q()
    return GreedyActor(q)


class Algorithm:
    """Train R runs by CQL: one :meth:`update` is one gradient step of each on its batch."""

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
        self.noise = Noise(networks.seeds or (), device)
        self.policy = make_policy(config, networks).to(device)
        self.q: Any = self.policy.q if isinstance(self.policy, GreedyActor) else networks.q()
        self.mixer = networks.mixer(config.mixer_hidden, config.mixer)
        self.online = nn.ModuleList((self.q, self.mixer)).to(device)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.q_target, self.mixer_target = self.target
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
        c = self.config
        w, bias = self.mixer(batch.state)
        terms = self._continuous(batch, w) if batch.mask is None else self._discrete(batch, w, batch.mask)
        with torch.no_grad():
            w2, bias2 = self.mixer_target(batch.next_state)
            next_q_tot = mix(w2, self.q_target(batch.next_observation, terms.next_action), bias2)
            y = batch.reward + c.gamma * batch.not_done * next_q_tot
        q_tot = mix(w, terms.q, bias)
        penalty = terms.penalty.sum(-1)
        if c.bias_per_agent:
            penalty = penalty + (w.shape[-1] - 1) * bias
        losses = {
            "critic": mean_per_run((q_tot - y).square()),  # L_Q, first term
            "conservative": self._alpha * mean_per_run(penalty),  # L_Q, second term
            **terms.policy_loss,  # L_pi
        }
        self._optimizer.descend(losses)
        return {
            **loss_metrics(losses),
            "kl": terms.kl.mean(1),
            "value/reward_total": mean_per_run(q_tot.detach()),
        }

    def _discrete(self, batch: Batch, w: Tensor, mask: Tensor) -> BatchTerms:
        scores = self.q.values(batch.observation)  # [R, B, N, A]
        with torch.no_grad():
            greedy = masked_log_softmax(scores, mask).argmax(-1)
            next_action = self.policy(batch.next_observation, batch.next_mask).argmax(-1)
        return BatchTerms(
            q=scores.gather(-1, batch.action.unsqueeze(-1)).squeeze(-1),
            penalty=discrete_penalty(w, scores, batch.action, mask),
            next_action=next_action,
            kl=-batch.behavior.log_prob(greedy),
            policy_loss={},
        )

    def _continuous(self, batch: Batch, w: Tensor) -> BatchTerms:
        c, o = self.config, batch.observation
        noise = self.noise
        policy = gaussian_of(self.policy, o)
        with torch.no_grad():
            next_policy = gaussian_of(self.policy, batch.next_observation)
            actions = candidate_actions(policy, next_policy, c.samples, noise, batch.action)
            density = (
                candidate_log_density(actions[:, 1:], policy, next_policy)
                if c.importance_correction
                else None
            )
            next_action = next_policy.sample(1, noise).squeeze(1)
            kl = divergence(policy, batch.behavior)
        values = self.q.candidates(o, actions)  # [R, 1 + 3 samples, B, N]
        q = values[:, 0]
        if c.improvement == "soft_q":
            normal = noise.normal(*policy.mean.shape[1:])
            with frozen(self.q):
                loss = soft_q_loss(policy, normal, lambda action: w.detach() * self.q(o, action))
        else:
            loss = q_weighted_cloning_loss(batch.log_prob(policy), q)
        return BatchTerms(
            q=q,
            penalty=sampled_penalty(w, values[:, 1:], q, density),
            next_action=next_action,
            kl=kl,
            policy_loss={"policy": loss},
        )

    def state_dict(self, run: int) -> dict[str, Any]:
        return {**self._optimizer.state_dict(run), "step": self.step}

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        self._optimizer.load_state_dicts(states)
        self.step = states[0]["step"]
