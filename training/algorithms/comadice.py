"""ComaDICE: offline MARL regularised in stationary distributions (Bui et al., ICLR 2025, 2410.01954).

The ratio w of the policy's state-action occupancy to the data's is found through its dual, whose multipliers are
the values v_i; actions are then cloned with weight w. One linear mixer serves q and v. Losses on dataset actions
(bars: target networks, sg: no gradient, m = 1 - terminal, s_0: where the occupancies begin):

    y     = r + gamma m ( sum_i wbar_i(s') vbar_i(o'_i) + bbar(s') )
    L_q   = ( sum_i w_i q_i + b - y )^2
    e_i   = w_i (q_i - v_i) + gamma m w_i(s') ( v_i(o'_i) - sg v_i(o'_i) ),  no gradient through w and q
    x_i   = (e_i - lambda_v)/alpha,  ratio(x) = argmax_{w >= 0} ( w x - f(w) )
    L_v   = mean_i [ -alpha f(ratio(x_i)) + ratio(x_i) (e_i - lambda_v) ] + lambda_v
            + mean_i kappa_i E_{s_0}[w_i v_i]
    W_i   = ratio( (wbar_i (qbar_i - v_i) - lambda_e)/alpha ),  lambda_e minimises L_v's first line there
    L_pi  = -sg(W_i) log pi_i(a_i|o_i)

``ratio`` is the maximiser, so dL_v/de_i = ratio(x_i) (envelope theorem) and dL_v/dlambda_v = 1 - mean ratio: both
lambdas make the weights average to one. f is soft_chi2 (w log w - w + 1 below w = 1, (w-1)^2/2 above), chi2
((w-1)^2/2) or kl (w log w). A nonlinear mixer has no w_i, so ``mixer=qmix`` is refused.

Deviations from the published code:

* The gradient of L_v there is x ratio'(x), since f and e are detached instead of ratio: it vanishes at x = 0 and v
  regresses to the mean of q. ``paper_code_vloss`` restores it, with its initial term (1-gamma) E_{s_0}[v_i]; where
  episodes terminate, v and lambda_v may then drift apart without end (seen in one-step games).
* With q held constant the dual has no minimum: v rises and lambda_v falls for ever, because nothing carries the
  flow into s'. The second term of e_i, zero in value, does; it is dq_i/dv_i of the Bellman equation behind q.
* kappa_i = mean[ratio (w_i - gamma m w_i(s'))]/(mean[ratio] E_{s_0}[w_i]) is what flows in at s_0: 1 - gamma, as
  published, under constant w and without terminals; otherwise 1 - gamma contradicts lambda_v's mean of one.
* s_0 is any state of the data, as if every one began an episode (``initial_states=data``). First states alone
  (``first``) are the paper's, and right where data are discounted visits. In episodes of a thousand steps they are
  not: discounting by 0.99 visits the first states ten times as often as the data do, a ratio that the dual must
  pay for with values in the thousands (on HalfCheetah, Q ran away). Published code has those that chance puts in a
  batch.
* Each agent is cloned with its own weight. ``paper_code_weights``: with the sum over agents, all of them.
* lambda_e uses the e of its own weights throughout; gradients of the lambdas are clipped as all others are.
* W is capped at ``weight_max`` for continuous actions too; published is 2 for SMAC and no cap for MA-MuJoCo.

Source: docs/baselines.md#comadice.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from omcda_deploy.training.batches import Batch
from omcda_deploy.training.distributions import divergence, policy_of
from omcda_deploy.training.fleet import batch_mean, column, mean_per_run
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

PAPER = (
    "ComaDICE: Offline Cooperative Multi-Agent RL with Stationary Distribution Shift Regularization (2025)"
)
SUMMARY = "occupancy ratios by a dual; cloning weighted by them"
ACTIONS = frozenset({"continuous", "discrete"})
DIVERGENCE = {"continuous": "kl", "discrete": "kl"}
COLUMNS = (KL,)
PER_RUN = ("alpha", "weight_max")

F_DIVERGENCES = ("soft_chi2", "chi2", "kl")
NO_QMIX = {
    "qmix": "an agent's e_i = w_i (q_i - v_i) needs a weight per agent, which a nonlinear mixer does not have"
}
_RATIO_MAX = math.exp(10.0)  # kl's ratio is exponential: beyond this its dual continues linearly


@dataclass(frozen=True)
class Config:
    """Settings of ComaDICE as published for MA-MuJoCo."""

    alpha: Annotated[float, Range(1e-6, 1e6), "price of D_f between occupancies"] = 10.0
    f_divergence: Annotated[str, Choice(*F_DIVERGENCES), "D_f"] = "soft_chi2"
    initial_states: Annotated[
        str,
        Choice("data", "first"),
        "occupancies begin anywhere in the data, or in the first states of episodes",
    ] = "data"
    mixer: Annotated[str, Choice("linear", "vdn", refused=NO_QMIX), "how the agents' values are joined"] = (
        "linear"
    )
    weight_max: Annotated[float, Range(1.0, 1e6), "cap of W_i"] = 100.0
    paper_code_vloss: Annotated[bool, "the released code's gradient of L_v"] = False
    paper_code_weights: Annotated[bool, "clone each agent with the sum of all agents' weights"] = False
    lr: Annotated[LearningRate, "step size of Adam for the networks and lambdas"] = 1e-4
    gamma: Discount = 0.99
    tau: Tau = 0.005
    grad_clip: GradientNorm = 1.0
    batch_size: BatchSize = 128
    hidden: Width = 256
    mixer_hidden: MixerWidth = 64
    standardize_states: StandardizeStates = False

    def __post_init__(self) -> None:
        check(self)


def occupancy_ratio(x: Tensor, kind: str) -> Tensor:
    """Return ``argmax_{w >= 0} ( w x - f(w) )``, the inverse of f'."""
    if kind == "kl":
        return torch.exp((x - 1.0).clamp_max(math.log(_RATIO_MAX)))
    if kind == "chi2":
        return (x + 1.0).clamp_min(0.0)
    return torch.where(x < 0, torch.exp(x.clamp_max(0.0)), x + 1.0)


