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
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from omcda_deploy.training.batches import Batch
from omcda_deploy.training.distributions import divergence, policy_of
from omcda_deploy.training.learner import Group, Learner, parameters_of
from omcda_deploy.training.losses import mix
from omcda_deploy.training.networks import NetworkFactory
from omcda_deploy.training.settings import require

PAPER = "Offline Multi-Agent Reinforcement Learning with Implicit Global-to-Local Value Regularization (2023)"
SUMMARY = "one price for the team; in-sample values and exp-weighted cloning"
ACTIONS = frozenset({"continuous", "discrete"})
DIVERGENCE = {"continuous": "kl", "discrete": "kl"}


@dataclass(frozen=True)
class Config:
    """Settings of OMIGA as published for MA-MuJoCo."""

    alpha: float = 10.0
    z_max: float = 10.0
    lr: float = 5e-4
    gamma: float = 0.99
    tau: float = 0.005
    grad_clip: float = 1.0
    batch_size: int = 128
    hidden: int = 256
    mixer_hidden: int = 64

    def __post_init__(self) -> None:
        require(
            self,
            alpha=(1e-6, 1e6),
            z_max=(0.1, 50.0),
            lr=(0.0, 1.0),
            gamma=(0.0, 1.0),
            tau=(1e-6, 1.0),
            grad_clip=(1e-6, math.inf),
            batch_size=(1, 10**6),
            hidden=(1, 65536),
            mixer_hidden=(1, 65536),
        )


def value_loss(z: Tensor, weighted_value: Tensor) -> Tensor:
    """``mean[ exp(z - M) + exp(-M) w V / alpha ]``; ``weighted_value`` is ``w V / alpha`` [B, N]."""
    largest = z.detach().max().clamp_min(-1.0)
    return (torch.exp(z - largest) + torch.exp(-largest) * weighted_value).mean()


def make_policy(config: Config, networks: NetworkFactory) -> nn.Module:
    """The module that is snapshotted and exported."""
    return networks.actor()


class Algorithm:
    """OMIGA's learner: one :meth:`update` is one gradient step on a batch."""

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
        self.config = config
        self.q, self.v, self.mixer = networks.q(), networks.v(), networks.mixer(config.mixer_hidden)
        self.policy = make_policy(config, networks).to(device)
        self.behavior = behavior.to(device).requires_grad_(False)
        self.online = nn.ModuleList((self.q, self.v, self.mixer)).to(device)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.q_target, self.v_target, self.mixer_target = self.target
        self._learner = Learner(
            [
                Group(parameters_of(self.policy), config.lr),
                Group(parameters_of(self.q, self.mixer), config.lr),
                Group(parameters_of(self.v), config.lr),
            ],
            config.grad_clip,
            averages=[(self.target, self.online)],
            tau=config.tau,
        )
        self.step = 0

    @property
    def budgets(self) -> None:
        """OMIGA has no budget per agent."""
        return None

    @property
    def alpha(self) -> None:
        return None

    def update(self, batch: Batch) -> dict[str, Tensor]:
        c = self.config
        with torch.no_grad():
            w, _ = self.mixer_target(batch.state)
            q_target = self.q_target(batch.observation, batch.action)
            w2, b2 = self.mixer_target(batch.next_state)
            y = batch.reward + c.gamma * batch.not_done * mix(w2, self.v_target(batch.next_observation), b2)
        v = self.v(batch.observation)
        unclamped = w / c.alpha * (q_target - v)
        z = unclamped.clamp(-c.z_max, c.z_max)
        w_on, b_on = self.mixer(batch.state)
        policy = policy_of(self.policy, batch.observation, batch.mask)
        losses = {
            "policy": -(z.detach().exp() * policy.log_prob(batch.action)).mean(),
            "critic": (mix(w_on, self.q(batch.observation, batch.action), b_on) - y).square().mean(),
            "value": value_loss(z, w * v / c.alpha),
        }
        self._learner.descend(losses)
        self.step += 1
        with torch.no_grad():
            behavior = policy_of(self.behavior, batch.observation, batch.mask)
            return {
                **{f"loss/{name}": loss.detach() for name, loss in losses.items()},
                "kl": divergence(policy, behavior).mean(0),
                "value/reward_total": mix(w_on, v, b_on).mean(),
                "z/mean_exp": z.exp().mean(),
                "z/clamped": (unclamped.abs() > c.z_max).float().mean(),
            }

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
