"""OMIGA: offline MARL with implicit global-to-local value regularisation (Wang et al., NeurIPS 2023, 2307.11620).

One price alpha for the whole team, one entangled Q and V, a linear mixer shared by both. Losses on dataset actions
(bars: target networks, no gradient; m = 1 - terminal):

    y    = r + gamma m ( sum_i wbar_i(s') Vbar_i(o'_i) + bbar(s') )
    L_Q  = ( sum_i w_i Q_i + b - y )^2
    z_i  = clamp( (wbar_i/alpha)(Qbar_i - V_i), -10, 10 ),  gradient through V_i alone
    M    = max(-1, max z)
    L_V  = exp(z_i - M) + exp(-M) wbar_i V_i / alpha;   its minimiser has E_data[exp z_i] = 1
    L_pi = -exp(z_i) log pi_i(a_i|o_i)

Deviations from the published code: discrete policies are masked by availability in training too; the share of
clamped z is reported; time limits bootstrap unless asked otherwise (``train --time-limit-is-terminal``).

Source: docs/baselines.md#omiga.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from omcda_deploy.plugins import Column
from omcda_deploy.training.batches import Batch
from omcda_deploy.training.distributions import divergence, policy_of
from omcda_deploy.training.fleet import column, mean_per_run
from omcda_deploy.training.losses import mix
from omcda_deploy.training.metrics import KL
from omcda_deploy.training.networks import NetworkFactory
from omcda_deploy.training.optimizer import Group, JointOptimizer, loss_metrics, parameters_of
from omcda_deploy.training.settings import (
    BatchSize,
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

PAPER = "Offline Multi-Agent Reinforcement Learning with Implicit Global-to-Local Value Regularization (2023)"
SUMMARY = "one price for the team; in-sample values and exp-weighted cloning"
ACTIONS = frozenset({"continuous", "discrete"})
DIVERGENCE = {"continuous": "kl", "discrete": "kl"}
PER_RUN = ("alpha",)
COLUMNS = (
    KL,
    Column("z/mean_exp", "mean exp z", per_agent=False),
    Column("z/clamped", "z clamped", per_agent=False),
)


@dataclass(frozen=True)
class Config:
    """Settings of OMIGA as published for MA-MuJoCo."""

    alpha: Annotated[float, Range(1e-6, 1e6), "price of divergence, one for the team"] = 10.0
    z_max: Annotated[float, Range(0.1, 50.0), "cap of the exponent z in the weights"] = 10.0
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


def value_loss(z: Tensor, weighted_value: Tensor) -> Tensor:
    """Return L_V, ``mean[ exp(z - M) + exp(-M) w V / alpha ]``; ``weighted_value`` is ``w V / alpha``.

    [R, B, N], [R, B, N] -> [R].
    """
    largest = z.detach().amax((1, 2), keepdim=True).clamp_min(-1.0)
    return mean_per_run(torch.exp(z - largest) + torch.exp(-largest) * weighted_value)


def make_policy(config: Config, networks: NetworkFactory) -> nn.Module:
    """Make the module that is snapshotted and exported."""
    return networks.actor()


class Algorithm:
    """Train R runs by OMIGA: one :meth:`update` is one gradient step of each on its batch."""

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
        self.q, self.v, self.mixer = networks.q(), networks.v(), networks.mixer(config.mixer_hidden)
        self.policy = make_policy(config, networks).to(device)
        self.online = nn.ModuleList((self.q, self.v, self.mixer)).to(device)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.q_target, self.v_target, self.mixer_target = self.target
        self._optimizer = JointOptimizer(
            [
                Group(parameters_of(self.policy), config.lr),
                Group(parameters_of(self.q, self.mixer), config.lr),
                Group(parameters_of(self.v), config.lr),
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
        self.step += 1
        return ()  # every step is like the others

    def compute(self, batch: Batch, plan: tuple[()]) -> dict[str, Tensor]:
        c, alpha = self.config, self._alpha
        with torch.no_grad():
            w, _ = self.mixer_target(batch.state)
            q_target = self.q_target(batch.observation, batch.action)
            w2, b2 = self.mixer_target(batch.next_state)
            y = batch.reward + c.gamma * batch.not_done * mix(w2, self.v_target(batch.next_observation), b2)
        q, v = self.q(batch.observation, batch.action), self.v(batch.observation)
        unclamped = w / alpha * (q_target - v)
        z = unclamped.clamp(-c.z_max, c.z_max)
        w_on, b_on = self.mixer(batch.state)
        policy = policy_of(self.policy, batch.observation, batch.mask)
        losses = {
            "policy": -mean_per_run(z.detach().exp() * batch.log_prob(policy)),  # L_pi
            "critic": mean_per_run((mix(w_on, q, b_on) - y).square()),  # L_Q
            "value": value_loss(z, w * v / alpha),  # L_V
        }
        self._optimizer.descend(losses)
        with torch.no_grad():
            return {
                **loss_metrics(losses),
                "kl": divergence(policy, batch.behavior).mean(1),
                "value/reward_total": mix(w_on, v, b_on).mean(1),
                "z/mean_exp": mean_per_run(z.exp()),
                "z/clamped": mean_per_run((unclamped.abs() > c.z_max).float()),
            }

    def state_dict(self, run: int) -> dict[str, Any]:
        return {**self._optimizer.state_dict(run), "step": self.step}

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        self._optimizer.load_state_dicts(states)
        self.step = states[0]["step"]
