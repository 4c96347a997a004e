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
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from omcda_deploy.plugins import Column, Scan
from omcda_deploy.training.allocation import STRATEGIES, Allocation, Dual
from omcda_deploy.training.batches import Batch, noise_at
from omcda_deploy.training.distributions import Distribution, divergence, policy_of
from omcda_deploy.training.influence import INFLUENCE_CURVES, influence, value_gradient, weighted_values
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
SCAN = Scan(
    "d_tot", "allocation", "Budget scan", "d_tot, nats (logarithmic)", "the total budget, per allocation"
)


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

    z: Tensor  # [B, N], detached
    rho: Tensor  # [B, N], detached
    losses: dict[str, Tensor]
    target: Tensor  # y of L_Qr, [B]
    metrics: dict[str, Tensor]


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
        """Return ``sum_k alpha_k w^{c,k}_i / alpha_i``, uncapped: [B, N(k), N(i)], [N] -> [B, N(i)]."""
        return torch.einsum("k,bki->bi", alpha, w_c) / alpha

    def terms(self, batch: Batch, alpha: Tensor) -> CriticTerms:
        """Evaluate all losses on a batch at prices ``alpha`` [N]."""
        c = self._config
        o, s, a = batch.observation, batch.state, batch.action
        o2, s2 = batch.next_observation, batch.next_state
        with torch.no_grad():
            w_r, _ = self.mixer_r_target(s)  # [B, N]
            w_c, _ = self.mixer_c_target(s)  # [B, N(k), N(j)]
            kappa_free = self.kappa(w_c, alpha)
            kappa = kappa_free.clamp_max(c.kappa_max)
            q_r, q_c = self.q_r_target(o, a), self.q_c_target(o, a)
            w_r2, b_r2 = self.mixer_r_target(s2)
            w_c2, b_c2 = self.mixer_c_target(s2)
            discount = c.gamma * batch.not_done
            y_r = batch.reward + discount * mix(w_r2, self.v_r_target(o2), b_r2)
            y_c = discount[:, None] * mix_divergence(w_c2, self.v_c_target(o2), b_c2)
        v_r, v_c = self.v_r(o), self.v_c(o)
        z = w_r / alpha * (q_r - v_r.detach()) + kappa * (q_c - v_c)
        rho = torch.exp(z.detach().clamp_max(c.z_max))

        w_on, b_on = self.mixer_r(s)
        w_con, b_con = self.mixer_c(s)
        q_r_tot = mix(w_on, self.q_r(o, a), b_on)
        q_c_tot = mix_divergence(w_con, self.q_c(o, a), b_con)
        losses = {
            "reward_critic": (q_r_tot - y_r).square().mean(),  # L_Qr
            "divergence_critic": (q_c_tot - y_c).square().mean(),  # L_Qc
            "reward_value": (rho * (q_r - v_r).square()).mean(),  # L_Vr
            "divergence_value": (exp_linear(z, c.z_max) / kappa + v_c).mean(),  # L_Vc
        }
        with torch.no_grad():
            total = torch.einsum("k,bk->b", alpha, mix_divergence(w_con, v_c, b_con))
            metrics = {
                "value/reward": (w_on * v_r).mean(0),  # each agent's part of V^r_tot
                "value/reward_total": mix(w_on, v_r, b_on).mean(),
                "value/divergence_total": total.mean(),  # at most 0 in theory; not clamped
                "value/kappa_capped": (kappa_free > c.kappa_max).float().mean(),
            }
        return CriticTerms(z.detach(), rho, losses, y_r, metrics)

    def reward_values(self, batch: Batch, action: Tensor | None) -> Tensor:
        """Return ``w^r_i Q^r_i`` in the shape of :func:`weighted_values`."""
        return weighted_values(self.q_r_target, self.mixer_r_target(batch.state)[0], batch, action)

    def total_values(self, batch: Batch, action: Tensor | None, alpha: Tensor) -> Tensor:
        """Return ``w^r_i Q^r_i + alpha_i kappa_i Q^c_i``, under which m_i equals alpha_i over many steps."""
        w_c, _ = self.mixer_c_target(batch.state)
        price = alpha * self.kappa(w_c, alpha).clamp_max(self._config.kappa_max)
        return self.reward_values(batch, action) + weighted_values(self.q_c_target, price, batch, action)


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
        """Evaluate all losses on a batch at prices ``alpha`` [N]."""
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
            "reward_critic": (q_tot - y).square().mean(),  # L_Q of OMIGA
            "reward_value": (exp_linear(z, c.z_max) + w * v / alpha).mean(),  # L_V of OMIGA, exp continued
        }
        metrics = {
            "value/reward": (w_on * v).detach().mean(0),
            "value/reward_total": mix(w_on, v, b_on).detach().mean(),
        }
        return CriticTerms(z.detach(), torch.exp(z.detach().clamp_max(c.z_max)), losses, y, metrics)

    def reward_values(self, batch: Batch, action: Tensor | None) -> Tensor:
        """Return ``w_i Q_i`` in the shape of :func:`weighted_values`."""
        return weighted_values(self.q_target, self.mixer_target(batch.state)[0], batch, action)

    def total_values(self, batch: Batch, action: Tensor | None, alpha: Tensor) -> Tensor:
        """Return the same, as Q holds both reward and divergence."""
        return self.reward_values(batch, action)