def f_value(ratio: Tensor, kind: str) -> Tensor:
    """Return ``f(w)`` for w >= 0: convex, 0 at w = 1."""
    quadratic = 0.5 * (ratio - 1.0).square()
    if kind == "chi2":
        return quadratic
    entropic = torch.xlogy(ratio, ratio)
    if kind == "kl":
        return entropic
    return torch.where(ratio < 1.0, entropic - ratio + 1.0, quadratic)


def dual_loss(
    e: Tensor, lagrange: Tensor, alpha: Tensor, kind: str, paper_code: bool = False
) -> tuple[Tensor, Tensor]:
    """Return ``mean[ -alpha f(w) + w (e - lambda) ] + lambda`` at ``w = ratio((e - lambda)/alpha)``, and w.

    ``e`` [R, B, N], ``lagrange`` [R], ``alpha`` [R, 1, 1] -> [R], [R, B, N]. The loss's gradient is w(x) in e, and
    ``1 - mean w`` in lambda. ``paper_code`` has the same value; its gradient is ``x w'(x)`` in e and
    ``1 - mean( w + x w'(x) )`` in lambda. w itself has none.
    """
    lagrange = lagrange[:, None, None]
    excess = e - lagrange
    ratio = occupancy_ratio((excess if paper_code else excess.detach()) / alpha, kind)
    penalty = alpha * f_value(ratio.detach(), kind)
    gain = ratio * ((e.detach() - lagrange) if paper_code else excess)
    return mean_per_run(gain - penalty) + lagrange.flatten(), ratio.detach()


def inflow(ratio: Tensor, weights: Tensor, discounted_next: Tensor, initial: Tensor) -> Tensor:
    """Return ``kappa_i`` [R, N] from ``ratio``, ``w_i(s)``, ``gamma m w_i(s')`` and ``w_i(s_0)``, each [R, B, N].

    With it the gradient of L_v in a shift of v_i is proportional to ``1 - mean ratio_i``, whatever terminates.
    """
    flow = batch_mean(ratio * (weights - discounted_next))
    return flow / (batch_mean(ratio) * batch_mean(initial)).clamp_min(1e-6)


def make_policy(config: Config, networks: NetworkFactory) -> nn.Module:
    """Make the module that is snapshotted and exported."""
    return networks.actor()


