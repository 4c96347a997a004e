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

With ``value_start=data``, the target of L_Qr is r + gamma m U(s') for the share ``warmup`` of the steps, and U is
regressed on the data's returns-to-go meanwhile.

E_b is the mean over the behaviour policy's actions in the data. E(z) continues exp linearly above z_max: a clamp
there would have no gradient and let V run away; its derivative is rho, hence rho instead of exp z at the minimum
of L_Vc.

Source: docs/derivation.md, which also lists where the paper and this file differ. The defaults did best in trials:
W^c is the identity, one price is solved for all agents, at which their influences are equal, critics evaluate
policies of at most 0.3 nats, targets stay within the data's returns, mixers see standardised states. ``--recipe
paper`` has the paper's forms.

Ablations: ``allocation=uniform`` (w/o-CDA), ``allocation=random`` (rd), ``decoupled=false`` (w/o-dq: one entangled
Q and V as in OMIGA, ``z_i = (w_i/alpha_i)(Q_i - V_i)``).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor, nn

from omcda_deploy.errors import ConfigError
from omcda_deploy.plugins import Column, Scan
from omcda_deploy.training.allocation import STRATEGIES, Allocation
from omcda_deploy.training.batches import Batch
from omcda_deploy.training.critics import CriticTerms, DecoupledCritic, EntangledCritic
from omcda_deploy.training.distributions import Distribution, divergence, policy_of
from omcda_deploy.training.fleet import Noise, batch_mean, column, mean_per_run
from omcda_deploy.training.influence import INFLUENCE_CURVES, influence, value_gradients
from omcda_deploy.training.metrics import KL
from omcda_deploy.training.networks import NetworkFactory
from omcda_deploy.training.optimizer import Group, JointOptimizer, loss_metrics, parameters_of
from omcda_deploy.training.prices import SOLVE_EVERY, WINDOW, Dual, PriceSolver, Settling, SolvedPrice
from omcda_deploy.training.settings import (
    BatchSize,
    Choice,
    Count,
    Discount,
    GradientNorm,
    LearningRate,
    MixerWidth,
    Range,
    StandardizeStates,
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
PER_RUN = ("d_tot", "allocation", "alpha0", "share_temperature", "settled")
_RECORDED_LR = 1e-3  # a regression, on targets that stand still
SCAN = Scan("d_tot", "allocation", "Budget scan", "d_tot, nats (logarithmic)", "the budget, per allocation")


@dataclass(frozen=True)
class Config:
    """Settings of OMCDA; the defaults are the starting point for MA-MuJoCo rewards."""

    d_tot: Annotated[
        float, Range(1e-6, 1e3), "total budget in nats per step, of all agents; auto: chosen from the data"
    ] = 0.1
    allocation: Annotated[
        str,
        Choice(*STRATEGIES),
        "how the budget is shared: optimal, by one price for all, or the paper's influence; uniform and random are "
        "ablations",
    ] = "optimal"
    d_eval: Annotated[
        float,
        Range(0.0, 1e3),
        "most nats, in total, of the policies that the critics evaluate; 0: pi_b",
    ] = 0.3
    decoupled: Annotated[bool, "values of reward and divergence apart; false: the ablation w/o-dq"] = True
    divergence_mixer: Annotated[
        str, Choice("learned", "identity"), "W^c: learned as in the paper, or the identity"
    ] = "identity"
    alpha0: Annotated[
        float,
        Range(1e-6, 1e6),
        "first price alpha_i, in the unit of returns per nat; bounds are multiples of it",
    ] = 10.0
    share_temperature: Annotated[
        float, Range(1e-3, 1e3), "T of softmax(m/T), which turns influences into shares of the budget"
    ] = 1.0
    metric: Annotated[
        str, Choice("euclidean", "fisher"), "inner product of the gradients whose ratio is the influence"
    ] = "euclidean"
    influence_samples: Annotated[
        int, Range(1, 1024), "continuous: actions per state for the reparameterised gradient"
    ] = 4
    influence_decay: Annotated[
        float, Range(0.0, 1.0 - 1e-9), "decay of the average of the influences m_i, per step"
    ] = 0.99
    reallocate_every: Annotated[Count, "steps between measurements of m_i"] = 10
    z_max: Annotated[float, Range(0.1, 50.0), "z above which exp z goes on linearly and weights are cut"] = (
        5.0
    )
    kappa_max: Annotated[float, Range(1.0, 1e6), "largest kappa_i"] = 10.0
    settled: Annotated[float, Range(0.0), "the dual starts once the average of L_Qr/Var(y) is below this"] = (
        0.1
    )
    warmup: Annotated[Unit, "share of the steps after which the dual starts in any case"] = 0.2
    price: Annotated[
        str,
        Choice("gradient", "solved"),
        "how alpha_i is found: by gradient (the paper's dual), or solved on the last batches",
    ] = "solved"
    divergence_over: Annotated[
        str,
        Choice("steps", "choices"),
        "agent-steps over which divergence is averaged: all, or those with a choice (discrete)",
    ] = "choices"
    value_start: Annotated[
        str,
        Choice("data", "zero"),
        "where reward values begin: at the data's for the share warmup of the steps, or at zero",
    ] = "data"
    clip_targets: Annotated[bool, "clip targets to the data's returns-to-go"] = True
    lr: LearningRate = 5e-4
    lr_divergence: Annotated[LearningRate, "step size of Adam for Q^c, V^c and their mixer"] = 1e-4
    lr_alpha: Annotated[float, Range(0.0, 10.0), "step size of the dual, for alpha_i"] = 3e-3
    gamma: Discount = 0.99
    tau: Tau = 0.005
    tau_policy: Annotated[Tau, "step of the averaged policy, which is exported"] = 0.005
    grad_clip: GradientNorm = 1.0
    batch_size: BatchSize = 128
    hidden: Width = 256
    mixer_hidden: MixerWidth = 64
    standardize_states: StandardizeStates = True

    def __post_init__(self) -> None:
        check(self)
        if self.d_eval < self.d_tot and self.price != "solved":
            raise ConfigError(
                f"omcda.d_eval: expected at least d_tot ({self.d_tot:g}) with price=gradient, got {self.d_eval:g}: "
                "set price=solved, or d_eval=1000, which has no effect"
            )


def make_policy(config: Config, networks: NetworkFactory) -> nn.Module:
    """Make the module that is snapshotted and exported."""
    return networks.actor()


class Plan(NamedTuple):
    """Choices on which the operations of a step depend beside its tensors."""

    measures: bool  # the influence
    watches: bool  # the influence on the total value, too, once per logging interval
    late: bool  # the prices wait no longer
    collects: bool  # exponents, from which prices are solved
    solves: bool  # for the prices


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
        """Start as ``behavior``, the runs' cloned pi_b; warm-up is a share of ``steps``, the planned length."""
        config = self.config = configs[0]
        seeds, agents = networks.seeds or (), len(networks.spec.agents)
        self._steps = steps
        critic = DecoupledCritic if config.decoupled else EntangledCritic
        self.critic: DecoupledCritic | EntangledCritic = critic(config, networks, device)
        self.actor = copy.deepcopy(behavior).to(device).requires_grad_(True)
        # Gradient noise alone moves a raw network by 0.02 nats per agent, which counts as deviation under a small
        # budget; so the dual, evaluation and export use the average.
        self.policy = copy.deepcopy(behavior).to(device).requires_grad_(False)
        groups = [Group(parameters_of(self.actor), config.lr), *self.critic.groups()]
        modules = {
            "actor": self.actor,
            "policy": self.policy,
            "critic": self.critic.online,
            "critic_target": self.critic.target,
        }
        if (recorded := self.critic.recorded) is not None:
            groups.append(Group(parameters_of(recorded.network), _RECORDED_LR))
            modules["recorded_value"] = recorded.network
        self._optimizer = JointOptimizer(
            groups,
            config.grad_clip,
            modules=modules,
            averages=[(self.policy, self.actor), (self.critic.target, self.critic.online)],
            tau=[config.tau_policy, config.tau],
        )
        d_tot, d_eval = column(configs, "d_tot", device), column(configs, "d_eval", device)
        self.allocation = Allocation(
            [c.allocation for c in configs],
            agents,
            d_tot,
            seeds,
            temperature=column(configs, "share_temperature", device),
            decay=config.influence_decay**config.reallocate_every,
        )
        single_price = [strategy.single_price for strategy in self.allocation.strategies]
        price = column(configs, "alpha0", device)
        self.dual: Dual | SolvedPrice
        self._solver: PriceSolver | None = None
        if config.price == "gradient":
            self.dual = Dual(agents, price, config.lr_alpha, single_price=single_price)
        else:
            self._solver = PriceSolver(
                agents,
                price,
                d_tot,
                d_eval,
                single_price=single_price,
                z_max=config.z_max,
                tau_policy=config.tau_policy,
            )
            self.dual = self._solver.price
        self.settling = Settling(column(configs, "settled", device)[:, 0])
        self.noise = Noise(seeds, device)
        self._watch = False  # measure the influence on the total value at the next occasion
        self.step = 0

    @property
    def budgets(self) -> Tensor:
        """Budgets d_i [R, N] in nats."""
        return self.allocation.budgets

    @property
    def alpha(self) -> Tensor:
        """Prices alpha_i [R, N]."""
        return self.dual.alpha

    def update(self, batch: Batch, watched: bool = True) -> dict[str, Tensor]:
        return self.compute(batch, self.begin(watched))

    def begin(self, watched: bool) -> Plan:
        c, step = self.config, self.step
        self._watch |= watched
        measures = step % c.reallocate_every == 0
        late = step >= c.warmup * self._steps
        missing = SOLVE_EVERY - 1 - step % SOLVE_EVERY if c.price == "solved" else SOLVE_EVERY  # steps
        plan = Plan(measures, measures and self._watch, late, missing < WINDOW, missing == 0)
        self._watch &= not measures
        self.noise.at(step)
        self.step += 1
        return plan

    def compute(self, batch: Batch, plan: Plan) -> dict[str, Tensor]:
        c = self.config
        alpha = self.dual.alpha.unsqueeze(1)  # [R, 1, N]
        eval_alpha, eval_budgets = self._evaluated()
        terms = self.critic.terms(batch, eval_alpha.unsqueeze(1), eval_budgets, begins=not plan.late)
        rho = self._weights(terms, alpha)
        log_prob = batch.log_prob(policy_of(self.actor, batch.observation, batch.mask))
        losses = {"policy": -mean_per_run(rho * log_prob), **terms.losses}  # L_pi and the critics'
        self._optimizer.descend(losses)

        with torch.no_grad():
            policy = policy_of(self.policy, batch.observation, batch.mask)
            choices = self._choices(batch)
            per_step = divergence(policy, batch.behavior)
            kl = per_step.mean(1)  # [R, N]
            if choices is not None:
                kl = batch_mean(per_step * choices) / batch_mean(choices).clamp_min(1e-6)
        metrics = loss_metrics(losses)
        if plan.measures:
            if batch.return_to_go is not None:
                metrics["value/return_to_go"] = batch.return_to_go.mean(1)  # what V^r_tot is measured against
            metrics |= self._measure_influence(batch, policy, kl, alpha, plan.watches)
        active = self.settling.observe(losses["reward_critic"].detach(), terms.target, plan.late)
        metrics |= self._find_prices(terms, kl, choices, active, plan)
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
            "dual_active": active.float(),
        }

    def _evaluated(self) -> tuple[Tensor, Tensor]:
        """Prices and largest budgets, [R, N] each, of the policies that the critics evaluate."""
        if self._solver is None:
            return self.dual.alpha, self.budgets
        return self._solver.eval_alpha, self._solver.eval_budgets(self.budgets)

    def _weights(self, terms: CriticTerms, alpha: Tensor) -> Tensor:
        """Weights rho [R, B, N] of the policy's loss.

        Where the critics evaluate other policies, V^c does not normalise the actor's exponents; the batch does.
        """
        if self._solver is None:
            return terms.rho
        z = terms.advantage / alpha + terms.correction
        rho = torch.exp(z.clamp_max(self.config.z_max))
        normalised = rho / batch_mean(rho).unsqueeze(1)
        return torch.where(self._solver.capped.unsqueeze(1), normalised, terms.rho)

    def _choices(self, batch: Batch) -> Tensor | None:
        """1 where a divergence counts, else 0: [R, B, N]; None: it counts everywhere."""
        if batch.mask is None or self.config.divergence_over == "steps":
            return None
        return (batch.mask.sum(-1) > 1).float()

    def _find_prices(
        self, terms: CriticTerms, kl: Tensor, choices: Tensor | None, active: Tensor, plan: Plan
    ) -> dict[str, Tensor]:
        """Move the prices of the ``active`` runs towards the budgets."""
        if isinstance(self.dual, Dual):
            return {"loss/dual": self.dual.descend(self.budgets, kl, active)}  # L_alpha
        assert self._solver is not None
        if plan.collects:
            weight = torch.ones_like(terms.z) if choices is None else choices
            self._solver.exponents.add(terms.advantage, terms.correction, weight)
        if plan.solves:
            self._solver.solve(self.budgets, kl, active)
        return {}

    def _measure_influence(
        self, batch: Batch, policy: Distribution, kl: Tensor, alpha: Tensor, watches: bool
    ) -> dict[str, Tensor]:
        """Move the shares; with ``watches``, measure the influence on the total value as well."""
        c = self.config
        values = [lambda action: self.critic.reward_values(batch, action)]
        if watches:
            values.append(lambda action: self.critic.total_values(batch, action, alpha))
        gradients = value_gradients(policy, c.influence_samples, self.noise, *values)
        measured = [influence(policy, batch.behavior, gradient, c.metric) for gradient in gradients]
        self.allocation.observe(measured[0], kl)
        # Where the second agrees with alpha_i, influence is the shadow price of the budget; a metric, no condition.
        return {"influence_with_divergence": measured[1]} if watches else {}

    def state_dict(self, run: int) -> dict[str, Any]:
        return {
            **self._optimizer.state_dict(run),
            "allocation": self.allocation.state_dict(run),
            "dual": self.dual.state_dict(run),
            **({} if self._solver is None else self._solver.state_dict(run)),
            "step": self.step,
            **self.settling.state_dict(run),
        }

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        self._optimizer.load_state_dicts(states)
        self.allocation.load_state_dicts([state["allocation"] for state in states])
        self.dual.load_state_dicts([state["dual"] for state in states])
        if self._solver is not None:
            self._solver.load_state_dicts(states)
        self.step = states[0]["step"]
        self.settling.load_state_dicts(states)