def make_policy(config: Config, networks: NetworkFactory) -> nn.Module:
    """Make the module that is snapshotted and exported."""
    return networks.actor()


class Algorithm:
    """Train by OMCDA: one :meth:`update` is one gradient step on a batch."""

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
        """Start as ``behavior``, the cloned pi_b; warm-up is a share of ``steps``, the planned length."""
        self.config = config
        self._steps, self._seed, self._device = steps, seed, device
        agents = len(networks.spec.agents)
        self.critic: DecoupledCritic | EntangledCritic = (
            DecoupledCritic if config.decoupled else EntangledCritic
        )(config, networks, device)
        self.behavior = behavior.to(device).requires_grad_(False)
        self.actor = copy.deepcopy(behavior).to(device).requires_grad_(True)
        # Gradient noise alone moves a raw network by 0.02 nats per agent, which counts as deviation under a small
        # budget; so the dual, evaluation and export use the average.
        self.policy = copy.deepcopy(behavior).to(device).requires_grad_(False)
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
            config.allocation,
            agents,
            config.d_tot,
            seed,
            temperature=config.temperature,
            decay=config.influence_decay**config.reallocate_every,
        )
        single = self.allocation.strategy.single_price
        self.dual = Dual(agents, config.alpha0, config.lr_alpha, single_price=single)
        self.step = 0
        self.dual_active = False
        self._settling = math.inf

    @property
    def budgets(self) -> Tensor:
        """Budgets d_i [N] in nats; under ``optimal``, which holds the sum alone, d_tot/N as a reference line."""
        return self.allocation.budgets

    @property
    def alpha(self) -> Tensor:
        """Prices alpha_i [N]."""
        return self.dual.alpha

    def update(self, batch: Batch) -> dict[str, Tensor]:
        c = self.config
        alpha = self.dual.alpha.to(self._device)
        terms = self.critic.terms(batch, alpha)
        log_prob = policy_of(self.actor, batch.observation, batch.mask).log_prob(batch.action)
        losses = {"policy": -(terms.rho * log_prob).mean(), **terms.losses}  # L_pi and the critics'
        self._optimizer.descend(losses)

        with torch.no_grad():
            policy = policy_of(self.policy, batch.observation, batch.mask)
            behavior = policy_of(self.behavior, batch.observation, batch.mask)
            kl = divergence(policy, behavior).mean(0).cpu()
        metrics = loss_metrics(losses)
        if self.step % c.reallocate_every == 0:
            metrics |= self._measure_influence(batch, policy, behavior, kl, alpha)
        self._settle(losses["reward_critic"], terms.target)
        if self.dual_active:
            metrics["loss/dual"] = self.dual.descend(self.budgets, kl)  # L_alpha
        self.step += 1
        return {
            **metrics,
            **terms.metrics,
            "kl": kl,
            "budget": self.budgets,
            "alpha": self.dual.alpha,
            "alpha_at_bound": self.dual.at_bound.float(),
            "influence": self.allocation.mean_influence,
            "z/mean_exp": terms.rho.mean(),
            "z/above_max": (terms.z > c.z_max).float().mean(),
            "dual_active": torch.tensor(float(self.dual_active)),
        }

    def _measure_influence(
        self, batch: Batch, policy: Distribution, behavior: Distribution, kl: Tensor, alpha: Tensor
    ) -> dict[str, Tensor]:
        c = self.config

        def measure(with_divergence: bool) -> Tensor:
            noise = noise_at(self._seed, self.step, self._device)  # the same actions for both measurements

            def values(action: Tensor | None) -> Tensor:
                if with_divergence:
                    return self.critic.total_values(batch, action, alpha)
                return self.critic.reward_values(batch, action)

            gradients = value_gradient(values, policy, c.influence_samples, noise)
            return influence(policy, behavior, gradients, c.metric).cpu()

        self.allocation.observe(measure(with_divergence=False), kl)
        # Where this agrees with alpha_i, influence is the shadow price of the budget; a metric, not a condition.
        return {"influence_with_divergence": measure(with_divergence=True)}

    def _settle(self, loss: Tensor, target: Tensor) -> None:
        """Start the dual once the reward critic explains its targets: before, z is noise."""
        if self.dual_active:
            return
        ratio = float(loss.detach() / target.var().clamp_min(1e-12))
        self._settling = ratio if math.isinf(self._settling) else 0.99 * self._settling + 0.01 * ratio
        self.dual_active = (
            self._settling < self.config.settled or self.step >= self.config.warmup * self._steps
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            **self._optimizer.state_dict(),
            "allocation": self.allocation.state_dict(),
            "dual": self.dual.state_dict(),
            "step": self.step,
            "dual_active": self.dual_active,
            "settling": self._settling,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(state)
        self.allocation.load_state_dict(state["allocation"])
        self.dual.load_state_dict(state["dual"])
        self.step, self.dual_active = state["step"], state["dual_active"]
        self._settling = state["settling"]
