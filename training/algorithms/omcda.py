"""OMCDA: offline MARL with conservative degree allocation (ICLR 2026, openreview oWzLIDYime).

Each agent i pays a price alpha_i for deviating from its behaviour policy pi_b^i. The price is found such that the
agent's divergence meets a budget d_i; the budgets share a fixed total by influence on the team's reward. Reward and
divergence have separate critics, so that influence is measured on reward alone:

    Q^r_tot = sum_i w^r_i(s) Q^r_i(o_i,a_i) + b^r(s)         rewards only                  (V^r_tot alike)
    Q^{c,k} = sum_j w^{c,k}_j(s) Q^c_j(o_j,a_j) + b^{c,k}(s) minus discounted divergence   (V^{c,k} alike)
    z_i     = (w^r_i/alpha_i)(Q^r_i - V^r_i) + kappa_i (Q^c_i - V^c_i)
    kappa_i = sum_k alpha_k w^{c,k}_i / alpha_i
    pi_i*   = pi_b^i exp z_i                                                (Prop. 3.2, which covers kappa = 1)

Losses on dataset actions (bars: target networks, sg: no gradient, m = 1 - terminal, rho = min(exp z, e^{z_max})):

    L_Qr = (Q^r_tot - [r + gamma m Vbar^r_tot(s')])^2
    L_Qc = mean_k (Q^{c,k} - gamma m Vbar^{c,k}(s'))^2
    L_Vr = sg(rho_i) (sg(Qbar^r_i) - V^r_i)^2
    L_Vc = E(z_i)/kappa_i + V^c_i,  gradient through V^c_i alone: at its minimum E_b[rho_i | o_i] = 1 (Prop. 3.4)
    L_pi = -sg(rho_i) log pi_i(a_i|o_i)

E_b is the mean over the behaviour policy's actions in the data. E(z) continues exp linearly above z_max: a clamp
there would have no gradient and let V run away; its derivative is rho, hence rho instead of exp z at the minimum
of L_Vc.

Source: docs/derivation.md, which also lists where the paper and this file differ: kappa (the paper's summary has
kappa = 1, which holds when W^c is the identity; the factor is needed only when it is not), a fixed diagonal of W^c,
and the dual's warm-up, bounds and least share (:mod:`omcda_deploy.training.allocation`).

Ablations: ``allocation=uniform`` (w/o-CDA), ``allocation=random`` (rd), ``decoupled=false`` (w/o-dq: one entangled
Q and V as in OMIGA, ``z_i = (w_i/alpha_i)(Q_i - V_i)``). ``allocation=optimal`` is one alpha for all agents.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from omcda_deploy.plugins import Column, Scan
from omcda_deploy.training.allocation import STRATEGIES, Allocation, Dual
from omcda_deploy.training.batches import Batch
from omcda_deploy.training.distributions import Distribution, divergence, policy_of
from omcda_deploy.training.fleet import Noise, column, mean_per_run, repeat
from omcda_deploy.training.influence import INFLUENCE_CURVES, influence, value_gradients, weighted_values
from omcda_deploy.training.losses import exp_linear, mix, mix_divergence
from omcda_deploy.training.metrics import KL
from omcda_deploy.training.networks import NetworkFactory
from omcda_deploy.training.optimizer import Group, JointOptimizer, loss_metrics, parameters_of
from omcda_deploy.training.settings import (
    Choice,
    Count,
    GradientNorm,
    LearningRate,
    Range,
    Tau,
    Unit,
    Width,
    check,
)

PAPER = "Who Matters Matters: Agent-Specific Conservative Offline MARL (ICLR 2026)"
SUMMARY = "a divergence budget per agent, shared by influence on the team's reward"
ACTIONS = frozenset({"continuous", "discrete"})
DIVERGENCE = {"continuous": "kl", "discrete": "kl"}
COLUMNS = (
    KL,
    Column("budget", "d", digits=4),
    Column("alpha", "alpha"),
    Column("influence", "m"),
    Column("alpha_at_bound", "alpha at its bound", flag=True),
    Column("z/mean_exp", "mean exp z", per_agent=False),
    Column("z/above_max", "z above its maximum", per_agent=False),
    Column("dual_active", "prices wait for the reward critic", per_agent=False, flag=False),
)
CURVES = INFLUENCE_CURVES
PER_RUN = ("d_tot", "allocation", "alpha0", "temperature", "settled")
SCAN = Scan("d_tot", "allocation", "Budget scan", "d_tot, nats (logarithmic)", "the budget, per allocation")


@dataclass(frozen=True)
class Config:
    """Settings of OMCDA; the defaults are the starting point for MA-MuJoCo rewards."""

    d_tot: Annotated[float, Range(1e-6, 1e3)] = 0.3  # nats per step, for all agents together
    allocation: Annotated[str, Choice(*STRATEGIES)] = "influence"
    decoupled: bool = True  # False: the ablation w/o-dq
    divergence_mixer: Annotated[str, Choice("learned", "identity")] = "learned"
    alpha0: Annotated[float, Range(1e-6, 1e6)] = 10.0  # first price; its bounds are alpha0/200 and 5 alpha0
    temperature: Annotated[float, Range(1e-3, 1e3)] = 1.0  # T of softmax(m/T)
    # Inner product of the gradients whose ratio is the influence.
    metric: Annotated[str, Choice("euclidean", "fisher")] = "euclidean"
    # Actions per state for the reparameterised gradient (continuous).
    influence_samples: Annotated[int, Range(1, 1024)] = 4
    influence_decay: Annotated[float, Range(0.0, 1.0 - 1e-9)] = 0.99  # decay of the EMA of m_i, per step
    reallocate_every: Count = 10  # steps between measurements of m_i
    z_max: Annotated[float, Range(0.1, 50.0)] = 5.0
    kappa_max: Annotated[float, Range(1.0, 1e6)] = 10.0
    # The dual starts when the average of L_Qr/Var(y) is below `settled`, or after a share of the steps.
    settled: Annotated[float, Range(0.0)] = 0.1
    warmup: Unit = 0.2
    lr: LearningRate = 5e-4
    lr_divergence: LearningRate = 1e-4  # Q^c, V^c and their mixer
    lr_alpha: Annotated[float, Range(0.0, 10.0)] = 3e-3
    gamma: Unit = 0.99
    tau: Tau = 0.005  # step of target networks and averaged policy
    grad_clip: GradientNorm = 1.0  # norm, per group of parameters
    batch_size: Count = 128
    hidden: Width = 256
    mixer_hidden: Width = 64

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class CriticTerms:
    """Terms of the losses on one batch."""

    z: Tensor  # [R, B, N], detached
    rho: Tensor  # [R, B, N], detached
    losses: dict[str, Tensor]  # [R] each
    target: Tensor  # y of L_Qr, [R, B]
    metrics: dict[str, Tensor]  # [R] or [R, N] each


class DecoupledCritic:
    """Separate values of reward and divergence (docs/derivation.md#losses)."""

    def __init__(self, config: Config, networks: NetworkFactory, device: str) -> None:
        self._config = config
        self.q_r, self.v_r, self.mixer_r = networks.q(), networks.v(), networks.mixer(config.mixer_hidden)
        self.q_c, self.v_c = networks.q(), networks.v()
        self.mixer_c = networks.divergence_mixer(config.divergence_mixer, config.mixer_hidden)
        online = (self.q_r, self.v_r, self.mixer_r, self.q_c, self.v_c, self.mixer_c)
        self.online = nn.ModuleList(online).to(device)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.q_r_target, self.v_r_target, self.mixer_r_target = self.target[:3]
        self.q_c_target, self.v_c_target, self.mixer_c_target = self.target[3:]

    def groups(self) -> list[Group]:
        """Return groups of parameters with their learning rates."""
        lr, lr_c = self._config.lr, self._config.lr_divergence
        return [
            Group(parameters_of(self.q_r, self.mixer_r), lr),
            Group(parameters_of(self.v_r), lr),
            Group(parameters_of(self.q_c, self.mixer_c), lr_c),
            Group(parameters_of(self.v_c), lr_c),
        ]

    def kappa(self, w_c: Tensor, alpha: Tensor) -> Tensor:
        """Return ``sum_k alpha_k w^{c,k}_i / alpha_i``, uncapped: [R, B, N(k), N(i)], [R, 1, N] -> [R, B, N(i)]."""
        return torch.matmul(alpha.unsqueeze(-2), w_c).squeeze(-2) / alpha

    def terms(self, batch: Batch, alpha: Tensor) -> CriticTerms:
        """Evaluate all losses on a batch at prices ``alpha`` [R, 1, N]."""
        c = self._config
        o, s, a = batch.observation, batch.state, batch.action
        o2, s2 = batch.next_observation, batch.next_state
        with torch.no_grad():
            w_r, _ = self.mixer_r_target(s)  # [R, B, N]
            w_c, _ = self.mixer_c_target(s)  # [R, B, N(k), N(j)]
            kappa_free = self.kappa(w_c, alpha)
            kappa = kappa_free.clamp_max(c.kappa_max)
            q_r, q_c = self.q_r_target(o, a), self.q_c_target(o, a)
            w_r2, b_r2 = self.mixer_r_target(s2)
            w_c2, b_c2 = self.mixer_c_target(s2)
            discount = c.gamma * batch.not_done
            y_r = batch.reward + discount * mix(w_r2, self.v_r_target(o2), b_r2)
            y_c = discount.unsqueeze(-1) * mix_divergence(w_c2, self.v_c_target(o2), b_c2)
        v_r, v_c = self.v_r(o), self.v_c(o)
        z = w_r / alpha * (q_r - v_r.detach()) + kappa * (q_c - v_c)
        rho = torch.exp(z.detach().clamp_max(c.z_max))

        w_on, b_on = self.mixer_r(s)
        w_con, b_con = self.mixer_c(s)
        q_r_tot = mix(w_on, self.q_r(o, a), b_on)
        q_c_tot = mix_divergence(w_con, self.q_c(o, a), b_con)
        losses = {
            "reward_critic": mean_per_run((q_r_tot - y_r).square()),  # L_Qr
            "divergence_critic": mean_per_run((q_c_tot - y_c).square()),  # L_Qc
            "reward_value": mean_per_run(rho * (q_r - v_r).square()),  # L_Vr
            "divergence_value": mean_per_run(exp_linear(z, c.z_max) / kappa + v_c),  # L_Vc
        }
        with torch.no_grad():
            total = (alpha * mix_divergence(w_con, v_c, b_con)).sum(-1)
            metrics = {
                "value/reward": (w_on * v_r).mean(1),  # each agent's part of V^r_tot
                "value/reward_total": mix(w_on, v_r, b_on).mean(1),
                "value/divergence_total": total.mean(1),  # at most 0 in theory; not clamped
                "value/kappa_capped": mean_per_run((kappa_free > c.kappa_max).float()),
            }
        return CriticTerms(z.detach(), rho, losses, y_r, metrics)

    def reward_values(self, batch: Batch, action: Tensor | None) -> Tensor:
        """Return ``w^r_i Q^r_i`` in the shape of :func:`weighted_values`."""
        weights, _ = self.mixer_r_target(batch.state)
        return weighted_values(self.q_r_target, weights, batch.observation, action)

    def total_values(self, batch: Batch, action: Tensor | None, alpha: Tensor) -> Tensor:
        """Return ``w^r_i Q^r_i + alpha_i kappa_i Q^c_i``, under which m_i equals alpha_i over many steps."""
        w_c, _ = self.mixer_c_target(batch.state)
        price = alpha * self.kappa(w_c, alpha).clamp_max(self._config.kappa_max)
        divergence_values = weighted_values(self.q_c_target, price, batch.observation, action)
        return self.reward_values(batch, action) + divergence_values


class EntangledCritic:
    """The ablation w/o-dq: one Q and V for reward and divergence, as in OMIGA (docs/derivation.md#ablations)."""

    def __init__(self, config: Config, networks: NetworkFactory, device: str) -> None:
        self._config = config
        self.q, self.v, self.mixer = networks.q(), networks.v(), networks.mixer(config.mixer_hidden)
        self.online = nn.ModuleList((self.q, self.v, self.mixer)).to(device)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.q_target, self.v_target, self.mixer_target = self.target

    def groups(self) -> list[Group]:
        """Return groups of parameters with their learning rates."""
        lr = self._config.lr
        return [Group(parameters_of(self.q, self.mixer), lr), Group(parameters_of(self.v), lr)]

    def terms(self, batch: Batch, alpha: Tensor) -> CriticTerms:
        """Evaluate all losses on a batch at prices ``alpha`` [R, 1, N]."""
        c = self._config
        with torch.no_grad():
            w, _ = self.mixer_target(batch.state)
            q_target = self.q_target(batch.observation, batch.action)
            w2, b2 = self.mixer_target(batch.next_state)
            y = batch.reward + c.gamma * batch.not_done * mix(w2, self.v_target(batch.next_observation), b2)
        v = self.v(batch.observation)
        z = w / alpha * (q_target - v)
        w_on, b_on = self.mixer(batch.state)
        q_tot = mix(w_on, self.q(batch.observation, batch.action), b_on)
        losses = {
            "reward_critic": mean_per_run((q_tot - y).square()),  # L_Q of OMIGA
            # L_V of OMIGA, exp continued.
            "reward_value": mean_per_run(exp_linear(z, c.z_max) + w * v / alpha),
        }
        metrics = {
            "value/reward": (w_on * v).detach().mean(1),
            "value/reward_total": mix(w_on, v, b_on).detach().mean(1),
        }
        return CriticTerms(z.detach(), torch.exp(z.detach().clamp_max(c.z_max)), losses, y, metrics)

    def reward_values(self, batch: Batch, action: Tensor | None) -> Tensor:
        """Return ``w_i Q_i`` in the shape of :func:`weighted_values`."""
        weights, _ = self.mixer_target(batch.state)
        return weighted_values(self.q_target, weights, batch.observation, action)

    def total_values(self, batch: Batch, action: Tensor | None, alpha: Tensor) -> Tensor:
        """Return the same, as Q holds both reward and divergence."""
        return self.reward_values(batch, action)


def make_policy(config: Config, networks: NetworkFactory) -> nn.Module:
    """Make the module that is snapshotted and exported."""
    return networks.actor()


class Algorithm:
    """Train R runs by OMCDA: one :meth:`update` is one gradient step of each on its batch."""

    def __init__(
        self,
        configs: Sequence[Config],
        networks: NetworkFactory,
        behavior: nn.Module,
        *,
        steps: int,
        device: str = "cpu",
    ) -> None:
        """Start as ``behavior``, the cloned pi_b; warm-up is a share of ``steps``, the planned length."""
        config = self.config = configs[0]
        seeds, agents = networks.seeds or (), len(networks.spec.agents)
        self._steps = steps
        critic = DecoupledCritic if config.decoupled else EntangledCritic
        self.critic: DecoupledCritic | EntangledCritic = critic(config, networks, device)
        self.actor = repeat(behavior, len(configs)).to(device).requires_grad_(True)
        # Gradient noise alone moves a raw network by 0.02 nats per agent, which counts as deviation under a small
        # budget; so the dual, evaluation and export use the average.
        self.policy = repeat(behavior, len(configs)).to(device).requires_grad_(False)
        self._optimizer = JointOptimizer(
            [Group(parameters_of(self.actor), config.lr), *self.critic.groups()],
            config.grad_clip,
            modules={
                "actor": self.actor,
                "policy": self.policy,
                "critic": self.critic.online,
                "critic_target": self.critic.target,
            },
            averages=[(self.policy, self.actor), (self.critic.target, self.critic.online)],
            tau=config.tau,
        )
        self.allocation = Allocation(
            [c.allocation for c in configs],
            agents,
            column(configs, "d_tot", device),
            seeds,
            temperature=column(configs, "temperature", device),
            decay=config.influence_decay**config.reallocate_every,
        )
        single_price = [strategy.single_price for strategy in self.allocation.strategies]
        price = column(configs, "alpha0", device)
        self.dual = Dual(agents, price, config.lr_alpha, single_price=single_price)
        self._settled = column(configs, "settled", device)[:, 0]
        self._noise = Noise(seeds, device)
        self._watch = False  # measure the influence on the total value at the next occasion
        self.step = 0
        self.dual_active = torch.zeros(len(configs), dtype=torch.bool, device=device)
        self._settling = torch.full((len(configs),), math.inf, device=device)

    @property
    def budgets(self) -> Tensor:
        """Budgets d_i [R, N] in nats; under ``optimal``, which holds the sum alone, d_tot/N as a reference line."""
        return self.allocation.budgets

    @property
    def alpha(self) -> Tensor:
        """Prices alpha_i [R, N]."""
        return self.dual.alpha

    def update(self, batch: Batch, watched: bool = True) -> dict[str, Tensor]:
        c = self.config
        alpha = self.dual.alpha.unsqueeze(1)  # [R, 1, N]
        terms = self.critic.terms(batch, alpha)
        log_prob = batch.log_prob(policy_of(self.actor, batch.observation, batch.mask))
        losses = {"policy": -mean_per_run(terms.rho * log_prob), **terms.losses}  # L_pi and the critics'
        self._optimizer.descend(losses)

        with torch.no_grad():
            policy = policy_of(self.policy, batch.observation, batch.mask)
            kl = divergence(policy, batch.behavior).mean(1)  # [R, N]
        metrics = loss_metrics(losses)
        self._watch |= watched
        if self.step % c.reallocate_every == 0:
            metrics |= self._measure_influence(batch, policy, kl, alpha)
        self._settle(losses["reward_critic"].detach(), terms.target)
        metrics["loss/dual"] = self.dual.descend(self.budgets, kl, self.dual_active)  # L_alpha
        self.step += 1
        return {
            **metrics,
            **terms.metrics,
            "kl": kl,
            "budget": self.budgets,
            "alpha": self.dual.alpha,
            "alpha_at_bound": self.dual.at_bound.float(),
            "influence": self.allocation.mean_influence,
            "z/mean_exp": mean_per_run(terms.rho),
            "z/above_max": mean_per_run((terms.z > c.z_max).float()),
            "dual_active": self.dual_active.float(),
        }

    def _measure_influence(
        self, batch: Batch, policy: Distribution, kl: Tensor, alpha: Tensor
    ) -> dict[str, Tensor]:
        """Move the shares; once per logging interval, measure the influence on the total value as well."""
        c = self.config
        values = [lambda action: self.critic.reward_values(batch, action)]
        if self._watch:
            values.append(lambda action: self.critic.total_values(batch, action, alpha))
        gradients = value_gradients(policy, c.influence_samples, self._noise.at(self.step), *values)
        measured = [influence(policy, batch.behavior, gradient, c.metric) for gradient in gradients]
        self.allocation.observe(measured[0], kl)
        if not self._watch:
            return {}
        self._watch = False
        # Where this agrees with alpha_i, influence is the shadow price of the budget; a metric, not a condition.
        return {"influence_with_divergence": measured[1]}

    def _settle(self, loss: Tensor, target: Tensor) -> None:
        """Start the dual of a run once its reward critic explains its targets: before, z is noise."""
        ratio = loss / target.var(1).clamp_min(1e-12)
        self._settling = torch.where(self._settling.isinf(), ratio, 0.99 * self._settling + 0.01 * ratio)
        late = self.step >= self.config.warmup * self._steps
        self.dual_active = self.dual_active | (self._settling < self._settled) | late

    def state_dict(self, run: int) -> dict[str, Any]:
        return {
            **self._optimizer.state_dict(run),
            "allocation": self.allocation.state_dict(run),
            "dual": self.dual.state_dict(run),
            "step": self.step,
            "dual_active": bool(self.dual_active[run]),
            "settling": float(self._settling[run]),
        }

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        self._optimizer.load_state_dicts(states)
        self.allocation.load_state_dicts([state["allocation"] for state in states])
        self.dual.load_state_dicts([state["dual"] for state in states])
        self.step = states[0]["step"]
        device = self._settling.device
        self.dual_active = torch.tensor([state["dual_active"] for state in states], device=device)
        self._settling = torch.tensor([state["settling"] for state in states], device=device)