class Algorithm:
    """Train R runs by ComaDICE: one :meth:`update` is one gradient step of each on its batch."""

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
        self._alpha = column(configs, "alpha", device).unsqueeze(-1)  # [R, 1, 1]
        self._weight_max = column(configs, "weight_max", device).unsqueeze(-1)
        self.q, self.v = networks.q(), networks.v()
        self.mixer = networks.mixer(config.mixer_hidden, config.mixer)
        self.policy = make_policy(config, networks).to(device)
        self.online = nn.ModuleList((self.q, self.v, self.mixer)).to(device)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.q_target, self.v_target, self.mixer_target = self.target
        self.lambdas = nn.ParameterDict({name: torch.zeros(len(configs)) for name in "ve"}).to(device)
        self._optimizer = JointOptimizer(
            [
                Group(parameters_of(self.policy), config.lr),
                Group(parameters_of(self.q, self.mixer), config.lr),
                Group(parameters_of(self.v), config.lr),
                *(Group([multiplier], config.lr) for multiplier in self.lambdas.values()),
            ],
            config.grad_clip,
            modules={
                "policy": self.policy,
                "online": self.online,
                "target": self.target,
                "lambdas": self.lambdas,
            },
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
        discount = c.gamma * batch.not_done
        with torch.no_grad():
            w_bar, _ = self.mixer_target(batch.state)  # [R, B, N]
            w2_bar, b2_bar = self.mixer_target(batch.next_state)
            q_bar = self.q_target(batch.observation, batch.action)
            y = batch.reward + discount * mix(w2_bar, self.v_target(batch.next_observation), b2_bar)
        w_on, b_on = self.mixer(batch.state)
        q = self.q(batch.observation, batch.action)
        weights = w_on.detach()
        v, v2, v0, w2, w0 = self._values(batch, weights)

        e = weights * (q.detach() - v)
        next_weights = discount.unsqueeze(-1) * w2
        if not c.paper_code_vloss:
            e = e + next_weights * (v2 - v2.detach())
        dual, ratio = dual_loss(e, self.lambdas["v"], self._alpha, c.f_divergence, c.paper_code_vloss)
        if c.paper_code_vloss:
            initial = (1.0 - c.gamma) * mean_per_run(v0)
        else:
            initial = (inflow(ratio, weights, next_weights, w0) * batch_mean(w0 * v0)).mean(1)

        e_bar = w_bar * (q_bar - v.detach())
        normaliser, free = dual_loss(e_bar, self.lambdas["e"], self._alpha, c.f_divergence)
        cloning = free.minimum(self._weight_max)
        if c.paper_code_weights:
            cloning = cloning.sum(-1, keepdim=True)
        policy = policy_of(self.policy, batch.observation, batch.mask)
        losses = {
            "policy": -mean_per_run(cloning * batch.log_prob(policy)),  # L_pi
            "critic": mean_per_run((mix(w_on, q, b_on) - y).square()),  # L_q
            "value": dual + initial,  # L_v
            "normaliser": normaliser,  # sets lambda_e
        }
        self._optimizer.descend(losses)
        with torch.no_grad():
            return {
                **loss_metrics(losses),
                "kl": divergence(policy, batch.behavior).mean(1),
                "value/reward_total": mix(w_on, v, b_on).mean(1),
                "ratio/mean": mean_per_run(free),
                "ratio/capped": mean_per_run((free > self._weight_max).float()),
                "lambda/v": self.lambdas["v"].clone(),
                "lambda/e": self.lambdas["e"].clone(),
            }

    def _values(self, batch: Batch, weights: Tensor) -> tuple[Tensor, ...]:
        """Return ``v_i`` at o, o' and s_0, ``w_i`` at s' and s_0 without gradient; each [R, B, N].

        ``weights``: ``w_i(s)``.
        """
        count = batch.reward.shape[1]
        first = batch.initial_observation if self.config.initial_states == "first" else None
        if first is None:  # what holds at o holds at s_0
            v, v2 = self.v(torch.cat((batch.observation, batch.next_observation), 1)).split(count, 1)
            with torch.no_grad():
                return v, v2, v, self.mixer(batch.next_state)[0], weights
        assert batch.initial_state is not None  # the sampler gives both
        v, v2, v0 = self.v(torch.cat((batch.observation, batch.next_observation, first), 1)).split(count, 1)
        with torch.no_grad():
            states = torch.cat((batch.next_state, batch.initial_state), 1)
            return v, v2, v0, *self.mixer(states)[0].split(count, 1)

    def state_dict(self, run: int) -> dict[str, Any]:
        return {**self._optimizer.state_dict(run), "step": self.step}

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        self._optimizer.load_state_dicts(states)
        self.step = states[0]["step"]
